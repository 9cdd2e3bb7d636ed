"""Every Triton product, as launched for real layers, compiles for every GPU family, with none of those GPUs here.

`triton.compile` with a GPUTarget needs no device, but a kernel defined under TRITON_INTERPRET=1 cannot be compiled:
the work is done by this file run as a script, in one process a target, which prints a JSON line a kernel.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")  # of the compiler, not arguments
# The first of a family: NVIDIA without and with dependent launches, and AMD. For these every branch of every kernel is
# compiled, on Hopper in every launch; for the others, which take the same branches, every kernel.
FIRST = ("sm_80", "sm_90", "gfx942")
ROWS = (1, 33, 512)  # one in each launch configuration


W4A16_ROWS = (1, 16, 32, 64)  # two launch configurations of the decode kernel, two of the wide one
FEW, MANY = (4096, 4096), (28672, 4096)  # N, K: few strips, shared among programs, and many
GIVEN = (8192, 14336)  # of which a row is given to other ranks by the product
OF_A_ROW = (GIVEN, (4096, 14336), (5120, 8192), (9216, 9216))  # few strips, in the other launches for one row
# x, group size, zeros or not
PLAIN, ZEROS, HALF = ("bf16", 128, False), ("bf16", 32, True), ("fp16", 128, False)


def w4a16_products(target: str) -> list[tuple[tuple[str, int, bool], int, tuple[int, int]]]:
    """What is multiplied by W4A16 kernels: scheme, M, and N and K."""
    if target == "sm_90":
        products = list(itertools.product((PLAIN, ZEROS), W4A16_ROWS, (FEW, MANY)))
        products += [(PLAIN, 1, of_row) for of_row in OF_A_ROW]
    elif target in FIRST:
        products = [(PLAIN, 1, MANY), (PLAIN, 16, FEW), (PLAIN, 32, FEW)]
        products += [(ZEROS, 1, MANY), (ZEROS, 16, FEW), (ZEROS, 64, FEW)]
    else:
        return [(PLAIN, 1, MANY), (ZEROS, 16, FEW), (ZEROS, 64, FEW)]
    return [*products, (HALF, 1, FEW)]


def w4a16_types(x: str, group_size: int, zeros: bool) -> dict:
    """Arguments that are a scheme's."""
    import triton.language as tl

    types = {"tiles_ptr": "*i32", "scales_ptr": "*i32", "zeros_ptr": "*i16" if zeros else None}
    return types | {"G": group_size, "SCALE_DTYPE": tl.bfloat16 if x == "bf16" else tl.float16}


def w4a16_jobs(target: str):
    """What the wrappers of the two W4A16 kernels, and of the pass before the vendor's GEMM, launch: as `jobs`."""
    from quantkit.kernels import dequantize, w4a16_decode, w4a16_wide

    nvidia = target.startswith("sm_")
    ptx = {"ASM": int(target[3:]) if nvidia else 0, "PDL": nvidia and int(target[3:]) >= 90}
    seen = []
    for (scheme, M, (N, K)), swiglu in itertools.product(w4a16_products(target), (False, True)):
        if swiglu and (target != "sm_90" or (N, K) != MANY):  # gate and up of a fused block
            continue
        x, group_size, _ = scheme
        # a 1 is compiled in by the launcher
        sizes = {"M": 1 if M == 1 else "i32", "N": "i32", "K": "i32", "stride_xm": "i32"}
        tensors = {"x_ptr": f"*{x}", "y_ptr": f"*{x}", "bias_ptr": None, "residual_ptr": None}
        common = w4a16_types(*scheme) | tensors | sizes | ptx | {"SWIGLU": swiglu, "EVEN_K": True}
        if M <= w4a16_decode.MAX_M:
            name, fn = "w4a16_decode", w4a16_decode.w4a16_decode_kernel
            chosen = w4a16_decode.config(M, N, K, group_size, target)
            chosen = chosen | {
                "max_registers": w4a16_decode.register_cap(chosen, group_size, scheme[2], swiglu)
            }
            specific, options = decode_launch(chosen, M, group_size, nvidia)
            alone = {"peers_ptr": None, "calls_ptr": None, "RANKS": 0}
            specific |= alone | dict.fromkeys(("rank", "rows"), "i32")
            one_step = w4a16_decode.steps(chosen, K, group_size) == 1
            specific |= {"WHOLE": one_step and chosen["stages"] == 1 and not chosen["programs"]}
        else:
            name, fn = "w4a16_wide", w4a16_wide.w4a16_wide_kernel
            chosen = w4a16_wide.config(M, N, K, group_size, target)
            specific = {"BLOCK_M": chosen["block_m"], "C": chosen["tiles"], "R": chosen["rows"]}
            specific |= {"W": chosen["warps"], "STAGES": chosen["stages"], "EVEN_N": True}
            options = {"num_warps": chosen["warps"], "num_stages": 1}
        if ptx["PDL"]:
            options["launch_pdl"] = True
        if (fn, common | specific, options) not in seen:
            seen.append((fn, common | specific, options))
            job = f"{name} {x} g{group_size} M={M} N={N}" + f" K={K}" * (K != 4096) + " swiglu" * swiglu
            yield job, fn, common | specific, options
            if (N, K) == GIVEN or (target, M, x, N) == ("sm_80", 1, "bf16", MANY[0]):
                specific = specific | {"peers_ptr": "*i64", "calls_ptr": "*i32", "RANKS": 2}
                yield f"{job} gives", fn, common | specific, options
    for scheme in (PLAIN, ZEROS) if target in FIRST else (ZEROS,):
        x, group_size, _ = scheme
        types = {"w_ptr": f"*{x}", "N": "i32", "K": "i32", "ASM": ptx["ASM"]}
        types |= w4a16_types(*scheme) | {"W": dequantize.TILE_WARPS, "C": dequantize.TILES}
        options = {"num_warps": dequantize.TILE_WARPS, "num_stages": 1}
        yield f"dequantize_tiles {x} g{group_size}", dequantize.dequantize_tiles_kernel, types, options


