"""A run judged by its own figures: what is as it should be, what is not, and a verdict in words.

Every limit below says where it comes from. They are limits of the ordinary, not of the possible: what lies
outside deserves a look before it is served. A figure that was not measured is not judged.
"""

import math
from collections.abc import Iterable
from statistics import median

from quantkit.report import Finding, HeldOut, ModuleReport, Report, Sample, Severity, Verdict

# Relative error of a weight rounded to nearest, with normally distributed weights: the step of the grid over
# sqrt(12). The step is the largest of a group over the codes on one side: 128 normal values reach 2.8 sigma and
# 4096 reach 3.8, so int8 by rows has 3.8 / 127 / sqrt(12) = 0.009 and int4 by 128 has 2.8 / 7.5 / sqrt(12) = 0.108;
# e4m3's step is 1/8 of its binade: 0.026. (quantkit on lm-7m and lm-27m: 0.007, 0.11 and 0.026.) The error of
# the output is about the same for rounding to nearest, and lower for the methods that minimise it.
NORMAL_ERROR = {"int8": 0.009, "fp8": 0.026, "int4": 0.108, "int3": 0.23, "int2": 0.54}
# Real weights have heavier tails than normal ones, rows more so than groups of 128.
TAILS = 2.5
# An error that its siblings (the same linear in the other blocks) do not have.
STANDS_OUT = 3.0
SIBLINGS = 4  # fewer have no median to speak of
# GPTQ and AWQ minimise the error that they are measured by; the slack is for figures of four digits and for
# errors near nothing.
NOT_WORSE, NOTHING = 1.02, 1e-3

# KL(original || quantized) in nats a token, by (weight, activation). Measured: docs/benchmarks/quality.jsonl (lm-27m on WikiText-2)
# and demo.jsonl (lm-7m). int8 0.0007 to 0.0009; int8 with int8 activations 0.003, and 0.03 where activations
# have outliers that SmoothQuant evens out; fp8 0.009 to 0.023; int4 by GPTQ and AWQ 0.03 to 0.08, and 0.15
# where outliers make it hard; int3 by GPTQ 0.18 to 0.22. The limits leave room for two to three times that.
TYPICAL_KL = {
    ("int8", None): 0.005,
    ("int8", "int8"): 0.05,
    ("fp8", None): 0.05,
    ("fp8", "fp8"): 0.05,
    ("int4", None): 0.15,
    ("int3", None): 0.6,
    ("int2", None): 2.0,  # not measured here: a model that lost much of what it knew
}
ALARMING = 3.0  # times the typical KL: int4 without a method, or on outliers that it cannot take
# log(perplexity / original's) is what KL would be if the original had written the text, so it has KL's limit;
# on a few thousand tokens of another text it wavers by this much beside.
PERPLEXITY_NOISE = 0.02
# |h_quantized - h| / |h|: at 1 the block's output says nothing of the original's.
DRIFT_WARNING, DRIFT_ALARM = 0.5, 1.0
# Of runs of so many characters in a text; prose has hardly one twice, a loop few that are different.
REPEAT_LENGTH, LEAST_DISTINCT = 10, 0.5

RANK: dict[Severity, int] = {"ok": 0, "warning": 1, "alarm": 2}
NAMED = 3  # modules that a finding names; the report has them all


def judge(report: Report) -> Verdict:
    """Everything that was looked at, the worst of it as the verdict."""
    findings = [
        *judge_scales(report.modules),
        *judge_errors(report),
        *judge_blocks(report),
        *(judge_held_out(report.held_out, typical_kl(report)) if report.held_out else []),
        *judge_samples(report.samples, report.samples_skipped),
    ]
    severity = max((finding.severity for finding in findings), key=RANK.__getitem__)
    return Verdict(severity, sentence(report, severity, findings), tuple(findings))


def sentence(report: Report, severity: Severity, findings: list[Finding]) -> str:
    what = f"{' + '.join(report.scheme_labels)} at {report.bits_per_weight:.2f} bits a weight"
    if severity != "ok":
        worst = [finding for finding in findings if finding.severity == severity]
        opening = "Look before you use it" if severity == "warning" else "Out of the ordinary"
        more = f" (and {len(worst) - 1} more)" if len(worst) > 1 else ""
        return f"{opening}: {worst[0].text}{more}."
    if report.held_out is None:
        return f"As it should be: {what}; errors of all {len(report.modules)} linears are ordinary; held-out text was not compared."
    held = report.held_out
    return (
        f"As it should be: {what} is {held.kl:.4f} nats from the original on text that it was not calibrated on, "
        f"perplexity {held.perplexity:.2f} after {held.reference_perplexity:.2f}."
    )


def judge_scales(modules: Iterable[ModuleReport]) -> list[Finding]:
    bad = [module for module in modules if module.bad_scales]
    if not bad:
        return [Finding("ok", "scales", "all scales are finite and not zero")]
    worst = max(bad, key=lambda module: module.bad_scales)
    return [
        Finding(
            "alarm",
            "scales",
            f"{worst.bad_scales} scales of {worst.name} are zero or not finite"
            + (f", nor some of {len(bad) - 1} other linears" if len(bad) > 1 else ""),
        )
    ]


