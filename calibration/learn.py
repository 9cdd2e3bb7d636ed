"""Learned rounding: signed gradient steps on rounding and ranges, one decoder block at a time.

AutoRound (Cheng et al., EMNLP 2024, arXiv:2309.05516), equations 3 to 5, started from GPTQ instead of from
rounding to nearest:

    code = clip(round(t / (s (1 + g)) + z + v)),    v in [-1/2, 1/2] for every weight,  g for every scale
    loss = || block(x; dequantized) - block_original(x_original) ||^2
    v <- v - lr sign(d loss / d v),   g <- g - lr sign(d loss / d g),   lr falling linearly to 0

t are the weights as GPTQ rounded them, so v = 0 gives GPTQ's codes. The derivative of round is taken as 1. The
target is what the original model computes from its own inputs, so the steps also make up for earlier blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from quantkit.calibration.grid import Grid, storable

STEPS = 200  # arXiv:2309.05516, section 4
RATE = 5e-3  # likewise: 1 / steps, so that v can just cross its range
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
) -> dict[str, tuple[torch.Tensor, Grid]]:
    """Better codes for the linears of a block.

    Args:
        run: run(weights by name, inputs) gives the block's output for a batch, differentiable in the weights.
        targets: weights [N, K] by name, float32, on the device of the work.
        grids: of integer codes, by name.
        hidden, outputs: batches of the block's input in the quantized model, and of its output in the original.
        steps, rate, seed: of the descent; a step takes one batch.

    Returns:
        codes [N, K], as `Grid.round` gives them, and the grid to read them with, by name.
    """
    moves = {name: torch.zeros_like(t, requires_grad=True) for name, t in targets.items()}
    gains = {
        name: torch.zeros_like(grid.scales, dtype=torch.float32, requires_grad=True)
        for name, grid in grids.items()
    }
    parameters = [*moves.values(), *gains.values()]

    def rounded(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """(codes, scale, zero), the first two differentiable."""
        grid = grids[name]
        scale, zero = replace(grid, scales=grid.scales.float() * (1 + gains[name])).expand(torch.float32)
        q = RoundThrough.apply(targets[name] / scale + zero + moves[name])
        return q.clamp(*grid.code_range), scale, zero  # type: ignore[union-attr, no-any-return]

    def weight(name: str) -> torch.Tensor:
        q, scale, zero = rounded(name)
        return (q - zero) * scale

    device = parameters[0].device
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        i = int(torch.randint(len(hidden), (1,), generator=generator))
        wanted = outputs[i].to(device).float()
        with torch.enable_grad():
            out = run({name: weight(name) for name in targets}, hidden[i].to(device)).float()
            loss = (out - wanted).square().mean() / wanted.square().mean()
        now = rate * (1 - step / steps)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data.sub_(gradient.sign(), alpha=now)
        for move in moves.values():
            move.data.clamp_(-LARGEST_MOVE, LARGEST_MOVE)
    learned = {}
    with torch.no_grad():
        for name, grid in grids.items():
            scales = storable(grid.scales.float() * (1 + gains[name]), grid.scales.dtype)
            grid = replace(grid, scales=scales)
            gains[name].zero_()
            grids = {**grids, name: grid}
            learned[name] = (grid.from_float(rounded(name)[0]), grid)
    return learned