# x, group size, what is there beside (zeros, bias and residual: all), and M, N and K: the whole of what `config` launches
# for the first
HOPPER_ROWS = (17, 64, 128, 2048)
HOPPER = (
    ("bf16", 128, "", tuple(itertools.product(HOPPER_ROWS, (FEW, MANY)))),
    ("bf16", 128, "swiglu", tuple((M, MANY) for M in HOPPER_ROWS)),
    ("bf16", 32, "all swiglu", ((17, FEW), (64, MANY), (128, FEW), (2048, FEW))),
    ("fp16", 0, "", ((17, MANY), (128, FEW))),
    ("bf16", 256, "all swiglu", ((17, FEW),)),
)


def hopper_jobs():
    """What the wrapper of the Gluon kernel launches, by `config` and by the shipped table: of that, tiles of each size, cut and whole."""
    from triton.experimental.gluon import language as gl

    from quantkit.kernels import w4a16_hopper
    from quantkit.kernels.hopper import STAGED_ROWS, tiles_of
    from quantkit.kernels.int4tiles import STRIP
    from quantkit.kernels.tuned import SHIPPED
    from quantkit.kernels.w4a16_hopper import GROUP_ROWS

    launches = [
        (x, group_size, beside, M, N, w4a16_hopper.config(M, N, K, group_size))
        for x, group_size, beside, products in HOPPER
        for M, (N, K) in products
    ]
    tuned = {}
    for entry in json.loads((SHIPPED / "sm_90.json").read_text())["entries"]:
        if entry["kernel"] == "w4a16_hopper":
            M, N, launch = entry["M"], entry["N"], entry["launch"]
            tiles = tiles_of(launch, M, N)
            cut = tiles % (launch["programs"] or tiles) != 0
            of_size = launch["block_m"], launch["block_n"], cut
            tuned[of_size] = ("bf16", entry["group_size"], "tuned", M, N, launch)
    seen = []
    for x, group_size, beside, M, N, chosen in [*launches, *tuned.values()]:
        following, swiglu = "all" in beside, "swiglu" in beside
        block_m, block_n = chosen["block_m"], chosen["block_n"]
        strips = block_n // STRIP
        of_group = [strips, 8 * w4a16_hopper.groups_of_step(group_size)]
        y_block = [min(block_m, STAGED_ROWS), GROUP_ROWS // (2 if swiglu else 1)]
        y_layout = gl.NVMMASharedLayout(2 * y_block[1], element_bitwidth=16, rank=2)
        tiles = tiles_of(chosen, M, N)
        programs = chosen["programs"] or tiles
        stream = tiles % programs != 0
        types = {
            "x_desc": f"tensordesc<{x}[{block_m}, {w4a16_hopper.STEP}],{w4a16_hopper.X_LAYOUT!r}>",
            "tiles_desc": f"tensordesc<i32[{strips}, 8, 32],{w4a16_hopper.TILES_LAYOUT!r}>",
            "scales_desc": f"tensordesc<i32{of_group},{w4a16_hopper.SCALES_LAYOUT!r}>"
            if group_size
            else None,
            "zeros_desc": f"tensordesc<i16{of_group},{w4a16_hopper.ZEROS_LAYOUT!r}>" if following else None,
            "y_desc": f"tensordesc<{x}{y_block},{y_layout!r}>",
            "scales_ptr": None if group_size else f"*{x}",
            "bias_ptr": f"*{x}" if following else None,
            "residual_ptr": f"*{x}" if following else None,
            "partial_ptr": "*fp32" if stream else None,
            "counter_ptr": "*i32" if stream else None,
            **{"M": 1 if M == 1 else "i32", "N": "i32", "K": "i32"},
            **{"G": group_size, "SWIGLU": swiglu, "STREAM": stream},
            "AFTER": w4a16_hopper.after(block_m, group_size),
            "STAGES": chosen["stages"],
        }
        at_launch, types["REGISTERS"] = w4a16_hopper.registers_of(chosen, programs, group_size)
        options = {"num_warps": 4, "maxnreg": at_launch}
        if (types, options) not in seen:
            seen.append((types, options))
            name = f"w4a16_hopper {x} g{group_size} M={M} N={N} {beside}".rstrip()
            yield name, w4a16_hopper.w4a16_hopper_kernel, types, options


# what x and the weight are, and M, N and K
EIGHT_BIT = (
    ("i8", "i8", False, ((1, FEW), (64, MANY), (300, FEW), (2048, MANY))),
    ("fp8e4nv", "fp8e4nv", False, ((64, FEW), (2048, MANY))),
    ("fp8e4nv", "fp8e4nv", True, ((16, MANY), (300, MANY))),  # with scales of blocks
    ("bf16", "i8", False, ((1, FEW), (64, MANY), (300, MANY))),
    ("fp16", "fp8e4nv", False, ((64, MANY),)),
    ("bf16", "fp8e4nv", False, ((64, MANY),)),
)


def eight_bit_hopper_jobs():
    """What the wrapper of the Gluon kernel for 8-bit weights launches."""
    from triton.experimental.gluon import language as gl

    from quantkit.kernels import w8_hopper

    for x, w, blocks, products in EIGHT_BIT:
        floats = x != w
        for M, (N, K) in products:
            chosen = w8_hopper.config(M, N, K, 2 if floats else 1, blocks)
            block_m, block_n = chosen["block_m"], chosen["block_n"]
            x_bytes, x_left = 2 if floats else 1, w8_hopper.x_is_left(M, blocks)
            columns = w8_hopper.slot_columns(chosen, x_bytes)
            group = block_n if floats else w8_hopper.GROUP_ROWS
            staged_rows, staged_columns = w8_hopper.staged(chosen, x_left)
            y_block = [group, staged_columns] if x_left else [staged_rows, group]
            y_layout = gl.NVMMASharedLayout(128, element_bitwidth=16, rank=2)
            x_layout = w8_hopper.X_LAYOUT if floats else w8_hopper.CODES_LAYOUT
            tiles = w8_hopper.tiles_of(chosen, M, N)
            programs = chosen["programs"] or tiles
            stream = tiles % programs != 0
            at_launch, of_consumer = w8_hopper.registers_of(chosen, programs, x_bytes, x_left)
            y, sums = "fp16" if x == "fp16" else "bf16", "i32" if x == "i8" else "fp32"
            types = {
                "x_desc": f"tensordesc<{x}[{block_m}, {columns}],{x_layout!r}>",
                "w_desc": f"tensordesc<i32[{block_n}, {columns // 4}],{w8_hopper.WORDS_LAYOUT!r}>"
                if floats
                else f"tensordesc<{w}[{block_n}, {columns}],{w8_hopper.CODES_LAYOUT!r}>",
                "y_desc": f"tensordesc<{y}{y_block},{y_layout!r}>",
                "x_scales_ptr": None if floats else "*fp32",
                "scales_ptr": "*fp32",
                "bias_ptr": f"*{y}",
                "partial_ptr": f"*{sums}" if stream else None,
                "counter_ptr": "*i32" if stream else None,
                **{"M": 1 if M == 1 else "i32", "N": "i32", "K": "i32"},
                **{"stride_sm": 0 if floats else 1, "stride_sk": "i32" if blocks else 1 - floats},
                **{"X_LEFT": x_left, "INT8": w == "i8", "BLOCKS": blocks, "FAST": False, "STREAM": stream},
                **{"STAGES": chosen["stages"], "REGISTERS": of_consumer},
            }
            options = {"num_warps": group // 16, "maxnreg": at_launch}
            name = f"w8_hopper {x} {w}{' blocks' * blocks} M={M} N={N}"
            yield name, w8_hopper.w8_hopper_kernel, types, options


# group size, zeros or not, and M, N and K: every block of rows, both numbers of partitions, tiles whole and shared
W4A8 = (
    (128, False, ((1, FEW), (16, MANY), (64, FEW), (64, MANY), (128, MANY), (256, FEW), (256, MANY))),
    (128, True, ((64, MANY), (128, MANY), (256, MANY))),
    (0, False, ((64, FEW), (256, MANY))),
    (0, True, ((128, MANY),)),
)


def w4a8_hopper_jobs():
    """What the wrapper of the Gluon kernel for INT4 weights beside int8 x launches."""
    from torch import bfloat16, int8

    from quantkit.kernels import w4a8_hopper
    from quantkit.kernels.hopper import STAGED_ROWS

    for group_size, zeros, products in W4A8:
        for M, (N, K) in products:
            chosen = w4a8_hopper.config(M, N, K)
            block_m, rows = chosen["block_m"], chosen["block_n"]
            partitions = rows // w4a8_hopper.GROUP_ROWS
            tiles = w4a8_hopper.tiles_of(chosen, M, N)
            programs = chosen["programs"] or tiles
            stream = tiles % programs != 0
            at_launch, of_consumer = w4a8_hopper.registers_of(chosen, programs)
            of_scales, of_zeros = w4a8_hopper.rows_layout(bfloat16), w4a8_hopper.rows_layout(int8)
            y_block = [min(block_m, STAGED_ROWS), rows // partitions]
            types = {
                "x_desc": f"tensordesc<i8[{block_m}, 128],{w4a8_hopper.X_LAYOUT!r}>",
                "w_desc": f"tensordesc<i8[{rows}, 64],{w4a8_hopper.CODES_LAYOUT!r}>",
                "scales_desc": f"tensordesc<bf16[1, {rows}],{of_scales!r}>" if group_size else None,
                "zeros_desc": f"tensordesc<i8[1, {rows}],{of_zeros!r}>" if zeros else None,
                "y_desc": f"tensordesc<bf16{y_block},{w4a8_hopper.Y_LAYOUT!r}>",
                "x_scales_ptr": "*fp32",
                "scales_ptr": None if group_size else "*bf16",
                "bias_ptr": "*bf16",
                "partial_ptr": ("*fp32" if group_size else "*i32") if stream else None,
                "counter_ptr": "*i32" if stream else None,
                **{"M": 1 if M == 1 else "i32", "N": "i32", "K": "i32", "stride_sm": 1},
                **{"G": group_size, "STREAM": stream, "STAGES": chosen["stages"], "PARTS": partitions},
                "REGISTERS": of_consumer,
            }
            options = {"num_warps": 4, "maxnreg": at_launch}
            name = f"w4a8_hopper g{group_size}{' zeros' * zeros} M={M} N={N}"
            yield name, w4a8_hopper.w4a8_hopper_kernel, types, options


def decode_launch(chosen: dict, M: int, group_size: int, nvidia: bool) -> tuple[dict, dict]:
    """Launch parameters of the decode kernel -> its constexprs and its compile options."""
    stream = chosen["programs"] > 0
    specific = (
        {"partial_ptr": "*fp32", "counter_ptr": "*i32"}
        if stream
        else {"partial_ptr": None, "counter_ptr": None}
    )
    specific |= {
        "EVEN_N": True,
        "C": 1 if group_size % 128 else 2,
        "MH": 1 if M <= 8 else 2,
        "STREAM": stream,
    }
    specific |= {"R": chosen["rows"], "WN": chosen["warps_n"], "WK": chosen["warps_k"]}
    specific |= {"D": chosen["depth"], "STAGES": chosen["stages"]}
    options = {"num_warps": chosen["warps_n"] * chosen["warps_k"], "num_stages": 1}
    if nvidia and chosen["max_registers"]:
        options["maxnreg"] = chosen["max_registers"]
    return specific, options


def low_bits_jobs(target: str):
    """What the wrappers of the portable kernels for words of codes launch: as `jobs`."""
    import torch

    from quantkit.kernels import w4a8, wna16

    rows = ROWS if target in FIRST else ROWS[-1:]
    sizes = {"M": "i32", "N": "i32", "K": "i32"}
    for M in rows:
        for group_size, bits in ((128, 3), (32, 2)) if M == ROWS[-1] else ((128, 3),):
            zeros = "*u8" if group_size == 32 else None
            types = {"x_ptr": "*bf16", "codes_ptr": "*i32", "scales_ptr": "*bf16", "zeros_ptr": zeros}
            types |= {"bias_ptr": None, "y_ptr": "*bf16", **sizes, "G": group_size}
            launch = wna16.config(M, group_size, torch.bfloat16)
            more = {"stride_xm": "i32", "BITS": bits}
            yield f"wna16 {bits} bits g{group_size} M={M}", wna16.wna16_kernel, types | more, launch
            types |= {"x_ptr": "*i8", "x_scales_ptr": "*fp32"}
            yield f"w4a8 g{group_size} M={M}", w4a8.w4a8_kernel, types, w4a8.config(M, group_size)


def gptq_jobs():
    """What GPTQ's inner loop launches for a block of 128 columns: as `jobs`."""
    from quantkit.kernels import gptq_columns
    from quantkit.scheme import LARGEST_CODE

    for kind, has_zeros in (("int4", True), ("int8", False), ("fp8", False)):
        types = {name: "*fp32" for name in ("columns", "U", "scales", "zeros", "errors")}
        types |= {"groups": "*i64", "codes": "*u8", "N": "i32", "C": "i32", "stride": "i32", "zero": "fp32"}
        types |= {"HAS_ZEROS": has_zeros, "KIND": kind, "TOP": float(LARGEST_CODE[kind])}
        types |= {"BLOCK_C": 128, "BLOCK_N": gptq_columns.BLOCK_N}
        yield f"gptq_columns {kind}", gptq_columns.gptq_columns_kernel, types, {"num_warps": 4}
    for one in ("N", "C"):  # the launcher compiles a 1 in
        yield (
            f"gptq_columns fp8 {one}=1",
            gptq_columns.gptq_columns_kernel,
            types | {one: 1},
            {"num_warps": 4},
        )


PRODUCED = {  # how activations are rounded: codes, static scale, group size
    "int8": ("*i8", None, 0),
    "e4m3": ("*u8", None, 0),
    "e4m3 groups": ("*u8", None, 128),
    "e4m3 static": ("*u8", "*fp32", 0),
    "not": (None, None, 0),
}


def producer_jobs(target: str):
    """What the wrappers of the kernels that round activations launch, and those that compute them: as `jobs`."""
    from quantkit.kernels import quantize_activations, rms_norm, swiglu
    from quantkit.kernels.dispatch import MAX_ROW, native_fp8

    full = target in FIRST
    rows = (1, 4096) if full else (4096,)
    pdl = target.startswith("sm_") and int(target[3:]) >= 90
    flags = {"NATIVE_FP8": native_fp8(target), "PDL": pdl} | ({"launch_pdl": True} if pdl else {})

    def job(kernel, name: str, M: int, K: int, how: str, x: str = "*bf16"):
        codes, static, group_size = PRODUCED[how]
        scales = None if codes is None or (static and name == "quantize") else "*fp32"
        size = "F" if name == "swiglu" else "K"
        types = {"x_ptr": x, "scales_ptr": scales, "input_scale_ptr": static}
        types |= {"M": 1 if M == 1 else "i32", size: "i32", "stride_xm": "i32"}
        types |= {"codes_ptr" if name == "quantize" else "y_ptr": codes or x}
        whole_rows = name == "rms_norm" or (codes is not None and not static and not group_size)
        launch = quantize_activations.config(M, K, whole_rows, 4 if x == "*fp32" else 2)
        types |= {"G": group_size, "FMA": x != "*fp32"}
        if name == "rms_norm":
            types |= {"residual_ptr": x, "weight_ptr": x, "h_ptr": x, "eps": "fp32"}
        return f"{name} {x[1:]} {how} {M} rows of {K}", kernel, types, launch | flags

    kernels = (
        ("quantize", quantize_activations.quantize_kernel, 4096, MAX_ROW),
        ("rms_norm", rms_norm.rms_norm_kernel, 4096, MAX_ROW // 2),
        ("swiglu", swiglu.swiglu_kernel, 14336, MAX_ROW),
    )
    for name, kernel, K, longest in kernels:
        for M in rows:
            for how in PRODUCED if full else ("int8", "e4m3 groups"):
                if how != "not" or name != "quantize":
                    yield job(kernel, name, M, K, how)
        for how in ("int8", "e4m3"):
            yield job(kernel, name, 4096, longest, how)
        yield job(kernel, name, 4096, longest // 4, "e4m3", "*fp32")
        yield job(kernel, name, 4096, 128, "int8")
    types = {"x_ptr": "*bf16", "codes_ptr": "*u8", "scales_ptr": "*fp32", "K": "i32", "stride_xm": "i32"}
    launch = {"BLOCK_K": 4096, "num_warps": 8, "FMA": True} | flags
    yield "quantize long rows", quantize_activations.quantize_long_rows_kernel, types, launch


# x, how it is rounded, ranks, bias or not, K, whether the product before has given x
EXCHANGED = (
    ("*bf16", "not", 2, False, 8192, False),
    ("*bf16", "e4m3 groups", 8, True, 8192, False),
    ("*bf16", "int8", 2, True, 4096, True),
    ("*fp16", "e4m3", 4, False, 16384, False),
    ("*fp32", "not", 2, False, 4096, False),
    ("*bf16", "not", 2, False, 8192, True),
    ("*bf16", "int8", 2, True, 4096, False),
)


def exchange_jobs(target: str):
    """What adds the ranks' parts before a norm launches: as `jobs`."""
    from quantkit.kernels import all_reduce_norm
    from quantkit.kernels.dispatch import native_fp8

    pdl = int(target[3:]) >= 90
    flags = {"NATIVE_FP8": native_fp8(target), "PDL": pdl, "TRAP": True} | (
        {"launch_pdl": True} if pdl else {}
    )
    for x, how, ranks, has_bias, K, given in EXCHANGED if target == "sm_90" else EXCHANGED[:3:2]:
        codes, static, group_size = PRODUCED[how]
        itemsize = 4 if x == "*fp32" else 2
        types = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "h_ptr"), x)
        types |= {"bias_ptr": x if has_bias else None, "input_scale_ptr": static}
        types |= {"y_ptr": codes or x, "scales_ptr": "*fp32" if codes else None}
        types |= {"slots_ptr": f"*i{8 * itemsize}", "peers_ptr": "*i64", "calls_ptr": "*i32"}
        types |= dict.fromkeys(("M", "K", "rank", "rows", "max_polls"), "i32") | {"eps": "fp32"}
        types |= {"RANKS": ranks, "G": group_size, "FMA": itemsize == 2}
        launch = all_reduce_norm.launch_of(1, K, itemsize, ranks, given) | flags
        name = f"all_reduce_norm {x[1:]} {how} {ranks} ranks, rows of {K}" + " of a product" * given
        yield name, all_reduce_norm.all_reduce_norm_kernel, types, launch


# kind, x, columns of a head, query heads a kv head, window and soft cap or not
DECODED = (
    ("bf16", "bf16", 128, 4, False),
    ("int8", "bf16", 128, 4, False),
    ("fp8", "bf16", 128, 4, False),
    ("int4", "bf16", 128, 4, False),
    ("bf16", "bf16", 256, 2, True),
    ("int4", "fp16", 64, 8, True),
)
PREFILLED = (("bf16", "bf16", 128, 4, False), ("int4", "bf16", 128, 4, True), ("int8", "bf16", 128, 4, False))
ROPED = ("fp8", "int4", "bf16", "int8")


def argmax_jobs():
    """The greedy choice among the scores of a vocabulary."""
    from quantkit.kernels import argmax

    types = {"x_ptr": "*bf16", "largest_ptr": "*i64", "N": "i32", "stride_xm": "i32", "pieces": "i32"}
    launch = {"PIECE": argmax.PIECE, "num_warps": 4}
    yield "argmax pieces", argmax.largest_of_pieces_kernel, types, launch
    types = {"largest_ptr": "*i64", "y_ptr": "*i64", "pieces": "i32"}
    yield "argmax place", argmax.place_of_largest_kernel, types, {"BLOCK": 32, "num_warps": 1}


def attention_jobs(target: str):
    """What the wrappers of attention over pages launch, and of what writes them: as `jobs`."""
    from quantkit.kernels import decode_attention, prefill_attention, rope_write
    from quantkit.kernels.dispatch import native_fp8
    from quantkit.kernels.kv_operands import COUNTS

    few = () if target == "sm_90" else ("bf16", "int8", "int4") if target in FIRST else ("int4",)
    decoded = [one for one in DECODED if not few or one[0] in few]
    if target.startswith("gfx"):  # dispatch sends wider heads elsewhere
        decoded = [one for one in decoded if one[2] <= 128]
    if few:  # one of a kind: the widest head in 16 bits, the narrowest in int4
        decoded = list({one[0]: one for one in decoded}.values())
    prefilled = PREFILLED if not few else PREFILLED[:2] if target in FIRST else PREFILLED[2:]
    roped = ROPED if not few else ROPED[:2] if target in FIRST else ROPED[:1]
    asm = int(target[3:]) if target.startswith("sm_") else 0
    flags = {"ASM": asm, "PDL": asm >= 90} | ({"launch_pdl": True} if asm >= 90 else {})

    def pages(kind: str, x: str) -> dict:
        codes = {"bf16": f"*{x}"}.get(kind, "*i16")
        scales = {"bf16": None, "int4": "*i32"}.get(kind, "*fp32")
        types = {"keys_ptr": codes, "values_ptr": codes, "key_scales_ptr": scales}
        return types | {"value_scales_ptr": scales, "KIND": kind, "PAGE": 64}

    decodes = ((1, 4096), (16, 640), (16, 4096), (64, 640)) if target == "sm_90" else ((1, 4096),)
    for (kind, x, D, group, masked), (batch, tokens) in itertools.product(decoded, decodes):
        chosen = decode_attention.config(kind, D, batch, tokens, target)
        name = f"{kind} of {D} columns, {group} heads of {x}{', masked' * masked}, {batch} x {tokens}"
        planes = COUNTS[kind]
        both = {"D": D, "GROUP": group, "WIDTH_OF_PLAN": decode_attention.PLAN_WIDTH, "num_stages": 1} | flags
        tensors = {"partial_ptr": "*fp32", "stats_ptr": "*i64", "plan_ptr": "*i32", "y_ptr": f"*{x}"}
        sizes = {"KV_HEADS": 1 if kind == "fp8" else "i32", "programs": "i32"}  # the launcher compiles a 1 in
        types = {"q_ptr": f"*{x}", "table_ptr": "*i32"} | tensors | sizes | pages(kind, x)
        types |= {"max_pages": "i32", "window": "i32", "scale": "fp32", "soft_cap": "fp32"}
        launch = {"WINDOW": masked, "SOFT_CAP": masked, "R": max(8, group), "T": chosen["tokens"]}
        launch |= {"STAGES": chosen["stages"], "num_warps": chosen["warps"]} | both
        yield f"decode_attention {name}", decode_attention.decode_attention_kernel, types, launch
        if (batch, tokens) != decodes[0]:
            continue
        launch = {"PLANES": planes, "C": max(16, D // planes), "ROTATE": kind == "int4"}
        for at_once, warps in ((decode_attention.MANY_PARTS, 4), (decode_attention.FEW_PARTS, 1)):
            adding = launch | {"AT_ONCE": at_once, "num_warps": warps} | both
            yield f"add_parts {name}, {at_once}", decode_attention.add_parts_kernel, tensors | sizes, adding
        types = {"lengths_ptr": "*i32", "plan_ptr": "*i32", "B": 1 if kind == "fp8" else "i32"}
        types |= dict.fromkeys(("max_length", "programs", "window"), "i32")
        launch = {"BP": 1 if kind == "fp8" else 64, "T": chosen["tokens"], "WINDOW": masked, "num_warps": 4}
        launch |= {"ROWS": decode_attention.PLAN_ROWS, "WIDTH": decode_attention.PLAN_WIDTH}
        yield f"decode_plan {name}", decode_attention.plan_kernel, types, launch
    for kind, x, D, group, masked in prefilled:
        chosen = prefill_attention.config(kind, D, group, target)
        types = {"q_ptr": f"*{x}", "y_ptr": f"*{x}", "table_ptr": "*i32", "lengths_ptr": "*i32"} | pages(
            kind, x
        )
        types |= {"B": "i32", "KV_HEADS": "i32", "max_pages": "i32", "window": "i32"}
        types |= {"scale": "fp32", "soft_cap": "fp32", "starts_ptr": "*i32"}
        types |= {"D": D, "GROUP": group, "BP": 16, "WINDOW": masked, "SOFT_CAP": masked}
        launch = {"QUERIES": chosen["queries"], "HEADS": chosen["heads"], "T": chosen["tokens"]}
        launch |= {"STAGES": chosen["stages"], "num_warps": chosen["warps"], "num_stages": 1} | flags
        name = f"prefill_attention {kind} of {D} columns{', masked' * masked}"
        yield name, prefill_attention.prefill_attention_kernel, types, launch
    for kind in roped:
        normed = "*bf16" if kind == "int4" else None
        types = {name: "*bf16" for name in ("qkv_ptr", "cos_ptr", "sin_ptr", "q_ptr")} | pages(kind, "bf16")
        if kind in ("int8", "fp8"):
            types |= dict.fromkeys(("keys_ptr", "values_ptr"), "*i8" if kind == "int8" else "*u8")
        types |= {"slots_ptr": "*i64", "q_norm_ptr": normed, "k_norm_ptr": normed, "eps": "fp32"}
        types |= dict.fromkeys(("H", "KV_HEADS", "stride_t", "stride_cos", "stride_sin"), "i32")
        types |= {"D": 128, "R": rope_write.HEADS, "NATIVE_FP8": native_fp8(target)}
        yield f"rope_write {kind}", rope_write.rope_write_kernel, types, flags | {"num_warps": 4}


def jobs(target: str):
    """(name, kernel, run-time argument types, constexprs, launch options) of everything the wrappers launch."""
    import torch

    from quantkit.kernels import fp8_block, w8a8, w8a16
    from quantkit.kernels.dispatch import native_fp8

    yield from w4a16_jobs(target)
    yield from low_bits_jobs(target)
    yield from producer_jobs(target)
    yield from argmax_jobs()
    yield from attention_jobs(target)
    if target == "sm_90":
        yield from hopper_jobs()
        yield from eight_bit_hopper_jobs()
        yield from w4a8_hopper_jobs()
    N, K, full = 4096, 4096, target in FIRST
    native = native_fp8(target)
    sizes = {"M": "i32", "N": "i32", "K": "i32"}
    for M in ROWS:
        if not full and M != 512:
            continue
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
            types |= {
                "y_ptr": "*bf16",
                **sizes,
                "stride_sm": "i32",
                "NATIVE_FP8": native,
                "PROMOTE_EVERY": 128,
            }
            yield f"w8a8 {codes[1:]} M={M}", w8a8.w8a8_kernel, types, w8a8.config(M, N, K)
        types = {
            "x_ptr": "*u8",
            "codes_ptr": "*u8",
            "x_scales_ptr": "*fp32",
            "scales_ptr": "*fp32",
            "bias_ptr": None,
        }
        types |= {"y_ptr": "*bf16", **sizes, "stride_sm": 1, "stride_sb": "i32", "NATIVE_FP8": native}
        yield f"fp8_block M={M}", fp8_block.fp8_block_kernel, types, fp8_block.config(M, N, K)
    if target in ("sm_80", "sm_90"):
        yield from exchange_jobs(target)
    if full:
        yield from gptq_jobs()
        single = torch.float32
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


def gpu_target(target: str):
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64)


def nvidia_tool(tool: str, kernel, *options: str) -> str | None:
    """What a disassembler of the Triton wheel prints about a compiled kernel; None where the wheel has none."""
    import tempfile

    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    if not path.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        return subprocess.run([path, *options, cubin.name], capture_output=True, text=True, check=True).stdout


def resources(kernel) -> dict[str, int]:
    """Registers of a thread, and those that the compiled kernel keeps in memory: bytes on NVIDIA, a count on AMD."""
    if "amdgcn" in kernel.asm:
        return {"spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])[1])}
    usage = nvidia_tool("cuobjdump", kernel, "-res-usage")
    if usage is None:
        return {}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]),
    }


def main_loop(sass: str) -> list[str]:
    """Instructions of the loop that has the most of the tensor cores' ones, of those that hold no other such loop."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(.*?);", line):
            lines.append(instruction[1])
            back = re.search(r"BRA.*`\(\.(L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                loops.append(range(labels[back[1]], len(lines)))
    products = {loop: sum("MMA" in lines[i] for i in loop) for loop in loops}
    multiply = [loop for loop in loops if products[loop]]
    inner = [loop for loop in multiply if not any(o != loop and set(o) <= set(loop) for o in multiply)]
    return [lines[i] for i in max(inner, key=lambda loop: (products[loop], -len(loop)))]


def in_the_main_loop(kernel) -> dict[str, int]:
    """Loads and stores of shared memory and of spilled registers."""
    sass = nvidia_tool("nvdisasm", kernel, "-c")
    if sass is None:
        return {}
    loop = main_loop(sass)
    assert any("MMA" in instruction for instruction in loop)
    return {
        "through_shared": sum(i.startswith(("LDS", "STS")) for i in loop),
        "waits_for_products": sum(i.startswith("WARPGROUP.DEPBAR") for i in loop),
        "spills_in_loop": sum(i.startswith(("LDL", "STL")) for i in loop),
        "copies_of_16_bytes": sum(i.startswith("LDGSTS") and ".128" in i for i in loop),
        "instructions": len(loop),
    }


# whose main loops are looked at; W4A16 that has all columns in registers (WHOLE) has none
LOOPING = ("w4a16_decode", "w4a16_hopper", "w8_hopper", "w4a8_hopper", "decode_attention")
# programmatic dependent launch and stores, in PTX
ORDERED = ("griddepcontrol.launch_dependents", "griddepcontrol.wait", "st.global")


def across_ranks(kernel) -> dict[str, int]:
    """Stores to the other ranks' slots and loads that wait for them, those of 16 bytes, and what would be wrong there."""
    sass = nvidia_tool("nvdisasm", kernel, "-c")
    if sass is None:
        return {}
    gives, takes = (re.findall(rf"{kind}\.E\S*STRONG\.SYS", sass) for kind in ("STG", "LDG"))
    return {
        "gives": len(gives),
        "takes": len(takes),
        "narrow": sum(".128" not in one for one in gives + takes),
        "barriers": len(re.findall(r"BAR\.SYNC", sass)),
        "multicast": kernel.asm["ptx"].count("multimem"),
    }


def is_chosen(target: str, name: str, arguments: dict) -> bool:
    """Whether dispatch sends a product of this size to this Triton kernel; all of the others are."""
    import torch

    from quantkit.kernels.dispatch import kernel_name

    size = re.search(r"M=(\d+)(?: N=(\d+))?", name)
    if not size:  # of producers too the tests compile what dispatch chooses
        return True
    M, N = int(size[1]), int(size[2] or 4096)
    kernel = name.split()[0]
    if kernel in ("w4a16_hopper", "w8_hopper", "w4a8_hopper"):
        return True
    x_dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16}[arguments["y_ptr"]]
    if kernel.startswith("w4a16"):
        G = arguments["G"]
        return kernel_name("w4a16_tiles", target, M, N, 4096, x_dtype, torch.int32, G) == kernel
    codes = {"*i8": torch.int8, "*u8": torch.float8_e4m3fn, "*i32": torch.int32}[arguments["codes_ptr"]]
    G = arguments.get("G", 0)
    return kernel_name(kernel, target, M, N, 4096, x_dtype, codes, G) == f"{kernel}_triton"


def compile_all(target: str) -> None:
    import triton
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    for name, fn, arguments, launch in jobs(target):
        options = {key: launch[key] for key in OPTIONS if key in launch}
        arguments = arguments | {key: launch[key] for key in launch if key not in options}
        words = ("KIND",)  # constexprs that are strings; other strings are types
        constants = {k: value for k, value in arguments.items() if not isinstance(value, str) or k in words}
        types = {key: "constexpr" if key in constants else arguments[key] for key in fn.arg_names}
        # what the launcher finds out about real tensors: addresses and sizes divisible by 16
        aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(types) if types[key][0] in "*i"}
        kind = GluonASTSource if fn.is_gluon() else ASTSource
        source = kind(fn, types, constexprs=constants, attrs=aligned)
        kernel = triton.compile(source, target=gpu_target(target), options=options)
        record = {"name": name, "shared": kernel.metadata.shared, **resources(kernel)}
        record |= {"chosen": is_chosen(target, name, arguments), "max_registers": options.get("maxnreg")}
        if name.startswith("all_reduce_norm") or name.endswith("gives"):
            record |= across_ranks(kernel)
            record["order"] = re.findall("|".join(ORDERED), kernel.asm["ptx"])
        if target == "sm_90" and name.startswith(LOOPING) and not constants.get("WHOLE"):
            record |= in_the_main_loop(kernel)
        print(json.dumps(record), flush=True)


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
    "sm_120": 99,
    "gfx942": 64,
    "gfx950": 160,
}


