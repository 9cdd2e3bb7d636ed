"""How far a model's next-token distributions are from a reference's: KL divergence and top-1 agreement."""

import torch

from quantkit.eval.perplexity import chunks


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> tuple[float, int]:
    """Compares the distributions at S positions.

    Args:
        reference, logits: of the reference and of the model in question, any floating dtype and device
            [S, V]; the softmaxes are taken in float32 on the device of `logits`.

    Returns:
        sum over positions of KL(p_reference || p), in nats, accumulated in float64;
        number of positions where both have the same most probable token.
    """
    total, agreed = 0.0, 0
    for part in chunks(*logits.shape):
        kl, same = position_divergence(reference[part], logits[part])
        total += kl.sum().item()
        agreed += int(same.sum())
    return total, agreed


def position_divergence(reference: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for each position, in memory for S * V float32: KL in nats float64 [S], agreement bool [S]."""
    p = reference.to(logits.device).float().log_softmax(-1)
    q = logits.float().log_softmax(-1)
    # A token that both rule out has p - q = nan and contributes nothing.
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    return terms.sum(-1).double(), p.argmax(-1) == q.argmax(-1)
