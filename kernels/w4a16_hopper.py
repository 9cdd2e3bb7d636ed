"""W4A16 on Hopper for 17 rows of x and more: wgmma with the weight in registers, written in Gluon.

The same product, tiles and rounding as `w4a16_wide.py`, which is for every other GPU; Gluon says what Triton leaves to
its compiler: two sets of registers hold the weight of even and of odd steps, so that one is dequantized while the
tensor cores multiply by the other, and a set is written again only after the wait that ends its product. x comes by TMA
through a ring of `stages` tiles in shared memory; TMA fills rows past M and columns past K with zeros.

Budget at 989 TFLOP/s: 2 M N K operations; a step of 64 columns costs a warp 90 instructions a strip of 16 rows, during
which wgmma runs. A program has one wave of registers: 128 float32 sums a thread at most (BLOCK_N x BLOCK_M = 128 x 256).
"""

from functools import lru_cache

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantkit.kernels import w4a16
from quantkit.kernels.int4tiles import STRIP, TILE_K
from quantkit.kernels.w4a16_wide import w4a16_wide

UNPACK_BF16 = gl.constexpr(w4a16.UNPACK_BF16.value)
UNPACK_F16 = gl.constexpr(w4a16.UNPACK_F16.value)
SCALE = "{{\nadd.rn.{0}x2 $0, $1, $2;\nmul.rn.{0}x2 $0, $0, $3;\n}}"
SCALE_BF16 = gl.constexpr(SCALE.format("bf16"))  # (q - zero) * scale, two at a time
SCALE_F16 = gl.constexpr(SCALE.format("f16"))

# Triton 3.9's name, and 3.6's
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

Config = dict[str, int]


FULL = 100  # blocks that keep 132 multiprocessors busy enough
MAX_SUMS = 128  # float32 sums a thread
MAX_X_BYTES = 200 * 1024  # of shared memory for x


