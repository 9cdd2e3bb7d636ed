import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from quantkit.errors import QuantKitError
from quantkit.eval import linears, timing
from quantkit.eval.decode import (
    StaticDecoder,
    bench_decode,
    cache_bytes,
    captured_step,
    generate,
    scheme_of,
    weight_bytes_read,
)
from quantkit.eval.linears import SHAPES, bench_linears, model_shapes
from quantkit.eval.random_model import CONFIGS, random_model
from quantkit.eval.random_weights import STD, random_quantized
from quantkit.eval.roofline import Roof
from quantkit.eval.sizes import bits_per_weight, disk_bytes, memory_bytes
from quantkit.linear import QuantLinear
from quantkit.optimize import optimize
from quantkit.packing import unpack_codes
from quantkit.scheme import PRESETS, parse_scheme

# At its first use torch notes which functions a device context governs: it must see the real ones, not those
# that conftest.py puts in their place during a test.
with torch.device("meta"):
    torch.empty(0)

SCHEMES = [*PRESETS, "w4a16-g32-asym", "w4a16-channel"]
# K of two groups and two tiles; hidden size 256, 2 key-value heads of 4
TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=5,
    tie_word_embeddings=False,
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
KEYS = """kind shape N K M scheme group_size kernel us p20_us p80_us limit_us bf16_us rel_error
          device torch triton commit date""".split()


@pytest.mark.parametrize("label", SCHEMES)
@pytest.mark.parametrize(("N", "K"), [(256, 512), (130, 200)], ids=["whole tiles", "ragged"])
def test_random_codes_stand_for_ordinary_weights(label, N, K):
    scheme = parse_scheme(label)
    q = random_quantized(scheme, N, K, generator=torch.Generator().manual_seed(0))
    w = q.dequantize()
    assert w.shape == (N, K)
    assert w.isfinite().all()
    # scales lie between half and three halves of the mean; a random zero point adds its own variance
    assert 0.5 * STD <= w.std().item() <= 2 * STD
    assert len(q.scales.unique()) > min(q.scales.numel() // 4, 20)
    if scheme.bits < 8:
        stored = q.codes.shape[1] * 32 // scheme.bits
        assert unpack_codes(q.codes, stored, scheme.bits)[:, K:].sum() == 0


def test_random_codes_repeat_with_their_seed():
    scheme = parse_scheme("w4a16-g64-asym")
    a, b = (random_quantized(scheme, 16, 128, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a.tensors()[name], tensor) for name, tensor in b.tensors().items())


@pytest.mark.parametrize("label", SCHEMES)
def test_a_record_a_shape_scheme_and_m(label):
    seen = []
    records = bench_linears(
        [("square", 256, 256), ("ragged", 130, 200)],
        [parse_scheme(label)],
        [1, 17],
        "cpu",
        replays=3,
        working_set=200_000,
        commit="abc1234",
        on_record=seen.append,
    )
    assert seen == records
    rounds_x = label in ("w8a8", "fp8", "fp8-block") or label.startswith("w4a8")
    variants = [None]
    if rounds_x:
        fast = ["x in 8 bits, fast sums"] if label == "fp8" else []
        variants = [None, "x in 8 bits", *fast, "after residual and norm"]
    assert [(r["shape"], r["M"], r.get("variant")) for r in records] == [
        (shape, M, variant) for shape in ("square", "ragged") for M in (1, 17) for variant in variants
    ]
    for record in records:
        assert set(KEYS) <= set(record)
        assert "refused" not in record
        assert record["scheme"] == parse_scheme(label).label
        assert 0 < record["p20_us"] <= record["us"] <= record["p80_us"]
        assert 0 < record["rel_error"] <= linears.ERROR_BOUNDS[parse_scheme(label).activation]
        assert record["limit_us"] is None
        assert record["commit"] == "abc1234"
        json.dumps(record, allow_nan=False)


def test_a_wrong_product_gets_no_time(monkeypatch):
    right = QuantLinear.forward
    for damage, finite in ((lambda y: y * 1.05, True), (lambda y: y * math.nan, False)):
        monkeypatch.setattr(QuantLinear, "forward", lambda self, x, damage=damage: damage(right(self, x)))
        (record,) = bench_linears(
            [("o", 64, 128)], [PRESETS["w8a16"]], [4], "cpu", replays=3, working_set=10_000
        )
        assert record["us"] is record["p20_us"] is record["p80_us"] is None
        assert "exceeds 0.01" in record["refused"]
        assert (record["rel_error"] is not None) == finite
        json.dumps(record, allow_nan=False)


def test_enough_copies_to_leave_the_cache():
    assert linears.copies(100, 1000) * 100 > 1000
    assert linears.copies(2000, 1000) == 1
    assert linears.copies(1, 10**9) == linears.MOST_COPIES


def test_the_limit_is_bytes_or_operations_whichever_takes_longer():
    roof = Roof(bandwidth=1e12, flops=1e14, flops_8bit=2e14, source="test")
    assert roof.seconds(1e6, 1e6) == 1e-6
    assert roof.seconds(1, 1e10) == 1e-4
    assert roof.seconds(1, 1e10, eight_bit=True) == 5e-5


def test_the_shapes_of_llama_3_8b():
    config = LlamaConfig(**CONFIGS["llama-3-8b"])
    hidden, ffn = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * hidden // config.num_attention_heads
    assert SHAPES["llama-3-8b"] == [
        ("qkv", hidden + 2 * kv, hidden),
        ("o", hidden, hidden),
        ("gate_up", 2 * ffn, hidden),
        ("down", hidden, ffn),
    ]


def test_a_call_is_timed_each_and_the_launches_take_turns():
    calls = []
    time = timing.time_launches(
        [lambda: calls.append("a"), lambda: calls.append("b")], torch.device("cpu"), 6
    )
    assert calls == ["a", "b"] + ["a", "b"] * 3  # the first two warm up
    assert 0 < time.p20_us <= time.us <= time.p80_us


@pytest.mark.parametrize(
    ("distinct", "ms", "sample", "rounds"),
    [
        *(
            (distinct, 0.01, 2e-3, rounds)
            for distinct, rounds in [(1, 32), (3, 11), (31, 2), (32, 1), (33, 1)]
        ),
        *((3, ms, 2e-3, rounds) for ms, rounds in [(0.25, 3), (0.5, 2), (0.75, 1), (10, 1)]),
        (3, 10, math.inf, 11),
    ],
)
def test_a_graph_holds_whole_rounds_until_they_are_many_or_take_long(
    distinct, ms, sample, rounds, monkeypatch
):
    calls, graphs = [], []

    class Clock:
        """`ms` a launch."""

        def record(self):
            self.at = len(calls)

        def elapsed_time(self, end):
            return (end.at - self.at) * ms

        def synchronize(self):
            pass

    def capture(run):
        calls.clear()
        run()
        graphs.append([*calls])
        return SimpleNamespace(replay=run)

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Clock())
    monkeypatch.setattr(timing, "capture", capture)
    launches = [lambda i=i: calls.append(i) for i in range(distinct)]
    found = timing.graph_seconds(launches, torch.device("cuda"), 2, sample)
    assert found == pytest.approx([ms * 1e-3] * 2)
    assert graphs[0] == [*range(distinct)]
    assert graphs[-1] == [*range(distinct)] * rounds


