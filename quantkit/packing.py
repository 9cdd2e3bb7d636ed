"""QuantizedTensor: a packed weight in the neutral layout, and what it means.

Neutral layout, the one on disk (FORMAT.md): rows are output features.

    int4   codes int32 [N, ceil(K/8)]: eight codes 0..15 of one row in a word, the first in the lowest bits
           word = q7|q6|q5|q4|q3|q2|q1|q0; columns past K hold the code 0
           scales [N, ceil(K/group_size)]; zeros uint8 of the same shape, or None: every zero is 8
           w[n, k] = (q[n, k] - zeros[n, k // group_size]) * scales[n, k // group_size]
    int8   codes int8 [N, K], scales float32 [N, 1]:       w[n, k] = q[n, k] * scales[n, 0]
    fp8    codes float8_e4m3fn [N, K], scales float32 [N, 1], or one a 128 x 128 tile:
           [ceil(N/128), ceil(K/128)]
"""

from dataclasses import dataclass

import torch

from quantkit.scheme import Scheme

CODES_PER_WORD = 8  # 4-bit codes in an int32
SYMMETRIC_ZERO = 8


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15, any integer dtype [N, K] -> int32 [N, ceil(K/8)], the first code in the lowest bits."""
    N, K = codes.shape
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, -K % CODES_PER_WORD))
    words = padded.view(N, -1, CODES_PER_WORD)
    packed = torch.zeros_like(words[..., 0])
    for i in range(CODES_PER_WORD):
        packed |= words[..., i] << 4 * i
    return packed


def unpack_int4(packed: torch.Tensor, K: int) -> torch.Tensor:
    """int32 [N, ceil(K/8)] -> codes 0..15, uint8 [N, K]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 0xF).to(torch.uint8).flatten(1)[:, :K]


def expand_groups(per_group: torch.Tensor, group_size: int | None, K: int) -> torch.Tensor:
    """[N, groups] -> [N, K], each entry repeated over its group; the last group may be shorter."""
    return per_group.repeat_interleave(group_size or K, dim=1)[:, :K]


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight [N, K] as codes, scales and zeros in the neutral layout above.

    Attributes:
        scheme: how to read the rest.
        shape: (N, K) of the weight.
        codes, scales, zeros: see the table above. Scales of int4 are bfloat16 or float16, the others float32.
        input_scale: float32 [1], the static activation scale (x is divided by it), or None.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the codes stand for [N, K]: the truth that every kernel is tested against."""
        N, K = self.shape
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        scales = self.scales.to(exact)
        if self.scheme.weight == "int4":
            zeros = self.zeros if self.zeros is not None else torch.full_like(self.scales, SYMMETRIC_ZERO)
            q = unpack_int4(self.codes, K).to(exact)
            group_size = self.scheme.group_size
            w = (q - expand_groups(zeros.to(exact), group_size, K)) * expand_groups(scales, group_size, K)
        elif block := self.scheme.block_size:
            tiles = scales.repeat_interleave(block, 0)[:N].repeat_interleave(block, 1)[:, :K]
            w = self.codes.to(exact) * tiles
        else:
            w = self.codes.to(exact) * scales
        return w.to(dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are stored, by the suffix of their names."""
        named = dict(codes=self.codes, scales=self.scales, zeros=self.zeros, input_scale=self.input_scale)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())