@lru_cache(maxsize=4096)
def config(M: int, N: int, K: int, group_size: int) -> Config:
    """Launch parameters by the rows of x; `quantkit tune` finds better ones for a shape."""

    def blocks(block_n: int, block_m: int) -> int:
        return -(-N // block_n) * -(-M // block_m)

    if M > 128 and blocks(128, 256) >= FULL:
        return dict(block_m=256, rows=1, warps=8, tiles=1, stages=6)
    if M > 64 and blocks(128, 128) >= FULL:
        return dict(block_m=128, rows=1, warps=8, tiles=1, stages=4)
    if blocks(128, 64) < FULL:  # too few for every multiprocessor: halve them
        return dict(block_m=min(128, max(16, triton.next_power_of_2(M))), rows=1, warps=4, tiles=1, stages=6)
    if M <= 32:
        return dict(block_m=32, rows=1, warps=8, tiles=2, stages=4)
    return dict(block_m=64, rows=2, warps=4, tiles=1 if group_size % TILE_K else 2, stages=4)


def candidates(M: int, N: int, K: int, group_size: int, multiprocessors: int = 132) -> list[Config]:
    """Launches worth timing, `config`'s first: blocks of M and down to a quarter of it, as deep a ring as there is room."""
    default = config(M, N, K, group_size)
    largest = min(256, max(16, triton.next_power_of_2(M)))
    found = [
        dict(block_m=block_m, rows=rows, warps=warps, tiles=tiles, stages=stages)
        for block_m in (256, 128, 64, 32, 16)
        if largest // 2 <= block_m <= largest
        for rows in (1, 2)
        if rows * STRIP * block_m // 32 <= MAX_SUMS
        for warps in (4, 8)
        for tiles, stages in ((1, 4), (1, 6), (2, 3), (2, 4))
        if stages * tiles * TILE_K * block_m * 2 <= MAX_X_BYTES
    ]
    return [default, *(one for one in found if one != default)]


def tma_reads(x: Tensor) -> bool:
    """Whether TMA can read x [M, K]: its rows begin at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


@gluon.jit
def _ptx(instruction: gl.constexpr):
    gl.inline_asm_elementwise(instruction, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _axes(block, R: gl.constexpr, W: gl.constexpr, LAST: gl.constexpr):
    """c, g, the strip and 0 ... LAST - 1, to be broadcast to [c, g, W, R, LAST]; each use has one layout, so call anew."""
    c = gl.arange(0, 4, layout=gl.AutoLayout())[:, None, None, None, None]
    g = gl.arange(0, 8, layout=gl.AutoLayout())[None, :, None, None, None]
    w = gl.arange(0, W, layout=gl.AutoLayout())[None, None, :, None, None]
    r = gl.arange(0, R, layout=gl.AutoLayout())[None, None, None, :, None]
    last = gl.arange(0, LAST, layout=gl.AutoLayout())[None, None, None, None, :]
    return c, g, block * (W * R) + r * W + w, last


@gluon.jit
def _halves(word):
    """Two 16-bit patterns of a word, each in both halves of an int32: [..., 2]."""
    low = word & 0xFFFF
    high = (word >> 16) & 0xFFFF
    return gl.join(low | (low << 16), high | (high << 16))


@gluon.jit
def _along_rows(t, LIKE: gl.constexpr):
    """[c, g, W, R, P, h] -> [c, g, W, R, P, 1, h, 1], in the layout LIKE of [c, g, W, R, P, S, h, c8]."""
    t = gl.convert_layout(t, gl.SliceLayout(5, gl.SliceLayout(7, LIKE)))
    return gl.expand_dims(gl.expand_dims(t, 5), 7)


@gluon.jit
def dequantize(
    q, scales, zeros, ZEROS: gl.constexpr,
    DTYPE: gl.constexpr, R: gl.constexpr, W: gl.constexpr, P: gl.constexpr, S: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Words [c, g, W, R, P S], scale pairs and zero pairs [c, g, W, R, P] -> the left operand [R W 16, P S 16]."""
    UNPACK: gl.constexpr = UNPACK_BF16 if DTYPE == gl.bfloat16 else UNPACK_F16
    SCALE_BY: gl.constexpr = SCALE_BF16 if DTYPE == gl.bfloat16 else SCALE_F16
    SIGN_AND_MAGIC: gl.constexpr = 0xC300 if DTYPE == gl.bfloat16 else 0xE400
    q = q.reshape((4, 8, W, R, P, S))
    o = gl.inline_asm_elementwise(UNPACK, "=r,=r,=r,=r,r", [q], (gl.int32,) * 4, is_pure=True, pack=1)
    w = gl.join(gl.join(o[0], o[2]), gl.join(o[1], o[3]))  # [c, g, W, R, P, S, h, c8], a pair (e) each
    PAIR: gl.constexpr = w.type.layout
    by = _along_rows(_halves(scales), PAIR)
    if ZEROS:
        z = gl.join(zeros & 0xFF, (zeros >> 8) & 0xFF).to(gl.int32) | SIGN_AND_MAGIC
        minus = _along_rows(z | (z << 16), PAIR)
    else:
        minus = gl.full_like(by, (SIGN_AND_MAGIC + 8) * 0x10001 - 2**32)
    w, by = gl.broadcast(w, by)
    w, minus = gl.broadcast(w, minus)
    w = gl.inline_asm_elementwise(SCALE_BY, "=r,r,r,r", [w, minus, by], gl.int32, is_pure=True, pack=1)
    low = (w & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True)
    high = ((w >> 16) & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True)
    w = gl.join(low, high).permute((3, 2, 6, 1, 4, 5, 7, 0, 8)).reshape((R * W * 16, P * S * 16))
    return gl.convert_layout(w, gl.DotOperandLayout(0, MMA, 2))


@gluon.jit
def w4a16_hopper_kernel(
    x_desc, tiles_ptr, scales_ptr, zeros_ptr, bias_ptr, residual_ptr, y_ptr, M, N, K,
    G: gl.constexpr, SWIGLU: gl.constexpr, EVEN_N: gl.constexpr,
    C: gl.constexpr, R: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # A step is C tiles along K and P groups (or a part of one) of S instructions, of R strips of each of W warps.
    _ptx("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
    DTYPE: gl.constexpr = x_desc.dtype
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = R * W * 16
    P: gl.constexpr = 1 if G == 0 else (1 if G % (C * 64) == 0 else (C if G % 64 == 0 else C * 2))
    S: gl.constexpr = C * 4 // P
    ZEROS: gl.constexpr = zeros_ptr is not None
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 4], [4, 8, 1, 1, 1], [1, 1, W, 1, 1], [4, 0, 1, 2, 3])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 1], [4, 8, 1, 1, 1], [1, 1, W, 1, 1], [4, 0, 1, 2, 3])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BLOCK_M, 16])
    m0 = gl.program_id(0) * BLOCK_M
    block = gl.program_id(1)
    units = gl.cdiv(K, 128) * 2 // C
    steps = gl.cdiv(units, 2) * 2  # in pairs; one past the last is all zeros
    groups = gl.cdiv(units * C * 64, G) if G > 0 else 1
    stride_strip = units * (C * 128)
    c, g, strip, kt = _axes(block, R, W, C * 4)
    words = strip.to(gl.int64) * stride_strip + g * 16 + c * 4 + kt // 4 * 128 + kt % 4
    words_ptr = tiles_ptr + gl.set_auto_layout(words, WORDS)
    c, g, strip, kt = _axes(block, R, W, C * 4)
    words_exist = gl.set_auto_layout(((strip < gl.cdiv(N, 16)) | EVEN_N) & (g + c + kt >= 0), WORDS)
    c, g, strip, part = _axes(block, R, W, P)
    pairs = gl.set_auto_layout(strip * (groups * 8) + g + 0 * (c + part), PAIRS)
    c, g, strip, part = _axes(block, R, W, P)
    pairs_exist = gl.set_auto_layout(((strip < gl.cdiv(N, 16)) | EVEN_N) & (g + c + part >= 0), PAIRS)
    c, g, strip, part = _axes(block, R, W, P)
    part = gl.set_auto_layout(part + 0 * (g + c + strip), PAIRS)

    ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, C * 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    q, s, z = (), (), ()
    for i in gl.static_range(2):
        group = (i * P + part) // (G * P // (C * 64)) if G > 0 else 0 * part
        q += (gl.load(words_ptr + i * (C * 128), mask=words_exist & (i < units)),)
        s += (gl.load(scales_ptr + pairs + group * 8, mask=pairs_exist & (i < units), other=0),)
        z += (
            gl.load(zeros_ptr + pairs + group * 8, mask=pairs_exist & (i < units), other=0) if ZEROS else 0,
        )
    _ptx("griddepcontrol.wait; mov.u32 $0, 0;")
    for i in gl.static_range(STAGES - 1):
        mbarrier.expect(full.index(i), x_desc.block_type.nbytes)
        load_tile(x_desc, [m0, i * (C * 64)], full.index(i), ring.index(i))
    acc = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, MMA)
    other = gl.zeros((BLOCK_N, C * 64), DTYPE, gl.DotOperandLayout(0, MMA, 2))
    for pair in range(0, steps, 2):
        for i in gl.static_range(2):
            unit = pair + i
            operand = dequantize(q[0], s[0], z[0], ZEROS, DTYPE, R, W, P, S, MMA)
            ahead = unit + 2
            group = (ahead * P + part) // (G * P // (C * 64)) if G > 0 else 0 * part
            q = (q[1], gl.load(words_ptr + ahead * (C * 128), mask=words_exist & (ahead < units)))
            s = (s[1], gl.load(scales_ptr + pairs + group * 8, mask=pairs_exist & (ahead < units), other=0))
            if ZEROS:
                z = (
                    z[1],
                    gl.load(zeros_ptr + pairs + group * 8, mask=pairs_exist & (ahead < units), other=0),
                )
            slot = unit % STAGES
            mbarrier.wait(full.index(slot), (unit // STAGES) & 1)
            acc = warpgroup_mma(operand, ring.index(slot).permute((1, 0)), acc, is_async=True)
            # ends the product before this one: its registers and its tile of x are free
            acc, other = warpgroup_mma_wait(1, deps=(acc, other))
            other = operand
            ahead = unit + STAGES - 1
            slot = ahead % STAGES
            mbarrier.expect(full.index(slot), x_desc.block_type.nbytes, pred=ahead < steps)
            load_tile(x_desc, [m0, ahead * (C * 64)], full.index(slot), ring.index(slot), pred=ahead < steps)
    acc, other = warpgroup_mma_wait(0, deps=(acc, other))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))
    _store(acc, block * BLOCK_N, m0, y_ptr, bias_ptr, residual_ptr, M, N, BLOCK_N, BLOCK_M, W, DTYPE, SWIGLU)


