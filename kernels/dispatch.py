"""Which kernel runs a product: an ordered list per op, the first that supports the problem wins.

A target is 'cpu', 'sm_90' (NVIDIA, compute capability 9.0) or 'gfx942' (AMD). Nothing here imports Triton:
a kernel's file is imported when it is first run, so a CPU needs neither Triton nor a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch

from quantkit.kernels import tuned

OLDEST_NVIDIA = 80  # the first with bfloat16 tensor cores
AMD = ("gfx942", "gfx950")  # the matrix cores that the tests compile for
# Rows of x up to which PyTorch's packed CPU kernels beat dequantizing; README.md has the times.
INT8PACK_MAX_M = 16
INT4PACK_MAX_M = 128
SCALED_MM_NVIDIA = 90  # the first whose torch._scaled_mm takes one scale a row
# Rows of x from which on, for a weight [28672, 4096] on an H200, the vendor's GEMM is the faster one.
VENDOR_MIN_M = {torch.int8: 256, torch.float8_e4m3fn: 128}  # by the dtype of the codes
SCALED_MM_MIN_M = 32  # rows of x from which on torch._scaled_mm is faster than w8a8_triton
# columns of 16 bits that a program can keep in registers; the norm, of two inputs, half of it
MAX_ROW = 32768
MULTIPROCESSORS = 132  # of an H200, for which launches are chosen where there is no GPU
ALL_REGISTERS = 65536  # of a multiprocessor
DECODE_MAX_M = 16  # of w4a16_decode: two tiles of eight rows
ATTENTION_MAX_GROUP = 32  # query heads a kv head: more need more registers than there are
ATTENTION_MAX_COLUMNS_AMD = 128  # of a head
WIDE_MAX_M = 256  # past it dequantizing once is the faster way
DECODE_LAUNCH = ("rows", "warps_n", "warps_k", "depth", "stages", "programs", "max_registers")
WIDE_LAUNCH = ("block_m", "rows", "warps", "tiles", "stages")
TILES_LAUNCH = ("block_m", "block_n", "stages", "programs")  # of the Gluon kernels


@dataclass(frozen=True)
class Problem:
    """What the choice of a kernel may depend on: y [M, N] = x [M, K] times codes [N, K].

    Of the ops that make rounded activations, K are the columns of the result, N those that must be seen at once, to norm
    them or to find their scale, and codes_dtype is the type of the result. Of attention, M are tokens or sequences, N
    columns of a head, K tokens that a sequence may have, and group_size query heads a kv head.
    """

    target: str
    M: int
    N: int
    K: int
    x_dtype: torch.dtype
    codes_dtype: torch.dtype  # int32 (2 to 4 bits, packed), int8 or float8_e4m3fn (interleaved too)
    group_size: int = 0


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op: the function `name` of the file `module` in kernels/."""

    name: str
    module: str
    unsupported: Callable[[Problem], str | None]  # why this kernel cannot run the problem, None when it can
    # why the next kernel is taken for a problem that this one can run, unless a table says otherwise
    slower: Callable[[Problem], str | None] | None = None
    parameters: tuple[str, ...] = ()  # of its launch, all of which a table must give

    @property
    def run(self) -> Callable[..., torch.Tensor]:
        return _load(self.module, self.name)


@cache
def _load(module: str, name: str) -> Any:
    return getattr(import_module(f"quantkit.kernels.{module}"), name)


def native_fp8(target: str) -> bool:
    """Whether the tensor cores of a target multiply float8_e4m3fn (gfx942 has only the fnuz variant)."""
    return target.startswith("sm_") and int(target[3:]) >= 89


def _cpu(problem: Problem) -> str | None:
    return None if problem.target == "cpu" else f"runs on a CPU, not on {problem.target}"


