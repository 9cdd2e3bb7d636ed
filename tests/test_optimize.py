"""optimize: fused blocks are the same function of the same weights, to the bit on a CPU."""

from copy import deepcopy

import pytest
import torch
import transformers
from torch import nn

import quantkit
from quantkit.calibration.rtn import rtn
from quantkit.errors import QuantKitError
from quantkit.fuse import Beside, FusedBlock
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