@gluon.jit
def _store(
    y, first, m0, y_ptr, bias_ptr, residual_ptr, M, N,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, W: gl.constexpr, DTYPE: gl.constexpr, SWIGLU: gl.constexpr,
):  # fmt: skip
    """`w4a16.store_outputs`."""
    if bias_ptr is not None:
        n = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, y.type.layout))
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        y += gl.expand_dims(bias, 1)
    outputs = N
    ROWS: gl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    if SWIGLU:
        pairs = y.reshape((BLOCK_N // 16, 2, 8, BLOCK_M)).permute((0, 2, 3, 1))
        TOGETHER: gl.constexpr = gl.BlockedLayout([1, 1, 1, 2], [1, 8, 4, 1], [W, 1, 1, 1], [3, 2, 1, 0])
        gate, up = gl.split(gl.convert_layout(pairs, TOGETHER))
        y = (gate / (1 + gl.exp(-gate)) * up).reshape((ROWS, BLOCK_M))
        first = first // 2
        outputs = N // 2
    # eight neighbours of a row of y [M, outputs] a thread
    COALESCED: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, W], [0, 1])
    y = gl.convert_layout(y, COALESCED)
    n = gl.expand_dims(first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COALESCED)), 1)
    m = gl.expand_dims(m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, COALESCED)), 0)
    at = m.to(gl.int64) * outputs + n
    mask = (m < M) & (n < outputs)
    if residual_ptr is not None:
        y += gl.load(residual_ptr + at, mask=mask, other=0.0).to(gl.float32)
    gl.store(y_ptr + at, y.to(DTYPE), mask=mask)


