"""An engine's own Llama, without its attention, loads a checkpoint: every packed weight in it is that of quantkit.load.

`python engine_llama.py vllm|sglang DIRECTORY QUANTIZATION` prints how many of the engine's linears are packed. A process of
its own, because engines keep what they are told in globals.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

import quantkit
from quantkit import sglang_plugin, vllm_plugin
from quantkit.packing import merge_rows


class Attention(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()


def vllm_llama(folder: Path, quantization: str | None) -> nn.Module:
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.model_executor.model_loader.weight_utils import get_quant_config
    from vllm.model_executor.models import llama

    vllm_plugin.register()
    llama.Attention = llama.EncoderOnlyAttention = Attention
    said = ModelConfig(model=str(folder), quantization=quantization, dtype="bfloat16")
    whole = VllmConfig(device_config=DeviceConfig("cpu"), model_config=said)
    with set_current_vllm_config(whole):
        init_distributed_environment(1, 0, f"file://{folder}/../group", 0, "gloo")
        initialize_model_parallel(1, 1)
        whole.quant_config = get_quant_config(said, LoadConfig())
        configure_quant_config(whole.quant_config, llama.LlamaForCausalLM)
        model = llama.LlamaForCausalLM(vllm_config=whole)
        model.load_weights(weights(folder))
    return model


def sglang_llama(folder: Path, quantization: str | None) -> nn.Module:
    importlib.import_module("engine_mocks")  # before all of these
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.weight_utils import get_quant_config
    from sglang.srt.models import llama

    class Parallel:
        """One process in every group."""

        def __getattr__(self, name: str):
            group = SimpleNamespace(rank_in_group=0, world_size=1, is_first_rank=True, is_last_rank=True)
            return {"size": 1, "rank": 0, "group": group}.get(name.rpartition("_")[2], False)

    sglang_plugin.register()
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.") and "get_parallel" in vars(module):
            module.get_parallel = Parallel
    llama.RadixAttention = llama.LogitsProcessor = llama.Pooler = Attention
    llama.get_rope = Attention
    llama.append_stages = lambda *stages: [None] * len(stages)
    said = ModelConfig(model_path=str(folder), quantization=quantization)
    mapping = getattr(llama.LlamaForCausalLM, "packed_modules_mapping", {})
    model = llama.LlamaForCausalLM(said.hf_config, get_quant_config(said, LoadConfig(), mapping))
    model.load_weights(weights(folder))
    return model


def weights(folder: Path):
    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()


def main(engine: str, folder: Path, quantization: str | None) -> None:
    torch.set_default_dtype(torch.bfloat16)
    model = {"vllm": vllm_llama, "sglang": sglang_llama}[engine](folder, quantization)
    torch.set_default_dtype(torch.float32)
    ours = quantkit.load(folder, "cpu", dtype=torch.bfloat16)
    packed = 0
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if type(method).__name__ != "QuantKitLinearMethod":
            continue
        method.process_weights_after_loading(layer)
        parent, dot, last = name.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in sglang_plugin.MERGED.get(last, [last])]
        expected = merge_rows([ours.get_submodule(part).quantized() for part in parts]).dequantize()
        loaded = layer.quantkit.quantized().dequantize()[: len(expected)]  # heads have more rows
        assert torch.equal(loaded, expected), name
        packed += 1
    print(packed)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
