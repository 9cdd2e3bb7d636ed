"""Mixtures of experts as plain linears.

transformers 5 keeps the experts of a layer as two stacked parameters,

    gate_up_proj [E, 2 I, H]        down_proj [E, H, I]        E experts, I inner and H outer channels

and multiplies slices of them. Packing, calibration and kernels work on `nn.Linear`. So every expert becomes three
of them, under the names that checkpoints on disk use: experts.{e}.gate_proj, up_proj and down_proj.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.linear import replace_module

# Classes of transformers that compute down(act(gate(x)) * up(x)) from the two parameters above, without biases.
FUSED = ("MixtralExperts", "Qwen2MoeExperts", "Qwen3MoeExperts", "OlmoeExperts")


class Expert(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(linear_of, (gate, up, down))
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UnfusedExperts(nn.ModuleList):
    """Stands for the experts of one layer; called as transformers calls its fused ones.

    Experts that no token was sent to are not run, so hooks on their linears see every token that they get.
    """

    def __init__(self, fused: Any) -> None:
        gates, ups = fused.gate_up_proj.detach().chunk(2, dim=1)
        weights = zip(gates, ups, fused.down_proj.detach(), strict=True)
        super().__init__(Expert(*one, act=fused.act_fn) for one in weights)
        self.__dict__["fused"] = fused.to("meta")  # not a submodule: what `fuse` fills again

    def fuse(self) -> Any:
        """The fused module that this was made of, with the weights of these linears."""
        fused, experts = self.__dict__["fused"], list[Any](self)
        gates, ups, downs = (
            torch.stack([expert.get_submodule(name).weight for expert in experts])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        fused.gate_up_proj = nn.Parameter(torch.cat([gates, ups], 1), requires_grad=False)
        fused.down_proj = nn.Parameter(downs, requires_grad=False)
        return fused

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H]; index and weight of the experts of each token [T, k] -> [T, H]."""
        T, H = hidden_states.shape
        order = top_k_index.flatten().argsort(stable=True)  # [T k], expert by expert
        counts = top_k_index.flatten().bincount(minlength=len(self)).tolist()
        inputs = hidden_states[order // top_k_index.shape[1]].split(counts)
        y = torch.cat([expert(x) for expert, x in zip(self, inputs, strict=True) if len(x)])
        y = y * top_k_weights.flatten()[order, None]
        # back in the order of the tokens: a sum over k, unlike index_add_, is the same at every call on a GPU
        return y[order.argsort()].view(T, -1, H).sum(1).to(hidden_states.dtype)


def linear_of(weight: torch.Tensor) -> nn.Linear:
    """An nn.Linear with a copy of the weight [N, K], so that the stack that it is cut from can be freed."""
    N, K = weight.shape
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def unfuse_experts(model: nn.Module) -> None:
    """Puts `UnfusedExperts` where the model has fused ones of a known kind, on the meta device too; in place."""
    fused = [name for name, module in model.named_modules() if type(module).__name__ in FUSED]
    for name in fused:
        replace_module(model, name, UnfusedExperts(model.get_submodule(name)))
    if fused and isinstance(model, PreTrainedModel):
        model._can_compile_fullgraph = False  # how many tokens an expert gets is known at run time alone


def fuse_experts(model: nn.Module) -> None:
    """Undoes `unfuse_experts`, where every expert's linears are plain ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, UnfusedExperts):
            replace_module(model, name, module.fuse())
    model.__dict__.pop("_can_compile_fullgraph", None)


def describe_experts(modules: dict[str, dict[str, Any]]) -> str:
    """One line on how the experts among these entries of config.json were calibrated; '' where none was."""
    tokens: dict[str, int] = {}  # of each expert, by its name; the same for its three linears
    for name, entry in modules.items():
        if "tokens" in entry and re.search(r"\.experts\.\d+\.", name):
            tokens[name.rpartition(".")[0]] = entry["tokens"]
    if not tokens:
        return ""
    fewest = min(tokens, key=lambda name: tokens[name])
    reached = sum(count > 0 for count in tokens.values())
    return f"experts: {reached} of {len(tokens)} calibrated, fewest tokens {tokens[fewest]} ({fewest})"
