"""The packages that formats come from, as oracles: what they read of ours and we of theirs is equal to the last bit.

Each test needs one of them and says which; compressed-tensors, gguf and hypothesis come with quantkit[dev].
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import quantkit
from packed_weights import packed_weight, stored
from quantkit import convert
from quantkit.demo import EXAMPLE
from quantkit.foreign import dequantized_model
from quantkit.formats import gguf_blocks, open_source
from quantkit.formats.awq import AWQ
from quantkit.formats.bitsandbytes import BitsAndBytes
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.gptq import GPTQ
from quantkit.formats.hqq import HQQ
from quantkit.formats.writers import WRITERS
from quantkit.linear import QuantLinear

MODELS = (folder / "shared" / "models" / "lm-27m" for folder in Path(__file__).parents)
MODEL = next((folder for folder in MODELS if folder.is_dir()), EXAMPLE)  # what peers make checkpoints of
ALL = [f"w{b}a16-{g}{z}" for b in (2, 3, 4) for g in ("g32", "g64", "channel") for z in ("", "-asym")]


def oracle(name: str):
    return pytest.importorskip(name, reason=f"the oracle {name} is not installed", exc_type=ImportError)


def named(tensors, module="m"):
    return lambda names: {n: tensors[n.removeprefix(f"{module}.")] for n in names}


def gptqmodel_linear(scheme, N, K, ordered=False):
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    oracle("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    module = TorchLinear(
        bits=scheme.bits,
        group_size=scheme.group_size or -1,
        sym=scheme.symmetric,
        desc_act=ordered,
        in_features=K,
        out_features=N,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    return module


# GPTQ


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("label", [*ALL, "w8a16"])
def test_gptqmodel_dequantizes_ours(label, version):
    ordered = label == "w4a16-g32"
    weight = packed_weight(label, 64, 256, order=ordered)
    module = gptqmodel_linear(weight.scheme, 64, 256, ordered)
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    for suffix, tensor in WRITERS[version].tensors(weight).items():
        module.register_buffer(suffix, tensor)
    if version == "gptq":
        convert_gptq_v1_to_v2_format_module(module, weight.scheme.bits, torch.int32)
    module.post_init()
    assert torch.equal(module.dequantize_weight().T, weight.effective_weight(torch.float16))


@pytest.mark.parametrize("label", ["w2a16-g32", "w3a16-g64-asym", "w4a16-g32-asym", "w4a16-channel", "w8a16"])
def test_we_dequantize_what_gptqmodel_packs(label):
    given = packed_weight(label, 64, 256)
    scheme = given.scheme
    module = gptqmodel_linear(scheme, 64, 256)
    linear = nn.Linear(256, 64, bias=False)
    linear.weight.data = given.dequantize()
    zeros = torch.full(given.scales.shape, 2.0 ** (scheme.bits - 1)) if given.zeros is None else given.zeros
    groups = torch.arange(256) // (scheme.group_size or 256)
    module.pack_original(linear, given.scales.float(), zeros.float(), groups.int())
    tensors = {s: getattr(module, s) for s in ("qweight", "qzeros", "scales", "g_idx")}
    config = WRITERS["gptq_v2"].config({"m": scheme}, [], False)
    read = GPTQ(config, stored(tensors)).linear("m", tensors)
    module.post_init()
    assert torch.equal(read.quantized.dequantize(torch.float16), module.dequantize_weight().T)
    assert torch.equal(read.quantized.codes, given.codes)


# AWQ


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", ["w4a16-g32", "w4a16-g64-asym", "w4a16-channel-asym"])
def test_autoawq_dequantizes_ours_and_we_what_it_packs(label):
    oracle("awq")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    weight = packed_weight(label, 64, 256)
    tensors = WRITERS["awq"].tensors(weight)
    size = weight.scheme.group_size or 256
    theirs = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, size)
    assert torch.equal(theirs.T, weight.dequantize(torch.float16))

    linear = nn.Linear(256, 64, bias=False)
    linear.weight.data = weight.dequantize()
    zeros = torch.full(weight.scales.shape, 8) if weight.zeros is None else weight.zeros
    packed = WQLinear_GEMM.from_linear(
        linear, 4, size, scales=weight.scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    tensors = {s: getattr(packed, s) for s in ("qweight", "qzeros", "scales")}
    config = WRITERS["awq"].config({"m": weight.scheme}, [], False)
    read = AWQ(config, stored(tensors)).linear("m", tensors).quantized
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.dequantize(), weight.dequantize())


# compressed-tensors


CT = [*ALL, "w4a16-g128", "w8a16", "w8a8", "w8a8-static", "w4a8-g32", "w4a8-channel-asym"]
CT += ["fp8", "fp8-static", "fp8-block", "fp8-w8a16"]


def their_scheme(config):
    from compressed_tensors.quantization import QuantizationConfig

    return next(iter(QuantizationConfig(**config).config_groups.values()))


@pytest.mark.parametrize("label", CT)
def test_compressed_tensors_decompresses_ours(label):
    oracle("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    weight = packed_weight(label, 64, 256)
    config = WRITERS["compressed-tensors"].config({"m": weight.scheme}, ["lm_head"], False)
    scheme = their_scheme(config)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert scheme.format == config["format"]
    theirs = compressor.decompress(WRITERS["compressed-tensors"].tensors(weight), scheme)["weight"]
    # in the scales' dtype, by one rounding
    assert torch.equal(theirs, weight.dequantize(weight.scales.dtype))


@pytest.mark.parametrize("label", CT)
def test_we_decompress_what_compressed_tensors_compresses(label):
    oracle("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    given = packed_weight(label, 64, 256)
    if given.scheme.weight == "int8":  # its codes begin at -128 as ours
        given = packed_weight(label, 64, 256, seed=3)
    config = WRITERS["compressed-tensors"].config({"m": given.scheme}, ["lm_head"], False)
    scheme = their_scheme(config)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    state = {"weight": given.dequantize(), "weight_scale": given.scales}
    if given.zeros is not None:
        middle = given.scheme.symmetric_zero
        state["weight_zero_point"] = (given.zeros.to(torch.int16) - middle).to(torch.int8)
    compressed = compressor.compress(state, scheme)
    theirs = compressor.decompress(dict(compressed), scheme)["weight"]
    if given.input_scale is not None:
        compressed["input_scale"] = given.input_scale
    layout = CompressedTensors(config, stored(compressed), named(compressed))
    read = layout.linear("m", {s: compressed[s] for s in layout.modules["m"].suffixes}).quantized
    assert read.scheme == given.scheme
    assert torch.equal(read.dequantize(given.scales.dtype), theirs)
    assert torch.equal(read.codes.view(torch.uint8), given.codes.view(torch.uint8))


def test_transformers_opens_our_compressed_tensors_directory(packed, tmp_path):
    oracle("compressed_tensors")
    source = packed("llama", "w4a16-g32", tie_word_embeddings=False)
    convert(source, tmp_path / "ct", "compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    ours = dequantized_model(open_source(tmp_path / "ct"), "cpu", torch.bfloat16)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_a_directory_that_compressed_tensors_made_is_read(tmp_path):
    oracle("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    content = WRITERS["compressed-tensors"].config(
        {"m": packed_weight("w4a16-g32", 8, 32).scheme}, ["lm_head"], False
    )
    config = QuantizationConfig(**content)
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.data.unflatten(1, (-1, 32))
            module.weight_scale.data = grouped.abs().amax(-1).div(7.5).to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(tmp_path / "theirs")
    assert "weight_packed" in " ".join(load_file(tmp_path / "theirs" / "model.safetensors"))

    ours = quantkit.load(tmp_path / "theirs", "cpu", dtype=torch.bfloat16)
    packed = sum(isinstance(module, QuantLinear) for module in ours.modules())
    assert packed == 7 * model.config.num_hidden_layers
    compressor.decompress_model(model)
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            theirs = model.get_submodule(name).weight
            assert torch.equal(module.quantized().dequantize(theirs.dtype), theirs), name


# GGUF


KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("kind", KINDS)
def test_we_decode_every_block_type_as_gguf_does(kind):
    gguf = oracle("gguf")
    spec = gguf_blocks.TYPES[kind]
    number = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[number] == (spec.block, spec.bytes)
    assert number == spec.number
    raw = torch.randint(0, 256, (5, 3 * spec.bytes), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    blocks = raw.view(5, 3, -1)
    for place in (0, 2, 208):  # float16s: neither NaN nor infinite
        if place + 2 <= spec.bytes:
            blocks[..., place + 1] &= 0x3B
    expected = torch.from_numpy(gguf.dequantize(raw.numpy(), number))
    assert torch.equal(gguf_blocks.dequantize(kind, raw), expected)
    assert torch.equal(gguf_blocks.linear_of(kind, raw).dequantize(), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_we_round_to_a_block_type_as_gguf_does(kind):
    gguf = oracle("gguf")
    weight = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    weight[0, :32] = 0
    expected = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(gguf_blocks.quantize(kind, weight), expected)


@pytest.mark.parametrize("label", ["w4a16-g32", "w4a16-g64", "w8a16"])
def test_gguf_decodes_ours(label):
    gguf = oracle("gguf")
    weight = packed_weight(label, 32, 256, negative=label != "w8a16")
    kind, raw = gguf_blocks.encode(weight)
    theirs = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(theirs), weight.dequantize())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_reads_our_file_and_transformers_the_model_in_it(architecture, packed, tmp_path):
    gguf = oracle("gguf")
    # the size of heads that transformers takes Qwen3's to be, whatever the file says
    source = packed(architecture, "w4a16-g32", **({"head_dim": 128} if architecture == "qwen3" else {}))
    convert(source, tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.fields["general.architecture"].contents() == architecture
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    up = quantkit.load(source, "cpu").get_submodule("model.layers.1.mlp.up_proj").quantized()
    theirs = gguf.dequantize(by_name["blk.1.ffn_up.weight"].data, by_name["blk.1.ffn_up.weight"].tensor_type)
    assert torch.equal(torch.from_numpy(theirs), up.dequantize())

    ours = dequantized_model(open_source(tmp_path / "out"), "cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(ids).logits)


def rows_of_llama_cpp(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp turns them: the halves of a head in turns."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_written(gguf, model, path) -> dict[str, torch.Tensor]:
    """Writes a model by the package, some of its weights in blocks; what they mean, by the model's names."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    architecture = getattr(gguf.MODEL_ARCH, config.model_type.upper())
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    kinds = {"attn_q": "Q8_0", "attn_k": "Q4_0", "ffn_up": "Q4_1", "ffn_down": "Q5_0"}
    turned = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    expected = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        part = theirs.split(".")[-2] if theirs.endswith(".weight") else ""
        heads = turned.get(part) if config.model_type == "llama" else None
        stored = tensor if heads is None else rows_of_llama_cpp(tensor, heads)
        if part not in kinds:
            writer.add_tensor(theirs, stored.numpy())
            expected[name] = tensor
            continue
        number = gguf.GGMLQuantizationType[kinds[part]]
        data = gguf.quantize(stored.numpy(), number)
        writer.add_tensor(theirs, data, raw_dtype=number)
        meant = torch.from_numpy(gguf.dequantize(data, number))
        if heads is not None:
            meant = meant.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        expected[name] = meant
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_we_read_a_file_that_gguf_wrote(architecture, tiny, tmp_path):
    gguf = oracle("gguf")
    if architecture == "llama":
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    else:
        sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
        model = tiny("qwen2", torch.float32, tie_word_embeddings=True, **sizes)
    expected = gguf_written(gguf, model, tmp_path / "theirs.gguf")
    ours = dequantized_model(open_source(tmp_path / "theirs.gguf"), "cpu", torch.float32)
    assert ours.config.model_type == architecture
    for name, tensor in expected.items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    with torch.no_grad():
        model.load_state_dict(expected, strict=False)
        ids = torch.arange(3, 19)[None]
        assert torch.equal(model.float()(ids).logits, ours(ids).logits)


