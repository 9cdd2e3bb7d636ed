"""How large a quantized model is: bits a weight, bytes on disk, bytes in memory."""

from pathlib import Path

from torch import nn

from quantkit.errors import QuantKitError
from quantkit.linear import QuantLinear


def bits_per_weight(model: nn.Module) -> float | None:
    """Bits of codes, scales and zeros for one weight, averaged over the quantized linears; None without any.

    Counted in the neutral layout, as stored. Embeddings, norms and linears left in floating point are not in it.
    """
    packed = [m.quantized() for m in model.modules() if isinstance(m, QuantLinear)]
    weights = sum(q.shape[0] * q.shape[1] for q in packed)
    return 8 * sum(q.nbytes for q in packed) / weights if weights else None


def disk_bytes(folder: str | Path) -> int:
    """Bytes of a checkpoint's safetensors files.

    Raises:
        QuantKitError: the folder holds none.
    """
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise QuantKitError(f"{folder}: no *.safetensors here; give the folder of a checkpoint")
    return sum(file.stat().st_size for file in files)


def memory_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as loaded, a tied tensor counted once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())