@pytest.mark.parametrize("label", [None, *SCHEMES])
def test_a_random_model_runs_and_its_linears_are_packed(label):
    scheme = parse_scheme(label) if label else None
    model = random_model(TINY, scheme, layers=1)
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(packed) == (7 if label else 0)
    assert not any(isinstance(m, nn.Linear) for m in model.model.layers.modules()) or not label
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(torch.arange(12).view(1, 12)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert scheme_of(model) == (scheme.label if scheme else "bfloat16")


def test_a_random_model_has_the_rotary_frequencies_of_a_real_one():
    from transformers import LlamaForCausalLM

    made = random_model(TINY, None, layers=1).model.rotary_emb
    assert torch.equal(made.inv_freq, LlamaForCausalLM(TINY).model.rotary_emb.inv_freq)


def test_an_unknown_model_shape_is_named():
    with pytest.raises(QuantKitError, match="unknown model shape 'llama-9'; known: llama-3-8b"):
        random_model("llama-9", None)


def test_the_shapes_of_a_loaded_model():
    model = random_model(TINY, PRESETS["w8a16"])
    assert model_shapes(model) == [
        ("q_proj+o_proj", 256, 256),
        ("k_proj+v_proj", 128, 256),
        ("gate_proj+up_proj", 384, 256),
        ("down_proj", 256, 384),
    ]


def test_sizes_count_what_is_stored(tmp_path):
    model = random_model(TINY, parse_scheme("w4a16-g128-asym"), layers=1)
    assert bits_per_weight(model) == 4 + (16 + 8) / 128
    assert bits_per_weight(nn.Linear(4, 4)) is None
    weights = 256 * (2 * 256 + 2 * 128 + 3 * 384)
    assert memory_bytes(model) == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.unpack()  # a CPU's order has scales of its own beside the stored ones
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert memory_bytes(model) == held
    assert held - weights * (4 + 24 / 128) / 8 < 2 * 2 * 96 * 256 + 4096  # two tables, and norms and the like

    (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 5)
    (tmp_path / "config.json").write_text("{}")
    assert disk_bytes(tmp_path) == 15
    with pytest.raises(QuantKitError, match="give the folder of a checkpoint"):
        disk_bytes(tmp_path / "absent")


def test_a_tied_table_is_counted_once():
    tied, untied = (
        random_model(LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": tie}), None, layers=1)
        for tie in (True, False)
    )
    table = 96 * 256 * 2
    assert memory_bytes(untied) - memory_bytes(tied) == table
    # as the head it is read in every step; as an embedding alone only a row of it is
    assert weight_bytes_read(tied) == weight_bytes_read(untied)


def test_repacked_weights_are_read_too():
    model = random_model(TINY, parse_scheme("w4a16-g128"), layers=1)
    assert all(m.packed is not None for m in model.modules() if isinstance(m, QuantLinear))
    assert weight_bytes_read(model) == memory_bytes(model) - 96 * 256 * 2  # all but the embedding table


def test_bytes_of_keys_and_values():
    # keys and values, 2 layers, 2 heads of 64, bfloat16, 3 sequences of 10 tokens
    assert cache_bytes(random_model(TINY, None), 3, 10) == 2 * 2 * 2 * 64 * 2 * 3 * 10


def float_model():
    return random_model(TINY, PRESETS["w8a16"], dtype=torch.float32)


def test_a_static_cache_decodes_what_generate_does():
    model, prompt = float_model(), torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = generate(model, prompt, 9)
    decoder = StaticDecoder(model, batch=2, max_length=16)
    assert decoder.capturable
    for _ in range(2):  # a prefill starts over
        decoder.prefill(prompt)
        tokens = [decoder.token.clone()]
        for _ in range(8):
            decoder.step()
            tokens.append(decoder.token.clone())
        assert torch.equal(torch.cat(tokens, 1), expected)


class NoHostReads(TorchDispatchMode):
    """Fails on what a CUDA graph cannot capture: a result whose shape or Python value depends on the data."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return function(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device():
    model = random_model(TINY, None)
    decoder = StaticDecoder(model, batch=2, max_length=16)
    decoder.prefill(torch.ones(2, 7, dtype=torch.int64))
    with NoHostReads():
        decoder.step()
    with pytest.raises(AssertionError), NoHostReads():
        decoder.token[0, 0].item()


def test_generate_goes_on_past_the_end_token():
    model = float_model()
    with torch.no_grad():
        model.lm_head.weight[5] = 0  # the end token
    prompt = torch.ones(1, 4, dtype=torch.int64)
    free = generate(model, prompt, 1)
    model.generation_config.eos_token_id = int(free)
    assert generate(model, prompt, 6).shape == (1, 6)


def test_a_decode_record_on_the_cpu_has_no_graph():
    model = random_model(TINY, PRESETS["w4a16"])
    record = bench_decode(
        model, batch=2, prompt_len=8, new_tokens=4, repeats=1, name="tiny", commit="abc1234"
    )
    assert record["graph_ms"] is record["graph_tokens_per_s"] is record["limit_ms"] is None
    assert record["scheme"] == "w4a16-g128"
    assert record["memory_bytes"] == memory_bytes(model)
    assert "optimized" not in record
    record = bench_decode(
        optimize(model, head="w8a16", kv="int8"), batch=2, prompt_len=8, new_tokens=4, repeats=1
    )
    assert record["optimized"] == "int8 KV, w8a16 head"
    assert record["prefill_tokens_per_s"] > 0
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("batch", "prompt_len", "new_tokens", "message"),
    [(1, 8, 1, "1 new tokens"), (0, 8, 4, "batch 0"), (1, 60, 5, "context of 64")],
)
def test_a_decode_run_that_cannot_be_is_refused(batch, prompt_len, new_tokens, message):
    with pytest.raises(QuantKitError, match=message):
        bench_decode(float_model(), batch, prompt_len, new_tokens)


@pytest.mark.gpu
@needs_gpu
def test_a_replayed_graph_decodes_what_generate_does():
    model = random_model(TINY, None, dtype=torch.float32, device="cuda")
    prompt = torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(0)).cuda()
    expected = generate(model, prompt, 9)
    decoder, graph = captured_step(model, prompt, 9)
    tokens = [decoder.token.clone()]
    for _ in range(8):
        graph.replay()
        tokens.append(decoder.token.clone())
    assert torch.equal(torch.cat(tokens, 1), expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("label", SCHEMES)
def test_speed_on_the_gpu_has_limits_and_graphs(label):
    scheme = parse_scheme(label)
    for record in bench_linears([("o", 1024, 1024)], [scheme], [16], "cuda", replays=3):
        assert "refused" not in record
        assert 0 < record["limit_us"]
    record = bench_decode(random_model(TINY, scheme, device="cuda"), 2, 8, 4, repeats=1)
    assert 0 < record["limit_ms"]
    assert record["graph_ms"] > 0
