"""What `quantkit convert` writes: for each format why it cannot hold a weight, its tensors, its part of config.json."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantkit.formats import awq, compressed_tensors, fp8, gguf_blocks, gptq
from quantkit.packing import QuantizedTensor
from quantkit.scheme import Scheme

GGUF = "gguf"  # one file, with names and metadata of its own: convert.py writes it by gguf_file.py


@dataclass(frozen=True)
class Writer:
    """One format.

    Attributes:
        misfit: why the format cannot hold a weight; '' if it can.
        tensors: those of a weight that it can hold, by suffix; for GGUF by the type of their blocks.
        config: `quantization_config`, from the schemes of the packed linears, the names of the others, and whether any
            has an order of columns; None where `convert` makes it.
        half_scales: new scales must be numbers of float16.
    """

    misfit: Callable[[QuantizedTensor], str]
    tensors: Callable[[QuantizedTensor], dict[str, torch.Tensor]]
    config: Callable[[dict[str, Scheme], list[str], bool], dict[str, Any]] | None = None
    half_scales: bool = True


def native_tensors(quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor(quantized.shape), **quantized.tensors()}


def gguf_tensors(quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    kind, raw = gguf_blocks.encode(quantized)
    return {kind: raw}


def gptq_writer(version: str) -> Writer:
    return Writer(
        partial(gptq.misfit, version=version),
        partial(gptq.tensors_of, version=version),
        lambda schemes, kept, ordered: gptq.config_of(schemes, kept, version, ordered),
    )


WRITERS = {
    "quantkit": Writer(lambda quantized: "", native_tensors, half_scales=False),
    "gptq": gptq_writer("gptq"),
    "gptq_v2": gptq_writer("gptq_v2"),
    "awq": Writer(awq.misfit, awq.tensors_of, lambda schemes, kept, ordered: awq.config_of(schemes, kept)),
    "compressed-tensors": Writer(
        compressed_tensors.misfit,
        compressed_tensors.tensors_of,
        lambda schemes, kept, ordered: compressed_tensors.config_of(schemes, kept),
        half_scales=False,
    ),
    "fp8": Writer(
        fp8.misfit, fp8.tensors_of, lambda schemes, kept, ordered: fp8.config_of(kept), half_scales=False
    ),
    GGUF: Writer(gguf_blocks.misfit, gguf_tensors),
}
