"""vLLM's linears with the plug-in's method, cut over processes, against the whole packed weight.

With vLLM's own layers where the package is there (0.23 and 0.33 have been; the model runner needs a GPU and is not part of this).
"""

import pytest
import torch

from packed_weights import packed_weight
from quantkit import QuantKitError, vllm_plugin
from quantkit.formats.writers import WRITERS
from quantkit.hf import QuantKitConfig
from quantkit.linear import QuantLinear
from quantkit.packing import merge_rows
from quantkit.scheme import parse_scheme
from quantkit.vllm_plugin import Schemes, check_shard

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LABELS = ["w4a16-g32", "w4a16-g64-asym", "w4a16-channel", "w3a16-g64", "w8a16", "w8a8", "w8a8-static"]
LABELS += ["w4a8-g64", "fp8", "fp8-block"]


def content_of(**labels: str) -> dict:
    """A quantkit config.json's part for these modules."""
    schemes = {label: parse_scheme(label).to_dict() for label in labels.values()}
    return QuantKitConfig(schemes, {name: {"scheme": label} for name, label in labels.items()}).to_dict()


# without vLLM


def test_parts_of_a_merged_linear_need_one_scheme():
    schemes = Schemes(
        content_of(**{"l.q_proj": "w8a16", "l.k_proj": "w8a16", "l.v_proj": "w8a16", "l.o": "fp8"})
    )
    assert schemes.of("l.qkv_proj", FUSED).label == "w8a16"
    assert schemes.of("l.o", FUSED).label == "fp8"
    assert schemes.of("l.gate_up_proj", FUSED) is None
    schemes.modules["l.k_proj"] = parse_scheme("fp8")
    with pytest.raises(QuantKitError, match=r"l\.qkv_proj: vLLM merges .* they are fp8, w8a16"):
        schemes.of("l.qkv_proj", FUSED)


def test_channel_scales_and_orders_are_refused():
    content = content_of(m="w4a16-g32")
    for key, version in (("channel_scales", 2), ("input_order", 3)):
        content["modules"]["m"] = {"scheme": "w4a16-g32", key: True}
        with pytest.raises(QuantKitError, match="m: has channel scales or an order"):
            Schemes(content | {"format_version": version})


def test_compressed_tensors_of_4_bits_are_taken_over():
    weight = packed_weight("w4a16-g32", 32, 64)
    content = WRITERS["compressed-tensors"].config({"m": weight.scheme}, ["lm_head", "re:.*gate$"], False)
    schemes = Schemes(content)
    assert schemes.of("model.m", FUSED).label == "w4a16-g32"
    assert schemes.of("lm_head", FUSED) is None
    assert schemes.of("a.gate", FUSED) is None
    for label in ("w4a16-g32-asym", "w8a16", "w8a8", "fp8", "w4a8-g32"):
        other = packed_weight(label, 32, 64)
        with pytest.raises(QuantKitError, match="expected 4-bit pack-quantized"):
            Schemes(WRITERS["compressed-tensors"].config({"m": other.scheme}, [], False))


def test_cuts_through_groups_and_blocks_are_refused():
    four, block = parse_scheme("w4a16-g64"), parse_scheme("fp8-block")
    check_shard(four, 128, 256, [32], 32)
    check_shard(block, 128, 256, [128, 128], 512)
    check_shard(block, 200, 200, [90], 90)
    with pytest.raises(QuantKitError, match="cuts 192 columns into 96, expected multiples of 64"):
        check_shard(four, 96, 192, [32], 32)
    with pytest.raises(QuantKitError, match="parts of 64, 64 rows, expected multiples of 128"):
        check_shard(block, 128, 128, [64, 64], 256)