def judge_errors(report: Report) -> list[Finding]:
    """Each module's error: a number at all, within what its scheme reaches, no worse than rounding, like its siblings."""
    modules = report.modules
    broken = [module for module in modules if not module.error < 1]  # and so is nan
    if broken:
        return [Finding("alarm", "errors", f"the error is as large as the signal in {named(broken)}")]
    found = []
    large = [
        module
        for module in modules
        if module.error > TAILS * NORMAL_ERROR.get(report.schemes[module.scheme]["weight"], math.inf)
    ]
    if large:
        limits = sorted({TAILS * NORMAL_ERROR[report.schemes[module.scheme]["weight"]] for module in large})
        said = " or ".join(f"{limit:.1%}" for limit in limits)
        found.append(Finding("warning", "errors", f"errors above the ordinary {said} in {named(large)}"))
    worse = [
        module
        for module in modules
        if module.error_rtn is not None and module.error > max(NOT_WORSE * module.error_rtn, NOTHING)
    ]
    if worse:
        worse.sort(key=lambda module: module.error_rtn / module.error if module.error_rtn else 0)
        found.append(
            Finding("warning", "errors", f"a larger error than plain rounding would have in {named(worse)}")
        )
    siblings: dict[tuple[str, str, str, str], list[ModuleReport]] = {}
    for module in modules:
        key = (kind_of(module.name), module.scheme, module.method, module.error_of)
        siblings.setdefault(key, []).append(module)
    apart = []
    for group in siblings.values():
        middle = median(module.error for module in group)
        if len(group) >= SIBLINGS:
            apart += [m for m in group if m.error > max(STANDS_OUT * middle, NOTHING)]
    if apart:
        apart.sort(key=lambda module: -module.error)
        text = f"more than {STANDS_OUT:g} times the error of the same linear in other blocks: {named(apart)}"
        found.append(Finding("warning", "errors", text))
    if not found:
        worst = max(modules, key=lambda module: module.error)
        text = f"errors of all {len(modules)} linears are ordinary, the largest {named([worst])}"
        found.append(Finding("ok", "errors", text))
    return found


def named(modules: list[ModuleReport]) -> str:
    first = ", ".join(f"{module.name} ({module.error:.2%})" for module in modules[:NAMED])
    return first + (f" and {len(modules) - NAMED} more" if len(modules) > NAMED else "")


def kind_of(name: str) -> str:
    """A module's name without its numbers: what it is, in whatever block (or expert)."""
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def judge_blocks(report: Report) -> list[Finding]:
    if not report.blocks:
        return []
    worst = max(report.blocks, key=lambda block: math.inf if math.isnan(block.drift) else block.drift)
    severity: Severity = "ok"
    if not worst.drift < DRIFT_WARNING:
        severity = "warning" if worst.drift < DRIFT_ALARM else "alarm"
    text = f"hidden states differ from the original's by at most {worst.drift:.1%}, after block {worst.index}"
    return [Finding(severity, "drift", text)]


def typical_kl(report: Report) -> float:
    """The limit for the schemes at hand: KL adds up over modules to first order, so theirs are averaged by weights.

    An unknown scheme has the limit of int4, as most formats of about four bits.
    """
    total = sum(module.N * module.K for module in report.modules)
    limit = 0.0
    for module in report.modules:
        scheme = report.schemes[module.scheme]
        weight, activation = scheme["weight"], scheme["activation"]
        one = TYPICAL_KL.get((weight, activation), TYPICAL_KL.get((weight, None), TYPICAL_KL["int4", None]))
        limit += one * module.N * module.K / total
    return limit


def judge_held_out(held: HeldOut, limit: float) -> list[Finding]:
    if not (math.isfinite(held.kl) and math.isfinite(held.perplexity)):
        return [Finding("alarm", "KL", "the model gives logits that are not finite on the held-out text")]
    return [
        Finding(
            grade(held.kl, limit, ALARMING * limit),
            "KL",
            f"KL divergence {held.kl:.4f} nats a token on held-out text, {compared(held.kl, limit)} for its bits",
        ),
        Finding(
            grade(math.log(held.ratio), limit + PERPLEXITY_NOISE, ALARMING * limit + PERPLEXITY_NOISE),
            "perplexity",
            f"perplexity {held.perplexity:.2f} on held-out text where the original has {held.reference_perplexity:.2f} "
            f"({held.ratio - 1:+.1%})",
        ),
    ]


def grade(value: float, typical: float, alarming: float) -> Severity:
    if value <= typical:
        return "ok"
    return "warning" if value <= alarming else "alarm"


def compared(value: float, limit: float) -> str:
    if value <= limit:
        return f"within the {limit:.3g} that is typical"
    return f"{value / limit:.1f} times the {limit:.3g} that is typical"


def judge_samples(samples: tuple[Sample, ...], skipped: str) -> list[Finding]:
    if not samples:
        return [Finding("ok", "sample", f"no text was generated: {skipped}")] if skipped else []
    for sample in samples:
        if not sample.quantized.strip() and sample.original.strip():
            return [Finding("alarm", "sample", f"it writes nothing after {sample.prompt!r}")]
    looping = [sample for sample in samples if loops(sample.quantized) and not loops(sample.original)]
    if looping:
        text = f"it repeats itself after {looping[0].prompt!r}, where the original does not"
        # one loop of a greedy model is chance, all of them are not
        severity: Severity = "alarm" if len(looping) == len(samples) > 1 else "warning"
        return [Finding(severity, "sample", text)]
    if any(loops(sample.quantized) for sample in samples):
        return [Finding("ok", "sample", "it repeats itself where the original does too")]
    return [Finding("ok", "sample", "the generated samples are neither empty nor in a loop")]


def loops(text: str) -> bool:
    """Whether a text says the same over and over: few of its runs of characters are different ones."""
    text = " ".join(text.split())
    runs = [text[i : i + REPEAT_LENGTH] for i in range(len(text) - REPEAT_LENGTH + 1)]
    return bool(runs) and len(set(runs)) < LEAST_DISTINCT * len(runs)