KERNELS = {"sm_80": 101, "sm_89": 40, "sm_90": 214, "sm_100": 40, "sm_120": 40, "gfx942": 97, "gfx950": 40}
# Bytes: a cap on registers may leave a few words in memory, outside the main loop (tested below for Hopper).
SPILLS = 64


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits(compiled, target):
    kernels, error = compiled[target]
    assert not error, error[-2000:]
    assert len(kernels) == KERNELS[target]
    limit = SHARED_MEMORY[target] * 1024
    too_large = {k["name"]: k["shared"] for k in kernels if k["shared"] > limit and k["chosen"]}
    assert not too_large, f"shared memory past {SHARED_MEMORY[target]} KiB: {too_large}"


def is_capped(kernel: dict) -> bool:
    """Whether it gets fewer registers than a multiprocessor has for its only program."""
    from quantkit.kernels.hopper import REGISTERS_OF_TWO

    return kernel["name"].startswith("w4a16_decode") or kernel["max_registers"] == REGISTERS_OF_TWO


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_that_dispatch_chooses_spills_registers(compiled, target):
    spilled = {k["name"]: k["spills"] for k in compiled[target][0] if k["chosen"] and k.get("spills")}
    capped = {k["name"] for k in compiled[target][0] if is_capped(k)}
    assert not set(spilled) - capped, spilled
    assert max(spilled.values(), default=0) <= SPILLS, spilled


