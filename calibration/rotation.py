"""Rotations folded into the weights: QuaRot (Ashkboos et al., NeurIPS 2024, arXiv:2404.00456, section 4, stage 1)
and SpinQuant without its learning (Liu et al., ICLR 2025, arXiv:2405.16406, section 3, whose names R1, R2 are used).

An orthogonal matrix mixes channels, so that a few large ones no longer make the grid of all others coarse. Both
rotations cancel inside the model, which computes what it did before, at no cost when it runs:

    R1 [D, D] turns the residual stream h [tokens, D] into h R1. rms(h R1) = rms(h), so a norm whose weight has
       moved into the linears after it turns with its input:
           embedding  E -> E R1                    reader  W -> W diag(norm) R1,   norm -> 1
           writer     W -> R1^T W,  b -> b R1      head    W -> W diag(final norm) R1
    R2 [head_dim, head_dim] turns every value head; attention is a weighted mean of values, so they stay turned
       up to the output projection:
           rows of a head in v_proj  W -> R2^T W,  b -> b R2      columns of a head in o_proj  W -> W R2
       Before that each value channel is scaled, in v_proj by 1/d and in o_proj by d (see `balance`): R2 gives all
       channels of a head the rounding error of its largest, which small ones that o_proj makes large would not bear.

A head that is tied to the embedding has to be untied: diag(final norm) R1 is not R1 diag(anything), so no weight
of the final norm makes E R1 serve both. The model then stores one more tensor of the embedding's size.

In Gemma 2 and 3 a norm with a weight stands between each writer and the residual stream and cannot be moved
past R1: they get R2 alone.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.errors import QuantKitError
from quantkit.models import FINAL_NORM, FOLDS, WRITERS, decoder_blocks, linears

ROWS = 8192  # of an embedding turned at a time, to hold few of them in float64


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrices of one model, float64, on the device of the work.

    Attributes:
        kind: the model type, a key of `FOLDS`.
        residual: R1 [hidden_size, hidden_size]; None where the architecture does not allow it.
        heads: R2 [head_dim, head_dim], the same for every value head of every block.
    """

    kind: str
    residual: torch.Tensor | None
    heads: torch.Tensor

    @property
    def remark(self) -> str:
        """What the checkpoint says of each linear, where the rotation is not all that was asked for."""
        return (
            "" if self.residual is not None else f"{self.kind}: only its value heads can be rotated offline"
        )


def random_rotations(model: PreTrainedModel, seed: int, device: torch.device | str = "cpu") -> Rotation:
    """R1 and R2 for a model, whose weights need not be loaded. The same seed gives the same matrices.

    Raises:
        QuantKitError: it is not known where the architecture reads and writes its residual stream.
    """
    kind = model.config.model_type
    if kind not in FOLDS:
        raise QuantKitError(
            f"{type(model).__name__}: a {kind} model cannot be rotated: not known which linears read and write its "
            f"residual stream (known: {', '.join(FOLDS)}); leave 'rotate' out of the method"
        )
    _, blocks = decoder_blocks(model)
    head_dim: int = blocks[0].self_attn.head_dim  # type: ignore[union-attr, assignment]
    return Rotation(
        kind,
        random_rotation(model.config.hidden_size, seed).to(device) if kind in WRITERS else None,
        random_rotation(head_dim, seed).to(device),
    )


