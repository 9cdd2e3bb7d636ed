"""A packed linear from a checkpoint's parameters, as vLLM and SGLang want it: what their two plug-ins share.

Both engines build their own linears, ask a config for the method of each, and have it make parameters that load the part of
their process: SGLang's interface is vLLM's of an older day. `PackedConfig` and `PackedMethod` are that config and method without
the engine's base classes, which `vllm_plugin.py` and `sglang_plugin.py` put behind them. No engine is imported here.

Linears that an engine merges (q, k and v) are one weight where x is the same for all of them; where their channel scales or
orders of columns differ, their results are put side by side. A linear that is cut by its columns, and has an order of them,
needs x whole: the processes gather it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from quantkit.errors import QuantKitError
from quantkit.formats.affine import storable_dtype
from quantkit.formats.compressed_tensors import PACKED, group_of
from quantkit.fuse import Beside
from quantkit.hf import METHOD, QuantKitConfig, check_order
from quantkit.linear import QuantLinear, tensor_specs
from quantkit.packing import QuantizedTensor, run_of
from quantkit.scheme import GROUP_SIZES, Scheme, parse_scheme

COLUMNS = (
    "channel_scales",
    "input_order",
)  # one number a column of x, each part of a merged linear has its own
NATIVE = {part: part for part in ("codes", "scales", "zeros", "input_scale", *COLUMNS)} | {"guard": "weight"}
COMPRESSED_TENSORS = {"codes": "weight_packed", "scales": "weight_scale", "guard": "weight_shape"}
MIN_CAPABILITY = 80


@dataclass(frozen=True)
class Entry:
    """How a linear is stored: its scheme, and whether channel scales or an order of columns are beside it."""

    scheme: Scheme
    channel_scales: bool = False
    input_order: bool = False


class Entries:
    """Which linear of a checkpoint is stored how, and how its tensors are called there.

    Attributes:
        names: of the tensors, by quantkit's names of them.
        modules: entry by module, of quantkit's own checkpoints.
        ignored: modules, or expressions after `re:`, of compressed-tensors ones; all other linears have `common`.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.names, self.common = NATIVE, None
        self.modules: dict[str, Entry] = {}
        self.ignored: list[str] = []
        if content.get("quant_method") == METHOD:
            config = QuantKitConfig.from_dict(content)
            self.modules = {
                name: Entry(
                    config.scheme_of(name), config.has_channel_scales(name), config.has_input_order(name)
                )
                for name in config.modules
            }
            return
        self.names = COMPRESSED_TENSORS
        self.common = Entry(compressed_scheme(content))
        self.ignored = list(content.get("ignore") or [])

    def of(self, prefix: str, merged: Mapping[str, list[str]]) -> Entry | None:
        """How the engine's linear of this name is stored; None where it is not packed.

        Args:
            merged: names of the engine's merged linears -> those of their parts.

        Raises:
            QuantKitError: the parts of a merged linear have several schemes.
        """
        parent, dot, name = prefix.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in merged.get(name, [name])]
        found = [self.of_part(part) for part in parts]
        if len({entry and entry.scheme for entry in found}) > 1:
            labels = sorted({entry.scheme.label if entry else "not packed" for entry in found})
            raise QuantKitError(
                f"{prefix}: the engine merges {', '.join(parts)}, but they are {', '.join(labels)}; give them one scheme"
            )
        packed = [entry for entry in found if entry is not None]
        if not packed:
            return None
        scaled, ordered = any(e.channel_scales for e in packed), any(e.input_order for e in packed)
        return Entry(packed[0].scheme, scaled, ordered)

    def of_part(self, name: str) -> Entry | None:
        if self.common is None:
            return self.modules.get(name)
        for entry in self.ignored:
            if entry == name or (entry.startswith("re:") and re.match(entry[3:], name)):
                return None
        return self.common

    def rename(self, mapper: Any) -> None:
        """Modules by the names that the engine's model gives them; `mapper` is its WeightsMapper."""
        self.modules = {
            new: entry for name, entry in self.modules.items() for new in mapper.apply_list([name])
        }
        self.ignored = mapper.apply_list(self.ignored)