@pytest.mark.parametrize("kernel", LOOPING)
def test_hoppers_kernels_spill_nothing_in_their_main_loop(compiled, kernel):
    loops = {k["name"]: k.get("spills_in_loop", 0) for k in compiled["sm_90"][0] if kernel in k["name"]}
    assert loops
    assert not any(loops.values()), loops


def test_hoppers_products_run_while_weights_are_dequantized(compiled):
    """Where ptxas cannot follow who uses which registers it waits after every instruction of the tensor cores."""
    waits = {k["name"]: k.get("waits_for_products", 0) for k in compiled["sm_90"][0] if "hopper" in k["name"]}
    assert waits
    assert max(waits.values()) <= 3, waits


def test_decode_on_hopper_keeps_to_its_registers(compiled):
    kernels = [k for k in compiled["sm_90"][0] if k["max_registers"]]
    assert kernels
    over = {k["name"]: k["registers"] for k in kernels if k.get("registers", 0) > k["max_registers"]}
    assert not over


def test_a_row_of_x_on_hopper_takes_no_turn_through_shared_memory(compiled):
    """The weight comes in the order of the tensor cores: only Triton's choice of layouts could undo that."""
    rows = [k for k in compiled["sm_90"][0] if k["name"].startswith("w4a16_decode") and " M=1 " in k["name"]]
    assert rows
    assert not {k["name"]: k["through_shared"] for k in rows if k.get("through_shared")}


