"""QuantLinear: the module that stands where an nn.Linear stood, holding codes and scales instead of a weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import quantkit.kernels.ops  # noqa: F401  (defines torch.ops.quantkit)
from quantkit.errors import QuantKitError
from quantkit.kernels.dispatch import kernel_name, target_of
from quantkit.kernels.int4pack import not_packable, pack_cpu, unpack_cpu
from quantkit.kernels.int4tiles import not_tileable, pack_tiles, unpack_tiles
from quantkit.kernels.interleave import (
    deinterleave,
    deinterleave_int4,
    interleave,
    interleave_int4,
    not_interleavable,
    not_interleavable_int4,
)
from quantkit.kernels.tuned import TableError
from quantkit.packing import PARTS, QuantizedTensor, words_of
from quantkit.scheme import Scheme

REPACKED = ("packed", "packed_scales", "packed_zeros")
FP8_ACCUMULATION = ("auto", "accurate", "fast")
# Rows of x from which on accurate sums cost more than 5 %: of gate_up on an H200 17 %, at 256 rows 3 %.
FAST_ROWS = 1024
CODE_DTYPES = {
    **dict.fromkeys(("int2", "int3", "int4"), torch.int32),
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def tensor_specs(
    scheme: Scheme,
    N: int,
    K: int,
    scale_dtype: torch.dtype = torch.bfloat16,
    channel_scales: bool = False,
    input_order: bool = False,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of one packed weight [N, K], by the suffix of its name.

    `scale_dtype` holds for 2 to 4 bits alone: the scales of 8-bit weights are float32. `channel_scales`: x is
    multiplied by such. `input_order`: its columns are then put into an order.
    """
    beside: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if channel_scales:
        beside["channel_scales"] = ((K,), torch.bfloat16)
    if input_order:
        beside["input_order"] = ((K,), torch.int32)
    if scheme.bits < 8:
        groups = -(-K // (scheme.group_size or K))
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((N, words_of(K, scheme.bits)), torch.int32),
            "scales": ((N, groups), scale_dtype),
        }
        if not scheme.symmetric:
            specs["zeros"] = ((N, groups), torch.uint8)
        return specs | beside
    block = scheme.block_size
    specs = {
        "codes": ((N, K), CODE_DTYPES[scheme.weight]),
        "scales": ((-(-N // block), -(-K // block)) if block else (N, 1), torch.float32),
    }
    if scheme.activation_scale == "static":
        specs["input_scale"] = ((1,), torch.float32)
    return specs | beside


def repacked_op(
    scheme: Scheme,
    target: str,
    N: int,
    K: int,
    x_dtype: torch.dtype,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """The op of the layout that `QuantLinear.repack` chooses for a device of this target; None: the neutral one."""
    if scheme.op == "w8a16" and target == "sm_90":
        return None if not_interleavable(N, K, x_dtype) else "w8a16_interleaved"
    if scheme.op == "w4a8" and target == "sm_90":
        why_not = not_interleavable_int4(N, K, scheme.group_size or 0, x_dtype)
        return None if why_not else "w4a8_interleaved"
    if scheme.op != "w4a16":
        return None
    if target == "cpu":
        why_not = not_packable(N, K, scheme.group_size or K, x_dtype, scale_dtype)
        return None if why_not else "w4a16_cpu"
    return None if not_tileable(scheme.group_size or 0, x_dtype, scale_dtype) else "w4a16_tiles"


def kernel_of(scheme: Scheme, target: str, M: int, N: int, K: int, x_dtype: torch.dtype) -> str:
    """Name of the kernel that a loaded QuantLinear [N, K] runs for x [M, K] on a target of `kernels.dispatch`."""
    op = repacked_op(scheme, target, N, K, x_dtype) or scheme.op
    try:
        return kernel_name(op, target, M, N, K, x_dtype, CODE_DTYPES[scheme.weight], scheme.group_size or 0)
    except TableError as error:
        raise QuantKitError(str(error)) from error
    except ValueError as error:
        raise QuantKitError(f"{error}; use --device cpu") from error


class QuantLinear(nn.Module):
    """y = (x * channel_scales)[..., input_order] @ dequantize(codes, scales, zeros)^T + bias, by dispatch's kernel.

    Channel scales are bfloat16, so that in a bfloat16 model x takes one elementwise product and no copy in float32;
    torch.compile fuses it into what made x.

    Codes and scales are parameters (not buffers) so that transformers' tensor parallelism shards them. `repack`
    puts weights into an order that the device reads faster, if it has one, in the place of the neutral ones; saving
    brings those back, and moving to another device the order of that one.

    Attributes:
        scheme: what the tensors mean.
        codes, scales, zeros, input_scale, channel_scales, input_order: as in `quantkit.packing`; the last four may be None.
            codes is None while repacked, on a GPU scales and zeros too: ask `quantized()`.
        packed, packed_scales, packed_zeros: of int4 on a CPU what `kernels/int4pack.py` makes of them, on a GPU what
            `kernels/int4tiles.py` does; on sm_90 what `kernels/interleave.py` does of int4 beside int8 x, and of 8 bits
            beside 16-bit x, where `scales` stay; None unless repacked.
        repacked_for: the dtype of x that they were packed for, or None.
        fp8_accumulation: of `fp8` and `fp8-static`, see `set_fp8_accumulation`.
        place: in the plan of tensor parallelism while a model is loaded, see `tensor_parallel.py`.
        group: of the processes that it is cut over; None where it is whole.
        bias: [out_features] in the model's dtype, or None.
        weight: int64 [2], the numbers (N, K). In a checkpoint it stands under the name that a plain model
            gives its weight, so that a reader that does not know quantkit meets a shape mismatch and stops,
            where it would otherwise find no weight and start from random numbers.
    """

    codes: nn.Parameter | None
    scales: nn.Parameter | None
    zeros: nn.Parameter | None
    input_scale: nn.Parameter | None
    channel_scales: nn.Parameter | None
    input_order: nn.Parameter | None
    bias: nn.Parameter | None
    weight: torch.Tensor
    packed: torch.Tensor | None
    packed_scales: torch.Tensor | None
    packed_zeros: torch.Tensor | None
    repacked_for: torch.dtype | None = None
    fp8_accumulation: str = "auto"
    place: Any = None
    group: Any = None

    def __init__(
        self,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        channel_scales: bool = False,
        input_order: bool = False,
    ) -> None:
        super().__init__()
        self.scheme, self.in_features, self.out_features = scheme, in_features, out_features
        specs = tensor_specs(scheme, out_features, in_features, scale_dtype, channel_scales, input_order)
        for name in PARTS:
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
        codes, scales, zeros = self._neutral()
        shape = (self.out_features, self.in_features)
        beside = (self.input_scale, self.channel_scales, self.input_order)
        return QuantizedTensor(self.scheme, shape, codes, scales, zeros, *beside)

    def _neutral(self) -> tuple[Any, Any, Any]:
        """codes, scales and zeros in the neutral layout."""
        if self.packed is None:
            return self.codes, self.scales, self.zeros
        if self.scheme.op == "w8a16":
            codes = deinterleave(self.packed, self.in_features, CODE_DTYPES[self.scheme.weight])
            return codes, self.scales, None
        if self.scheme.op == "w4a8":
            weights = (self.packed, self.packed_scales, self.packed_zeros)
            return deinterleave_int4(*weights, self.in_features)  # type: ignore[arg-type]
        if self.device.type == "cpu":
            return unpack_cpu(self.packed), self.scales, self.zeros
        group_size, N, K = self.scheme.group_size or 0, self.out_features, self.in_features
        return unpack_tiles(self.packed, self.packed_scales, self.packed_zeros, group_size, N, K)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return (self.codes if self.packed is None else self.packed).device  # type: ignore[union-attr]

    @property
    def tiled(self) -> bool:
        """Whether it holds the tiles of `kernels/int4tiles.py`."""
        return self.packed is not None and self.scheme.op == "w4a16" and self.device.type != "cpu"

    @property
    def input_width(self) -> int:
        """Columns of x in all, of which a linear that is cut by its inputs has `in_features`."""
        return self.in_features

    @property
    def weight_bytes(self) -> int:
        """Bytes held for the weight on the device."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return sum(t.nbytes for name, t in tensors if name not in ("bias", "weight"))

    def repack(self, x_dtype: torch.dtype) -> None:
        """Puts the weight into the order that its device reads fastest for x of this dtype, if it has one."""
        if self.codes is None or self.scales is None or self.device.type not in ("cpu", "cuda"):
            return
        target = target_of(self.device)
        N, K = self.out_features, self.in_features
        op = repacked_op(self.scheme, target, N, K, x_dtype, self.scales.dtype)
        if op == "w4a16_cpu":
            weights = pack_cpu(self.codes, self.scales, self.zeros, self.scheme.group_size or K)
        elif op == "w4a16_tiles":
            weights = pack_tiles(self.codes, self.scales, self.zeros, self.scheme.group_size or 0, K)
            self.scales = self.zeros = None
        elif op == "w4a8_interleaved":
            weights = interleave_int4(self.codes, self.scales, self.zeros, K)
            self.scales = self.zeros = None
        elif op == "w8a16_interleaved":
            self.packed, self.repacked_for = interleave(self.codes), x_dtype
            self.codes = None
            return
        else:
            return
        self.codes = None
        self.packed, self.packed_scales, self.packed_zeros = weights
        self.repacked_for = x_dtype

    def unpack(self) -> None:
        """Undoes `repack`."""
        if self.packed is not None:
            for name, tensor in zip(("codes", "scales", "zeros"), self._neutral(), strict=True):
                setattr(self, name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
            self.packed = self.packed_scales = self.packed_zeros = self.repacked_for = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.packed is not None:  # first, where the parameters would stand: the order decides the shards
            for name, tensor in zip(("codes", "scales", "zeros"), self._neutral(), strict=True):
                if tensor is not None:
                    destination[prefix + name] = tensor.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return PackedProduct.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """y, by the kernel; it has no gradient."""
        if self.channel_scales is not None:
            x = (x * self.channel_scales).to(x.dtype)
        if self.input_order is not None:
            x = x.index_select(-1, self.input_order)
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """y of x that is scaled and in order."""
        ops = torch.ops.quantkit
        if self.packed is not None and self.scheme.op == "w8a16":
            is_int8 = self.scheme.weight == "int8"
            return ops.w8a16_interleaved(x, self.packed, self.scales, self.bias, is_int8)
        weights = (self.packed, self.packed_scales, self.packed_zeros, self.bias)
        if self.packed is not None and self.scheme.op == "w4a8":
            return ops.w4a8_interleaved(x, *weights, self.scheme.group_size or 0)
        if self.tiled:
            return ops.w4a16_tiles(x, *weights, None, self.scheme.group_size or 0, self.out_features, False)
        if self.packed is not None:
            return ops.w4a16_cpu(x, *weights, self.scheme.group_size or self.in_features)
        if self.scheme.op == "w4a16":
            return ops.w4a16(x, self.codes, self.scales, self.zeros, self.bias, self.scheme.group_size or 0)
        if self.scheme.op == "wna16":
            grouped = (self.codes, self.scales, self.zeros, self.bias, self.scheme.group_size or 0)
            return ops.wna16(x, *grouped, self.scheme.bits)
        if self.scheme.op == "w4a8":
            return ops.w4a8(x, self.codes, self.scales, self.zeros, self.bias, self.scheme.group_size or 0)
        if self.scheme.op == "w8a16":
            return ops.w8a16(x, self.codes, self.scales, self.bias)
        if self.scheme.op == "w8a8":
            return ops.w8a8(x, self.codes, self.scales, self.input_scale, self.bias, self.sums_fast(x))
        return ops.fp8_block(x, self.codes, self.scales, self.bias)

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """dx; where the outputs are cut over processes, the sum of what each has."""
        dx = dy @ self.quantized().effective_weight(dy.dtype)
        if self.group is not None:
            torch.distributed.all_reduce(dx, group=self.group)
        return dx

    def sums_fast(self, x: torch.Tensor) -> bool:
        """Whether the tensor cores sum all columns of a product with this x [..., in_features]."""
        if self.scheme.weight != "fp8":
            return False
        if self.fp8_accumulation == "auto":
            return x.shape[:-1].numel() >= FAST_ROWS
        return self.fp8_accumulation == "fast"

    @property
    def rounding(self) -> tuple[torch.dtype, torch.Tensor | None, int] | None:
        """What `rms_norm_quantize` and `swiglu_quantize` are to round x to: dtype, input_scale, group_size.

        None: x is not rounded, or multiplied by channel scales or put into another order before.
        """
        beside = (self.channel_scales, self.input_order)
        if self.scheme.activation is None or any(tensor is not None for tensor in beside):
            return None
        return CODE_DTYPES[self.scheme.activation], self.input_scale, self.scheme.block_size or 0

    def of_rounded(
        self, x_codes: torch.Tensor, x_scales: torch.Tensor, dtype: torch.dtype, fast: bool | None = None
    ) -> torch.Tensor:
        """y in a dtype [..., out_features] of x that its producer has rounded as `rounding` says."""
        ops, rounded = torch.ops.quantkit, (x_codes, x_scales)
        if self.scheme.op == "w8a8":
            fast = self.sums_fast(x_codes) if fast is None else fast
            return ops.w8a8_rounded(*rounded, self.codes, self.scales, self.bias, dtype, fast)  # type: ignore[no-any-return]
        if self.scheme.op == "fp8_block":
            return ops.fp8_block_rounded(*rounded, self.codes, self.scales, self.bias, dtype)  # type: ignore[no-any-return]
        rest = (self.bias, self.scheme.group_size or 0, dtype)
        if self.packed is None:
            return ops.w4a8_rounded(*rounded, self.codes, self.scales, self.zeros, *rest)  # type: ignore[no-any-return]
        repacked = (self.packed, self.packed_scales, self.packed_zeros)
        return ops.w4a8_interleaved_rounded(*rounded, *repacked, *rest)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantLinear":
        """Moves between devices, but `.half()` and `.to(dtype)` change the bias alone: codes are not numbers to cast."""
        x_dtype = self.repacked_for
        self.unpack()
        stored = {id(p) for name, p in self.named_parameters() if name != "bias"}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if id(tensor) in stored and out.dtype != tensor.dtype else out

        super()._apply(keep_dtype, recurse)
        if x_dtype is not None:
            self.repack(fn(torch.empty(0, dtype=x_dtype)).dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.label}, bias={self.bias is not None}"


class PackedProduct(torch.autograd.Function):
    """The product of a QuantLinear where x needs a gradient: dx = dy w, the weight dequantized for it.

    A rounding of x counts as none (straight through). The weight itself is frozen.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: QuantLinear) -> torch.Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.linear.input_gradient(dy), None


def set_fp8_accumulation(model: nn.Module, mode: str) -> None:
    """How the products of `fp8` and `fp8-static` linears are summed; other schemes are left as they are.

    Args:
        mode: "accurate": Hopper's tensor cores keep about 14 bits of a sum, which is added to a float32 one after every 128
            columns. "fast": they sum all columns (cuBLAS calls it use_fast_accum). "auto", the default: accurate where
            that costs under 5 %, which is below `FAST_ROWS` rows of x. Other devices sum in float32 in every mode.

    Raises:
        QuantKitError: it is another mode.
    """
    if mode not in FP8_ACCUMULATION:
        *others, last = map(repr, FP8_ACCUMULATION)
        raise QuantKitError(f"fp8 accumulation: found {mode!r}, expected {', '.join(others)} or {last}")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.fp8_accumulation = mode


def replace_module(model: nn.Module, name: str, new: nn.Module) -> Any:
    """Puts `new` where the module called `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
