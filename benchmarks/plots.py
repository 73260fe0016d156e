"""The pictures of the page: time against the number of chosen experts, and along every axis."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.case import LINEAR, SWITCH_MOE

if TYPE_CHECKING:
    from benchmarks.report import Report

AXES = {
    "k": "experts chosen per sample, k", "M": "experts, M", "B": "samples, B",
    "T": "tokens per sample, T", "D": "hidden size, D", "L": "layers, L",
}  # fmt: skip
# Okabe and Ito's colours, which the colour-blind tell apart.
STYLES = {
    SWITCH_MOE: {"color": "#0072B2", "marker": "o", "zorder": 3},
    LINEAR: {"color": "#666666", "marker": "s", "linestyle": "--", "zorder": 2},
    "expert loop": {"color": "#D55E00", "marker": "^", "zorder": 2},
}
LABELS = {LINEAR: "one dense layer (F.linear)", "expert loop": "loop over the experts"}


def growth(report: Report, axis: str) -> dict[str, list[tuple[float, float]]]:
    """The points of each contender along an axis, as (size, milliseconds)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in report.rows:
        if row["operation"] == "growth" and row["note"] == axis and row.get("samples"):
            point = row["shape"][axis], statistics.median(row["samples"]) / 1e3
            found.setdefault(row["contender"], []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def draw(report: Report, folder: Path) -> list[Path]:
    """hero.png and growth.png of a result file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    paths = [folder / "hero.png", folder / "growth.png"]
    hero = Figure(figsize=(8, 4.2), layout="constrained")
    panel = hero.subplots()
    points = growth(report, "k")
    lines(panel, points, width=2.5)
    for name, measured in points.items():  # how many times the dense layer the largest k costs
        if LINEAR in points and name != LINEAR:
            times = measured[-1][1] / points[LINEAR][-1][1]
            colour = STYLES.get(name, {}).get("color")
            panel.annotate(f"{times:.3g}x", measured[-1], (0, 9), textcoords="offset points", ha="center",
                           fontsize=13, color=colour)  # fmt: skip
    panel.set_ylim(bottom=0)
    panel.set_ylabel("forward + backward, ms")
    panel.set_title("Time against the number of experts that a sample chooses", loc="left", fontsize=15)
    panel.legend(loc="upper left", fontsize=12, frameon=False)
    row = next(row for row in report.rows if row["operation"] == "growth" and row["note"] == "k")
    shape = {"B": "samples", "T": "tokens each", "D": "hidden size", "M": "experts"}
    where = ", ".join(f"{word} {row['shape'][key]}" for key, word in shape.items() if key in row["shape"])
    dtype = row["dtype"]
    hero.supxlabel(f"{report.name}, {dtype}, {where}", fontsize=10, color="#666666")
    save(hero, paths[0], dpi=150)

    figure = Figure(figsize=(11, 6), layout="constrained")
    for panel, axis in zip(figure.subplots(2, 3).flat, AXES, strict=True):
        lines(panel, growth(report, axis), width=1.5)
        panel.set(xscale="log", yscale="log")
        ticks = sorted({size for points in growth(report, axis).values() for size, _ in points})
        panel.set_xticks(ticks, [f"{size:g}" for size in ticks])
        panel.minorticks_off()
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, high / 8), high)  # a flat line looks flat
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set(xlabel=AXES[axis], ylabel="ms")
    figure.axes[0].legend(fontsize=9, frameon=False)
    figure.suptitle(f"forward + backward, {report.name}, {dtype}", fontsize=11)
    save(figure, paths[1], dpi=90)
    return paths


def lines(panel: Any, points: dict[str, list[tuple[float, float]]], width: float) -> None:
    """A line for each contender; sizes on the x axis are those that were measured."""
    for name, measured in points.items():
        style: dict[str, Any] = STYLES.get(name, {})
        panel.plot(*zip(*measured, strict=True), label=LABELS.get(name, name), linewidth=width, **style)
    panel.set_xticks(sorted({size for measured in points.values() for size, _ in measured}))
    panel.set_xlabel(AXES["k"])
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: Path, dpi: int) -> None:
    """A PNG that names neither date nor matplotlib's version."""
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
