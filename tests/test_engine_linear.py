"""Linears of vLLM and SGLang with the plug-ins' method, cut over processes, against the whole packed weight.

With an engine's own layers where its package can be imported (vLLM 0.23 and 0.33, SGLang 0.5.23 have been; the model runners need
a GPU and are not part of this), and with a stand-in of SGLang's everywhere.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine_stand_in
from packed_weights import packed_weight
from quantkit import QuantKitError, Rule, convert, sglang_plugin, vllm_plugin
from quantkit.engine_linear import Entries, Entry, check_shard, in_parts
from quantkit.formats.writers import WRITERS
from quantkit.fuse import Beside
from quantkit.hf import QuantKitConfig
from quantkit.linear import QuantLinear
from quantkit.packing import merge_rows
from quantkit.scheme import parse_scheme

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LABELS = ["w4a16-g32", "w4a16-g64-asym", "w4a16-channel", "w3a16-g64", "w8a16", "w8a8", "w8a8-static"]
LABELS += ["w4a8-g64", "fp8", "fp8-block"]
BESIDE = [("channel_scales",), ("input_order",), ("channel_scales", "input_order")]


def content_of(*beside: str, **labels: str) -> dict:
    """A quantkit config.json's part for these modules, all of which have what `beside` names."""
    schemes = {label: parse_scheme(label).to_dict() for label in labels.values()}
    entries = {name: {"scheme": label} | dict.fromkeys(beside, True) for name, label in labels.items()}
    return QuantKitConfig(schemes, entries).to_dict()


def with_beside(weight, *beside: str, seed: int = 0):
    """The weight with channel scales, an order of columns, or both."""
    g, K = torch.Generator().manual_seed(seed), weight.shape[1]
    if "channel_scales" in beside:
        weight = replace(weight, channel_scales=(torch.rand(K, generator=g) + 0.5).bfloat16())
    if "input_order" in beside:
        weight = replace(weight, input_order=torch.randperm(K, generator=g).to(torch.int32))
    return weight


# without an engine


def test_parts_of_a_merged_linear_need_one_scheme():
    entries = Entries(
        content_of(**{"l.q_proj": "w8a16", "l.k_proj": "w8a16", "l.v_proj": "w8a16", "l.o": "fp8"})
    )
    assert entries.of("l.qkv_proj", FUSED) == Entry(parse_scheme("w8a16"))
    assert entries.of("l.o", FUSED) == Entry(parse_scheme("fp8"))
    assert entries.of("l.gate_up_proj", FUSED) is None
    entries.modules["l.v_proj"] = Entry(parse_scheme("w8a16"), channel_scales=True)
    assert entries.of("l.qkv_proj", FUSED) == Entry(parse_scheme("w8a16"), channel_scales=True)
    entries.modules["l.k_proj"] = Entry(parse_scheme("fp8"))
    with pytest.raises(QuantKitError, match=r"l\.qkv_proj: the engine merges .* they are fp8, w8a16"):
        entries.of("l.qkv_proj", FUSED)


def test_compressed_tensors_of_4_bits_are_taken_over():
    weight = packed_weight("w4a16-g32", 32, 64)
    content = WRITERS["compressed-tensors"].config({"m": weight.scheme}, ["lm_head", "re:.*gate$"], False)
    entries = Entries(content)
    assert entries.of("model.m", FUSED) == Entry(weight.scheme)
    assert entries.of("lm_head", FUSED) is None
    assert entries.of("a.gate", FUSED) is None
    for label in ("w4a16-g32-asym", "w8a16", "w8a8", "fp8", "w4a8-g32"):
        other = packed_weight(label, 32, 64)
        with pytest.raises(QuantKitError, match="expected 4-bit pack-quantized"):
            Entries(WRITERS["compressed-tensors"].config({"m": other.scheme}, [], False))