# HQQ and bitsandbytes


@pytest.mark.parametrize(
    ("bits", "axis", "exact"),
    [(4, 1, False), (4, 1, True), (3, 1, False), (2, 1, True), (4, 0, False), (8, 1, False)],
)
def test_we_read_what_hqq_packs(bits, axis, exact):
    oracle("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    linear = nn.Linear(256, 64, bias=False)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    config["weight_quant_params"] |= {"round_zero": exact, "optimize": not exact}
    packed = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    tensors = {n: t.data if isinstance(t, nn.Parameter) else t for n, t in packed.state_dict().items()}
    tensors = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    layout = HQQ({}, stored(tensors), named(tensors))
    read = layout.linear("m", {s: tensors[s] for s in layout.modules["m"].suffixes})
    meta = {**packed.meta, "compute_dtype": torch.float32}
    meta |= {key: packed.meta[key].float() for key in ("scale", "zero")}
    assert torch.equal(read.dequantize(), Quantizer.dequantize(packed.W_q.data, meta))
    assert (read.quantized is not None) == exact


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", True)])
def test_we_read_what_bitsandbytes_packs(kind, nested):
    oracle("bitsandbytes")
    from bitsandbytes import functional

    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed} | {f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}
    layout = BitsAndBytes({}, stored(tensors), named(tensors))
    read = layout.linear("m", {s: tensors[s] for s in layout.modules["m"].suffixes})
    assert "no steps of a grid" in read.reason
    assert torch.equal(read.dequantize(), functional.dequantize_4bit(packed, state, quant_type=kind))


