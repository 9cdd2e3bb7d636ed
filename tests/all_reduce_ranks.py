"""What each process of test_kernels_all_reduce_norm.py does: calls of the kernel, in the interpreter over memory that is a file, or
on a GPU of its own over symmetric memory."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from quantkit import processes
from quantkit.kernels import all_reduce_norm as kernel
from quantkit.kernels import rms_norm
from quantkit.kernels import w4a16_decode as decode_kernel
from quantkit.kernels.all_reduce_norm import (
    EMPTY,
    INTEGERS,
    Mailbox,
    all_reduce_norm,
    mailbox_shape,
)
from quantkit.kernels.cpu import FP8
from quantkit.kernels.int4tiles import pack_tiles
from quantkit.kernels.w4a16_decode import w4a16_decode
from rounding import Random

EPS = 1e-5
ROWS = 4
CALLS = (1, 4, 3, 1, 1, 4, 2, 1)  # rows of each, so that rows are at different calls
IN = 192  # columns that a rank's part of a product has
ROUNDING: tuple[Any, ...] = (None, torch.int8, FP8)


def parts(rank: int, call: int, M: int, K: int, dtype: torch.dtype) -> Tensor:
    """This rank's; with NaNs in the first row of one call, all bits of which are ones: as an empty slot has them."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(100 * call + rank)).to(dtype)
    if call == 2 and rank == 1:
        x.view(INTEGERS[dtype.itemsize])[0, 3:9] = EMPTY.value
    return x


