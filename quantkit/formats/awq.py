"""AWQ checkpoints in the GEMM layout, as AutoAWQ and transformers have them: read and written.

A linear M with weight [N, K] of 4 bits is

    M.qweight   int32 [K, N / 8]    along N: bits 4i .. 4i+3 of word c hold the code of row 8c + ORDER[i]
    M.qzeros    int32 [G, N / 8]    zeros likewise
    M.scales    float16 [G, N]      others are read too
    w[n, k] = (q[k, n] - zero[g, n]) * scales[g, n],  g = k div group_size

so that the codes 0 1 2 3 4 5 6 7 of eight rows are the word 75316420 (hexadecimal).
"""

from typing import Any

import torch

from quantkit.checkpoint import StoredTensor
from quantkit.errors import QuantKitError
from quantkit.formats.affine import Affine, Linear, affine_of, check_finite, exactly
from quantkit.formats.gptq import FLOATS, only_scheme
from quantkit.formats.reader import Packed, modules_with, need, whole
from quantkit.packing import QuantizedTensor, pack_codes, unpack_codes
from quantkit.scheme import Scheme

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # rows of eight, in the order of a word's fields
BACK = (0, 4, 1, 5, 2, 6, 3, 7)  # where the code of each row stands


class AWQ:
    """An AWQ checkpoint's linears."""

    name = "awq"

    def __init__(self, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        self.dropped: dict[str, str] = {}
        self.notes: list[str] = []
        version = str(config.get("version", config.get("format", "gemm"))).lower()
        if version != "gemm":
            raise QuantKitError(f"config.json: AWQ version {version!r}, expected 'gemm'; save it in that one")
        whole(config, "bits", (4,), default=config.get("w_bit"))
        size = config.get("group_size", config.get("q_group_size", 128))
        if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
            raise QuantKitError(
                f"config.json: quantization_config has group_size {size!r}, expected a positive number or -1"
            )
        self.group_size = None if size == -1 else size
        self.modules = {name: self.packed_of(name, tensors) for name in modules_with("qweight", tensors)}

    def packed_of(self, name: str, tensors: dict[str, StoredTensor]) -> Packed:
        why = f"AWQ, 4 bits, group_size {self.group_size or -1}"
        K, words = need(tensors, f"{name}.qweight", ("I32",), 2, why).shape
        N, groups = 8 * words, -(-K // (self.group_size or max(K, 1)))
        need(tensors, f"{name}.scales", FLOATS, (groups, N), why)
        need(tensors, f"{name}.qzeros", ("I32",), (groups, words), why)
        return Packed((N, K), ("qweight", "qzeros", "scales"))

    def linear(self, name: str, tensors: dict[str, torch.Tensor]) -> Linear:
        check_finite(name, scales=tensors["scales"])
        codes, zeros = unpack(tensors["qweight"]), unpack(tensors["qzeros"])
        scales = tensors["scales"].T.contiguous()
        return Affine(4, codes.T.contiguous(), scales, zeros.T, self.group_size).linear()


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, N / 8] -> codes uint8 [rows, N]."""
    codes = unpack_codes(words, 8 * words.shape[1], 4)
    return codes.unflatten(1, (-1, 8))[..., list(BACK)].flatten(1)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [rows, N] -> int32 [rows, N / 8]."""
    return pack_codes(codes.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1), 4)


def misfit(quantized: QuantizedTensor) -> str:
    """Why AWQ's format cannot hold this weight; '' if it can."""
    scheme, (N, K) = quantized.scheme, quantized.shape
    if scheme.weight != "int4" or scheme.activation:
        return f"scheme {scheme.label}, and AWQ's format has 4 bits beside 16-bit activations"
    if quantized.channel_scales is not None or quantized.input_order is not None:
        return "scales or an order of input channels, for which AWQ's format has no place"
    if N % 8:
        return f"{N} rows, which do not fill whole words"
    if K % (scheme.group_size or K):
        return f"a last group that is shorter than {scheme.group_size}"
    if exactly(quantized.scales, torch.float16) is None:
        return f"scales of {str(quantized.scales.dtype)[6:]} that float16 does not hold exactly"
    return ""


def tensors_of(quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors of a linear that has no `misfit`, by suffix."""
    affine = affine_of(quantized)
    zeros = torch.full(affine.scales.shape, 8) if affine.zeros is None else affine.zeros
    return {
        "qweight": pack(affine.codes.T.contiguous()),
        "qzeros": pack(zeros.T.contiguous()),
        "scales": affine.scales.T.to(torch.float16).contiguous(),
    }


def config_of(schemes: dict[str, Scheme], kept: list[str]) -> dict[str, Any]:
    """`quantization_config` of these modules; `kept` are the linears that are not packed."""
    scheme = only_scheme(schemes, "awq")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.group_size or -1,
        "zero_point": True,  # zeros are stored, whether or not every one is 8
        "version": "gemm",
        "modules_to_not_convert": kept or None,
    }
