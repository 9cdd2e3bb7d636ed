"""Ranks' parts added in the kernel of the norm: the same bits on all ranks, whichever of them is late."""

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import triton
import triton.language as tl

from all_reduce_ranks import (
    CALLS,
    EPS,
    ROWS,
    empty_files,
    expected,
    in_a_file,
    of_products,
    one_call,
    prepared,
    product_of,
)
from parallel import free_port, run_processes
from quantkit.errors import MachineError
from quantkit.exchange import Exchange, open_exchange
from quantkit.kernels import all_reduce_norm as kernel
from quantkit.kernels import cpu
from quantkit.kernels import w4a16_decode as w4a16_kernel
from quantkit.kernels.all_reduce_norm import EMPTY, INTEGERS, SLOTS, Mailbox, mailbox_shape
from quantkit.kernels.w4a16_decode import w4a16_decode
from rounding import DEVICE, GPU

interpreted = pytest.mark.skipif(GPU, reason="needs Triton's interpreter, which a GPU's tests go without")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
gpu = pytest.mark.gpu


def assert_same(found, wanted) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu().float().nan_to_num(7e4), other.cpu().float().nan_to_num(7e4))


STEP = {torch.int8: (0, 1), cpu.FP8: (2**-3, 2**-9), torch.bfloat16: (2**-7, 0), torch.float32: (2**-7, 0)}


def assert_as_by_the_norms_kernel(found, wanted) -> None:
    """The sum to the bit; where a GPU's compiler may have put the squares together otherwise, the rest to a step of its type."""
    if not GPU:
        assert_same(found, wanted)
        return
    assert_same(found[2:], wanted[2:])
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert one.dtype == other.dtype
        rtol, atol = STEP[one.dtype]
        torch.testing.assert_close(
            one.float(), other.float().to(one.device), rtol=rtol, atol=atol, equal_nan=True
        )


# K: whole rows of lanes, and one that fills no power of two
@interpreted
@pytest.mark.parametrize(
    ("ranks", "K", "dtype"), [(2, 64, "float16"), (3, 144, "float16"), (2, 64, "float32")]
)
def test_processes_that_share_memory_get_the_sum(ranks, K, dtype, tmp_path):
    empty_files(tmp_path, ranks, K, getattr(torch, dtype))
    codes = run_processes("all_reduce_ranks", str(tmp_path), K, dtype, ranks=ranks)
    assert codes == [0] * ranks
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    # of what calls, by turns, should return
    makers = [expected, of_products] if dtype == "float16" else [expected]
    for call, M in enumerate(CALLS):
        for i, maker in enumerate(makers, len(makers) * call):
            wanted = maker(ranks, call, M, K, getattr(torch, dtype), "cpu")
            for one in found:
                assert_as_by_the_norms_kernel(one[i], wanted)
    boxes = [in_a_file(str(tmp_path), rank, ranks, K, getattr(torch, dtype)) for rank in range(ranks)]
    assert all((box.slots == EMPTY.value).all() for box in boxes)  # all rows have gone in and come out


@interpreted
def test_a_rank_that_never_comes_leaves_nan_where_nothing_can_trap(tmp_path):
    empty_files(tmp_path, 2, 64, torch.float16)
    box = in_a_file(str(tmp_path), 0, 2, 64, torch.float16)
    impatient = Mailbox(box.slots, box.peers, box.calls, 0, 3 / kernel.POLLS_PER_SECOND, box.keeps)
    y, _, h = one_call(impatient, 0, 0, 2, 64, torch.float16)
    assert y.isnan().all()
    assert h.isnan().all()


def test_more_rows_than_the_mailbox_has_are_refused(tmp_path):
    box = Mailbox(torch.empty(mailbox_shape(2, 4, 64), dtype=torch.int16), torch.zeros(2), torch.zeros(4), 0)
    x = torch.zeros(5, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"x is \[5, 64\] of 2 bytes, expected up to 4 rows of 64 of 2"):
        kernel.all_reduce_norm(x, box, None, x[0], EPS, x)


@pytest.mark.parametrize(("K", "rows"), [(4096, 132), (8192, 128), (1024, 132)])
def test_a_mailbox_has_no_more_rows_than_run_at_once(K, rows):
    assert kernel.rows_of(K, 2, 132) == rows


