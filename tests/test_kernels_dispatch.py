"""Which kernel runs where, and what the message says when none does."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from quantkit.kernels import tuned
from quantkit.kernels.dispatch import KERNELS, Problem, choose, kernel_name

BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
CODES = {
    "w4a16": torch.int32,
    "w4a16_tiles": torch.int32,
    "w4a16_cpu": torch.uint8,
    "wna16": torch.int32,
    "w4a8": torch.int32,
    "w4a8_interleaved": torch.int32,
    "w8a16": INT8,
    "w8a16_interleaved": INT8,
    "w8a8": INT8,
    "fp8_block": FP8,
    "quantize_activations": INT8,
    "rms_norm_quantize": INT8,
    "swiglu_quantize": INT8,
    "rope_write": INT8,
    "decode_plan": INT8,
    "decode_attention": INT8,
    "prefill_attention": INT8,
}
DECODES = {"w4a16": "w4a16_vendor", "w4a16_tiles": "w4a16_decode"}  # the others have one Triton kernel
HOPPERS = {"w8a8": "w8a8_hopper", "fp8_block": "fp8_block_hopper"}


@pytest.fixture(autouse=True)
def _only_the_kernels_own_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuned, "lookup", lambda *problem: None)
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.mark.parametrize("op", ["w4a16", "wna16", "w4a8", "w8a16", "w8a8", "fp8_block"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_every_gpu_has_a_kernel_for_every_op(op, target, dtype):
    for M in (1, 16):
        expected = DECODES.get(op, f"{op}_triton")
        if target == "sm_90" and dtype != torch.float32:
            expected = HOPPERS.get(op, expected)
        assert kernel_name(op, target, M, 4096, 4096, dtype, CODES[op]) == expected
    for M in (33, 256, 4096):
        name = kernel_name(op, target, M, 4100, 4100, dtype, CODES[op])
        assert name not in {kernel.name for kernel in KERNELS[op] if kernel.module == "cpu"}


@pytest.mark.parametrize(
    ("op", "columns"),
    [("rms_norm", {BF16: 16384, torch.float32: 4096}), ("swiglu", {BF16: 32768, torch.float32: 8192})],
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_rows_that_do_not_fit_in_registers_are_rounded_by_torch(target, op, columns):
    for dtype, most in columns.items():
        for together, name in ((1, "triton"), (most, "triton"), (most + 1, "torch")):
            found = kernel_name(f"{op}_quantize", target, 64, together, 53248, dtype, INT8)
            assert found == f"{op}_{name}"


OTHERS = ["sm_80", "sm_100", "sm_120", "gfx942"]


@pytest.mark.parametrize(
    ("targets", "M", "name"),
    [
        (["sm_90", *OTHERS], 1, "w4a16_decode"),
        (["sm_90", *OTHERS], 16, "w4a16_decode"),
        (["sm_90"], 17, "w4a16_hopper"),
        (["sm_90"], 4096, "w4a16_hopper"),
        (OTHERS, 17, "w4a16_wide"),
        (OTHERS, 256, "w4a16_wide"),
        (OTHERS, 257, "w4a16_tiles_vendor"),
    ],
)
def test_the_rows_of_x_decide_how_tiles_are_multiplied(targets, M, name):
    for target in targets:
        check_rows(target, M, name)


def check_rows(target, M, name):
    for dtype in (torch.float16, BF16):
        assert kernel_name("w4a16_tiles", target, M, 4096, 4096, dtype, torch.int32, 128) == name
    by_float32 = kernel_name("w4a16_tiles", target, M, 4096, 4096, torch.float32, torch.int32, 128)
    assert by_float32 == "w4a16_tiles_vendor"


@pytest.mark.parametrize(
    ("op", "M", "N", "K", "codes", "name"),
    [
        ("w8a8", 1024, 4096, 4096, FP8, "w8a8_hopper"),
        ("w8a8", 4096, 4096, 4096, FP8, "w8a8_hopper"),
        ("w8a8", 4096, 4096, 4096, INT8, "w8a8_hopper"),
        ("w8a8", 64, 4096, 4104, INT8, "w8a8_triton"),  # TMA moves rows of multiples of 16 bytes
        ("w8a8", 64, 4100, 4096, INT8, "w8a8_triton"),
        ("fp8_block", 64, 4096, 4104, FP8, "fp8_block_triton"),
        ("w8a16_interleaved", 4096, 4096, 4096, INT8, "w8a16_hopper"),
        ("w8a16_interleaved", 1, 4096, 4096, FP8, "w8a16_hopper"),
        ("w4a8_interleaved", 4096, 4096, 4096, torch.int32, "w4a8_hopper"),
    ],
)
def test_hopper_multiplies_8_bits_by_its_own_kernel_where_tma_can(op, M, N, K, codes, name):
    assert kernel_name(op, "sm_90", M, N, K, BF16, codes) == name


@pytest.mark.parametrize(
    ("op", "target", "M", "codes", "slower", "taken"),
    [
        ("w8a8", "sm_100", 16, FP8, "w8a8_scaled_mm", "w8a8_triton"),
        ("w8a16", "sm_80", 64, FP8, "w8a16_vendor", "w8a16_triton"),
        ("w4a16_tiles", "sm_80", 512, torch.int32, "w4a16_wide", "w4a16_tiles_vendor"),
        ("w8a16", "cpu", 17, INT8, "w8a16_int8pack", "w8a16_dequantize"),
    ],
)
def test_the_slower_kernel_could_run_all_the_same(op, target, M, codes, slower, taken):
    problem = Problem(target, M, 4096, 4096, BF16, codes)
    (kernel,) = (kernel for kernel in KERNELS[op] if kernel.name == slower)
    assert kernel.unsupported(problem) is None
    assert kernel.slower(problem).startswith("is the slower one")
    assert choose(op, problem)[0].name == taken


def test_tables_are_asked_by_the_type_of_the_codes(monkeypatch):
    asked = []
    monkeypatch.setattr(tuned, "lookup", lambda *key: asked.append(key))
    for codes in (INT8, FP8):
        choose("w8a8", Problem("sm_90", 64, 512, 256, BF16, codes))
    assert asked == [("w8a8", name, "sm_90", 64, 512, 256, 0) for name in ("int8", "float8_e4m3fn")]


@pytest.mark.parametrize(("group_size", "taken"), [(0, True), (64, False), (128, True), (256, True)])
def test_w4a8_on_hopper_takes_groups_of_its_steps(group_size, taken):
    (kernel,) = (kernel for kernel in KERNELS["w4a8_interleaved"] if kernel.name == "w4a8_hopper")
    problem = Problem("sm_90", 64, 4096, 4096, BF16, torch.int32, group_size)
    assert (kernel.unsupported(problem) is None) == taken


@pytest.mark.parametrize("op", KERNELS)
def test_a_cpu_has_a_kernel_for_every_op(op):
    assert kernel_name(op, "cpu", 1, 100, 100, torch.float32, CODES[op], 7 if op == "w4a16" else 0)


@pytest.mark.parametrize(
    ("op", "M", "N", "K", "codes", "name"),
    [
        ("w4a16_cpu", 1, 64, 64, torch.uint8, "w4a16_int4pack"),
        ("w4a16_cpu", 512, 64, 64, torch.uint8, "w4a16_int4pack_dequantize"),
        ("w8a16", 1, 64, 64, INT8, "w8a16_int8pack"),
        ("w8a16", 512, 64, 64, INT8, "w8a16_dequantize"),
        ("w8a16", 1, 64, 72, INT8, "w8a16_dequantize"),
        ("w8a16", 1, 66, 64, INT8, "w8a16_dequantize"),
        ("w8a16", 1, 64, 64, FP8, "w8a16_dequantize"),
    ],
)
def test_a_cpu_uses_the_packed_kernels_where_they_run_and_win(op, M, N, K, codes, name):
    assert kernel_name(op, "cpu", M, N, K, BF16, codes, 32 if op == "w4a16_cpu" else 0) == name


@pytest.mark.parametrize(
    ("target", "M", "group_size", "reason"),
    [
        ("sm_75", 1, 128, "needs compute capability 8.0 (sm_80) or newer, not sm_75"),
        ("gfx1100", 1, 128, "runs on NVIDIA sm_80 and newer and on AMD gfx942 and gfx950, not on gfx1100"),
        ("sm_90", 1, 12, "needs a group_size that is a multiple of 8, or 0, not 12"),
        ("sm_90", 64, 12, "needs a group_size that is a multiple of 8, or 0, not 12"),
    ],
)
def test_no_kernel_lists_every_reason(target, M, group_size, reason):
    with pytest.raises(ValueError, match=f"no kernel for w4a16 on {target}: ") as error:
        kernel_name("w4a16", target, M, 64, 96, BF16, torch.int32, group_size)
    assert reason in str(error.value)
    assert f"w4a16_dequantize runs on a CPU, not on {target}" in str(error.value)


@pytest.mark.parametrize("op", ["wna16", "w4a8"])
def test_a_block_of_columns_has_one_scale_on_a_gpu(op):
    with pytest.raises(
        ValueError, match=f"{op}_triton needs a group_size that is a multiple of 32, or 0, not 48"
    ):
        kernel_name(op, "sm_90", 1, 64, 96, BF16, torch.int32, 48)
    assert kernel_name(op, "cpu", 1, 64, 96, BF16, torch.int32, 48) == KERNELS[op][-1].name


def test_an_unknown_op_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match="unknown op 'w5a16'; known: w4a16, w4a16_tiles, w4a16_cpu, wna16, w4a8, "
        "w4a8_interleaved, w8a16, w8a16_interleaved, w8a8, fp8_block",
    ):
        kernel_name("w5a16", "cpu", 1, 1, 1, BF16, torch.int32)


def test_the_cpu_path_never_imports_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, quantkit.kernels.ops\n"
        "x, codes = torch.ones(2, 32), torch.ones(8, 32, dtype=torch.int8)\n"
        "print(torch.ops.quantkit.w8a8(x, codes, torch.ones(8, 1), None, None).sum().item())\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(2 * 8 * 32, rel=1e-6)
