"""The products as torch ops: importing this file defines `torch.ops.quantkit.{w4a16, w4a16_tiles,
w4a16_cpu, wna16, w4a8, w4a8_rounded, w4a8_interleaved, w4a8_interleaved_rounded, w8a16, w8a16_interleaved,
w8a8, w8a8_rounded, fp8_block, fp8_block_rounded, rms_norm_quantize, swiglu_quantize}`.

Every op takes x [..., K] in float32, float16 or bfloat16, with any leading shape (no rows at all too), and returns
[..., N] in x.dtype. Weights are in the neutral layout of `quantkit/packing.py` and contiguous:

    w4a16      y = x w^T + bias        w[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]
    wna16      the same for codes of 2 and 3 bits
    w4a8       y = (round(x / s) w^T) * s + bias, x to int8, w as for w4a16           s: one scale a row of x
    w8a16      y = x w^T + bias        w[n, k] = codes[n, k] * scales[n, 0]
    w8a8       y = (round(x / s) codes^T) * s * scales^T + bias      s: one scale a row of x, or `input_scale`
    fp8_block  y = sum over the 128-column blocks b of (round(x_b / s_b) codes_b^T) * s_b * scales_b + bias
    w4a16_tiles, w4a16_cpu: w4a16 for weights in the order of a GPU, `int4tiles.py`, and of a CPU, `int4pack.py`
    w4a8_interleaved, w8a16_interleaved: w4a8 and w8a16 for weights in the order of `interleave.py`

Two ops make the rounded x of an 8-bit product where it is computed, so that it is not written in 16 bits, and the ops
whose names end in `_rounded` take it:

    rms_norm_quantize  round(rms_norm(x + residual) * weight / s), s, and x + residual
    swiglu_quantize    round(silu(gate) * up / s) and s

An op has one implementation for CPU and GPU: check, choose a kernel (`dispatch.py`), run it. A check takes the op's
arguments and returns the shape of y; the fake implementation is the check, so a wrong shape is reported while
torch.compile traces. The kernels take the same arguments in the same order, x and residual as rows: they are described
here alone.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quantkit.kernels.cpu import BLOCK
from quantkit.kernels.dispatch import Problem, choose, target_of
from quantkit.kernels.int4pack import GROUP_SIZES
from quantkit.kernels.int4tiles import tiled_shape
from quantkit.kernels.interleave import INT4_MAX_K, STEP

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
INT8_MAX_K = (2**31 - 1) // (127 * 128)  # more columns could overflow the int32 sum

SCHEMAS = {
    "w4a16": "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int group_size) -> Tensor",
    "w4a16_tiles": (
        "(Tensor x, Tensor tiles, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? residual, "
        "int group_size, int N, bool swiglu) -> Tensor"
    ),
    "w4a16_cpu": (
        "(Tensor x, Tensor packed, Tensor scales_and_zeros, Tensor? residual, Tensor? bias, int group_size) -> Tensor"
    ),
    "wna16": (
        "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int group_size, int bits) -> Tensor"
    ),
    "w4a8": "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int group_size) -> Tensor",
    "w4a8_interleaved": (
        "(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? bias, int group_size) -> Tensor"
    ),
    **{
        f"{op}_rounded": (
            f"(Tensor x_codes, Tensor x_scales, Tensor {codes}, Tensor scales, Tensor? zeros, Tensor? bias, "
            f"int group_size, ScalarType dtype) -> Tensor"
        )
        for op, codes in (("w4a8", "codes"), ("w4a8_interleaved", "words"))
    },
    "w8a16": "(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor",
    "w8a16_interleaved": "(Tensor x, Tensor words, Tensor scales, Tensor? bias, bool int8) -> Tensor",
    "w8a8": (
        "(Tensor x, Tensor codes, Tensor scales, Tensor? input_scale, Tensor? bias, bool fast=False) -> Tensor"
    ),
    "fp8_block": "(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor",
    "w8a8_rounded": (
        "(Tensor x_codes, Tensor x_scales, Tensor codes, Tensor scales, Tensor? bias, ScalarType dtype, "
        "bool fast=False) -> Tensor"
    ),
    "fp8_block_rounded": (
        "(Tensor x_codes, Tensor x_scales, Tensor codes, Tensor scales, Tensor? bias, ScalarType dtype) -> Tensor"
    ),
    "rms_norm_quantize": (
        "(Tensor x, Tensor weight, float eps, Tensor? residual, ScalarType? dtype, Tensor? input_scale, int group_size)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "swiglu_quantize": (
        "(Tensor x, ScalarType? dtype, Tensor? input_scale, int group_size) -> (Tensor, Tensor)"
    ),
}


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _expect(
    op: str, name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], x: Tensor
):
    """One tensor's dtype, shape, device and contiguity, or a ValueError that says what was found."""
    if t.dtype not in dtypes:
        raise ValueError(
            f"{op}: {name} is {_names((t.dtype,))}, expected {_names(dtypes)}; convert it once after loading"
        )
    if tuple(t.shape) != shape:
        raise ValueError(
            f"{op}: {name} has shape {list(t.shape)}, expected {list(shape)} for x {list(x.shape)}; "
            f"the tensor belongs to another layer or another scheme"
        )
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device} but x on {x.device}; move both to one device")
    if not t.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {t.stride()}; call .contiguous() once after loading")


