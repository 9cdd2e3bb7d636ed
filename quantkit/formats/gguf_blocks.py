"""GGUF's block types, rows of bytes <-> numbers. A row of K weights is K / block runs of so many bytes:

    type   block  bytes
    Q4_0      32     18   f16 d | 16 bytes of codes                        w = d (q - 8)
    Q4_1      32     20   f16 d | f16 m | 16 bytes                         w = d q + m
    Q5_0      32     22   f16 d | u32 fifth bits | 16 bytes                w = d (q - 16)
    Q5_1      32     24   f16 d | f16 m | u32 fifth bits | 16 bytes        w = d q + m
    Q8_0      32     34   f16 d | 32 int8                                  w = d q
    Q4_K     256    144   f16 d | f16 m | 12 bytes of scales | 128 bytes   w = d s_j q - m t_j, j = run of 32
    Q5_K     256    176   f16 d | f16 m | 12 bytes | 32 of fifth bits | 128 bytes
    Q6_K     256    210   128 bytes of low 4 bits | 64 of high 2 | 16 int8 scales | f16 d    w = d s_j (q - 32)

Two codes a byte: in the types of 32 code i in the low and code i + 16 in the high bits; in Q4_K and Q5_K, of each 64, the
first 32 in the low and the next 32 in the high bits. The 12 bytes hold eight scales s and eight t of 6 bits: byte j is
s_j, byte 4 + j is t_j for j < 4, with two more bits of s_(j+4) and t_(j+4) at the top, whose low four are in byte 8 + j.
"""

from dataclasses import dataclass

import torch

from quantkit.formats.affine import Affine, Linear, affine_of, exactly
from quantkit.packing import QuantizedTensor

ROUNDINGS = tuple(1 - i / 32 for i in range(9))  # shrunken ranges that Q4_K tries


@dataclass(frozen=True)
class Type:
    """A tensor type: its number in the file, weights and bytes of a block."""

    name: str
    number: int
    block: int
    bytes: int


PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = {
    kind.name: kind
    for kind in (
        Type("F32", 0, 1, 4),
        Type("F16", 1, 1, 2),
        Type("Q4_0", 2, 32, 18),
        Type("Q4_1", 3, 32, 20),
        Type("Q5_0", 6, 32, 22),
        Type("Q5_1", 7, 32, 24),
        Type("Q8_0", 8, 32, 34),
        Type("Q4_K", 12, 256, 144),
        Type("Q5_K", 13, 256, 176),
        Type("Q6_K", 14, 256, 210),
        Type("BF16", 30, 1, 2),
    )
}
WRITTEN = ("q4_0", "q8_0", "q4_k")  # what --requantize takes with --to gguf


def halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at a byte of every block [..., bytes], as float32 [..., 1]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).float()


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n] -> codes [..., 2 n]: all low ones, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], -1)


def fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Four bytes [..., 4] -> 0 or 16 for each of 32 codes."""
    bits = packed[..., :, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2) << 4


def linear_of(kind: str, raw: torch.Tensor) -> Linear:
    """A packed weight from the bytes of its rows, uint8 [N, bytes]: in quantkit's layout where that holds it."""
    N = len(raw)
    blocks = raw.view(N, -1, TYPES[kind].bytes)
    if kind == "Q4_0":
        codes = nibbles(blocks[..., 2:]).flatten(1)
        return Affine(4, codes, halves(blocks, 0)[..., 0].half(), None, 32).linear()
    if kind == "Q4_1":
        d, m = halves(blocks, 0)[..., 0], halves(blocks, 2)[..., 0]
        zeros = torch.where(d == 0, 0, -m / d).round()
        codes = nibbles(blocks[..., 4:]).flatten(1)
        if bool((zeros * d == -m).all()):
            return Affine(4, codes, d.half(), zeros, 32).linear()
        return Linear(None, "minima that are no whole number of steps", dequantize(kind, raw))
    if kind == "Q8_0":
        codes = (blocks[..., 2:].contiguous().view(torch.int8).to(torch.int16) + 128).to(torch.uint8)
        return Affine(8, codes.flatten(1), halves(blocks, 0)[..., 0], None, 32).linear()
    return Linear(None, f"{kind}: scales of scales, for which quantkit has no place", dequantize(kind, raw))


