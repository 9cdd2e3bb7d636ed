"""Rounding of activations: the torch definition against torch's own types, and Triton against it, bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.kernels import cpu
from quantkit.kernels.quantize_activations import quantize_activations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
MODES = [(torch.int8, 0), (FP8, 0), (FP8, 128)]  # dtype, group_size
# K: one odd column, one group and a bit, several groups, more than one block of the row kernel
SHAPES = [(1, 1), (3, 130), (5, 384), (2, 4500)]


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
