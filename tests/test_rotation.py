"""Rotations leave a model's function as it was, whatever its architecture, and spread what was concentrated."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, OPTConfig

from quantkit import QuantLinear, Recipe, Rule, quantize, quantize_checkpoint
from quantkit.calibration.folds import fold_into_norm
from quantkit.calibration.rotation import (
    hadamard,
    is_prime,
    random_rotation,
    random_rotations,
    rotate_block,
    rotate_outer,
    untie_head,
)
from quantkit.errors import QuantKitError
from quantkit.models import FOLDS, WRITERS, decoder_blocks, linears
from quantkit.quantize import Progress

RESIDUAL = ["llama", "mistral", "qwen2", "qwen3", "phi3"]
HEADS_ALONE = ["gemma2", "gemma3"]
EPS = torch.finfo(torch.float64).eps


def text() -> torch.Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(text()).logits


def rotate(model, seed=0):
    rotation = random_rotations(model, seed)
    if rotation.residual is not None:
        untie_head(model)
    rotate_outer(model, rotation)
    for block in decoder_blocks(model)[1]:
        rotate_block(block, rotation)
    return rotation


def check_same_function(model, before):
    # norms compute their statistics in float32, which a rotation makes round another way
    noise = torch.finfo(torch.float32).eps * before.abs().max().item()
    error = (logits(model) - before).abs().max().item()
    assert error <= 64 * noise, f"logits are {error:.2e} off, rounding explains {64 * noise:.2e}"


@pytest.mark.parametrize("n", [1, 2, 4, 12, 16, 20, 24, 28, 36, 60, 64, 84, 96, 104, 896])
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_size(n):
    H = hadamard(n)
    assert torch.equal(H.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [1536, 2048, 2560, 3072, 3584, 3840, 4096, 5120, 5376, 6144, 7168, 8192])
def test_usual_hidden_sizes_have_a_hadamard_matrix(n):
    while n % 2 == 0 and hadamard(n // 2) is not None:
        n //= 2
    assert hadamard(n) is not None


@pytest.mark.parametrize("n", [3, 6, 50, 52])
def test_other_sizes_have_none_and_get_a_random_orthogonal_matrix(n):
    assert hadamard(n) is None
    assert not random_rotation(n, 0).abs().allclose(torch.tensor(n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 6, 50, 64, 96, 256])
def test_rotations_are_orthogonal_seeded_and_random(n):
    R = random_rotation(n, 0)
    assert (R @ R.T - torch.eye(n, dtype=torch.float64)).abs().max() <= 8 * n * EPS
    assert torch.equal(R, random_rotation(n, 0))
    if n > 1:
        assert not torch.equal(R, random_rotation(n, 1))


def test_primes():
    assert [n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", [*RESIDUAL, *HEADS_ALONE])
def test_a_rotated_model_computes_what_it_did(architecture, tied, tiny):
    model = tiny(architecture, torch.float64, tie_word_embeddings=tied)
    before = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotation = rotate(model)
    check_same_function(model, before)
    unchanged = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, state[name])}
    if architecture in HEADS_ALONE:
        changed = set(state) - unchanged
        assert {name.split(".")[-2] for name in changed} == {"v_proj", "o_proj"}
        assert "heads" in rotation.remark
        assert model.config.tie_word_embeddings is tied
    else:
        # norms of queries and keys, and the biases of linears that only read, are all that stays
        assert all("q_norm" in n or "k_norm" in n or n.endswith("proj.bias") for n in unchanged)
        assert not rotation.remark
        assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("changes", [dict(hidden_size=60, head_dim=10), dict(num_key_value_heads=4)])
def test_widths_without_a_hadamard_matrix_and_other_head_counts_work(changes, tiny):
    model = tiny("llama", torch.float64, **changes)
    before = logits(model)
    rotate(model)
    check_same_function(model, before)


def test_biases_of_writers_are_rotated(tiny):
    model = tiny("llama", torch.float64, attention_bias=True, mlp_bias=True)
    before = logits(model)
    rotate(model)
    check_same_function(model, before)


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_every_linear_of_a_block_reads_or_writes_the_residual_stream(kind, tiny):
    block = decoder_blocks(tiny(kind))[1][0]
    readers = {
        name
        for fold in FOLDS[kind]
        if not isinstance(block.get_submodule(fold.source), nn.Linear)
        for name in fold.linears
    }
    assert set(linears(block)) == readers | set(WRITERS[kind])
    assert not readers & set(WRITERS[kind])


@pytest.mark.parametrize("architecture", RESIDUAL)
def test_norms_are_one_and_can_take_scales_afterwards(architecture, tiny):
    model = tiny(architecture, torch.float64)
    before = logits(model)
    rotate(model)
    s = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    assert torch.equal(model.model.norm.weight, torch.ones_like(s))
    for block in decoder_blocks(model)[1]:
        for fold in FOLDS[architecture]:
            source = block.get_submodule(fold.source)
            if isinstance(source, nn.Linear):
                continue
            assert torch.equal(source.weight, torch.ones_like(s))
            source.weight.data, reached = fold_into_norm(source.weight.data, s)
            for name in fold.linears:
                block.get_submodule(name).weight.data *= reached
    check_same_function(model, before)


def test_one_large_channel_is_spread(tiny):
    model = tiny("llama", torch.float64)
    linear = model.model.layers[0].mlp.gate_proj
    linear.weight.data[:, 5] *= 100
    peak = lambda: (linear.weight.abs().amax() / linear.weight.square().mean().sqrt()).item()
    before = peak()
    rotate(model)
    assert before > 15  # a Gaussian of 96 x 64 values peaks at about 4
    assert peak() < 6


def test_low_precision_is_rounded_once(tiny):
    model, exact = tiny("llama"), tiny("llama").double()
    rotate(model)
    rotate(exact)
    for (name, got), expected in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(got, expected.to(torch.bfloat16)), name


def test_the_embedding_can_be_rounded_to_what_will_be_stored(tiny):
    stored, wide = tiny("llama"), tiny("llama").float()
    for model in (stored, wide):
        untie_head(model)
        rotate_outer(model, random_rotations(model, 0), torch.bfloat16)
    assert wide.lm_head.weight.dtype == torch.float32
    assert torch.equal(stored.lm_head.weight.float(), wide.lm_head.weight)
    assert torch.equal(stored.model.embed_tokens.weight.float(), wide.model.embed_tokens.weight)


def test_an_untied_head_is_stored_and_loaded(tiny, tmp_path):
    model = tiny("llama", torch.float32, tie_word_embeddings=True)
    assert untie_head(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert untie_head(model) == {}
    rotate_outer(model, random_rotations(model, 0))
    model.tie_weights()  # does not tie them again
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2),
        GPTNeoXConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ),
    ],
    ids=["opt", "gpt_neox"],
)
def test_architectures_that_are_not_known_are_refused(config):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        QuantKitError, match=rf"a {config.model_type} model cannot be rotated: .*known: llama"
    ):
        random_rotations(model, 0)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", [*RESIDUAL, *HEADS_ALONE])
def test_a_rotated_checkpoint_loads_as_the_model_it_was(architecture, tied, source, packed):
    changes = dict(tie_word_embeddings=tied)
    folder = packed(architecture, "w8a16", "rotate+rtn", **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(source(architecture, **changes), dtype=torch.float32)
    # 0.7% of noise a linear from 8 bits, as without rotation, and 0.2% a tensor from bfloat16
    assert relative(logits(model), logits(original).double()) < 0.03
    assert model.config.tie_word_embeddings is (tied and architecture in HEADS_ALONE)
    modules = model.config.quantization_config.modules.values()
    assert all(("value heads" in m.get("remark", "")) is (architecture in HEADS_ALONE) for m in modules)


@pytest.mark.parametrize("method", ["rotate+rtn", "rotate+gptq", "rotate+awq", "rotate"])
def test_from_directory_to_directory_gives_what_memory_gives(method, source, packed, tokens, tmp_path):
    folder = packed("qwen2", "w4a16-g32", method, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source("qwen2", dtype=torch.float32))
    quantize(model, Recipe("w4a16-g32", method), tokens=tokens).save_pretrained(tmp_path / "memory")
    one, two = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "memory"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_head_that_rotation_unties_can_be_packed(source, packed):
    rules = (Rule("lm_head", "w8a16"),)
    changes = dict(tie_word_embeddings=True)
    folder = packed("llama", "w8a16", "rotate+rtn", rules, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model.lm_head, QuantLinear)
    original = AutoModelForCausalLM.from_pretrained(source("llama", **changes), dtype=torch.float32)
    assert relative(logits(model), logits(original).double()) < 0.03


def test_a_rule_cannot_rotate():
    with pytest.raises(
        QuantKitError, match="rule with method 'rotate\\+rtn': a rotation is of the whole model"
    ):
        Recipe("w8a16", "rtn", (Rule("q_proj", method="rotate+rtn"),))


def test_a_killed_run_goes_on_to_the_same_bytes(source, packed, tokens, tmp_path):
    steps = iter(range(2))  # the outer part and a block, and then the end
    with pytest.raises(StopIteration):
        quantize_checkpoint(
            source("llama", tie_word_embeddings=True),
            tmp_path / "out",
            Recipe("w4a16-g32", "rotate+gptq"),
            "cpu",
            tokens,
            Progress(step=lambda: next(steps)),
        )
    assert (tmp_path / "out.partial" / "block-00000.safetensors").exists()
    quantize_checkpoint(
        source("llama", tie_word_embeddings=True),
        tmp_path / "out",
        Recipe("w4a16-g32", "rotate+gptq"),
        "cpu",
        tokens,
    )
    whole = packed("llama", "w4a16-g32", "rotate+gptq", tie_word_embeddings=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
