"""The ranks' parts of a sum added, and what follows on every rank: residual, RMS norm, rounding to 8 bits, in one kernel.

    s[m, k] = sum over ranks of x_r[m, k]           in float32, in the order of the ranks, rounded to x.dtype     (1)
    t[m, k] = s[m, k] + bias[k]                     rounded to x.dtype, where there is a bias                     (2)
    h[m, k] = t[m, k] + residual[m, k]              rounded to x.dtype                                            (3)

and then (2) and (3) of `rms_norm.py` and the rounding. All ranks add the same numbers in the same order: the same bits on all.

One shot, of the rank that has a part: a program takes a row of its rank, writes it into a slot of every other rank (over
NVLink; of its own too, where registers cannot keep it), waits until all rows lie in its own rank's slots, and goes on with their
sum in registers. No flags: a slot is EMPTY, a NaN that no part holds (`cleaned`), until its value comes. A value of 16 or 32 bits arrives as a
whole, so that what is not EMPTY is the part itself: nothing has to come before anything else, and no fence is needed. One
way over the link is all there is to wait for, where a flag, and then a load from the other rank, take one and a half round trips.

The call of row m after k others uses slots k % 2. They are EMPTY again when they are needed next:

    rank a                                            rank b
    call k: takes b's part, makes the slot EMPTY      call k: ends when it has a's part
    call k + 1: gives b its part              ---->   call k + 1: ends when it has a's part, so after a's call k
                                                      call k + 2: writes a's slot of call k

Call k of a rank is over, with all that it wrote in the memory of its GPU, when call k + 1 begins: kernels of one stream (with
programmatic dependent launch, what follows the wait). The stores that cross ranks are relaxed ones of system scope (st.wt,
STRONG.SYS in machine code) and so are the loads that wait (ld.volatile): they read and write L2 where the slots are, never L1.
A product may write its rows into the slots itself (`give_outputs`), as its programs are done, own rank's slots included. Then the norm after it
does not wait for its end: it begins once all programs of the product have begun and all before the product is over, so after the norm of
the call before, takes what comes, and ends after the product's end, for those who wait for it. What it reads at first, the residual and
the count, is of kernels before the product. It may write h and y where the product's x or workspace was: a whole row in the slots says
that all of that has been read, if all rows of x are operands of the same instructions (up to 8).

k is counted in memory, a counter a row, so that a CUDA graph may be replayed: ranks must replay the same ones, and
calls of one mailbox must not overlap.

Every program gives before it waits, or the product before it does, all programs of which have begun, so a rank's programs wait for nothing
but the same rows of other ranks and what runs already. No deadlock if all of a grid's programs run at the same time: one a row,
`Mailbox.rows` at most, which is no more than there are multiprocessors (`rows_of`). What was launched before ends without us; what is launched early, by dependent launch, comes when
all our programs are there. A program that has waited too long, because a rank died, traps: an error, no hang.

Bytes of a row of bfloat16 on R ranks: 2 K read of x, 2 K (R - 1) written over the link, as many read a poll and written to
be EMPTY, 2 K of residual, 2 K of the norm's weight, 2 K of h and K to 2 K of codes. At 450 GB/s one way a link takes 16 KB (M = 1,
K = 8192) in 0.04 us and 1 MB in 2.3, beside some 1.5 us for the way itself; at 64 bytes a cycle one multiprocessor moves those of
two ranks, three polls among them, in 1.4 us. It would be 2.1 if its own part went by way of its slots, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.dispatch import MAX_ROW
from quantkit.kernels.quantize_activations import capabilities, config, outputs
from quantkit.kernels.rms_norm import store_normed
from quantkit.kernels.w4a16 import ptx_level

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Of a rank's part of x: above it NCCL's all-reduce and a kernel for the rest. Of 2 MiB NCCL takes 2.7 times as long (docs/parallel.md).
ONE_SHOT_BYTES = 2**21
EMPTY: tl.constexpr = tl.constexpr(-1)  # as bits: a NaN of bfloat16, float16 and float32 alike
POLLS_PER_SECOND = 2**21  # about: a load from L2 and a reduction over the program
SLOTS = 2
MAX_RANKS = 8
AWAITED_BYTES = 2**15  # of a row, of so many ranks at once: 64 of each of 512 lanes
INTEGERS = {2: torch.int16, 4: torch.int32}  # by the bytes of a value


@dataclass(frozen=True)
class Mailbox:
    """Where the ranks' rows come in, of one rank.

    Attributes:
        slots: int16 or int32, as wide as x, [SLOTS, ranks, rows, K]: what each rank has written here, else EMPTY.
        peers: int64 [ranks], the addresses of all ranks' slots as this rank sees them.
        calls: int32 [rows], of each row.
        rank: this one.
        seconds: that a call waits for the other ranks, about.
        keeps: what keeps the other ranks' slots within reach.
    """

    slots: Tensor
    peers: Tensor
    calls: Tensor
    rank: int
    seconds: float = 600.0
    keeps: Any = None

    @property
    def rows(self) -> int:
        """That one call may have."""
        return len(self.calls)


def rows_of(K: int, itemsize: int, multiprocessors: int) -> int:
    """Rows that a mailbox is to have: those of `ONE_SHOT_BYTES`, each with a multiprocessor for its program."""
    return min(ONE_SHOT_BYTES // (K * itemsize), multiprocessors)


def mailbox_shape(ranks: int, rows: int, K: int) -> tuple[int, ...]:
    """Of its slots."""
    return SLOTS, ranks, rows, K


def unsupported(device: torch.device, ranks: int, K: int, itemsize: int) -> str | None:
    """Why rows of K values cannot be exchanged by the kernel on a device; None: they can."""
    if device.type != "cuda" or torch.version.hip:
        return f"{device} is no NVIDIA GPU"
    if itemsize not in INTEGERS:
        return f"values of {itemsize} bytes, expected 2 or 4"
    if ranks > MAX_RANKS:
        return f"{ranks} ranks, at most {MAX_RANKS}"
    if K > MAX_ROW // 2 // (itemsize // 2) or K % 16:
        return f"rows of {K} values, expected a multiple of 16 up to {MAX_ROW // 2 // (itemsize // 2)}"
    return None


@triton.jit
def cleaned(bits):
    """Bits of a part without EMPTY: another NaN for it."""
    largest: tl.constexpr = 0x7FFF if bits.dtype == tl.int16 else 0x7FFFFFFF
    return tl.where(bits == EMPTY, largest, bits).to(bits.dtype)


@triton.jit(do_not_specialize=("rank", "rows", "max_polls"))
def all_reduce_norm_kernel(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, h_ptr, y_ptr, scales_ptr, input_scale_ptr,
    slots_ptr, peers_ptr, calls_ptr,
    M, K, eps, rank, rows, max_polls,
    RANKS: tl.constexpr, AT_ONCE: tl.constexpr, KEEP: tl.constexpr, GIVEN: tl.constexpr, G: tl.constexpr, BLOCK_K: tl.constexpr,
    FMA: tl.constexpr, NATIVE_FP8: tl.constexpr, PDL: tl.constexpr, TRAP: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    m = row + tl.arange(0, 1)
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = k < K
    at = m[:, None] * K + k  # [1, BLOCK_K]
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0)
    if PDL and not GIVEN:
        gdc_wait()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    calls = tl.load(calls_ptr + row, cache_modifier=".cg")
    first = (calls & 1).to(tl.int64) * RANKS * rows * K  # of this call's slots
    this = tl.full((1, 1), rank, tl.int32)
    kept = this if KEEP else this - RANKS  # the rank whose part stays in registers: this one, or none
    if not GIVEN:
        part = tl.load(x_ptr + at, mask=inside, other=0.0)
        part = cleaned(part.to(slots_ptr.dtype.element_ty, bitcast=True))
        to = first + rank * rows.to(tl.int64) * K
        for r in tl.static_range(RANKS):
            peer = tl.multiple_of(tl.load(peers_ptr + r).to(slots_ptr.dtype), 16)
            tl.store(peer + to + at, part, mask=inside & (kept != r), cache_modifier=".wt")
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    total = tl.zeros((1, BLOCK_K), tl.float32)
    polls = 0
    for r0 in tl.static_range(0, RANKS, AT_ONCE):
        before = total
        waiting = 1
        while waiting > 0:
            total = before
            empty = tl.zeros((1, BLOCK_K), tl.int32)
            for i in tl.static_range(AT_ONCE):
                slot = slots_ptr + first + (r0 + i) * rows.to(tl.int64) * K
                sent = inside & (r0 + i < RANKS) & (kept != r0 + i)
                found = tl.load(slot + at, mask=sent, other=0, volatile=True)
                if KEEP:
                    found = tl.where(kept == r0 + i, part, found)
                empty |= (found == EMPTY).to(tl.int32)
                total += found.to(dtype, bitcast=True).to(tl.float32)
            polls += 1
            missing = tl.max(empty)  # all lanes meet here: none is still loading when any of them goes on
            waiting = tl.where(polls < max_polls, missing, 0)
            if TRAP:
                if missing > waiting:
                    tl.inline_asm_elementwise(
                        "trap; mov.u32 $0, $1;", "=r,r", [polls], dtype=tl.int32, is_pure=False, pack=1
                    )
        for i in tl.static_range(AT_ONCE):
            slot = slots_ptr + first + (r0 + i) * rows.to(tl.int64) * K
            nothing = tl.full((1, BLOCK_K), EMPTY, slots_ptr.dtype.element_ty)
            tl.store(slot + at, nothing, mask=inside & (r0 + i < RANKS) & (kept != r0 + i))
    tl.store(calls_ptr + row, calls + 1)
    h = total.to(dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=inside, other=0.0)
        h = (h.to(tl.float32) + bias.to(tl.float32)).to(dtype)
    h = (h.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    tl.store(h_ptr + at, h, mask=inside)
    store_normed(
        h, weight, m, y_ptr, scales_ptr, input_scale_ptr, M, K, eps, G=G, FMA=FMA, NATIVE_FP8=NATIVE_FP8
    )
    if PDL and GIVEN:
        gdc_wait()  # what waits for us may count on the product being over


@triton.jit
def give_outputs(y, first, m, y_ptr, peers_ptr, calls_ptr, M, N, rank, rows, RANKS: tl.constexpr):
    """A product's y float32 [columns n from `first` on, rows m] into this rank's slots of every rank, rounded to the 16 bits of y_ptr.

    It is called once the norm of the call before, which counted that, is over.
    """
    n = first + tl.arange(0, y.shape[0])[:, None]
    inside = (n < N) & (m < M)[None, :]
    calls = tl.load(calls_ptr + m, mask=m < M, other=0, cache_modifier=".cg")
    row = ((calls & 1) * RANKS + rank) * rows + m
    at = row.to(tl.int64)[None, :] * N + n
    part = cleaned(y.to(y_ptr.dtype.element_ty).to(tl.int16, bitcast=True))
    for r in tl.static_range(RANKS):
        peer = tl.load(peers_ptr + r).to(tl.pointer_type(tl.int16))
        tl.store(peer + at, part, mask=inside, cache_modifier=".wt")


def launch_of(M: int, K: int, itemsize: int, ranks: int, given: bool = False) -> dict[str, int]:
    """Launch parameters: as `rms_norm.py` has them, of a row a program; ranks are waited for together as registers allow, and
    the rank's own part, if it is not given, is kept in them if that leaves room for all others at once."""
    chosen = config(M, K, True, itemsize)
    at_once = min(ranks, max(1, AWAITED_BYTES // (chosen["BLOCK_K"] * itemsize)))
    together = {"AT_ONCE": at_once, "KEEP": at_once == ranks and not given, "GIVEN": given}
    return {"BLOCK_K": chosen["BLOCK_K"], "num_warps": chosen["num_warps"], **together}


def all_reduce_norm(
    x: Tensor,
    mailbox: Mailbox,
    bias: Tensor | None,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    dtype: torch.dtype | None = None,
    input_scale: Tensor | None = None,
    group_size: int = 0,
    given: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the ranks' parts x of rows, then residual and norm; all ranks call it, in the same order.

    Args:
        x: this rank's part, float [M, K], with at most `mailbox.rows` rows; left as it is.
        bias: x.dtype [K], added once, or None.
        residual: x.dtype [M, K], the same on all ranks.
        given: x is of the product launched just before on this stream, which has given it to all ranks (`give_outputs`).

    The rest, and the results, as in `ops.rms_norm_quantize`.

    Raises:
        ValueError: there is no room for x in the mailbox.
    """
    M, K = x.shape
    _, ranks, rows, width = mailbox.slots.shape
    if M > rows or width != K or x.element_size() != mailbox.slots.element_size():
        raise ValueError(
            f"all_reduce_norm: x is {list(x.shape)} of {x.element_size()} bytes, expected up to {rows} rows of {width} of "
            f"{mailbox.slots.element_size()}"
        )
    h = torch.empty_like(x)
    y, scales, found = outputs(x, K, dtype, input_scale, group_size)
    nvidia = ptx_level(x) > 0
    all_reduce_norm_kernel[(M,)](
        x.contiguous(), bias, residual.contiguous(), weight, h, y, found, input_scale,
        mailbox.slots, mailbox.peers, mailbox.calls,
        M, K, eps, mailbox.rank, rows, min(int(mailbox.seconds * POLLS_PER_SECOND), 2**31 - 1),
        RANKS=ranks, G=group_size, TRAP=nvidia, **launch_of(M, K, x.element_size(), ranks, given), **capabilities(x),
    )  # fmt: skip
    return y if dtype is None else y.view(dtype), scales, h
