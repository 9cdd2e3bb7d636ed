"""What each process of tensor parallelism will hold of a checkpoint, from its headers alone."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from quantkit.checkpoint import CheckpointReader, StoredTensor
from quantkit.errors import QuantKitError
from quantkit.experts import unfuse_experts
from quantkit.hf import linear_called, packed_twin
from quantkit.linear import QuantLinear, replace_module
from quantkit.load import read_quantized_config
from quantkit.scheme import Scheme
from quantkit.sharding import cut_dimensions, faults, refusal, shared, working_ranks
from quantkit.source import auto_config, empty_model
from quantkit.tensor_parallel import ALONG, OURS, Place, Planned, plan_model, style_of

PLAIN = {  # dimensions of weight and bias that transformers cuts; None: whole
    "colwise": (-2, 0),
    "rowwise": (-1, None),
    "embedding_rowwise": (0, None),
    "embedding_colwise": (1, None),
    "packed_colwise": (-2, 0),
    "packed_rowwise": (-1, None),
}


@dataclass(frozen=True)
class Shares:
    """How a checkpoint lies on `ranks` processes.

    Attributes:
        most: bytes of the process that holds most.
        whole: bytes of these that all processes hold.
        total: bytes of the checkpoint.
        working: numbers of processes, up to 64, over which it can be cut.
        regrouped: linears whose groups are made shorter, and of how many columns.
    """

    ranks: int
    most: int
    whole: int
    total: int
    working: list[int]
    regrouped: dict[str, int]


def shares(folder: Path, ranks: int) -> Shares:
    """Says what `tp_plan="auto"` will do with a quantkit directory.

    Raises:
        QuantKitError: it cannot be cut over so many processes, with the numbers that would do.
    """
    if ranks < 2:
        raise QuantKitError(f"tp {ranks}: expected 2 or more processes")
    stored = CheckpointReader(folder).tensors
    model, planned = planned_model(folder)
    working = working_ranks(planned.config, planned.cuts, planned.heads_are_cut)
    if found := faults(planned.config, planned.cuts, ranks, planned.heads_are_cut):
        raise QuantKitError(f"{folder}: {refusal(found, ranks, working)}")
    modules = dict(model.named_modules())
    most = whole = total = 0
    regrouped = {}
    for name, tensor in stored.items():
        owner, _, part = name.rpartition(".")
        module, size = modules.get(owner), tensor.stop - tensor.start
        place = module.place if isinstance(module, QuantLinear) else None
        held = packed_bytes(place, part, tensor, ranks) if place else plain_bytes(model, name, tensor, ranks)
        most, total = most + held, total + size
        whole += held if held == size else 0
        if place and part == "codes" and (columns := shorter_groups(place, ranks)):
            regrouped[owner] = columns
    return Shares(ranks, most, whole, total, working, regrouped)


def planned_model(folder: Path) -> tuple[PreTrainedModel, Planned]:
    """The empty model of a quantkit directory with its linears in their places of the plan."""
    config = read_quantized_config(folder)
    model = empty_model(auto_config(folder))
    unfuse_experts(model)
    for name in config.modules:
        linear: nn.Linear = linear_called(model, name)
        replace_module(model, name, packed_twin(linear, config.scheme_of(name)))
    return model, plan_model(model, "")


def packed_bytes(place: Place, part: str, tensor: StoredTensor, ranks: int) -> int:
    """Bytes that a process holds of a part of a packed linear."""
    shape, along, size = place.shape, ALONG[place.style], tensor.stop - tensor.start
    if part in cut_dimensions(shape, along, ranks):
        return size // ranks
    if part not in ("scales", "zeros"):
        return size
    if columns := shorter_groups(place, ranks):
        return size // tensor.shape[1] * (shape.K // ranks // columns)
    return size // tensor.shape[0] if shape.scheme.block_size else size


def shorter_groups(place: Place, ranks: int) -> int:
    """Columns of the shorter groups that a cut makes; 0 where they stay."""
    scheme: Scheme = place.shape.scheme
    columns = place.shape.K // ranks
    if ALONG[place.style] == "colwise" or not scheme.group_size or columns % scheme.group_size == 0:
        return 0
    return shared(columns, scheme.group_size)


def plain_bytes(model: PreTrainedModel, name: str, tensor: StoredTensor, ranks: int) -> int:
    """Bytes that the first process, which holds most, holds of a tensor that transformers cuts."""
    style = style_of(model, name).removeprefix(OURS)
    weight, bias = PLAIN.get(ALONG.get(style, style), (None, None))
    dimension = bias if name.endswith(".bias") else weight
    size = tensor.stop - tensor.start
    if dimension is None or (len(tensor.shape) < 2 and not name.endswith(".bias")):
        return size
    along = tensor.shape[dimension]
    return size // along * -(-along // ranks) if prod(tensor.shape) else 0
