"""Tensor parallel packed linears: transformers' plans and loader cut them, and from then on they are ours.

While a model is loaded, a packed linear's parts are DTensors without numbers, so that transformers reads of each file a
rank's part alone. Once they are filled, the linear becomes one of a rank's own shape with plain tensors (`rank_linear.py`). It
repacks them, and runs the kernels, as a linear on one device does.
"""

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

from quantkit.errors import QuantKitError
from quantkit.experts import UnfusedExperts
from quantkit.linear import QuantLinear
from quantkit.packing import PARTS
from quantkit.processes import agree
from quantkit.rank_linear import GatheredLinear, RankEmbedding, RowLinear, Shared, Summed
from quantkit.sharding import Along, Shape, cut_dimensions, faults, local_part, refusal, working_ranks

OURS = "quantkit:"  # before the name of transformers' style, which other linears of the same place get
PARTIAL = "rowwise_partial"  # of experts: the module around them adds the ranks' results
ALONG: dict[str, Along] = {
    "colwise": "colwise",
    "colwise_gather_output": "colwise",
    "colwise_rep": "colwise",
    "rowwise": "rowwise",
    "rowwise_split_input": "rowwise",
    "rowwise_rep": "rowwise",
    PARTIAL: "rowwise",
}
WHOLE_INPUT = ("rowwise_split_input", "rowwise_rep")
WHOLE_OUTPUT = ("colwise_gather_output", "colwise_rep")
EXPERTS = "experts"
EMBEDDING = "embedding_rowwise"
OF_EXPERTS = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": PARTIAL}


@dataclass
class Planned:
    """What is to be checked of a model before the first weight is read, once its ranks are known.

    Attributes:
        headers: what the ranks' files must have in common.
        cuts: the packed linears and how each is cut.
        checked: that it was.
    """

    config: Any
    headers: str
    cuts: list[tuple[Shape, Along]] = field(default_factory=list)
    heads_are_cut: bool = False
    checked: bool = False

    def check(self, group: Any) -> None:
        """Refuses the model on all ranks alike."""
        if self.checked:
            return
        ranks = dist.get_world_size(group)
        why = ""
        if found := faults(self.config, self.cuts, ranks, self.heads_are_cut):
            working = working_ranks(self.config, self.cuts, self.heads_are_cut)
            why = f"{self.config.name_or_path}: {refusal(found, ranks, working)}"
        agree(self.headers, why, "headers of the checkpoint", group)
        self.checked = True


@dataclass
class Place:
    """Where a packed linear stands in the plan; `mesh` once it is cut."""

    planned: Planned
    shape: Shape
    style: str
    mesh: Any = None


def plan_model(model: PreTrainedModel, headers: str) -> Planned:
    """Puts packed linears, experts that are linears, and an embedding of its own into the model's tensor parallel plan.

    Args:
        headers: what must be the same on all ranks.
    """
    planned = Planned(model.config, headers)
    plan = model._tp_plan if isinstance(model._tp_plan, dict) else {}
    configs = (model.config, model.config.get_text_config())
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    embedding = None if tied else model.get_input_embeddings()
    for name, module in model.named_modules():
        key = replace_layer_number_by_wildcard(name)
        if module is embedding and type(module) is nn.Embedding:
            plan[key] = OURS + EMBEDDING
        if isinstance(module, UnfusedExperts) and key in plan:
            for stacked in ("gate_up_proj", "down_proj"):
                plan.pop(f"{key}.{stacked}", None)
            plan[key] = OURS + EXPERTS
            plan.update({f"{key}.*.{linear}": OURS + style for linear, style in OF_EXPERTS.items()})
        style = plan.get(key, "").removeprefix(OURS)
        if isinstance(module, QuantLinear) and style in ALONG:
            plan[key] = OURS + style
            shape = Shape(name, module.scheme, module.out_features, module.in_features)
            planned.cuts.append((shape, ALONG[style]))
            module.place = Place(planned, shape, style)
    planned.heads_are_cut = any(
        key.endswith((".q_proj", ".k_proj", ".qkv_proj")) and style.removeprefix(OURS) == "colwise"
        for key, style in plan.items()
    )
    return planned


def style_of(model: PreTrainedModel, name: str) -> str:
    """The plan's style of a parameter, its own or its module's; '' where there is none."""
    key = replace_layer_number_by_wildcard(name)
    plan = model._tp_plan or {}
    return plan.get(key) or plan.get(key.rpartition(".")[0], "")


def cut_parameter(module: Any, param: str, mesh: Any, dimension: int) -> None:
    """Puts a DTensor, of which each rank has a piece along the dimension, in the place of a parameter without numbers."""
    cut = distribute_tensor(module._parameters[param], mesh, [Shard(dimension)], src_data_rank=None)
    module._parameters[param] = nn.Parameter(cut, requires_grad=False)


