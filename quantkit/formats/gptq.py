"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and transformers have them: read and written.

A linear M with weight [N, K] and `bits` 2, 3, 4 or 8 is

    M.qweight   int32 [K * bits / 32, N]    a column is one number, the first code in its lowest bits, cut into words
    M.qzeros    int32 [G, N * bits / 32]    zeros of one group likewise, along N
    M.scales    float16 [G, N]              others are read too
    M.g_idx     int32 [K]                   the group of each input; absent: k div group_size
    w[n, k] = (q[k, n] - zero[g, n]) * scales[g, n]

`checkpoint_format` (also `format`) "gptq" (version 1) stores zero - 1 in each field of qzeros, "gptq_v2" the zero. A
field of version 1 that is 2^bits - 1 stands for the zero 0 with one reader and 2^bits with another, and what wrote
it has often damaged its neighbours: such files are refused, and such zeros are written as version 2 alone.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.checkpoint import StoredTensor
from quantkit.errors import QuantKitError
from quantkit.formats.affine import Affine, Linear, affine_of, check_finite, exactly
from quantkit.formats.reader import Packed, modules_with, need, whole
from quantkit.packing import QuantizedTensor, pack_codes, unpack_codes
from quantkit.scheme import Scheme

BITS = (2, 3, 4, 8)
FLOATS = ("F16", "BF16", "F32")
VERSIONS = ("gptq", "gptq_v2")
DAMP = 0.05  # which readers of the config want to see


@dataclass(frozen=True)
class Grouping:
    """Bits and group size of one module; group_size None: the whole row."""

    bits: int
    group_size: int | None


class GPTQ:
    """A GPTQ checkpoint's linears."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        self.dropped: dict[str, str] = {}
        self.notes: list[str] = []
        version = config.get("checkpoint_format", config.get("format", "gptq"))
        if version not in VERSIONS:
            raise QuantKitError(
                f"config.json: GPTQ checkpoint_format {version!r}, expected {' or '.join(VERSIONS)}; save it as one of them"
            )
        self.name = version
        self.groupings, self.modules = {}, {}
        for name in modules_with("qweight", tensors):
            grouping = grouping_of(name, config)
            self.groupings[name] = grouping
            self.modules[name] = packed_of(name, grouping, tensors)

    def linear(self, name: str, tensors: dict[str, torch.Tensor]) -> Linear:
        grouping, (N, K) = self.groupings[name], self.modules[name].shape
        bits, scales = grouping.bits, tensors["scales"].T.contiguous()
        check_finite(name, scales=scales)
        zeros = unpack_codes(tensors["qzeros"], N, bits).T.to(torch.int16)
        if self.name == "gptq":
            if bool((zeros == 2**bits - 1).any()):
                raise QuantKitError(
                    f"{name}.qzeros: a field of {2**bits - 1}, which version 1 of GPTQ's format cannot tell from a zero "
                    "below the smallest; save the checkpoint as gptq_v2"
                )
            zeros = zeros + 1
        group_of = None
        if "g_idx" in tensors:
            group_of = tensors["g_idx"].long()
            if bool((group_of < 0).any() | (group_of >= scales.shape[1]).any()):
                raise QuantKitError(
                    f"{name}.g_idx: groups from {int(group_of.min())} to {int(group_of.max())}, expected 0 to "
                    f"{scales.shape[1] - 1} as scales has them; copy the checkpoint again"
                )
            if torch.equal(group_of, torch.arange(K) // (grouping.group_size or K)):
                group_of = None
        codes = unpack_codes(tensors["qweight"].T, K, bits)
        return Affine(bits, codes, scales, zeros, grouping.group_size, group_of).linear()


def grouping_of(name: str, config: dict[str, Any]) -> Grouping:
    """What the config says of a module; GPTQModel's `dynamic` has exceptions by regular expression."""
    own = dict(config)
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise QuantKitError("config.json: GPTQ's 'dynamic' must be a mapping; copy it again")
    for pattern, changes in dynamic.items():
        try:
            found = re.match(pattern.removeprefix("+:"), name)
        except re.error as error:
            raise QuantKitError(
                f"config.json: 'dynamic' has {pattern!r}, no regular expression: {error}"
            ) from error
        if found and not pattern.startswith("-:") and isinstance(changes, dict):
            own |= changes
            break
    size = own.get("group_size", -1)
    if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
        raise QuantKitError(
            f"config.json: quantization_config has group_size {size!r}, expected a positive number or -1"
        )
    return Grouping(whole(own, "bits", BITS), None if size == -1 else size)


