"""Gradients through packed linears, and LoRA on them by the package peft."""

import pytest
import torch

import quantkit
from packed_weights import packed_weight
from quantkit import QuantKitError, adapters
from quantkit.linear import QuantLinear
from quantkit.scheme import PRESETS

LABELS = ["w4a16-g32", "w4a16-g32-asym", "w3a16-g32", "w2a16-channel", "w4a8-g32", *PRESETS]
LABELS = [label for label in dict.fromkeys(LABELS)]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("label", LABELS)
def test_the_gradient_of_x_is_that_of_the_dequantized_weight(label, order):
    weight = packed_weight(label, 64, 128, order=order)
    linear = QuantLinear.from_quantized(weight, torch.randn(64))
    linear.repack(torch.float32)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = linear(x)
    assert torch.equal(y.detach(), linear(x.detach()))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    expected = dy.double() @ weight.effective_weight(torch.float64)
    bound = (
        200
        * torch.finfo(torch.float32).eps
        * (dy.abs().double() @ weight.effective_weight(torch.float64).abs())
    )
    worst = ((x.grad.double() - expected).abs() / bound).max().item()
    assert worst <= 1, f"error is {worst:.2f}x the rounding bound"
    assert all(p.grad is None for p in linear.parameters())


def with_lora(folder, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = quantkit.load(folder, "cpu", dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **options)
    torch.manual_seed(0)
    return peft.get_peft_model(model, adapters.on_packed(config))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8", "fp8-block"])
def test_lora_learns_on_frozen_codes_and_comes_back_from_its_file(packed, tmp_path, scheme):
    folder = packed("llama", scheme, tie_word_embeddings=False)
    model = with_lora(folder)
    ids = torch.arange(3, 35).view(2, 16)
    codes = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(".codes")}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # A and B of two linears in two blocks
    optimizer = torch.optim.Adam(trained, 0.01)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses
    state = model.state_dict()
    assert all(
        torch.equal(tensor.view(torch.uint8), state[n].view(torch.uint8)) for n, tensor in codes.items()
    )

    import peft

    model.save_pretrained(tmp_path / "adapter")
    config = adapters.on_packed(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    base = quantkit.load(folder, "cpu", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model.eval()(ids).logits, atol=1e-5)
        with model.disable_adapter():
            plain = quantkit.load(folder, "cpu", dtype=torch.float32)
            assert torch.equal(model(ids).logits, plain(ids).logits)
    with pytest.raises(QuantKitError, match="merge into the original model"):
        model.merge_and_unload()


def test_other_adapters_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(QuantKitError, match="found IA3Config, expected a LoraConfig"):
        adapters.on_packed(peft.IA3Config())