def test_cuts_through_groups_and_blocks_are_refused():
    four, block = parse_scheme("w4a16-g64"), parse_scheme("fp8-block")
    check_shard(four, 128, 256, [32], 32)
    check_shard(block, 128, 256, [128, 128], 512)
    check_shard(block, 200, 200, [90], 90)
    with pytest.raises(QuantKitError, match="cuts 192 columns into 96, expected multiples of 64"):
        check_shard(four, 96, 192, [32], 32)
    with pytest.raises(QuantKitError, match="parts of 64, 64 rows, expected multiples of 128"):
        check_shard(block, 128, 128, [64, 64], 256)


@pytest.mark.parametrize("label", LABELS)
def test_a_weight_in_parts_is_the_same_weight(label):
    parts = [packed_weight(label, n, 256, n) for n in (256, 128)]
    if label == "w8a8-static":
        parts = [replace(part, input_scale=parts[0].input_scale) for part in parts]
    for part, again in zip(parts, in_parts(merge_rows(parts), [256, 128]), strict=True):
        assert torch.equal(again.dequantize(), part.dequantize())
        assert again.shape == part.shape


@pytest.mark.parametrize(("plugin", "engine"), [(vllm_plugin, "vllm"), (sglang_plugin, "sglang")])
def test_registering_without_the_engine_warns_and_breaks_nothing(caplog, monkeypatch, plugin, engine):
    for name in [name for name in sys.modules if name.split(".")[0] == engine]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, engine, None)
    plugin.config_class.cache_clear()
    plugin.register()
    assert "not registered" in caplog.text


# with one


@dataclass
class Engine:
    """An engine's layers.

    Attributes:
        linear: the module of its linears.
        head: its LM head.
        config: of quantkit, its class; `configured` makes one of a config.json's part.
        ranks: a number of processes -> each in turn, as layers that are made then see it.
    """

    plugin: Any
    linear: Any
    head: type
    configured: Callable[[dict], Any]
    ranks: Callable[[int], Iterator[int]]

    def make(self, kind: str, *sizes: Any, content: dict, prefix: str) -> Any:
        settings = {"bias": False, "params_dtype": torch.bfloat16, "prefix": prefix}
        kind = self.head if kind == "head" else getattr(self.linear, kind)
        return kind(*sizes, quant_config=self.configured(content), **settings)


@pytest.fixture
def vllm(monkeypatch):
    linear = pytest.importorskip(
        "vllm.model_executor.layers.linear", reason="vllm is not installed", exc_type=ImportError
    )
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import vocab_parallel_embedding
    from vllm.model_executor.layers.quantization import get_quantization_config

    def ranks(size: int):
        for rank in range(size):
            for module in (linear, parameter, vocab_parallel_embedding):
                monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
                monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
            yield rank

    def configured(content: dict):
        config = get_quantization_config("quantkit").from_config(content)
        config.packed_modules_mapping = FUSED
        return config

    vllm_plugin.config_class.cache_clear()
    vllm_plugin.register()
    vllm_plugin.register()
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        head = vocab_parallel_embedding.ParallelLMHead
        yield Engine(vllm_plugin, linear, head, configured, ranks)


def sglang_like(monkeypatch, see: Callable[[int, int], None]) -> Engine:
    for made in (sglang_plugin.config_class, sglang_plugin.method_class):
        made.cache_clear()
    sglang_plugin.register()
    sglang_plugin.register()
    from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
    from sglang.srt.layers import linear
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    assert QUANTIZATION_CHOICES.count("quantkit") == 1
    assert linear.WEIGHT_LOADER_V2_SUPPORTED.count("QuantKitLinearMethod") == 1

    def ranks(size: int):
        for rank in range(size):
            see(rank, size)
            yield rank

    def configured(content: dict):
        given = {"packed_modules_mapping": {}, "hf_config": object()}  # as most of its models
        return QUANTIZATION_METHODS["quantkit"].from_config(content | given)

    return Engine(sglang_plugin, linear, ParallelLMHead, configured, ranks)


