"""vLLM serves quantkit checkpoints with quantkit's kernels: a plug-in of vLLM's group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. `vllm serve DIR` then finds `quant_method: quantkit` in config.json, and
`--quantization quantkit` also takes over compressed-tensors checkpoints of 4-bit weights beside 16-bit activations. Tensor
parallelism cuts rows and columns as vLLM does for its own formats. Mixtures of experts, channel scales and an
order of columns are refused.

vLLM is imported when it calls, not before, and a version whose interface differs costs a warning alone.
"""

import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from quantkit.errors import QuantKitError
from quantkit.formats.affine import storable_dtype
from quantkit.formats.compressed_tensors import PACKED, group_of
from quantkit.hf import METHOD, QuantKitConfig
from quantkit.linear import QuantLinear, tensor_specs
from quantkit.packing import QuantizedTensor, run_of
from quantkit.scheme import GROUP_SIZES, Scheme, parse_scheme

NATIVE = {part: part for part in ("codes", "scales", "zeros", "input_scale")} | {"guard": "weight"}
COMPRESSED_TENSORS = {"codes": "weight_packed", "scales": "weight_scale", "guard": "weight_shape"}
MIN_CAPABILITY = 80


def register() -> None:
    """The entry point; it may be called any number of times."""
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        config = config_class()
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning(
            "quantkit: not registered, this vLLM's interface differs: %s", error
        )
        return
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(config)


class Schemes:
    """Which linear of a checkpoint has which scheme, and how its tensors are called there.

    Attributes:
        names: of the tensors, by quantkit's names of them.
        modules: scheme by module, of quantkit's own checkpoints.
        ignored: modules, or expressions after `re:`, of compressed-tensors ones; all other linears have `common`.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.names, self.common = NATIVE, None
        self.modules: dict[str, Scheme] = {}
        self.ignored: list[str] = []
        if content.get("quant_method") == METHOD:
            config = QuantKitConfig.from_dict(content)
            self.modules = {name: config.scheme_of(name) for name in config.modules}
            for name in config.modules:
                if config.has_channel_scales(name) or config.has_input_order(name):
                    raise QuantKitError(
                        f"{name}: has channel scales or an order of columns, which the vLLM plug-in does not serve; quantize "
                        "with a method whose scales are folded, or serve it by transformers"
                    )
            return
        self.names = COMPRESSED_TENSORS
        self.common = compressed_scheme(content)
        self.ignored = list(content.get("ignore") or [])

    def of(self, prefix: str, fused: dict[str, list[str]]) -> Scheme | None:
        """The scheme of vLLM's linear of this name; None where it is not packed.

        Args:
            fused: names of vLLM's merged linears -> those of their parts.

        Raises:
            QuantKitError: the parts of a merged linear differ.
        """
        parent, dot, name = prefix.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in fused.get(name, [name])]
        found = {self.of_part(part) for part in parts}
        if len(found) > 1:
            labels = sorted(scheme.label if scheme else "not packed" for scheme in found)
            raise QuantKitError(
                f"{prefix}: vLLM merges {', '.join(parts)}, but they are {', '.join(labels)}; give them one scheme"
            )
        return found.pop()

    def of_part(self, name: str) -> Scheme | None:
        if self.common is None:
            return self.modules.get(name)
        for entry in self.ignored:
            if entry == name or (entry.startswith("re:") and re.match(entry[3:], name)):
                return None
        return self.common


def compressed_scheme(content: dict[str, Any]) -> Scheme:
    """The one scheme of a compressed-tensors config that this plug-in takes over.

    Raises:
        QuantKitError: it has another one, or several.
    """
    groups = content.get("config_groups") or {}
    if len(groups) != 1:
        raise QuantKitError(
            f"config.json: {len(groups)} config_groups, expected one to be served by quantkit"
        )
    (group,) = (group_of(group, content) for group in groups.values())
    known = (group.format, group.bits, group.symmetric, group.activation) == (PACKED, 4, True, None)
    if not known or group.group_size not in (None, *GROUP_SIZES):
        raise QuantKitError(
            f"config.json: {group.bits}-bit {group.format}, symmetric {group.symmetric}, group_size {group.group_size}; "
            "expected 4-bit pack-quantized weights, symmetric, without activations: leave --quantization out"
        )
    return parse_scheme(f"w4a16-g{group.group_size}" if group.group_size else "w4a16-channel")


def check_shard(scheme: Scheme, K: int, whole_K: int, rows: list[int], whole_N: int) -> None:
    """Refuses a cut of a weight through a group, a block or a word."""
    step = scheme.group_size or scheme.block_size or 1
    if scheme.bits < 8:
        step = max(step, run_of(scheme.bits)[0])
    if K != whole_K and K % step:
        raise QuantKitError(
            f"{scheme.label}: tensor parallelism cuts {whole_K} columns into {K}, expected multiples of {step}; use fewer GPUs"
        )
    block = scheme.block_size
    if block and (len(rows) > 1 or sum(rows) != whole_N) and any(n % block for n in rows):
        raise QuantKitError(
            f"{scheme.label}: parts of {', '.join(map(str, rows))} rows, expected multiples of {block}; use fewer GPUs"
        )


def packed_of(scheme: Scheme, shape: tuple[int, int], parts: dict[str, torch.Tensor]) -> QuantizedTensor:
    """A weight from what was loaded: scales of few bits come in float32, an input scale for each part."""
    scales, input_scale = parts["scales"], parts.get("input_scale")
    if scheme.bits < 8:
        dtype = storable_dtype(scales)
        if dtype is None:
            raise QuantKitError(f"{scheme.label}: scales that neither float16 nor bfloat16 holds exactly")
        scales = scales.to(dtype)
    if input_scale is not None:
        input_scale = input_scale.max().reshape(1)  # x is rounded once for all parts
    return QuantizedTensor(scheme, shape, parts["codes"], scales, parts.get("zeros"), input_scale)


def ignore(*args: Any, **kwargs: Any) -> None:
    """Loads nothing: of the tensor that only tells others to stop."""


@cache
def config_class() -> Any:
    """vLLM's `QuantizationConfig` of quantkit; needs vLLM."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class QuantKitVLLMConfig(QuantizationConfig):  # type: ignore[misc]
        def __init__(self, content: dict[str, Any]) -> None:
            super().__init__()
            self.schemes = Schemes(content)

        def get_name(self) -> str:
            return METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            return MIN_CAPABILITY

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            return cls(config)

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, *args: Any, **kwargs: Any
        ) -> str | None:
            method = (hf_quant_cfg or {}).get("quant_method")
            return METHOD if user_quant == METHOD and method in (METHOD, "compressed-tensors") else None

        def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
            self.schemes.modules = hf_to_vllm_mapper.apply_dict(self.schemes.modules)
            self.schemes.ignored = hf_to_vllm_mapper.apply_list(self.schemes.ignored)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if isinstance(layer, LinearBase):
                scheme = self.schemes.of(prefix, self.packed_modules_mapping)
                return (
                    UnquantizedLinearMethod()
                    if scheme is None
                    else method_class()(scheme, self.schemes.names)
                )
            if any(name.startswith(f"{prefix}.") for name in self.schemes.modules):
                raise QuantKitError(
                    f"{prefix}: packed experts, which the vLLM plug-in does not serve; export to compressed-tensors"
                )
            if prefix in self.schemes.modules:
                raise QuantKitError(
                    f"{prefix}: a packed {type(layer).__name__}, which the vLLM plug-in does not serve"
                )
            return None

    return QuantKitVLLMConfig