def test_a_directory_that_bitsandbytes_made_is_read(tmp_path):
    oracle("bitsandbytes")
    from bitsandbytes import functional
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        MODEL,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
        dtype=torch.float32,
    )
    model.save_pretrained(tmp_path / "theirs")
    ours = dequantized_model(open_source(tmp_path / "theirs"), "cpu", torch.float32)
    for name, module in model.named_modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            theirs = functional.dequantize_4bit(module.weight.data, state)
            assert torch.equal(ours.get_submodule(name).weight, theirs.float()), name
    with pytest.raises(quantkit.QuantKitError, match="no steps of a grid"):
        quantkit.load(tmp_path / "theirs", "cpu")
    assert quantkit.load(tmp_path / "theirs", "cpu", requantize="w8a16")


# whole checkpoints that peers make or open


def test_gptqmodel_runs_our_directory(packed, tmp_path):
    oracle("gptqmodel")
    from gptqmodel import BACKEND, GPTQModel

    source = packed("llama", "w4a16-g32", tie_word_embeddings=False)
    convert(source, tmp_path / "ours", "gptq")
    for file in EXAMPLE.glob("tokenizer*"):  # which it asks for
        shutil.copy(file, tmp_path / "ours")
    content = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert content["quantization_config"]["checkpoint_format"] == "gptq"
    try:
        theirs = GPTQModel.load(
            str(tmp_path / "ours"), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16
        )
    except Exception as error:  # a version that does not run beside this torch
        pytest.skip(f"gptqmodel cannot load a checkpoint here: {error!r}")
    ours = dequantized_model(open_source(tmp_path / "ours"), "cpu", torch.float16)
    for name, module in theirs.model.named_modules():
        if hasattr(module, "qweight"):
            weight = module.dequantize_weight().T
            assert torch.equal(weight.half(), ours.get_submodule(name).weight), name


