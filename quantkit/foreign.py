"""Models of other tools' checkpoints, in memory: with their codes in QuantLinears, or dequantized."""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from quantkit.block_loader import check_belongs
from quantkit.calibration.grid import fit_grid, storable
from quantkit.calibration.rtn import rtn
from quantkit.errors import QuantKitError
from quantkit.experts import fuse_experts, unfuse_experts
from quantkit.formats import Source
from quantkit.formats.affine import Linear
from quantkit.formats.reader import PackedReader, layers_in
from quantkit.hf import QuantKitConfig, install
from quantkit.models import decoder_blocks
from quantkit.names import model_names
from quantkit.packing import QuantizedTensor
from quantkit.quantize import default_device
from quantkit.recipe import fit_scheme
from quantkit.scheme import Scheme
from quantkit.source import empty_model


@dataclass(frozen=True)
class Skeleton:
    """A packed source, and the empty model that its config makes.

    Attributes:
        prefix: of the names of the model's decoder blocks.
        names: the tensors that it is loaded from, by their names in it.
        reader: of the source, by these names.
    """

    model: PreTrainedModel
    prefix: str
    names: list[str]
    reader: PackedReader

    def packed(self, names: list[str]) -> list[str]:
        """Those of these tensors that are weights of packed linears."""
        return [name for name in names if self.reader.module_of(name) is not None]


def skeleton_of(source: Source) -> Skeleton:
    """The empty model of a packed source, whose files have been found to fit it.

    Raises:
        QuantKitError: they don't, or the source is not packed.
    """
    if not isinstance(source.reader, PackedReader):
        raise QuantKitError(
            f"{source.folder}: is not quantized ({source.format}); quantize it with quantkit quantize"
        )
    layers = getattr(source.config.get_text_config(), "num_hidden_layers", 0)
    stored = layers_in(source.reader.tensors)
    if layers > stored:  # before they are made: a config may claim millions
        raise QuantKitError(
            f"{source.path}: config.json has {layers} layers, but the files hold tensors of {stored}; they belong to different "
            "models"
        )
    model = empty_model(source.config)
    unfuse_experts(model)
    reader = source.reader
    reader.tensors = model_names(reader.tensors, model)
    prefix, _ = decoder_blocks(model)
    return Skeleton(model, prefix, check_belongs(model, reader, prefix, {}), reader)


def round_anew(weight: torch.Tensor, scheme: Scheme, half_scales: bool = False) -> QuantizedTensor:
    """A weight [N, K] rounded to nearest, by groups that divide its rows where there are such.

    Args:
        half_scales: the scales are to be numbers of float16, whatever dtype they are stored in.
    """
    fitted, _ = fit_scheme(scheme, weight.shape[1])
    dtype = torch.float16 if half_scales else torch.bfloat16
    grid = fit_grid(weight, fitted, dtype)
    if half_scales:
        grid = replace(grid, scales=storable(grid.scales.float(), torch.float16).to(grid.scales.dtype))
    return rtn(weight, fitted, dtype, grid)


def check_requantize(scheme: Scheme | None) -> None:
    if scheme is not None and scheme.activation_scale == "static":
        raise QuantKitError(
            f"requantize: {scheme.label} needs calibrated scales of activations; use {scheme.name.removesuffix('-static')}, "
            "or quantkit quantize"
        )


def quantized_or_refused(name: str, linear: Linear, requantize: Scheme | None) -> QuantizedTensor:
    """A linear's codes, or its weight rounded anew to a scheme.

    Raises:
        QuantKitError: quantkit's format cannot hold the codes, and there is no scheme.
    """
    if linear.quantized is not None:
        return linear.quantized
    if requantize is None:
        raise QuantKitError(
            f"{name}: {linear.reason}; it cannot be taken over as it is: pass a scheme such as w8a16 to round it anew "
            "(requantize in Python, --requantize for quantkit convert)"
        )
    return round_anew(linear.dequantize(), requantize)


def entry_of(quantized: QuantizedTensor, origin: str) -> dict[str, Any]:
    """A module's entry in config.json."""
    entry: dict[str, Any] = {"scheme": quantized.scheme.label, "method": origin}
    if quantized.channel_scales is not None:
        entry["channel_scales"] = True
    if quantized.input_order is not None:
        entry["input_order"] = True
    return entry


def load_packed(
    source: Source,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    requantize: Scheme | None = None,
) -> PreTrainedModel:
    """The model of another tool's checkpoint, its linears as QuantLinears with the same codes.

    Args:
        source: packed.
        device: a GPU if there is one, by default.
        dtype: of the rest of the model; its own ("auto") by default.
        requantize: a scheme for linears whose numbers quantkit's format cannot hold.
    """
    check_requantize(requantize)
    skeleton = skeleton_of(source)
    model, where = load_plain(skeleton, source, device, dtype)
    packed, entries = {}, {}
    for name in skeleton.packed(skeleton.names):
        module = name.removesuffix(".weight")
        linear = skeleton.reader.linear(name)
        quantized = quantized_or_refused(module, linear, requantize)
        exact = quantized is linear.quantized
        tensors = {suffix: tensor.to(where) for suffix, tensor in quantized.tensors().items()}
        packed[module] = replace(quantized, **tensors)  # type: ignore[arg-type]
        entries[module] = entry_of(quantized, source.format if exact else "rtn")
    schemes = {q.scheme.label: q.scheme.to_dict() for q in packed.values()}
    return install(model, packed, QuantKitConfig(schemes, entries)).eval()


def dequantized_model(
    source: Source, device: str | torch.device | None, dtype: torch.dtype | str | None = None
) -> PreTrainedModel:
    """The model of a packed checkpoint with plain linears, of the weights that its codes stand for."""
    skeleton = skeleton_of(source)
    model, where = load_plain(skeleton, source, device, dtype)
    for name in skeleton.packed(skeleton.names):
        weight = skeleton.reader.linear(name).dequantize(model.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(weight.to(where), requires_grad=False))
    model.tie_weights()
    fuse_experts(model)
    return model.eval()


def load_plain(
    skeleton: Skeleton,
    source: Source,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
) -> tuple[PreTrainedModel, torch.device]:
    """The skeleton with all but the packed weights, on a device."""
    where = torch.device(device) if device is not None else default_device()
    model, reader = skeleton.model, skeleton.reader
    kind: Any = dtype if isinstance(dtype, torch.dtype) else source.config.dtype or reader.dtype
    packed = set(skeleton.packed(skeleton.names))
    loaded = reader.load_plain([name for name in skeleton.names if name not in packed])
    precise = kept_precise(model, kind)
    kinds = {
        n: torch.float32 if precise.search(n) else kind for n, t in loaded.items() if t.is_floating_point()
    }
    ready = {n: t.to(where, kinds.get(n)) for n, t in loaded.items()}
    model.load_state_dict(ready, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():  # rotary frequencies and the like
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(where)
    model.config.dtype = kind
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model, where


def kept_precise(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str]:
    """The names of the tensors that transformers keeps in float32 in a model of this dtype."""
    names: list[str] = []
    if dtype in (torch.float16, torch.bfloat16):
        names += model._keep_in_fp32_modules_strict or []
    if dtype == torch.float16:
        names += model._keep_in_fp32_modules or []
    return re.compile("|".join(name.replace("*", ".*") for name in names) or r"(?!)")  # (?!): none
