"""Method: the steps that turn a weight into codes, written as one word: `gptq`, `awq+gptq`, `rotate+smooth+gptq+learn`.

In order: a rotation of the whole model, scales of the input channels, one way of rounding, a refinement.
"""

from dataclasses import dataclass
from typing import Literal

from quantkit.errors import QuantKitError
from quantkit.scheme import Scheme

ROTATE, LEARN = "rotate", "learn"
SCALINGS = {
    "awq": "AWQ's scales of input channels (arXiv:2306.00978)",
    "smooth": "SmoothQuant's scales (arXiv:2211.10438), searched",
    "equalize": "scales from the weights alone (arXiv:1906.04721)",
}
ROUNDINGS = {
    "rtn": "round to nearest",
    "clip": "round to nearest, each range searched",
    "hqq": "HQQ (half-quadratic, no data)",
    "gptq": "GPTQ (arXiv:2210.17323)",
    "gptaq": "GPTQ with the drift of earlier layers made up for (arXiv:2504.02692)",
}
STEPS = {
    ROTATE: "Hadamard rotations folded into the weights (arXiv:2404.00456)",
    **SCALINGS,
    **ROUNDINGS,
    LEARN: "learned rounding, one block at a time (arXiv:2309.05516)",
}
DEFAULT_ROUNDING = {"awq": "clip", "smooth": "rtn", "equalize": "clip"}  # of a scaling that stands alone
Level = Literal["fast", "balanced", "best"]
QUALITIES = ("fast", "balanced", "best")


@dataclass(frozen=True)
class Method:
    """The steps that one linear gets."""

    rounding: str
    scaling: str | None = None
    rotate: bool = False
    learn: bool = False

    @property
    def needs_activations(self) -> bool:
        return self.learn or self.rounding in ("gptq", "gptaq") or self.scaling in ("awq", "smooth")

    @property
    def needs_original(self) -> bool:
        """The hidden states of the original model are wanted beside those of the partly quantized one."""
        return self.learn or self.rounding == "gptaq"


def parse_method(text: str) -> Method:
    """A method from its word.

    Raises:
        QuantKitError: a step is unknown, stands twice, in another order than that of `STEPS`, or learns from
            another rounding than GPTQ's.
    """
    steps = text.split("+")
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise QuantKitError(
            f"unknown method {unknown[0]!r}; known steps, joined by '+': {', '.join(STEPS)} (awq+gptq, say)"
        )
    kinds = (
        (ROTATE,),
        tuple(SCALINGS),
        tuple(ROUNDINGS),
        (LEARN,),
    )
    places = [next(i for i, kind in enumerate(kinds) if step in kind) for step in steps]
    if places != sorted(set(places)):
        raise QuantKitError(
            f"method {text!r}: expected at most one each of rotate, {'|'.join(SCALINGS)}, {'|'.join(ROUNDINGS)} "
            "and learn, in this order"
        )
    scaling = next((step for step in steps if step in SCALINGS), None)
    rounding = next((step for step in steps if step in ROUNDINGS), None)
    if rounding is None:
        rounding = DEFAULT_ROUNDING[scaling] if scaling and LEARN not in steps else "gptq"
    if LEARN in steps and rounding not in ("gptq", "gptaq"):
        raise QuantKitError(
            f"method {text!r}: learn goes on from gptq or gptaq; expected one of these before it"
        )
    return Method(rounding, scaling, ROTATE in steps, LEARN in steps)


def default_method(scheme: Scheme, quality: Level = "balanced") -> str:
    """What `--quality` chooses for a scheme.

    fast: no calibration text where the scheme can do without. balanced: the best that takes minutes for a model of
    8B parameters on a GPU. best: below 8 bits several times as long, and several copies of a block in memory.
    """
    int8_inputs = scheme.activation == "int8"
    if quality == "fast":
        if int8_inputs:
            return "smooth"
        return "equalize" if scheme.bits < 8 else "rtn"
    # at 8 bits earlier blocks lose so little that GPTAQ fits noise: FP8's KL 0.0129 where GPTQ has 0.0120
    rounding = f"gptaq+{LEARN}" if quality == "best" and scheme.bits < 8 else "gptq"
    if int8_inputs:
        return f"smooth+{rounding}"
    if scheme.bits < 8:
        return f"awq+{rounding}"
    if scheme.weight == "int8" and quality == "balanced":
        return "rtn"  # loses less than bfloat16 itself, and needs no text
    return rounding


def describe(method: str) -> str:
    """A method's steps in words."""
    return ", then ".join(STEPS[step] for step in method.split("+"))