class PackedStyle(TensorParallelLayer):  # type: ignore[misc]
    """A style of transformers for other linears; packed ones are cut as `sharding.py` says, and their forward is kept."""

    def __init__(self, style: str) -> None:
        self.style = style

    @property
    def other(self) -> Any:
        return PartialStyle() if self.style == PARTIAL else ALL_PARALLEL_STYLES[self.style]

    def validate_param(
        self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None
    ) -> None:
        if isinstance(module, QuantLinear):
            module.place.planned.check(mesh.get_group())
        else:
            self.other.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if not isinstance(module, QuantLinear):
            self.other.shard_param(module, param, mesh)
            return
        place = module.place
        dimension = cut_dimensions(place.shape, ALONG[place.style], mesh.size()).get(param)
        if dimension is not None and module._parameters[param] is not None:
            cut_parameter(module, param, mesh, dimension)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        if isinstance(module, QuantLinear):
            module.place.mesh = mesh
            return module
        return self.other.install_forward(module, mesh)  # type: ignore[no-any-return]


class PartialStyle(TensorParallelLayer):  # type: ignore[misc]
    """A linear that is not packed, cut by its inputs, whose partial results somebody else adds."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        cut_parameter(module, param, mesh, -1)


class ExpertsStyle(TensorParallelLayer):  # type: ignore[misc]
    """Experts that are linears, each cut over all ranks: the ranks' results are added once, after all experts."""

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: Any) -> Any:
        hidden_states, top_k_index, top_k_weights = args
        return (hidden_states, top_k_index, Shared.apply(top_k_weights, mesh.get_group())), kwargs

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: Any) -> Any:
        return Summed.apply(output, mesh.get_group())


class EmbeddingStyle(TensorParallelLayer):  # type: ignore[misc]
    """An embedding that no head shares, cut by its rows; transformers' own style would leave it a DTensor."""

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        cut_parameter(module, param, mesh, 0)

    def install_forward(self, module: Any, mesh: Any) -> Any:
        module.mesh = mesh
        return module


ALL_PARALLEL_STYLES[OURS + EXPERTS] = ExpertsStyle()
ALL_PARALLEL_STYLES[OURS + EMBEDDING] = EmbeddingStyle()
for _style in ALONG:
    ALL_PARALLEL_STYLES[OURS + _style] = PackedStyle(_style)


def localize(model: nn.Module) -> bool:
    """Makes each packed linear, and the embedding, that were cut while loading one of the rank's own shape; whether any was.

    Raises:
        QuantKitError: a packed linear was cut by something else than the plan of `plan_model`.
    """
    found = False
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.place is not None and module.place.mesh is not None:
            localize_linear(module)
            found = True
        elif isinstance(module, nn.Embedding) and getattr(module, "mesh", None) is not None:
            localize_embedding(module)
            found = True
        elif isinstance(module, QuantLinear) and any(isinstance(p, DTensor) for p in module.parameters()):
            raise QuantKitError(
                f"{name}: cut by a plan that was given, expected the model's own; use tp_plan='auto'"
            )
    return found


def localize_linear(module: Any) -> None:
    place: Place = module.place
    group, along = place.mesh.get_group(), ALONG[place.style]
    rank, ranks = place.mesh.get_local_rank(), place.mesh.size()
    for name, parameter in list(module.named_parameters()):
        if isinstance(parameter, DTensor):
            setattr(module, name, nn.Parameter(parameter.to_local(), requires_grad=False))
    local = local_part(module.quantized(), along, rank, ranks)
    for name in PARTS:
        tensor = getattr(local, name)
        setattr(module, name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False))
    module.scheme, (module.out_features, module.in_features) = local.scheme, local.shape
    module.place, module.group = None, group
    if place.style in WHOLE_OUTPUT:
        module.__class__ = GatheredLinear
    elif along == "rowwise":
        module.__class__ = RowLinear
        module.register_parameter("late_bias", module.bias)
        module.bias = None
        module.adds = place.style != PARTIAL
        module.first_column = rank * module.in_features if place.style in WHOLE_INPUT else None


def localize_embedding(module: Any) -> None:
    mesh = module.mesh
    of_a_rank = -(-module.num_embeddings // mesh.size())
    module.weight = nn.Parameter(module.weight.to_local(), requires_grad=False)
    module.__class__ = RankEmbedding
    module.group, module.first_row = mesh.get_group(), mesh.get_local_rank() * of_a_rank
    module.num_embeddings, module.padding_idx = len(module.weight), None  # which is of gradients alone
    del module.mesh


def refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise QuantKitError(
        "save_pretrained: each process holds a part of the model; copy the directory that it was loaded from, or load it on "
        "one device"
    )
