"""QuantizedTensor: a packed weight in the neutral layout, and what it means.

Neutral layout, the one on disk (FORMAT.md): rows are output features.

    int4   codes int32 [N, ceil(K/8)]: eight codes 0..15 of one row in a word, the first in the lowest bits
           word = q7|q6|q5|q4|q3|q2|q1|q0; columns past K hold the code 0
    int3   codes int32 [N, 3 ceil(K/32)]: 32 codes 0..7 in 96 bits, which are three words, the lowest bits first;
           columns 10 and 21 of the 32 straddle two words
    int2   codes int32 [N, ceil(K/16)]: sixteen codes 0..3 in a word
           all three: scales [N, ceil(K/group_size)]; zeros uint8 of the same shape, or None: every zero is
           8, 4 or 2;  w[n, k] = (q[n, k] - zeros[n, k // group_size]) * scales[n, k // group_size]
    int8   codes int8 [N, K], scales float32 [N, 1]:       w[n, k] = q[n, k] * scales[n, 0]
    fp8    codes float8_e4m3fn [N, K], scales float32 [N, 1], or one a 128 x 128 tile:
           [ceil(N/128), ceil(K/128)]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

from quantkit.errors import QuantKitError
from quantkit.scheme import Scheme

WORD = 32  # bits
PARTS = (
    "codes",
    "scales",
    "zeros",
    "input_scale",
    "channel_scales",
    "input_order",
)  # of a packed weight, as stored
TURN = 8  # rows of one part, then as many of the other, where gates and ups are interleaved


def run_of(bits: int) -> tuple[int, int]:
    """(codes, words) of the shortest run of codes that fills whole words: (8, 1), (32, 3), (16, 1) for 4, 3, 2 bits."""
    common = gcd(bits, WORD)
    return WORD // common, bits // common


def words_of(K: int, bits: int) -> int:
    """Words in a packed row of K codes."""
    codes, words = run_of(bits)
    return -(-K // codes) * words


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes 0 .. 2^bits - 1 of 2, 3 or 4 bits, any integer dtype [N, K] -> int32 [N, words_of(K, bits)]."""
    N, K = codes.shape
    run, words = run_of(bits)
    runs = torch.nn.functional.pad(codes.to(torch.int32), (0, -K % run)).view(N, -1, run)
    packed = runs.new_zeros(N, runs.shape[1], words)
    for i in range(run):
        word, shift = divmod(i * bits, WORD)
        packed[..., word] |= runs[..., i] << shift
        if shift + bits > WORD:
            packed[..., word + 1] |= runs[..., i] >> WORD - shift
    return packed.flatten(1)


def unpack_codes(packed: torch.Tensor, K: int, bits: int) -> torch.Tensor:
    """int32 [N, words_of(K, bits)] -> codes 0 .. 2^bits - 1, uint8 [N, K]."""
    run, words = run_of(bits)
    runs = packed.unflatten(1, (-1, words))
    codes = torch.empty(*runs.shape[:2], run, dtype=torch.uint8, device=packed.device)
    for i in range(run):
        word, shift = divmod(i * bits, WORD)
        code = runs[..., word] >> shift
        if shift + bits > WORD:  # the shift is arithmetic: the sign has filled the upper bits
            code = code & 2 ** (WORD - shift) - 1 | runs[..., word + 1] << WORD - shift
        codes[..., i] = code & 2**bits - 1
    return codes.flatten(1)[:, :K]


def expand_groups(per_group: torch.Tensor, group_size: int | None, K: int) -> torch.Tensor:
    """[N, groups] -> [N, K], each entry repeated over its group; the last group may be shorter."""
    return per_group.repeat_interleave(group_size or K, dim=1)[:, :K]


