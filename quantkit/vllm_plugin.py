"""vLLM serves quantkit checkpoints with quantkit's kernels: a plug-in of vLLM's group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. `vllm serve DIR` then finds `quant_method: quantkit` in config.json, and
`--quantization quantkit` also takes over compressed-tensors checkpoints of 4-bit weights beside 16-bit activations. Tensor
parallelism cuts rows and columns as vLLM does for its own formats. Mixtures of experts are refused. What multiplies stands
in `engine_linear.py`.

vLLM is imported when it calls, not before, and a version whose interface differs costs a warning alone.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from quantkit.engine_linear import PackedConfig, PackedMethod
from quantkit.hf import METHOD


def register() -> None:
    """The entry point; it may be called any number of times."""
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        config = config_class()
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning(
            "quantkit: not registered, this vLLM's interface differs: %s", error
        )
        return
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(config)


@cache
def config_class() -> Any:
    """vLLM's `QuantizationConfig` of quantkit; needs vLLM."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    class QuantKitVLLMConfig(PackedConfig, QuantizationConfig):  # type: ignore[misc]
        linear, head, unpacked, method = LinearBase, ParallelLMHead, UnquantizedLinearMethod, method_class()

        def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
            self.entries.rename(hf_to_vllm_mapper)

    return QuantKitVLLMConfig


@cache
def method_class() -> Any:
    """vLLM's `LinearMethodBase` of quantkit; needs vLLM."""
    from vllm.distributed import tensor_model_parallel_all_gather
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear as vllm_linear

    class QuantKitLinearMethod(PackedMethod, vllm_linear.LinearMethodBase):  # type: ignore[misc]
        parameters = parameter

        @staticmethod
        def rank_of(layer: nn.Module) -> int:
            return layer.tp_rank  # type: ignore[return-value]

        @staticmethod
        def gather(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return tensor_model_parallel_all_gather(x)  # type: ignore[no-any-return]

    # vLLM chooses the loader of its linears by the name of their method's class
    getattr(vllm_linear, "register_weight_loader_v2_supported_method", lambda kind: kind)(
        QuantKitLinearMethod
    )
    supported = getattr(vllm_linear, "WEIGHT_LOADER_V2_SUPPORTED", [])
    if QuantKitLinearMethod.__name__ not in supported:
        supported.append(QuantKitLinearMethod.__name__)
    return QuantKitLinearMethod