# each: source and out -> a directory, and what its linears mean
MADE_BY = {
    "gptqmodel": """
os.cpu_count = lambda: 8  # it wants workers
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
config = QuantizeConfig(bits=4, group_size=32, desc_act=True, sym=True)
model = GPTQModel.load(source, config, device="cpu")
ids = torch.randint(5, 1000, (8, 1, 64), generator=torch.Generator().manual_seed(0))
model.quantize([{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids], batch_size=1)
model.save(out)
theirs = GPTQModel.load(out, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
weights = {n: m.dequantize_weight().T.half() for n, m in theirs.named_modules() if hasattr(m, "qweight")}
""",
    "awq": """
from awq import AutoAWQForCausalLM
from awq.utils.packing_utils import dequantize_gemm
from transformers import AutoTokenizer
model = AutoAWQForCausalLM.from_pretrained(source, device_map="cpu", torch_dtype=torch.float32)
config = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
text = ["One fine day in spring a fox went out of the wood to see the lake and the hills."] * 4
sizes = {"max_calib_samples": 4, "max_calib_seq_len": 32, "apply_clip": False}
model.quantize(AutoTokenizer.from_pretrained(source), quant_config=config, calib_data=text, **sizes)
model.save_quantized(out)
weights = {
    n: dequantize_gemm(m.qweight, m.qzeros, m.scales, 4, 64).T.half().contiguous()
    for n, m in model.model.named_modules() if hasattr(m, "qweight")
}
""",
    "llmcompressor": """
from compressed_tensors.compressors import ModelCompressor
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]))
model.save_pretrained(out, save_compressed=True)
theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
names = [n for n, m in theirs.named_modules() if hasattr(m, "weight_scale")]
ModelCompressor.from_pretrained_model(theirs).decompress_model(theirs)
weights = {n: theirs.get_submodule(n).weight.data for n in names}
""",
    "hqq": """
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hqq.models.hf.base import AutoHQQHFModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float16, device="cpu")
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # one file has no tensor twice
model.config.tie_word_embeddings = False
model.config.quantization_config = {"quant_method": "hqq"}  # which transformers would write
AutoHQQHFModel.save_to_safetensors(model, out, num_blocks_per_file=100)
wide = {"compute_dtype": torch.float32}
weights = {
    n: Quantizer.dequantize(m.W_q.data, m.meta | wide | {k: m.meta[k].float() for k in ("scale", "zero")})
    for n, m in model.named_modules() if isinstance(m, HQQLinear)
}
""",
}


