"""Rounding activations while calibrating is what the kernels do at run time."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quantkit import QuantLinear
from quantkit.calibration.activations import round_activations, rounded_inputs
from quantkit.calibration.rtn import rtn
from quantkit.quantize import quantize
from quantkit.recipe import Recipe, Rule
from quantkit.scheme import PRESETS, parse_scheme

ROUNDED = [
    name for name, scheme in PRESETS.items() if scheme.activation and scheme.activation_scale != "static"
]
K = 200  # no multiple of a block


def inputs(dtype=torch.float32, *shape):
    x = torch.randn(*(shape or (7, K)), generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 40
    x[0] = 0
    return x.to(dtype)


def rounded_float64(x, scheme, input_scale=None):
    """x [M, K] rounded by the definition of the scheme, in float64 but for the scales."""
    if scheme.activation is None:
        return x.double()
    top = 127.0 if scheme.activation == "int8" else 448.0
    pieces = x.split(scheme.block_size, 1) if scheme.activation_scale == "group" else [x]
    out = []
    for piece in pieces:
        scale = input_scale
        if scale is None:
            scale = (piece.float().abs().amax(1, keepdim=True) / top).clamp(min=2.0**-100)
        code = (piece.float() / scale).clamp(-top, top)
        code = code.round() if scheme.activation == "int8" else code.to(torch.float8_e4m3fn).double()
        out.append(code.double() * scale.double())
    return torch.cat(out, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROUNDED)
def test_it_is_the_definition_rounded_once_to_the_dtype(name, dtype):
    x, scheme = inputs(dtype), parse_scheme(name)
    # float32 rounds the product of a code of 8 bits and a scale of 24, and the dtype rounds again
    expected = rounded_float64(x, scheme).float().to(dtype)
    assert torch.equal(round_activations(x, scheme), expected)
    assert torch.equal(round_activations(x.view(7, 1, K), scheme), expected.view(7, 1, K))


def test_a_static_scale_is_used_and_awaited():
    x, scheme = inputs(), parse_scheme("fp8-static")
    assert round_activations(x, scheme) is x
    scale = torch.tensor([0.01])
    assert torch.equal(round_activations(x, scheme, scale), rounded_float64(x, scheme, scale).float())
    assert round_activations(x, parse_scheme("w4a16")) is x


@pytest.mark.parametrize("name", [*ROUNDED, "fp8-static"])
def test_the_op_computes_from_the_same_numbers(name):
    """With a unit matrix as the weight the output shows the inputs: code times scale."""
    x, scheme = inputs(), parse_scheme(name)
    scale = torch.tensor([0.01]) if scheme.activation_scale == "static" else None
    quantized = replace(rtn(torch.eye(K), scheme), input_scale=scale)
    y = QuantLinear.from_quantized(quantized)(x)
    unit = quantized.dequantize(torch.float64).diagonal()  # 1, but for the rounding of its scale
    # what is left is to multiply the code by two scales, in float32
    expected = round_activations(x, scheme, scale).double() * unit
    assert torch.allclose(y.double(), expected, rtol=2**-22, atol=0)


def test_hooks_round_inside_and_not_after():
    block = nn.Sequential(nn.Linear(K, 3), nn.Linear(3, K))
    x, scheme = inputs(), parse_scheme("w8a8")
    plain = block(x)
    with rounded_inputs(block, {"0": scheme, "1": parse_scheme("w4a16")}):
        assert torch.equal(
            block(x),
            block[1](
                nn.functional.linear(rounded_float64(x, scheme).float(), block[0].weight, block[0].bias)
            ),
        )
    assert torch.equal(block(x), plain)


def test_gradients_pass_unchanged():
    block, x = nn.Sequential(nn.Linear(K, 3)), inputs().requires_grad_()
    with rounded_inputs(block, {"0": parse_scheme("w8a8")}):
        y = block(x)
    assert torch.equal(
        y,
        nn.functional.linear(
            round_activations(x.detach(), parse_scheme("w8a8")), block[0].weight, block[0].bias
        ),
    )
    y.sum().backward()
    assert torch.allclose(x.grad, block[0].weight.sum(0).expand(7, K))


def test_linears_that_share_an_input_and_round_it_otherwise_are_calibrated_apart(tiny, tokens):
    """q of w8a8 comes first; k, of w4a16, gets the codes that it gets where nothing is rounded."""
    rules = (Rule(match="q_proj", scheme="w8a8"),)
    alone, mixed = (
        quantize(tiny(num_hidden_layers=1), Recipe("w4a16-g32", "gptq", rules=r), tokens=tokens).state_dict()
        for r in ((), rules)
    )
    key = "model.layers.0.self_attn.k_proj.codes"
    assert torch.equal(alone[key], mixed[key])
    assert mixed["model.layers.0.self_attn.q_proj.codes"].dtype == torch.int8
