"""Tensor parallel packed linears: transformers' plans and loader cut them, and from then on they are ours.

While a model is loaded, a packed linear's parts are DTensors without numbers, so that transformers reads of each file a
rank's part alone. Once they are filled, the linear becomes one of a rank's own shape with plain tensors. It repacks them,
and runs the kernels, as a linear on one device does:

    colwise     y_r = x w_r^T                      a plain `QuantLinear` of N / ranks rows
    gathered    y = [y_0 | y_1 | ...]              `GatheredLinear`
    rowwise     y = sum over ranks of x_r w_r^T    `RowLinear`

A scheme that rounds each row of x by its largest |x| gets that of the whole row, from all ranks: the same codes of x as on
one device, hence the same sums up to the order of their additions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
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
from quantkit.kernels.cpu import SCALE_FLOOR, TOP
from quantkit.linear import CODE_DTYPES, QuantLinear
from quantkit.packing import PARTS
from quantkit.processes import agree
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
EXPERTS = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": PARTIAL}


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
    """Puts packed linears, and experts that are linears, into the model's tensor parallel plan.

    Args:
        headers: what must be the same on all ranks.
    """
    planned = Planned(model.config, headers)
    plan = model._tp_plan if isinstance(model._tp_plan, dict) else {}
    for name, module in model.named_modules():
        key = replace_layer_number_by_wildcard(name)
        if isinstance(module, UnfusedExperts) and key in plan:
            for stacked in ("gate_up_proj", "down_proj"):
                plan.pop(f"{key}.{stacked}", None)
            plan.update({f"{key}.*.{linear}": OURS + style for linear, style in EXPERTS.items()})
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
        empty = module._parameters[param]
        if dimension is not None and empty is not None:
            cut = distribute_tensor(empty, mesh, [Shard(dimension)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(cut, requires_grad=False)

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
        cut = distribute_tensor(module._parameters[param], mesh, [Shard(-1)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(cut, requires_grad=False)


for _style in ALONG:
    ALL_PARALLEL_STYLES.register(OURS + _style, PackedStyle(_style))


class GatheredLinear(QuantLinear):
    """A linear cut by its outputs that gives all of them to every rank."""

    group: Any

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return gathered(super().product(x), self.group)

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        first = dist.get_rank(self.group) * self.out_features
        return super().input_gradient(dy[..., first : first + self.out_features])


class RowLinear(QuantLinear):
    """A linear cut by its inputs: a rank's columns of x times its part of the weight, then the sum over the ranks.

    Attributes:
        late_bias: [out_features] or None; added once to the sum, while `bias` is None.
        first_column: of the rank's columns of x where x comes whole; None: x is the rank's part.
        adds: whether it adds the ranks' results, or leaves that to the module around it.
    """

    group: Any
    late_bias: nn.Parameter | None
    first_column: int | None = None
    adds: bool = True

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self.first_column is not None:
            x = x[..., self.first_column : self.first_column + self.in_features]
        if self.channel_scales is not None:
            x = (x * self.channel_scales).to(x.dtype)
        if self.input_order is not None:
            x = gathered(x, self.group).index_select(-1, self.input_order)
        if self.scheme.activation_scale == "token":
            codes, scales = rounded_rows(x, CODE_DTYPES[self.scheme.activation], self.group)  # type: ignore[index]
            y = super().of_rounded(codes, scales, x.dtype)
        else:
            y = self.multiply(x)
        return self.summed(y)

    def summed(self, y: torch.Tensor) -> torch.Tensor:
        if self.adds:
            dist.all_reduce(y, group=self.group)
        return y if self.late_bias is None else y + self.late_bias

    @property
    def input_width(self) -> int:
        return self.in_features * dist.get_world_size(self.group)

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        if self.input_order is not None:
            raise QuantKitError(
                "gradients: a linear with input_order is cut by its inputs, expected none; load the model on one device"
            )
        dx = dy @ self.quantized().effective_weight(dy.dtype)
        if self.first_column is None:
            return dx
        whole = dx.new_zeros(*dx.shape[:-1], self.input_width)
        whole[..., self.first_column : self.first_column + self.in_features] = dx
        dist.all_reduce(whole, group=self.group)
        return whole

    @property
    def rounding(self) -> tuple[torch.dtype, torch.Tensor | None, int] | None:
        """As of a whole linear, but None where a row's scale needs all ranks."""
        return None if self.scheme.activation_scale == "token" else super().rounding

    def of_rounded(
        self, x_codes: torch.Tensor, x_scales: torch.Tensor, dtype: torch.dtype, fast: bool | None = None
    ) -> torch.Tensor:
        return self.summed(super().of_rounded(x_codes, x_scales, dtype, fast))


def rounded_rows(x: torch.Tensor, dtype: torch.dtype, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`cpu.quantize_activations` of the ranks' rows of x side by side: this rank's codes [..., K], scales [M, 1]."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    scales = (largest / TOP[dtype]).clamp(min=SCALE_FLOOR)
    scaled = (wide / scales).clamp(-TOP[dtype], TOP[dtype])
    codes = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    return codes.contiguous(), scales.view(-1, 1)


def gathered(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The ranks' x [..., n] side by side [..., ranks n]."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, -1)


def localize(model: nn.Module) -> bool:
    """Makes each packed linear that was cut while loading one of the rank's own shape; whether there were any.

    Raises:
        QuantKitError: a packed linear was cut by something else than the plan of `plan_model`.
    """
    found = False
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.place is not None and module.place.mesh is not None:
            localize_linear(module)
            found = True
        elif isinstance(module, QuantLinear) and any(isinstance(p, DTensor) for p in module.parameters()):
            raise QuantKitError(
                f"{name}: cut by a style that packed linears do not have, expected {', '.join(ALONG)}; use tp_plan='auto'"
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


def refuse_to_save(folder: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise QuantKitError(
            f"save_pretrained: each process holds a part of {folder}; copy that directory, or load it on one device"
        )

    return refuse