def _int8pack(problem: Problem) -> str | None:
    if problem.codes_dtype != torch.int8 or problem.x_dtype != torch.bfloat16:
        return f"takes bfloat16 x and int8 codes, not {problem.x_dtype} and {problem.codes_dtype}"
    if problem.K % 16 or problem.N % 4:
        return f"needs K in multiples of 16 and N in multiples of 4, not {problem.K} and {problem.N}"
    return _cpu(problem)


def _int4pack(problem: Problem) -> str | None:
    if problem.x_dtype != torch.bfloat16:
        return f"takes bfloat16 x, not {problem.x_dtype}"
    return _cpu(problem)


def _triton(problem: Problem) -> str | None:
    target = problem.target
    if target.startswith("sm_") and int(target[3:]) < OLDEST_NVIDIA:
        return f"needs compute capability 8.0 (sm_{OLDEST_NVIDIA}) or newer, not {target}"
    if not target.startswith("sm_") and target not in AMD:
        return f"runs on NVIDIA sm_{OLDEST_NVIDIA} and newer and on AMD {' and '.join(AMD)}, not on {target}"
    return None


def _floats(problem: Problem) -> str | None:
    if problem.x_dtype == torch.float32:
        return "takes float16 or bfloat16 x, not torch.float32"
    return _triton(problem)


def _hopper(problem: Problem) -> str | None:
    if problem.target != "sm_90":
        return f"is written for sm_90, not for {problem.target}"
    return _floats(problem)


def _hopper_by_tma(least: int, least_N: int = 8) -> Callable[[Problem], str | None]:
    """On sm_90, where TMA can move rows of K and of N numbers, in multiples of `least` and `least_N`."""

    def unsupported(problem: Problem) -> str | None:
        K, N = problem.K, problem.N
        if K % least or N % least_N:
            return f"needs K in multiples of {least} and N in multiples of {least_N}, not {K} and {N}"
        return _hopper(problem)

    return unsupported


def _w4a8_hopper(problem: Problem) -> str | None:
    if problem.group_size % 128:
        return f"needs a group_size that is a multiple of 128, or 0, not {problem.group_size}"
    return _hopper_by_tma(16, 16)(problem)


def _wide(problem: Problem) -> str | None:
    if problem.target == "sm_90":
        return "is the slower one on sm_90, where w4a16_hopper calls it for what it cannot take"
    return _floats(problem)


def _decode(problem: Problem) -> str | None:
    if problem.M > DECODE_MAX_M:
        return f"takes {DECODE_MAX_M} rows of x, not {problem.M}"
    return _floats(problem)


def _vendor_w4a16(problem: Problem) -> str | None:
    if problem.group_size % 8:  # it reads one scale a word of eight codes
        return f"needs a group_size that is a multiple of 8, or 0, not {problem.group_size}"
    return _triton(problem)


def _one_scale_a_block(problem: Problem) -> str | None:
    if problem.group_size % 32:  # columns of the smallest block
        return f"needs a group_size that is a multiple of 32, or 0, not {problem.group_size}"
    return _triton(problem)


def _in_registers(columns: int) -> Callable[[Problem], str | None]:
    """For kernels that keep so many columns of 16 bits in registers, a quarter as many of float32."""

    def unsupported(problem: Problem) -> str | None:
        most = columns // 4 if problem.x_dtype == torch.float32 else columns
        if problem.N > most:
            return f"keeps {most} columns in registers, not {problem.N}"
        return _triton(problem)

    return unsupported


def _attention(problem: Problem) -> str | None:
    if problem.group_size > ATTENTION_MAX_GROUP:
        return f"takes {ATTENTION_MAX_GROUP} query heads a kv head, not {problem.group_size}"
    if problem.target in AMD and problem.N > ATTENTION_MAX_COLUMNS_AMD:
        return f"spills registers for heads of {problem.N} columns on {problem.target}"
    return _floats(problem)


def _anywhere(problem: Problem) -> str | None:
    return None


