"""SGLang serves quantkit checkpoints with quantkit's kernels: a plug-in of SGLang's group `sglang.srt.plugins`.

SGLang calls `register` in each of its processes. It has no function that registers a method of quantization, but its table of
them and the choices of `--quantization` are a dict and a list, into which `register` puts quantkit. The rest is as in vLLM
(`vllm_plugin.py`), whose interface SGLang took over; what multiplies stands in `engine_linear.py`.

SGLang is imported when it calls, not before, and a version whose interface differs costs a warning alone.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from quantkit.engine_linear import PackedConfig, PackedMethod
from quantkit.hf import METHOD

# most of SGLang's models merge these and do not say so
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def register() -> None:
    """The entry point; it may be called any number of times."""
    try:
        from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
        from sglang.srt.layers.quantization import QUANTIZATION_METHODS

        QUANTIZATION_METHODS[METHOD] = config_class()
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning(
            "quantkit: not registered, this SGLang's interface differs: %s", error
        )
        return
    if METHOD not in QUANTIZATION_CHOICES:
        QUANTIZATION_CHOICES.append(METHOD)


@cache
def config_class() -> Any:
    """SGLang's `QuantizationConfig` of quantkit; needs SGLang."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.base_config import QuantizationConfig
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    class QuantKitSGLangConfig(PackedConfig, QuantizationConfig):  # type: ignore[misc]
        linear, head, unpacked, method = LinearBase, ParallelLMHead, UnquantizedLinearMethod, method_class()
        merged = MERGED

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            """The model's names of merged linears come in the same dict."""
            made = cls({name: value for name, value in config.items() if name != "hf_config"})
            made.packed_modules_mapping = config.get("packed_modules_mapping") or {}
            return made

        def get_scaled_act_names(self) -> list[str]:
            return []

        def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
            self.entries.rename(hf_to_sglang_mapper)

    return QuantKitSGLangConfig


@cache
def method_class() -> Any:
    """SGLang's `LinearMethodBase` of quantkit; needs SGLang."""
    from sglang.srt.layers import linear as sglang_linear
    from sglang.srt.layers import parameter
    from sglang.srt.layers.quantization.base_config import LinearMethodBase

    class QuantKitLinearMethod(PackedMethod, LinearMethodBase):  # type: ignore[misc]
        parameters = parameter

        @staticmethod
        def rank_of(layer: nn.Module) -> int:
            return layer.tp_group.rank_in_group  # type: ignore[union-attr, return-value]

        @staticmethod
        def gather(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return layer.tp_group.all_gather(x, -1)  # type: ignore[union-attr, operator, no-any-return]

    # SGLang chooses the loader of its linears by the name of their method's class
    if QuantKitLinearMethod.__name__ not in sglang_linear.WEIGHT_LOADER_V2_SUPPORTED:
        sglang_linear.WEIGHT_LOADER_V2_SUPPORTED.append(QuantKitLinearMethod.__name__)
    return QuantKitLinearMethod