def random_rotation(n: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix, float64 [n, n].

    diag(random signs) times a Hadamard matrix over sqrt(n): all entries are equally large, so that one large
    channel is spread evenly over all others. Where no Hadamard matrix of order n is known to `hadamard`, a matrix
    drawn uniformly from the orthogonal group, whose entries differ in size.
    """
    generator = torch.Generator().manual_seed(seed)
    H = hadamard(n)
    if H is not None:
        signs = torch.randint(2, (n, 1), generator=generator, dtype=torch.float64) * 2 - 1
        return signs * H / n**0.5
    Q, upper = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * upper.diagonal().sign()  # without the signs, Q is not uniform


def hadamard(n: int) -> torch.Tensor | None:
    """A Hadamard matrix, H H^T = n I with entries 1 and -1, float64 [n, n]; None if no construction is known.

    H_2m = H_2 (x) H_m (Sylvester), else from the quadratic residues of a prime q (Paley): order q + 1 where
    q = 3 mod 4, order 2 (q + 1) where q = 1 mod 4. This covers 2^k times 1, 12, 20, 28, 36, 60 and 84, and with
    them the hidden and head sizes of the usual models.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n % 2:
        return None
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    half = hadamard(n // 2)
    if half is not None:
        return torch.kron(pair, half)
    if n % 4 == 0 and is_prime(n - 1):  # n - 1 = 3 mod 4
        core = bordered_residues(n - 1)
        core[1:, 0] = -1
        return core + torch.eye(n, dtype=torch.float64)
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and is_prime(n // 2 - 1):
        core = bordered_residues(n // 2 - 1)
        corner = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
        return torch.kron(core, pair) + torch.kron(torch.eye(n // 2, dtype=torch.float64), corner)
    return None


def bordered_residues(q: int) -> torch.Tensor:
    """[[0, 1], [1, Q]] with Q[i, j] = 1 if j - i is a square mod the prime q, -1 if not, 0 if j = i; [q + 1, q + 1]."""
    character = -torch.ones(q, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 1:] = character[(torch.arange(q) - torch.arange(q)[:, None]) % q]
    return matrix


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def untie_head(model: PreTrainedModel) -> dict[str, str]:
    """Gives the LM head a weight of its own, a copy of the embedding it was tied to, and says so in the config.

    Returns:
        name of the head's weight -> name of the embedding's, whose values it has; empty if it was not tied.
    """
    untied = dict(model.all_tied_weights_keys)
    for name in untied:
        parent = model.get_submodule(name.rpartition(".")[0])
        parent.weight = nn.Parameter(parent.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return untied


@torch.no_grad()
def rotate_outer(model: PreTrainedModel, rotation: Rotation, stored_dtype: torch.dtype | None = None) -> None:
    """R1 in what lies outside the decoder blocks: embedding, final norm, LM head, which must not be tied.

    Args:
        stored_dtype: what the weights will be rounded to when they are stored, so that calibration meets them
            as they will be; None: their own dtype.
    """
    if rotation.residual is None:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is not head.weight, "the LM head is still tied to the embedding"
    norm = model.get_submodule(FINAL_NORM)
    fold: torch.Tensor = norm.weight.double()  # type: ignore[operator, assignment]
    for module, scale in ((embedding, torch.ones_like(fold)), (head, fold)):
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        dtype = stored_dtype or weight.dtype
        pieces = [((rows.double() * scale) @ rotation.residual).to(dtype) for rows in weight.split(ROWS)]
        module.weight = nn.Parameter(torch.cat(pieces).to(weight.dtype), requires_grad=False)
    norm.weight.fill_(1)  # type: ignore[operator, union-attr]


@torch.no_grad()
def rotate_block(block: nn.Module, rotation: Rotation) -> None:
    """R1 and R2 in one decoder block, whose norms in front of linears then have a weight of 1.

    Each linear is turned in float64 and rounded once, to its own dtype.
    """
    R1, R2 = rotation.residual, rotation.heads
    read_through: dict[str, nn.Module] = {}  # linear -> the norm in front of it
    for fold in FOLDS[rotation.kind]:
        source = block.get_submodule(fold.source)
        if fold.per_head:
            values, (output,) = fold.source, fold.linears
        elif R1 is not None and not isinstance(source, nn.Linear):
            read_through.update(dict.fromkeys(fold.linears, source))
    named = linears(block)
    repeats: int = block.self_attn.num_key_value_groups  # type: ignore[union-attr, assignment]
    output_weight = named[output].weight.double()
    value_rows = output_weight.shape[1] // repeats
    value_weight = named[values].weight[-value_rows:].double()
    if values in read_through:
        value_weight = value_weight * read_through[values].weight.double()  # type: ignore[operator]
    d = balance(value_weight, output_weight, len(R2), repeats)
    for name, linear in named.items():
        weight = linear.weight.double()
        bias = None if linear.bias is None else linear.bias.double()
        if R1 is not None and name in read_through:
            weight = (weight * read_through[name].weight.double()) @ R1  # type: ignore[operator]
        if name == output:
            weight = turn(weight * d.view(-1, 1, len(R2)).expand(-1, repeats, -1).flatten(), R2)
        if name == values:  # or the last rows of a fused projection
            weight[-value_rows:] = turn(weight[-value_rows:].T / d, R2).T
            if bias is not None:
                bias[-value_rows:] = turn(bias[-value_rows:] / d, R2)
        if R1 is not None and name in WRITERS[rotation.kind]:
            weight = R1.T @ weight
            bias = None if bias is None else bias @ R1
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    for norm in read_through.values():
        norm.weight.fill_(1)  # type: ignore[operator, union-attr]


def balance(values: torch.Tensor, output: torch.Tensor, head_dim: int, repeats: int) -> torch.Tensor:
    """What to divide the rows of v_proj [V, K] by, and to multiply columns of o_proj [N, repeats * V] by: d [V].

    d = sqrt(|row| / |columns|), the columns of all query heads that share the value head taken together: of all
    scales, these give |values| |output| its least product (Cauchy-Schwarz). 1 where row or columns are zero.
    """
    rows = values.norm(dim=1)
    columns = output.norm(dim=0).view(-1, repeats, head_dim).norm(dim=1).flatten()
    return torch.where((rows > 0) & (columns > 0), (rows / columns).sqrt(), 1.0)


def turn(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """Every run of len(R) channels times R; x [..., heads * len(R)]."""
    return (x.unflatten(-1, (-1, len(R))) @ R).flatten(-2)
