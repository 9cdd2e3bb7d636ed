import pytest
import torch

from quantkit.calibration.grid import fit_grid
from quantkit.calibration.rtn import rtn
from quantkit.packing import unpack_codes
from quantkit.scheme import PRESETS, parse_scheme

NAMES = [*PRESETS, "w4a16-g32-asym", "w4a16-channel", "w3a16-g32-asym", "w2a16-channel-asym"]


def weight():
    return torch.randn(130, 200, generator=torch.Generator().manual_seed(0))  # ragged in every group and tile


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_the_neutral_one(name):
    scheme = parse_scheme(name)
    q = rtn(weight(), scheme)
    codes = {
        "int2": (torch.int32, (130, 13)),
        "int3": (torch.int32, (130, 21)),
        "int4": (torch.int32, (130, 25)),
        "int8": (torch.int8, (130, 200)),
        "fp8": (torch.float8_e4m3fn, (130, 200)),
    }
    assert (q.codes.dtype, tuple(q.codes.shape)) == codes[scheme.weight]
    groups = -(-200 // scheme.group_size) if scheme.group_size else 1
    assert tuple(q.scales.shape) == ((2, 2) if scheme.block_size else (130, groups))
    assert q.scales.dtype == (torch.bfloat16 if scheme.bits < 8 else torch.float32)
    assert (q.zeros is None) == scheme.symmetric


@pytest.mark.parametrize("name", NAMES)
def test_dequantized_weights_quantize_to_themselves(name):
    scheme, w = parse_scheme(name), weight()
    grid = fit_grid(w, scheme)
    once = rtn(w, scheme)
    again = rtn(once.dequantize(torch.float64), scheme, grid=grid)
    assert torch.equal(once.codes.view(torch.uint8), again.codes.view(torch.uint8))


def test_every_code_is_the_nearest_point():
    w = weight().double()
    q = rtn(w, parse_scheme("w4a16-g128-asym"))
    codes = unpack_codes(q.codes, 200, 4).double()
    group = torch.arange(200) // 128
    scale, zero = q.scales.double()[:, group], q.zeros.double()[:, group]
    points = (torch.arange(16.0).double() - zero[..., None]) * scale[..., None]  # [N, K, 16]
    nearest = (points - w[..., None]).abs().amin(-1)
    chosen = ((codes - zero) * scale - w).abs()
    assert torch.allclose(chosen, nearest, rtol=0, atol=1e-15)


def test_bfloat16_weights_are_rounded_in_float32():
    w = weight().bfloat16()
    assert torch.equal(rtn(w, parse_scheme("w8a16")).codes, rtn(w.float(), parse_scheme("w8a16")).codes)


def test_float16_scales_on_request():
    assert rtn(weight(), parse_scheme("w4a16"), torch.float16).scales.dtype == torch.float16
