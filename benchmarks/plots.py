"""Pictures of a result file, and the exponents of growth in them.

A picture holds the digest of the numbers that it shows: its pixels depend on matplotlib's version, the digest
only on the result file.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.case import BOTH, LINEAR, OURS
from benchmarks.losses import label
from benchmarks.result_files import Report, Row, ratio, turns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {
    "B": "samples B", "T": "tokens per sample T", "D": "hidden size D", "M": "experts M",
    "k": "experts chosen per sample k", "L": "blocks L",
}  # fmt: skip
FORMATS = ("png", "svg")
ENDINGS = ("growth-time", "growth-memory", "ratios")
COLUMNS = 3
Setting = tuple[str, str, str]  # device, dtype, pass
Points = list[tuple[float, float]]
# Okabe and Ito's colours, told apart by the colour-blind; ours in the strongest.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = "osD^vP*X"


def exponent(points: Points) -> float | None:
    """Slope of the least-squares line through (log x, log y); None for fewer than two different x."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def power(exponent: float | None) -> str:
    """An exponent as text; no minus before zero."""
    return "-" if exponent is None else f"{round(exponent, 2) + 0.0:.2f}"


def growth(report: Report, key: str) -> dict[Setting, dict[str, dict[str, Points]]]:
    """For each setting, axis and contender the points (size, ``key``): microseconds or peak_bytes."""
    found: dict[Setting, dict[str, dict[str, Points]]] = {}
    for row in report["rows"]:
        if row["group"] == "growth" and row["note"] in AXES and row["note"] in row["shape"] and row.get(key):
            axes = found.setdefault((row["device"], row["dtype"], row["pass"]), {})
            lines = axes.setdefault(row["note"], {})
            lines.setdefault(row["contender"], []).append((row["shape"][row["note"]], row[key]))
    for axes in found.values():
        for lines in axes.values():
            for points in lines.values():
                points.sort()
    return found


def ratio_panels(report: Report) -> dict[str, dict[str, dict[str, float]]]:
    """For each panel and case the times of contenders over F.linear's, or over ours without it."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for turn, contenders in turns(report["rows"]).items():
        if turn.group not in ("expert_linear", "layer") or turn.which != BOTH:
            continue
        base = LINEAR if ratio(contenders, LINEAR, LINEAR) else OURS
        found = {name: ratio(contenders, name, base) for name in contenders}
        first: Row = next(iter(contenders.values()))
        title = f"{turn.group}, {turn.dtype}, {turn.device}: time over {base}"
        panels.setdefault(title, {})[label(turn, first)] = {n: v for n, v in found.items() if v and n != base}
    return panels


def figures(report: Report) -> dict[str, Any]:
    """The data of each picture that the report has rows for, by the end of the picture's name."""
    data = {
        "growth-time": growth(report, "microseconds"),
        "growth-memory": growth(report, "peak_bytes"),
        "ratios": ratio_panels(report),
    }
    return {name: found for name, found in data.items() if found}


def digest(data: Any) -> str:
    """What a picture of ``data`` holds in its metadata."""
    if isinstance(data, dict) and any(isinstance(key, tuple) for key in data):
        data = {" ".join(key): value for key, value in data.items()}
    return "data " + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def pictures(report: Report, title: str) -> Iterator[tuple[str, bytes]]:
    """The end of each picture's file name, and its bytes."""
    for name, data in figures(report).items():
        if name == "ratios":
            figure = _ratios(data, title)
        elif name == "growth-time":
            figure = _growth(data, title, "time, ms", 1e3)
        else:
            figure = _growth(data, title, "peak memory beyond the inputs, MiB", 2**20)
        for kind in FORMATS:
            yield f"{name}.{kind}", _save(figure, kind, digest(data))


def _save(figure: Figure, kind: str, description: str) -> bytes:
    """A picture without a date; ids in an SVG do not change from run to run."""
    import matplotlib

    metadata = {"Description": description, "Software" if kind == "png" else "Date": None}
    file = io.BytesIO()
    settings = {"svg.hashsalt": "switch_moe", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings):
        figure.savefig(file, format=kind, dpi=100, metadata=metadata)
    return file.getvalue()


