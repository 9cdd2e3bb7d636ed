"""Tables of measured launches: what is worth timing, what is chosen, what is written, and how a table is obeyed."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.errors import QuantKitError
from quantkit.eval import tune as tuner
from quantkit.eval.linears import random_copies
from quantkit.eval.timing import Timing
from quantkit.eval.tune import Candidate, Trial, least_M, merged, save, tunable, tune
from quantkit.kernels import (
    cpu,
    dispatch,
    ops,
    stream_k,
    tuned,
    w4a8_hopper,
    w4a16,
    w4a16_decode,
    w4a16_wide,
    w8_hopper,
)
from quantkit.kernels.dispatch import KERNELS, Kernel, Problem, choose
from quantkit.kernels.int4tiles import pack_tiles
from quantkit.kernels.tuned import TableError
from quantkit.linear import kernel_of
from quantkit.scheme import PRESETS, parse_scheme

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPES = [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (57344, 8192), (48, 256), (130, 100)]
MODULES = {"w4a16_decode": w4a16_decode, "w4a16_wide": w4a16_wide}
INT8, FP8 = torch.int8, torch.float8_e4m3fn
DECODE = w4a16_decode.config(1, 4096, 4096, 128)
WIDE = w4a16_wide.config(64, 4096, 4096, 128)
W8 = w8_hopper.config(64, 4096, 4096)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder of tables, and nothing chosen before."""
    monkeypatch.setenv("QUANTKIT_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    dispatch.forget()
    yield tmp_path / "tuned"
    dispatch.forget()


def entry(M: int, kernel: str = "w4a16_decode", launch: dict | None = None, **changes) -> dict:
    return {
        "op": "w4a16_tiles",
        "N": 4096,
        "K": 4096,
        "group_size": 128,
        "M": M,
        "kernel": kernel,
        "launch": DECODE if launch is None else launch,
        "us": 1.0,
    } | changes


def write(path, *entries, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"entries": entries, **more}))
    dispatch.forget()


def chosen(M: int, group_size: int = 128, target: str = "sm_89") -> tuple[str, dict | None]:
    kernel, launch = choose(
        "w4a16_tiles", Problem(target, M, 4096, 4096, torch.bfloat16, torch.int32, group_size)
    )
    return kernel.name, launch


# candidates


@pytest.mark.parametrize("name", MODULES)
def test_a_launch_has_the_parameters_that_dispatch_names(name):
    (kernel,) = (kernel for kernel in KERNELS["w4a16_tiles"] if kernel.name == name)
    for M in (1, 8, 16) if name == "w4a16_decode" else (1, 16, 64, 4096):
        for N, K in SHAPES:
            for group_size in (0, 32, 64, 128):
                found = MODULES[name].candidates(M, N, K, group_size)
                assert found[0] == MODULES[name].config(M, N, K, group_size)
                assert 1 <= len(found) <= 24
                assert all(set(launch) == set(kernel.parameters) for launch in found)
                assert len({tuple(launch.values()) for launch in found}) == len(found)


