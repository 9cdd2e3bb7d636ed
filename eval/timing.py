"""Time of one launch: the median over replays of a CUDA graph of many, or of wall-clock calls on a CPU."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

WARMUP = 3  # replays before the clock starts, so that the GPU has left its idle clocks
LAUNCHES = 32  # in a graph: its own start-up takes several microseconds, ...
SAMPLE = 2e-3  # ... so fewer that take so many seconds do; long runs of large products slow a card down


@dataclass(frozen=True)
class Timing:
    """Microseconds a launch: median, 20th and 80th percentile."""

    us: float
    p20_us: float
    p80_us: float


def time_launches(
    launches: Sequence[Callable[[], Any]], device: torch.device, replays: int = 20, sample: float = SAMPLE
) -> Timing:
    """Time of one of L equivalent launches.

    Args:
        launches: closures over distinct weights, together larger than the cache, or the weights of a
            repeated launch would be served from it.
        replays: samples. On CUDA a sample is one replay of a graph that goes round the L until it holds `LAUNCHES` or
            takes `sample` seconds, divided by what it holds; on a CPU it is one call.
        sample: infinite where processes have to launch alike: each has its own clock.
    """
    if device.type == "cuda":
        seconds = graph_seconds(launches, device, replays, sample)
    else:
        seconds = call_seconds(launches, replays)
    ordered = sorted(seconds)
    at = lambda share: ordered[round(share * (len(ordered) - 1))] * 1e6
    return Timing(at(0.5), at(0.2), at(0.8))


def graph_seconds(
    launches: Sequence[Callable[[], Any]], device: torch.device, replays: int, sample: float = SAMPLE
) -> list[float]:
    """Seconds a launch in each replay of one graph of whole rounds of the launches."""

    def graph_of(rounds: int) -> torch.cuda.CUDAGraph:
        def run() -> None:
            # nothing keeps the outputs: all launches write to the same memory
            for launch in [*launches] * rounds:
                launch()

        return capture(run)

    with torch.cuda.device(device), torch.no_grad():
        graph, rounds = graph_of(1), 1
        replay_seconds(graph)
        enough = min(LAUNCHES, sample * len(launches) / replay_seconds(graph))
        if enough > len(launches):
            rounds = math.ceil(enough / len(launches))
            graph = graph_of(rounds)
        for _ in range(WARMUP):
            graph.replay()
        return [replay_seconds(graph) / (rounds * len(launches)) for _ in range(replays)]


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one replay, by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def capture(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `run`, which is first run eagerly: compilation and lazy repacking cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # another thread, which NCCL has, may ask for events meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


@torch.no_grad()
def call_seconds(launches: Sequence[Callable[[], Any]], replays: int) -> list[float]:
    """Seconds of each of `replays` calls, cycling through the launches."""
    for launch in launches[:2]:
        launch()
    samples = []
    for i in range(replays):
        start = time.perf_counter()
        launches[i % len(launches)]()
        samples.append(time.perf_counter() - start)
    return samples


def synchronized_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Wall-clock seconds of each of `repeats` runs after one unmeasured, waiting for the device at both ends."""
    run()
    return [seconds_of_one(run, device) for _ in range(repeats)]


def seconds_of_one(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of a run, waiting for the device at both ends."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
