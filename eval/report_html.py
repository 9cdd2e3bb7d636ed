"""report.html: a run's figures, plots and samples in one file that needs no other.

Plots are SVG in the page. matplotlib draws them in placeholder colours, which become variables of the style
sheet: so they follow the reader's light or dark setting. The same report gives the same bytes.
"""

import io
import math
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from quantkit.card import megabytes
from quantkit.judge import kind_of
from quantkit.report import ModuleReport, Report, Timings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#010203", "#010204"
SERIES = tuple(f"#01020{digit:x}" for digit in range(5, 13))
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)"} | {
    color: f"var(--s{i})" for i, color in enumerate(SERIES, 1)
}
STYLE: Any = {  # matplotlib's stubs name every key
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
}
WIDTH = 4.6  # inches: small, so that a phone need not shrink the letters much
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

CSS = """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#5b6472;--faint:#e2e5ea;--page:#f6f7f9;--card:#fff;
--ok:#1a7f45;--warning:#a86400;--alarm:#c22b2b;
--s1:#2563b8;--s2:#d3690b;--s3:#21854b;--s4:#b8368f;--s5:#7a5ad0;--s6:#0d8797;--s7:#8f6b14;--s8:#b3363d}
@media (prefers-color-scheme:dark){:root{--ink:#e7eaf0;--soft:#9aa4b3;--faint:#353c48;--page:#14171d;--card:#1d2129;
--ok:#55c686;--warning:#e8a93f;--alarm:#ff7a70;
--s1:#74a9f5;--s2:#f39a4b;--s3:#63cb8f;--s4:#ee86cc;--s5:#b39cfa;--s6:#4fcbda;--s7:#d9b455;--s8:#f58a8f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:68rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2rem 0 .6rem}
p{margin:.3rem 0}
.soft,figcaption,th,dt{color:var(--soft)}
section>.soft{max-width:46rem}
.verdict{background:var(--card);border-left:6px solid var(--c);border-radius:6px;padding:.8rem 1rem;margin:1rem 0;overflow-wrap:anywhere}
.verdict strong{color:var(--c);text-transform:uppercase;font-size:.8rem;letter-spacing:.06em}
.ok{--c:var(--ok)}.warning{--c:var(--warning)}.alarm{--c:var(--alarm)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem}
.tiles div,figure,.sample,.scroll{background:var(--card);border-radius:6px;padding:.7rem .9rem}
.tiles dt{font-size:.8rem}.tiles dl,dl.tiles,dd{margin:0}
.tiles dd{font-size:1.25rem;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:.8rem;align-items:start}
figure{margin:0}figure svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{font-size:.85rem}figcaption b{color:var(--ink);display:block;font-size:.95rem}
ul.findings{list-style:none;padding:0;margin:0}
ul.findings li{padding:.25rem 0 .25rem 1.1rem;position:relative;overflow-wrap:anywhere}
ul.findings li::before{content:"";position:absolute;left:0;top:.75rem;width:.6rem;height:.6rem;border-radius:50%;background:var(--c)}
.sample{margin-bottom:.8rem;overflow-wrap:anywhere}
.sample div{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:1rem;margin-top:.5rem}
.sample span{color:var(--soft);font-size:.8rem;display:block}q{white-space:pre-wrap;quotes:none}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem .2rem 0;text-align:right;white-space:nowrap}
th:first-child,td:first-child,td.left{text-align:left}
tbody tr{border-top:1px solid var(--faint)}
summary{cursor:pointer;padding:.4rem 0}
"""


