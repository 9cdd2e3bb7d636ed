"""QuantLinear: the module that stands where an nn.Linear stood, holding codes and scales instead of a weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import quantkit.kernels.ops  # noqa: F401  (defines torch.ops.quantkit)
from quantkit.errors import QuantKitError
from quantkit.kernels.dispatch import kernel_name
from quantkit.kernels.int4pack import not_packable, pack_cpu, unpack_cpu
from quantkit.packing import CODES_PER_WORD, QuantizedTensor
from quantkit.scheme import Scheme

REPACKED = ("packed", "scales_and_zeros", "residual")
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


def kernel_of(scheme: Scheme, target: str, M: int, N: int, K: int, x_dtype: torch.dtype) -> str:
    """Name of the kernel that a loaded QuantLinear [N, K] runs for x [M, K] on a target of `kernels.dispatch`."""
    packable = scheme.weight == "int4" and target == "cpu"
    if packable and not not_packable(N, K, scheme.group_size or K, x_dtype, torch.bfloat16):
        op = "w4a16_cpu"
    else:
        op = scheme.op
    try:
        return kernel_name(op, target, M, N, K, x_dtype, CODE_DTYPES[scheme.weight], scheme.group_size or 0)
    except ValueError as error:
        raise QuantKitError(f"{error}; use --device cpu") from error


class QuantLinear(nn.Module):
    """y = x @ dequantize(codes, scales, zeros)^T + bias, by the kernel that dispatch picks for the device.

    Codes and scales are parameters (not buffers) so that transformers' tensor parallelism shards them. `repack`
    puts the codes into an order that the device reads faster, in the place of the neutral ones; saving and
    moving to another device bring those back.

    Attributes:
        scheme: what the tensors mean.
        codes, scales, zeros, input_scale: the neutral layout of `quantkit.packing`; the last two may be None.
            codes is None while repacked: ask `quantized()`.
        packed, scales_and_zeros, residual: the layout of `kernels/int4pack.py`, None unless repacked.
        bias: [out_features] in the model's dtype, or None.
        weight: int64 [2], the numbers (N, K). In a checkpoint it stands under the name that a plain model
            gives its weight, so that a reader that does not know quantkit meets a shape mismatch and stops,
            where it would otherwise find no weight and start from random numbers.
    """

    codes: nn.Parameter | None
    scales: nn.Parameter
    zeros: nn.Parameter | None
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None
    weight: torch.Tensor
    packed: torch.Tensor | None
    scales_and_zeros: torch.Tensor | None
    residual: torch.Tensor | None
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
        for name in REPACKED:
            self.register_buffer(name, None, persistent=False)
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
            self.codes if self.packed is None else unpack_cpu(self.packed),  # type: ignore[arg-type]
            self.scales,
            self.zeros,
            self.input_scale,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes held for the weight on the device."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return sum(t.nbytes for name, t in tensors if name not in ("bias", "weight"))

    def repack(self, x_dtype: torch.dtype) -> None:
        """Puts int4 codes on a CPU into the order of PyTorch's own kernel, where that is the faster one for x_dtype."""
        if self.codes is None or self.scheme.weight != "int4" or self.codes.device.type != "cpu":
            return
        group_size = self.scheme.group_size or self.in_features
        if not_packable(self.out_features, self.in_features, group_size, x_dtype, self.scales.dtype):
            return
        self.packed, self.scales_and_zeros, self.residual = pack_cpu(
            self.codes, self.scales, self.zeros, group_size
        )
        self.codes = None

    def unpack(self) -> None:
        """Undoes `repack`."""
        if self.packed is not None:
            self.codes = nn.Parameter(unpack_cpu(self.packed), requires_grad=False)
            self.packed = self.scales_and_zeros = self.residual = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.packed is not None:  # first, where the parameter would stand: the order decides the shards
            destination[prefix + "codes"] = unpack_cpu(self.packed)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantkit
        if self.packed is not None:
            group_size = self.scheme.group_size or self.in_features
            return ops.w4a16_cpu(x, self.packed, self.scales_and_zeros, self.residual, self.bias, group_size)
        if self.scheme.op == "w4a16":
            return ops.w4a16(x, self.codes, self.scales, self.zeros, self.bias, self.scheme.group_size or 0)
        if self.scheme.op == "w8a16":
            return ops.w8a16(x, self.codes, self.scales, self.bias)
        if self.scheme.op == "w8a8":
            return ops.w8a8(x, self.codes, self.scales, self.input_scale, self.bias)
        return ops.fp8_block(x, self.codes, self.scales, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantLinear":
        """Moves between devices, but `.half()` and `.to(dtype)` change the bias alone: codes are not numbers to cast."""
        self.unpack()
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