def _scaled_mm(problem: Problem) -> str | None:
    if problem.codes_dtype != torch.float8_e4m3fn or problem.x_dtype != torch.bfloat16:
        return f"takes bfloat16 x and e4m3 codes, not {problem.x_dtype} and {problem.codes_dtype}"
    if not problem.target.startswith("sm_") or int(problem.target[3:]) < SCALED_MM_NVIDIA:
        return f"scales rows on NVIDIA sm_{SCALED_MM_NVIDIA} and newer, not on {problem.target}"
    if problem.K % 16 or problem.N % 16:
        return f"needs N and K in multiples of 16, not {problem.N} and {problem.K}"
    return None


def _past(most: int) -> Callable[[Problem], str | None]:
    return lambda problem: f"is the slower one past M = {most}" if problem.M > most else None


def _below(least: int, problem: Problem) -> str | None:
    return f"is the slower one below M = {least}" if problem.M < least else None


def _vendor_loses(problem: Problem) -> str | None:
    return _below(VENDOR_MIN_M[problem.codes_dtype], problem)


def _scaled_mm_loses(problem: Problem) -> str | None:
    return _below(SCALED_MM_MIN_M, problem)


KERNELS: dict[str, tuple[Kernel, ...]] = {
    "w4a16": (
        Kernel("w4a16_vendor", "dequantize", _vendor_w4a16),
        Kernel("w4a16_dequantize", "cpu", _cpu),
    ),
    "w4a16_tiles": (
        Kernel("w4a16_decode", "w4a16_decode", _decode, parameters=DECODE_LAUNCH),
        Kernel("w4a16_hopper", "w4a16_hopper", _hopper, parameters=TILES_LAUNCH),
        Kernel("w4a16_wide", "w4a16_wide", _wide, _past(WIDE_MAX_M), WIDE_LAUNCH),
        Kernel("w4a16_tiles_vendor", "dequantize", _triton),
        Kernel("w4a16_tiles_dequantize", "cpu", _cpu),
    ),
    "w4a16_cpu": (
        Kernel("w4a16_int4pack", "int4pack", _int4pack, _past(INT4PACK_MAX_M)),
        Kernel("w4a16_int4pack_dequantize", "int4pack", _cpu),
    ),
    "wna16": (
        Kernel("wna16_triton", "wna16", _one_scale_a_block),
        Kernel("wna16_dequantize", "cpu", _cpu),
    ),
    "w4a8": (
        Kernel("w4a8_triton", "w4a8", _one_scale_a_block),
        Kernel("w4a8_cpu", "cpu", _cpu),
    ),
    "w4a8_interleaved": (
        Kernel("w4a8_hopper", "w4a8_hopper", _w4a8_hopper, parameters=TILES_LAUNCH),
        Kernel("w4a8_interleaved_cpu", "cpu", _cpu),
    ),
    "w8a16": (
        Kernel("w8a16_vendor", "dequantize", _triton, _vendor_loses),
        Kernel("w8a16_triton", "w8a16", _triton),
        Kernel("w8a16_int8pack", "cpu", _int8pack, _past(INT8PACK_MAX_M)),
        Kernel("w8a16_dequantize", "cpu", _cpu),
    ),
    "w8a16_interleaved": (
        Kernel("w8a16_hopper", "w8_hopper", _hopper_by_tma(8), parameters=TILES_LAUNCH),
        Kernel("w8a16_interleaved_dequantize", "cpu", _cpu),
    ),
    "w8a8": (
        Kernel("w8a8_hopper", "w8_hopper", _hopper_by_tma(16), parameters=TILES_LAUNCH),
        Kernel("w8a8_scaled_mm", "scaled_mm", _scaled_mm, _scaled_mm_loses),
        Kernel("w8a8_triton", "w8a8", _triton),
        Kernel("w8a8_cpu", "cpu", _cpu),
    ),
    "fp8_block": (
        Kernel("fp8_block_hopper", "w8_hopper", _hopper_by_tma(16), parameters=TILES_LAUNCH),
        Kernel("fp8_block_triton", "fp8_block", _triton),
        Kernel("fp8_block_cpu", "cpu", _cpu),
    ),
    "quantize_activations": (
        Kernel("quantize_activations", "quantize_activations", _triton),
        Kernel("quantize_activations", "cpu", _cpu),
    ),
    "rms_norm_quantize": (
        Kernel("rms_norm_triton", "rms_norm", _in_registers(MAX_ROW // 2)),
        Kernel("rms_norm_torch", "cpu", _anywhere),
    ),
    "swiglu_quantize": (
        Kernel("swiglu_triton", "swiglu", _in_registers(MAX_ROW)),
        Kernel("swiglu_torch", "cpu", _anywhere),
    ),
    "rope_write": (
        Kernel("rope_write_triton", "rope_write", _floats),
        Kernel("rope_write_torch", "attention_cpu", _anywhere),
    ),
    "decode_plan": (
        Kernel("decode_plan_triton", "decode_attention", _attention),
        Kernel("decode_plan_torch", "attention_cpu", _anywhere),
    ),
    "decode_attention": (
        Kernel("decode_attention_triton", "decode_attention", _attention),
        Kernel("decode_attention_torch", "attention_cpu", _anywhere),
    ),
    "prefill_attention": (
        Kernel("prefill_attention_triton", "prefill_attention", _attention),
        Kernel("prefill_attention_torch", "attention_cpu", _anywhere),
    ),
}


@cache
def target_of(device: torch.device) -> str:
    """The target that a device is: 'cpu', 'sm_90', 'gfx942'."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors_of(device: torch.device) -> int:
    """Of a GPU; without one, an H200's."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=4096)
def choose(op: str, problem: Problem) -> tuple[Kernel, dict[str, int] | None]:
    """The kernel that runs this problem, and how it is launched if a table (`tuned.py`) says so.

    A table may be older or newer than the kernels: what it says of one that is gone, that cannot run the problem or that
    has other launch parameters does not count.

    Raises:
        ValueError: the op is unknown, or no kernel supports the problem; the message has every kernel's reason.
        TableError: a table of this target cannot be read.
    """
    codes = str(problem.codes_dtype).removeprefix("torch.")
    measured = tuned.lookup(op, codes, problem.target, problem.M, problem.N, problem.K, problem.group_size)
    if measured:
        name, launch = measured
        for kernel in KERNELS.get(op, ()):
            known = kernel.name == name and (not launch or set(launch) == set(kernel.parameters))
            if known and kernel.unsupported(problem) is None:
                return kernel, launch or None
    return default(op, problem), None


def default(op: str, problem: Problem) -> Kernel:
    """The kernel that runs this problem where no table has it; see `choose` for the errors."""
    if op not in KERNELS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(KERNELS)}")
    reasons = []
    for kernel in KERNELS[op]:
        reason = kernel.unsupported(problem)
        if reason is None and kernel.slower is not None:
            reason = kernel.slower(problem)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name} {reason}")
    raise ValueError(f"no kernel for {op} on {problem.target}: " + "; ".join(reasons))


def forget() -> None:
    """Reads the tables anew at the next choice: after `quantkit tune` has written one in this process."""
    choose.cache_clear()
    tuned.forget()


def select(op: str, problem: Problem) -> Kernel:
    """The kernel that runs this problem; see `choose` for the errors."""
    return choose(op, problem)[0]


def kernel_name(
    op: str,
    target: str,
    M: int,
    N: int,
    K: int,
    x_dtype: torch.dtype,
    codes_dtype: torch.dtype,
    group_size: int = 0,
) -> str:
    """The name of the kernel that would run, found without a GPU; see `select` for the errors."""
    return select(op, Problem(target, M, N, K, x_dtype, codes_dtype, group_size)).name
