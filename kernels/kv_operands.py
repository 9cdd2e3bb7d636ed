"""Codes of pages as operands of the tensor cores, and Hadamard rotations in registers: what the attention kernels share.

A row of codes is read as D / 2 words of 16 bits (int4: D / 4), as ldmatrix moves them, transposed or not: a register then holds
the words of two neighbours along the dimension that is summed. Taking the same code out of both makes an operand of every
second column, or for int4 of a quarter of them, and no byte changes its lane. A plane is what such an operand
covers:

    bf16         one plane, column j of D
    int8, fp8    plane i has the columns 2 j + i
    int4         plane i has the columns i D/4 + j

Codes are multiplied as float16, in which all of them are exact, whatever the model's dtype: a bfloat16 has seven bits of
mantissa, too few for int8. Instructions for the four codes of a register: int8 5 (the sign bit flipped, the byte put below
0x64, which is 1024 + code, and 1152 subtracted), e4m3 3 on sm_89 and newer, elsewhere 7 (sign, and exponent and mantissa a
bit lower, are float16's of the number / 256), and for the eight of int4 5: a mask leaves 2 c in the lowest bits, which is
2 c 2^-24 as a float16, below its normal numbers but exact; the 15 that is missing goes where a group's middle is added.
"""

import triton
import triton.language as tl

_INT8 = """{
.reg .b32 a, b, c, minus;
mov.b32 minus, 0xe480e480;
xor.b32 a, $2, 0x80808080;
prmt.b32 b, a, 0x64646464, 0x4240;
prmt.b32 c, a, 0x64646464, 0x4341;
add.rn.f16x2 $0, b, minus;
add.rn.f16x2 $1, c, minus;
}"""
_FP8 = """{
.reg .b32 a, b, c;
shl.b32 a, $2, 8;
shr.u32 b, a, 1;
and.b32 b, b, 0x3f803f80;
lop3.b32 $0, a, 0x80008000, b, 0xea;
shr.u32 c, $2, 1;
and.b32 c, c, 0x3f803f80;
lop3.b32 $1, $2, 0x80008000, c, 0xea;
}"""
# bytes 0, 2, 1, 3, and the instruction that converts two, which sm_89 and newer have
_FP8_NATIVE = """{
.reg .b32 a;
.reg .b16 low, high;
prmt.b32 a, $2, 0, 0x3120;
mov.b32 {low, high}, a;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}"""
_INT4 = """{
.reg .b32 swapped;
prmt.b32 swapped, $4, $4, 0x2301;
and.b32 $0, $4, 0x001e001e;
and.b32 $1, $4, 0x01e001e0;
and.b32 $2, swapped, 0x001e001e;
and.b32 $3, swapped, 0x01e001e0;
}"""
INT8 = tl.constexpr(_INT8)
FP8 = tl.constexpr(_FP8)
FP8_NATIVE = tl.constexpr(_FP8_NATIVE)
INT4 = tl.constexpr(_INT4)
E4M3_STEP = tl.constexpr(256.0)  # what an operand of e4m3 is too small by, unless it was converted natively
NATIVE_FP8 = tl.constexpr(89)  # the first ASM with the instruction
INT4_STEP = tl.constexpr(2.0**24)  # what an operand of int4 is too small by where ASM > 0
INT4_MIDDLE = tl.constexpr(15.0)  # what is missing from 2 c
ODD_STEP = tl.constexpr(16.0)  # what planes 1 and 3 of int4 are too large by
COUNTS = {"bf16": 1, "int8": 2, "fp8": 2, "int4": 4}  # planes


