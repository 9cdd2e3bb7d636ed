"""Hugging Face's own `fp8` checkpoints, as DeepSeek-V3 introduced them: read, and blocks written.

M.weight             float8_e4m3fn [N, K]
M.weight_scale_inv   [ceil(N/128), ceil(K/128)], or one number; it multiplies, whatever its name says
"""

from typing import Any

import torch

from quantkit.checkpoint import StoredTensor
from quantkit.errors import QuantKitError
from quantkit.formats.affine import Linear, check_finite
from quantkit.formats.compressed_tensors import fp8_linear
from quantkit.formats.reader import Packed, modules_with, need
from quantkit.packing import QuantizedTensor
from quantkit.scheme import BLOCK, PRESETS

SCALES = ("F32", "BF16", "F16", "F8_E8M0")


class FP8:
    """An fp8 checkpoint's linears."""

    name = "fp8"

    def __init__(self, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        self.dropped: dict[str, str] = {}
        self.notes: list[str] = []
        block = config.get("weight_block_size")
        if block is not None and list(block) != [BLOCK, BLOCK]:
            raise QuantKitError(
                f"config.json: quantization_config has weight_block_size {block!r}, expected [{BLOCK}, {BLOCK}] or null"
            )
        activations = config.get("activation_scheme", "dynamic")
        if activations != "dynamic":
            raise QuantKitError(
                f"config.json: quantization_config has activation_scheme {activations!r}, expected 'dynamic'"
            )
        self.scheme = PRESETS["fp8-block" if block else "fp8"]
        self.modules = {}
        for name in modules_with("weight_scale_inv", tensors):
            why = f"fp8, weight_block_size {block}"
            N, K = need(tensors, f"{name}.weight", ("F8_E4M3",), 2, why).shape
            found = tensors[f"{name}.weight_scale_inv"].shape
            shape: tuple[int, ...] = (-(-N // BLOCK), -(-K // BLOCK))
            if not block:
                shape = found if found in ((), (1,), (1, 1)) else (1,)
            need(tensors, f"{name}.weight_scale_inv", SCALES, shape, why)
            self.modules[name] = Packed((N, K), ("weight", "weight_scale_inv"))

    def linear(self, name: str, tensors: dict[str, torch.Tensor]) -> Linear:
        weight, scales = tensors["weight"], tensors["weight_scale_inv"].float()
        check_finite(name, weight=weight, weight_scale_inv=scales)
        if not self.scheme.block_size:
            scales = scales.reshape(1, 1).expand(weight.shape[0], 1)
        return fp8_linear(self.scheme, weight, scales.contiguous())


def misfit(quantized: QuantizedTensor) -> str:
    """Why this format cannot hold the weight; '' if it can."""
    if quantized.scheme.name != "fp8-block":
        return f"scheme {quantized.scheme.label}, and the fp8 format has fp8-block alone"
    if quantized.channel_scales is not None or quantized.input_order is not None:
        return "scales or an order of input channels, for which fp8 has no place"
    return ""


def tensors_of(quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors of a linear that has no `misfit`, by suffix."""
    return {"weight": quantized.codes, "weight_scale_inv": quantized.scales}


def config_of(kept: list[str]) -> dict[str, Any]:
    """`quantization_config`; `kept` are the linears that are not packed."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept or None,
    }
