"""compressed-tensors checkpoints, as llm-compressor and vLLM have them: read and written.

A linear M with weight [N, K], codes of b bits less 2^(b-1) where they are integers:

    pack-quantized     M.weight_packed      int32 [N, ceil(K b / 32)]    rows as in quantkit's layout, without padding
                       M.weight_shape       int64 [2]                    the numbers N and K
                       M.weight_zero_point  int32 [ceil(N b / 32), G]    packed along N; where not symmetric
                       M.weight_g_idx       int32 [K]                    the group of each input; of older writers
    int-quantized,     M.weight             int8 or float8_e4m3fn [N, K]
    float-quantized,   M.weight_zero_point  int8 [N, G]                  where not symmetric
    naive-quantized
    all of them        M.weight_scale       [1] tensor, [N, 1] channel, [N, G] group, or [ceil(N/128), ceil(K/128)] block
                       M.input_scale        [1]                          static activations
    w[n, k] = (code[n, k] - zero_point) * weight_scale

The config's `config_groups` say by names, regular expressions or classes which linear has which numbers.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.checkpoint import StoredTensor
from quantkit.errors import QuantKitError
from quantkit.formats.affine import Affine, Linear, check_finite
from quantkit.formats.reader import Packed, modules_with, need, whole
from quantkit.packing import QuantizedTensor, pack_codes, unpack_codes, words_of
from quantkit.scheme import BLOCK, PRESETS, Scheme

FLOATS = ("BF16", "F16", "F32")
PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
FORMATS = (PACKED, INT, FLOAT, NAIVE)
MIXED = "mixed-precision"  # each group has its own
OUTPUTS = "the rounding of outputs is left out; they stay in the model's dtype"
DROPPED = {
    ".k_scale": "scales of the cache are left out; the cache stays in the model's dtype",
    ".v_scale": "scales of the cache are left out; the cache stays in the model's dtype",
    ".q_scale": "scales of the cache are left out; the cache stays in the model's dtype",
    ".output_scale": OUTPUTS,
}


@dataclass(frozen=True)
class Group:
    """One of `config_groups`: how its linears are stored, and what x is rounded to."""

    format: str
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int | None
    activation: dict[str, Any] | None

    @property
    def rounding(self) -> tuple[str, str] | None:
        """What x is rounded to and whose scale, as in `Scheme`; None: neither."""
        if self.activation is None:
            return None
        kind = {"int": "int8", "float": "fp8"}.get(self.activation.get("type", "int"), "?")
        if self.activation.get("num_bits", 8) != 8 or not self.activation.get("symmetric", True):
            kind = "?"
        strategy, dynamic = self.activation.get("strategy") or "tensor", self.activation.get("dynamic", False)
        if not dynamic:
            return kind, "static" if strategy == "tensor" else "?"
        # a scale a token is finer than one for all of them
        return kind, {"token": "token", "tensor": "token", "group": "group"}.get(strategy, "?")


class CompressedTensors:
    """A compressed-tensors checkpoint's linears."""

    name = "compressed-tensors"

    def __init__(self, config: dict[str, Any], tensors: dict[str, StoredTensor], read: Any) -> None:
        """`read` loads tensors by their names: the shapes are stored as such."""
        self.dropped = dict(DROPPED)
        self.notes: list[str] = []
        groups = config.get("config_groups")
        if (
            not isinstance(groups, dict)
            or not groups
            or not all(isinstance(g, dict) for g in groups.values())
        ):
            raise QuantKitError(
                "config.json: compressed-tensors without config_groups, or presets named in them; expected a mapping of "
                "groups with their weights spelled out"
            )
        if (config.get("sparsity_config") or {}).get("format") not in (None, "dense"):
            raise QuantKitError(
                "config.json: compressed-tensors with a sparsity format; only dense ones are read"
            )
        if (config.get("transform_config") or {}).get("config_groups"):
            raise QuantKitError(
                "config.json: compressed-tensors with a transform_config, whose rotations belong to the weights, expected none; "
                "quantize the original model"
            )
        if any(group.get("output_activations") for group in groups.values()):
            self.notes.append(f"output_activations: {OUTPUTS}")
        self.targets = [(group.get("targets") or [], group_of(group, config)) for group in groups.values()]
        packed = modules_with("weight_packed", tensors)
        scaled = [n for n in modules_with("weight_scale", tensors) if f"{n}.weight" in tensors]
        self.groups = {name: self.group_called(name) for name in [*packed, *scaled]}
        shapes = read([n for name in packed if (n := f"{name}.weight_shape") in tensors])
        self.modules = {name: packed_of(name, self.groups[name], tensors, shapes) for name in self.groups}

    def group_called(self, name: str) -> Group:
        """The group of a linear: by its name, by a regular expression, else by its class, which is Linear."""
        by_class = None
        for targets, group in self.targets:
            for target in targets:
                if target == name or (target.startswith("re:") and matches(target[3:], name)):
                    return group
                if target == "Linear" and by_class is None:
                    by_class = group
        if by_class is None:
            raise QuantKitError(f"config.json: no group of config_groups has {name} among its targets")
        return by_class

    def linear(self, name: str, tensors: dict[str, torch.Tensor]) -> Linear:
        group, (N, K) = self.groups[name], self.modules[name].shape
        scales = tensors["weight_scale"]
        check_finite(name, weight_scale=scales)
        rounding = group.rounding
        if group.kind == "float":
            return float_linear(name, group, tensors)
        if scales.numel() == 1:
            scales = scales.reshape(1, 1).expand(N, 1)
        middle = 2 ** (group.bits - 1)
        if group.format == PACKED:
            codes = unpack_dense(tensors["weight_packed"], K, group.bits)
        else:
            signed = tensors["weight"].to(torch.int16)
            if int(signed.min()) < -middle or int(signed.max()) >= middle:
                raise QuantKitError(
                    f"{name}.weight: codes from {int(signed.min())} to {int(signed.max())}, which are not of "
                    f"{group.bits} bits; mend num_bits in config.json"
                )
            codes = (signed + middle).to(torch.uint8)
        zeros = None
        if "weight_zero_point" in tensors:
            stored = tensors["weight_zero_point"]
            if stored.dtype == torch.int32 and group.format == PACKED:
                zeros = unpack_dense(stored.T.contiguous(), N, group.bits).T.to(torch.int16)
            else:
                zeros = stored.to(torch.int16).reshape(scales.shape) + middle
        size = group.group_size or K
        group_of = tensors.get("weight_g_idx")
        if group_of is not None:
            group_of = group_of.long()
            if bool((group_of < 0).any() | (group_of >= scales.shape[1]).any()):
                raise QuantKitError(
                    f"{name}.weight_g_idx: names groups that weight_scale does not have; copy the checkpoint again"
                )
            if torch.equal(group_of, torch.arange(K) // size):
                group_of = None
        activation = "int8" if rounding in (("int8", "token"), ("int8", "static")) else None
        affine = Affine(group.bits, codes, scales, zeros, group.group_size, group_of, activation)
        if rounding is not None and activation is None:
            return Linear(None, f"activations {group.activation}", affine.dequantize())
        if rounding == ("int8", "static"):
            return with_input_scale(name, affine.linear(), PRESETS["w8a8-static"], tensors)
        return affine.linear()


def matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise QuantKitError(f"config.json: target {pattern!r} is no regular expression: {error}") from error


def group_of(group: dict[str, Any], config: dict[str, Any]) -> Group:
    """One entry of `config_groups`."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise QuantKitError("config.json: a group of config_groups has no weights; copy it again")
    kind = weights.get("type", "int")
    bits = whole(weights, "num_bits", range(1, 9), default=8)
    strategy = weights.get("strategy")
    size = weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if not size else "channel" if size == -1 else "group"
    stored = group.get("format") or config.get("format")
    stored = NAIVE if stored in ("dense", None) else stored
    if stored not in FORMATS or kind not in ("int", "float") or (kind == "float" and bits != 8):
        raise QuantKitError(
            f"config.json: compressed-tensors format {stored!r} with {bits}-bit {kind} weights, expected "
            f"{', '.join(FORMATS)} with int weights, or float ones of 8 bits"
        )
    if strategy not in ("tensor", "channel", "group", "block"):
        raise QuantKitError(f"config.json: compressed-tensors weights with strategy {strategy!r}")
    if strategy == "group" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise QuantKitError(
            f"config.json: quantization_config has group_size {size!r}, expected a positive number"
        )
    if strategy == "block" and (
        kind == "int" or list(weights.get("block_structure") or []) != [BLOCK, BLOCK]
    ):
        raise QuantKitError(
            f"config.json: blocks of {weights.get('block_structure')} with {kind} weights, expected float ones in "
            f"[{BLOCK}, {BLOCK}]"
        )
    activation = group.get("input_activations")
    return Group(
        stored,
        bits,
        kind,
        bool(weights.get("symmetric", True)),
        strategy,
        size if strategy == "group" else None,
        activation if isinstance(activation, dict) else None,
    )


def packed_of(
    name: str, group: Group, tensors: dict[str, StoredTensor], shapes: dict[str, torch.Tensor]
) -> Packed:
    """A module's shape and tensors, found to be those that its group leads to."""
    why = f"compressed-tensors {group.format}, {group.bits}-bit {group.kind}, {group.strategy}"
    why += f" {group.group_size}" if group.group_size else ""
    suffixes: tuple[str, ...]
    if group.format == PACKED:
        need(tensors, f"{name}.weight_shape", ("I64", "I32"), (2,), why)
        N, K = (int(size) for size in shapes[f"{name}.weight_shape"])
        words = need(tensors, f"{name}.weight_packed", ("I32",), 2, why)
        if words.shape != (N, -(-K * group.bits // 32)) or N < 1 or K < 1:
            raise QuantKitError(
                f"{words.file}: {name}.weight_packed is {list(words.shape)}, but weight_shape holds [{N}, {K}] and "
                f"num_bits is {group.bits}: expected [{N}, {-(-K * group.bits // 32)}]; mend config.json, or copy the "
                "file again"
            )
        suffixes = ("weight_packed", "weight_scale")
    else:
        N, K = need(tensors, f"{name}.weight", ("I8",) if group.kind == "int" else ("F8_E4M3",), 2, why).shape
        suffixes = ("weight", "weight_scale")
    groups = -(-K // (group.group_size or K))
    scale = tensors.get(f"{name}.weight_scale")
    if group.strategy == "tensor":
        shape: tuple[int, ...] = () if scale is not None and scale.shape == () else (1,)
        if scale is not None and scale.shape == (1, 1):
            shape = (1, 1)
    elif group.strategy == "block":
        shape = (-(-N // BLOCK), -(-K // BLOCK))
    else:
        shape = (N, groups)
    need(tensors, f"{name}.weight_scale", FLOATS, shape, why)
    if group.kind == "int" and not group.symmetric:
        suffixes += ("weight_zero_point",)
        if group.format == PACKED and group.strategy != "tensor":
            need(tensors, f"{name}.weight_zero_point", ("I32",), (-(-N * group.bits // 32), groups), why)
        else:
            need(tensors, f"{name}.weight_zero_point", ("I8",), shape, why)
    if group.rounding is not None and group.rounding[1] == "static":
        need(tensors, f"{name}.input_scale", FLOATS, tensors_shape(tensors, f"{name}.input_scale"), why)
        suffixes += ("input_scale",)
    if f"{name}.weight_g_idx" in tensors:
        need(tensors, f"{name}.weight_g_idx", ("I32", "I64"), (K,), why)
        suffixes += ("weight_g_idx",)
    if group.format == PACKED:
        suffixes += ("weight_shape",)
    return Packed((N, K), suffixes)


def tensors_shape(tensors: dict[str, StoredTensor], name: str) -> tuple[int, ...]:
    """[1], or [] where the tensor is stored so."""
    return () if name in tensors and tensors[name].shape == () else (1,)


def unpack_dense(words: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """int32 [rows, ceil(count b / 32)] -> codes uint8 [rows, count]: rows end with their last code's word."""
    filled = torch.nn.functional.pad(words, (0, words_of(count, bits) - words.shape[1]))
    return unpack_codes(filled, count, bits)


def pack_dense(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, count] -> int32 [rows, ceil(count b / 32)]."""
    return pack_codes(codes, bits)[:, : -(-codes.shape[1] * bits // 32)].contiguous()


def float_linear(name: str, group: Group, tensors: dict[str, torch.Tensor]) -> Linear:
    """An e4m3 weight, whose strategies are those of quantkit's presets."""
    weight, scales, rounding = tensors["weight"], tensors["weight_scale"].float(), group.rounding
    check_finite(name, weight=weight)
    N, K = weight.shape
    presets = {None: "fp8-w8a16", ("fp8", "token"): "fp8", ("fp8", "static"): "fp8-static"}
    if group.strategy == "block":
        presets = {("fp8", "group"): "fp8-block"}  # type: ignore[dict-item]
    elif group.strategy == "tensor":
        scales = scales.reshape(1, 1).expand(N, 1).contiguous()
    if group.strategy == "group" or rounding not in presets:
        size = group.group_size or BLOCK
        tiles = scales if group.strategy == "group" else scales.repeat_interleave(BLOCK, 0)[:N]
        plain = scales if scales.shape == (N, 1) else tiles.repeat_interleave(size, 1)[:, :K]
        why = f"e4m3 weights by {group.strategy} with activations {group.activation}"
        return Linear(None, f"{why}, and quantkit has no such scheme", weight.float() * plain)
    linear = fp8_linear(PRESETS[presets[rounding]], weight, scales)
    if rounding == ("fp8", "static"):
        return with_input_scale(name, linear, PRESETS["fp8-static"], tensors)
    return linear


def fp8_linear(scheme: Scheme, weight: torch.Tensor, scales: torch.Tensor) -> Linear:
    """e4m3 codes [N, K] and float32 scales as the scheme has them. A scale of zero becomes 1, its codes 0."""
    N, K = weight.shape
    if bool((scales == 0).any()):
        block = scheme.block_size or 1
        empty = (scales == 0).repeat_interleave(block, 0)[:N]
        empty = empty.repeat_interleave(block, 1)[:, :K] if scheme.block_size else empty
        weight = weight.float().masked_fill(empty, 0).to(torch.float8_e4m3fn)
        scales = scales.where(scales != 0, 1.0)
    return Linear(QuantizedTensor(scheme, (N, K), weight, scales.contiguous()))


def with_input_scale(name: str, linear: Linear, scheme: Scheme, tensors: dict[str, torch.Tensor]) -> Linear:
    """The linear in a static scheme, or its weight where it was not of that scheme's kind."""
    scale = tensors["input_scale"].float().reshape(1)
    check_finite(name, input_scale=scale)
    if float(scale) <= 0:
        raise QuantKitError(f"{name}.input_scale: {float(scale):g}, expected a positive number")
    q = linear.quantized
    if q is None:
        return linear
    if q.scheme.weight != scheme.weight:
        why = f"static activations beside {q.scheme.label}, and quantkit has no such scheme"
        return Linear(None, why, q.effective_weight())
    return Linear(QuantizedTensor(scheme, q.shape, q.codes, q.scales, None, scale))


def misfit(quantized: QuantizedTensor) -> str:
    """Why this format cannot hold the weight; '' if it can."""
    scheme, K = quantized.scheme, quantized.shape[1]
    if quantized.channel_scales is not None or quantized.input_order is not None:
        return "scales or an order of input channels, for which compressed-tensors has no place"
    if scheme.group_size and K % scheme.group_size:
        return f"a last group that is shorter than {scheme.group_size}"
    return ""


def format_of(scheme: Scheme) -> str:
    """How the weights of a scheme are stored."""
    if scheme.weight == "fp8":
        return FLOAT
    return INT if scheme.activation else PACKED


def tensors_of(quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors of a linear that has no `misfit`, by suffix."""
    scheme, (N, K) = quantized.scheme, quantized.shape
    named = {"weight_scale": quantized.scales}
    if quantized.input_scale is not None:
        named["input_scale"] = quantized.input_scale
    if scheme.bits == 8 and format_of(scheme) != PACKED:
        return {"weight": quantized.codes, **named}
    if scheme.bits == 8:
        codes = (quantized.codes.to(torch.int16) + 128).to(torch.uint8)
    else:
        codes = unpack_codes(quantized.codes, K, scheme.bits)
    if format_of(scheme) == INT:
        middle = scheme.symmetric_zero
        named["weight"] = (codes.to(torch.int16) - middle).to(torch.int8)
        if quantized.zeros is not None:
            named["weight_zero_point"] = (quantized.zeros.to(torch.int16) - middle).to(torch.int8)
        return named
    if quantized.zeros is not None:
        named["weight_zero_point"] = pack_dense(quantized.zeros.T.contiguous(), scheme.bits).T.contiguous()
    return {"weight_packed": pack_dense(codes, scheme.bits), "weight_shape": torch.tensor([N, K]), **named}


def config_of(schemes: dict[str, Scheme], kept: list[str]) -> dict[str, Any]:
    """`quantization_config` of these modules; `kept` are the linears that are not packed."""
    named: dict[str, list[str]] = {}
    kinds = {scheme.label: scheme for scheme in schemes.values()}
    for name, scheme in schemes.items():
        named.setdefault(scheme.label, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else named[label],
            "weights": weights_of(scheme),
            "input_activations": activations_of(scheme),
            "output_activations": None,
            "format": format_of(scheme),
        }
        for i, (label, scheme) in enumerate(kinds.items())
    }
    formats = {format_of(scheme) for scheme in kinds.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": kept,
        "config_groups": groups,
    }


def weights_of(scheme: Scheme) -> dict[str, Any]:
    strategy = "block" if scheme.block_size else "group" if scheme.group_size else "channel"
    return {
        "num_bits": scheme.bits,
        "type": "float" if scheme.weight == "fp8" else "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group_size,
        "block_structure": [scheme.block_size] * 2 if scheme.block_size else None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def activations_of(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activation is None:
        return None
    strategy = {"token": "token", "static": "tensor", "group": "group"}[scheme.activation_scale or "token"]
    return {
        "num_bits": 8,
        "type": "float" if scheme.activation == "fp8" else "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": BLOCK if strategy == "group" else None,
        "block_structure": None,
        "dynamic": strategy != "tensor",
        "actorder": None,
        "observer": None if strategy != "tensor" else "minmax",
        "observer_kwargs": {},
    }