@triton.jit
def columns_of(plane: tl.constexpr, j, D: tl.constexpr, PLANES: tl.constexpr):
    """Columns of a plane's words j; words past the last, where a plane is padded to 16, are the first ones again."""
    if PLANES == 2:
        return 2 * (j % (D // 2)) + plane
    else:
        return plane * (D // PLANES) + j % (D // PLANES)


@triton.jit
def operands(words, KIND: tl.constexpr, ASM: tl.constexpr):
    """Words of codes -> the operands of all planes, in the shape and layout of the words.

    bf16: the numbers themselves. int8: codes. fp8: numbers, / 256 where ASM < NATIVE_FP8. int4: 2 c, / INT4_STEP
    where ASM > 0, in planes 1 and 3 sixteen times that.
    """
    if KIND == "bf16":
        return (words,)
    elif KIND == "int4":
        if ASM:
            a, b, c, d = tl.inline_asm_elementwise(
                INT4, "=r,=r,=r,=r,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=2
            )
        else:
            w = words.to(tl.int32) & 0xFFFF
            a = (w & 0x1E).to(tl.float16)  # not every matrix unit takes numbers below the normal ones
            b = (w & 0x1E0).to(tl.float16)
            c = ((w >> 8) & 0x1E).to(tl.float16)
            d = (((w >> 8) & 0xE0) | ((w & 1) << 8)).to(tl.float16)
        return (a.to(tl.float16), b.to(tl.float16), c.to(tl.float16), d.to(tl.float16))
    else:
        if ASM:
            FROM_FP8: tl.constexpr = FP8_NATIVE if ASM >= NATIVE_FP8 else FP8
            DECODE: tl.constexpr = INT8 if KIND == "int8" else FROM_FP8
            a, b = tl.inline_asm_elementwise(
                DECODE, "=r,=r,r", [words], dtype=(tl.float16,) * 2, is_pure=True, pack=2
            )
        else:
            low, high = (words << 8).to(tl.int16), words & -256
            if KIND == "int8":
                a, b = (low >> 8).to(tl.float16), (high >> 8).to(tl.float16)
            else:
                a = ((low & -32768) | ((low >> 1) & 0x3F80)).to(tl.int16).to(tl.float16, bitcast=True)
                b = ((high & -32768) | ((high >> 1) & 0x3F80)).to(tl.int16).to(tl.float16, bitcast=True)
        return (a, b)


@triton.jit
def pair_of(word):
    """Scale and middle of int4, two bfloat16 in an int32 word, as float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def key_pair_of(word):
    """Scale of int4 keys, and their middle less the 15 steps that are missing from operands."""
    step, middle = pair_of(word)
    return step, middle - INT4_MIDDLE * step


@triton.jit
def sum_of_query(plane, i: tl.constexpr, ASM: tl.constexpr):
    """Sum [n] over plane i [C, n] of a query, beside which a middle of int4 stands, in the unit of products with operands."""
    UNIT: tl.constexpr = INT4_STEP if ASM else 1.0
    of_plane = tl.sum(plane.to(tl.float32), 0) / UNIT
    if i % 2 == 1:
        of_plane *= ODD_STEP
    return of_plane


@triton.jit
def sums_of_values(plane, middles, i: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """What plane i of the sums of p v stands for; middles: of int4, added to every column.

    int4's operands are not centred: over L tokens that p weighs alike their sum is some sqrt(L) times what is left with the middles.
    The tensor cores cut off what does not fit where they add to a sum, which over 32768 tokens came to 4 % of y. So a step's
    product is added outside of them, with a rounding that has no direction.
    """
    UNIT: tl.constexpr = INT4_STEP if ASM else 1.0
    if KIND == "fp8" and ASM < NATIVE_FP8:
        plane *= E4M3_STEP
    if KIND == "int4":
        plane = plane * (UNIT / ODD_STEP if i % 2 == 1 else UNIT) + middles
    return plane


@triton.jit
def signs(C: tl.constexpr, N: tl.constexpr):
    """Sylvester's matrix of order N, of 1 and -1, in the corner of a float32 [C, C] of zeros."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    both = i & j
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    sign = 1.0 - 2.0 * (both & 1).to(tl.float32)
    return tl.where((i < N) & (j < N), sign, 0.0)


@triton.jit
def times_signs(H, x, EXACT: tl.constexpr, ASM: tl.constexpr):
    """H x for H of 1 and -1 and x [C, n]; float32 x in three parts of bfloat16, which have all of its bits."""
    if EXACT:
        return tl.dot(H.to(x.dtype), x)
    elif ASM:
        signs16 = H.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(signs16, high, tl.dot(signs16, middle, tl.dot(signs16, low)))
    else:
        return tl.dot(H, x, input_precision="ieee")


@triton.jit
def rotate_planes(x, D: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):
    """x H of order D for x in four planes [C, n] of a quarter of the columns each: float32 planes of the same shape.

    H_D is H_4 (x) H_(D/4): one product within the planes, then sums and differences of planes.
    EXACT: x are 16-bit numbers as they are.
    """
    C: tl.constexpr = x[0].shape[0]
    H = signs(C, D // 4)
    a, b = times_signs(H, x[0], EXACT, ASM), times_signs(H, x[1], EXACT, ASM)
    c, d = times_signs(H, x[2], EXACT, ASM), times_signs(H, x[3], EXACT, ASM)
    return sums_of_planes(a, b, c, d, D)


@triton.jit
def sums_of_planes(a, b, c, d, D: tl.constexpr):
    """The planes of x H from those of products within the planes."""
    norm: tl.constexpr = 1.0 / D**0.5
    e, f = (a + b) * norm, (a - b) * norm
    g, h = (c + d) * norm, (c - d) * norm
    return (e + g, f + h, e - g, f - h)