def given(call: int, M: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight, residual, and a bias or none: the same on all ranks."""
    g = torch.Generator().manual_seed(call)
    weight, bias = 1 + 0.3 * torch.randn(2, K, generator=g)
    residual = torch.randn(M, K, generator=g)
    return weight.to(dtype), residual.to(dtype), bias.to(dtype) if call % 2 else None


def expected(ranks: int, call: int, M: int, K: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """By a float32 sum in the order of ranks, and the norm's own kernel."""
    return normed([parts(rank, call, M, K, dtype).to(device) for rank in range(ranks)], call)


def normed(those: Sequence[Tensor], call: int) -> tuple[Tensor, ...]:
    """The norm's own kernel, of the ranks' parts of a call."""
    (M, K), dtype, device = those[0].shape, those[0].dtype, those[0].device
    total = torch.zeros(M, K, device=device)
    for one in those:
        total += one.float()
    weight, residual, bias = (t if t is None else t.to(device) for t in given(call, M, K, dtype))
    x = total.to(dtype)
    x = x if bias is None else x + bias
    to = ROUNDING[call % len(ROUNDING)]
    return rms_norm.rms_norm_triton(x, weight, EPS, residual, to, None, 0)


def prepared(box: Mailbox, rank: int, call: int, M: int, K: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of one call, where the mailbox is."""
    device = box.slots.device
    weight, residual, bias = (t if t is None else t.to(device) for t in given(call, M, K, dtype))
    x = parts(rank, call, M, K, dtype).to(device)
    return x, box, bias, weight, EPS, residual, ROUNDING[call % len(ROUNDING)]


def one_call(box: Mailbox, rank: int, call: int, M: int, K: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return all_reduce_norm(*prepared(box, rank, call, M, K, dtype))


def empty_files(folder: Path, ranks: int, K: int, dtype: torch.dtype) -> None:
    size = torch.Size(mailbox_shape(ranks, ROWS, K)).numel() * dtype.itemsize
    for rank in range(ranks):
        (folder / str(rank)).write_bytes(b"\xff" * size)


def in_a_file(folder: str, rank: int, ranks: int, K: int, dtype: torch.dtype) -> Mailbox:
    """A mailbox whose slots lie in a file, as do the other ranks', which were written to be EMPTY."""
    shape = mailbox_shape(ranks, ROWS, K)
    whole = INTEGERS[dtype.itemsize]
    size = torch.Size(shape).numel()
    slots = [torch.from_file(f"{folder}/{r}", shared=True, size=size, dtype=whole) for r in range(ranks)]
    peers = torch.tensor([one.data_ptr() for one in slots])
    calls = torch.zeros(ROWS, dtype=torch.int32)
    return Mailbox(slots[rank].view(shape), peers, calls, rank, 600.0, slots)


def product_of(rank: int, call: int, M: int, N: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """What `w4a16_decode` takes on a rank: x with a NaN in the first row of one call, and the tiles of its weight.

    Calls are launched by turns as whole tiles and as tiles that programs share.
    """
    random = Random(torch.Generator().manual_seed(100 * call + rank))
    x = random.x(M, IN, dtype)
    if call == 2 and rank == 1:
        x[0, 3] = float("nan")
    codes, groups = random.int4(N, IN), IN // 32
    weight = pack_tiles(codes, random.scales(N, groups, dtype=dtype), random.zeros(N, groups), 32, IN)
    launch = dict(rows=1, warps_n=1, warps_k=2, depth=1, stages=1, programs=5 * (call % 2), max_registers=0)
    return *(t.to(device) for t in (x, *weight)), None, None, 32, N, False, launch


def of_products(ranks: int, call: int, M: int, K: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """As `expected`, where the parts are the products of `product_of` and calls follow those of `CALLS`."""
    return normed([w4a16_decode(*product_of(rank, call, M, K, dtype, device)) for rank in range(ranks)], call)


def call_after_product(
    box: Mailbox, rank: int, call: int, M: int, K: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """A call whose parts the product before it gives."""
    device = box.slots.device
    _, _, *rest = prepared(box, rank, call, M, K, dtype)
    part = w4a16_decode(*product_of(rank, call, M, K, dtype, str(device)), box)
    return all_reduce_norm(part, box, *rest, given=True)


def main(rank: int, folder: str, K: int, dtype: str) -> None:
    """In the interpreter: one rank's calls, with waits that make now one rank the slower one, now another."""
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 2:  # they are not waited for all at once
        kernel.AWAITED_BYTES = 2 * triton.next_power_of_2(K) * getattr(torch, dtype).itemsize
    box = in_a_file(folder, rank, ranks, K, getattr(torch, dtype))
    found = []
    for call, M in enumerate(CALLS):
        time.sleep(0.03 * ((call + rank) % ranks))
        found.append(one_call(box, rank, call, M, K, getattr(torch, dtype)))
        if dtype == "float16":  # what the products take
            found.append(call_after_product(box, rank, call, M, K, torch.float16))
    torch.save(found, Path(folder) / f"{rank}.pt")


def on_gpus(folder: str, K: int) -> None:
    """Under torchrun: by the exchange that a model opens, eager and then as a replayed CUDA graph, beside the library's sum."""
    from quantkit.exchange import Exchange, open_exchange

    processes.start("cuda")
    rank, device, dtype = (
        torch.distributed.get_rank(),
        torch.device("cuda", torch.cuda.current_device()),
        torch.bfloat16,
    )
    group = torch.distributed.group.WORLD
    exchange = open_exchange(group, K, dtype, device)
    assert exchange.mailbox is not None, exchange.why_not
    box = exchange.mailbox
    found = [
        one(box, rank, call, M, K, dtype)
        for call, M in enumerate(CALLS)
        for one in (one_call, call_after_product)
    ]
    M, rows = 4, []
    norm_weight, residual, _ = (t if t is None else t.to(device) for t in given(0, M, K, dtype))
    x = torch.empty(M, K, device=device, dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        exchange.norm(x.zero_(), None, norm_weight, EPS, residual)
    torch.cuda.current_stream().wait_stream(stream)
    decode_kernel.giving_pays = lambda *_: True
    x_of_product, *weight, _, _, group_size, _, _, _ = product_of(rank, 0, 1, K, dtype, str(device))

    def of_norm() -> tuple[Tensor, ...]:
        return x, *exchange.norm(x, None, norm_weight, EPS, residual)

    def of_product() -> tuple[Tensor, ...]:
        part = exchange.product(x_of_product, *weight, group_size)
        assert part is not None
        return part, *exchange.norm(part, None, norm_weight, EPS, residual[:1], given=True)

    ways = (
        (of_norm, x, lambda call: parts(rank, call, M, K, dtype)),
        (of_product, x_of_product, lambda call: product_of(rank, call, 1, K, dtype, str(device))[0]),
    )
    for run, read, fresh in ways:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(3):
                part, *results = run()
        for call in range(20):
            read.copy_(fresh(call))
            if call % 2 == rank % 2:
                torch.cuda._sleep(200_000)
            graph.replay()
            plain = Exchange(group).norm(part.clone(), None, norm_weight, EPS, residual[: len(part)])
            rows.append((*(t.clone() for t in results), *plain))
    torch.cuda.synchronize()
    torch.save((found, rows), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def answering(folder: str, K: int) -> None:
    """Under torchrun: logits of a few steps of a wide model, whose down gives its rows itself, and then leaves it to the norm."""
    from transformers import LlamaConfig

    from quantkit import optimize
    from quantkit.eval.decode import OptimizedDecoder
    from quantkit.eval.random_model import random_model
    from quantkit.exchange import Exchange
    from quantkit.scheme import parse_scheme

    processes.start("cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = {"hidden_size": K, "intermediate_size": 28672, "num_attention_heads": K // 128}
    config = LlamaConfig(**sizes, num_key_value_heads=8, num_hidden_layers=3, vocab_size=512)
    scheme, group = parse_scheme("w4a16-g128"), torch.distributed.group.WORLD
    model = optimize(random_model(config, scheme, device=device, group=group))
    prompt = torch.arange(24, device=device).view(1, 24)
    product, given = Exchange.product, []

    def counted(self: Exchange, x: Tensor, *weight: Any) -> Tensor | None:
        y = product(self, x, *weight)
        if x.numel() == x.shape[-1]:  # a step, not the prompt
            given.append(y is not None)
        return y

    found = []
    for way in (counted, lambda *_: None):
        Exchange.product = way
        model.free_cache()
        decoder = OptimizedDecoder(model, prompt, 12)
        decoder.prefill(prompt)
        steps = []
        for _ in range(10):
            steps.append(decoder.decoder.step(decoder.token[:, 0]).clone())
            decoder.token[:, 0] = steps[-1].argmax(-1)
        found.append(torch.stack(steps))
    torch.save((found, given), Path(folder) / f"{torch.distributed.get_rank()}.pt")
    del decoder  # and its graph: NCCL, which joins the tokens' logits, would wait for it
    model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.free_cache()
    torch.distributed.destroy_process_group()


def deserted(folder: str, K: int) -> None:
    """Under torchrun: what the first process gets, and after how many seconds, where the other one never calls."""
    from quantkit.exchange import open_exchange

    processes.start("cuda")
    rank, device = torch.distributed.get_rank(), torch.device("cuda", torch.cuda.current_device())
    box = open_exchange(None, K, torch.bfloat16, device).mailbox
    noted, began, error = Path(folder) / "deserted.pt", time.monotonic(), ""
    assert box is not None
    if rank == 0:
        try:
            one_call(box, rank, 0, 1, K, torch.bfloat16)
            torch.cuda.synchronize()
        except RuntimeError as raised:
            error = str(raised)
        torch.save((time.monotonic() - began, error), noted)
    while not noted.exists() and time.monotonic() - began < 120:
        time.sleep(0.1)
    os._exit(0)  # the first one's device is lost


if __name__ == "__main__":
    {"on_gpus": on_gpus, "answering": answering, "deserted": deserted}[sys.argv[1]](
        sys.argv[2], int(sys.argv[3])
    )
