"""Other libraries' kernels for the same weights, timed beside the project's own.

A peer packs a weight of the neutral layout (quantkit/packing.py) into its own order, so that its error is measured
against the same dequantized weight as everyone's. A word of int4 codes holds eight neighbouring columns of a row, the
first in the lowest bits; GPTQ's qweight int32 [K/8, N], which Marlin and Machete read, is its transpose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from quantkit.packing import QuantizedTensor, unpack_codes
from quantkit.scheme import PRESETS, Scheme
from quantkit.source import first_line

Product = Callable[..., Tensor]  # x [M, K], or its codes and scales -> y [M, N]

W4A16, W8A16, W8A8, FP8 = (PRESETS[name] for name in ("w4a16", "w8a16", "w8a8", "fp8"))
INNER_K_TILES = 8  # of tinygemm's order: 128 columns at a time


@dataclass(frozen=True)
class Peer:
    """One kernel of another library.

    Attributes:
        name: the record's field `kernel`.
        module: what must be importable; its first part names the library.
        scheme: the weights that it multiplies by.
        build: packs a weight of that scheme.
        x_dtype: what x is given in, as is y returned.
        rounded: its product takes x in 8 bits, as codes of the weight's dtype [M, K] and float32 scales [M, 1].
        max_M: rows of x past which it is not timed, so slow is it there.
        device: type of the devices that it runs on.
    """

    name: str
    module: str
    scheme: Scheme
    build: Callable[[QuantizedTensor], Product]
    x_dtype: torch.dtype = torch.bfloat16
    rounded: bool = False
    max_M: int | None = None
    device: str = "cuda"

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here; None: it can."""
        if device.type != self.device:
            return f"needs a {self.device} device"
        try:
            import_module(self.module)
        except Exception as error:  # a broken installation raises anything
            return first_line(error)
        return None


def present(
    peers: Sequence[Peer], schemes: Sequence[Scheme], device: torch.device, say: Callable[[str], None]
) -> list[Peer]:
    """The peers of these schemes that run on a device; says in one line which do not, and why."""
    found: list[Peer] = []
    absent: dict[str, list[str]] = {}
    for peer in peers:
        if peer.scheme not in schemes:
            continue
        if reason := peer.missing(device):
            absent.setdefault(reason, []).append(peer.name)
        else:
            found.append(peer)
    if absent:
        reasons = (f"{', '.join(dict.fromkeys(names))} ({reason})" for reason, names in absent.items())
        say(f"peers not timed: {'; '.join(reasons)}")
    return found


def tinygemm(q: QuantizedTensor) -> Product:
    """PyTorch's own: w = (code - 8) * scale + offset, two codes a byte, the first in the high half."""
    codes = unpack_codes(q.codes, q.shape[1], 4)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]  # uint8 [N, K/2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)
    scales = q.scales.t()  # [K / group_size, N]
    scales_and_offsets = torch.stack([scales, torch.zeros_like(scales)], -1)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, q.scheme.group_size, scales_and_offsets)


def gemlite(q: QuantizedTensor) -> Product:
    """gemlite's A16W4 in float16: the float type that its kernels are tuned for."""
    from gemlite.helper import A16Wn

    linear = A16Wn(device=q.codes.device, dtype=torch.float16)
    codes, scales = unpack_codes(q.codes, q.shape[1], 4).contiguous(), q.scales.half()
    return linear.from_weights(
        codes, scales, torch.full_like(scales, q.scheme.symmetric_zero), 4, q.scheme.group_size
    )


def marlin(q: QuantizedTensor) -> Product:
    """vLLM's Marlin: int4 with a scale a group, or int8 with a scale a row."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    N, K = q.shape
    if q.scheme.weight == "int4":
        bits, kind, words = 4, scalar_types.uint4b8, q.codes
    else:  # stored as code + 128, four to a word
        bits, kind = 8, scalar_types.uint8b128
        words = (q.codes.view(torch.uint8) ^ 128).view(torch.int32)
    unsorted = torch.empty(0, dtype=torch.int32, device=words.device)
    packed = ops.gptq_marlin_repack(words.t().contiguous(), unsorted, K, N, bits)
    scales = q.scales.t().bfloat16().contiguous()
    scales = marlin_utils.marlin_permute_scales(scales, K, N, q.scheme.group_size or -1)
    workspace = marlin_utils.marlin_make_workspace_new(words.device)

    def product(x: Tensor) -> Tensor:
        unused = dict.fromkeys(("c", "b_bias", "a_scales", "global_scale", "b_zeros", "g_idx", "perm"))
        return ops.marlin_gemm(
            a=x,
            b_q_weight=packed,
            b_scales=scales,
            workspace=workspace,
            b_q_type=kind,
            size_m=len(x),
            size_n=N,
            size_k=K,
            use_fp32_reduce=True,
            **unused,
        )

    return product


def machete(q: QuantizedTensor) -> Product:
    """vLLM's Machete, for Hopper alone."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind, scales, group_size = scalar_types.uint4b8, q.scales.t().contiguous(), q.scheme.group_size
    packed = ops.machete_prepack_B(q.codes.t(), torch.bfloat16, kind, torch.bfloat16)
    return lambda x: ops.machete_mm(x, packed, kind, b_group_scales=scales, b_group_size=group_size)


def cutlass(q: QuantizedTensor) -> Product:
    """vLLM's CUTLASS product of 8-bit operands, with its rounding of x to one scale a row."""
    from vllm import _custom_ops as ops

    codes = q.codes.t()

    def product(x: Tensor) -> Tensor:
        if q.scheme.activation == "int8":
            rounded, x_scales, _ = ops.scaled_int8_quant(x)
        else:
            rounded, x_scales = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
        return ops.cutlass_scaled_mm(rounded, codes, x_scales, q.scales, torch.bfloat16)

    return product


def scaled_mm(q: QuantizedTensor, fast: bool) -> Product:
    """torch._scaled_mm, cuBLAS or CUTLASS: sums promoted to float32 as they grow, or, fast, left in the tensor cores."""
    codes, scales = q.codes.t(), q.scales.t().contiguous()
    return lambda x, x_scales: torch._scaled_mm(
        x, codes, scale_a=x_scales, scale_b=scales, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def int_mm(q: QuantizedTensor) -> Product:
    """torch._int_mm, which knows no scales: its int32 sums are read again and scaled in PyTorch, as its users have to."""
    codes, scales = q.codes.t(), q.scales.t()
    return lambda x, x_scales: (torch._int_mm(x, codes) * x_scales * scales).bfloat16()


VLLM = "vllm._custom_ops"
PEERS = (
    Peer("tinygemm", "torch", W4A16, tinygemm, max_M=256),
    Peer("gemlite", "gemlite.helper", W4A16, gemlite, x_dtype=torch.float16),
    Peer("marlin", VLLM, W4A16, marlin),
    Peer("machete", VLLM, W4A16, machete),
    Peer("marlin", VLLM, W8A16, marlin),
    Peer("cutlass", VLLM, W8A8, cutlass),
    Peer("cutlass", VLLM, FP8, cutlass),
    Peer("_int_mm", "torch", W8A8, int_mm, rounded=True),
    Peer("_scaled_mm", "torch", FP8, partial(scaled_mm, fast=False), rounded=True),
    Peer("_scaled_mm fast", "torch", FP8, partial(scaled_mm, fast=True), rounded=True),
)
