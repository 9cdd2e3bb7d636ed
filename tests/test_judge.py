"""A run that went well is called so, and each way in which it may not is seen and named."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.judge import ALARMING, judge, loops, typical_kl
from quantkit.report import BlockReport, Finding, HeldOut, ModuleReport, Report, Sample
from quantkit.scheme import parse_scheme

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
PROSE = (
    "the long road to the sea went by a mill, and the miller's daughter sold bread to whoever came along it."
)
LOOP = "the door was closed, and the door was closed, and the door was closed, and the door was closed, and"


def module(name: str, scheme: str = "w4a16-g128", **changes) -> ModuleReport:
    known = dict(method="gptq", bits=4.125, error=0.06, error_of="output", error_rtn=0.11)
    return ModuleReport(name, 64, 128, scheme, **{**known, **changes})


def held_out(kl: float, ratio: float = 1.02) -> HeldOut:
    return HeldOut("a text", 4, 512, 20 * ratio, 20.0, kl, 0.9)


def report(**changes) -> Report:
    names = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(6) for kind in ("up", "down")]
    known = dict(
        model="lm",
        on_hub=False,
        architecture="LlamaForCausalLM",
        schemes={s: parse_scheme(s).to_dict() for s in ("w4a16-g128", "w8a16", "w8a8", "fp8", "fp8-w8a16")},
        recipe={},
        calibration=None,
        versions={"quantkit": "0"},
        device="cpu",
        source_bytes=2,
        packed_bytes=1,
        modules=tuple(module(name) for name in names),
        held_out=held_out(0.05),
        blocks=(BlockReport(0, 0.01), BlockReport(1, 0.05)),
        samples=(Sample("Once", PROSE, PROSE[1:]),),
    )
    return Report(**{**known, **changes})


def with_module(**changes) -> Report:
    whole = report()
    return replace(whole, modules=(*whole.modules[:-1], replace(whole.modules[-1], **changes)))


def test_a_run_that_went_well_is_called_so():
    verdict = judge(report())
    assert verdict.severity == "ok"
    assert verdict.sentence.startswith("As it should be: w4a16-g128 at 4.12 bits a weight is 0.0500 nats")
    assert {finding.severity for finding in verdict.findings} == {"ok"}
    subjects = [finding.subject for finding in verdict.findings]
    assert subjects == ["scales", "errors", "drift", "KL", "perplexity", "sample"]


def test_what_was_not_measured_is_not_judged():
    bare = replace(
        report(),
        held_out=None,
        blocks=(),
        samples=(),
        modules=tuple(module(f"layers.{i}.up", error_rtn=None) for i in range(3)),
    )
    verdict = judge(bare)
    assert verdict.severity == "ok"
    assert [finding.subject for finding in verdict.findings] == ["scales", "errors"]
    assert "held-out text was not compared" in verdict.sentence
    assert judge(replace(bare, samples_skipped="no tokenizer")).findings[-1] == Finding(
        "ok", "sample", "no text was generated: no tokenizer"
    )


LAST = "model.layers.5.mlp.down_proj"


@pytest.mark.parametrize(
    ("faulty", "severity", "words"),
    [
        (with_module(bad_scales=3), "alarm", ("3 scales", LAST, "zero or not finite")),
        (with_module(error=math.nan), "alarm", ("as large as the signal", LAST)),
        (with_module(error=1.3, error_rtn=2.0), "alarm", ("as large as the signal", LAST)),
        (with_module(error=0.4, error_rtn=0.5), "warning", ("above the ordinary 27.0%", LAST, "40.00%")),
        (with_module(error=0.12, error_rtn=0.1), "warning", ("than plain rounding", LAST)),
        (with_module(error=0.19, error_rtn=0.3), "warning", ("3 times", "other blocks", LAST)),
        (report(blocks=(BlockReport(0, 0.1), BlockReport(1, 0.6))), "warning", ("60.0%", "block 1")),
        (report(blocks=(BlockReport(0, math.nan), BlockReport(1, 0.6))), "alarm", ("block 0",)),
        (report(held_out=held_out(0.2)), "warning", ("0.2000 nats", "1.3 times the 0.15")),
        (report(held_out=held_out(0.9)), "alarm", ("0.9000 nats", "6.0 times the 0.15")),
        (report(held_out=held_out(math.inf)), "alarm", ("not finite",)),
        (report(held_out=held_out(0.1, math.inf)), "alarm", ("not finite",)),
        (report(held_out=held_out(0.1, 1.3)), "warning", ("perplexity 26.00", "+30.0%")),
        (report(held_out=held_out(0.1, 2.0)), "alarm", ("perplexity 40.00",)),
        (report(samples=(Sample("Once", PROSE, " \n"),)), "alarm", ("writes nothing", "'Once'")),
        (report(samples=(Sample("Once", PROSE, LOOP),)), "warning", ("repeats itself", "'Once'")),
        (report(samples=(Sample("Once", PROSE, LOOP),) * 2), "alarm", ("repeats itself",)),
    ],
)  # fmt: skip
def test_each_fault_is_seen_and_named(faulty, severity, words):
    verdict = judge(faulty)
    assert verdict.severity == severity
    assert any(
        finding.severity == severity and all(word in finding.text for word in words)
        for finding in verdict.findings
    ), verdict.findings
    assert verdict.sentence.startswith(
        {"warning": "Look before you use it: ", "alarm": "Out of the ordinary: "}[severity]
    )


def test_errors_near_nothing_are_not_compared():
    tiny = [module(f"layers.{i}.up", error=1e-5, error_rtn=1e-6) for i in range(5)]
    assert judge(report(modules=(*tiny, module("layers.5.up", error=9e-4, error_rtn=1e-4)))).severity == "ok"


def test_a_loop_of_the_original_is_not_held_against_the_copy():
    assert judge(report(samples=(Sample("Once", LOOP, LOOP),))).severity == "ok"
    assert loops(LOOP)
    assert loops("haha" * 20)
    assert not loops(PROSE)
    assert not loops("")
    assert not loops("short")


def test_the_limit_of_a_mix_is_the_mean_over_its_weights():
    eight, four = module("layers.0.up", "w8a16"), module("layers.0.down")
    assert typical_kl(report(modules=(eight,))) == 0.005
    assert typical_kl(report(modules=(eight, eight, four))) == pytest.approx((2 * 0.005 + 0.15) / 3)
    assert typical_kl(report(modules=(module("up", "fp8"), module("up", "fp8-w8a16")))) == pytest.approx(0.05)


@pytest.mark.parametrize("file", ["quality.jsonl", "demo.jsonl"])
def test_what_was_measured_is_typical_except_rounding_to_four_bits(file):
    seen = 0
    for line in (BENCHMARKS / file).read_text().splitlines():
        record = json.loads(line)
        if not record["method"]:
            continue
        seen += 1
        scheme = record["scheme"]
        made = report(
            schemes={scheme: parse_scheme(scheme).to_dict()},
            modules=(module("up", scheme, error=1e-3),),
            held_out=held_out(record["kl"], record["ratio"]),
        )
        rounded_to_four_bits = scheme.startswith("w4") and record["method"] == "rtn"
        assert judge(made).severity == ("warning" if rounded_to_four_bits else "ok"), record
        assert record["kl"] < ALARMING * typical_kl(made)
    assert seen >= 12