def compressed_scheme(content: dict[str, Any]) -> Scheme:
    """The one scheme of a compressed-tensors config that the plug-ins take over.

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


def in_parts(weight: QuantizedTensor, rows: list[int]) -> list[QuantizedTensor]:
    """The weights of so many rows that make this one; the parts of fp8-block are of whole blocks."""
    step = weight.scheme.block_size or 1
    zeros = weight.zeros.split(rows) if weight.zeros is not None else [None] * len(rows)
    scales = weight.scales.split([-(-n // step) for n in rows])
    return [
        QuantizedTensor(
            weight.scheme, (n, weight.shape[1]), codes, part_scales, part_zeros, weight.input_scale
        )
        for n, codes, part_scales, part_zeros in zip(
            rows, weight.codes.split(rows), scales, zeros, strict=True
        )
    ]


def with_columns(weight: QuantizedTensor, columns: dict[str, torch.Tensor], part: int) -> QuantizedTensor:
    """The weight beside a part's channel scales and order, of those of all parts [parts, K]."""
    beside = [columns[name][part] if name in columns else None for name in COLUMNS]
    return QuantizedTensor(
        weight.scheme, weight.shape, weight.codes, weight.scales, weight.zeros, weight.input_scale, *beside
    )


class GatheringLinear(QuantLinear):
    """A linear that is cut by its columns and has an order of them, which names columns of the whole x.

    Attributes:
        gather: x [..., K / processes] of each process -> x [..., K].
        whole_K: K.
    """

    gather: Callable[[torch.Tensor], torch.Tensor]
    whole_K: int

    @property
    def input_width(self) -> int:
        return self.whole_K

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self.channel_scales is not None:
            x = (x * self.channel_scales).to(x.dtype)
        return self.multiply(self.gather(x).index_select(-1, self.input_order))  # type: ignore[arg-type]


def ignore(*args: Any, **kwargs: Any) -> None:
    """Loads nothing: of the tensor that only tells others to stop."""