def test_no_program_of_a_candidate_is_without_work():
    for N, K in SHAPES:
        for M in (1, 16):
            for launch in w4a16_decode.candidates(M, N, K, 128, multiprocessors=132):
                tiles = -(-N // (16 * launch["rows"] * launch["warps_n"]))
                steps = math.ceil(math.ceil(K / 128) / (launch["warps_k"] * launch["depth"]))
                assert launch["programs"] <= tiles * steps


def test_candidates_follow_the_number_of_multiprocessors():
    few, many = (w4a16_decode.candidates(16, 28672, 4096, 128, mp) for mp in (24, 132))
    assert 4 * 24 in {launch["programs"] for launch in few}
    assert 4 * 132 in {launch["programs"] for launch in many}


@pytest.mark.parametrize("M", [16, 32, 64, 128, 4096])
def test_the_sums_and_inputs_of_a_wide_candidate_fit(M):
    found = w4a16_wide.candidates(M, 4096, 4096, 128)
    for launch in found:
        threads = launch["warps"] * 32
        sums = launch["rows"] * 16 * launch["warps"] * launch["block_m"] / threads
        assert sums <= 128
        assert launch["stages"] * launch["tiles"] * 64 * launch["block_m"] * 2 <= 200 * 2**10
    widest = min(256, max(32, M))
    assert {launch["block_m"] for launch in found} <= {widest, widest // 2, widest // 4}
    assert widest in {launch["block_m"] for launch in found}


@pytest.mark.parametrize(("x_bytes", "blocks"), [(1, False), (1, True), (2, False)])
@pytest.mark.parametrize("M", [1, 8, 9, 16, 64, 65, 128, 129, 300, 1024, 4096])
def test_launches_of_8_bits_are_worth_their_time(M, x_bytes, blocks):
    (kernel,) = (kernel for kernel in KERNELS["fp8_block"] if kernel.name == "fp8_block_hopper")
    for N, K in [*SHAPES[:5], (8, 16), (336, 272)]:
        for multiprocessors in (78, 132):
            found = w8_hopper.candidates(M, N, K, x_bytes, blocks, multiprocessors)
            assert found[0] == w8_hopper.config(M, N, K, x_bytes, blocks, multiprocessors)
            assert 1 <= len(found) <= 25
            assert all(set(launch) == set(kernel.parameters) for launch in found)
            assert len({tuple(sorted(launch.items())) for launch in found}) == len(found)
            for launch in found[1:]:
                tiles = w8_hopper.tiles_of(launch, M, N)
                programs = launch["programs"] or tiles
                assert launch["stages"] >= 3
                x_left = w8_hopper.x_is_left(M, blocks)
                assert w8_hopper.shared_bytes(launch, x_bytes, x_left) <= w8_hopper.SHARED
                assert launch["block_m" if x_left else "block_n"] in (64, 128)
                assert programs <= tiles * -(-K // 128)
                assert tiles % programs == 0 or 2 * tiles <= stream_k.COUNTERS


@pytest.mark.parametrize("M", [1, 8, 9, 16, 64, 65, 128, 129, 300, 1024, 4096])
def test_launches_of_w4a8_are_worth_their_time(M):
    (kernel,) = (kernel for kernel in KERNELS["w4a8_interleaved"] if kernel.name == "w4a8_hopper")
    for N, K in [*SHAPES[:5], (16, 16), (336, 272)]:
        for multiprocessors in (78, 132):
            found = w4a8_hopper.candidates(M, N, K, multiprocessors)
            assert found[0] == w4a8_hopper.config(M, N, K, multiprocessors)
            assert 1 <= len(found) <= 25
            assert all(set(launch) == set(kernel.parameters) for launch in found)
            assert len({tuple(sorted(launch.items())) for launch in found}) == len(found)
            for launch in found[1:]:
                tiles = w4a8_hopper.tiles_of(launch, M, N)
                programs = launch["programs"] or tiles
                assert launch["stages"] >= 3
                assert w4a8_hopper.shared_bytes(launch) <= w4a8_hopper.SHARED
                assert programs <= tiles * -(-K // 128)
                assert tiles % programs == 0 or 2 * tiles <= stream_k.COUNTERS


def distinct(launches: list[dict], *names: str) -> list[dict]:
    """One launch of each way to compute: those that differ in registers or stages are the same in the interpreter."""
    return list(
        {tuple(v for k, v in launch.items() if k not in names): launch for launch in launches}.values()
    )


CASES = [  # few tiles: launches with many programs are made for few multiprocessors
    *(
        ("w4a16_decode", M, launch)
        for M in (3, 11)
        for launch in distinct(w4a16_decode.candidates(M, 80, 1024, 128, 1), "max_registers")
    ),
    *(("w4a16_wide", 33, launch) for launch in distinct(w4a16_wide.candidates(33, 80, 1024, 128), "stages")),
]


@pytest.mark.parametrize(("name", "M", "launch"), CASES, ids=str)
def test_a_candidate_computes_the_product(name, M, launch):
    N, K, group_size = 80, 1024, 128
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31, (N, K // 8), generator=generator).to(DEVICE, torch.int32)
    scales = (torch.rand(N, K // group_size, generator=generator) * 0.02 + 0.001).to(DEVICE, torch.bfloat16)
    x = torch.randn(M, K, generator=generator).to(DEVICE, torch.float16)
    tiles, tile_scales, zeros = pack_tiles(codes, scales, None, group_size, K)
    y = getattr(MODULES[name], name)(
        x, tiles, tile_scales, zeros, None, None, group_size, N, False, launch=launch
    )
    expected = w4a16.reference(x, codes, scales, None, None, group_size)
    w = w4a16.dequantize(codes, scales, None, group_size, K)
    unit = 2.0**-11
    rounded = 3 * unit if name == "w4a16_wide" else 0
    bound = unit * expected.abs() + (rounded + (K + 8) * 2**-23) * (x.double().abs() @ w.abs().T) + 2**-25
    assert ((y.double() - expected).abs() / bound).max() <= 1


# choosing


class Timed:
    """Stands for the GPU: `us[label]` is the time of a launch, noted in `calls`."""

    def __init__(self, monkeypatch, us: dict[str, float]):
        self.calls: list[tuple[str, int]] = []

        def time_launches(launches, device, replays):
            label = launches[0].func.__self__.kernel.name
            self.calls.append((label, replays))
            return Timing(us[label], us[label], us[label])

        monkeypatch.setattr(tuner, "time_launches", time_launches)


def trial(said: list[str], M: int = 2) -> Trial:
    """The product of x with the identity: right if y is x."""
    x = torch.randn(M, 8, generator=torch.Generator().manual_seed(0))
    return Trial(x, [(None, None, None, 0, 8)] * 3, x.double(), "(8, 8) M = 2", said.append)


def fake(monkeypatch, name: str, run=lambda x, *rest: x) -> Candidate:
    monkeypatch.setattr(dispatch, "_load", lambda module, name: runs[name])
    runs = fake.runs  # type: ignore[attr-defined]
    runs[name] = run
    return Candidate(Kernel(name, name, lambda problem: None), {})


@pytest.fixture(autouse=True)
def _no_fakes():
    fake.runs = {}  # type: ignore[attr-defined]


def test_the_fastest_wins_and_only_the_best_are_timed_twice(monkeypatch):
    us = {f"k{i}": float(20 - i) for i in range(9)}
    timed, said, steps = Timed(monkeypatch, us), [], []
    found = trial(said).best([fake(monkeypatch, name) for name in us], 20, lambda: steps.append(1))
    assert found is not None
    best, fastest, default = found
    assert (best.kernel.name, fastest, default) == ("k8", 12.0, 20.0)
    assert [call[0] for call in timed.calls if call[1] == tuner.QUICK_REPLAYS] == [*us]
    assert [call[0] for call in timed.calls if call[1] == 20] == ["k0", "k4", "k5", "k6", "k7", "k8"]
    assert len(steps) == 9
    assert not said


def test_what_fails_or_is_wrong_is_left_out_with_a_line(monkeypatch):
    def crash(x, *rest):
        raise RuntimeError("out of resource: shared memory\nmore")

    def one_element(x, *rest):
        y = x.clone()
        y[1, 3] += 0.5
        return y

    def later(x, *rest):
        seen.append(1)
        return x if len(seen) == 1 else x * 2

    seen: list[int] = []
    wrong = {
        "crashes": (crash, "RuntimeError: out of resource: shared memory"),
        "doubles": (lambda x, *rest: x * 2, "wrong product, rel_error 1 exceeds 0.01"),
        "nans": (lambda x, *rest: x * float("nan"), "rel_error nan"),
        "spoils": (later, "rel_error 1 exceeds"),  # right before the timing, wrong after it
    }
    Timed(monkeypatch, {"right": 5.0} | dict.fromkeys(wrong, 1.0))
    said: list[str] = []
    every = [fake(monkeypatch, name, run) for name, (run, _) in wrong.items()] + [fake(monkeypatch, "right")]
    found = trial(said).best(every, 20)
    assert found is not None
    assert (found[0].kernel.name, found[1], found[2]) == ("right", 5.0, None)
    assert len(said) == len(wrong)
    for line, (name, (_, reason)) in zip(said, wrong.items(), strict=True):
        assert line.startswith(f"(8, 8) M = 2: {name} left out: ")
        assert reason in line
    assert trial(said).best(every[:1], 20) is None

    big = trial(said, M=4000)  # the error of the whole, 0.3 %, would pass
    assert "worst element off" in str(big.fault(fake(monkeypatch, "one", one_element)))


def test_candidates_are_of_every_kernel_that_runs_and_the_default_is_first():
    def names(M: int, target: str = "sm_89") -> list[str]:
        problem = Problem(target, M, 4096, 4096, torch.bfloat16, torch.int32, 128)
        found = tuner.candidates("w4a16_tiles", problem, 132)
        assert found[0].launch == (
            MODULES[n].config(M, 4096, 4096, 128) if (n := found[0].kernel.name) in MODULES else {}
        )
        return list(dict.fromkeys(candidate.kernel.name for candidate in found))

    assert names(1) == ["w4a16_decode", "w4a16_wide", "w4a16_tiles_vendor"]
    assert names(64) == ["w4a16_wide", "w4a16_tiles_vendor"]
    assert names(4096) == ["w4a16_tiles_vendor", "w4a16_wide"]
    assert names(1, "cpu") == ["w4a16_tiles_dequantize"]
    with pytest.raises(ValueError, match="no kernel for w4a16_tiles on sm_75"):
        names(1, "sm_75")


@pytest.mark.parametrize(
    ("op", "codes", "M", "expected"),
    [
        ("w8a8", INT8, 64, ["w8a8_hopper", "w8a8_triton"]),
        # the second is slower than the third for most shapes at such an M: measured all the same
        ("w8a8", FP8, 16, ["w8a8_hopper", "w8a8_scaled_mm", "w8a8_triton"]),
        ("w8a8", FP8, 4096, ["w8a8_hopper", "w8a8_scaled_mm", "w8a8_triton"]),
        ("fp8_block", FP8, 64, ["fp8_block_hopper", "fp8_block_triton"]),
        ("w8a16_interleaved", FP8, 64, ["w8a16_hopper"]),
        ("w4a8_interleaved", torch.int32, 64, ["w4a8_hopper"]),
    ],
    ids=str,
)
def test_candidates_of_8_bits_are_those_of_their_op(op, codes, M, expected):
    found = tuner.candidates(op, Problem("sm_90", M, 28672, 4096, torch.bfloat16, codes), 132)
    assert list(dict.fromkeys(candidate.kernel.name for candidate in found)) == expected
    launches = [c.launch for c in found if c.kernel.parameters]
    if op == "w4a8_interleaved":
        assert launches == w4a8_hopper.candidates(M, 28672, 4096, 132)
    else:
        x_bytes = 2 if op == "w8a16_interleaved" else 1
        assert launches == w8_hopper.candidates(M, 28672, 4096, x_bytes, op == "fp8_block", 132)


def test_zeros_and_static_scales_are_measured_as_the_scheme_without():
    measured = {"w8a8-static": "w8a8", "fp8-static": "fp8", "w4a16-g64-asym": "w4a16-g64"}
    for label in ("w8a16", "w8a8", "w4a16-channel", "fp8", "fp8-block", "fp8-w8a16", *measured):
        assert tunable(parse_scheme(label)) == parse_scheme(measured.get(label, label))
    for label in ("w3a16-g128", "w2a16-g128"):
        with pytest.raises(QuantKitError, match=f"scheme {label}: .* no launches to tune; .* w8a8, .* have"):
            tunable(parse_scheme(label))


def test_weights_that_no_kernel_runs_are_left_out_with_a_line(monkeypatch):
    monkeypatch.setattr(tuner, "target_of", lambda device: "sm_80")
    said: list[str] = []
    weights = [(256, 256, PRESETS[name]) for name in ("w8a16", "w8a8")]
    planned = tuner.plan(weights, [1, 16], torch.device("cpu"), say=said.append)
    assert [*planned] == weights[1:]
    assert [*planned[weights[1]]] == [1, 16]
    (line,) = said
    assert line.startswith("(256, 256) w8a16 left out: ")
    assert "w8a16_hopper is written for sm_90, not for sm_80" in line
    with pytest.raises(QuantKitError, match="nothing to tune on sm_80"):
        tuner.plan(weights[:1], [1], torch.device("cpu"), say=said.append)


def test_an_entry_reaches_down_to_the_next_bucket():
    assert [least_M(M, tuner.BUCKETS) for M in (1, 8, 16, 4096)] == [1, 2, 9, 1025]
    assert least_M(4096, [4096]) == 1025
    assert least_M(100, [70, 100]) == 71
    assert least_M(3, [3]) == 2


@pytest.mark.parametrize(("M", "least", "label"), [(3, 2, "w4a16-g32"), (20, 17, "w4a16-channel")])
def test_a_table_is_made_and_obeyed(monkeypatch, folder, M, least, label):
    """The whole way in Triton's interpreter, on a CPU that calls itself sm_89: tune, save, choose, multiply."""
    N, K, scheme = 32, 128, parse_scheme(label)
    group_size = scheme.group_size or 0
    if not GPU:
        monkeypatch.setattr(tuner, "target_of", lambda device: "sm_89")
    seen: list = []
    table = tune(
        [(N, K, scheme)] * 2,
        [M],
        DEVICE,
        replays=3,
        working_set=3000,
        x_dtype=torch.float16,
        commit="abc1234",
        on_start=lambda name, total: seen.append((name, total)),
        on_entry=seen.append,
        say=pytest.fail,
    )
    (one,) = table["entries"]  # a weight that is named twice is measured once
    assert seen[0][0] == f"(32, 128) {label} M = {M}"
    assert seen[1:] == [one]
    assert (one["M"], one["least_M"], one["group_size"]) == (M, least, group_size)
    assert (one["op"], one["codes"], one["scheme"]) == ("w4a16_tiles", "int32", label)
    assert {"device", "torch", "triton", "commit", "date"} <= set(table)
    assert 0 < one["us"] <= one["default_us"]
    assert 0 < one["rel_error"] < 0.01
    save(folder / "sm_89.json", table)
    dispatch.forget()
    problem = Problem("sm_89", M, N, K, torch.float16, torch.int32, group_size)
    kernel, launch = choose("w4a16_tiles", problem)
    assert (kernel.name, launch or {}) == (one["kernel"], one["launch"])


@pytest.mark.parametrize(
    ("label", "op", "codes"),
    [
        ("w4a16-g64", "w4a16_tiles", "int32"),
        ("w8a16", "w8a16_interleaved", "int8"),
        ("fp8-w8a16", "w8a16_interleaved", "float8_e4m3fn"),
        ("w8a8", "w8a8", "int8"),
        ("fp8", "w8a8", "float8_e4m3fn"),
        ("fp8-block", "fp8_block", "float8_e4m3fn"),
    ],
)
def test_every_scheme_is_measured_by_the_kernels_of_its_op(label, op, codes):
    """On a CPU, whose kernels have no launches; x in 8 bits costs no error, as it is rounded beforehand."""
    weight = 40, 200, parse_scheme(label)
    (one,) = tune([weight], [3], "cpu", replays=3, working_set=3000, say=pytest.fail)["entries"]
    assert (one["op"], one["codes"], one["scheme"], one["launch"]) == (op, codes, label, {})
    assert (one["N"], one["K"], one["M"]) == (40, 200, 3)
    assert one["kernel"] in {kernel.name for kernel in KERNELS[op] if kernel.module == "cpu"}
    assert 0 < one["rel_error"] < 0.004


def test_a_product_of_other_scales_is_wrong():
    scheme, said = PRESETS["w8a8"], []
    generator = torch.Generator().manual_seed(0)
    (q,) = random_copies(scheme, 40, 200, generator, 1)
    x, scales, numbers = tuner.rounded(torch.randn(3, 200, generator=generator), scheme)
    expected = numbers @ q.dequantize(torch.float64).T
    problem = Problem("cpu", 3, 40, 200, torch.float32, INT8)
    (candidate,) = tuner.candidates("w8a8", problem, 132)
    for scale, right in ((1.0, True), (1.1, False)):
        rest = (scales[0] * scale, *tuner.pack(q, torch.float32))
        assert (Trial(x, [rest], expected, "", said.append).fault(candidate) is None) == right


def test_a_gpu_that_stopped_is_said(monkeypatch):
    def stopped(device):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", stopped)
    subject = trial([])
    subject.x = SimpleNamespace(device=torch.device("cuda"))  # type: ignore[assignment]
    with pytest.raises(QuantKitError, match="k stopped the GPU \\(CUDA error: an illegal memory access\\)"):
        subject.check_device(fake(monkeypatch, "k"))


# files


def test_tables_merge_by_shape_and_rows():
    old = {"device": "old", "entries": [entry(1, us=5.0), entry(16), entry(1, N=64)]}
    new = {"device": "new", "entries": [entry(1, us=3.0), entry(8)]}
    table = merged(old, new)
    assert table["device"] == "new"
    assert [(e["N"], e["M"], e["us"]) for e in table["entries"]] == [
        (64, 1, 1.0),
        (4096, 1, 3.0),
        (4096, 8, 1.0),
        (4096, 16, 1.0),
    ]
    assert merged(None, new)["entries"] == [entry(1, us=3.0), entry(8)]
    # an entry that does not name its codes is of int4
    assert merged({"entries": [entry(1)]}, {"entries": [entry(1, codes="int32", us=2.0)]})["entries"] == [
        entry(1, codes="int32", us=2.0)
    ]
    both = [entry(1, codes=codes, op="w8a8") for codes in ("float8_e4m3fn", "int8")]
    assert merged({"entries": both[:1]}, {"entries": both[1:]})["entries"] == both


def test_a_file_is_replaced_whole_or_not_at_all(folder, monkeypatch):
    path = folder / "deeper" / "sm_89.json"
    save(path, {"device": "H200", "entries": [entry(1)]})
    save(path, {"device": "H200", "entries": [entry(8)]})
    assert tuned.read(path) == {"device": "H200", "entries": [entry(1), entry(8)]}
    before = path.read_text()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save(path, {"entries": [entry(16)]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(path, {"entries": [entry(16, us=float("nan"))]})
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["sm_89.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no table of kernels (Expecting value"),
        ("[]", "it has no list of entries"),
        ('{"entries": {"op": "w4a16"}}', "it has no list of entries"),
        ('{"entries": ["w4a16"]}', "an entry is 'w4a16', expected an object"),
        (json.dumps({"entries": [entry(1) | {"M": "1"}]}), "an entry has M = '1', expected int"),
        (json.dumps({"entries": [entry(1) | {"N": True}]}), "an entry has N = True, expected int"),
        (json.dumps({"entries": [entry(1) | {"codes": 8}]}), "an entry has codes = 8, expected str"),
        (json.dumps({"entries": [entry(1) | {"least_M": None}]}), "an entry has least_M = None"),
        (json.dumps({"entries": [entry(1, launch={"rows": 1.5})]}), "a launch has rows = 1.5, expected int"),
    ],
    ids=["empty", "list", "object", "text", "M", "N", "codes", "least_M", "launch"],
)
def test_a_broken_table_is_named_with_the_mend(folder, text, words):
    path = folder / "sm_89.json"
    path.parent.mkdir()
    path.write_text(text)
    for broken in (
        lambda: tuned.read(path),
        lambda: chosen(1),
        lambda: save(path, {"entries": []}),
        lambda: tuner.writable(path),
    ):
        with pytest.raises(TableError) as error:
            broken()
        assert str(path) in str(error.value)
        assert words in str(error.value)
        assert "delete it and run quantkit tune" in str(error.value)
    with pytest.raises(QuantKitError) as refused:
        kernel_of(PRESETS["w4a16"], "sm_89", 1, 4096, 4096, torch.bfloat16)
    assert str(path) in str(refused.value)
    assert "--device" not in str(refused.value)  # another device is not the mend


def test_a_broken_table_stops_a_product(folder):
    path = folder / f"{dispatch.target_of(DEVICE)}.json"
    path.parent.mkdir()
    path.write_text("{")
    x, codes = torch.ones(2, 32, device=DEVICE), torch.ones(8, 32, dtype=torch.int8, device=DEVICE)
    with pytest.raises(TableError, match="is no table of kernels"):
        torch.ops.quantkit.w8a16(x, codes, torch.ones(8, 1, device=DEVICE), None)


# looking up


def test_rows_between_two_entries_take_the_larger(folder):
    first, second = dict(DECODE, depth=1), dict(DECODE, depth=2)
    write(folder / "sm_89.json", entry(16, launch=second), entry(4, launch=first))
    assert [chosen(M) for M in (1, 4, 5, 16)] == [("w4a16_decode", L) for L in (first, first, second, second)]
    assert chosen(17) == ("w4a16_wide", None)  # more than in any entry: the default
    assert chosen(1, group_size=64) == ("w4a16_decode", None)
    assert chosen(1, target="sm_80") == ("w4a16_decode", None)


def test_an_entry_does_not_reach_below_its_least_rows(folder):
    write(folder / "sm_89.json", entry(4096, "w4a16_wide", WIDE, least_M=1025))
    assert chosen(4096) == ("w4a16_wide", WIDE)
    assert chosen(1025) == ("w4a16_wide", WIDE)
    assert chosen(1024) == ("w4a16_tiles_vendor", None)
    assert chosen(1) == ("w4a16_decode", None)


def eight_bit_entry(op: str, codes: str, launch: dict | None = None, **changes) -> dict:
    kernel = "w8a16_hopper" if op == "w8a16_interleaved" else f"{op}_hopper"
    return entry(4096, kernel, W8 if launch is None else launch, op=op, codes=codes, group_size=0, **changes)


def test_int8_and_e4m3_of_one_shape_do_not_mix(folder):
    of_int8, of_fp8 = dict(W8, stages=3), dict(W8, stages=4)
    write(
        folder / "sm_90.json",
        eight_bit_entry("w8a8", "int8", of_int8),
        eight_bit_entry("w8a8", "float8_e4m3fn", of_fp8),
        eight_bit_entry("w8a16_interleaved", "float8_e4m3fn", of_fp8),
    )

    def launch(op: str, codes: torch.dtype) -> dict | None:
        return choose(op, Problem("sm_90", 64, 4096, 4096, torch.bfloat16, codes))[1]

    assert launch("w8a8", INT8) == of_int8
    assert launch("w8a8", FP8) == of_fp8
    assert launch("w8a16_interleaved", FP8) == of_fp8
    assert launch("w8a16_interleaved", INT8) is None
    assert launch("fp8_block", FP8) is None


def test_a_table_overrules_the_rows_from_which_on_another_kernel_is_the_default(folder):
    def name(M: int) -> str:
        return choose("w8a8", Problem("sm_100", M, 4096, 4096, torch.bfloat16, FP8))[0].name

    assert (name(16), name(64)) == ("w8a8_triton", "w8a8_scaled_mm")
    vendor = eight_bit_entry("w8a8", "float8_e4m3fn", {}) | {"kernel": "w8a8_scaled_mm", "M": 16}
    ours = eight_bit_entry("w8a8", "float8_e4m3fn", {}) | {"kernel": "w8a8_triton", "M": 64}
    write(folder / "sm_100.json", vendor, ours)
    assert (name(16), name(64)) == ("w8a8_scaled_mm", "w8a8_triton")


def test_the_launch_of_a_table_reaches_the_kernel_through_every_op(folder, monkeypatch):
    """On a CPU that calls itself sm_90, with kernels that only say how they were launched."""
    M, N, K = 3, 256, 256
    of = {("w8a8", "int8"): 3, ("w8a8", "float8_e4m3fn"): 4, ("fp8_block", "float8_e4m3fn"): 5}
    of |= {("w8a16_interleaved", "int8"): 6, ("w8a16_interleaved", "float8_e4m3fn"): 7}
    entries = [eight_bit_entry(*key, dict(W8, stages=n), N=N, K=K) for key, n in of.items()]
    write(folder / "sm_90.json", *entries)
    seen = []

    def kernel(x, *rest, launch):
        seen.append(launch["stages"])
        return x.new_zeros(M, N, dtype=torch.bfloat16)

    monkeypatch.setattr(ops, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(
        dispatch, "_load", lambda module, name: kernel if module == "w8_hopper" else getattr(cpu, name)
    )
    op, x = torch.ops.quantkit, torch.ones(M, K, dtype=torch.bfloat16)
    scales, tiles = torch.ones(N, 1), torch.ones(2, 2)
    for codes in (torch.ones(N, K, dtype=INT8), torch.ones(N, K).to(FP8)):
        x_codes, x_scales = cpu.quantize_activations(x, codes.dtype)
        op.w8a8(x, codes, scales, None, None)
        op.w8a8(x, codes, scales, torch.ones(1), None)  # a static scale: the same entry
        op.w8a8_rounded(x_codes, x_scales, codes, scales, None, torch.bfloat16)
        words = torch.ones(N, K // 4, dtype=torch.int32)
        op.w8a16_interleaved(x, words, scales, None, codes.dtype == INT8)
    op.fp8_block(x, codes, tiles, None)
    rounded = cpu.quantize_activations(x, FP8, group_size=128)
    op.fp8_block_rounded(*rounded, codes, tiles, None, torch.bfloat16)
    assert seen == [3, 3, 3, 6, 4, 4, 4, 7, 5, 5]


def test_the_users_table_comes_before_the_shipped_one(folder, monkeypatch):
    own, shipped = dict(DECODE, depth=1), dict(DECODE, depth=2)
    write(folder / "sm_89.json", entry(4, launch=own))
    write(tuned.SHIPPED / "sm_89.json", entry(16, launch=shipped))
    assert chosen(4) == ("w4a16_decode", own)
    assert chosen(5) == ("w4a16_decode", shipped)
    monkeypatch.setenv("QUANTKIT_TUNED", str(folder.parent / "elsewhere"))
    assert tuned.user_table("sm_89") == folder.parent / "elsewhere" / "sm_89.json"
    dispatch.forget()
    assert chosen(4) == ("w4a16_decode", shipped)


def test_without_a_name_the_users_table_is_in_their_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("QUANTKIT_TUNED")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.user_table("sm_89") == tmp_path / ".cache/quantkit/tuned/sm_89.json"


@pytest.mark.parametrize(
    ("kernel", "launch"),
    [
        ("w4a16_of_tomorrow", {}),
        ("w4a16_decode", {"rows": 1}),
        ("w4a16_decode", DECODE | {"of_tomorrow": 1}),
        ("w4a16_tiles_vendor", {"rows": 1}),
        ("w4a16_tiles_dequantize", {}),  # runs on a CPU only
    ],
)
def test_an_entry_for_other_kernels_than_these_does_not_count(folder, kernel, launch):
    write(folder / "sm_89.json", entry(16, kernel, launch))
    assert chosen(1) == ("w4a16_decode", None)


def test_a_table_may_name_a_kernel_without_its_launch(folder):
    write(folder / "sm_89.json", entry(4096, "w4a16_wide", {}), entry(64, "w4a16_tiles_vendor", {}))
    assert chosen(4096) == ("w4a16_wide", None)
    assert chosen(1) == ("w4a16_tiles_vendor", None)


@pytest.mark.gpu
def test_a_small_weight_is_tuned_on_the_gpu(folder):
    labels = ("w4a16", "w4a8", "w8a8", "fp8", "fp8-block", "w8a16", "fp8-w8a16")
    table = tune([(1024, 1024, PRESETS[label]) for label in labels], [1, 16, 64], "cuda", replays=3)
    assert [(e["scheme"], e["M"]) for e in table["entries"]] == [
        (PRESETS[label].label, M) for label in labels for M in (1, 16, 64)
    ]
    assert all(0 < e["us"] and e["rel_error"] < 0.01 for e in table["entries"])


@pytest.mark.parametrize("path", sorted(tuned.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_dispatch_takes_every_entry_that_is_shipped(tmp_path, monkeypatch, path):
    monkeypatch.setattr(tuned, "SHIPPED", path.parent)
    monkeypatch.setenv("QUANTKIT_TUNED", str(tmp_path))  # no table of the user's own
    dispatch.forget()
    entries = tuned.read(path)["entries"]
    assert entries
    for entry in entries:
        size = (entry[name] for name in ("M", "N", "K"))
        codes = getattr(torch, entry.get("codes", "int32"))
        problem = dispatch.Problem(path.stem, *size, torch.bfloat16, codes, entry["group_size"])
        kernel, launch = dispatch.choose(entry["op"], problem)
        assert (kernel.name, launch or {}) == (entry["kernel"], entry["launch"])
    dispatch.forget()
