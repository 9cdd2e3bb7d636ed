"""Quantizing a model of 4 GB stays within the largest shard and a few decoder blocks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from quantkit import parse_scheme
from quantkit.calibration import pipeline
from quantkit.calibration.rtn import rtn
from quantkit.checkpoint import INDEX, read_header

LAYERS, HIDDEN, FFN, KV, VOCABULARY = 8, 4096, 17024, 1024, 1024
LAYERS_PER_SHARD = 2
BLOCKS = 3  # what may be held beside the largest shard
DISK = 12 * 10**9  # the source, the parts and the joined files

RUN = """
import sys, torch
import quantkit
from quantkit.streaming import quantize_checkpoint

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

source, out, label = sys.argv[1:]
torch.ones(256, 256) @ torch.ones(256, 256)  # the threads and buffers of the first product
before = status("VmHWM")
quantize_checkpoint(source, out, quantkit.Recipe(label, "rtn"), "cpu")
print(status("VmHWM") - before)
"""


def block_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV, HIDDEN),
        "self_attn.v_proj": (KV, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    row = torch.randn(FFN, generator=generator).bfloat16()
    tensors = {}
    for name, (N, K) in shapes.items():
        # rows of one random vector, each rolled and scaled: quick, and every row has a scale of its own
        scales = torch.rand(N, 1, generator=generator).bfloat16() + 0.5
        tensors[f"{name}.weight"] = row[:K].expand(N, K) * scales
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return tensors


@pytest.mark.parametrize("label", ["w8a16", "w4a16-g32-asym", "w4a16-channel", "fp8", "fp8-block"])
def test_rounding_a_few_rows_at_a_time_changes_nothing(label, monkeypatch):
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(pipeline, "AT_A_TIME", 1)
    pieces, error = pipeline.round_to_nearest(weight, parse_scheme(label))
    whole = rtn(weight, parse_scheme(label))
    assert pieces.shape == whole.shape
    assert pieces.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        assert tensor.dtype == pieces.tensors()[name].dtype
        assert torch.equal(tensor.view(torch.uint8), pieces.tensors()[name].view(torch.uint8))
    difference = weight.double() - whole.dequantize(torch.float64)
    assert error == pytest.approx((difference.norm() / weight.double().norm()).item(), rel=1e-5)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "source"
    if (free := shutil.disk_usage(folder.parent).free) < DISK:
        pytest.skip(f"{free / 1e9:.0f} GB of disk free, needs {DISK / 1e9:.0f}")
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak of its memory from /proc")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 128,
        num_key_value_heads=KV // 128,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    block = block_tensors()
    outer = {
        "model.embed_tokens.weight": torch.ones(VOCABULARY, HIDDEN, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    index = {}
    for shard in range(LAYERS // LAYERS_PER_SHARD):
        name = f"model-{shard + 1:05d}-of-{LAYERS // LAYERS_PER_SHARD:05d}.safetensors"
        tensors = dict(outer) if shard == 0 else {}
        for layer in range(shard * LAYERS_PER_SHARD, (shard + 1) * LAYERS_PER_SHARD):
            # a view a layer would be one storage twice, which save_file refuses
            tensors |= {f"model.layers.{layer}.{key}": tensor.clone() for key, tensor in block.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    yield folder
    shutil.rmtree(folder.parent)  # pytest would keep it for three runs


@pytest.mark.parametrize("label", ["w4a16-g128"])
def test_quantizing_4_gb_holds_a_shard_and_a_few_blocks(label, large, tmp_path):
    shards = sorted(large.glob("*.safetensors"))
    sizes = [shard.stat().st_size for shard in shards]
    block = sum(
        tensor.stop - tensor.start
        for name, tensor in read_header(shards[0]).items()
        if name.startswith("model.layers.0.")
    )
    assert sum(sizes) > 4e9
    limit = max(sizes) + BLOCKS * block
    command = [sys.executable, "-c", RUN, str(large), str(tmp_path / "out"), label]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    assert peak <= limit, f"held {peak / 1e9:.2f} GB, a shard and {BLOCKS} blocks are {limit / 1e9:.2f} GB"