def in_turns(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`TURN` rows of each part, then as many more: gates and ups [N, ...] -> [2 N, ...], N a multiple of `TURN`."""
    return torch.stack([part.unflatten(0, (-1, TURN)) for part in parts], 1).flatten(0, 2)


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight [N, K] as codes, scales and zeros in the neutral layout above.

    Attributes:
        scheme: how to read the rest.
        shape: (N, K) of the weight.
        codes, scales, zeros: see the table above. Scales of 2 to 4 bits are bfloat16 or float16 (float32 where an
            import has such), the others float32.
        input_scale: float32 [1], the static activation scale (x is divided by it), or None.
        channel_scales: bfloat16 [K], or None. x is multiplied by them before anything else:
            y = (x * channel_scales) @ dequantize()^T.
        input_order: int32 [K], or None. Column k of the codes multiplies column input_order[k] of x, as GPTQ's
            `desc_act` has it: y = (x * channel_scales)[:, input_order] @ dequantize()^T.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    channel_scales: torch.Tensor | None = None
    input_order: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the codes stand for [N, K]: the truth that every kernel is tested against.

        Channel scales and the order of columns are not in it, since kernels get x with them; see `effective_weight`.
        """
        N, K = self.shape
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        scales = self.scales.to(exact)
        if self.scheme.bits < 8:
            zeros = self.zeros
            if zeros is None:
                zeros = torch.full_like(self.scales, self.scheme.symmetric_zero)
            q = unpack_codes(self.codes, K, self.scheme.bits).to(exact)
            group_size = self.scheme.group_size
            w = (q - expand_groups(zeros.to(exact), group_size, K)) * expand_groups(scales, group_size, K)
        elif block := self.scheme.block_size:
            tiles = scales.repeat_interleave(block, 0)[:N].repeat_interleave(block, 1)[:, :K]
            w = self.codes.to(exact) * tiles
        else:
            w = self.codes.to(exact) * scales
        return w.to(dtype)

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What x itself is multiplied by [N, K]: dequantize(), its columns where x has them, times channel_scales.

        Rounded once to `dtype`.
        """
        if self.channel_scales is None and self.input_order is None:
            return self.dequantize(dtype)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        w = self.dequantize(exact)
        if self.input_order is not None:
            w = w[:, self.input_order.long().argsort()]
        if self.channel_scales is not None:
            w = w * self.channel_scales.to(exact)
        return w.to(dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are stored, by the suffix of their names."""
        named = {name: getattr(self, name) for name in PARTS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def merge_rows(parts: Sequence[QuantizedTensor], interleave: bool = False) -> QuantizedTensor:
    """One weight from several that multiply the same x: q, k and v, or gate and up. Codes and scales stay as they are.

    Args:
        parts: weights [N_i, K] of one scheme.
        interleave: two parts of equal N, in turns of 8 rows: what the int4 kernels want for SwiGLU, gates first.

    Returns:
        The weight [sum of N_i, K], rows of the first part first.

    Raises:
        QuantKitError: the parts differ in scheme, K, dtype of the scales, device, static activation scale, channel
            scales or order of columns, or rows of two parts would meet in one block of fp8-block.
    """
    if not parts:
        raise QuantKitError(
            "merge_rows: found no parts, expected at least one weight; pass the weights to merge"
        )
    first = parts[0]
    for i, part in enumerate(parts[1:], 1):
        for what, found, expected in (
            ("scheme", part.scheme.label, first.scheme.label),
            ("K", part.shape[1], first.shape[1]),
            ("dtype of scales", part.scales.dtype, first.scales.dtype),
            ("device", part.codes.device, first.codes.device),
        ):
            if found != expected:
                raise QuantKitError(
                    f"merge_rows: part {i} has {what} {found}, expected {expected} as part 0; keep them apart"
                )
        if first.input_scale is not None and not torch.equal(first.input_scale, part.input_scale):  # type: ignore[arg-type]
            raise QuantKitError(
                f"merge_rows: part {i} has input_scale {part.input_scale.item():g}, expected "  # type: ignore[union-attr]
                f"{first.input_scale.item():g} as part 0; calibrate them together or keep them apart"
            )
        for what in ("channel_scales", "input_order"):
            ours, theirs = getattr(first, what), getattr(part, what)
            if (ours is None) != (theirs is None) or (ours is not None and not torch.equal(ours, theirs)):
                raise QuantKitError(
                    f"merge_rows: part {i} has other {what} than part 0, expected the same x; keep them apart"
                )
    rows = [part.shape[0] for part in parts]
    block = first.scheme.block_size
    if interleave and (len(parts) != 2 or rows[0] != rows[1] or rows[0] % TURN):
        raise QuantKitError(
            f"merge_rows: interleaved parts have N {', '.join(map(str, rows))}, expected two of the same multiple "
            f"of {TURN}; merge them without interleave"
        )
    if block and interleave:
        raise QuantKitError(
            f"merge_rows: {first.scheme.label} has one scale for {block} rows, expected one a row or "
            f"group to interleave; merge them without interleave"
        )
    if block and any(n % block for n in rows[:-1]):
        raise QuantKitError(
            f"merge_rows: {first.scheme.label} parts have N {', '.join(map(str, rows))}, expected multiples of "
            f"{block} before the last, or two parts would share a block; keep them apart"
        )

    def merge(tensors: list[torch.Tensor]) -> torch.Tensor:
        bits = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors]
        return (in_turns(bits) if interleave else torch.cat(bits)).view(tensors[0].dtype)

    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedTensor(
        first.scheme,
        (sum(rows), first.shape[1]),
        merge([part.codes for part in parts]),
        merge([part.scales for part in parts]),
        merge(zeros) if zeros else None,
        first.input_scale,
        first.channel_scales,
        first.input_order,
    )