@pytest.fixture
def sglang(monkeypatch):
    linear = pytest.importorskip(
        "sglang.srt.layers.linear", reason="sglang is not installed", exc_type=ImportError
    )
    from sglang.srt.layers import vocab_parallel_embedding

    def see(rank: int, size: int) -> None:
        group = SimpleNamespace(rank_in_group=rank, world_size=size)
        said = SimpleNamespace(tp_group=group, tp_rank=rank, tp_size=size)
        for module in (linear, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_parallel", lambda: said)

    return sglang_like(monkeypatch, see)


@pytest.fixture
def stand_in(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in engine_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)

    def see(rank: int, size: int) -> None:
        engine_stand_in.GROUP = SimpleNamespace(rank_in_group=rank, world_size=size)

    yield sglang_like(monkeypatch, see)
    for made in (sglang_plugin.config_class, sglang_plugin.method_class):
        made.cache_clear()


@pytest.fixture(params=["vllm", "sglang", "stand_in"])
def engine(request) -> Engine:
    return request.getfixturevalue(request.param)


def fill(layer, tensors: dict[str, torch.Tensor], *shard) -> None:
    """What a model's load_weights does with a linear's tensors."""
    parameters = dict(layer.named_parameters())
    for suffix, tensor in tensors.items():
        loader = parameters[suffix].weight_loader
        loader(parameters[suffix], tensor, *shard)


def ready(layer) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> y of a layer that is loaded, without what the engine does before and after."""
    layer.quant_method.process_weights_after_loading(layer)
    return lambda x: layer.quant_method.apply(layer, x)


def stored(weight, target="quantkit") -> dict[str, torch.Tensor]:
    return WRITERS[target].tensors(weight)


def reference(weight) -> QuantLinear:
    linear = QuantLinear.from_quantized(weight)
    linear.repack(torch.bfloat16)
    return linear


def random_x(K: int) -> torch.Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(0)).bfloat16()


def close(y: torch.Tensor, expected: torch.Tensor, bound: float = 0.02) -> None:
    worst = ((y.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    assert worst <= bound, f"{worst:.3f} of the largest, expected {bound}"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("label", LABELS)
def test_merged_columns_load_their_parts(engine, label, size):
    hidden = 256
    content = content_of(**{f"m.{part}": label for parts in FUSED.values() for part in parts})
    q, k, v = (packed_weight(label, n, hidden, i) for i, n in enumerate((512, 256, 256)))
    gate, up = (packed_weight(label, 256, hidden, 9 + i) for i in range(2))
    x = random_x(hidden)
    got: dict[str, list] = {"q": [], "k": [], "v": [], "gate": [], "up": []}
    for _ in engine.ranks(size):
        layer = engine.make("QKVParallelLinear", hidden, 128, 4, 2, content=content, prefix="m.qkv_proj")
        for shard, weight in (("q", q), ("k", k), ("v", v)):
            fill(layer, stored(weight), shard)
        qkv = ready(layer)
        rows = [512 // size, 256 // size, 256 // size]
        for name, part in zip("qkv", qkv(x).split(rows, -1), strict=True):
            got[name].append(part)
        if size == 1:
            merged = merge_rows([q, k, v])
            assert torch.equal(layer.quantkit.quantized().dequantize(), merged.dequantize())
            assert torch.equal(qkv(x), reference(merged)(x))
        layer = engine.make(
            "MergedColumnParallelLinear", hidden, [256, 256], content=content, prefix="m.gate_up_proj"
        )
        for shard, weight in ((0, gate), (1, up)):
            fill(layer, stored(weight), shard)
        for name, part in zip(("gate", "up"), ready(layer)(x).chunk(2, -1), strict=True):
            got[name].append(part)
    for name, weight in (("q", q), ("k", k), ("v", v), ("gate", gate), ("up", up)):
        close(torch.cat(got[name], -1), reference(weight)(x))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("label", LABELS)
def test_rows_are_cut_along_their_columns(engine, label, size):
    weight = packed_weight(label, 128, 512)
    x, content = random_x(512), content_of(**{"m.down": label})
    total, codes = torch.zeros(5, 128), []
    for rank in engine.ranks(size):
        layer = engine.make("RowParallelLinear", 512, 128, content=content, prefix="m.down")
        fill(layer, stored(weight))
        total += ready(layer)(x.chunk(size, -1)[rank]).float()
        codes.append(layer.quantkit.quantized().dequantize())
    assert torch.equal(torch.cat(codes, 1), weight.dequantize())
    # each process rounds its part of x with a scale of its own
    close(total, reference(weight)(x), 0.06 if weight.scheme.activation == "fp8" else 0.02)


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("label", ["w4a16-g32", "w8a8", "fp8-block"])
@pytest.mark.parametrize("alike", [True, False])
def test_parts_keep_their_channel_scales_and_orders(engine, label, beside, alike):
    """One linear where x is the same for all parts, else theirs side by side."""
    content = content_of(*beside, **{"m.gate_proj": label, "m.up_proj": label})
    parts = [
        with_beside(packed_weight(label, 256, 256, i), *beside, seed=0 if alike else i) for i in range(2)
    ]
    x, got = random_x(256), []
    for _ in engine.ranks(2):
        layer = engine.make(
            "MergedColumnParallelLinear", 256, [256, 256], content=content, prefix="m.gate_up_proj"
        )
        for shard, weight in enumerate(parts):
            fill(layer, stored(weight), shard)
        got.append(ready(layer)(x).chunk(2, -1))
        assert isinstance(layer.quantkit, QuantLinear if alike else Beside)
    for i, weight in enumerate(parts):
        close(torch.cat([y[i] for y in got], -1), reference(weight)(x))


def test_a_part_without_channel_scales_meets_x_as_it_is(engine):
    content = content_of(**{"m.gate_proj": "w4a16-g32", "m.up_proj": "w4a16-g32"})
    content["modules"]["m.up_proj"]["channel_scales"] = True
    gate = packed_weight("w4a16-g32", 64, 128)
    up = with_beside(packed_weight("w4a16-g32", 64, 128, 1), "channel_scales")
    for _ in engine.ranks(1):
        layer = engine.make(
            "MergedColumnParallelLinear",
            128,
            [64, 64],
            content=content | {"format_version": 2},
            prefix="m.gate_up_proj",
        )
        fill(layer, stored(gate), 0)
        fill(layer, stored(up), 1)
        x = random_x(128)
        assert torch.equal(ready(layer)(x), torch.cat([reference(gate)(x), reference(up)(x)], -1))


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("label", ["w4a16-g32", "w8a16", "w8a8", "fp8-block"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_cut_order_of_columns_gathers_x(engine, monkeypatch, label, beside, size):
    weight = with_beside(packed_weight(label, 128, 256), *beside)
    x, content = random_x(256), content_of(*beside, **{"m.down": label})
    scaled = x if weight.channel_scales is None else x * weight.channel_scales
    gathered = []

    def gather(layer, part):
        gathered.append(part)
        return scaled

    monkeypatch.setattr(engine.plugin.method_class(), "gather", staticmethod(gather))
    total = torch.zeros(5, 128)
    for rank in engine.ranks(size):
        layer = engine.make("RowParallelLinear", 256, 128, content=content, prefix="m.down")
        fill(layer, stored(weight))
        total += ready(layer)(x.chunk(size, -1)[rank]).float()
    close(total, reference(weight)(x), 0.06 if weight.scheme.activation == "fp8" else 0.02)
    if size == 2 and "input_order" in beside:
        assert torch.equal(torch.cat(gathered, -1), scaled)
    else:
        assert not gathered


def test_an_order_that_is_none_is_refused(engine):
    weight = with_beside(packed_weight("w4a16-g32", 64, 128), "input_order")
    weight.input_order[3] = 128
    for _ in engine.ranks(1):
        content = content_of("input_order", **{"m.down": "w4a16-g32"})
        layer = engine.make("RowParallelLinear", 128, 64, content=content, prefix="m.down")
        fill(layer, stored(weight))
        with pytest.raises(QuantKitError, match="input_order: not an order of the numbers 0 to 127"):
            ready(layer)


@pytest.mark.parametrize("label", ["w4a16-g32", "w4a16-g64-asym", "w8a16", "w8a8-static", "fp8-block"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_packed_head_gives_the_logits_of_its_vocabulary(engine, label, size):
    """Rows beyond the vocabulary, which engines add, are 0."""
    vocabulary, weight = 1000, packed_weight(label, 1000, 256)
    x, content, logits = random_x(256), content_of(lm_head=label), []
    for _ in engine.ranks(size):
        layer = engine.make("head", vocabulary, 256, content=content, prefix="lm_head")
        fill(layer, stored(weight))
        y = ready(layer)(x)
        assert y.shape == (5, 1024 // size)
        assert torch.equal(layer.weight, torch.tensor([1024 // size, 256]))
        logits.append(y)
    logits = torch.cat(logits, -1)
    close(logits[:, :vocabulary], reference(weight)(x))
    assert not logits[:, vocabulary:].any()


def test_a_head_that_is_not_packed_is_left_to_the_engine(engine):
    config = engine.configured(content_of(**{"m.down": "w8a16"}))
    assert config.get_quant_method(object.__new__(engine.head), "lm_head") is None


def test_packed_experts_are_refused(engine):
    content = content_of(**{"l.mlp.experts.0.up_proj": "w4a16-g32", "l.odd": "w8a16"})
    config = engine.configured(content)
    with pytest.raises(QuantKitError, match=r"l\.mlp\.experts: packed experts, .* export to compressed"):
        config.get_quant_method(torch.nn.Identity(), "l.mlp.experts")
    with pytest.raises(QuantKitError, match=r"l\.odd: a packed Identity"):
        config.get_quant_method(torch.nn.Identity(), "l.odd")
    assert config.get_quant_method(torch.nn.Identity(), "l.attn") is None


def test_compressed_tensors_run_on_our_kernels_when_asked(engine):
    parts = [packed_weight("w4a16-g32", 128, 256, i, torch.bfloat16) for i in range(3)]
    content = WRITERS["compressed-tensors"].config({"m": parts[0].scheme}, ["lm_head"], False)
    kind = engine.plugin.config_class()
    assert kind.override_quantization_method(content, "quantkit") == "quantkit"
    assert kind.override_quantization_method(content, None) is None
    assert kind.override_quantization_method({"quant_method": "gptq"}, "quantkit") is None
    for _ in engine.ranks(1):
        layer = engine.make("QKVParallelLinear", 256, 32, 4, 4, content=content, prefix="m.qkv_proj")
        for shard, weight in zip("qkv", parts, strict=True):
            fill(layer, stored(weight, "compressed-tensors"), shard)
        ready(layer)
        assert torch.equal(layer.quantkit.quantized().dequantize(), merge_rows(parts).dequantize())
        assert layer.quantkit.quantized().scales.dtype == torch.bfloat16
        head = engine.configured(content).get_quant_method(layer, "lm_head")
        assert isinstance(head, kind.unpacked)


def test_modules_have_the_names_of_the_engines_model(engine):
    config = engine.configured(content_of(**{"model.m.down": "w8a16"}))
    mapper = SimpleNamespace(apply_list=lambda names: [f"language_model.{name}" for name in names])
    rename = getattr(config, "apply_vllm_mapper", None) or config.apply_weight_name_mapper
    rename(mapper)
    assert list(config.entries.modules) == ["language_model.model.m.down"]


@pytest.mark.parametrize("name", ["vllm", "sglang"])
@pytest.mark.parametrize("target", ["quantkit", "compressed-tensors"])
def test_an_engines_own_llama_loads_a_checkpoint(packed, tmp_path, name, target):
    """All names of tensors, through its load_weights; the head is packed where the format is ours."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    rules = (Rule("lm_head", "w8a16"),) if target == "quantkit" else ()
    folder = packed("llama", "w4a16-g32", rules=rules, tie_word_embeddings=False)
    if target != "quantkit":
        convert(folder, tmp_path / "out", target)
        folder = tmp_path / "out"
    script = Path(__file__).with_name("engine_llama.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, name, folder, "quantkit"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == ("9" if target == "quantkit" else "8")
