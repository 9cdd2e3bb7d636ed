"""Time of the packed linears, shape by shape, beside the same product in bfloat16 and the device's limit.

Weights and inputs are random. A time is reported only with the error of the very kernel that was timed, and
withheld when that error is not of rounding's size.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from quantkit.eval.random_weights import STD, random_quantized
from quantkit.eval.records import Record, environment
from quantkit.eval.roofline import roof
from quantkit.eval.timing import Timing, time_launches
from quantkit.kernels.dispatch import target_of
from quantkit.linear import QuantLinear, kernel_of
from quantkit.scheme import Scheme

Shape = tuple[str, int, int]  # name, N, K

SHAPES: dict[str, list[Shape]] = {
    "llama-3-8b": [
        ("qkv", 6144, 4096),
        ("o", 4096, 4096),
        ("gate_up", 28672, 4096),
        ("down", 4096, 14336),
    ],
    "llama-3-70b": [
        ("qkv", 10240, 8192),
        ("o", 8192, 8192),
        ("gate_up", 57344, 8192),
        ("down", 8192, 28672),
    ],
}
WORKING_SET = 300_000_000  # bytes of distinct weights in one graph: five times the H200's L2
MOST_COPIES = 64
# ||y - x w^T|| / ||x w^T|| for standard normal x, by what x is rounded to, about twice what rounding alone gives:
# bfloat16 w and y 0.4 %; int8 one scale a row 0.9 %; e4m3 with its 3 bits of mantissa 2.6 %, static scales alike.
ERROR_BOUNDS = {None: 0.01, "int8": 0.02, "fp8": 0.05}


def bench_linears(
    shapes: Sequence[Shape],
    schemes: Sequence[Scheme],
    Ms: Sequence[int],
    device: torch.device | str,
    *,
    replays: int = 20,
    working_set: int = WORKING_SET,
    seed: int = 0,
    commit: str | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Times y = x w^T for bfloat16 x [M, K] and a packed w [N, K].

    Args:
        shapes: (name, N, K); `SHAPES` has real models', `model_shapes` finds a loaded one's.
        Ms: rows of x: sequences in decode, tokens in prefill.
        replays: samples a time.
        working_set: bytes of distinct weights that the launches of one sample go through.
        commit: see `records.environment`.
        on_record: called with each record as it is made.

    Returns:
        One record a (shape, scheme, M). `rel_error` is ||y - x w^T|| / ||x w^T|| with w as dequantized, x
        unrounded and the product in float64: for schemes that round x to 8 bits it holds that rounding too.
        `limit_us` counts each weight, input and output byte once, and is null on a CPU. Where `rel_error`
        exceeds `ERROR_BOUNDS`, the times are null and `refused` says why.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    limits, made_with = roof(device), environment(device, commit)
    records = []
    for name, N, K in shapes:
        xs = {M: torch.randn(M, K, generator=generator, device=device).bfloat16() for M in Ms}
        bf16 = {M: t for M, t, _ in time_bf16(N, K, xs, generator, replays, working_set)}
        for scheme in schemes:
            for M, timing, error, nbytes in time_scheme(scheme, N, K, xs, generator, replays, working_set):
                moved = nbytes + 2 * M * (N + K)
                eight_bit = scheme.activation is not None
                limit = limits.seconds(moved, 2 * M * N * K, eight_bit) * 1e6 if limits else None
                record = {
                    "kind": "linear",
                    "shape": name,
                    "N": N,
                    "K": K,
                    "M": M,
                    "scheme": scheme.label,
                    "group_size": scheme.group_size,
                    "kernel": kernel_of(scheme, target_of(device), M, N, K, torch.bfloat16),
                    "us": timing.us,
                    "p20_us": timing.p20_us,
                    "p80_us": timing.p80_us,
                    "limit_us": limit,
                    "limit_source": limits.source if limits else None,
                    "bf16_us": bf16[M].us,
                    "GB_per_s": moved / timing.us * 1e-3,
                    "TFLOP_per_s": 2 * M * N * K / timing.us * 1e-6,
                    "rel_error": error,
                    "x_dtype": "bfloat16",
                    **made_with,
                }
                record = withhold(record, ERROR_BOUNDS[scheme.activation])
                records.append(record)
                if on_record is not None:
                    on_record(record)
    return records


def withhold(record: Record, bound: float) -> Record:
    """The record without its times if its error is not of rounding's size (a nan is not)."""
    error = record["rel_error"]
    if error <= bound:
        return record
    times = dict.fromkeys(("us", "p20_us", "p80_us", "GB_per_s", "TFLOP_per_s"))
    finite = error if error < float("inf") else None
    return {**record, **times, "rel_error": finite, "refused": f"rel_error {error:.3g} exceeds {bound}"}


def time_scheme(
    scheme: Scheme,
    N: int,
    K: int,
    xs: dict[int, torch.Tensor],
    generator: torch.Generator,
    replays: int,
    working_set: int,
) -> Iterator[tuple[int, Timing, float, int]]:
    """Yields M, time, relative error and bytes of the packed weight, for each x [M, K]."""
    device = generator.device
    first = random_quantized(scheme, N, K, device, generator)
    others = [
        random_quantized(scheme, N, K, device, generator)
        for _ in range(copies(first.nbytes, working_set) - 1)
    ]
    modules = [QuantLinear.from_quantized(q).to(device) for q in (first, *others)]
    for module in modules:
        module.repack(torch.bfloat16)
    exact = first.dequantize(torch.float64)
    for M, x in xs.items():
        with torch.no_grad():
            error = relative_error(modules[0](x), x, exact)
        yield M, time_launches(launches(modules, x), device, replays), error, first.nbytes


def time_bf16(
    N: int,
    K: int,
    xs: dict[int, torch.Tensor],
    generator: torch.Generator,
    replays: int,
    working_set: int,
) -> Iterator[tuple[int, Timing, int]]:
    """Yields M, time and bytes of the weight of F.linear in bfloat16 (cuBLAS on NVIDIA), for each x [M, K]."""
    device = generator.device
    weights = [
        torch.randn(N, K, generator=generator, device=device, dtype=torch.bfloat16) * STD
        for _ in range(copies(2 * N * K, working_set))
    ]
    products = [lambda x, w=w: F.linear(x, w) for w in weights]
    for M, x in xs.items():
        yield M, time_launches(launches(products, x), device, replays), 2 * N * K


def launches(
    products: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor
) -> list[Callable[[], torch.Tensor]]:
    return [lambda product=product: product(x) for product in products]  # type: ignore[misc]


def copies(nbytes: int, working_set: int) -> int:
    """Distinct weights needed to pass `working_set` bytes."""
    return max(1, min(MOST_COPIES, working_set // nbytes + 1))


def relative_error(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """||y - x w^T|| / ||x w^T|| in float64, for y [M, N], x [M, K] and float64 w [N, K]."""
    expected = x.double() @ w.T
    return ((y.double() - expected).norm() / expected.norm()).item()


def model_shapes(model: nn.Module) -> list[Shape]:
    """The distinct shapes of a model's packed linears, each under the last parts of the names that have it."""
    names: dict[tuple[int, int], list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            known = names.setdefault((module.out_features, module.in_features), [])
            if (last := path.rpartition(".")[2]) not in known:
                known.append(last)
    return [("+".join(last), N, K) for (N, K), last in names.items()]