def _expect_x(op: str, x: Tensor, codes: Tensor) -> tuple[int, int]:
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x is {_names((x.dtype,))}, expected {_names(FLOATS)}; convert x")
    if x.dim() == 0 or codes.dim() != 2 or x.shape[-1] == 0:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)} and codes {list(codes.shape)}, expected [..., K] and [N, columns]; "
            f"reshape them"
        )
    return codes.shape[0], x.shape[-1]


def _check_grouped(
    op: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    bits: int = 4,
) -> tuple[int, ...]:
    if op == "wna16" and bits not in (2, 3):
        raise ValueError(f"wna16: bits is {bits}, expected 2 or 3; w4a16 takes codes of 4 bits")
    N, K = _expect_x(op, x, codes)
    if group_size < 0:
        raise ValueError(f"{op}: group_size is {group_size}, expected 32, 64, 128, or 0 for one scale a row")
    groups = -(-K // group_size) if group_size else 1
    words = 3 * -(-K // 32) if bits == 3 else -(-K // (32 // bits))
    _expect(op, "codes", codes, (N, words), (torch.int32,), x)
    _expect(op, "scales", scales, (N, groups), FLOATS, x)
    if zeros is not None:
        _expect(op, "zeros", zeros, (N, groups), (torch.uint8,), x)
    if bias is not None:
        _expect(op, "bias", bias, (N,), FLOATS, x)
    return *x.shape[:-1], N


def _check_8bit(
    op: str, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, input_scale: Tensor | None = None
) -> tuple[int, ...]:
    N, K = _expect_x(op, x, codes)
    block = op == "fp8_block"
    _expect(op, "codes", codes, (N, K), EIGHT_BIT[1:] if block else EIGHT_BIT, x)
    shape = (-(-N // BLOCK), -(-K // BLOCK)) if block else (N, 1)
    _expect(op, "scales", scales, shape, (torch.float32,), x)
    if input_scale is not None:
        _expect(op, "input_scale", input_scale, (1,), (torch.float32,), x)
    if bias is not None:
        _expect(op, "bias", bias, (N,), FLOATS, x)
    if op == "w8a8" and codes.dtype == torch.int8 and K > INT8_MAX_K:
        raise ValueError(f"{op}: K is {K}, expected at most {INT8_MAX_K} for int8 (int32 sums); use w8a16")
    return *x.shape[:-1], N


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as rows with contiguous columns."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _run(
    op: str,
    y_shape: tuple[int, ...],
    x: Tensor,
    codes: Tensor,
    *rest: Tensor | int | None,
    N: int,
    group_size: int = 0,
    codes_dtype: torch.dtype | None = None,
) -> Tensor:
    """Choose the kernel and run it over the rows of x [..., K]; codes_dtype: if codes are held as another one."""
    K = x.shape[-1]
    M = x.numel() // K
    if M == 0 or N == 0:
        return x.new_empty(y_shape)
    of_codes = codes_dtype or codes.dtype
    kernel, launch = choose(op, Problem(target_of(x.device), M, N, K, x.dtype, of_codes, group_size))
    rows = _rows(x)
    y = kernel.run(rows, codes, *rest) if launch is None else kernel.run(rows, codes, *rest, launch=launch)
    return y.view(y_shape)


def w4a16(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """4-bit weights times floating activations.

    Args:
        x: float [..., K].
        codes: int32 [N, ceil(K/8)], eight codes a word, the first in the lowest bits.
        scales: float [N, ceil(K/group_size)].
        zeros: uint8 of the same shape, or None: every zero is 8.
        bias: float [N] or None.
        group_size: columns that share a scale, 0 for one scale a row; the last group may be shorter.

    Returns:
        y of x.dtype [..., N].

    Raises:
        ValueError: a shape, dtype or device does not fit, or no kernel supports the device.
    """
    y_shape = _check_grouped("w4a16", x, codes, scales, zeros, bias, group_size)
    rest = (scales, zeros, bias, group_size)
    return _run("w4a16", y_shape, x, codes, *rest, N=len(codes), group_size=group_size)


def _check_w4a16_tiles(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    N: int,
    swiglu: bool,
) -> tuple[int, ...]:
    op = "w4a16_tiles"
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x is {_names((x.dtype,))}, expected {_names(FLOATS)}; convert x")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [..., K]; reshape it")
    if group_size < 0 or group_size % 32:
        raise ValueError(
            f"{op}: group_size is {group_size}, expected a multiple of 32, or 0 for one scale a row"
        )
    if swiglu and N % 16:
        raise ValueError(
            f"{op}: N is {N}, expected a multiple of 16 for SwiGLU: 8 gates, 8 ups; use two products"
        )
    strips, along_k, groups = tiled_shape(N, x.shape[-1], group_size)
    _expect(op, "tiles", tiles, (strips, along_k, 8, 4, 4), (torch.int32,), x)
    _expect(op, "scales", scales, (strips, groups, 8, 2), FLOATS[1:], x)
    if zeros is not None:
        _expect(op, "zeros", zeros, (strips, groups, 8, 2), (torch.uint8,), x)
    if bias is not None:
        _expect(op, "bias", bias, (N,), FLOATS, x)
    y_shape = *x.shape[:-1], N // 2 if swiglu else N
    if residual is not None:
        _expect(op, "residual", residual, y_shape, (x.dtype,), x)
    return y_shape


def w4a16_tiles(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    N: int,
    swiglu: bool,
) -> Tensor:
    """4-bit weights in tiles, as `int4tiles.pack_tiles` returns them, times floating activations, and what follows.

    Args:
        x: float [..., K].
        tiles: int32 [strips, tiles, 8, 4, 4].
        scales: float16 or bfloat16 [strips, groups, 8, 2].
        zeros: uint8 of the same shape, or None: every zero is 8.
        bias: float [N] or None.
        residual: x.dtype [..., N] ([..., N/2] with swiglu), added last, or None.
        group_size: columns that share a scale, a multiple of 32, or 0 for one scale a row.
        swiglu: y = silu(gate) * up, rows of w in turns of 8 gates and 8 ups (`packing.merge_rows`).

    Returns:
        y of x.dtype [..., N], [..., N/2] with swiglu.

    Raises:
        ValueError: a shape, dtype or device does not fit, or no kernel supports the device.
    """
    y_shape = _check_w4a16_tiles(x, tiles, scales, zeros, bias, residual, group_size, N, swiglu)
    flat = None if residual is None else residual.view(-1, y_shape[-1])
    rest = (scales, zeros, bias, flat, group_size, N, swiglu)
    return _run("w4a16_tiles", y_shape, x, tiles, *rest, N=N, group_size=group_size)


def _check_w4a16_cpu(
    x: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> tuple[int, ...]:
    op = "w4a16_cpu"
    N, K = _expect_x(op, x, packed)
    if group_size not in GROUP_SIZES or K % group_size or N % 16:
        raise ValueError(
            f"{op}: group_size is {group_size}, K is {K}, N is {N}, expected a group_size of "
            f"{', '.join(map(str, GROUP_SIZES))} that divides K, and N in multiples of 16; use w4a16"
        )
    _expect(op, "packed", packed, (N, K // 2), (torch.uint8,), x)
    _expect(op, "scales_and_zeros", scales_and_zeros, (K // group_size, N, 2), (torch.bfloat16,), x)
    if residual is not None:
        _expect(op, "residual", residual, (K // group_size, N), (torch.float32,), x)
    if bias is not None:
        _expect(op, "bias", bias, (N,), FLOATS, x)
    return *x.shape[:-1], N


def w4a16_cpu(
    x: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """4-bit weights in the order of this CPU, as `int4pack.pack_cpu` returns them, times x [..., K]; see `w4a16`."""
    y_shape = _check_w4a16_cpu(x, packed, scales_and_zeros, residual, bias, group_size)
    rest = (scales_and_zeros, residual, bias, group_size)
    return _run("w4a16_cpu", y_shape, x, packed, *rest, N=len(packed), group_size=group_size)


def wna16(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    bits: int,
) -> Tensor:
    """2- or 3-bit weights times floating activations.

    Args:
        codes: int32, rows of bits with the first code in the lowest: [N, ceil(K/16)] for 2 bits, and for 3, where 32
            codes take three words, [N, 3 ceil(K/32)].
        zeros: uint8 as scales, or None: every zero is 2^(bits - 1).
        bits: 2 or 3.

    The rest as in `w4a16`.
    """
    y_shape = _check_grouped("wna16", x, codes, scales, zeros, bias, group_size, bits)
    rest = (scales, zeros, bias, group_size, bits)
    return _run("wna16", y_shape, x, codes, *rest, N=len(codes), group_size=group_size)


def _check_w4a8_interleaved(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> tuple[int, ...]:
    op = "w4a8_interleaved"
    N, K = _expect_x(op, x, words)
    if group_size < 0 or group_size % STEP:
        raise ValueError(
            f"{op}: group_size is {group_size}, expected a multiple of {STEP}, or 0 for one scale a row; use w4a8"
        )
    if group_size == 0 and K > INT4_MAX_K:
        raise ValueError(
            f"{op}: K is {K}, expected at most {INT4_MAX_K} with one scale a row (int32 sums); use w4a8"
        )
    groups = -(-K // group_size) if group_size else 1
    _expect(op, "words", words, (N, 16 * -(-K // STEP)), (torch.int32,), x)
    _expect(op, "scales", scales, (groups, N), FLOATS, x)
    if zeros is not None:
        _expect(op, "zeros", zeros, (groups, N), (torch.uint8,), x)
    if bias is not None:
        _expect(op, "bias", bias, (N,), FLOATS, x)
    return *x.shape[:-1], N


CHECKS_W4A8: dict[str, Callable[..., tuple[int, ...]]] = {
    "w4a8": partial(_check_grouped, "w4a8"),
    "w4a8_interleaved": _check_w4a8_interleaved,
}


def _check_w4a8_rounded(
    op: str,
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[int, ...]:
    _expect_rounded(op, x_codes, torch.int8, codes, dtype)
    x = scales.new_empty((1,), dtype=dtype).expand(x_codes.shape)  # stands for x before it was rounded
    y_shape = CHECKS_W4A8[op](x, codes, scales, zeros, bias, group_size)
    _expect_x_scales(op, x_scales, [(x_codes.numel() // x_codes.shape[-1], 1)], codes)
    return y_shape


def _w4a8_of_floats(
    op: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    y_shape = CHECKS_W4A8[op](x, codes, scales, zeros, bias, group_size)
    rounded = round_activations(x, torch.int8)
    rest = (scales, zeros, bias, group_size, x.dtype)
    return _multiply_rounded(op, y_shape, x.dtype, *rounded, codes, *rest, group_size=group_size)


def _w4a8_of_rounded(
    op: str,
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    weights = (codes, scales, zeros, bias)
    y_shape = _check_w4a8_rounded(op, x_codes, x_scales, *weights, group_size, dtype)
    rows = x_codes.view(-1, x_codes.shape[-1])
    rest = (*weights, group_size, dtype)
    return _multiply_rounded(op, y_shape, dtype, rows, x_scales, *rest, group_size=group_size)


def w4a8(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """4-bit weights times activations rounded to int8, one scale a row of x; arguments as in `w4a16`."""
    return _w4a8_of_floats("w4a8", x, codes, scales, zeros, bias, group_size)


def w4a8_interleaved(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """`w4a8` for weights as `interleave.interleave_int4` returns them.

    Args:
        words: int32 [N, 16 ceil(K/128)].
        scales: float [groups, N].
        zeros: uint8 of the same shape, or None: every zero is 8.
        group_size: a multiple of 128, or 0 for one scale a row.

    The rest as in `w4a16`.
    """
    return _w4a8_of_floats("w4a8_interleaved", x, words, scales, zeros, bias, group_size)


def w4a8_rounded(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """`w4a8` of activations that their producer has rounded (`rms_norm_quantize`, `swiglu_quantize`).

    Args:
        x_codes: int8 [..., K], contiguous.
        x_scales: float32 [M, 1], M rows of x in all.
        dtype: of y.

    The rest as in `w4a8`.
    """
    return _w4a8_of_rounded("w4a8", x_codes, x_scales, codes, scales, zeros, bias, group_size, dtype)


def w4a8_interleaved_rounded(
    x_codes: Tensor,
    x_scales: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """`w4a8_rounded` with the weight of `w4a8_interleaved`."""
    return _w4a8_of_rounded(
        "w4a8_interleaved", x_codes, x_scales, words, scales, zeros, bias, group_size, dtype
    )


def w8a16(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """8-bit weights (int8 or float8_e4m3fn [N, K], scales float32 [N, 1]) times floating activations; see `w4a16`."""
    y_shape = _check_8bit("w8a16", x, codes, scales, bias)
    return _run("w8a16", y_shape, x, codes, scales, bias, N=len(codes))


def _check_w8a16_interleaved(
    x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, int8: bool
) -> tuple[int, ...]:
    op = "w8a16_interleaved"
    N, K = _expect_x(op, x, words)
    _expect(op, "words", words, (N, 32 * -(-K // 128)), (torch.int32,), x)
    _expect(op, "scales", scales, (N, 1), (torch.float32,), x)
    if bias is not None:
        _expect(op, "bias", bias, (N,), FLOATS, x)
    return *x.shape[:-1], N


def w8a16_interleaved(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, int8: bool) -> Tensor:
    """8-bit weights in the order of `interleave.interleave` times floating activations.

    Args:
        words: int32 [N, 32 ceil(K/128)].
        int8: what their bytes are; else e4m3.

    The rest as in `w8a16`.
    """
    y_shape = _check_w8a16_interleaved(x, words, scales, bias, int8)
    codes_dtype = EIGHT_BIT[0] if int8 else EIGHT_BIT[1]
    rest = (scales, bias, int8)
    return _run("w8a16_interleaved", y_shape, x, words, *rest, N=len(words), codes_dtype=codes_dtype)


def _check_w8a8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    fast: bool = False,
) -> tuple[int, ...]:
    return _check_8bit("w8a8", x, codes, scales, bias, input_scale)


def w8a8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    fast: bool = False,
) -> Tensor:
    """8-bit weights times activations rounded to the same type.

    Args:
        x: float [..., K], rounded to the dtype of codes: one scale a row, or `input_scale` for all rows.
        codes: int8 or float8_e4m3fn [N, K].
        scales: float32 [N, 1].
        input_scale: float32 [1], x is divided by it and saturates; None: found from every row of x.
        bias: float [N] or None.
        fast: leave sums of e4m3 products to the tensor cores, which keep 14 bits of them on Hopper (`w8a8.py`).

    Returns and raises as `w4a16`.
    """
    y_shape = _check_w8a8(x, codes, scales, input_scale, bias)
    rounded = round_activations(x, codes.dtype, input_scale)
    return _multiply_rounded("w8a8", y_shape, x.dtype, *rounded, codes, scales, bias, x.dtype, fast)


def fp8_block(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """float8_e4m3fn [N, K] with one scale a 128 x 128 tile, times x rounded to e4m3 per row and 128 columns.

    scales: float32 [ceil(N/128), ceil(K/128)]. The rest as in `w4a16`.
    """
    y_shape = _check_8bit("fp8_block", x, codes, scales, bias)
    rounded = round_activations(x, codes.dtype, group_size=BLOCK)
    return _multiply_rounded("fp8_block", y_shape, x.dtype, *rounded, codes, scales, bias, x.dtype)


def round_activations(
    x: Tensor, dtype: torch.dtype, input_scale: Tensor | None = None, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Codes of the rows of x in the dtype [M, K], and their scales; see `cpu.quantize_activations`."""
    rows = _rows(x)
    if not len(rows):
        return rows.to(dtype), rows.new_empty(0, 1, dtype=torch.float32)
    kernel = choose("quantize_activations", _producer(x, x.shape[-1], x.shape[-1], dtype, group_size))[0]
    codes, scales = kernel.run(rows, dtype, input_scale, group_size)
    return codes.view(dtype), scales


def _multiply_rounded(
    op: str,
    y_shape: tuple[int, ...],
    dtype: torch.dtype,
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    *rest: Tensor | int | torch.dtype | None,
    group_size: int = 0,
) -> Tensor:
    """The kernel of an op over rows that are rounded already; y in a dtype. rest: what it takes after the codes."""
    (M, K), N = x_codes.shape, len(codes)
    if M == 0 or N == 0:
        return x_scales.new_empty(y_shape, dtype=dtype)
    kernel, launch = choose(op, Problem(target_of(codes.device), M, N, K, dtype, codes.dtype, group_size))
    launched = {} if launch is None else {"launch": launch}
    return kernel.run(x_codes, x_scales, codes, *rest, **launched).view(y_shape)


def _expect_rounded(
    op: str, x_codes: Tensor, rounded_to: torch.dtype, codes: Tensor, dtype: torch.dtype
) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{op}: dtype is {_names((dtype,))}, expected {_names(FLOATS)}")
    if x_codes.dtype != rounded_to:
        raise ValueError(f"{op}: x_codes is {_names((x_codes.dtype,))}, expected {_names((rounded_to,))}")
    if x_codes.dim() == 0:
        raise ValueError(f"{op}: x_codes has shape [], expected [..., K]; reshape it")
    if x_codes.device != codes.device or not x_codes.is_contiguous():
        raise ValueError(
            f"{op}: x_codes is on {x_codes.device} with strides {x_codes.stride()}, expected {codes.device} and "
            f"contiguous; move it, or call .contiguous()"
        )


def _expect_x_scales(op: str, x_scales: Tensor, shapes: list[tuple[int, int]], codes: Tensor) -> None:
    """Scales a row side by side, of blocks in any order."""
    apart = x_scales.shape[-1:] == (1,) and not x_scales.is_contiguous()
    if x_scales.device != codes.device or apart:
        raise ValueError(
            f"{op}: x_scales is on {x_scales.device} with strides {x_scales.stride()}, expected {codes.device} and "
            f"contiguous; move it, or call .contiguous()"
        )
    if x_scales.dtype != torch.float32 or tuple(x_scales.shape) not in shapes:
        raise ValueError(
            f"{op}: x_scales is {_names((x_scales.dtype,))} {list(x_scales.shape)}, expected float32 "
            f"{' or '.join(str(list(shape)) for shape in shapes)}"
        )


def _check_rounded(
    op: str,
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool = False,
) -> tuple[int, ...]:
    if x_codes.dtype not in EIGHT_BIT or x_codes.dtype != codes.dtype:
        raise ValueError(
            f"{op}: x_codes is {_names((x_codes.dtype,))} and codes {_names((codes.dtype,))}, expected both to be "
            f"{_names(EIGHT_BIT)}; round x to the dtype of codes"
        )
    _expect_rounded(op, x_codes, codes.dtype, codes, dtype)
    x = scales.new_empty((1,), dtype=dtype).expand(x_codes.shape)  # stands for x before it was rounded
    y_shape = _check_8bit(op, x, codes, scales, bias)
    K = x_codes.shape[-1]
    M = x_codes.numel() // K
    shapes = [(M, -(-K // BLOCK))] if op == "fp8_block" else [(M, 1), (1, 1)]
    _expect_x_scales(op, x_scales, shapes, codes)
    return y_shape


def w8a8_rounded(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool = False,
) -> Tensor:
    """`w8a8` of activations that their producer has rounded (`rms_norm_quantize`, `swiglu_quantize`).

    Args:
        x_codes: of the dtype of codes [..., K], contiguous.
        x_scales: float32 [M, 1], M rows of x in all, or [1, 1].
        dtype: of y.

    The rest as in `w8a8`.
    """
    y_shape = _check_rounded("w8a8", x_codes, x_scales, codes, scales, bias, dtype)
    rows = x_codes.view(-1, x_codes.shape[-1])
    return _multiply_rounded("w8a8", y_shape, dtype, rows, x_scales, codes, scales, bias, dtype, fast)


def fp8_block_rounded(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`fp8_block` of activations that are rounded already: x_scales float32 [M, ceil(K/128)].

    The rest as in `w8a8_rounded`. Scales that stand as `rms_norm_quantize` leaves them, the rows of a block side by
    side, need no copy.
    """
    y_shape = _check_rounded("fp8_block", x_codes, x_scales, codes, scales, bias, dtype)
    rows = x_codes.view(-1, x_codes.shape[-1])
    return _multiply_rounded("fp8_block", y_shape, dtype, rows, x_scales, codes, scales, bias, dtype)


def _check_rounding(
    op: str, x: Tensor, dtype: torch.dtype | None, input_scale: Tensor | None, group_size: int
):
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x is {_names((x.dtype,))}, expected {_names(FLOATS)}; convert x")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [..., K]; reshape it")
    if dtype not in (None, *EIGHT_BIT):
        raise ValueError(f"{op}: dtype is {dtype}, expected {_names(EIGHT_BIT)}, or None to round nothing")
    if input_scale is not None:
        _expect(op, "input_scale", input_scale, (1,), (torch.float32,), x)
        if dtype is None:
            raise ValueError(f"{op}: dtype is None, expected {_names(EIGHT_BIT)} with an input_scale")
    block = dtype == torch.float8_e4m3fn and input_scale is None
    if group_size not in ((0, BLOCK) if block else (0,)):
        raise ValueError(
            f"{op}: group_size is {group_size}, expected 0 for one scale a row, or {BLOCK} for float8_e4m3fn "
            f"without an input_scale"
        )


def _empty_rounded(
    x: Tensor, K: int, dtype: torch.dtype | None, input_scale: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of K columns for the rows of x, not filled."""
    codes = x.new_empty(*x.shape[:-1], K, dtype=dtype or x.dtype)
    groups = -(-K // group_size) if group_size else 1
    shape = (1, 1) if input_scale is not None else (groups, codes.numel() // K)
    return codes, x.new_empty((0,) if dtype is None else shape, dtype=torch.float32).movedim(0, -1)


def _producer(x: Tensor, K: int, together: int, dtype: torch.dtype | None, group_size: int) -> Problem:
    """What K columns of activations for the rows of x are to `dispatch.py`, `together` of which must be seen at once."""
    M = x.numel() // x.shape[-1]
    return Problem(target_of(x.device), M, together, K, x.dtype, dtype or x.dtype, group_size)


def _check_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype | None,
    input_scale: Tensor | None,
    group_size: int,
):
    op = "rms_norm_quantize"
    _check_rounding(op, x, dtype, input_scale, group_size)
    _expect(op, "weight", weight, (x.shape[-1],), (x.dtype,), x)
    if residual is not None:
        _expect(op, "residual", residual, tuple(x.shape), (x.dtype,), x)


def _fake_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    dtype: torch.dtype | None,
    input_scale: Tensor | None,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rms_norm(x, weight, residual, dtype, input_scale, group_size)
    codes, scales = _empty_rounded(x, x.shape[-1], dtype, input_scale, group_size)
    return codes, scales, x.new_empty(0 if residual is None else x.shape)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    dtype: torch.dtype | None,
    input_scale: Tensor | None,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm of x + residual, rounded to 8 bits.

    Args:
        x: float [..., K].
        weight: of the norm, x.dtype [K].
        eps: added to the mean of squares.
        residual: x.dtype [..., K], or None.
        dtype: int8 or float8_e4m3fn; None: the result is not rounded.
        input_scale: static scale, float32 [1]; None: scales are found from the result.
        group_size: 128 (e4m3 only) for one scale every 128 columns, or 0 for one a row.

    Returns:
        codes: dtype [..., K]; x.dtype where dtype is None.
        scales: float32 [M, 1] for the M rows, [M, ceil(K/128)] for groups, [1, 1] for a static scale, [0] for dtype None.
        h: x + residual, x.dtype [..., K]; [0] without a residual.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if x.numel() == 0:
        return _fake_rms_norm(x, weight, eps, residual, dtype, input_scale, group_size)
    _check_rms_norm(x, weight, residual, dtype, input_scale, group_size)
    K = x.shape[-1]
    kernel = choose("rms_norm_quantize", _producer(x, K, K, dtype, group_size))[0]
    flat = None if residual is None else residual.view(-1, K)
    codes, scales, h = kernel.run(_rows(x), weight, eps, flat, dtype, input_scale, group_size)
    return codes.view(x.shape), scales, h if residual is None else h.view(x.shape)


def _check_swiglu(x: Tensor, dtype: torch.dtype | None, input_scale: Tensor | None, group_size: int):
    op = "swiglu_quantize"
    _check_rounding(op, x, dtype, input_scale, group_size)
    if x.shape[-1] % 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [..., 2 F]: all gates, then all ups")


def _fake_swiglu(
    x: Tensor, dtype: torch.dtype | None, input_scale: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    _check_swiglu(x, dtype, input_scale, group_size)
    return _empty_rounded(x, x.shape[-1] // 2, dtype, input_scale, group_size)


def swiglu_quantize(
    x: Tensor, dtype: torch.dtype | None, input_scale: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, rounded to 8 bits.

    Args:
        x: float [..., 2 F], all gates and then all ups.

    The rest as in `rms_norm_quantize`, for results [..., F].
    """
    if x.numel() == 0:
        return _fake_swiglu(x, dtype, input_scale, group_size)
    _check_swiglu(x, dtype, input_scale, group_size)
    columns = x.shape[-1] // 2
    together = columns if dtype is not None and input_scale is None and not group_size else group_size or 1
    kernel = choose("swiglu_quantize", _producer(x, columns, together, dtype, group_size))[0]
    codes, scales = kernel.run(_rows(x), dtype, input_scale, group_size)
    return codes.view(*x.shape[:-1], columns), scales


def _fake(check: Callable[..., tuple[int, ...]]) -> Callable[..., Tensor]:
    return lambda x, *rest: x.new_empty(check(x, *rest))


def _fake_rounded(
    check: Callable[..., tuple[int, ...]],
    x_codes: Tensor,
    x_scales: Tensor,
    *rest: Tensor | int | torch.dtype | None,
) -> Tensor:
    (dtype,) = (argument for argument in rest if isinstance(argument, torch.dtype))
    return x_scales.new_empty(check(x_codes, x_scales, *rest), dtype=dtype)


for _name, _implementation, _unfilled in (
    ("w4a16", w4a16, _fake(partial(_check_grouped, "w4a16"))),
    ("w4a16_tiles", w4a16_tiles, _fake(_check_w4a16_tiles)),
    ("w4a16_cpu", w4a16_cpu, _fake(_check_w4a16_cpu)),
    ("wna16", wna16, _fake(partial(_check_grouped, "wna16"))),
    ("w4a8", w4a8, _fake(CHECKS_W4A8["w4a8"])),
    ("w4a8_interleaved", w4a8_interleaved, _fake(CHECKS_W4A8["w4a8_interleaved"])),
    ("w4a8_rounded", w4a8_rounded, partial(_fake_rounded, partial(_check_w4a8_rounded, "w4a8"))),
    (
        "w4a8_interleaved_rounded",
        w4a8_interleaved_rounded,
        partial(_fake_rounded, partial(_check_w4a8_rounded, "w4a8_interleaved")),
    ),
    ("w8a16", w8a16, _fake(partial(_check_8bit, "w8a16"))),
    ("w8a16_interleaved", w8a16_interleaved, _fake(_check_w8a16_interleaved)),
    ("w8a8", w8a8, _fake(_check_w8a8)),
    ("fp8_block", fp8_block, _fake(partial(_check_8bit, "fp8_block"))),
    ("w8a8_rounded", w8a8_rounded, partial(_fake_rounded, partial(_check_rounded, "w8a8"))),
    ("fp8_block_rounded", fp8_block_rounded, partial(_fake_rounded, partial(_check_rounded, "fp8_block"))),
    ("rms_norm_quantize", rms_norm_quantize, _fake_rms_norm),
    ("swiglu_quantize", swiglu_quantize, _fake_swiglu),
):
    torch.library.define(f"quantkit::{_name}", SCHEMAS[_name], tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"quantkit::{_name}", ("cpu", "cuda"), _implementation)
    torch.library.register_fake(f"quantkit::{_name}", _unfilled)