def dequantize(kind: str, raw: torch.Tensor) -> torch.Tensor:
    """The weights of rows of bytes, uint8 [N, bytes] -> float32 [N, K]."""
    N = len(raw)
    if kind in PLAIN:
        return raw.contiguous().view(PLAIN[kind]).float()
    b = raw.view(N, -1, TYPES[kind].bytes)
    d = halves(b, 208 if kind == "Q6_K" else 0)
    if kind == "Q4_0":
        w = d * (nibbles(b[..., 2:]).float() - 8)
    elif kind == "Q4_1":
        w = d * nibbles(b[..., 4:]).float() + halves(b, 2)
    elif kind == "Q5_0":
        w = d * ((nibbles(b[..., 6:]) | fifth_bits(b[..., 2:6])).float() - 16)
    elif kind == "Q5_1":
        w = d * (nibbles(b[..., 8:]) | fifth_bits(b[..., 4:8])).float() + halves(b, 2)
    elif kind == "Q8_0":
        w = d * b[..., 2:].contiguous().view(torch.int8).float()
    elif kind in ("Q4_K", "Q5_K"):
        s, t = unpack_scales(b[..., 4:16])
        q = (
            nibbles(b[..., -128:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
        )  # [..., 8, 32]
        if kind == "Q5_K":  # bit j of byte i: code i of run j
            q = q | (b[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1) << 4
        w = (d * s)[..., None] * q.float() - (halves(b, 2) * t)[..., None]
    else:
        w = dequantize_q6_k(b, d)
    return w.reshape(N, -1)


def dequantize_q6_k(b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Blocks [N, n, 210] -> [N, n, 16, 16]. Each 128 weights: four runs of 32, two of them in the low bits of 64 bytes."""
    low = nibbles(b[..., :128].unflatten(-1, (2, 64)))  # [..., 2, 128]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = b[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3  # [..., 2, 4, 32]
    q = (low | high.flatten(-2) << 4).flatten(-2).float() - 32
    scales = b[..., 192:208].contiguous().view(torch.int8).float()
    return (d * scales)[..., None] * q.unflatten(-1, (16, 16))


def unpack_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes [..., 12] -> s and t, float32 [..., 8]."""
    a, b, c = packed.unflatten(-1, (3, 4)).unbind(-2)
    s = torch.cat([a & 63, c & 15 | a >> 6 << 4], -1)
    t = torch.cat([b & 63, c >> 4 | b >> 6 << 4], -1)
    return s.float(), t.float()


def pack_scales(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """s and t, uint8 0..63 [..., 8] -> 12 bytes."""
    a = s[..., :4] | s[..., 4:] >> 4 << 6
    b = t[..., :4] | t[..., 4:] >> 4 << 6
    return torch.cat([a, b, s[..., 4:] & 15 | (t[..., 4:] & 15) << 4], -1)


def half_bytes(values: torch.Tensor) -> torch.Tensor:
    """Numbers [..., 1] -> their float16 as bytes [..., 2]."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


def pair(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 [..., 2 n] -> bytes [..., n], the first half of them in the low bits."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | high << 4


def misfit(quantized: QuantizedTensor) -> str:
    """Why no block type holds this weight as it is; '' if Q4_0, Q4_1 or Q8_0 does."""
    scheme, K = quantized.scheme, quantized.shape[1]
    if scheme.activation or scheme.weight not in ("int4", "int8"):
        return f"scheme {scheme.label}, and GGUF's types that are written have integers of 4 and 8 bits"
    if quantized.channel_scales is not None or quantized.input_order is not None:
        return "scales or an order of input channels, for which GGUF has no place"
    if K % 32:
        return f"{K} columns, which are no whole blocks of 32"
    if exactly(quantized.scales, torch.float16) is None:
        return f"scales of {str(quantized.scales.dtype)[6:]} that float16 does not hold exactly"
    if quantized.zeros is not None:
        minima = quantized.zeros.float() * quantized.scales.float()
        if not bool(minima.isfinite().all()) or exactly(minima, torch.float16) is None:
            return "zeros whose products with the scales float16 does not hold exactly"
    return ""


def encode(quantized: QuantizedTensor) -> tuple[str, torch.Tensor]:
    """Type and bytes [N, ...] of a weight that has no `misfit`: the same numbers."""
    affine, (N, K) = affine_of(quantized), quantized.shape
    columns = torch.arange(0, K, 32) // (affine.group_size or K)
    codes, d = affine.codes.view(N, -1, 32), affine.scales.float()[:, columns, None]
    if affine.bits == 8:
        signed = (codes.to(torch.int16) - 128).to(torch.int8).view(torch.uint8)
        return "Q8_0", torch.cat([half_bytes(d), signed], -1).flatten(1)
    if affine.zeros is None:
        return "Q4_0", torch.cat([half_bytes(d), pair(codes)], -1).flatten(1)
    m = -d * affine.zeros.float()[:, columns, None]
    return "Q4_1", torch.cat([half_bytes(d), half_bytes(m), pair(codes)], -1).flatten(1)


def quantize(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """Rounds weights [N, K] to a type of `WRITTEN`, bytes [N, ...]; K is a multiple of its block.

    Q4_0 and Q8_0 are rounded as llama.cpp rounds them, with the scale before it is stored, so that the bytes are the same.
    """
    blocks = weight.float().view(len(weight), -1, TYPES[kind].block)
    if kind == "Q4_K":
        return quantize_q4_k(blocks).flatten(1)
    if kind == "Q8_0":
        d = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * inverse(d)
        q = scaled.sign() * (scaled.abs() + 0.5).floor()
        return torch.cat([half_bytes(d), q.to(torch.int8).view(torch.uint8)], -1).flatten(1)
    d = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    q = (blocks * inverse(d) + 8.5).trunc().clamp(0, 15)
    return torch.cat([half_bytes(d), pair(q)], -1).flatten(1)


def inverse(d: torch.Tensor) -> torch.Tensor:
    """1 / d, and 0 for 0."""
    return torch.where(d == 0, 0, 1 / d)


def quantize_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """[N, n, 256] -> bytes [N, n, 144]: for each run of 32 the range, shrunken by the best of a few factors.

    A range begins at or below 0. The factors are tried against the stored scales, all eight runs at once.
    """
    runs = blocks.unflatten(-1, (8, 32))
    low, high = runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)  # [N, n, 8]
    best = torch.full(blocks.shape[:-1], torch.inf)
    kept = torch.zeros(*blocks.shape[:-1], TYPES["Q4_K"].bytes, dtype=torch.uint8)
    for shrink in ROUNDINGS:
        steps, minima = (high - low) * shrink / 15, -low * shrink
        d, m = (x.amax(-1, keepdim=True).div(63).half() for x in (steps, minima))
        s, t = ((x * inverse(y.float())).round().clamp(0, 63) for x, y in ((steps, d), (minima, m)))
        step, minimum = (d.float() * s)[..., None], (m.float() * t)[..., None]
        q = ((runs + minimum) * inverse(step)).round().clamp(0, 15)
        error = (step * q - minimum - runs).square().sum((-1, -2))
        codes = pair(q.unflatten(-2, (4, 2)).flatten(-2)).flatten(-2)
        scales = pack_scales(s.to(torch.uint8), t.to(torch.uint8))
        packed = torch.cat([half_bytes(d), half_bytes(m), scales, codes], -1)
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better[..., None], packed, kept)
    return kept
