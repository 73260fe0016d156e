"""Line charts of a run's log as SVG, with axes, ticks and the values where a pointer is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from switch_dit.markup import Markup, element, join

_POINTS = 200  # a curve has this many at most
_WIDTH, _HEIGHT = 480, 250
_LEFT, _END, _TOP, _FLOOR = 54, 468, 10, 210  # the edges of the plot


class Series(NamedTuple):
    """A curve: the key of its values in a row, and its name."""

    key: str
    label: str


def finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def thinned(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """At most 200 rows, each the mean of so many neighbours at their last step, and how many these are."""
    each = max(1, -(-len(rows) // _POINTS))
    if each == 1:
        return rows, 1
    points = []
    for start in range(0, len(rows), each):
        group = rows[start : start + each]
        point = {"step": group[-1]["step"]}
        for key in group[-1]:
            values = [row[key] for row in group if finite(row.get(key))]
            if key != "step" and values:
                point[key] = sum(values) / len(values)
        points.append(point)
    return points, each


def chart(
    title: str, unit: str, rows: list[dict[str, Any]], *, series: Iterable[Series], log: bool = False
) -> Markup | str:
    """A figure of the series over steps; nothing where no value can be drawn or all are zero."""

    def drawable(value: Any) -> bool:
        return finite(value) and (value > 0 or not log)

    series = [one for one in series if any(drawable(row.get(one.key)) and row[one.key] for row in rows)]
    if not series:
        return ""
    values = [row[one.key] for row in rows for one in series if drawable(row.get(one.key))]
    ticks, low, high = _log_axis(values) if log else _axis([*values, 0.0])
    step_ticks, first, last = _axis([row["step"] for row in rows], tight=True)
    scaled = math.log10 if log else float

    def x(step: float) -> float:
        return round(_LEFT + (_END - _LEFT) * (step - first) / (last - first), 1)

    def y(value: float) -> float:
        return round(
            _FLOOR - (_FLOOR - _TOP) * (scaled(value) - scaled(low)) / (scaled(high) - scaled(low)), 1
        )

    parts = [_frame({short(tick): x(tick) for tick in step_ticks}, {short(tick): y(tick) for tick in ticks})]
    for number, one in enumerate(series):
        places = [(x(row["step"]), y(row[one.key])) if drawable(row.get(one.key)) else None for row in rows]
        parts.append(element("path", d=_path(places), cls=f"curve c{number}"))
    width = round(max(6.0, (_END - _LEFT) / len(rows)), 1)
    for row in rows:
        here = [(n, one, row[one.key]) for n, one in enumerate(series) if drawable(row.get(one.key))]
        told = ", ".join(f"{one.label} {value:.4g}" for _, one, value in here) or "nothing that can be drawn"
        dots = [element("circle", cx=x(row["step"]), cy=y(value), r=3.5, cls=f"c{n}") for n, _, value in here]
        left = round(x(row["step"]) - width / 2, 1)
        area = element("rect", x=left, y=_TOP, width=width, height=_FLOOR - _TOP)
        parts.append(
            element("g", element("title", f"step {row['step']:,.0f}: {told}"), area, *dots, cls="at")
        )
    ends = ", ".join(f"{one.label} {_end(rows, one.key)}" for one in series)
    described = f"{title} over steps {short(first)} to {short(last)}; at the end: {ends}"
    drawing = element("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=described)
    names = [element("span", element("i", cls=f"c{n}"), one.label) for n, one in enumerate(series)]
    legend = names if len(series) > 1 else []
    caption = element("figcaption", element("b", title), f" ({unit})" if unit else "", *legend, cls="legend")
    return element("figure", caption, drawing, cls="chart")


def _frame(steps: dict[str, float], values: dict[str, float]) -> Markup:
    """The axes, with the places of their ticks."""
    parts = []
    for text, y in values.items():
        parts.append(element("line", x1=_LEFT, x2=_END, y1=y, y2=y, cls="grid"))
        parts.append(element("text", text, x=_LEFT - 7, y=y + 4, text_anchor="end"))
    for text, x in steps.items():
        parts.append(element("line", x1=x, x2=x, y1=_FLOOR, y2=_FLOOR + 5, cls="axis"))
        parts.append(element("text", text, x=x, y=_FLOOR + 19, text_anchor="middle"))
    parts.append(element("line", x1=_LEFT, x2=_END, y1=_FLOOR, y2=_FLOOR, cls="axis"))
    parts.append(element("text", "step", x=(_LEFT + _END) / 2, y=_HEIGHT - 4, text_anchor="middle"))
    return join(*parts)


def _end(rows: list[dict[str, Any]], key: str) -> str:
    return f"{[row[key] for row in rows if finite(row.get(key))][-1]:.3g}"


def _path(places: list[tuple[float, float] | None]) -> str:
    """Lines between neighbours that are there; a point alone is a dot."""
    words, pen = [], "M"
    for number, place in enumerate(places):
        if place is None:
            pen = "M"
            continue
        words.append(f"{pen}{place[0]:g} {place[1]:g}")
        if pen == "M" and (number + 1 == len(places) or places[number + 1] is None):
            words.append("h0.01")  # a round cap makes it visible
        pen = "L"
    return "".join(words)


def _axis(values: list[float], tight: bool = False) -> tuple[list[float], float, float]:
    """Round ticks, and the ends of the axis: the outer ticks, or, tight, the outer values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - max(abs(low), 1) / 2, high + max(abs(high), 1) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(width for factor in (1, 2, 2.5, 5, 10) if (width := factor * power) >= rough * 0.999)
    start, stop = math.floor(low / width), math.ceil(high / width)
    ticks = [number * width for number in range(start, stop + 1)]
    if not tight:
        return ticks, ticks[0], ticks[-1]
    return [tick for tick in ticks if low <= tick <= high], low, high


def _log_axis(values: list[float]) -> tuple[list[float], float, float]:
    """Ticks at powers of ten, or at 1, 2 and 5 times them where the axis has few, and its ends."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    factors = (1, 2, 5) if high - low <= 2 else (1,)
    every = max(1, (high - low) // 6)
    ticks = [factor * 10.0**power for power in range(low, high, every) for factor in factors]
    return [*ticks, 10.0**high], 10.0**low, 10.0**high


def short(value: float) -> str:
    """A tick in few characters."""
    if value and not 1e-2 <= abs(value) < 1e5:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.6g}" if abs(value) >= 1 else f"{value:.3g}"
