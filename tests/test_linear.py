"""QuantLinear: the order of a CPU's int4 kernel in the place of the neutral one, and back."""

import copy

import pytest
import torch

from quantkit.calibration.rtn import rtn
from quantkit.errors import QuantKitError
from quantkit.kernels import dispatch
from quantkit.linear import FAST_ROWS, QuantLinear, set_fp8_accumulation
from quantkit.packing import QuantizedTensor
from quantkit.scheme import parse_scheme

PACKED = ["w4a16-g32", "w4a16-g128-asym"]


def linear(label: str, N: int = 48, K: int = 256) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)
    return QuantLinear.from_quantized(rtn(weight, parse_scheme(label)), bias)


def assert_same_weight(weight: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert (weight.scheme, weight.shape) == (expected.scheme, expected.shape)
    found, stored = weight.tensors(), expected.tensors()
    assert list(found) == list(stored)
    assert all(torch.equal(found[name], stored[name]) for name in stored)


@pytest.mark.parametrize("label", PACKED)
def test_repacking_keeps_product_and_codes(label):
    module, repacked = linear(label).bfloat16(), linear(label).bfloat16()
    repacked.repack(torch.bfloat16)
    assert repacked.codes is None
    assert_same_weight(repacked.quantized(), module.quantized())
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    w = module.quantized().dequantize(torch.float64)
    exact = x.double() @ w.T + module.bias.double()
    # PyTorch's kernel rounds each dequantized weight and the result to bfloat16
    bound = torch.finfo(torch.bfloat16).eps * (exact.abs() + x.double().abs() @ w.abs().T + module.bias.abs())
    assert ((repacked(x).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("label", PACKED)
def test_the_state_dict_is_neutral_and_in_the_same_order(label):
    module, repacked = linear(label), linear(label)
    repacked.repack(torch.bfloat16)
    before, after = module.state_dict(), repacked.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    repacked.load_state_dict(before)
    assert torch.equal(repacked.codes, module.codes)


@pytest.mark.parametrize("label", PACKED)
def test_a_copy_keeps_the_packing(label):
    module, repacked = linear(label), linear(label)
    repacked.repack(torch.bfloat16)
    clone = copy.deepcopy(repacked)
    assert clone.codes is None
    assert clone.repacked_for == torch.bfloat16
    assert torch.equal(clone.packed, repacked.packed)
    assert clone.packed.data_ptr() != repacked.packed.data_ptr()
    assert_same_weight(clone.quantized(), module.quantized())


@pytest.mark.parametrize("label", PACKED)
@pytest.mark.parametrize("move", [lambda m: m.cpu(), lambda m: m.to("cpu"), lambda m: m.bfloat16()])
def test_moving_packs_again_and_keeps_the_product(label, move):
    module, repacked = linear(label).bfloat16(), linear(label).bfloat16()
    repacked.repack(torch.bfloat16)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = repacked(x)
    assert move(repacked) is repacked
    assert repacked.repacked_for == torch.bfloat16
    assert torch.equal(repacked(x), before)
    assert_same_weight(repacked.quantized(), module.quantized())


@pytest.mark.parametrize("label", PACKED)
def test_half_leaves_the_neutral_layout_since_the_cpu_packs_for_bfloat16_alone(label):
    module, repacked = linear(label), linear(label)
    repacked.repack(torch.bfloat16)
    repacked.half()
    assert repacked.packed is None
    assert repacked.repacked_for is None
    assert repacked.bias.dtype == torch.float16
    assert_same_weight(repacked.quantized(), module.quantized())
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(repacked(x), module.half()(x))


def test_what_was_never_packed_moves_without_packing():
    module = linear("w4a16-g32").bfloat16().cpu()
    assert module.packed is None


@pytest.mark.parametrize("label", ["w8a16", "fp8", "w4a16-channel"])
def test_what_has_no_order_of_its_own_stays(label):
    module = linear(label, K=512)
    module.repack(torch.bfloat16)
    assert module.codes is not None


def test_weights_are_held_once():
    module = linear("w4a16-g128", N=128, K=1024)
    neutral = module.weight_bytes
    module.repack(torch.bfloat16)
    # the kernel wants an offset beside each scale: 4 bytes a group on top of the 2 that are stored
    assert module.weight_bytes == neutral + 128 * 8 * 4


def test_fp8_accumulation_is_a_mode_of_the_loaded_model(monkeypatch):
    module, other = linear("fp8").bfloat16(), linear("w8a8").bfloat16()
    model = torch.nn.ModuleList([module, other])
    seen = []
    monkeypatch.setattr("quantkit.kernels.cpu.w8a8_cpu", seen_by(seen))
    dispatch._load.cache_clear()
    few, many = (
        torch.ones(2, FAST_ROWS // 2 - 1, 256).bfloat16(),
        torch.ones(2, FAST_ROWS // 2, 256).bfloat16(),
    )
    for mode in ("fast", "accurate", "auto"):
        set_fp8_accumulation(model, mode)
        for linear_of in (module, other):
            linear_of(few)
            linear_of(many)
    assert seen == [True, True, False, False, *[False] * 4, False, True, False, False]
    dispatch._load.cache_clear()
    with pytest.raises(QuantKitError, match="found 'quick', expected 'auto', 'accurate' or 'fast'"):
        set_fp8_accumulation(model, "quick")


def seen_by(seen: list[bool]):
    def product(x_codes, x_scales, codes, scales, bias, dtype, fast=False):
        seen.append(fast)
        return torch.zeros(len(x_codes), len(codes), dtype=dtype)

    return product
