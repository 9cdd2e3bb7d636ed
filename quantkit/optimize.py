"""A loaded model made ready to generate: the same function with fewer kernels."""

from typing import Any, NoReturn, TypeVar

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from quantkit.calibration.rtn import rtn
from quantkit.errors import QuantKitError
from quantkit.fuse import fuse
from quantkit.linear import QuantLinear
from quantkit.scheme import Scheme, parse_scheme

Model = TypeVar("Model", bound=PreTrainedModel)


def optimize(model: Model, head: str | Scheme | None = None) -> Model:
    """Fuses the decoder blocks of a model, quantized or not, in place (`fuse.py`).

    Args:
        model: of a kind in `fuse.KINDS`, on the one device where it is to run: blocks are laid out for it.
        head: scheme of the LM head, rounded to nearest, such as "w8a16"; None: left as it is. Tied embeddings keep
            their own weight.

    Returns:
        The model. It generates, but is not to be saved (save it before) nor trained.

    Raises:
        QuantKitError: the model's blocks cannot be fused, it was optimized before, or the head is packed already or is
            to be packed with static scales, which are calibrated. The model is as before then.
    """
    scheme = parse_scheme(head) if isinstance(head, str) else head
    old = model.get_output_embeddings()
    if scheme is not None and scheme.activation_scale == "static":
        raise QuantKitError(
            f"head {scheme.label}: has calibrated scales, expected a scheme without, such as w8a16"
        )
    if scheme is not None and (old is None or isinstance(old, QuantLinear)):
        raise QuantKitError(
            f"head {scheme.label}: the model has no LM head that is not packed; leave head out"
        )
    if scheme is not None and getattr(old, "weight", None) is not None and isinstance(old.weight, DTensor):
        raise QuantKitError(
            f"head {scheme.label}: the LM head is cut over processes; pack it with quantkit quantize"
        )
    fuse(model)
    if scheme is not None:
        new = QuantLinear.from_quantized(rtn(old.weight.detach().float(), scheme), old.bias)
        new.repack(model.dtype)
        model.set_output_embeddings(new)
    model.save_pretrained = _refuse_to_save  # type: ignore[method-assign, assignment]
    return model


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise QuantKitError(
        "save_pretrained: the blocks of an optimized model are merged; save before quantkit.optimize, or load it again"
    )
