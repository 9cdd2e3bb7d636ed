"""Time of the packed linears, shape by shape, beside the same product in bfloat16, peers and the device's limit.

Weights and inputs are random. A time is reported only with the error of the very kernel that was timed, and
withheld when that error is not of rounding's size.
"""

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

from quantkit.eval.peers import Peer, Product, present
from quantkit.eval.random_weights import STD, random_quantized
from quantkit.eval.records import Record, environment, version
from quantkit.eval.roofline import Roof, roof
from quantkit.eval.timing import Timing, time_launches
from quantkit.kernels.cpu import quantize_activations
from quantkit.kernels.dispatch import target_of
from quantkit.linear import QuantLinear, kernel_of
from quantkit.packing import QuantizedTensor
from quantkit.scheme import Scheme
from quantkit.source import first_line

Shape = tuple[str, int, int]  # name, N, K
Measured = tuple[int, Timing, float, Record]  # M, time, relative error, the fields that say what was timed

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
ROUNDED = "x in 8 bits"  # the variant of a product alone, of x that is rounded beforehand
EPS = 1e-5  # of the norm before a product
# ||y - x w^T|| / ||x w^T|| for standard normal x, by what x is rounded to, about twice what rounding alone gives:
# bfloat16 w and y 0.4 %; int8 one scale a row 0.9 %; e4m3 with its 3 bits of mantissa 2.6 %, static scales alike.
ERROR_BOUNDS = {None: 0.01, "int8": 0.02, "fp8": 0.05}


def two_sizes(text: str) -> tuple[int, int]:
    """The numbers of an argument such as 16x4096; argparse says it where there are none."""
    first, second = text.split("x")
    return int(first), int(second)


def a_device(text: str) -> str:
    """A device that is there; argparse says it where none is."""
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentTypeError("PyTorch sees no GPU here; give --device cpu")
    return text


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
    peers: Sequence[Peer] = (),
    say: Callable[[str], None] = print,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Times y = x w^T for bfloat16 x [M, K] and a packed w [N, K].

    Args:
        shapes: (name, N, K); `SHAPES` has real models', `model_shapes` finds a loaded one's.
        Ms: rows of x: sequences in decode, tokens in prefill.
        replays: samples a time.
        working_set: bytes of distinct weights that the launches of one sample go through.
        commit: see `records.environment`.
        peers: other libraries' kernels to time on the same weights, where they can be imported.
        say: told what could not be timed.
        on_record: called with each record as it is made.

    Returns:
        One record a (shape, scheme, M), and one more a peer of the scheme, whose `library` is named; two more for
        8-bit activations (a peer has one), whose `variant` says where x is rounded, and for `fp8` a third,
        `set_fp8_accumulation`'s fast mode. `rel_error` is ||y - x w^T|| / ||x w^T|| with w as dequantized, x unrounded
        and the product in float64: for schemes that round x to 8 bits it holds that rounding too.
        `limit_us` counts each weight, input and output byte once, and is null on a CPU. Where `rel_error`
        exceeds `ERROR_BOUNDS`, the times are null and `refused` says why.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    limits, made_with = roof(device), environment(device, commit)
    peers = present(peers, schemes, device, say)
    records = []
    for name, N, K in shapes:
        xs = {M: torch.randn(M, K, generator=generator, device=device).bfloat16() for M in Ms}
        bf16 = time_bf16(N, K, xs, generator, replays, working_set)
        for scheme in schemes:
            weights = random_copies(scheme, N, K, generator, working_set)
            exact = weights[0].dequantize(torch.float64)
            theirs = [time_peer(p, weights, exact, xs, replays, say) for p in peers if p.scheme == scheme]
            for M, timing, error, timed in chain(time_ours(weights, exact, xs, replays), *theirs):
                record = {
                    "kind": "linear",
                    "shape": name,
                    "N": N,
                    "K": K,
                    "M": M,
                    "scheme": scheme.label,
                    "group_size": scheme.group_size,
                    **timed,
                    **speeds(weights[0], M, timing, limits),
                    "bf16_us": bf16[M].us,
                    "rel_error": error,
                    **made_with,
                }
                record = withhold(record, ERROR_BOUNDS[scheme.activation])
                records.append(record)
                if on_record is not None:
                    on_record(record)
    return records


def speeds(q: QuantizedTensor, M: int, timing: Timing, limits: Roof | None) -> Record:
    """The fields of a record that follow from the time of one product with x [M, K]."""
    N, K = q.shape
    moved, operations = q.nbytes + 2 * M * (N + K), 2 * M * N * K
    eight_bit = q.scheme.activation is not None
    return {
        "us": timing.us,
        "p20_us": timing.p20_us,
        "p80_us": timing.p80_us,
        "limit_us": limits.seconds(moved, operations, eight_bit) * 1e6 if limits else None,
        "limit_source": limits.source if limits else None,
        "GB_per_s": moved / timing.us * 1e-3,
        "TFLOP_per_s": operations / timing.us * 1e-6,
    }


def withhold(record: Record, bound: float) -> Record:
    """The record without its times if its error is not of rounding's size (a nan is not)."""
    error = record["rel_error"]
    if error <= bound:
        return record
    times = dict.fromkeys(("us", "p20_us", "p80_us", "GB_per_s", "TFLOP_per_s"))
    finite = error if error < float("inf") else None
    return {**record, **times, "rel_error": finite, "refused": f"rel_error {error:.3g} exceeds {bound}"}


def time_text(record: Record, digits: int = 1) -> str:
    """A record's time for a line of output, and the limit if it has one."""
    if record["us"] is None:
        return "withheld"
    limit = record.get("limit_us")
    return f"{record['us']:.{digits}f} us" + ("" if limit is None else f", limit {limit:.{digits}f}")