@cache
def method_class() -> Any:
    """vLLM's `LinearMethodBase` of quantkit; needs vLLM."""
    from vllm.model_executor.layers import linear as vllm_linear
    from vllm.model_executor.parameter import (
        BlockQuantScaleParameter,
        ChannelQuantScaleParameter,
        GroupQuantScaleParameter,
        ModelWeightParameter,
        PerTensorScaleParameter,
    )

    class QuantKitLinearMethod(vllm_linear.LinearMethodBase):  # type: ignore[misc]
        def __init__(self, scheme: Scheme, names: dict[str, str]) -> None:
            self.scheme, self.names = scheme, names

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **extra_weight_attrs: Any,
        ) -> None:
            """Parameters under the names of the checkpoint, that load the part of this process."""
            scheme, K, N = self.scheme, input_size_per_partition, sum(output_partition_sizes)
            check_shard(scheme, K, input_size, output_partition_sizes, output_size)
            loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
            whole: dict[str, Any] = {"input_dim": 1, "output_dim": 0}
            scales, places = GroupQuantScaleParameter, whole
            if scheme.block_size:
                scales = BlockQuantScaleParameter
                layer.weight_block_size = [scheme.block_size, scheme.block_size]  # type: ignore[assignment]
            elif scheme.group_size is None:
                scales, places = ChannelQuantScaleParameter, {"output_dim": 0}
            kinds: dict[str, tuple[Any, dict[str, Any]]] = {
                "codes": (ModelWeightParameter, whole),
                "scales": (scales, places),
                "zeros": (scales, places),
                "input_scale": (PerTensorScaleParameter, {}),
            }
            # float32 holds the scales whatever the checkpoint has
            for part, (shape, dtype) in tensor_specs(scheme, N, K, torch.float32).items():
                kind, where = kinds[part]
                size = (len(output_partition_sizes),) if part == "input_scale" else shape
                data = torch.empty(size, dtype=dtype)
                layer.register_parameter(self.names[part], kind(data=data, weight_loader=loader, **where))
            guard = nn.Parameter(torch.empty(2, dtype=torch.int64), requires_grad=False)
            guard.weight_loader = ignore  # type: ignore[attr-defined]
            layer.register_parameter(self.names["guard"], guard)
            self.shape, self.x_dtype = (N, K), params_dtype

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            parts = {}
            for part, name in self.names.items():
                parameter = layer._parameters.pop(name, None)
                if parameter is not None and part != "guard":
                    parts[part] = parameter.data
            packed = QuantLinear.from_quantized(packed_of(self.scheme, self.shape, parts))
            packed.repack(self.x_dtype)
            layer.quantkit = packed

        def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            y = layer.quantkit.product(x)  # type: ignore[union-attr, operator]
            return y if bias is None else y + bias  # type: ignore[no-any-return]

    # vLLM chooses the loader of its linears by the name of their method's class
    getattr(vllm_linear, "register_weight_loader_v2_supported_method", lambda kind: kind)(
        QuantKitLinearMethod
    )
    supported = getattr(vllm_linear, "WEIGHT_LOADER_V2_SUPPORTED", [])
    if QuantKitLinearMethod.__name__ not in supported:
        supported.append(QuantKitLinearMethod.__name__)
    return QuantKitLinearMethod