def report_html(report: Report, timings: Timings) -> str:
    """The page of a report that was judged."""
    verdict = report.verdict
    assert verdict is not None, "a page is made of a report that was judged"
    title = f"{report.model}, {' + '.join(report.scheme_labels)}"
    words = {"ok": "as it should be", "warning": "look at it", "alarm": "out of the ordinary"}
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(report.architecture)}, quantized by QuantKit {escape(report.versions["quantkit"])}</p>',
        f'<div class="verdict {verdict.severity}"><strong>{words[verdict.severity]}</strong>'
        f"<p>{escape(verdict.sentence)}</p></div>",
        tiles(report, timings),
        section(
            "What was looked at",
            '<ul class="findings">'
            + "".join(f'<li class="{f.severity}">{escape(f.text)}</li>' for f in verdict.findings)
            + "</ul>",
        ),
        section("Figures", f'<div class="plots">{"".join(plots(report, timings))}</div>'),
        samples(report),
        section("Every linear", module_table(report, timings)),
        section("How it was made", conditions(report, timings)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # the page has text in it that a model wrote: whatever that is, nothing is run or fetched
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def tiles(report: Report, timings: Timings) -> str:
    worst = max(report.modules, key=lambda module: module.error)
    shown = [
        ("bits a weight", f"{report.bits_per_weight:.2f}"),
        ("weights", f"{megabytes(report.source_bytes)} → {megabytes(report.packed_bytes)}"),
        ("largest error of a linear", f"{worst.error:.2%}"),
    ]
    if held := report.held_out:
        shown += [
            ("KL from the original", f"{held.kl:.4f}"),
            ("perplexity", f"{held.reference_perplexity:.2f} → {held.perplexity:.2f}"),
            ("same likeliest token", f"{held.top1:.1%}"),
        ]
    shown.append(("time", f"{timings.seconds:.0f} s"))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in shown)
    return f'<dl class="tiles">{cells}</dl>'


def samples(report: Report) -> str:
    if not report.samples:
        return ""
    cards = [
        f'<div class="sample"><b>{escape(sample.prompt)} …</b><div>'
        f"<p><span>original</span><q>{escape(sample.original.strip())}</q></p>"
        f"<p><span>quantized</span><q>{escape(sample.quantized.strip())}</q></p>"
        "</div></div>"
        for sample in report.samples
    ]
    return section("What both write", "".join(cards))


def module_table(report: Report, timings: Timings) -> str:
    columns: list[tuple[str, Callable[[ModuleReport], str]]] = [
        ("linear", lambda m: m.name),
        ("N", lambda m: str(m.N)),
        ("K", lambda m: str(m.K)),
        ("scheme", lambda m: m.scheme),
        ("method", lambda m: m.method),
        ("bits", lambda m: f"{m.bits:.2f}"),
        ("error", lambda m: f"{m.error:.2%}"),
        ("of the", lambda m: m.error_of),
        ("nearest", lambda m: shown(m.error_rtn, ".2%")),
        ("damping", lambda m: shown(m.damp_percent, "g")),
        ("range kept", lambda m: shown(m.clip, ".3f")),
        ("tokens", lambda m: shown(m.tokens, "d")),
        ("max |w|", lambda m: shown(m.weight_absmax, ".3g")),
        ("max |x|", lambda m: shown(m.input_absmax, ".3g")),
        ("seconds", lambda m: shown(timings.modules.get(m.name), ".2f")),
        ("remark", lambda m: m.remark),
    ]
    cells = [(name, [text(module) for module in report.modules]) for name, text in columns]
    kept = [(name, column) for name, column in cells if any(column)]
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in kept)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>"
        for row in zip(*(column for _, column in kept), strict=True)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<details><summary>{len(report.modules)} linears</summary><div class="scroll">{table}</div></details>'


def shown(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def conditions(report: Report, timings: Timings) -> str:
    rows = [(name, version) for name, version in report.versions.items()]
    rows.append(("device", report.device))
    if calibration := report.calibration:
        rows += [(f"calibration {name}", str(value)) for name, value in calibration.items()]
    if held := report.held_out:
        rows.append(("compared on", f"{held.windows} windows of {held.window} tokens of {held.source}"))
    rows += [(f"recipe {name}", str(value)) for name, value in report.recipe.items() if name != "calibration"]
    if timings.process_peak_bytes:
        rows.append(("peak memory of the process", megabytes(timings.process_peak_bytes)))
    cells = "".join(
        f'<tr><td>{escape(name)}</td><td class="left">{escape(value)}</td></tr>' for name, value in rows
    )
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'


# plots


def plots(report: Report, timings: Timings) -> list[str]:
    """The figures that there are numbers for."""
    import matplotlib

    drawn = [
        plot
        for plot in (
            error_plot(report.modules),
            kl_plot(report),
            drift_plot(report),
            range_plot(report.modules),
            bits_plot(report.modules),
            cost_plot(timings),
        )
        if plot is not None
    ]
    found = []
    for number, (title, caption, height, draw) in enumerate(drawn):
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            # a salt of its own for each: the ids that a drawing refers to are then unique in the page
            matplotlib.rcParams.update(STYLE | {"svg.hashsalt": f"quantkit {number}"})
            from matplotlib.figure import Figure

            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            draw(figure)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata=NO_METADATA)
        drawing = inline(buffer.getvalue(), title)
        found.append(
            f"<figure><figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption>{drawing}</figure>"
        )
    return found