class PackedMethod:
    """The method of an engine's linear or LM head whose weight is packed.

    Attributes:
        parameters: the engine's module of parameters, which cut what they load.
        rank_of, gather: an engine's linear -> the number of its process among those that it is cut over; and with x
            [..., K / processes] of each of them, x [..., K].
        quant_config: where SGLang looks for the size of blocks; vLLM asks the layer.
    """

    parameters: Any
    rank_of: Callable[[nn.Module], int]
    gather: Callable[[nn.Module, torch.Tensor], torch.Tensor]

    def __init__(self, entry: Entry, names: dict[str, str]) -> None:
        block = entry.scheme.block_size
        self.entry, self.names = entry, names
        self.quant_config = SimpleNamespace(weight_block_size=[block, block] if block else None)

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
        entry, scheme, engine = self.entry, self.entry.scheme, self.parameters
        K, self.rows = input_size_per_partition, list(output_partition_sizes)
        check_shard(scheme, K, input_size, self.rows, output_size)
        loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        whole: dict[str, Any] = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
        scales, places = engine.GroupQuantScaleParameter, whole
        if block := scheme.block_size:
            scales = engine.BlockQuantScaleParameter
            layer.weight_block_size = [block, block]  # type: ignore[assignment]
            if hasattr(layer, "shard_indices"):  # an LM head, whose loader knows rows alone
                places = whole | {"weight_loader": vocabulary_loader(layer, block)}
        elif scheme.group_size is None:
            scales, places = engine.ChannelQuantScaleParameter, {"output_dim": 0, "weight_loader": loader}
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "codes": (engine.ModelWeightParameter, whole),
            "scales": (scales, places),
            "zeros": (scales, places),
            "input_scale": (engine.PerTensorScaleParameter, {"weight_loader": loader}),
        }
        # float32 holds the scales whatever the checkpoint has
        for part, (shape, dtype) in tensor_specs(scheme, sum(self.rows), K, torch.float32).items():
            kind, where = kinds[part]
            data = torch.empty((len(self.rows),) if part == "input_scale" else shape, dtype=dtype)
            layer.register_parameter(self.names[part], kind(data=data, **where))
        if entry.channel_scales:  # a part without them multiplies by 1
            self.add(layer, "channel_scales", torch.ones(len(self.rows), K, dtype=torch.bfloat16))
        if entry.input_order:
            order = torch.arange(K, dtype=torch.int32).repeat(len(self.rows), 1)
            self.add(layer, "input_order", order)
        self.add(layer, "guard", torch.empty(2, dtype=torch.int64))
        self.shape, self.width, self.x_dtype = (sum(self.rows), K), input_size, params_dtype

    def add(self, layer: nn.Module, part: str, data: torch.Tensor) -> None:
        """A parameter that the engine's classes do not know."""
        parameter = nn.Parameter(data, requires_grad=False)
        load = ignore if part == "guard" else columns_loader(layer, self.rank_of)
        parameter.weight_loader = load  # type: ignore[attr-defined]
        layer.register_parameter(self.names[part], parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The linear that multiplies, `layer.quantkit`, in the place of what was loaded.

        The guard stays, as the layer's `weight`: SGLang multiplies by no head without such, and whoever reads it finds no weight.
        """
        parts = {}
        for part, name in self.names.items():
            parameter = layer._parameters.pop(name, None)
            if parameter is not None and part != "guard":
                parts[part] = parameter.data
        N, K = self.shape
        guard = torch.tensor([N, K], device=parts["codes"].device)
        layer.register_parameter("weight", nn.Parameter(guard, requires_grad=False))
        columns = {name: parts.pop(name) for name in COLUMNS if name in parts}
        weight = packed_of(self.entry.scheme, self.shape, parts)
        weights = [weight]
        if any((tensor != tensor[:1]).any() for tensor in columns.values()):
            weights = in_parts(weight, self.rows)
        linears = [
            self.multiplying(layer, with_columns(weight, columns, i)) for i, weight in enumerate(weights)
        ]
        layer.quantkit = linears[0] if len(linears) == 1 else Beside(linears)

    def multiplying(self, layer: nn.Module, weight: QuantizedTensor) -> QuantLinear:
        is_cut = weight.input_order is not None and weight.shape[1] != self.width
        linear = (GatheringLinear if is_cut else QuantLinear).from_quantized(weight)
        if isinstance(linear, GatheringLinear):
            linear.gather, linear.whole_K = lambda x: self.gather(layer, x), self.width
        check_order(str(getattr(layer, "prefix", "a linear")), linear)
        linear.repack(self.x_dtype)
        return linear

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = layer.quantkit(x)  # type: ignore[operator]
        return y if bias is None else y + bias  # type: ignore[no-any-return]


def columns_loader(layer: nn.Module, rank_of: Callable[[nn.Module], int]) -> Callable[..., None]:
    """Loads a number for each column [whole K] into [parts, K]: all of them, or those of this process."""

    def load(parameter: nn.Parameter, loaded: torch.Tensor, part: Any = None) -> None:
        K = parameter.shape[1]
        if len(loaded) != K:
            loaded = loaded.narrow(0, rank_of(layer) * K, K)
        rows = slice(None) if part is None else {"q": 0, "k": 1, "v": 2}.get(part, part)
        parameter.data[list(rows) if isinstance(rows, tuple) else rows] = loaded.to(parameter.device)

    return load


def vocabulary_loader(layer: Any, block: int) -> Callable[..., None]:
    """Loads the scales of blocks of an LM head's rows that this process has; 0 beyond the vocabulary."""

    def load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        first, last = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        loaded = loaded[first // block : -(-last // block)] if last > first else loaded[:0]
        parameter.data.zero_()
        parameter.data[: len(loaded)].copy_(loaded)

    return load


class PackedConfig:
    """The config that tells an engine the method of each of its layers.

    Attributes:
        linear, head, unpacked: the engine's classes of linears, of LM heads, and of the method of linears that are not packed.
        method: a `PackedMethod` that is the engine's own too.
        merged: names of the engine's merged linears -> those of their parts, where the engine does not tell.
    """

    linear: type
    head: type
    unpacked: type
    method: type[PackedMethod]
    merged: Mapping[str, list[str]] = {}
    packed_modules_mapping: Mapping[str, Any]

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__()
        self.entries = Entries(content)

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
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None, *args: Any, **kwargs: Any
    ) -> str | None:
        """Takes over what `--quantization quantkit` asks for, nothing else."""
        method = (hf_quant_cfg or {}).get("quant_method")
        return METHOD if user_quant == METHOD and method in (METHOD, "compressed-tensors") else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """None: the engine's own method for what is not packed.

        Raises:
            QuantKitError: the layer is packed, and of a kind that is not served.
        """
        told = {name: parts for name, parts in self.packed_modules_mapping.items() if isinstance(parts, list)}
        if isinstance(layer, self.linear):
            entry = self.entries.of(prefix, {**self.merged, **told})
            return self.unpacked() if entry is None else self.method(entry, self.entries.names)
        entry = self.entries.modules.get(prefix)
        if isinstance(layer, self.head):
            return None if entry is None else self.method(entry, self.entries.names)
        if any(name.startswith(f"{prefix}.") for name in self.entries.modules):
            raise QuantKitError(
                f"{prefix}: packed experts, which quantkit's plug-ins do not serve; export to compressed-tensors"
            )
        if entry is not None:
            raise QuantKitError(
                f"{prefix}: a packed {type(layer).__name__}, which quantkit's plug-ins do not serve"
            )
        return None
