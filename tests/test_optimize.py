"""optimize: fused blocks are the same function of the same weights, to the bit on a CPU."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import transformers
from torch import nn

import quantkit
from packed_weights import packed_weight
from quantkit.calibration.rtn import rtn
from quantkit.errors import QuantKitError
from quantkit.fuse import Beside, FusedBlock, SwiGLULinear, merged
from quantkit.linear import QuantLinear, replace_module
from quantkit.scheme import parse_scheme

TINY = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.3,
    max_position_embeddings=64,
)
KINDS = {
    "llama": transformers.LlamaConfig(**TINY, attention_bias=True),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=8),
    "qwen2": transformers.Qwen2Config(
        **{k: v for k, v in TINY.items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "qwen3": transformers.Qwen3Config(**TINY),
}
SCHEMES = [None, "w4a16-g32", "w4a8-g32", "w8a8", "fp8", "fp8-block", "w8a16", "w3a16-g32"]


def tiny(kind: str, scheme: str | None, dtype: torch.dtype, only: str = "") -> transformers.PreTrainedModel:
    """A random model of a kind, the decoder linears whose names hold `only` packed."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(deepcopy(KINDS[kind]), dtype=dtype).eval()
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
        if scheme is not None and isinstance(module, nn.Linear) and only in name:
            packed = QuantLinear.from_quantized(rtn(module.weight.float(), parse_scheme(scheme)), module.bias)
            packed.repack(dtype)
            replace_module(model.model.layers, name, packed)
    return model


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two prompts, and the tokens generated after them."""
    prompt = torch.randint(2, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(prompt).logits
        tokens = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return logits, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimized_model_is_the_same_function(kind, scheme, dtype):
    logits, tokens = outputs(tiny(kind, scheme, dtype))
    model = quantkit.optimize(tiny(kind, scheme, dtype))
    assert all(isinstance(block, FusedBlock) for block in model.model.layers)
    found = outputs(model)
    assert torch.equal(found[0], logits)
    if dtype == torch.float32:  # attention to pages rounds elsewhere
        assert torch.equal(found[1], tokens)


@pytest.fixture
def products(monkeypatch) -> list[str]:
    """Names of the ops that make silu(gate) * up, in the order of their calls."""
    called: list[str] = []
    for name in ("swiglu_quantize", "w4a16_tiles"):

        def noted(op, name, *a):
            if name == "swiglu_quantize" or a[-1]:
                called.append(name)
            return op(*a)

        op = getattr(torch.ops.quantkit, name)
        monkeypatch.setattr(torch.ops.quantkit, name, partial(noted, op, name))
    return called


BIASED = transformers.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True)
TILED = ["w4a16-g32", "w4a16-g64-asym", "w4a16-channel"]


@pytest.mark.usefixtures("laid_out_as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", TILED)
@pytest.mark.parametrize("kind", ["mistral", "biased"])
def test_from_tiles_gate_and_up_are_one_kernel_with_what_follows(kind, scheme, dtype, products, monkeypatch):
    monkeypatch.setitem(KINDS, "biased", BIASED)
    ids = torch.randint(2, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    plain, model = (tiny(kind, scheme, dtype) for _ in range(2))
    quantkit.optimize(model)

    def check():
        """A CPU's definition of the op rounds as transformers does, but PyTorch's silu of 8 columns is not that of many."""
        with torch.no_grad():
            expected, found = plain(ids).logits, model(ids).logits
        bound = 16 * torch.finfo(expected.dtype).eps * expected.abs().max()  # a few roundings of its size
        assert (found - expected).abs().max() <= bound

    check()
    assert products == ["w4a16_tiles"] * 2
    with torch.no_grad():
        model(ids, past_key_values=model.new_cache(2, 20))
    assert products == ["w4a16_tiles"] * 4
    for one in (plain, model):
        one.to(torch.float32)  # which has no tiles
    check()
    assert products == ["w4a16_tiles"] * 4
    assert all(type(block.gate_up) is SwiGLULinear for block in model.model.layers)


@pytest.mark.usefixtures("laid_out_as_on_a_gpu")
@pytest.mark.parametrize("why", ["down is rounded", "no whole turns", "no tiles", "one is not packed"])
def test_where_another_kernel_follows_gate_and_up(why, products, monkeypatch):
    """silu(gate) * up is rounded for down, or gate and up cannot be interleaved."""
    monkeypatch.setitem(KINDS, "odd", transformers.LlamaConfig(**TINY | {"intermediate_size": 100}))
    kind = "odd" if why == "no whole turns" else "llama"
    dtype = torch.float32 if why == "no tiles" else torch.bfloat16
    models = [
        tiny(kind, "w4a16-g32", dtype, "gate_proj" if why == "one is not packed" else "") for _ in range(2)
    ]
    if why == "down is rounded":
        for model in models:
            for block in model.model.layers:
                old = block.mlp.down_proj
                weight = rtn(old.quantized().dequantize(), parse_scheme("w8a8"))
                block.mlp.down_proj = QuantLinear.from_quantized(weight)
    plain, model = models[0], quantkit.optimize(models[1])
    ids = torch.randint(2, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert products == ["swiglu_quantize"] * 2
    expected = Beside if why == "one is not packed" else QuantLinear
    assert type(model.model.layers[0].gate_up) is expected


@pytest.mark.usefixtures("laid_out_as_on_a_gpu")
def test_gates_and_ups_of_other_orders_stand_beside_each_other():
    parts = [
        QuantLinear.from_quantized(packed_weight("w4a16-g32", 64, 128, order=order))
        for order in (False, True)
    ]
    for part in parts:
        part.repack(torch.bfloat16)
        assert part.tiled
    assert type(merged(parts, swiglu=True)) is Beside


@pytest.mark.usefixtures("laid_out_as_on_a_gpu")
def test_a_gradient_through_gate_and_up_is_refused():
    linear = quantkit.optimize(tiny("llama", "w4a16-g32", torch.bfloat16)).model.layers[0].gate_up
    y = linear(torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True))
    with pytest.raises(QuantKitError, match="gradients: the model was optimized"):
        y.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 11, 300])
@pytest.mark.parametrize("scheme", TILED)
def test_on_a_gpu_a_kernel_less_loses_no_more(scheme, tokens, products, monkeypatch):
    """Beside float32 models of the same weights: fused, silu(gate) * up is rounded once, not four times."""
    monkeypatch.setitem(KINDS, "biased", BIASED)
    exact = tiny("biased", scheme, torch.float32).cuda()
    plain, model = (tiny("biased", scheme, torch.bfloat16).cuda() for _ in range(2))
    for one in (plain, model):
        for module in one.modules():
            if isinstance(module, QuantLinear):
                module.repack(torch.bfloat16)  # where a CPU had no order to keep
    quantkit.optimize(model)
    ids = torch.randint(2, 96, (2, tokens), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        expected, one, two = (m(ids).logits.float() for m in (exact, plain, model))
    assert products == ["w4a16_tiles"] * 2
    assert (two - expected).norm() <= 1.2 * (one - expected).norm()


@pytest.mark.parametrize("only", ["q_proj", "up_proj", "down_proj"])
def test_linears_that_are_packed_otherwise_stand_beside_each_other(only):
    logits, tokens = outputs(tiny("llama", "w8a8", torch.float32, only))
    model = quantkit.optimize(tiny("llama", "w8a8", torch.float32, only))
    block = model.model.layers[0]
    assert [isinstance(linear, Beside) for linear in (block.qkv, block.gate_up)] == [
        only == "q_proj",
        only == "up_proj",
    ]
    found = outputs(model)
    assert torch.equal(found[0], logits)
    assert torch.equal(found[1], tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_what_the_steps_before_left_in_the_cache(kind):
    plain, model = (tiny(kind, "w8a8", torch.float32) for _ in range(2))
    quantkit.optimize(model)
    ids = torch.randint(2, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    caches = [transformers.DynamicCache(config=m.config) for m in (plain, model)]
    with torch.no_grad():
        for part in (ids[:, :10], ids[:, 10:]):
            expected, found = (
                m(part, past_key_values=cache, use_cache=True).logits
                for m, cache in zip((plain, model), caches, strict=True)
            )
            assert torch.equal(found, expected)
        assert caches[1].get_seq_length() == 11
        assert not torch.equal(found, model(ids[:, 10:]).logits)


def test_hidden_states_and_attentions_are_seen():
    plain, model = (tiny("llama", "w8a8", torch.float32) for _ in range(2))
    quantkit.optimize(model)
    ids = torch.randint(2, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    for m in (plain, model):
        m.set_attn_implementation("eager")
    with torch.no_grad():
        expected, found = (m(ids, output_hidden_states=True, output_attentions=True) for m in (plain, model))
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name]) > 0
        assert all(map(torch.equal, found[name], expected[name]))


def test_embeddings_need_not_be_contiguous():
    plain, model = (tiny("llama", "w8a8", torch.float32) for _ in range(2))
    quantkit.optimize(model)
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1))[:, 1:]
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=x).logits, plain(inputs_embeds=x).logits)


def test_fp8_accumulation_goes_into_the_merged_linears(monkeypatch):
    model = tiny("llama", "fp8", torch.float32)
    quantkit.set_fp8_accumulation(model, "fast")
    quantkit.optimize(model)
    modes = []
    op = torch.ops.quantkit.w8a8_rounded
    monkeypatch.setattr(torch.ops.quantkit, "w8a8_rounded", lambda *a: (modes.append(a[-1]), op(*a))[1])
    with torch.no_grad():
        model(torch.full((1, 3), 7))
        quantkit.set_fp8_accumulation(model, "accurate")
        model(torch.full((1, 3), 7))
    assert modes == [True] * 6 + [False] * 6  # qkv, gate and up, down of two blocks


def test_weights_are_held_once():
    model = tiny("llama", "w8a8", torch.bfloat16)
    held = sum(p.nbytes for p in model.parameters())
    quantkit.optimize(model)
    assert sum(p.nbytes for p in model.parameters()) == held


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_can_be_packed(tied):
    KINDS["tied"] = transformers.LlamaConfig(**TINY, tie_word_embeddings=tied)
    plain, model = tiny("tied", "w8a8", torch.float32), tiny("tied", "w8a8", torch.float32)
    del KINDS["tied"]
    quantkit.optimize(model, head="w8a16")
    assert model.lm_head.scheme.label == "w8a16"
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    head = model.lm_head.quantized().dequantize()
    plain.lm_head.weight = nn.Parameter(head)
    plain.config.tie_word_embeddings = False
    assert (outputs(model)[0] - outputs(plain)[0]).abs().max() < 1e-5


def test_what_cannot_be_optimized_is_refused():
    gelu = tiny("llama", None, torch.float32)
    gelu.config.hidden_act = "gelu"
    static = tiny("llama", None, torch.float32)
    with pytest.raises(QuantKitError, match="head fp8-static: has calibrated scales"):
        quantkit.optimize(static, head="fp8-static")
    static.model.layers[1].to("meta")
    with pytest.raises(QuantKitError, match="is on cpu, meta, expected one device"):
        quantkit.optimize(static)
    with pytest.raises(QuantKitError, match="hidden_act 'gelu', expected 'silu'"):
        quantkit.optimize(gelu)
    other = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
        )
    )
    with pytest.raises(QuantKitError, match="GPTNeoXForCausalLM: model_type 'gpt_neox', expected llama"):
        quantkit.optimize(other)
    model = quantkit.optimize(tiny("llama", None, torch.float32))
    with pytest.raises(QuantKitError, match="fused already"):
        quantkit.optimize(model)
    with pytest.raises(QuantKitError, match=r"save before quantkit\.optimize"):
        model.save_pretrained("/nowhere")
    packed = quantkit.optimize(tiny("llama", None, torch.float32), head="w8a16")
    with pytest.raises(QuantKitError, match="no LM head that is not packed"):
        quantkit.optimize(packed, head="w8a16")
