"""Rounding of activations: the torch definition against torch's own types, and Triton against it, bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.kernels import cpu
from quantkit.kernels.quantize_activations import quantize_activations
from rounding import DEVICE, FP8, GPU

MODES = [(torch.int8, 0), (FP8, 0), (FP8, 128)]  # dtype, group_size
# one odd column, one group and a bit, several groups, a row of Llama's, columns of several programs, several rows a
# program, and rows that do not fit in registers
SHAPES = [(1, 1), (3, 130), (5, 384), (3, 4500), (2, 14336), (1100, 70), (1, 33000)]


def interesting_values() -> torch.Tensor:
    """Every e4m3 value, every midpoint between two, their float32 neighbours, and values past both ends."""
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    exact = torch.cat(
        [codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([449.0, 464.0, 1e4, 1e38, torch.inf, 1e-30])]
    )
    near = torch.cat(
        [exact, torch.nextafter(exact, torch.tensor(torch.inf)), torch.nextafter(exact, torch.tensor(0.0))]
    )
    return torch.cat([near, -near])


def bits(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8).cpu()


def test_static_e4m3_equals_torch_on_every_code_and_midpoint():
    values = interesting_values()[None].to(DEVICE)
    codes, _ = quantize_activations(values, FP8, torch.ones(1, device=DEVICE))
    assert torch.equal(bits(codes), bits(values.clamp(-448, 448).to(FP8)))


def test_static_e4m3_keeps_nan():
    codes, _ = quantize_activations(
        torch.tensor([[torch.nan, 1.0]], device=DEVICE), FP8, torch.ones(1, device=DEVICE)
    )
    assert codes.view(FP8).float().isnan().tolist() == [[True, False]]


def test_static_int8_rounds_half_to_even_and_saturates():
    x = torch.tensor([[0.5, 1.5, -0.5, -2.5, 126.5, 127.6, 1e9, -1e9, torch.inf]], device=DEVICE)
    codes, _ = quantize_activations(x, torch.int8, torch.ones(1, device=DEVICE))
    assert codes.tolist() == [[0, 2, 0, -2, 126, 127, 127, -127, 127]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("to", "group_size"), MODES)
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_equals_the_torch_definition_bit_for_bit(M, K, to, group_size, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=g) * torch.logspace(-3, 1, M)[:, None]
    x[:, K // 2] *= 100  # an outlier
    if M > 1:
        x[1] = 0
    x = x.to(dtype).to(DEVICE)
    for static in (None, torch.tensor([0.037], device=DEVICE)):
        if static is not None and group_size:
            continue
        expected, expected_scales = cpu.quantize_activations(x.cpu(), to, static and static.cpu(), group_size)
        codes, scales = quantize_activations(x, to, static, group_size)
        assert torch.equal(scales.cpu(), expected_scales)
        assert torch.equal(bits(codes), bits(expected))


def quotients(dtype: torch.dtype, step: int) -> torch.Tensor:
    """Rows of the dtype that begin with their largest value, of every `step`-th significand, and go on with -0, both signs
    of every significand, and all that they can be in the 21 binades below: more would be codes of 0."""
    significands = 2 ** (7 if dtype == torch.bfloat16 else 10)
    x = (1 + torch.arange(significands) / significands)[None, :] * 2.0 ** torch.arange(-14, 8)[:, None]
    x = x.to(dtype).flatten()
    top = x[-significands:][::step]
    rows = torch.where(x[None] <= top[:, None], x[None], 0)
    return torch.cat([top[:, None], torch.full_like(top, -0.0)[:, None], rows, -rows], 1)


@pytest.mark.parametrize(("to", "group_size"), MODES[:2])
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 1), (torch.float16, 1 if GPU else 16)], ids=str)
def test_the_quotient_of_every_pair_of_significands_has_the_right_code(dtype, step, to, group_size):
    """What the division by fused multiply-adds rests on: it is the rounded quotient, or one with the same code."""
    x = quotients(dtype, step)
    expected, expected_scales = cpu.quantize_activations(x, to, None, group_size)
    codes, scales = quantize_activations(x.to(DEVICE), to, None, group_size)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(bits(codes), bits(expected))


@pytest.mark.parametrize("to", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("exponent", [-126, -100, -93, 60, 100, 120, 127])
def test_the_ends_of_the_range_are_divided_rightly(exponent, to):
    """Scales at the floor, and such that 1 / scale or what is left of x is near the smallest numbers."""
    x = torch.cat([quotients(torch.bfloat16, 8)[:, :1]] * 2, 0).float() / 128
    x = torch.cat([x, quotients(torch.bfloat16, 8)[:1, -256:].float().expand(len(x), -1) / 256], 1)
    x = (x.double() * 2.0**exponent).to(torch.bfloat16)
    expected, expected_scales = cpu.quantize_activations(x, to)
    codes, scales = quantize_activations(x.to(DEVICE), to)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(bits(codes), bits(expected))


def test_an_infinity_leaves_the_other_codes_0():
    x = torch.tensor([[torch.inf, 1.0, -2.0, -0.0]], dtype=torch.float16)
    for to in (torch.int8, FP8):
        expected, _ = cpu.quantize_activations(x, to)
        codes, _ = quantize_activations(x.to(DEVICE), to)
        assert torch.equal(bits(codes)[:, 1:], bits(expected)[:, 1:])


@pytest.mark.parametrize(("to", "group_size"), MODES)
def test_a_strided_row_view_is_read_in_place(to, group_size):
    wide = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    view = wide[:, 20:220]
    codes, scales = quantize_activations(view, to, None, group_size)
    expected, expected_scales = quantize_activations(view.contiguous(), to, None, group_size)
    assert torch.equal(bits(codes), bits(expected))
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize(("to", "group_size"), MODES)
def test_a_nan_or_infinity_in_a_row_reaches_its_scale(to, group_size):
    x = torch.ones(3, 128)
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    for quantize, device in ((quantize_activations, DEVICE), (cpu.quantize_activations, "cpu")):
        _, scales = quantize(x.to(device), to, None, group_size)
        assert scales.isfinite().flatten().tolist() == [False, False, True]


@pytest.mark.parametrize(("to", "top"), [(torch.int8, 127), (FP8, 448)])
def test_the_largest_value_of_a_row_becomes_the_largest_code(to, top):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 1e-3
    codes, scales = cpu.quantize_activations(x, to)
    assert (codes.float().abs().amax(1) == top).all()
    rounded = codes.float() * scales
    # half a step of int8, or half a unit in e4m3's last place (3 bits) plus half its smallest subnormal
    bound = scales / 2 * 1.001 if to == torch.int8 else x.abs() * 2**-4 * 1.001 + scales * 2**-10
    worst = ((rounded - x).abs() / bound).max().item()
    assert worst <= 1, f"error is {worst:.2f}x the rounding bound"