def random_copies(
    scheme: Scheme, N: int, K: int, generator: torch.Generator, working_set: int
) -> list[QuantizedTensor]:
    """Different weights of one shape, together larger than `working_set`."""
    first = random_quantized(scheme, N, K, generator.device, generator)
    others = range(copies(first.nbytes, working_set) - 1)
    return [first, *(random_quantized(scheme, N, K, generator.device, generator) for _ in others)]


def time_ours(
    weights: Sequence[QuantizedTensor], exact: torch.Tensor, xs: dict[int, torch.Tensor], replays: int
) -> Iterator[Measured]:
    """QuantLinear on each x [M, K]; `exact` is the first weight, float64 [N, K]."""
    device = exact.device
    modules = [QuantLinear.from_quantized(q).to(device) for q in weights]
    for module in modules:
        module.repack(torch.bfloat16)
    scheme, (N, K) = weights[0].scheme, weights[0].shape
    for M, x in xs.items():
        kernel = kernel_of(scheme, target_of(device), M, N, K, torch.bfloat16)
        timed = {"kernel": kernel, "x_dtype": "bfloat16"}
        yield M, *measure(modules, x, exact, replays), timed
        if scheme.op in ("w8a8", "fp8_block", "w4a8") and scheme.activation_scale != "static":
            alone, fused = rounded_products(modules, x)
            for variant, products in alone.items():
                yield M, *measure(products, x, exact, replays), timed | {"variant": variant}
            error = relative_error(fused[0](x), rms_norm(x), exact)
            timing = time_launches(launches(fused, x), device, replays)
            yield M, timing, error, timed | {"variant": "after residual and norm"}


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def rounded_products(
    modules: Sequence[QuantLinear], x: torch.Tensor
) -> tuple[dict[str, list[Product]], list[Product]]:
    """Products of x that is rounded already, by variant, and of what residual + RMS norm + rounding in one kernel make
    of x."""
    scheme, rounding = modules[0].scheme, modules[0].rounding
    assert rounding is not None
    dtype, _, group_size = rounding
    ready = quantize_activations(x, dtype, group_size=group_size)
    weight, residual = torch.ones_like(x[0]), torch.zeros_like(x)

    def after_norm(x: torch.Tensor, m: QuantLinear) -> torch.Tensor:
        x_codes, x_scales, _ = torch.ops.quantkit.rms_norm_quantize(x, weight, EPS, residual, *rounding)
        return m.of_rounded(x_codes, x_scales, x.dtype)

    def alone(x: torch.Tensor, m: QuantLinear, fast: bool = False) -> torch.Tensor:
        return m.of_rounded(ready[0], ready[1], x.dtype, fast)

    variants: dict[str, list[Product]] = {ROUNDED: [partial(alone, m=m) for m in modules]}
    if scheme.op == "w8a8" and scheme.weight == "fp8":
        variants[f"{ROUNDED}, fast sums"] = [partial(alone, m=m, fast=True) for m in modules]
    return variants, [partial(after_norm, m=m) for m in modules]


def time_peer(
    peer: Peer,
    weights: Sequence[QuantizedTensor],
    exact: torch.Tensor,
    xs: dict[int, torch.Tensor],
    replays: int,
    say: Callable[[str], None],
) -> Iterator[Measured]:
    """Another library's kernel on the same weights and inputs. An M at which it fails is named and left out."""
    timed = {
        "kernel": peer.name,
        "library": f"{peer.library} {version(peer.library)}",
        "x_dtype": str(peer.x_dtype).removeprefix("torch."),
        **({"variant": ROUNDED} if peer.rounded else {}),
    }
    where = f"{peer.name} {weights[0].scheme.label} {weights[0].shape}"
    try:
        products = [peer.build(q) for q in weights]
    except Exception as failure:  # of any kind, here and below: the run goes on
        say(f"{where}: {first_line(failure)}")
        return
    for M, x in xs.items():
        if peer.max_M is not None and M > peer.max_M:
            continue
        try:
            of_x = of_rounded(products, x, weights[0].codes.dtype) if peer.rounded else products
            timing, error = measure(of_x, x.to(peer.x_dtype), exact, replays)
        except Exception as failure:
            say(f"{where}, M = {M}: {first_line(failure)}")
        else:
            yield M, timing, error, timed


def of_rounded(products: Sequence[Product], x: torch.Tensor, dtype: torch.dtype) -> list[Product]:
    """Products of x's codes in a dtype and their scales -> products of this x alone, rounded before they are called."""
    ready = quantize_activations(x, dtype)
    return [lambda x, product=product: product(*ready) for product in products]


def measure(
    products: Sequence[Product], x: torch.Tensor, exact: torch.Tensor, replays: int
) -> tuple[Timing, float]:
    """Time of one of equivalent products with x [M, K], and the relative error of the first, whose weight is `exact`."""
    with torch.no_grad():
        error = relative_error(products[0](x), x, exact)
    return time_launches(launches(products, x), x.device, replays), error


def time_bf16(
    N: int,
    K: int,
    xs: dict[int, torch.Tensor],
    generator: torch.Generator,
    replays: int,
    working_set: int,
) -> dict[int, Timing]:
    """Time of F.linear in bfloat16 (cuBLAS on NVIDIA) for each x [M, K]."""
    device = generator.device
    weights = [
        torch.randn(N, K, generator=generator, device=device, dtype=torch.bfloat16) * STD
        for _ in range(copies(2 * N * K, working_set))
    ]
    products = [lambda x, w=w: F.linear(x, w) for w in weights]
    return {M: time_launches(launches(products, x), device, replays) for M, x in xs.items()}


def launches(products: Sequence[Product], x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
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
