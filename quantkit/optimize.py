"""A loaded model made ready to generate: the same function with fewer kernels."""

from typing import Any, NoReturn, TypeVar

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from quantkit.cache import PAGE_SIZE
from quantkit.calibration.rtn import rtn
from quantkit.decode import Generating
from quantkit.errors import QuantKitError
from quantkit.fuse import FIXED_ROPE, fuse, put_before
from quantkit.kernels.kv_pages import check_layout
from quantkit.linear import QuantLinear
from quantkit.models import head_dim_of
from quantkit.rank_linear import GatheredLinear, GatheredPlain
from quantkit.scheme import Scheme, parse_scheme

Model = TypeVar("Model", bound=PreTrainedModel)


def optimize(model: Model, head: str | Scheme | None = None, kv: str = "bf16") -> Model:
    """Fuses the decoder blocks of a model, quantized or not, in place, and gives `generate` a paged cache and, on a GPU,
    a CUDA graph for its steps (`fuse.py`, `decode.py`).

    Beam search and assisted generation, and calls that ask for attentions, hidden states or a cache of their own, have
    transformers' loop and cache. A `PagedCache` of the caller's (`model.new_cache`) and `return_dict_in_generate` have its loop
    over pages. The pages of a call are kept for the next one, until `model.free_cache()`.

    Args:
        model: of a kind in `fuse.KINDS`, on the one device where it is to run: blocks are laid out for it.
        head: scheme of the LM head, rounded to nearest, such as "w8a16"; None: left as it is. Tied embeddings keep
            their own weight.
        kv: what keys and values are held as: "bf16" (the model's dtype), "int8", "fp8" or "int4" (`kernels/kv_pages.py`).

    Returns:
        The model. It generates, but is not to be saved (save it before) nor trained.

    Raises:
        QuantKitError: the model's blocks cannot be fused, it was optimized before, the head is packed already or is
            to be packed with static scales, which are calibrated, or there is no such kv. The model is as before then.
    """
    if not isinstance(model, PreTrainedModel):
        raise QuantKitError(
            f"optimize: {type(model).__name__}, expected a transformers model; of a PEFT model it is model.get_base_model()"
        )
    why_not = not_pageable(model, kv)
    if why_not and kv != "bf16":
        raise QuantKitError(f"kv {kv}: {why_not}")
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
    if not why_not:
        put_before(model, Generating)
        model.kv = kv  # type: ignore[assignment]
    if scheme is not None:
        new = QuantLinear.from_quantized(rtn(old.weight.detach().float(), scheme), old.bias)
        new.repack(model.dtype)
        if isinstance(old, GatheredPlain):
            new.__class__, new.group = GatheredLinear, old.group
        model.set_output_embeddings(new)
    model.save_pretrained = _refuse_to_save  # type: ignore[method-assign, assignment]
    return model


def not_pageable(model: PreTrainedModel, kv: str) -> str | None:
    """Why a model's keys and values cannot be held in pages of a kind; None: they can."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "the model rotates a part of its heads, expected whole ones; leave kv out"
    if (kind := rope.get("rope_type", "default")) not in FIXED_ROPE:
        return f"rope_type {kind!r} has frequencies of the text's length, expected {', '.join(FIXED_ROPE)}; leave kv out"
    try:
        check_layout(kv, PAGE_SIZE, head_dim_of(config), model.dtype)
    except QuantKitError as error:
        return str(error)
    return None


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise QuantKitError(
        "save_pretrained: the blocks of an optimized model are merged; save before quantkit.optimize, or load it again"
    )