Plot = tuple[str, str, float, Callable[["Figure"], None]]


def inline(svg: str, label: str) -> str:
    """matplotlib's SVG file as an element of a page: without prologue and fixed size, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would rule the page
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" \1 role="img" aria-label="{escape(label)}">',
        svg,
        count=1,
    )
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return re.sub("|".join(VARIABLES), lambda match: VARIABLES[match[0]], svg).strip()


def places(modules: tuple[ModuleReport, ...]) -> dict[str, tuple[str, int]]:
    """Name -> what the module is, in as few words as tell it apart, and its decoder block.

    What lies outside the blocks stands where the block after the last one would.
    """
    indices = {module.name: block_index(module.name) for module in modules}
    outside = max((index for index in indices.values() if index is not None), default=-1) + 1
    kinds = {module.name: kind_of(module.name).split(".") for module in modules}
    unique = len({parts[-1] for parts in kinds.values()}) == len({tuple(parts) for parts in kinds.values()})
    return {
        name: (
            parts[-1] if unique else ".".join(parts[-2:]),
            outside if (at := indices[name]) is None else at,
        )
        for name, parts in kinds.items()
    }


def by_kind(
    modules: tuple[ModuleReport, ...], value: Callable[[ModuleReport], float | None]
) -> dict[str, dict[int, float]]:
    """Mean of a value by kind of module and block, where it is known."""
    gathered: dict[str, dict[int, list[float]]] = {}
    where = places(modules)
    for module in modules:
        number = value(module)
        if number is not None and math.isfinite(number):
            label, at = where[module.name]
            gathered.setdefault(label, {}).setdefault(at, []).append(number)
    return {
        label: {at: sum(numbers) / len(numbers) for at, numbers in sorted(points.items())}
        for label, points in gathered.items()
    }


def block_index(name: str) -> int | None:
    """The first number in a module's name: of its decoder block."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def draw_kinds(panel: "Axes", lines: dict[str, dict[int, float]], style: str, labelled: bool = True) -> None:
    for number, (label, points) in enumerate(lines.items()):
        color = SERIES[number % len(SERIES)]
        panel.plot(list(points), list(points.values()), style, color=color, label=label if labelled else None)


def whole_blocks(panel: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("decoder block")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def log_scale(panel: "Axes", lines: dict[str, dict[int, float]]) -> None:
    values = [value for points in lines.values() for value in points.values()]
    if min(values, default=0) > 0 and max(values) > 4 * min(values):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        if max(values) < 100 * min(values):
            panel.yaxis.set_minor_formatter("{x:g}")
            panel.tick_params(axis="y", which="minor", labelsize=7)


def legend(figure: "Figure", panel: "Axes", columns: int = 4) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handlelength=1.2, columnspacing=1
    )


def error_plot(modules: tuple[ModuleReport, ...]) -> Plot:
    after = by_kind(modules, lambda module: 100 * module.error)
    before = by_kind(modules, lambda module: None if module.error_rtn is None else 100 * module.error_rtn)

    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        draw_kinds(panel, after, ".-")
        draw_kinds(panel, {label: before[label] for label in after if label in before}, ":", labelled=False)
        log_scale(panel, {**after, **{f"{label} before": points for label, points in before.items()}})
        panel.set_ylabel("relative error, %")
        whole_blocks(panel)
        legend(figure, panel)

    of = " and ".join(f"the {word}" for word in dict.fromkeys(module.error_of for module in modules))
    dotted = "; dotted: what plain rounding would give" if before else ""
    return "Error of each linear", f"Of {of}, by decoder block{dotted}.", 3.4, draw


