"""Learned rounding: starts at GPTQ's codes, never ends above them, and is the same at every call."""

import pytest
import torch

from quantkit.calibration.gptq import factorize, gptq
from quantkit.calibration.grid import Grid
from quantkit.calibration.learn import learn_rounding
from quantkit.quantize import quantize
from quantkit.recipe import Recipe
from quantkit.scheme import parse_scheme

SCHEMES = ["w4a16-g32", "w3a16-g32-asym", "w2a16-channel-asym", "w8a16"]
H, F = 48, 80


def problem(name):
    """A block down(silu(up(x))), its inputs and outputs in two batches, and what GPTQ makes of its weights."""
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(F, H, generator=g) / H**0.5, torch.randn(H, F, generator=g) / F**0.5
    mix = torch.randn(H, H, generator=g) / H**0.5
    hidden = [torch.randn(4, 30, H, generator=g) @ mix for _ in range(2)]

    def run(weights, x):
        return torch.nn.functional.silu(x @ weights["up"].T) @ weights["down"].T

    outputs = [run({"up": up, "down": down}, x) for x in hidden]
    x = torch.cat(hidden).flatten(0, 1)
    results = {}
    for weight_name, weight, inputs in (
        ("up", up, x),
        ("down", down, torch.nn.functional.silu(x @ up.T)),
    ):
        factor = factorize(inputs.T @ inputs / len(inputs))
        results[weight_name] = gptq(weight, factor, parse_scheme(name), keep_targets=True)
    return run, hidden, outputs, results


def learned(name, steps, seed=0):
    run, hidden, outputs, results = problem(name)
    grids = {n: grid_of(r.quantized) for n, r in results.items()}
    targets = {n: r.targets for n, r in results.items()}
    return learn_rounding(run, targets, grids, hidden, outputs, steps=steps, seed=seed)


def grid_of(quantized):
    return Grid(quantized.scheme, quantized.shape, quantized.scales, quantized.zeros)


def loss(name, weights):
    run, hidden, outputs, _ = problem(name)
    return sum((run(weights, x) - y).square().sum().item() for x, y in zip(hidden, outputs, strict=True))


@pytest.mark.parametrize("name", SCHEMES)
def test_no_steps_give_gptqs_codes(name):
    results = problem(name)[3]
    for n, (codes, grid) in learned(name, 0).items():
        quantized = results[n].quantized
        assert torch.equal(grid.scales, quantized.scales)
        assert torch.equal(grid.pack(codes).codes, quantized.codes)


@pytest.mark.parametrize(
    ("name", "share"),
    [("w4a16-g32", 0.95), ("w3a16-g32-asym", 0.95), ("w2a16-channel-asym", 0.85), ("w8a16", 1.0)],
)
def test_steps_from_gptqs_codes_lower_the_error_of_the_blocks_output(name, share):
    """What is stored is measured, so bfloat16 scales lose part of it, and 8 bits may have nothing to gain."""
    before, after = (
        loss(name, {n: grid.dequantize(codes) for n, (codes, grid) in learned(name, steps).items()})
        for steps in (0, 100)
    )
    assert after <= share * before


def test_a_descent_that_loses_is_not_kept():
    run, hidden, outputs, results = problem("w4a16-g32")
    grids = {n: grid_of(r.quantized) for n, r in results.items()}
    targets = {n: r.targets for n, r in results.items()}
    for n, (codes, grid) in learn_rounding(run, targets, grids, hidden, outputs, steps=2, rate=10.0).items():
        assert torch.equal(grid.pack(codes).codes, results[n].quantized.codes)
        assert torch.equal(grid.scales, results[n].quantized.scales)


def test_codes_move_by_one_at_most():
    name = "w4a16-g32"
    start, end = learned(name, 0), learned(name, 40)
    distances = [(codes.int() - start[n][0].int()).abs() for n, (codes, _) in end.items()]
    assert all(distance.max() == 1 for distance in distances)
    # rate times the steps, falling to 0, is a fiftieth: as many codes can cross, and GPTQ's are spread evenly
    assert sum(d.sum() for d in distances) < 0.05 * sum(d.numel() for d in distances)


def test_the_same_seed_gives_the_same_codes():
    a, b = learned("w4a16-g32", 20), learned("w4a16-g32", 20)
    assert all(torch.equal(a[n][0], b[n][0]) and torch.equal(a[n][1].scales, b[n][1].scales) for n in a)
    other = learned("w4a16-g32", 20, seed=1)
    assert any(not torch.equal(a[n][0], other[n][0]) for n in a)


@pytest.mark.parametrize(
    ("label", "method"),
    [("w4a16-g32", "learn"), ("w8a8", "smooth+gptaq+learn"), ("fp8", "gptq+learn")],
)
def test_it_runs_for_schemes_of_integers_and_leaves_others_as_gptq_made_them(
    label, method, tiny, tokens, monkeypatch
):
    monkeypatch.setitem(learn_rounding.__kwdefaults__, "steps", 3)
    plain, refined = (
        quantize(tiny(num_hidden_layers=1), Recipe(label, m), tokens=tokens).state_dict()
        for m in (method.removesuffix("learn").rstrip("+") or "gptq", method)
    )
    assert plain.keys() == refined.keys()
    same = all(
        torch.equal(tensor.view(torch.uint8), refined[n].view(torch.uint8)) for n, tensor in plain.items()
    )
    assert same == (label == "fp8")
