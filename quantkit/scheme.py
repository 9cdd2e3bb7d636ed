"""Scheme: what a packed linear is, in the fewest facts that a kernel and a file reader need."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from quantkit.errors import QuantKitError

GROUP_SIZES = (32, 64, 128)
BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "fp8": 8}
LARGEST_CODE = {"int2": 3, "int3": 7, "int4": 15, "int8": 127, "fp8": 448}  # as a number
BLOCK = 128  # rows and columns of one fp8-block tile, as DeepSeek-V3's checkpoints have it


@dataclass(frozen=True)
class Scheme:
    """How the weight [N, K] and the activations [M, K] of one linear are represented.

    Args:
        name: the preset; it fixes `weight`, `block_size`, `activation` and `activation_scale`.
        weight: what a code is: an integer of 2, 3, 4 or 8 bits, or a float8_e4m3fn.
        group_size: neighbouring columns of one row that share a scale; None: the whole row shares one.
        block_size: edge of the square tile that shares a scale (fp8-block); None: scales belong to rows.
        symmetric: no zero points. Only codes of 2 to 4 bits can be asymmetric.
        activation: what x is rounded to before the product; None: x stays in its floating type.
        activation_scale: 'token', one scale a row of x, found at run time; 'group', one for every
            `block_size` columns of a row; 'static', one number a linear, found in calibration.
    """

    name: str
    weight: Literal["int2", "int3", "int4", "int8", "fp8"]
    group_size: int | None = None
    block_size: int | None = None
    symmetric: bool = True
    activation: Literal["int8", "fp8"] | None = None
    activation_scale: Literal["token", "group", "static"] | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None and (self.bits == 8 or self.group_size not in GROUP_SIZES):
            raise QuantKitError(
                f"scheme {self.name}: group_size {self.group_size} is not supported; "
                f"schemes of 2 to 4 bits take {', '.join(map(str, GROUP_SIZES))} or 'channel', "
                f"the others have one scale a row"
            )
        if not self.symmetric and self.bits == 8:
            raise QuantKitError(
                f"scheme {self.name}: only schemes of 2 to 4 bits can be asymmetric; leave --asymmetric out"
            )

    @property
    def bits(self) -> int:
        """Of one code. Fewer than 8: integers packed into words, a scale a group, perhaps zeros."""
        return BITS[self.weight]

    @property
    def largest_code(self) -> int:
        """Of the weight. Codes of fewer than 8 bits begin at 0, the others at minus the largest."""
        return LARGEST_CODE[self.weight]

    @property
    def symmetric_zero(self) -> int:
        """The code that stands for 0 in a symmetric scheme of fewer than 8 bits."""
        return 2 ** (self.bits - 1)

    @property
    def label(self) -> str:
        """The scheme in one word, unique: `w4a16-g128`, `w3a16-channel-asym`, `fp8-static`."""
        if self.bits == 8:
            return self.name
        groups = f"g{self.group_size}" if self.group_size else "channel"
        return f"{self.name}-{groups}" + ("" if self.symmetric else "-asym")

    @property
    def op(self) -> str:
        """The kernel family that multiplies by such a weight: a file of `kernels/` and an op `quantkit::<op>`."""
        if self.bits < 8:
            if self.activation:
                return "w4a8"
            return "w4a16" if self.bits == 4 else "wna16"
        if self.block_size:
            return "fp8_block"
        return "w8a8" if self.activation else "w8a16"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


PRESETS = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a16", "int8"),
        Scheme("w8a8", "int8", activation="int8", activation_scale="token"),
        Scheme("w8a8-static", "int8", activation="int8", activation_scale="static"),
        Scheme("w4a16", "int4", group_size=128),
        Scheme("w3a16", "int3", group_size=128),
        Scheme("w2a16", "int2", group_size=128),
        Scheme("w4a8", "int4", group_size=128, activation="int8", activation_scale="token"),
        Scheme("fp8", "fp8", activation="fp8", activation_scale="token"),
        Scheme("fp8-static", "fp8", activation="fp8", activation_scale="static"),
        Scheme("fp8-block", "fp8", block_size=BLOCK, activation="fp8", activation_scale="group"),
        Scheme("fp8-w8a16", "fp8"),
    )
}


def parse_scheme(text: str) -> Scheme:
    """A preset's name (`fp8-block`) or a label (`w4a16-g64`, `w4a16-channel-asym`) -> Scheme.

    Raises:
        QuantKitError: the name is unknown, or the group size is not one that the kernels have.
    """
    if text in PRESETS:
        return PRESETS[text]
    head, *options = text.split("-")
    scheme = PRESETS.get(head)
    if scheme is None or scheme.bits == 8:
        raise QuantKitError(
            f"unknown scheme {text!r}; known: {', '.join(PRESETS)}, and w4a16-g64, w4a16-channel-asym, ..."
        )
    for option in options:
        if option in ("sym", "asym"):
            scheme = replace(scheme, symmetric=option == "sym")
        elif option == "channel":
            scheme = replace(scheme, group_size=None)
        elif option[0:1] == "g" and option[1:].isdecimal():
            scheme = replace(scheme, group_size=int(option[1:]))
        else:
            raise QuantKitError(
                f"scheme {text!r}: unknown part {option!r}; parts are g32, g64, g128, channel, sym, asym"
            )
    return scheme
