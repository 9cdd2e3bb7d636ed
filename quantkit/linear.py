"""QuantLinear: the module that stands where an nn.Linear stood, holding codes and scales instead of a weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import quantkit.kernels.ops  # noqa: F401  (defines torch.ops.quantkit)
from quantkit.packing import CODES_PER_WORD, QuantizedTensor
from quantkit.scheme import Scheme

CODE_DTYPES = {"int4": torch.int32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def tensor_specs(
    scheme: Scheme, N: int, K: int, scale_dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of one packed weight [N, K], by the suffix of its name.

    `scale_dtype` holds for int4 alone: the scales of 8-bit weights are float32.
    """
    if scheme.weight == "int4":
        groups = -(-K // (scheme.group_size or K))
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((N, -(-K // CODES_PER_WORD)), torch.int32),
            "scales": ((N, groups), scale_dtype),
        }
        if not scheme.symmetric:
            specs["zeros"] = ((N, groups), torch.uint8)
        return specs
    block = scheme.block_size
    specs = {
        "codes": ((N, K), CODE_DTYPES[scheme.weight]),
        "scales": ((-(-N // block), -(-K // block)) if block else (N, 1), torch.float32),
    }
    if scheme.activation_scale == "static":
        specs["input_scale"] = ((1,), torch.float32)
    return specs


class QuantLinear(nn.Module):
    """y = x @ dequantize(codes, scales, zeros)^T + bias, by the kernel that dispatch picks for the device.

    Codes and scales are parameters (not buffers) so that transformers' tensor parallelism shards them.

    Attributes:
        scheme: what the tensors mean.
        codes, scales, zeros, input_scale: the neutral layout of `quantkit.packing`; the last two may be None.
        bias: [out_features] in the model's dtype, or None.
        weight: int64 [2], the numbers (N, K). In a checkpoint it stands under the name that a plain model
            gives its weight, so that a reader that does not know quantkit meets a shape mismatch and stops,
            where it would otherwise find no weight and start from random numbers.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    zeros: nn.Parameter | None
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None
    weight: torch.Tensor
    _hf_quantized_needs_local_tp = True  # transformers hands such a module its local shard

    def __init__(
        self,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.in_features, self.out_features = scheme, in_features, out_features
        specs = tensor_specs(scheme, out_features, in_features, scale_dtype)
        for name in ("codes", "scales", "zeros", "input_scale"):
            tensor = None
            if name in specs:
                shape, stored = specs[name]
                tensor = nn.Parameter(torch.empty(shape, dtype=stored, device=device), requires_grad=False)
            self.register_parameter(name, tensor)
        self.register_buffer("weight", torch.tensor([out_features, in_features], device=device))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
            if bias
            else None,
        )

    @classmethod
    def from_quantized(cls, quantized: QuantizedTensor, bias: torch.Tensor | None = None) -> "QuantLinear":
        """A module that holds these very tensors, on the device where they are."""
        N, K = quantized.shape
        module = cls(quantized.scheme, K, N, device="meta", scale_dtype=quantized.scales.dtype)
        for name, tensor in quantized.tensors().items():
            setattr(module, name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        module.weight = torch.tensor([N, K], device=quantized.codes.device)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    def quantized(self) -> QuantizedTensor:
        """The packed weight in the neutral layout."""
        return QuantizedTensor(
            self.scheme,
            (self.out_features, self.in_features),
            self.codes,
            self.scales,
            self.zeros,
            self.input_scale,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes held for the weight on the device."""
        return sum(p.nbytes for name, p in self.named_parameters() if name != "bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantkit
        if self.scheme.op == "w4a16":
            return ops.w4a16(x, self.codes, self.scales, self.zeros, self.bias, self.scheme.group_size or 0)
        if self.scheme.op == "w8a16":
            return ops.w8a16(x, self.codes, self.scales, self.bias)
        if self.scheme.op == "w8a8":
            return ops.w8a8(x, self.codes, self.scales, self.input_scale, self.bias)
        return ops.fp8_block(x, self.codes, self.scales, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantLinear":
        """Moves between devices, but `.half()` and `.to(dtype)` change the bias alone: codes are not numbers to cast."""
        stored = {id(p) for name, p in self.named_parameters() if name != "bias"}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if id(tensor) in stored and out.dtype != tensor.dtype else out

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.label}, bias={self.bias is not None}"


def replace_module(model: nn.Module, name: str, new: nn.Module) -> Any:
    """Puts `new` where the module called `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
