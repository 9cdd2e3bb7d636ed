"""Linears and the embedding of one rank of tensor parallelism, and the collectives between the ranks.

    colwise     y_r = x w_r^T                      a plain `QuantLinear` of N / ranks rows
    gathered    y = [y_0 | y_1 | ...]              `GatheredLinear`
    rowwise     y = sum over ranks of x_r w_r^T    `RowLinear`
    embedding   x = sum over ranks of its rows     `RankEmbedding`

A scheme that rounds each row of x by its largest |x| gets that of the whole row, from all ranks: the same codes of x as on
one device, hence the same sums up to the order of their additions. Rounded by a rank's own largest |x| they would be no worse,
but other numbers.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from quantkit.errors import QuantKitError
from quantkit.exchange import Exchange
from quantkit.kernels.cpu import SCALE_FLOOR, TOP
from quantkit.linear import CODE_DTYPES, QuantLinear


class GatheredLinear(QuantLinear):
    """A linear cut by its outputs that gives all of them to every rank."""

    group: Any

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return gathered(super().product(x), self.group)

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        first = dist.get_rank(self.group) * self.out_features
        return super().input_gradient(dy[..., first : first + self.out_features])


class GatheredPlain(nn.Linear):
    """As `GatheredLinear`, of a weight that is not packed."""

    group: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gathered(super().forward(x), self.group)


class RankEmbedding(nn.Embedding):
    """An embedding cut by its rows: each rank looks up those that it has, and the sum over the ranks has all.

    Attributes:
        first_row: of the rank's rows.
    """

    group: Any
    first_row: int

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        row = ids - self.first_row
        mine = (row >= 0) & (row < len(self.weight))
        x = super().forward(row.masked_fill(~mine, 0)).masked_fill(~mine.unsqueeze(-1), 0)
        dist.all_reduce(x, group=self.group)
        return x


class RowLinear(QuantLinear):
    """A linear cut by its inputs: a rank's columns of x times its part of the weight, then the sum over the ranks.

    Attributes:
        late_bias: [out_features] or None; added once to the sum, while `bias` is None.
        first_column: of the rank's columns of x where x comes whole; None: x is the rank's part.
        adds: whether it adds the ranks' results, or leaves that to the module around it.
        exchange: by which the norm that follows adds them, and `late_bias`; None: no norm does.
    """

    group: Any
    late_bias: nn.Parameter | None
    first_column: int | None = None
    adds: bool = True
    exchange: Exchange | None = None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        x = self.own_columns(x)
        if self.scheme.activation_scale == "token":
            codes, scales = rounded_rows(x, CODE_DTYPES[self.scheme.activation], self.group)  # type: ignore[index]
            y = super().of_rounded(codes, scales, x.dtype)
        else:
            y = self.multiply(x)
        return self.summed(y)

    def own_columns(self, x: torch.Tensor) -> torch.Tensor:
        """Of x, scaled and in order."""
        if self.first_column is not None:
            x = x[..., self.first_column : self.first_column + self.in_features]
        if self.channel_scales is not None:
            x = (x * self.channel_scales).to(x.dtype)
        if self.input_order is not None:
            x = gathered(x, self.group).index_select(-1, self.input_order)
        return x

    def given(self, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """`product`, and whether all ranks have its rows already, which the norm of `exchange` has to add next."""
        if self.exchange is None or not self.tiled:
            return self.product(x), False
        x = self.own_columns(x)
        weight = (self.packed, self.packed_scales, self.packed_zeros)
        y = self.exchange.product(x, *weight, self.scheme.group_size or 0)  # type: ignore[arg-type]
        return (self.summed(self.multiply(x)), False) if y is None else (y, True)

    def summed(self, y: torch.Tensor) -> torch.Tensor:
        if self.exchange is not None:
            return y
        if self.adds:
            dist.all_reduce(y, group=self.group)
        return y if self.late_bias is None else y + self.late_bias

    def whole(self, y: torch.Tensor) -> torch.Tensor:
        """What `product` gives, once its sum was left to a norm that does not come."""
        return y if self.exchange is None else self.exchange.add(y, self.late_bias)

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
        """As of a whole linear, but None where a row's scale needs all ranks, or x comes whole."""
        alone = self.scheme.activation_scale != "token" and self.first_column is None
        return super().rounding if alone else None

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


class Summed(torch.autograd.Function):
    """x summed over the ranks. Each rank's x gets the gradient of the sum, which all ranks have."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return dy, None


class Shared(torch.autograd.Function):
    """x, which all ranks have. Its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        dx = dy.clone()
        dist.all_reduce(dx, group=ctx.group)
        return dx, None
