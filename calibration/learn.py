"""Learned rounding: gradient steps on rounding and scales, one decoder block at a time.

AutoRound (Cheng et al., EMNLP 2024, arXiv:2309.05516), equations 3 to 5, started from GPTQ instead of from
rounding to nearest:

    code = clip(round(t / s + z + v)),    v in [-1/2, 1/2] for every weight
    weight = (code - z) s (1 + g),        g for every scale
    loss = || block(x; weights) - block_original(x_original) ||^2

t are the weights as GPTQ rounded them, so v = 0 and g = 0 give GPTQ's codes and scales. The derivative of round is
taken as 1. The target is what the original model computes from its own inputs, so the steps also make up for earlier
blocks. The steps are Adam's, where AutoRound takes the sign of the gradient: signed steps move every v alike, and so
lose at 3 and 4 bits more of what GPTQ has gained than they gain. g scales codes that stay, for which the loss is smooth.

Several processes, each with batches of its own, take each step together, by the mean of their gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from quantkit.calibration.grid import Grid, storable
from quantkit.peers import Peers

STEPS = 100
RATE = 1e-3  # falls linearly to 0: v crosses a tenth of its range at most, for most codes should stay GPTQ's
LARGEST_MOVE = 0.5


class RoundThrough(torch.autograd.Function):
    """round() with derivative 1."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def learn_rounding(
    run: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor],
    targets: dict[str, torch.Tensor],
    grids: dict[str, Grid],
    hidden: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    seed: int = 0,
    peers: Peers | None = None,
) -> dict[str, tuple[torch.Tensor, Grid]]:
    """Better codes for the linears of a block.

    Args:
        run: run(weights by name, inputs) gives the block's output for a batch, differentiable in the weights.
        targets: weights [N, K] by name, float32, on the device of the work.
        grids: of integer codes, by name.
        hidden, outputs: batches of the block's input in the quantized model, and of its output in the original.
        steps, rate, seed: of the descent; a step takes one batch, of each process.
        peers: the processes that learn together, each with this call; all get the same.

    Returns:
        codes [N, K], as `Grid.round` gives them, and the grid to read them with, by name: those learned, or those
        that were there before if these do no better on all batches together.
    """
    moves = {name: torch.zeros_like(t, requires_grad=True) for name, t in targets.items()}
    gains = {
        name: torch.zeros_like(grid.scales, dtype=torch.float32, requires_grad=True)
        for name, grid in grids.items()
    }
    parameters = [*moves.values(), *gains.values()]
    device = parameters[0].device

    def rounded(name: str) -> torch.Tensor:
        """Codes [N, K] as whole numbers, differentiable."""
        scale, zero = grids[name].expand(torch.float32)
        q: torch.Tensor = RoundThrough.apply(targets[name] / scale + zero + moves[name])
        return q.clamp(*grids[name].code_range)

    def scaled(name: str) -> Grid:
        return replace(grids[name], scales=grids[name].scales.float() * (1 + gains[name]))

    def loss(weights: dict[str, torch.Tensor], i: int) -> torch.Tensor:
        wanted = outputs[i].to(device).float()
        return (run(weights, hidden[i].to(device)).float() - wanted).square().mean() / wanted.square().mean()

    def total(ends: dict[str, tuple[torch.Tensor, Grid]]) -> float:
        weights = {name: grid.dequantize(codes) for name, (codes, grid) in ends.items()}
        own = sum(loss(weights, i).item() for i in range(len(hidden)))
        return own if peers is None else sum(peers.gather(own, "loss of a block"))

    def stored() -> dict[str, tuple[torch.Tensor, Grid]]:
        ends = {}
        for name, grid in grids.items():
            scales = storable(scaled(name).scales, grid.scales.dtype)
            ends[name] = grid.from_float(rounded(name)), replace(grid, scales=scales)
        return ends

    with torch.no_grad():
        start = stored()
        before = total(start)
    generator = torch.Generator().manual_seed(seed)
    descent = torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        i = int(torch.randint(len(hidden), (1,), generator=generator))
        descent.param_groups[0]["lr"] = rate * (1 - step / steps)
        with torch.enable_grad():
            weights = {name: scaled(name).dequantize(rounded(name)) for name in targets}
            gradients = torch.autograd.grad(loss(weights, i), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.contiguous()
            if peers is not None:
                peers.add(parameter.grad, "gradients of a block")
                parameter.grad /= peers.count
        descent.step()
        for move in moves.values():
            move.data.clamp_(-LARGEST_MOVE, LARGEST_MOVE)
    with torch.no_grad():
        end = stored()
        return end if total(end) < before else start
