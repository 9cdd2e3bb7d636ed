"""What a run did to every linear, what it cost, and what to think of it: `quantkit_report.json`.

The same run gives the same bytes of every file of a checkpoint but two: `quantkit_timings.json` and
`report.html`. So whatever depends on the clock or on what else the machine does is kept in `Timings`, and
a `Report` holds neither times nor dates.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from quantkit.checkpoint import read_json
from quantkit.errors import QuantKitError

REPORT = "quantkit_report.json"
TIMINGS = "quantkit_timings.json"
CARD = "README.md"
HTML = "report.html"
REPORT_VERSION = 1
DIGITS = 6  # significant ones of a figure on disk

Severity = Literal["ok", "warning", "alarm"]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class ModuleReport:
    """One packed linear. None: not measured.

    Attributes:
        name, N, K: of the linear; its weight is [N, K].
        scheme, method: the scheme's label, and what was done (which may not be what was asked: see `remark`).
        bits: of codes, scales and zeros for one weight.
        error: relative, of the output over the calibration tokens or of the weight, as `error_of` says.
        error_of: 'output' or 'weight', see FORMAT.md.
        error_rtn: the same error for plain rounding to nearest on the grid of the largest absolute value.
        damp_percent: added to the Hessian's diagonal, in units of its mean.
        clip: mean over the groups of what the grid's range was shrunk to; 1: not at all.
        tokens: calibration tokens that reached it.
        weight_min, weight_max: of the original weight.
        input_absmax: the largest |x| among the calibration tokens.
        bad_scales: stored scales that are zero or not finite.
        remark: where the run had something to say.
        channel_scales: x is multiplied by scales of its channels, which are stored beside the weight.
    """

    name: str
    N: int
    K: int
    scheme: str
    method: str
    bits: float
    error: float
    error_of: str
    error_rtn: float | None = None
    damp_percent: float | None = None
    clip: float | None = None
    tokens: int | None = None
    weight_min: float | None = None
    weight_max: float | None = None
    input_absmax: float | None = None
    bad_scales: int = 0
    remark: str = ""
    channel_scales: bool = False

    @property
    def weight_absmax(self) -> float | None:
        if self.weight_min is None or self.weight_max is None:
            return None
        return max(abs(self.weight_min), abs(self.weight_max))


@dataclass(frozen=True)
class BlockReport:
    """`drift`: |h_quantized - h| / |h| of the hidden states after decoder block `index`, over the held-out text."""

    index: int
    drift: float


@dataclass(frozen=True)
class HeldOut:
    """The quantized model against the original on text that it was not calibrated on.

    Attributes:
        source: what the text is.
        windows, window: how many windows of how many tokens; each is read alone.
        perplexity, reference_perplexity: of the quantized model and of the original.
        kl: mean over all windows * window positions of KL(p_original || p_quantized), nats.
        top1: share of those positions where both rank the same token first.
        kl_by_position: mean over the windows, in equal runs of positions, at most 64 of them.
    """

    source: str
    windows: int
    window: int
    perplexity: float
    reference_perplexity: float
    kl: float
    top1: float
    kl_by_position: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        return self.perplexity / self.reference_perplexity


@dataclass(frozen=True)
class Sample:
    """What both models write after a prompt, greedily."""

    prompt: str
    original: str
    quantized: str


@dataclass(frozen=True)
class Finding:
    """One sentence about one thing that was looked at."""

    severity: Severity
    subject: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """The worst severity found, one sentence, and what was looked at."""

    severity: Severity
    sentence: str
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        model: the original's name on the hub, or its folder's.
        on_hub: whether that name is one of the hub.
        architecture: class of the model.
        license: as the original's README.md names it.
        schemes: label -> scheme, as in config.json.
        recipe, calibration: as in config.json.
        versions: package -> version.
        device: what computed.
        source_bytes, packed_bytes: of all tensors, before and after.
        samples_skipped: why there are no samples.
    """

    model: str
    on_hub: bool
    architecture: str
    schemes: dict[str, dict[str, Any]]
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    versions: dict[str, str]
    device: str
    source_bytes: int
    packed_bytes: int
    modules: tuple[ModuleReport, ...]
    license: str | None = None
    blocks: tuple[BlockReport, ...] = ()
    held_out: HeldOut | None = None
    samples: tuple[Sample, ...] = ()
    samples_skipped: str = ""
    verdict: Verdict | None = None

    @property
    def bits_per_weight(self) -> float:
        weights = sum(module.N * module.K for module in self.modules)
        return sum(module.bits * module.N * module.K for module in self.modules) / weights

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(module.method for module in self.modules))

    @property
    def scheme_labels(self) -> list[str]:
        return list(dict.fromkeys(module.scheme for module in self.modules))


@dataclass(frozen=True)
class BlockTiming:
    """Seconds of one decoder block, and the device's peak of allocated bytes; None on a CPU."""

    index: int
    seconds: float
    device_peak_bytes: int | None = None


@dataclass(frozen=True)
class Timings:
    """What differs between two runs of one job.

    Attributes:
        seconds: of the whole run.
        process_peak_bytes: the largest resident memory of the process; None where the system does not say.
        blocks: those that this run worked on, and not one before it that was broken off.
        modules: seconds by name.
    """

    seconds: float
    process_peak_bytes: int | None = None
    blocks: tuple[BlockTiming, ...] = ()
    modules: dict[str, float] = field(default_factory=dict)


def report_json(report: Report | Timings) -> str:
    """The report as JSON: floats with `DIGITS` digits, null for one that is not finite."""
    content = {"report_version": REPORT_VERSION, **asdict(report)}
    return json.dumps(rounded(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def read_report(folder: Path) -> Report | None:
    """The report of a checkpoint; None if it has none.

    Raises:
        QuantKitError: it cannot be read, or is of a newer quantkit.
    """
    path = folder / REPORT
    if not path.exists():
        return None
    content = read_json(path)
    if (found := content.pop("report_version", None)) != REPORT_VERSION:
        raise QuantKitError(
            f"{path}: report_version {found}, this quantkit reads {REPORT_VERSION}; "
            "install a newer quantkit, or delete the file"
        )
    try:
        verdict = content.pop("verdict")
        findings = tuple(Finding(**finding) for finding in verdict.pop("findings")) if verdict else ()
        many: dict[str, Callable[..., Any]] = {
            "modules": ModuleReport,
            "blocks": BlockReport,
            "samples": Sample,
        }
        for name, kind in many.items():
            content[name] = tuple(kind(**entry) for entry in content[name])
        held_out = content.pop("held_out")
        return Report(
            **content,
            held_out=HeldOut(**{**held_out, "kl_by_position": tuple(held_out["kl_by_position"])})
            if held_out
            else None,
            verdict=Verdict(**verdict, findings=findings) if verdict else None,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise QuantKitError(f"{path}: cannot be read ({error!r}); copy it again, or delete it") from error
