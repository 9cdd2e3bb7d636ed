"""Plots from the records. matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from pathlib import Path

from quantkit.eval.records import Record
from quantkit.eval.tables import conditions, grouped, latest


def plot_linears(records: Sequence[Record], path: str | Path) -> None:
    """Speed-up over bfloat16 against M, a panel a shape, a line a scheme; the format follows the suffix of `path`."""
    from matplotlib.figure import Figure

    kept = [r for r in latest(records, "shape", "scheme", "M") if r["us"] is not None]
    shapes = grouped(kept, "shape", "N", "K")
    figure = Figure(figsize=(4 * len(shapes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for panel, ((shape, N, K), group) in zip(panels, shapes.items(), strict=True):
        for (scheme,), line in grouped(sorted(group, key=lambda r: r["M"]), "scheme").items():
            panel.plot(
                [r["M"] for r in line], [r["bf16_us"] / r["us"] for r in line], marker=".", label=scheme
            )
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=f"{shape} (N {N}, K {K})", xlabel="rows of x (M)")
        panel.set_xscale("log", base=2)
    panels[0].set_ylabel("speed-up over bfloat16")
    panels[-1].legend(fontsize="small")
    figure.supxlabel(conditions(kept), fontsize="x-small")
    figure.savefig(path, dpi=150)


def plot_quality(records: Sequence[Record], path: str | Path) -> None:
    """KL from the original against bits a weight, a marker a method, labelled by scheme."""
    from matplotlib.figure import Figure

    kept = [
        r for r in latest(records, "model", "text", "scheme", "method") if r["kl"] and r["bits_per_weight"]
    ]
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for (model, method), group in grouped(kept, "model", "method").items():
        bits, kl = [r["bits_per_weight"] for r in group], [r["kl"] for r in group]
        panel.plot(bits, kl, linestyle="none", marker="o", label=f"{model}, {method}")
        for r in group:
            panel.annotate(r["scheme"], (r["bits_per_weight"], r["kl"]), fontsize="x-small")
    panel.set(xlabel="bits a weight", ylabel="KL(original || quantized), nats", yscale="log")
    panel.legend(fontsize="small")
    figure.supxlabel(conditions(kept), fontsize="x-small")
    figure.savefig(path, dpi=150)
