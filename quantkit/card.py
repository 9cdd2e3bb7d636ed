"""README.md of a quantized checkpoint: a model card in Hugging Face's form, made from the report."""

from pathlib import Path

import yaml

from quantkit.method import describe
from quantkit.report import HTML, REPORT, Report

# Where the hub's file listing and search look for what a checkpoint holds.
BITS_TAGS = {"int8": "8-bit", "fp8": "fp8", "int4": "4-bit", "int3": "3-bit", "int2": "2-bit"}

USE = """```python
import quantkit  # teaches transformers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```

This runs the packed weights on CUDA, ROCm and CPU. Without `import quantkit` loading stops with a shape mismatch.
`quantkit inspect` shows which kernel runs at which batch, `quantkit verify` compares every tensor with its checksum."""


def model_card(report: Report) -> str:
    """The card of a report that was judged; it does not know the directory's name, which may change."""
    folder = f"{Path(report.model).name}-{report.scheme_labels[0]}"
    calibration = report.calibration
    data = "none: this needs no text"
    if calibration:
        source = (
            "text that the model itself wrote"
            if calibration["source"] == "self"
            else Path(calibration["source"]).name
        )
        data = f"{calibration['samples']} x {calibration['seq_len']} tokens of {source}, seed {calibration['seed']}"
    methods = ", ".join(describe(method) for method in report.methods)
    origin = f"[{report.model}](https://huggingface.co/{report.model})" if report.on_hub else report.model
    verdict = report.verdict
    assert verdict is not None, "a card is written of a report that was judged"
    lines = [
        f"# {Path(report.model).name}, {' + '.join(report.scheme_labels)}",
        "",
        f"{origin} quantized by QuantKit {report.versions['quantkit']}: {len(report.modules)} linears of "
        f"{report.architecture} packed to {report.bits_per_weight:.2f} bits a weight, the rest as it was.",
        "",
        f"> {verdict.sentence}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {cell(value)} |" for name, value in figures(report, methods, data)),
        "",
        "## Use",
        "",
        USE.format(folder=folder),
        "",
        "## What was looked at",
        "",
        *(f"- {finding.severity}: {finding.text}" for finding in verdict.findings),
        "",
    ]
    for sample in report.samples:
        lines += [
            f"**{cell(sample.prompt)}** ...",
            "",
            f"- original: {cell(sample.original)}",
            f"- quantized: {cell(sample.quantized)}",
            "",
        ]
    lines.append(f"`{REPORT}` has the figures of every linear, `{HTML}` shows them.")
    return front_matter(report) + "\n" + "\n".join(lines) + "\n"


def front_matter(report: Report) -> str:
    weights = dict.fromkeys(str(report.schemes[label]["weight"]) for label in report.scheme_labels)
    tags = [
        "quantkit",
        *(BITS_TAGS.get(weight, weight) for weight in weights),
        *report.scheme_labels,
        *report.methods,
    ]
    content: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if report.on_hub:  # a folder's name would be taken for a model of the hub
        content |= {"base_model": report.model, "base_model_relation": "quantized"}
    if report.license:
        content["license"] = report.license
    content["tags"] = list(dict.fromkeys(tags))
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def figures(report: Report, methods: str, data: str) -> list[tuple[str, str]]:
    rows = [
        ("weights", f"{megabytes(report.source_bytes)} before, {megabytes(report.packed_bytes)} after"),
        ("scheme", ", ".join(report.scheme_labels)),
        ("method", methods),
        ("calibrated on", data),
    ]
    if held := report.held_out:
        rows += [
            ("compared on", f"{held.windows} x {held.window} tokens of {held.source}"),
            ("KL from the original", f"{held.kl:.4f} nats a token"),
            (
                "perplexity",
                f"{held.perplexity:.3f}, the original's {held.reference_perplexity:.3f} ({held.ratio - 1:+.2%})",
            ),
            ("same likeliest token", f"{held.top1:.1%}"),
        ]
    rows.append(("made with", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return rows


def license_of(folder: Path) -> str | None:
    """What the front matter of a model directory's README.md gives as its license; None if it gives none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        content = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    found = content.get("license") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def one_line(text: str) -> str:
    return " ".join(text.split())


def cell(text: str) -> str:
    """Text that breaks neither a table nor a list, and that markdown does not take for markup."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~!" else c for c in one_line(text))


def megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