def _style(names: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each contender, the same in all panels; hollow for "X, prepared"."""
    plain = {name: name.removesuffix(", prepared") for name in names}
    known = [name for name in (OURS, LINEAR, "expert loop") if name in plain.values()]
    order = [*known, *sorted(set(plain.values()) - set(known))]
    return {
        name: {
            "color": COLOURS[order.index(plain[name]) % len(COLOURS)],
            "marker": MARKERS[order.index(plain[name]) % len(MARKERS)],
            "fillstyle": "full" if name == plain[name] else "none",
            "zorder": 3 if name == OURS else 2,
        }
        for name in sorted(names, key=lambda name: (order.index(plain[name]), name))
    }


def _number(value: float) -> str:
    return f"{value:g}"


def _growth(
    data: dict[Setting, dict[str, dict[str, Points]]], title: str, quantity: str, unit: float
) -> Figure:
    """One log-log panel for each axis; the legend has the fitted exponents."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels = [(setting, axis, axes[axis]) for setting, axes in data.items() for axis in AXES if axis in axes]
    style = _style([name for _, _, lines in panels for name in lines])
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.1 * min(COLUMNS, len(panels)), 3.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, min(COLUMNS, len(panels)), squeeze=False)
    for panel, (setting, axis, lines) in zip(grid.flat, panels, strict=False):
        for name, style_of in style.items():
            if name not in lines:
                continue
            points = [(size, value / unit) for size, value in lines[name]]
            slope = exponent(points)
            fitted = "" if slope is None else f": {axis}^{power(slope)}"
            panel.plot(
                *zip(*points, strict=True), label=name + fitted, markersize=5, linewidth=1.5, **style_of
            )
        sizes = sorted({size for points in lines.values() for size, _ in points})
        panel.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=quantity)
        panel.set_title(f"{axis} ({', '.join(setting)})", fontsize=10)
        panel.set_xticks(sizes, [_number(size) for size in sizes])
        panel.xaxis.set_minor_locator(NullLocator())
        _widen(panel)
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel in grid.flat[len(panels) :]:
        panel.axis("off")
    figure.suptitle(f"{title}\nleast-squares exponents in the legends", fontsize=11)
    return figure


def _widen(panel: Any) -> None:
    """Room above the lines for the legend, and at least a factor of four between bottom and top."""
    low, high = panel.get_ylim()
    middle = math.sqrt(low * high)
    low, high = min(low, middle / 2), max(high, middle * 2)
    panel.set_ylim(low, high * (high / low) ** 0.45)


def _ratios(data: dict[str, dict[str, dict[str, float]]], title: str) -> Figure:
    """A line for each case, a dot for each contender."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    style = _style([name for cases in data.values() for found in cases.values() for name in found])
    heights = [len(cases) + 1.4 for cases in data.values()]
    figure = Figure(figsize=(9, 0.32 * sum(heights) + 1.6), layout="constrained")
    grid = figure.subplots(len(data), 1, squeeze=False, height_ratios=heights, sharex=True)
    for panel, (name, cases) in zip(grid.flat, data.items(), strict=True):
        for i, found in enumerate(cases.values()):
            for contender, value in found.items():
                panel.plot(value, i, linestyle="", markersize=6, alpha=0.85, **style[contender])
        panel.axvline(1.0, color="black", linewidth=1)
        panel.set_yticks(range(len(cases)), cases, fontsize=8)
        panel.set_ylim(len(cases) - 0.4, -0.6)
        panel.set_xscale("log")
        panel.set_title(name, fontsize=10, loc="left")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("time as a multiple of the black line's (log scale; left is faster)")
    dots = [panel.plot([], [], linestyle="", label=name, **style[name])[0] for name in style]
    figure.legend(handles=dots, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{title}\nforward + backward", fontsize=11)
    return figure
