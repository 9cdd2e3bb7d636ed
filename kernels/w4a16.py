"""W4A16: y = x w^T + bias, weights stored as 4-bit codes with one scale (and zero) per group of a row.

    w[n, k] = (q[n, k] - zeros[n, k // G]) * scales[n, k // G]                                       (1)
    y[m, n] = sum over groups g of scales[n, g] * (sum over k in g of x[m, k] (q - zero)) + bias[n]  (2)

This file has the definition and what the kernels share. `dispatch.py` takes `w4a16_decode.py` for up to 16 rows of x,
bound by the bytes of the weight; for more `w4a16_hopper.py` on sm_90, which hands what TMA cannot move to
`w4a16_wide.py`; that one on other GPUs up to 256 rows, and past them `dequantize.py`. A table (`tuned.py`) may choose
otherwise. All read the tiles of `int4tiles.py`, and the first three multiply transposed, w x^T, since the weight must be
the operand that comes from registers.

Instructions for eight weights on NVIDIA: 3 shifts, 4 LOP3 that mask a pair and set the exponent, 4 packed FMA that
subtract the zero: 1.4 a weight. With the bits of 128 (bfloat16) or 1024 (float16) above it a code q reads as 128 + q or
1024 + q, and subtracting 128 + zero is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, K: int) -> Tensor:
    """Equation (1) from the neutral layout: float64 [N, K], on any device."""
    k = torch.arange(K, device=codes.device)
    q = codes[:, k // 8] >> (k % 8 * 4) & 0xF
    group = k // group_size if group_size else k * 0
    return (q - (8 if zeros is None else zeros.int()[:, group])).double() * scales.double()[:, group]


def reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """x w^T + bias in float64 from the neutral layout, on any device."""
    y = x.double() @ dequantize(codes, scales, zeros, group_size, x.shape[1]).T
    return y if bias is None else y + bias.double()


def ptx_level(x: Tensor) -> int:
    """Compute capability whose PTX kernels for x may use, 90 for 9.0; 0 on a CPU (the interpreter) and on AMD."""
    if not x.is_cuda or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def as_words(scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor | None, tl.dtype]:
    """Scales and zeros of tiles as the kernels load them, two rows (h) a word, and Triton's name of the scales' dtype."""
    dtype = tl.bfloat16 if scales.dtype == torch.bfloat16 else tl.float16
    return scales.view(torch.int32), None if zeros is None else zeros.view(torch.int16), dtype


_UNPACK = """{
.reg .b32 a, b, c, magic;
mov.b32 magic, MAGIC;
shr.u32 a, $4, 4;
shr.u32 b, $4, 8;
shr.u32 c, $4, 12;
lop3.b32 $0, $4, 0x000f000f, magic, 0xea;
lop3.b32 $1, a, 0x000f000f, magic, 0xea;
lop3.b32 $2, b, 0x000f000f, magic, 0xea;
lop3.b32 $3, c, 0x000f000f, magic, 0xea;
}"""
UNPACK_BF16 = tl.constexpr(_UNPACK.replace("MAGIC", "0x43004300"))  # 128 + q
UNPACK_F16 = tl.constexpr(_UNPACK.replace("MAGIC", "0x64006400"))  # 1024 + q
# sm_90 has the bf16x2 sum and product; FMA does the same with more registers
ADD_BF16 = tl.constexpr("add.rn.bf16x2 $0, $1, $2;")
MUL_BF16 = tl.constexpr("mul.rn.bf16x2 $0, $1, $2;")
ADD_BF16_FMA = tl.constexpr("{\n.reg .b32 i;\nmov.b32 i, 0x3f803f80;\nfma.rn.bf16x2 $0, $1, i, $2;\n}")
MUL_BF16_FMA = tl.constexpr("{\n.reg .b32 z;\nmov.b32 z, 0x80008000;\nfma.rn.bf16x2 $0, $1, $2, z;\n}")
ADD_F16 = tl.constexpr("add.rn.f16x2 $0, $1, $2;")
MUL_F16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")
MOVE = tl.constexpr("mov.b32 $0, $1;")


TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# Triton lays lanes along dimensions that are not contiguous: up to 3.6 the first of them first, in 3.9 the last.
# Where the lanes of a load are not c and g, every operand passes through shared memory.
LAST_FIRST = tl.constexpr(TRITON > (3, 6))


@triton.jit
def load_rows(ptr, mask):
    """Scales or zeros [c, g, W, R, P], 4 c and 8 g the lanes of a warp; 0 where not in the mask."""
    if LAST_FIRST:
        return tl.load(ptr.permute(4, 3, 2, 1, 0), mask=mask.permute(4, 3, 2, 1, 0), other=0).permute(
            4, 3, 2, 1, 0
        )
    else:
        return tl.load(ptr, mask=mask, other=0)


@triton.jit
def load_tiles(ptr, mask, EVICTION: tl.constexpr):
    """Tiles [c, g, W, R, C, kt], 16 bytes a lane; undefined where not in the mask."""
    if LAST_FIRST:
        ptr = tl.max_contiguous(ptr.permute(4, 3, 2, 1, 0, 5), (1, 1, 1, 1, 1, 4))
        q = tl.load(ptr, mask=mask.permute(4, 3, 2, 1, 0, 5), eviction_policy=EVICTION)
        return q.permute(4, 3, 2, 1, 0, 5)
    else:
        return tl.load(ptr, mask=mask, eviction_policy=EVICTION)


@triton.jit
def halves(word, dtype: tl.constexpr):
    """The two 16-bit numbers of an int32 word, low first: [..., 2]. Words are what loops carry: one register, not two."""
    pair = tl.join(word & 0xFFFF, (word >> 16) & 0xFFFF)
    return pair.to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def two_bytes(word):
    """The two bytes of an int16 word, low first, of the zeros of two rows: [..., 2]."""
    return tl.join(word & 0xFF, (word >> 8) & 0xFF)


@triton.jit
def group_of(unit, part, G: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """The group of a part of a unit, C tiles along K that have P parts; 0 where a row has one scale."""
    return (unit * P + part) // (G * P // (C * 64)) if G > 0 else 0 * part


@triton.jit
def _twice(bits):
    return bits | (bits << 16)


@triton.jit
def fragments(q, zeros, scales, dtype: tl.constexpr, ASM: tl.constexpr):
    """Words of `int4tiles.py` as operands of the tensor cores: q - zero, times the scale where scales are given.

    q: int32 [c, g, W, R, P, S]: W warps, R strips, P groups of S instructions (16 columns) each.
    zeros: uint8 [c, g, W, R, P, h] or None, every zero is 8. scales: floats of the same shape or None.
    ASM: see `ptx_level`.
    Returns dtype [c, g, W, R, P, S, h, c8, e].
    """
    if ASM:
        BF16: tl.constexpr = dtype == tl.bfloat16
        UNPACK: tl.constexpr = UNPACK_BF16 if BF16 else UNPACK_F16
        ADD: tl.constexpr = (ADD_BF16 if ASM >= 90 else ADD_BF16_FMA) if BF16 else ADD_F16
        MUL: tl.constexpr = (MUL_BF16 if ASM >= 90 else MUL_BF16_FMA) if BF16 else MUL_F16
        SIGN_AND_MAGIC: tl.constexpr = 0xC300 if BF16 else 0xE400
        o = tl.inline_asm_elementwise(
            UNPACK, "=r,=r,=r,=r,r", [q], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
        w = tl.join(tl.join(o[0], o[2]), tl.join(o[1], o[3]))  # [..., h, c8], a pair (e) each
        if zeros is None:
            minus = tl.full((1, 1, 1, 1, 1, 1, 1, 1), SIGN_AND_MAGIC + 8, tl.int32)
        else:
            minus = (zeros.to(tl.int32) | SIGN_AND_MAGIC)[:, :, :, :, :, None, :, None]
        minus = tl.broadcast_to(_twice(minus), w.shape)
        w = tl.inline_asm_elementwise(ADD, "=r,r,r", [w, minus], tl.int32, is_pure=True, pack=1)
        if scales is not None:
            bits = scales.to(dtype).to(tl.uint16, bitcast=True).to(tl.int32)
            by = tl.broadcast_to(_twice(bits)[:, :, :, :, :, None, :, None], w.shape)
            w = tl.inline_asm_elementwise(MUL, "=r,r,r", [w, by], tl.int32, is_pure=True, pack=1)
        pair = halves(w, dtype)
        # No instruction. Marked impure, it ends Triton's search for where the operand comes from: past a tl.join it
        # would take the codes for narrow data and choose an operand layout with four columns side by side.
        if BF16:  # Triton takes no constexpr for a dtype here
            return tl.inline_asm_elementwise(MOVE, "=r,r", [pair], tl.bfloat16, is_pure=False, pack=2)
        else:
            return tl.inline_asm_elementwise(MOVE, "=r,r", [pair], tl.float16, is_pure=False, pack=2)
    else:
        w = tl.join(tl.join(q, q >> 8), tl.join(q >> 4, q >> 12))
        code = tl.join(w & 0xF, (w >> 16) & 0xF)
        if zeros is None:
            code -= 8
        else:
            code -= zeros.to(tl.int32)[:, :, :, :, :, None, :, None, None]
        if scales is None:
            return code.to(dtype)
        else:
            return (code * scales.to(tl.float32)[:, :, :, :, :, None, :, None, None]).to(dtype)


@triton.jit
def store_outputs(
    y, first, m, y_ptr, bias_ptr, residual_ptr, M, N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr
):
    """Bias, SwiGLU and residual for y float32 [BLOCK_N, len(m)], rows `first`... of w; then y_ptr [M, N], transposed.

    With SWIGLU the first 8 rows of a strip of 16 are gates, the others what they gate: N / 2 outputs.
    """
    n = first + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    outputs = N
    if SWIGLU:
        gate, up = tl.split(y.reshape(BLOCK_N // 16, 2, 8, y.shape[1]).permute(0, 2, 3, 1))
        y = (gate / (1 + tl.exp(-gate)) * up).reshape(BLOCK_N // 2, y.shape[1])
        n = first // 2 + tl.arange(0, BLOCK_N // 2)
        outputs = N // 2
    at = m.to(tl.int64)[None, :] * outputs + n[:, None]
    mask = (m < M)[None, :] & (n < outputs)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