def test_registering_without_vllm_warns_and_breaks_nothing(caplog, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    vllm_plugin.config_class.cache_clear()
    vllm_plugin.register()
    assert "not registered" in caplog.text


# with it


@pytest.fixture
def ranks(monkeypatch):
    """ranks(size) -> each rank in turn, as vLLM's layers and parameters see it."""
    linear = pytest.importorskip(
        "vllm.model_executor.layers.linear", reason="vllm is not installed", exc_type=ImportError
    )
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter

    vllm_plugin.config_class.cache_clear()
    vllm_plugin.register()
    vllm_plugin.register()

    def each(size: int):
        for rank in range(size):
            for module in (linear, parameter):
                monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
                monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
            yield rank

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        yield each


def configured(content: dict):
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = get_quantization_config("quantkit").from_config(content)
    config.packed_modules_mapping = FUSED
    return config


def fill(layer, tensors: dict[str, torch.Tensor], *shard) -> None:
    """What a model's load_weights does with a linear's tensors."""
    parameters = dict(layer.named_parameters())
    for suffix, tensor in tensors.items():
        loader = parameters[suffix].weight_loader
        loader(parameters[suffix], tensor, *shard)


def stored(weight, target="quantkit") -> dict[str, torch.Tensor]:
    return WRITERS[target].tensors(weight)


def reference(weight) -> QuantLinear:
    linear = QuantLinear.from_quantized(weight)
    linear.repack(torch.bfloat16)
    return linear


def close(y: torch.Tensor, expected: torch.Tensor, bound: float = 0.02) -> None:
    worst = ((y.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    assert worst <= bound, f"{worst:.3f} of the largest, expected {bound}"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("label", LABELS)
def test_merged_columns_load_their_parts(ranks, label, size):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    hidden = 256
    content = content_of(**{f"m.{part}": label for parts in FUSED.values() for part in parts})
    q, k, v = (packed_weight(label, n, hidden, i) for i, n in enumerate((512, 256, 256)))
    gate, up = (packed_weight(label, 256, hidden, 9 + i) for i in range(2))
    x = torch.randn(5, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    got: dict[str, list] = {"q": [], "k": [], "v": [], "gate": [], "up": []}
    for _ in ranks(size):
        qkv = QKVParallelLinear(
            hidden,
            128,
            4,
            2,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=configured(content),
            prefix="m.qkv_proj",
        )
        for shard, weight in (("q", q), ("k", k), ("v", v)):
            fill(qkv, stored(weight), shard)
        qkv.quant_method.process_weights_after_loading(qkv)
        for name, part in zip(
            "qkv", qkv(x)[0].split([512 // size, 256 // size, 256 // size], -1), strict=True
        ):
            got[name].append(part)
        both = MergedColumnParallelLinear(
            hidden,
            [256, 256],
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=configured(content),
            prefix="m.gate_up_proj",
        )
        for shard, weight in ((0, gate), (1, up)):
            fill(both, stored(weight), shard)
        both.quant_method.process_weights_after_loading(both)
        for name, part in zip(("gate", "up"), both(x)[0].chunk(2, -1), strict=True):
            got[name].append(part)
        if size == 1:
            merged = merge_rows([q, k, v])
            assert torch.equal(qkv.quantkit.quantized().dequantize(), merged.dequantize())
            assert torch.equal(qkv(x)[0], reference(merged)(x))
    for name, weight in (("q", q), ("k", k), ("v", v), ("gate", gate), ("up", up)):
        close(torch.cat(got[name], -1), reference(weight)(x))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("label", LABELS)
def test_rows_are_cut_along_their_columns(ranks, label, size):
    from vllm.model_executor.layers.linear import RowParallelLinear

    weight = packed_weight(label, 128, 512)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    total, codes = torch.zeros(5, 128), []
    for rank in ranks(size):
        layer = RowParallelLinear(
            512,
            128,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=configured(content_of(**{"m.down": label})),
            prefix="m.down",
        )
        fill(layer, stored(weight))
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x.chunk(size, -1)[rank]).float()
        codes.append(layer.quantkit.quantized().dequantize())
    assert torch.equal(torch.cat(codes, 1), weight.dequantize())
    # each process rounds its part of x with a scale of its own
    close(total, reference(weight)(x), 0.06 if weight.scheme.activation == "fp8" else 0.02)


def test_compressed_tensors_run_on_our_kernels_when_asked(ranks):
    from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import get_quantization_config

    parts = [packed_weight("w4a16-g32", 128, 256, i, torch.bfloat16) for i in range(3)]
    content = WRITERS["compressed-tensors"].config({"m": parts[0].scheme}, ["lm_head"], False)
    kind = get_quantization_config("quantkit")
    assert kind.override_quantization_method(content, "quantkit") == "quantkit"
    assert kind.override_quantization_method(content, None) is None
    assert kind.override_quantization_method({"quant_method": "gptq"}, "quantkit") is None
    for _ in ranks(1):
        layer = QKVParallelLinear(
            256,
            32,
            4,
            4,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=configured(content),
            prefix="m.qkv_proj",
        )
        for shard, weight in zip("qkv", parts, strict=True):
            fill(layer, stored(weight, "compressed-tensors"), shard)
        layer.quant_method.process_weights_after_loading(layer)
        assert torch.equal(layer.quantkit.quantized().dequantize(), merge_rows(parts).dequantize())
        assert layer.quantkit.quantized().scales.dtype == torch.bfloat16
        head = configured(content).get_quant_method(layer, "lm_head")
        assert isinstance(head, UnquantizedLinearMethod)