def test_attention_on_hopper_loads_16_bytes_a_lane_and_keeps_to_its_instructions(compiled):
    """Budgets of `decode_attention.py`: instructions a token of all warps, 64 tokens a step."""
    found = {k["name"]: k for k in compiled["sm_90"][0] if k["name"].startswith("decode_attention")}
    for kind, problem, warps, row, most in (
        ("bf16", "1 x 4096", 4, 256, 19),
        ("int8", "1 x 4096", 4, 128, 27),
        ("fp8", "1 x 4096", 4, 128, 22),
        ("int4", "16 x 640", 2, 64, 21),
    ):
        kernel = found[f"decode_attention {kind} of 128 columns, 4 heads of bf16, {problem}"]
        if "instructions" not in kernel:
            pytest.skip("the Triton wheel has no disassembler")
        copies = 2 * 64 * row // (512 * warps)  # a lane's, of K and V
        assert kernel["copies_of_16_bytes"] == copies, kernel
        assert kernel["instructions"] * warps <= most * 64, kernel


@pytest.mark.parametrize("problem", [(1, 4096), (16, 640), (16, 4096)], ids=str)
def test_attention_on_hopper_has_all_its_programs_at_a_time(compiled, problem):
    """One more than fit would be a second wave."""
    from quantkit.kernels import decode_attention

    found = {k["name"]: k for k in compiled["sm_90"][0] if k["name"].startswith("decode_attention")}
    for kind in ("bf16", "int8", "fp8", "int4"):
        kernel = found[
            f"decode_attention {kind} of 128 columns, 4 heads of bf16, {problem[0]} x {problem[1]}"
        ]
        launch = decode_attention.config(kind, 128, *problem, "sm_90")
        assert (kernel["shared"] + 1024) * launch["per_sm"] <= 228 * 1024, kernel
        if "registers" in kernel:  # given to a warp in units of 8 a lane
            assert -(-kernel["registers"] // 8) * 8 * 32 * launch["warps"] * launch["per_sm"] <= 65536, kernel


def test_a_norm_that_does_not_wait_for_the_product_begins_and_ends_at_the_right_time(compiled):
    """What `all_reduce_norm.py` says of products that give their rows, in the order of the instructions."""
    kernels = {k["name"]: k["order"] for k in compiled["sm_90"][0] if "order" in k}
    early = [order for name, order in kernels.items() if name.endswith("of a product")]
    giving = [order for name, order in kernels.items() if name.endswith("gives")]
    assert early
    assert giving
    launch, wait, store = ORDERED
    for order in giving:  # nothing is stored before the wait, and the norm is launched after it
        assert order[:2] == [wait, launch], order
        assert set(order[2:]) == {store}, order
    for order in early:  # it gives nothing; those that wait for it wait for the product, too
        assert order.count(wait) == 1, order
        assert order[0] == launch
        assert order[-1] == wait


def test_a_row_that_a_product_gives_goes_past_the_first_cache(compiled):
    kernels = [k for k in compiled["sm_90"][0] if k["name"].endswith("gives")]
    if "gives" not in kernels[0]:
        pytest.skip("the Triton wheel has no disassembler")
    for one in kernels:
        assert one["gives"] > 0, one
        assert one["takes"] == one["multicast"] == 0, one


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_values_cross_ranks_in_whole_lines_past_the_first_cache(compiled, target):
    kernels = [k for k in compiled[target][0] if k["name"].startswith("all_reduce_norm")]
    if "gives" not in kernels[0]:
        pytest.skip("the Triton wheel has no disassembler")
    for one in kernels:
        assert one["takes"] > 0, one
        assert one["gives"] == (0 if one["name"].endswith("of a product") else one["takes"]), one
        assert one["narrow"] == one["multicast"] == 0, one
        assert one["barriers"], one  # between a loop's loads and the stores that empty the slots


if __name__ == "__main__":
    compile_all(sys.argv[1])