def w4a16_hopper(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    N: int,
    swiglu: bool,
    launch: Config | None = None,
) -> Tensor:
    """As `w4a16_wide`, which also takes what this kernel cannot: x at odd addresses, scales of another dtype than x."""
    if not tma_reads(x) or scales.dtype != x.dtype:
        return w4a16_wide(x, tiles, scales, zeros, bias, residual, group_size, N, swiglu)
    M, K = x.shape
    chosen = launch or config(M, N, K, group_size)
    block_m, rows, warps, tiles_k = chosen["block_m"], chosen["rows"], chosen["warps"], chosen["tiles"]
    y = x.new_empty(M, N // 2 if swiglu else N)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_desc = TensorDescriptor.from_tensor(x, [block_m, tiles_k * TILE_K], layout)
    grid = (triton.cdiv(M, block_m), triton.cdiv(N, rows * warps * STRIP))
    scale_words, zero_words, _ = w4a16.as_words(scales, zeros)
    w4a16_hopper_kernel[grid](
        x_desc, tiles, scale_words, zero_words, bias, residual,
        y, M, N, K,
        G=group_size, SWIGLU=swiglu, EVEN_N=tiles.shape[0] % (rows * warps) == 0,
        C=tiles_k, R=rows, W=warps, STAGES=chosen["stages"], num_warps=warps, launch_pdl=True,
    )  # fmt: skip
    return y
