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
    """KL from the original, a bar a scheme and method, labelled with the bits a weight; a panel a model."""
    from matplotlib.figure import Figure

    kept = [
        r for r in latest(records, "model", "text", "scheme", "method") if r["kl"] and r["bits_per_weight"]
    ]
    models = grouped(kept, "model", "text")
    rows = max(len(group) for group in models.values())
    figure = Figure(figsize=(7 * len(models), 1.5 + 0.28 * rows), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, ((model, text), group) in zip(panels, models.items(), strict=True):
        names = [f"{r['scheme']} {r['method']}" for r in group]
        bars = panel.barh(names, [r["kl"] for r in group])
        panel.bar_label(
            bars, [f"{r['bits_per_weight']:.2f} bits" for r in group], padding=3, fontsize="small"
        )
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set(title=f"{model} on {text}", xlabel="KL(original || quantized), nats", xscale="log")
    figure.supxlabel(conditions(kept), fontsize="x-small")
    figure.savefig(path, dpi=150)