def made_by(peer: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory that the peer made by its own calibration, on a CPU, and what its linears mean."""
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"the oracle {peer} is not installed")
    out = folder / "theirs"
    lines = ["import os, sys", "import torch", "source, out = sys.argv[1:]", MADE_BY[peer]]
    script = "\n".join([*lines, "torch.save(weights, out + '.weights')"])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(MODEL), str(out)],
        timeout=600,
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out, torch.load(f"{out}.weights", weights_only=True)


@pytest.mark.parametrize("peer", ["gptqmodel", "awq", "llmcompressor"])
def test_we_take_over_a_directory_that_a_peer_made(peer, tmp_path):
    out, weights = made_by(peer, tmp_path)
    ours = quantkit.load(out, "cpu", dtype=torch.float32)
    packed = {n: m.quantized() for n, m in ours.named_modules() if isinstance(m, QuantLinear)}
    assert packed.keys() == weights.keys()
    assert any(q.input_order is not None for q in packed.values()) == (peer == "gptqmodel")  # desc_act
    for name, quantized in packed.items():
        assert torch.equal(quantized.effective_weight(weights[name].dtype), weights[name]), name


def test_we_read_a_directory_that_hqq_made(tmp_path):
    out, weights = made_by("hqq", tmp_path)
    ours = dequantized_model(open_source(out), "cpu", torch.float32)
    for name, weight in weights.items():
        assert torch.equal(ours.get_submodule(name).weight, weight), name
    with pytest.raises(quantkit.QuantKitError, match="zeros that are not whole numbers"):
        quantkit.load(out, "cpu")