def kl_plot(report: Report) -> Plot | None:
    held = report.held_out
    if held is None or not held.kl_by_position:
        return None

    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        step = held.window / len(held.kl_by_position)
        positions = [(i + 0.5) * step for i in range(len(held.kl_by_position))]
        panel.plot(positions, held.kl_by_position, "-", color=SERIES[0])
        panel.axhline(held.kl, color=SERIES[1], linewidth=0.9, linestyle="--")
        panel.set(xlabel="position in the window", ylabel="KL, nats", xlim=(0, held.window))
        panel.set_ylim(bottom=0)

    caption = (
        f"From the original, mean over {held.windows} windows of held-out text; dashed: over all positions."
    )
    return "KL by position", caption, 2.9, draw


def drift_plot(report: Report) -> Plot | None:
    if not report.blocks:
        return None

    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        drifts = [100 * block.drift for block in report.blocks]
        panel.plot([block.index for block in report.blocks], drifts, ".-", color=SERIES[0])
        panel.set_ylabel("relative difference, %")
        panel.set_ylim(bottom=0)
        whole_blocks(panel)

    caption = "How far the hidden states after each block are from the original's, on held-out text."
    return "Drift", caption, 2.9, draw


def range_plot(modules: tuple[ModuleReport, ...]) -> Plot | None:
    ranges = {
        "max |weight|": by_kind(modules, lambda module: module.weight_absmax),
        "max |input|": by_kind(modules, lambda module: module.input_absmax),
    }
    known = {name: lines for name, lines in ranges.items() if lines}
    if not known:
        return None

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(len(known), sharex=True, squeeze=False)[:, 0]
        for panel, (name, lines) in zip(panels, known.items(), strict=True):
            draw_kinds(panel, lines, ".-")
            log_scale(panel, lines)
            panel.set_ylabel(name)
        whole_blocks(panels[-1])
        legend(figure, panels[0])

    caption = "One large value widens the grid that all its neighbours are rounded to."
    return "Ranges", caption, 2.0 + 1.5 * len(known), draw


def bits_plot(modules: tuple[ModuleReport, ...]) -> Plot:
    where = places(modules)
    kinds = list(dict.fromkeys(label for label, _ in where.values()))
    schemes = list(dict.fromkeys(module.scheme for module in modules))
    stored = sum(module.bits * module.N * module.K for module in modules) / 8

    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        for number, scheme in enumerate(schemes):
            chosen = [module for module in modules if module.scheme == scheme]
            mean = sum(m.bits * m.N * m.K for m in chosen) / sum(m.N * m.K for m in chosen)
            at = [where[module.name] for module in chosen]
            panel.barh(
                [kinds.index(label) for label, _ in at],
                0.9,
                0.8,
                [index - 0.45 for _, index in at],
                color=SERIES[number % len(SERIES)],
                label=f"{scheme}, {mean:.2f} bits",
            )
        panel.set_yticks(range(len(kinds)), kinds)
        panel.invert_yaxis()
        panel.grid(visible=False)
        whole_blocks(panel)
        legend(figure, panel, 2)

    caption = f"Scheme of every linear; {megabytes(round(stored))} of codes, scales and zeros together."
    return "Bits", caption, 1.6 + 0.22 * len(kinds), draw


def cost_plot(timings: Timings) -> Plot | None:
    if not timings.blocks:
        return None
    peaks = [block for block in timings.blocks if block.device_peak_bytes is not None]

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(2 if peaks else 1, sharex=True, squeeze=False)[:, 0]
        panels[0].bar([b.index for b in timings.blocks], [b.seconds for b in timings.blocks], color=SERIES[0])
        panels[0].set_ylabel("seconds")
        if peaks:
            gigabytes = [(b.device_peak_bytes or 0) / 1e9 for b in peaks]
            panels[1].bar([b.index for b in peaks], gigabytes, color=SERIES[1])
            panels[1].set_ylabel("device peak, GB")
        whole_blocks(panels[-1])

    caption = f"By decoder block; the whole run took {timings.seconds:.0f} s."
    return ("Time and memory" if peaks else "Time"), caption, 3.6 if peaks else 2.9, draw