def packed_of(name: str, grouping: Grouping, tensors: dict[str, StoredTensor]) -> Packed:
    """A module's shape and tensors, found to be those that bits and group size lead to."""
    bits, why = grouping.bits, f"GPTQ, bits {grouping.bits}, group_size {grouping.group_size or -1}"
    words, N = need(tensors, f"{name}.qweight", ("I32",), 2, why).shape
    K, rest = divmod(32 * words, bits)
    if rest or not K or not N:
        raise QuantKitError(
            f"{name}.qweight: {words} words a column, which {bits} bits do not fill; mend bits in config.json"
        )
    groups = -(-K // (grouping.group_size or K))
    need(tensors, f"{name}.scales", FLOATS, (groups, N), why)
    need(tensors, f"{name}.qzeros", ("I32",), (groups, -(-N * bits // 32)), why)
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales")
    if f"{name}.g_idx" in tensors:
        need(tensors, f"{name}.g_idx", ("I32", "I64"), (K,), why)
        suffixes += ("g_idx",)
    return Packed((N, K), suffixes)


def misfit(quantized: QuantizedTensor, version: str) -> str:
    """Why GPTQ's format cannot hold this weight; '' if it can."""
    scheme, (N, K) = quantized.scheme, quantized.shape
    if scheme.weight == "fp8" or scheme.activation:
        return f"scheme {scheme.label}, and GPTQ's format has integers beside 16-bit activations"
    if quantized.channel_scales is not None:
        return "channel scales, for which GPTQ's format has no place"
    if N * scheme.bits % 32 or K * scheme.bits % 32:
        return f"a weight [{N}, {K}] that does not fill whole words of {scheme.bits} bits"
    if K % (scheme.group_size or K):
        return f"a last group that is shorter than {scheme.group_size}"
    if version == "gptq" and quantized.zeros is not None and bool((quantized.zeros == 0).any()):
        return "zeros of 0, which only gptq_v2 can say"
    if exactly(quantized.scales, torch.float16) is None:
        return f"scales of {str(quantized.scales.dtype)[6:]} that float16 does not hold exactly"
    return ""


def tensors_of(quantized: QuantizedTensor, version: str) -> dict[str, torch.Tensor]:
    """The tensors of a linear that has no `misfit`, by suffix."""
    affine = affine_of(quantized)
    bits, zeros = affine.bits, affine.zeros
    if zeros is None:
        zeros = torch.full(affine.scales.shape, 2 ** (bits - 1))
    stored = zeros.to(torch.int32) - int(version == "gptq")
    return {
        "qweight": pack_codes(affine.codes, bits).T.contiguous(),
        "qzeros": pack_codes(stored.T, bits),
        "scales": affine.scales.T.to(torch.float16).contiguous(),
        "g_idx": affine.columns.to(torch.int32),
    }


def config_of(schemes: dict[str, Scheme], kept: list[str], version: str, ordered: bool) -> dict[str, Any]:
    """`quantization_config` of these modules, with what is not packed among the linears.

    Raises:
        QuantKitError: they differ in bits or group size, of which the format has one for all.
    """
    scheme = only_scheme(schemes, version)
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "desc_act": ordered,
        "sym": all(s.symmetric for s in schemes.values()),
        "lm_head": "lm_head" in schemes,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": DAMP,
        **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in kept}} if kept else {}),
    }


def only_scheme(schemes: dict[str, Scheme], format_name: str) -> Scheme:
    """The one that all modules share, but for zeros.

    Raises:
        QuantKitError: they differ.
    """
    kinds = {(s.bits, s.group_size): s for s in schemes.values()}
    if len(kinds) > 1:
        labels = sorted({s.label for s in schemes.values()})
        raise QuantKitError(
            f"--to {format_name}: the linears are of {', '.join(labels)}, and this format has one number of bits and one "
            "group size for all; use --to compressed-tensors"
        )
    return next(iter(kinds.values()))
