"""transformers integration: `from_pretrained` and `save_pretrained` of a quantkit checkpoint.

Importing this module registers `quant_method: "quantkit"`. transformers looks for no plug-ins of its own
accord: without the import it warns 'Unknown quantization type' and then stops at the guard tensors (see
`QuantLinear.weight`), because their shape is not that of a weight.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.errors import QuantKitError
from quantkit.experts import fuse_experts, unfuse_experts
from quantkit.linear import QuantLinear, replace_module, tensor_specs
from quantkit.packing import QuantizedTensor
from quantkit.scheme import PRESETS, Scheme
from quantkit.tensor_parallel import localize, plan_model, refuse_to_save

# Of checkpoints with an order of columns; those with channel scales are of version 2, the others of 1.
FORMAT_VERSION = 3
METHOD = "quantkit"
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
}
SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # of 2 to 4 bits


@register_quantization_config(METHOD)
class QuantKitConfig(QuantizationConfigMixin):
    """`quantization_config` in config.json; FORMAT.md has every key.

    Args:
        schemes: label -> the fields of a Scheme.
        modules: name of each packed linear -> {"scheme": label, "method": ..., "error": ...}, and
            "channel_scales": true where x is multiplied by such, "input_order": true where its columns are put in order.
        recipe: the recipe that made the checkpoint, whole; for people, not needed to load.
        calibration: source, shape, seed and hash of the calibration tokens, or None.
        format_version: of the layout; by default the oldest that can hold these modules. A newer one than this code
            knows is refused.
    """

    def __init__(
        self,
        schemes: dict[str, dict[str, Any]],
        modules: dict[str, dict[str, Any]],
        recipe: dict[str, Any] | None = None,
        calibration: dict[str, Any] | None = None,
        format_version: int | None = None,
        **unknown: Any,
    ) -> None:
        if not isinstance(format_version, int | None):
            raise QuantKitError(f"config.json: format_version is {format_version!r}, expected a whole number")
        if format_version is not None and format_version > FORMAT_VERSION:
            raise QuantKitError(
                f"config.json: quantkit format_version {format_version}, but this quantkit reads up to "
                f"{FORMAT_VERSION}; install a newer quantkit"
            )
        if not (isinstance(schemes, dict) and isinstance(modules, dict) and modules):
            raise QuantKitError(
                "config.json: 'schemes' and 'modules' must be mappings, not empty; copy it again"
            )
        for name, entry in modules.items():
            label = entry.get("scheme") if isinstance(entry, dict) else None
            if not isinstance(label, str) or label not in schemes:
                raise QuantKitError(
                    f"config.json: module {name} names scheme {label!r}, which 'schemes' does not have"
                )
        needed = 2 if any(entry.get("channel_scales") for entry in modules.values()) else 1
        needed = 3 if any(entry.get("input_order") for entry in modules.values()) else needed
        if format_version is not None and format_version < needed:
            what = "input_order" if needed == 3 else "channel_scales"
            raise QuantKitError(f"config.json: format_version {format_version} has no {what}; copy it again")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers takes plain strings too
        self.format_version = needed if format_version is None else format_version
        self.schemes = schemes
        self.modules = modules
        self.recipe = recipe
        self.calibration = calibration

    def has_channel_scales(self, module: str) -> bool:
        return bool(self.modules[module].get("channel_scales", False))

    def has_input_order(self, module: str) -> bool:
        return bool(self.modules[module].get("input_order", False))

    def scheme_of(self, module: str) -> Scheme:
        label = self.modules[module]["scheme"]
        try:
            scheme = Scheme(**self.schemes[label])
        except (TypeError, KeyError) as error:
            raise QuantKitError(f"config.json: scheme {label!r} cannot be read: {error}") from error
        preset = PRESETS.get(scheme.name)
        if preset is None or scheme != replace(
            preset, group_size=scheme.group_size, symmetric=scheme.symmetric
        ):
            raise QuantKitError(
                f"config.json: scheme {label!r} is not one that this quantkit knows; copy it again"
            )
        return scheme


@register_quantizer(METHOD)
class QuantKitQuantizer(HfQuantizer):
    """Puts QuantLinears into the empty model before the weights arrive, and checks that the files hold them."""

    requires_calibration = True
    quantization_config: QuantKitConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        unfuse_experts(model)
        stored = stored_tensors(checkpoint_files or [])
        for name in self.quantization_config.modules:
            scheme = self.quantization_config.scheme_of(name)
            linear = linear_called(model, name)
            beside = (
                self.quantization_config.has_channel_scales(name),
                self.quantization_config.has_input_order(name),
            )
            check_stored(name, scheme, linear, stored, *beside)
            _, scale_dtype = stored.get(f"{name}.scales", ((), "BF16"))
            replace_module(model, name, packed_twin(linear, scheme, SCALE_DTYPES[scale_dtype], *beside))
        plan_model(model, digest(self.quantization_config, stored))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        is_cut = localize(model)
        prepare(model)
        if is_cut:
            model.save_pretrained = refuse_to_save  # type: ignore[method-assign, assignment]
        return model

    def update_tp_plan(self, config: Any) -> Any:
        return config

    def update_ep_plan(self, config: Any) -> Any:
        return config

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Renamings alone: the files hold the tensors of the model, so nothing is to be stacked or split."""
        return [entry for entry in weight_conversions if isinstance(entry, WeightRenaming)]

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                replace_module(model, name, dequantized_twin(module, dtype or model.dtype))
        fuse_experts(model)
        for name in ("save_pretrained", "_weight_conversions"):  # it is saved as any model of its kind again
            model.__dict__.pop(name, None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are, beside frozen linears (quantkit.adapters)."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def digest(config: QuantKitConfig, stored: dict[str, tuple[tuple[int, ...], str]]) -> str:
    """Of what the headers of a checkpoint say: its tensors, and how the packed ones are to be read."""
    content = json.dumps([config.schemes, config.modules, sorted(stored.items())], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def stored_tensors(files: list[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and safetensors dtype of every tensor in the files, from their headers alone."""
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    view = file.get_slice(name)
                    found[name] = (tuple(view.get_shape()), view.get_dtype())
        except Exception as error:
            raise QuantKitError(f"{path}: cannot be read as safetensors ({error}); copy it again") from error
    return found


def check_stored(
    name: str,
    scheme: Scheme,
    linear: nn.Linear,
    stored: dict[str, tuple[tuple[int, ...], str]],
    channel_scales: bool,
    input_order: bool = False,
) -> None:
    """Refuses a packed module whose tensors are absent or of another shape: transformers would only warn."""
    if not stored:
        return
    scale_dtype = SCALE_DTYPES.get(stored.get(f"{name}.scales", ((), ""))[1], torch.bfloat16)
    for suffix, said in (("channel_scales", channel_scales), ("input_order", input_order)):
        if f"{name}.{suffix}" in stored and not said:
            raise QuantKitError(
                f"{name}.{suffix} is stored, but its entry in config.json does not say so; copy config.json again"
            )
    N, K = linear.out_features, linear.in_features
    specs = tensor_specs(scheme, N, K, scale_dtype, channel_scales, input_order)
    for suffix, (shape, dtype) in {"weight": ((2,), torch.int64), **specs}.items():
        full = f"{name}.{suffix}"
        if full not in stored:
            raise QuantKitError(
                f"{full} is missing from the checkpoint's safetensors; quantize the model again"
            )
        expected = SAFETENSORS_DTYPES.get(dtype, stored[full][1])
        if stored[full] != (shape, expected):
            raise QuantKitError(
                f"{full}: found {stored[full][1]} {list(stored[full][0])}, "
                f"scheme {scheme.label} expects {expected} {list(shape)}"
            )


def linear_called(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise QuantKitError(f"config.json: packed module {name} is not a linear of {type(model).__name__}")
    return module


def packed_twin(
    linear: nn.Linear,
    scheme: Scheme,
    scale_dtype: torch.dtype = torch.bfloat16,
    channel_scales: bool = False,
    input_order: bool = False,
) -> QuantLinear:
    """An empty QuantLinear of the linear's shape, on the meta device."""
    return QuantLinear(
        scheme,
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
        scale_dtype=scale_dtype,
        device="meta",
        channel_scales=channel_scales,
        input_order=input_order,
    )


def dequantized_twin(module: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    """An nn.Linear with the weight that codes and channel scales stand for."""
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(module.quantized().effective_weight(dtype), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return linear


class SaveWithManifest:
    """`save_pretrained` of one model, and the manifest after it. A class, so that a model can be copied and pickled."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        from quantkit.checkpoint import write_manifest

        type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        write_manifest(Path(save_directory))


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Readies a model whose QuantLinears hold their tensors: `save_pretrained` will write the manifest too."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            check_order(name, module)
            module.requires_grad_(False)  # transformers makes every floating tensor that it loads trainable
            if not is_offloaded(name, getattr(model, "hf_device_map", {})):
                module.repack(model.dtype)
    model.save_pretrained = SaveWithManifest(model)  # type: ignore[method-assign, assignment]
    return model


def is_offloaded(name: str, device_map: dict[str, Any]) -> bool:
    """Whether accelerate brings a module's tensors to where they are needed at each call, under their own names."""
    places = {
        module: place
        for module, place in device_map.items()
        if f"{name}.".startswith(f"{module}." * bool(module))
    }
    place = places[max(places, key=len)] if places else None
    on_cpu_alone = all(place in ("cpu", "disk") for place in map(str, device_map.values()))
    return str(place) == "disk" or (str(place) == "cpu" and not on_cpu_alone)


def check_order(name: str, module: QuantLinear) -> None:
    """Refuses an input_order that names columns that x does not have, or one of them twice."""
    order = module.input_order
    if order is None or order.is_meta:
        return
    columns = order.unique()
    if (
        order.shape != (module.in_features,)
        or len(columns) != len(order)
        or not (0 <= int(columns[0]) <= int(columns[-1]) < module.input_width)
    ):
        raise QuantKitError(
            f"{name}.input_order: not an order of the numbers 0 to {module.input_width - 1}; copy the checkpoint again"
        )


def install(
    model: PreTrainedModel, packed: dict[str, QuantizedTensor], config: QuantKitConfig
) -> PreTrainedModel:
    """Swaps packed weights into a model in memory and makes it what `from_pretrained` would have given."""
    for name, quantized in packed.items():
        linear = linear_called(model, name)
        replace_module(model, name, QuantLinear.from_quantized(quantized, linear.bias))
    model.config.quantization_config = config
    for name, value in (
        ("hf_quantizer", QuantKitQuantizer(config)),
        ("is_quantized", True),
        ("quantization_method", METHOD),
        ("_weight_conversions", []),  # save_pretrained would bring back the names of the files it came from
    ):
        setattr(model, name, value)
    return prepare(model)