def test_a_cpu_has_no_mailbox_and_says_so(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        exchange = open_exchange(None, 64, torch.float16, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
    assert exchange.mailbox is None
    assert exchange.why_not == "process 0: no GPU, or no Triton"


def wrong_reads(given: Sequence[Sequence[bool]], slots: int) -> int:
    """Of all interleavings of ranks that follow the kernels' steps: states in which a part is lost or taken twice, or all wait.

    A rank gives its part to each rank, takes the part of each when it is there, and empties each when it has all: a step an
    access. A call is over when all is done.

    given: of each rank and call, whether the product gives, at any time, while the norm takes; else all is given first.
    """
    ranks, calls, full = len(given), len(given[0]), (1 << len(given)) - 1
    # of each rank: its call, and to or from whom it has given, taken and emptied; slots[to][call % slots][from]: the call
    start = (((0, 0, 0, 0),) * ranks, (None,) * (ranks * slots * ranks))
    seen, open_states, wrong = {start}, [start], 0
    while open_states:
        states, memory = open_states.pop()
        moved = False
        for rank, (call, gave, took, emptied) in enumerate(states):
            if call == calls:
                continue
            steps = [("end", 0)] if gave == took == emptied == full else []
            for other in range(ranks):
                if not gave >> other & 1:
                    steps.append(("give", other))
                if not took >> other & 1 and (given[rank][call] or gave == full):
                    steps.append(("take", other))
                if took == full and not emptied >> other & 1:
                    steps.append(("empty", other))
            for kind, other in steps:
                to, by = (other, rank) if kind == "give" else (rank, other)
                at = (to * slots + call % slots) * ranks + by
                if kind == "take" and memory[at] is None:
                    continue
                if (kind == "give" and memory[at] is not None) or (kind == "take" and memory[at] != call):
                    wrong += 1
                    continue
                after = list(memory)
                if kind in ("give", "empty"):
                    after[at] = call if kind == "give" else None
                bit = 1 << other
                done = {
                    "give": (call, gave | bit, took, emptied),
                    "take": (call, gave, took | bit, emptied),
                    "empty": (call, gave, took, emptied | bit),
                    "end": (call + 1, 0, 0, 0),
                }
                state = (*states[:rank], done[kind], *states[rank + 1 :]), tuple(after)
                moved = True
                if state not in seen:
                    seen.add(state)
                    open_states.append(state)
        wrong += not moved and any(call < calls for call, *_ in states)
    return wrong


def test_no_interleaving_of_two_ranks_loses_a_part():
    for given in product(product((False, True), repeat=4), repeat=2):
        assert wrong_reads(given, SLOTS) == 0, given


def test_no_interleaving_of_three_ranks_loses_a_part():
    assert wrong_reads(((True, True, True), (True, False, True), (False, True, True)), SLOTS) == 0


@pytest.mark.parametrize("given", [False, True])
def test_one_slot_would_not_do(given):
    assert wrong_reads(((given,) * 3,) * 2, SLOTS - 1) > 0


@triton.jit
def give_kernel(y_ptr, peers_ptr, calls_ptr, M, N, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    n, m = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    y = tl.load(y_ptr + m[None, :] * N + n[:, None], mask=(n < N)[:, None] & (m < M)[None, :])
    kernel.give_outputs(y, 0, m, y_ptr, peers_ptr, calls_ptr, M, N, 1, 4, 2)


def test_a_product_gives_no_empty_slot_and_nothing_past_its_rows():
    y = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    y.view(torch.int16)[1, 5] = EMPTY.value  # a NaN of all ones
    slots = torch.full((2, *mailbox_shape(2, 4, 12)), EMPTY.value, dtype=torch.int16, device=DEVICE)
    peers = torch.tensor([one.data_ptr() for one in slots], device=DEVICE)
    calls = torch.tensor([0, 3, 2, 7], dtype=torch.int32, device=DEVICE)
    give_kernel[(1,)](y, peers, calls, 3, 12, BLOCK=16, ROWS=4)
    for one in slots:
        for row, call in enumerate((0, 1, 0)):
            found = one[call, 1, row].view(torch.float16)
            assert torch.equal(found.nan_to_num(7.0), y[row].nan_to_num(7.0))
            assert (one[call, 1, row] != EMPTY.value).all()
            one[call, 1, row] = EMPTY.value
        assert (one == EMPTY.value).all()


def test_a_row_that_was_given_is_added_next_or_never():
    box = Mailbox(torch.empty(mailbox_shape(2, 4, 64), dtype=torch.int16), torch.zeros(2), torch.zeros(4), 0)
    exchange, x = Exchange(None, box), torch.zeros(1, 64, dtype=torch.float16)
    with pytest.raises(MachineError, match="stopped between a linear and the norm"):
        exchange.norm(x, None, x[0], EPS, x, given=True)
    exchange.given = True
    with pytest.raises(MachineError, match="load the model again, in all processes"):
        exchange.norm(x, None, x[0], EPS, x)


@pytest.fixture
def boxes() -> list[Mailbox]:
    """Of two ranks that are two streams of one GPU."""
    K, dtype = 4096, torch.bfloat16
    slots = [
        torch.full(mailbox_shape(2, ROWS, K), EMPTY.value, dtype=INTEGERS[dtype.itemsize], device="cuda")
        for _ in range(2)
    ]
    peers = torch.tensor([one.data_ptr() for one in slots], device="cuda")
    return [
        Mailbox(slots[r], peers, torch.zeros(ROWS, dtype=torch.int32, device="cuda"), r, 20.0, slots)
        for r in range(2)
    ]


@gpu
def test_two_streams_of_a_gpu_get_the_sum(boxes):
    streams = [torch.cuda.Stream() for _ in boxes]
    K = boxes[0].slots.shape[-1]
    for stream in streams:  # what the calls allocate comes out of this
        with torch.cuda.stream(stream):
            torch.empty(2**16, dtype=torch.uint8, device="cuda")
    for call, (M, by_products) in enumerate(product(CALLS * 4, (False, True))):
        found = []
        given = [prepared(box, rank, call, M, K, torch.bfloat16) for rank, box in enumerate(boxes)]
        products = [product_of(rank, call, M, K, torch.bfloat16, "cuda") for rank in range(2)]
        maker = of_products if by_products else expected
        wanted = maker(2, call, M, K, torch.bfloat16, "cuda")
        torch.cuda.synchronize()  # while one stream waits for the other, nothing that would wait for it may be asked for
        for rank in (0, 1) if call % 2 else (1, 0):
            with torch.cuda.stream(streams[rank]):
                if by_products:
                    part = w4a16_decode(*products[rank], boxes[rank])
                    found.append(kernel.all_reduce_norm(part, *given[rank][1:], given=True))
                else:
                    found.append(kernel.all_reduce_norm(*given[rank]))
        torch.cuda.synchronize()
        assert_same(*found)
        for one in found:
            assert_as_by_the_norms_kernel(one, wanted)


def under_torchrun(what: str, folder: Path, K: int, seconds: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(Path(__file__).parent / "all_reduce_ranks.py")]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "QUANTKIT_TIMEOUT": str(seconds)}
    done = subprocess.run(
        [*command, what, str(folder), str(K)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@gpu
@two_gpus
@pytest.mark.parametrize("K", [4096, 8192])
def test_two_gpus_get_the_sum_and_what_the_library_gets(K, tmp_path):
    under_torchrun("on_gpus", tmp_path, K, 60)
    ranks = [torch.load(tmp_path / f"{rank}.pt", map_location="cuda:0") for rank in range(2)]
    for i, ((call, M), maker) in enumerate(product(enumerate(CALLS), (expected, of_products))):
        wanted = maker(2, call, M, K, torch.bfloat16, "cuda")
        assert_same(ranks[0][0][i], ranks[1][0][i])
        assert_as_by_the_norms_kernel(ranks[0][0][i], wanted)
    for (y, scales, h, *plain), other in zip(ranks[0][1], ranks[1][1], strict=True):
        assert_same((y, scales, h), other[:3])
        assert_as_by_the_norms_kernel((y, scales, h), plain)


@gpu
@two_gpus
def test_a_model_whose_products_give_their_rows_says_the_same(tmp_path):
    under_torchrun("answering", tmp_path, 8192, 60)
    for rank in range(2):
        (gives, keeps), gave = torch.load(tmp_path / f"{rank}.pt", map_location="cuda:0")
        assert gave == [False, True] * (2 * 3)  # o and down of three blocks, before the capture and in it
        assert torch.equal(gives, keeps)
        assert gives.isfinite().all()


def test_a_row_is_given_by_products_that_take_long_and_run_at_once():
    down = w4a16_kernel.config(1, 8192, 14336, 128)
    assert w4a16_kernel.giving_pays(down, 8192, 14336, 132)
    assert not w4a16_kernel.giving_pays(down, 8192, 14336, 114)  # two waves
    of_168_registers = down | {"max_registers": 0}  # it may have so many
    assert not w4a16_kernel.giving_pays(of_168_registers, 8192, 14336, 132)
    assert not w4a16_kernel.giving_pays(w4a16_kernel.config(1, 8192, 4096, 128), 8192, 4096, 132)


@gpu
@two_gpus
def test_a_process_whose_peer_never_comes_gets_an_error(tmp_path):
    under_torchrun("deserted", tmp_path, 4096, 5)
    seconds, error = torch.load(tmp_path / "deserted.pt")
    assert seconds < 60
    assert "CUDA error" in error
