"""Plots from the records. matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import QuantKitError
from quantkit.eval.records import Record
from quantkit.eval.tables import conditions, grouped, in_series, is_peer, latest

COLUMNS = 2
LEAST_MS = 3  # values of M from which on a curve says something


def plot_linears(records: Sequence[Record], path: str | Path) -> None:
    """Speed-up over bfloat16 against M, a panel a shape, a line a scheme; the format follows the suffix of `path`."""
    from matplotlib.figure import Figure

    ours = [r for r in records if not is_peer(r) and "variant" not in r]
    kept = [r for r in latest(ours, "shape", "scheme", "M") if r["us"] is not None]
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


def plot_times(records: Sequence[Record], path: str | Path, scheme: str = "w4a16-g128") -> None:
    """Microseconds against M for one scheme: its kernels, the peers', bfloat16 and the limit; a panel a shape.

    Raises:
        QuantKitError: no shape has times at `LEAST_MS` values of M.
    """
    from matplotlib.figure import Figure

    of_scheme = [r for r in records if r["scheme"] == scheme]
    kept = sorted(
        latest(in_series(of_scheme), "device", "shape", "N", "K", "series", "M"),
        key=lambda r: (is_peer(r), r["M"]),
    )
    panels_of = {
        key: group
        for key, group in grouped(kept, "device", "shape", "N", "K").items()
        if len({r["M"] for r in group}) >= LEAST_MS
    }
    if not panels_of:
        raise QuantKitError(f"no shape has times of {scheme} at {LEAST_MS} values of M")
    shown = [r for group in panels_of.values() for r in group]
    names = ["limit", "bfloat16", *dict.fromkeys(r["series"] for r in shown)]
    styles = ["k--", *(f"C{i}.-" for i in range(len(names) - 1))]  # a line looks the same in every panel
    rows = -(-len(panels_of) // COLUMNS)
    figure = Figure(figsize=(10, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    drawn = {}
    for panel, ((device, shape, N, K), group) in zip(panels, panels_of.items(), strict=False):
        curves = curves_of(group)
        for name, style in zip(names, styles, strict=True):
            if points := sorted(curves.get(name, {}).items()):
                (drawn[name],) = panel.loglog(*zip(*points, strict=True), style, linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{shape} (N {N}, K {K})\n{device}", fontsize="medium")
        panel.set(xlabel="rows of x (M)", ylabel="us")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
    for panel in panels[len(panels_of) :]:
        panel.set_axis_off()
    order = [name for name in names if name in drawn]
    figure.legend([drawn[name] for name in order], order, loc="outside right upper", fontsize="small")
    figure.supxlabel(conditions(shown, "library"), fontsize="x-small")
    figure.savefig(path, dpi=150)


def curves_of(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Microseconds by M of each line of one panel; what was not timed is left out."""
    curves: dict[str, dict[int, float]] = {}
    for r in records:
        for name, us in (("limit", r["limit_us"]), ("bfloat16", r["bf16_us"]), (r["series"], r["us"])):
            if us is not None:
                curves.setdefault(name, {})[r["M"]] = us
    return curves


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
