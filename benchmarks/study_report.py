"""Tables and pictures of ``benchmarks/study.py``, from its results.json, into the page beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REFERENCE, DENSE = "switch", "dense"
MAIN = ("dense", "dtr", "switch")


class Measure(NamedTuple):
    """A column of the tables and a panel of the pictures."""

    title: str
    digits: int
    better: int  # +1: more is better, -1: less is
    log: bool
    real: str | None  # the key of what real images get


MEASURES = {
    "conditional_accuracy": Measure("accuracy", 3, 1, False, "classifier_accuracy"),
    "frechet_distance": Measure("Frechet distance", 2, -1, True, "frechet_floor"),
    "mind": Measure("MIND", 3, -1, True, None),
}
# Okabe and Ito's colours, which the colour-blind tell apart.
STYLES = {
    "dense": {"color": "#666666", "marker": "s", "linestyle": "--"},
    "dtr": {"color": "#D55E00", "marker": "^", "linestyle": "-."},
    "switch": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
}

Rows = list[dict[str, float]]
Part = dict[str, Any]
Choice = Callable[[Rows], dict[str, float]]


def at(step: int) -> Choice:
    """Chooses the row of a run that was measured after ``step`` steps."""

    def choose(rows: Rows) -> dict[str, float]:
        for row in rows:
            if row["step"] == step:
                return row
        steps = ", ".join(str(row["step"]) for row in rows)
        raise ValueError(f"a run was not measured at step {step}; it was at {steps}")

    return choose


def last(rows: Rows) -> dict[str, float]:
    """Chooses the last row of a run."""
    return rows[-1]


def values(arm: Part, choice: Choice, measure: str) -> dict[str, float]:
    """A measure by seed."""
    return {seed: choice(rows)[measure] for seed, rows in arm["seeds"].items()}


def spread(numbers: Iterable[float], digits: int, sign: bool = False) -> str:
    """Mean and standard deviation over seeds; the mean alone where there is one seed."""
    found = list(numbers)
    plus = "+" if sign else ""
    mean = f"{statistics.mean(found):{plus}.{digits}f}"
    return mean if len(found) < 2 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


def compared(part: Part, key: str, choice: Choice, measure: str) -> str:
    """How many seeds have this arm ahead of Switch-DiT at its last step, and the mean difference."""
    what = MEASURES[measure]
    own = values(part["arms"][key], choice, measure)
    other = values(part["arms"][REFERENCE], at(part["steps"]), measure)
    differences = [own[seed] - other[seed] for seed in own if seed in other]
    if key == REFERENCE or not differences:
        return "-"
    ahead = sum(what.better * difference > 0 for difference in differences)
    return f"{spread(differences, what.digits, sign=True)} ({ahead} of {len(differences)})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def line(part: Part, key: str, choice: Choice) -> list[str]:
    """An arm's measures, and its Frechet distance against that of Switch-DiT of the same seed."""
    measured = [
        spread(values(part["arms"][key], choice, name).values(), measure.digits)
        for name, measure in MEASURES.items()
    ]
    return [*measured, compared(part, key, choice, "frechet_distance")]


def describe(part: Part) -> str:
    """All tables of a part."""
    arms, seconds, steps = part["arms"], part["step_seconds"], part["steps"]
    titles = [measure.title for measure in MEASURES.values()]
    minus = "Frechet distance minus Switch-DiT's (seeds ahead)"
    equal = [
        [arm["title"], f"{seconds[key] / seconds[DENSE]:.2f}", *line(part, key, at(steps))]
        for key, arm in arms.items()
    ]
    longer = [key for key in MAIN if key in arms and (key == REFERENCE or arms[key]["steps"] > steps)]
    by_time = []
    if len(longer) > 1:
        timed = [[arms[key]["title"], str(arms[key]["steps"]), *line(part, key, last)] for key in longer]
        by_time = [
            f"At equal time, that of {steps} steps of Switch-DiT:\n",
            table(["model", "steps", *titles, minus], timed),
        ]
    marks = sorted({int(row["step"]) for rows in arms[REFERENCE]["seeds"].values() for row in rows})
    by_step = [
        [
            arms[key]["title"],
            *(spread(values(arms[key], at(step), "frechet_distance").values(), 2) for step in marks),
        ]
        for key in MAIN
        if key in arms
    ]
    real, seeds = part["real"], len(arms[REFERENCE]["seeds"])
    facts = (
        f"{seeds} seeds; mean ± standard deviation. Real held-out images have an accuracy of "
        f"{real['classifier_accuracy']:.3f}; two halves of the real images have a Frechet distance of "
        f"{real['frechet_floor']:.2f}. Took {part['minutes']:.0f} minutes, {part['jobs']} runs at a time, on "
        f"{part['machine']}, torch {part['torch']}, {part['date']}.\n"
    )
    return "\n".join(
        [
            facts,
            f"At equal steps, {steps}:\n",
            table(["model", "step time / dense", *titles, minus], equal),
            *by_time,
            "Frechet distance on the way, by step:\n",
            table(["model", *map(str, marks)], by_step),
        ]
    )


