"""Parts of a model, brought to life from its files one at a time: a decoder block, or what lies outside them."""

import ctypes
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.calibration.channels import ScaleInput, scale_input
from quantkit.calibration.pipeline import ModuleResult, not_finite
from quantkit.checkpoint import CheckpointReader, Kind, StoredTensor, sha256, size_of
from quantkit.errors import QuantKitError
from quantkit.hf import SAFETENSORS_DTYPES, linear_called
from quantkit.linear import tensor_specs
from quantkit.packing import PARTS, QuantizedTensor
from quantkit.quantize import Job
from quantkit.scheme import Scheme

GUARD: Kind = ("I64", (2,))  # in the place of a packed weight


class BlockLoader:
    """Brings parts of an empty model to life from a checkpoint, and back to nothing."""

    def __init__(self, job: Job, reader: CheckpointReader, device: torch.device) -> None:
        self.job, self.reader, self.device = job, reader, device
        self.names = check_belongs(job.model, reader, job.prefix, job.untied)
        self.dtypes: dict[str, torch.dtype] = {}  # as stored, of the part that is loaded
        self.unchanged: dict[str, torch.Tensor] = {}  # of that part, what will be stored as it was read
        self.reading = ThreadPoolExecutor(1)
        # names, and what becomes of them
        self.ahead: tuple[list[str], Future[dict[str, torch.Tensor]]] | None = None

    def find(self, name: str) -> StoredTensor:
        """Where a tensor's values lie: its own, or those of the tensor that it was tied to."""
        return self.reader.find(self.job.untied.get(name, name))

    def packed_kinds(self) -> dict[str, Kind]:
        """The tensors that `pack` will give to store, unless scales of input channels are left out."""
        kinds = {name: self.find(name).kind for name in self.names}
        for plan in self.job.all_plans():
            linear = linear_called(self.job.model, plan.name)
            N, K = linear.out_features, linear.in_features
            kinds[f"{plan.name}.weight"] = GUARD
            specs = tensor_specs(plan.scheme, N, K, channel_scales=plan.channel_scales)
            kinds |= {
                f"{plan.name}.{suffix}": (SAFETENSORS_DTYPES[dtype], shape)
                for suffix, (shape, dtype) in specs.items()
            }
        return kinds

    def packed_bytes(self) -> int:
        """Bytes of all tensors that `pack` will give to store."""
        return sum(map(size_of, self.packed_kinds().values()))

    def load(self, module: nn.Module, prefix: str, names: list[str]) -> dict[str, torch.Tensor]:
        """Gives a part its tensors, found to be finite; as they were read."""
        tensors = self.ahead[1].result() if self.ahead and self.ahead[0] == names else self.read(names)
        self.ahead = None
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        # half precision is slow on a CPU, and adds its own rounding to the statistics
        upcast = self.device.type == "cpu" and self.job.needs_tokens
        ready = {
            name: tensor.to(
                self.device,
                torch.float32 if upcast and tensor.is_floating_point() else None,
                non_blocking=tensor.is_pinned(),
            )
            for name, tensor in tensors.items()
        }
        for name, tensor in ready.items():
            if bad := not_finite(tensor):
                stored = self.find(name)
                raise QuantKitError(
                    f"{stored.file}: {self.job.untied.get(name, name)}: {bad} of {tensor.numel()} values are NaN or infinite; "
                    "mend the source checkpoint"
                )
        ready = {name.removeprefix(prefix): tensor for name, tensor in ready.items()}
        module.load_state_dict(ready, strict=False, assign=True)
        return tensors

    def load_outer(self) -> None:
        """What lies outside the decoder blocks: embeddings, last norm, LM head."""
        self.outer = [name for name in self.names if not name.startswith(f"{self.job.prefix}.")]
        tensors = self.load(self.job.model, "", self.outer)
        self.unchanged = tensors if self.job.rotation is None else {}
        self.job.model.tie_weights()
        for module in self.job.model.modules():  # rotary frequencies and the like
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def unload_outer(self) -> None:
        self.unchanged = {}
        for module in self.job.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        self.job.model.tie_weights()

    def block_names(self, index: int) -> list[str]:
        return [name for name in self.names if name.startswith(f"{self.job.prefix}.{index}.")]

    def read(self, names: list[str], pinned: bool = False) -> dict[str, torch.Tensor]:
        """Tensors as they are stored; `pinned`: in locked memory, which a GPU reads at several times the speed."""
        origins = {name: self.job.untied.get(name, name) for name in names}
        stored = self.reader.load(dict.fromkeys(origins.values()))
        if pinned:
            stored = {name: tensor.pin_memory() for name, tensor in stored.items()}
        return {name: stored[origin] for name, origin in origins.items()}

    def read_ahead(self, index: int) -> None:
        """Reads a block on its way to a GPU, while that works on the part before."""
        if self.device.type == "cuda":
            names = self.block_names(index)
            self.ahead = names, self.reading.submit(self.read, names, pinned=True)

    @contextmanager
    def loaded(self, index: int) -> Iterator[str]:
        """A block with its weights, while it lasts; on a GPU the next one's are read meanwhile."""
        prefix = f"{self.job.prefix}.{index}."
        block = self.job.blocks[index]
        self.load(block, prefix, self.block_names(index))
        self.read_ahead(index + 1)
        try:
            yield prefix
        finally:
            block.to("meta")
            release_memory()

    def pack(
        self, module: nn.Module, prefix: str, results: list[ModuleResult]
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """The tensors to store for a loaded part, where they are: packed weights in the place of the planned ones."""
        state = module.state_dict()
        packed = {f"{result.plan.name}.weight" for result in results}
        tensors = {
            name: self.unchanged[name]
            if name in self.unchanged
            else state[name.removeprefix(prefix)].to(dtype)
            for name, dtype in self.dtypes.items()
            if name not in packed
        }
        for result in results:
            name = result.plan.name
            tensors[f"{name}.weight"] = torch.tensor(result.quantized.shape)
            for suffix, tensor in result.quantized.tensors().items():
                tensors[f"{name}.{suffix}"] = tensor
        return tensors, [{"name": result.plan.name, **result.to_dict()} for result in results]

    def restore(
        self, module: nn.Module, prefix: str, tensors: dict[str, torch.Tensor], packed: bool = True
    ) -> None:
        """Makes a loaded part what it was after `pack`, from the stored tensors.

        packed: also its packed linears, into whose places `quantize_block` has put what the packed weights stand for.
        """
        state = module.state_dict()
        for name, current in state.items():
            full = prefix + name
            if full not in tensors:
                continue
            plan = self.job.plans.get(full.removesuffix(".weight"))
            if plan is not None and full.endswith(".weight"):
                if not packed:
                    continue
                stem = full.removesuffix(".weight")
                parts = {
                    suffix: tensor.to(current.device)
                    for suffix in PARTS
                    if (tensor := tensors.get(f"{stem}.{suffix}")) is not None
                }
                quantized = QuantizedTensor(plan.scheme, tuple(tensors[full].tolist()), **parts)
                current.copy_(quantized.dequantize(current.dtype))
                c = quantized.channel_scales
                linear = linear_called(module, stem.removeprefix(prefix))
                scale_input(linear, None if c is None else ScaleInput(c))
            else:
                current.copy_(tensors[full])


def check_belongs(
    model: PreTrainedModel, reader: CheckpointReader, prefix: str, untied: dict[str, str]
) -> list[str]:
    """The tensors that a model is loaded from, by their names in it, found to be in its files and of its shapes.

    Args:
        prefix: of the names of its decoder blocks.
        untied: tensors that are stored as another one, to which they were tied.

    Raises:
        QuantKitError: files and config belong to different models.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    names = [name for name in model.state_dict() if name not in tied]
    for target, origin in (tied | untied).items():
        both = target in reader.tensors and origin in reader.tensors
        if both and sha256(reader.tensors[target]) != sha256(reader.tensors[origin]):
            raise QuantKitError(
                f"{reader.folder / 'config.json'}: ties {target} to {origin}, but the files hold two different "
                "tensors; set tie_word_embeddings to false"
            )
    unknown = {n for n in reader.tensors if n.startswith(f"{prefix}.")} - set(names)
    unknown = {n for n in unknown if not n.endswith("rotary_emb.inv_freq")}  # of old Llama exports
    if unknown:
        raise QuantKitError(
            f"{reader.tensors[min(unknown)].file}: holds {min(unknown)}, which the model of config.json does not "
            "have; they belong to different models"
        )
    for name, parameter in model.state_dict().items():
        stored = reader.find(untied.get(name, name)) if name not in tied else None
        if stored is not None and stored.shape != parameter.shape:
            raise QuantKitError(
                f"{stored.file}: {name} is {list(stored.shape)}, config.json makes it {list(parameter.shape)}; "
                "they belong to different models"
            )
    return names


def packed_weight_bytes(scheme: Scheme, N: int, K: int, channel_scales: bool = False) -> int:
    """Bytes of codes, scales and zeros of a packed weight [N, K]."""
    specs = tensor_specs(scheme, N, K, channel_scales=channel_scales)
    return sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())


def release_memory() -> None:
    """Gives freed memory back to the system.

    glibc keeps allocations below 32 MB for later ones, in pieces that the next block does not quite fit: a
    process then grows by tens of MB a block.
    """
    with suppress(AttributeError, OSError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)
