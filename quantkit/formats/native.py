"""quantkit's own checkpoints (FORMAT.md), read as the other formats are."""

from typing import Any

import torch

from quantkit.checkpoint import StoredTensor
from quantkit.errors import QuantKitError
from quantkit.formats.affine import Linear, check_finite
from quantkit.formats.reader import Packed, need
from quantkit.hf import SAFETENSORS_DTYPES, SCALE_DTYPES, QuantKitConfig
from quantkit.linear import tensor_specs
from quantkit.packing import PARTS, QuantizedTensor


class Native:
    """A quantkit checkpoint's linears."""

    name = "quantkit"

    def __init__(self, config: dict[str, Any], tensors: dict[str, StoredTensor], read: Any) -> None:
        """`read` loads tensors by their names: the shapes are stored as such."""
        self.dropped: dict[str, str] = {}
        self.notes: list[str] = []
        self.config = QuantKitConfig.from_dict(config)
        for name in self.config.modules:
            need(tensors, f"{name}.weight", ("I64",), (2,), "quantkit's guard")
        shapes = read([f"{name}.weight" for name in self.config.modules])
        self.modules = {
            name: self.packed_of(name, shapes[f"{name}.weight"], tensors) for name in self.config.modules
        }

    def packed_of(self, name: str, shape: torch.Tensor, tensors: dict[str, StoredTensor]) -> Packed:
        N, K = shape.tolist()
        scheme = self.config.scheme_of(name)
        if N < 1 or K < 1:
            raise QuantKitError(f"{name}.weight: holds [{N}, {K}], expected two positive numbers")
        scales = tensors.get(f"{name}.scales")
        scale_dtype = SCALE_DTYPES.get(scales.dtype if scales else "BF16", torch.bfloat16)
        beside = self.config.has_channel_scales(name), self.config.has_input_order(name)
        specs = tensor_specs(scheme, N, K, scale_dtype, *beside)
        for suffix, (expected, dtype) in specs.items():
            dtypes = ("F16",) if dtype == torch.float16 else (SAFETENSORS_DTYPES[dtype],)
            need(tensors, f"{name}.{suffix}", dtypes, expected, f"scheme {scheme.label}")
        return Packed((N, K), ("codes", *(s for s in PARTS if s in specs and s != "codes"), "weight"))

    def linear(self, name: str, tensors: dict[str, torch.Tensor]) -> Linear:
        parts = {suffix: tensors[suffix] for suffix in PARTS if suffix in tensors}
        check_finite(name, scales=parts["scales"])
        return Linear(QuantizedTensor(self.config.scheme_of(name), self.modules[name].shape, **parts))