def draw_curves(part: Part, path: Path) -> None:
    """The measures of the three kinds of models against steps, and against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, len(MEASURES))
    for across, (name, measure) in enumerate(MEASURES.items()):
        for down, unit in enumerate(("training steps", "training time of one core, minutes")):
            panel = panels[down, across]
            for key in (key for key in MAIN if key in part["arms"]):
                arm = part["arms"][key]
                scale = part["step_seconds"][key] / 60 if down else 1.0
                by_step: dict[float, list[float]] = {}
                for rows in arm["seeds"].values():
                    for row in rows:
                        if down or row["step"] <= part["steps"]:
                            by_step.setdefault(row["step"], []).append(row[name])
                places = [step * scale for step in sorted(by_step)]
                found = [by_step[step] for step in sorted(by_step)]
                panel.plot(places, [statistics.mean(some) for some in found], label=arm["title"],
                           markersize=4, **STYLES[key])  # fmt: skip
                panel.fill_between(places, [min(some) for some in found], [max(some) for some in found],
                                   color=STYLES[key]["color"], alpha=0.15, linewidth=0)  # fmt: skip
            finish(panel, measure, part)
            panel.set_xlabel(unit)
    panels[0, 0].legend(fontsize=9, frameon=False)
    figure.suptitle(f"{part['title']}: mean over seeds, and the range between them", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def finish(panel: Any, measure: Measure, part: Part) -> None:
    """Title, scale, grid and the line of real images."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_title(f"{measure.title} ({'higher' if measure.better > 0 else 'lower'} is better)", fontsize=10)
    far = measure.log and measure.real and part["real"][measure.real] < min(panel.get_ylim()) / 8
    if measure.real and not far:  # a line far below would squeeze the curves
        panel.axhline(part["real"][measure.real], color="#009E73", linestyle=":", linewidth=1.2)
        beside = (0, 3 if measure.better < 0 else -10)
        panel.annotate("real images", (0.99, part["real"][measure.real]), beside,
                       xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8,
                       color="#009E73")  # fmt: skip
    if measure.log:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def draw_arms(part: Part, path: Path) -> None:
    """Each seed of each arm as a dot, at equal steps."""
    from matplotlib.figure import Figure

    arms = part["arms"]
    figure = Figure(figsize=(11, 0.32 * len(arms) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for panel, (name, measure) in zip(panels, MEASURES.items(), strict=True):
        for height, (key, arm) in enumerate(arms.items()):
            found = values(arm, at(part["steps"]), name).values()
            colour = STYLES.get(key, STYLES[REFERENCE])["color"]
            panel.plot(list(found), [height] * len(found), "o", color=colour, alpha=0.45, markersize=6)
            panel.plot(statistics.mean(found), height, "|", color=colour, markersize=17, markeredgewidth=2.5)
        reference = statistics.mean(values(arms[REFERENCE], at(part["steps"]), name).values())
        panel.axvline(reference, color=STYLES[REFERENCE]["color"], linewidth=0.8, linestyle=":")
        direction = "higher" if measure.better > 0 else "lower"
        panel.set_xlabel(f"{measure.title} ({direction} is better)", fontsize=9)
        panel.grid(alpha=0.3, axis="x")
        panel.margins(y=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(arms)), [arm["title"] for arm in arms.values()], fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(f"{part['title']}: seeds after {part['steps']} steps, and their mean (bar)", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def check(found: dict[str, Any]) -> None:
    """``ValueError`` where a part lacks the arms that the tables compare, or a number is not finite."""
    for name, part in found["parts"].items():
        for key in (REFERENCE, DENSE):
            if key not in part["arms"]:
                raise ValueError(f"results of {name} have no runs of {key}; the tables compare with it")
        for key, arm in part["arms"].items():
            for seed, rows in arm["seeds"].items():
                for row in rows:
                    if not all(math.isfinite(row[measure]) for measure in MEASURES):
                        raise ValueError(f"results of {name}, {key}, seed {seed} are not finite: {row}")


def fill_in(text: str, found: dict[str, Any]) -> str:
    """The page ``text`` with the tables of all parts between their marks; at its end where it has none."""
    for name, part in found["parts"].items():
        begin = f"<!-- {name}: written by benchmarks/study.py -->\n"
        end = f"<!-- end of {name} -->"
        tables = f"{begin}\n{describe(part)}\n{end}"
        if begin in text:
            before, rest = text.split(begin, 1)
            if end not in rest:
                raise ValueError(f"the page has no line {end}; the tables of {name} end there")
            text = before + tables + rest.split(end, 1)[1]
        else:
            text += f"\n## {part['title']}\n\n{tables}\n"
    return text


def write_report(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the pictures of all parts and writes their tables between the marks of README.md in ``folder``.

    The words of the page are written by hand, and stay. Returns what was written. ``ValueError`` where
    results lack what the tables compare.
    """
    check(found)
    page = folder / "README.md"
    text = fill_in(page.read_text(encoding="utf-8") if page.exists() else "", found)
    written = [page]
    for name, part in found["parts"].items():
        written.append(folder / f"{name}.png")
        draw_curves(part, written[-1])
        if len(part["arms"]) > len(MAIN):
            written.append(folder / f"{name}-arms.png")
            draw_arms(part, written[-1])
    page.write_text(text, encoding="utf-8")
    return written
