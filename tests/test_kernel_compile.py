"""Every Triton product, as launched for real layers, compiles for every GPU family, with none of those GPUs here.

`triton.compile` with a GPUTarget needs no device, but a kernel defined under TRITON_INTERPRET=1 cannot be compiled:
the work is done by this file run as a script, in one process a target, which prints a JSON line a kernel.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950")
ROWS = (1, 33, 512)  # one in each launch configuration


def jobs(target: str):
    """(name, kernel, run-time argument types, constexprs, launch options) of everything the wrappers launch."""
    import torch

    from quantkit.kernels import fp8_block, quantize_activations, w4a16, w8a8, w8a16
    from quantkit.kernels.dispatch import native_fp8

    N, K, full = 4096, 4096, target in ("sm_80", "sm_90", "gfx942")
    native = native_fp8(target)
    sizes = {"M": "i32", "N": "i32", "K": "i32"}
    for M in ROWS:
        if not full and M != 512:
            continue
        for group_size in (0, 32, 128) if M == 1 else (128,):
            types = {
                "x_ptr": "*bf16",
                "codes_ptr": "*i32",
                "scales_ptr": "*bf16",
                "zeros_ptr": "*u8",
                "bias_ptr": "*bf16",
            }
            if group_size != 128:
                types |= {"zeros_ptr": None, "bias_ptr": None}
            types |= {"y_ptr": "*bf16", **sizes, "stride_xm": "i32", "G": group_size}
            yield (
                f"w4a16 g{group_size} M={M}",
                w4a16.w4a16_kernel,
                types,
                w4a16.config(M, N, K, group_size, torch.bfloat16),
            )
        for codes in ("*i8", "*u8"):
            types = {
                "x_ptr": "*fp16",
                "codes_ptr": codes,
                "scales_ptr": "*fp32",
                "bias_ptr": None,
                "y_ptr": "*fp16",
            }
            types |= {**sizes, "stride_xm": "i32"}
            yield f"w8a16 {codes[1:]} M={M}", w8a16.w8a16_kernel, types, w8a16.config(M, N, K, torch.float16)
            types = {
                "x_ptr": codes,
                "codes_ptr": codes,
                "x_scales_ptr": "*fp32",
                "scales_ptr": "*fp32",
                "bias_ptr": None,
            }
            types |= {"y_ptr": "*bf16", **sizes, "stride_sm": "i32", "NATIVE_FP8": native}
            yield f"w8a8 {codes[1:]} M={M}", w8a8.w8a8_kernel, types, w8a8.config(M, N, K)
        types = {
            "x_ptr": "*u8",
            "codes_ptr": "*u8",
            "x_scales_ptr": "*fp32",
            "scales_ptr": "*fp32",
            "bias_ptr": None,
        }
        types |= {"y_ptr": "*bf16", **sizes, "NATIVE_FP8": native}
        yield f"fp8_block M={M}", fp8_block.fp8_block_kernel, types, fp8_block.config(M, N, K)
    if full:
        single = torch.float32
        types = {
            "x_ptr": "*fp32",
            "codes_ptr": "*i32",
            "scales_ptr": "*bf16",
            "zeros_ptr": "*u8",
            "bias_ptr": None,
        }
        types |= {"y_ptr": "*fp32", **sizes, "stride_xm": "i32", "G": 128}
        yield "w4a16 float32", w4a16.w4a16_kernel, types, w4a16.config(512, N, K, 128, single)
        types = {
            "x_ptr": "*fp32",
            "codes_ptr": "*u8",
            "scales_ptr": "*fp32",
            "bias_ptr": None,
            "y_ptr": "*fp32",
        }
        yield (
            "w8a16 float32",
            w8a16.w8a16_kernel,
            types | sizes | {"stride_xm": "i32"},
            w8a16.config(512, N, K, single),
        )
        for codes, static in (("*i8", None), ("*u8", None), ("*u8", "*fp32")):
            types = {"x_ptr": "*bf16", "codes_ptr": codes, "scales_ptr": "*fp32", "input_scale_ptr": static}
            types |= {"K": "i32", "stride_xm": "i32", "TO_INT8": codes == "*i8"}
            name = f"quantize rows {codes[1:]} {'static' if static else 'token'}"
            yield name, quantize_activations.quantize_rows_kernel, types, quantize_activations.config(K, 0)
        types = {
            "x_ptr": "*bf16",
            "codes_ptr": "*u8",
            "scales_ptr": "*fp32",
            "K": "i32",
            "stride_xm": "i32",
            "G": 128,
        }
        yield (
            "quantize groups",
            quantize_activations.quantize_groups_kernel,
            types,
            quantize_activations.config(K, 128),
        )


def gpu_target(target: str):
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64)


def spills(kernel) -> int | None:
    """Bytes of registers that the compiled kernel keeps in memory; None where the assembler cannot be asked."""
    import tempfile

    import triton

    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])[1])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def is_chosen(target: str, name: str, arguments: dict) -> bool:
    """Whether dispatch sends a product of this size to this Triton kernel; all of the others are."""
    import torch

    from quantkit.kernels.dispatch import kernel_name

    size = re.search(r"M=(\d+)", name)
    if not size:
        return True
    codes = {"*i32": torch.int32, "*i8": torch.int8, "*u8": torch.float8_e4m3fn}[arguments["codes_ptr"]]
    x_dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16}[arguments["y_ptr"]]
    op = name.split()[0]
    return kernel_name(op, target, int(size[1]), 4096, 4096, x_dtype, codes) == f"{op}_triton"


def compile_all(target: str) -> None:
    import triton
    from triton.compiler import ASTSource

    for name, fn, arguments, launch in jobs(target):
        options = {key: launch[key] for key in ("num_warps", "num_stages") if key in launch}
        arguments = arguments | {key: launch[key] for key in launch if key not in options}
        constants = {key: value for key, value in arguments.items() if not isinstance(value, str)}
        types = {key: "constexpr" if key in constants else arguments[key] for key in fn.arg_names}
        # what the launcher finds out about real tensors: addresses and sizes divisible by 16
        aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(types) if types[key][0] in "*i"}
        source = ASTSource(fn, types, constexprs=constants, attrs=aligned)
        kernel = triton.compile(source, target=gpu_target(target), options=options)
        record = {"name": name, "spills": spills(kernel), "shared": kernel.metadata.shared}
        print(json.dumps(record | {"chosen": is_chosen(target, name, arguments)}), flush=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[dict], str]]:
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    root = Path(__file__).resolve().parents[1]
    cache = tmp_path_factory.mktemp("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}

    def run(target: str) -> tuple[list[dict], str]:
        command = [sys.executable, __file__, target]
        result = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
        return [
            json.loads(line) for line in result.stdout.splitlines() if line[:1] == "{"
        ], result.stderr * bool(result.returncode)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TARGETS, pool.map(run, TARGETS), strict=True))


SHARED_MEMORY = {  # KiB a program may have
    "sm_80": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "gfx942": 64,
    "gfx950": 160,
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits(compiled, target):
    kernels, error = compiled[target]
    assert not error, error[-2000:]
    assert len(kernels) == (26 if target in ("sm_80", "sm_90", "gfx942") else 6)
    too_large = {k["name"]: k["shared"] for k in kernels if k["shared"] > SHARED_MEMORY[target] * 1024}
    assert not too_large, f"shared memory past {SHARED_MEMORY[target]} KiB: {too_large}"


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_that_dispatch_chooses_spills_registers(compiled, target):
    spilled = {k["name"]: k["spills"] for k in compiled[target][0] if k["spills"] and k["chosen"]}
    assert not spilled


if __name__ == "__main__":
    compile_all(sys.argv[1])
