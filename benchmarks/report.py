"""Writes benchmarks/README.md, the pictures and the README's table from the files in benchmarks/results.

    python -m benchmarks.report            # make bench-report
    python -m benchmarks.report --check    # exits with 1 and names what is stale

Every number comes from a result file. ``ratio_tables`` is what ``pytest benchmarks`` prints at its end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plots
from benchmarks.case import BOTH, LINEAR, OURS
from benchmarks.environment import ROOT
from benchmarks.gpu_tables import number, table
from benchmarks.losses import DENSE_MODEL, Cases, against, label, larger, limits, slower, times
from benchmarks.peers import OFFICIAL
from benchmarks.result_files import BadFile, Contenders, Report, Row, Turn, parse, ratio, read, turns

BEGIN = "<!-- benchmarks: written by make bench-report -->"
END = "<!-- end of benchmarks -->"
RESULTS, PAGE, README = Path("benchmarks/results"), Path("benchmarks/README.md"), Path("README.md")
STEPS = ("train_step", "sample_step")
MIB = 2**20


class Section(NamedTuple):
    """What the cases of one table have in common; ``axis`` of growth."""

    group: str
    axis: str
    device: str
    which: str
    dtype: str
    base: str

    def __str__(self) -> str:
        named = f"{self.group} against {self.axis}" if self.axis else self.group
        return f"{named}: {self.which}, {self.dtype}, {self.device}"


def base_of(contenders: Contenders) -> str:
    """The contender that a table divides by: the dense limit where it was timed, else ours."""
    return next((name for name in (LINEAR, DENSE_MODEL) if ratio(contenders, name, name)), OURS)


def sections(report: Report) -> dict[Section, Cases]:
    """The cases of each table."""
    found: dict[Section, Cases] = {}
    for turn, contenders in turns(report["rows"]).items():
        first = next(iter(contenders.values()))
        axis = first["note"] if turn.group == "growth" else ""
        key = Section(turn.group, axis, turn.device, turn.which, turn.dtype, base_of(contenders))
        found.setdefault(key, {})[turn] = contenders
    return found


def columns(base: str, cases: Cases) -> list[str]:
    """Contenders: the base, ours, others."""
    rows = [row for contenders in cases.values() for row in contenders.values()]
    ours = [row["contender"] for row in rows if row["ours"]]
    others = [row["contender"] for row in rows if not row["ours"]]
    names = list(dict.fromkeys([base, OURS, *ours, *others]))
    return [name for name in names if any(name in contenders for contenders in cases.values())]


def clock(microseconds: float | None) -> str:
    """A time with its unit."""
    if microseconds is None:
        return "-"
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= size:
            return f"{number(microseconds / size, 4)} {unit}"
    return f"{number(microseconds, 4)} us"


def mib(count: float | None) -> str:
    return "-" if count is None else number(count / MIB, 4)


def time_cell(contenders: Contenders, name: str, base: str) -> str:
    """The time of the base, how many times that others take."""
    row = contenders.get(name)
    if row is None or row["microseconds"] is None:
        return "failed" if row is not None and row["failure"] else "-"
    over = ratio(contenders, name, base)
    return clock(row["microseconds"]) if name == base or over is None else f"{over:.2f}"


def time_table(section: Section, cases: Cases) -> tuple[list[str], list[list[str]]]:
    """Head and lines: ratios to the base; the time, saved and peak MiB of ours."""
    names = columns(section.base, cases)
    mine = [contenders.get(OURS, {}) for contenders in cases.values()]
    extra: list[tuple[str, Callable[[Row], str]]] = []
    if section.base != OURS:
        extra.append((f"{OURS} time", lambda row: clock(row.get("microseconds"))))
    extra += [
        (f"{what} MiB", lambda row, key=f"{what}_bytes": mib(row.get(key)))
        for what in ("saved", "peak")
        if any(row.get(f"{what}_bytes") is not None for row in mine)
    ]
    lines = [
        [label(turn, next(iter(contenders.values())))]
        + [time_cell(contenders, name, section.base) for name in names]
        + [text(contenders.get(OURS, {})) for _, text in extra]
        for turn, contenders in cases.items()
    ]
    return ["case", *names, *(title for title, _ in extra)], lines


def ratio_tables(report: Report) -> str:
    """Tables for a terminal. The first contender's column is a time, those of others are multiples of it."""
    out = []
    for section, cases in sections(report).items():
        head, lines = time_table(section, cases)
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
        out += ["", str(section)]
        for line in (head, *lines):
            rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
            out.append("  ".join([line[0].ljust(widths[0]), *rest]))
    return "\n".join([*out, ""])


def floor(row: Row) -> str:
    """MiB that a backward of the layer needs at least: x, and for x (1 + m) m too, both [B, T, D]."""
    shape = row["shape"]
    if row["group"] not in ("expert_linear", "layer") or not {"B", "T", "D"} <= set(shape):
        return "-"
    x = shape["B"] * shape["T"] * shape["D"] * (4 if row["dtype"] == "float32" else 2)
    return f"{mib(x)}, {mib(2 * x)}"


def memory_table(cases: Cases) -> list[str]:
    """Saved and peak memory of each contender beside the floor, where others than ours have any."""
    rows = [row for contenders in cases.values() for row in contenders.values()]
    keys = [key for key in ("saved_bytes", "peak_bytes") if any(row.get(key) is not None for row in rows)]
    names = [row["contender"] for row in rows if any(row.get(key) is not None for key in keys)]
    names = sorted(set(names), key=lambda name: (name != OURS, names.index(name)))
    if set(names) <= {OURS}:
        return []
    firsts = [next(iter(contenders.values())) for contenders in cases.values()]
    floors = list(map(floor, firsts)) if "saved_bytes" in keys else []
    floors = [] if set(floors) == {"-"} else floors
    lines = []
    for i, (turn, contenders) in enumerate(cases.items()):
        cells = [" / ".join(mib(contenders.get(name, {}).get(key)) for key in keys) for name in names]
        lines.append([label(turn, firsts[i]), *floors[i : i + 1], *cells])
    what = " / ".join({"saved_bytes": "saved for the backward", "peak_bytes": "peak"}[key] for key in keys)
    what += "; the floor of what must be saved is x, and for x(1+m) x and m" if floors else ""
    said = [larger(cases, "saved_bytes", "Saved memory"), larger(cases, "peak_bytes", "Peak memory")]
    head = ["case", *(["floor"] if floors else []), *names]
    return [f"MiB, {what}:\n", *table(head, lines), " ".join(filter(None, said)) + "\n"]


def step_table(cases: Cases) -> list[str]:
    """Whole steps: a line for each model and contender."""
    cells: dict[str, tuple[str, Callable[[Any], str]]] = {
        "images_per_second": ("images/s", lambda value: number(value, 4)),
        "mfu": ("MFU", lambda value: f"{value:.1%}"),
        "moe_share": ("time in the MoE", lambda value: f"{value:.1%}"),
        "peak_bytes": ("peak MiB", mib),
        "operators": ("operators", str),
        "launches": ("launches", str),
        "host_waits": ("host waits", str),
    }
    found = [(turn, row) for turn, contenders in cases.items() for row in contenders.values()]
    keys = [key for key in cells if any(row.get(key) is not None for _, row in found)]
    lines = [
        [label(turn, row), row["contender"]]
        + ["-" if row.get(key) is None else cells[key][1](row[key]) for key in keys]
        for turn, row in found
    ]
    return table(["case", "contender", *(cells[key][0] for key in keys)], lines) if keys else []


def growth_table(report: Report) -> Iterator[str]:
    """The fitted exponents, and where ours grows faster than others."""
    quantities = {"time": plots.growth(report, "microseconds"), "memory": plots.growth(report, "peak_bytes")}
    for setting, axes in quantities["time"].items():
        names = list(dict.fromkeys(name for lines in axes.values() for name in lines))
        names.sort(key=lambda name: name != OURS)
        rows, faster, spans = [], {"time": [], "memory": []}, []
        for axis, lines in axes.items():
            sizes = sorted({size for points in lines.values() for size, _ in points})
            cells = []
            for what, found in quantities.items():
                measured = found.get(setting, {}).get(axis, {})
                fitted = {name: plots.exponent(measured.get(name, [])) for name in names}
                cells += map(plots.power, fitted.values())
                ours = fitted.get(OURS)
                for name, slope in fitted.items():
                    if ours is not None and slope is not None and ours - slope >= 0.05:
                        both = f"{plots.power(ours)} against {plots.power(slope)}"
                        faster[what].append(f"that of {name} in {axis} ({both})")
            rows.append([axis, ", ".join(map(str, sizes)), *cells])
            points = lines.get(OURS, [])
            if axis in ("k", "M") and len(points) > 1:
                (first, before), (last, after) = points[0], points[-1]
                spans.append(f"{times(after / before)} from {axis} = {first} to {last}")
        yield f"### growth: exponents, {', '.join(setting)}\n"
        head = [f"{what}, {name}" for what in quantities for name in names]
        yield "\n".join(table(["axis", "sizes", *head], rows))
        said = [
            f"The {what} of ours grows faster than {', '.join(found)}."
            if found
            else f"The {what} of ours grows no faster than others'."
            for what, found in faster.items()
        ]
        if spans:
            claim = "The claim is that cost does not grow with k and hardly with M"
            said.append(f"{claim}: the time of ours is {', '.join(spans)}.")
        yield " ".join(said) + "\n"


def spread(section: Section, cases: Cases) -> str:
    """How far ours over the base varies from round to round: the widest quartiles of a case."""
    widest = None
    for turn, contenders in cases.items():
        pair = [contenders.get(name, {}).get("samples") or [] for name in (OURS, section.base)]
        if section.base == OURS or len(pair[0]) < 4 or len(pair[0]) != len(pair[1]):
            continue
        low, _, high = statistics.quantiles([a / b for a, b in zip(*pair, strict=True)])
        if widest is None or high / low > widest[0]:
            widest = (high / low, low, high, len(pair[0]), label(turn, contenders[OURS]))
    if widest is None:
        return ""
    _, low, high, rounds, where = widest
    return (
        f" The noisiest ratio to {section.base}: quartiles {low:.2f} and {high:.2f} over {rounds} rounds"
        f" at {where}."
    )


def machine_lines(report: Report) -> list[str]:
    """Machine, versions, commit, date, and which libraries were there."""
    machine = report["machine"]
    parts = [str(machine.get("cpu")), str(machine.get("cpu_family")), f"{machine.get('cores')} cores"]
    parts += [f"{machine.get('threads')} threads", str(machine.get("isa"))]
    if machine.get("memory_bytes"):
        parts.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB")
    if machine.get("gpu"):
        parts.append(machine["gpu"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    commit = report["commit"][:10] + (" with uncommitted changes" if report.get("dirty") else "")
    quick = " A quick run: few shapes, few rounds." if report.get("quick") else ""
    return [f"{', '.join(parts)}. {versions}. Commit {commit}, {report['date']}.{quick}\n"]


def machine_page(name: str, report: Report) -> Iterator[str]:
    """The part of the page about one result file."""
    yield f"## {title(report)}\n"
    yield f"From [`results/{name}.json`](results/{name}.json)."
    yield from machine_lines(report)
    peers = [[peer, state] for peer, state in report.get("peers", {}).items()]
    if peers:
        yield "\n".join(table(["library", "here"], peers))
    for end in plots.figures(report):
        yield f"![{end}](results/{name}-{end}.png) ([SVG](results/{name}-{end}.svg))\n"
    for section, cases in sections(report).items():
        yield f"### {section}\n"
        yield "\n".join(table(*time_table(section, cases)))
        yield slower(cases) + spread(section, cases) + "\n"
        if section.group in STEPS:
            yield "\n".join(step_table(cases))
        else:
            yield "\n".join(memory_table(cases))
    yield from growth_table(report)
    failed = [row for row in report["rows"] if row["failure"]]
    if failed:
        lines = [[row["case"], row["dtype"], row["pass"], row["contender"], row["failure"]] for row in failed]
        yield "### Failed\n"
        yield "\n".join(table(["case", "type", "pass", "contender", "why"], lines))


def title(report: Report) -> str:
    machine = report["machine"]
    return f"{machine.get('gpu') or machine.get('cpu')}, {machine.get('cores')} cores"


METHOD = """# Benchmarks

`make bench-report` wrote this page, its pictures and the table in the README from the files in `results/`;
a test fails when they differ.

## Rerun

```
pytest benchmarks                                     # all that this machine can: 10 minutes on two cores
pytest benchmarks --quick                             # few shapes, few rounds: 90 seconds
pytest benchmarks --peer-path official=../Switch-DiT  # with the official code, cloned there
make gpu                                              # on a GPU: build, test, measure every kernel
```

The full run, written to `results/` with this page, its pictures and the README's table; and whether a change
made anything slower:

```
make bench ARGS="--peer-path official=../Switch-DiT"
python -m benchmarks.compare benchmarks/results/my-machine.json new.json
```

## Method

- The contenders of a case take turns in one process, one sample each a round, so that drift of the machine
  hits all alike. The median counts. Steps below a millisecond run once untimed before each timed run.
- Every contender is first compared with the reference in float64, outputs and gradients. One that is wrong is
  not timed and shows as `failed`, with the reason at the end.
- All do the same work: same inputs, weights and gates. "X, prepared" got its routing metadata ahead of the
  clock.
- `F.linear` is one dense layer without experts, the limit: a mixture does its work and more. `expert loop`
  has the structure of the official code; `official` is that code itself. In `layer` it routes all 1,000
  timesteps, which its prior loss needs: it is held against `switch_moe + table`, which does so too.
- `growth` is a row of L layers, each `x (1 + m(x))`, forward and backward; one size changes, the others stay.
- Saved: storage that autograd keeps for the backward, parameters left out. Peak: the most that torch holds at
  once beyond the inputs; what libraries allocate for themselves on a CPU does not show.
- MFU of a step: the FLOPs that it needs, the same for all that have experts, over its time, as a share of the
  rate of a large matrix product timed in the same rounds. Time in the MoE is torch.profiler's, its own cost
  included. Host waits are operators that make the host wait for a GPU.

## Read

- The first contender's column is its time; those of others are multiples of it: below 1 is faster. `-`: not
  measured.
- Below each table stands where ours loses: to whom, at which case, by how much; and which goals of the design
  are missed or met. On a CPU, for (B, T, D) = (32, 256, 384), (16, 256, 768) and (8, 256, 1152) with M = 3:
  at most 1.3 times the dense layer's forward and backward in float32 and 1.8 times in bfloat16; at least
  twice as fast as the loop over experts and, in float32, as the official layer. Steps of XL/2: at most 1.1
  times (training) and 1.03 times (sampling) those of a dense DiT.
- Exponents of growth are least-squares slopes of log time, or log memory, against the log of the size;
  differences below 0.05 are not told apart.
"""


def page(machines: dict[str, Report], others: list[str]) -> str:
    """benchmarks/README.md. ``machines``: reports by file name without end."""
    out = [METHOD]
    for name, report in machines.items():
        out += machine_page(name, report)
    if not machines:
        out.append("No machine has been measured.\n")
    if others:
        out += ["## Other results\n", *others, ""]
    return "\n".join(out).replace("\n\n\n", "\n\n").rstrip() + "\n"


def others_of(folder: Path) -> list[str]:
    """Links to pages whose data have another format: GPU reports, kernels compiled ahead of time."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        if _other_format(path):
            shown = path.with_suffix(".md") if path.with_suffix(".md").exists() else path
            lines.append(f"- [`results/{shown.name}`](results/{shown.name}), from `results/{path.name}`")
    return lines


def load(folder: Path) -> dict[str, Report]:
    """The reports of format 1 in a folder, by file name without end."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json")) if not _other_format(path)}


def _other_format(path: Path) -> bool:
    data = parse(path)
    return isinstance(data, dict) and "format" not in data


def _over(turn: Turn, contenders: Contenders, rival: str) -> str:
    """Ours over F.linear, or another over ours; bold: a limit is missed, or without a limit ours loses."""
    over = against(contenders, rival)
    if over is None:
        return "failed" if any(contenders.get(n, {}).get("failure") for n in (rival, OURS)) else "-"
    stated = [limit for limit in limits(turn, contenders[OURS]) if limit.of == rival]
    lost = any(limit.missed(contenders) for limit in stated) if stated else rival != LINEAR and over > 1
    text = f"{over if rival == LINEAR else 1 / over:.2f}"
    return f"**{text}**" if lost else text


def readme_block(machines: dict[str, Report]) -> str:
    """The README's table and lines, between the markers."""
    out = []
    for name, report in machines.items():
        groups = turns(report["rows"])
        both = {turn: contenders for turn, contenders in groups.items() if turn.which == BOTH}
        linears = {turn: contenders for turn, contenders in both.items() if turn.group == "expert_linear"}
        layers = {_place(turn, c): (turn, c) for turn, c in both.items() if turn.group == "layer"}
        lines = []
        for turn, contenders in linears.items():
            layer = layers.get(_place(turn, contenders), (turn, {}))
            cells = [_over(turn, contenders, name) for name in (LINEAR, "expert loop", "grouped_mm")]
            cells.append(_over(*layer, OFFICIAL))
            lines.append([turn.label, turn.dtype, *cells])
        head = ["`expert_linear`", "type", "ours / `F.linear`", "loop / ours", "`grouped_mm` / ours"]
        where = f"[`{RESULTS}/{name}.json`]({RESULTS}/{name}.json)"
        out.append(f"{title(report)} ({where}), medians of turns side by side:\n")
        if lines:
            out.append(
                "Forward + backward, ratios of times; bold: ours is slower, or misses a goal of the design.\n"
            )
            out += table([*head, "official layer / ours"], lines)
            out.append(f"-: not measured. {slower(linears, 2)}\n")
        out += [f"{line}\n" for line in _step_lines(groups)]
    return "\n".join([BEGIN, *out, END])


def _place(turn: Turn, contenders: Contenders) -> tuple[Any, ...]:
    """What an expert_linear case and the layer around it have in common."""
    shape = next(iter(contenders.values()))["shape"]
    return (turn.dtype, turn.device, *(shape.get(key) for key in ("B", "T", "D", "M", "k")))


def _step_lines(groups: Cases) -> Iterator[str]:
    """A sentence for the training steps and one for the sampling steps."""
    for group, what in zip(STEPS, ("A training step", "A sampling step"), strict=True):
        found = []
        for turn, contenders in groups.items():
            if turn.group == group and contenders.get(OURS, {}).get("microseconds"):
                ours = contenders[OURS]
                others = [f"{times(ratio(contenders, OURS, name))} the time of {name}" for name in contenders
                          if name != OURS and ratio(contenders, OURS, name)]  # fmt: skip
                found.append(
                    f"{label(turn, ours)}, {turn.dtype}: {clock(ours['microseconds'])}, {', '.join(others)}"
                )
        if found:
            yield f"{what} of Switch-DiT: {'; '.join(found)}."


def with_block(readme: str, block: str, path: Path) -> str:
    """The README with ``block`` in the place of the one it has."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise BadFile(f"{path}: it must have one line {BEGIN!r} and, after it, one line {END!r}")
    return readme[: readme.index(BEGIN)] + block + readme[readme.index(END) + len(END) :]


def texts(root: Path, machines: dict[str, Report]) -> dict[Path, str]:
    """The two texts as they must be."""
    readme = root / README
    return {
        root / PAGE: page(machines, others_of(root / RESULTS)),
        readme: with_block(readme.read_text(), readme_block(machines), readme),
    }


def pictures_of(root: Path, machines: dict[str, Report]) -> dict[Path, str]:
    """Each picture that must be there, and the digest in it."""
    return {
        root / RESULTS / f"{name}-{end}.{kind}": plots.digest(data)
        for name, report in machines.items()
        for end, data in plots.figures(report).items()
        for kind in plots.FORMATS
    }


def stale(root: Path) -> list[str]:
    """What differs from what the result files give, one line each."""
    machines = load(root / RESULTS)
    found = []
    for path, text in texts(root, machines).items():
        if not path.exists() or path.read_text() != text:
            found.append(f"{path.relative_to(root)} is stale")
    wanted = pictures_of(root, machines)
    for path, digest in wanted.items():
        if not path.exists() or digest.encode() not in path.read_bytes():
            found.append(f"{path.relative_to(root)} is stale")
    found += [
        f"{path.relative_to(root)} has no result file" for path in _pictures(root) if path not in wanted
    ]
    return found


def _pictures(root: Path) -> list[Path]:
    """Pictures with our endings."""
    endings = tuple(f"-{end}.{kind}" for end in plots.ENDINGS for kind in plots.FORMATS)
    return [path for path in sorted((root / RESULTS).iterdir()) if path.name.endswith(endings)]


def write(root: Path) -> list[Path]:
    """Writes all; removes pictures whose result file is gone. Returns what was written."""
    machines = load(root / RESULTS)
    new = texts(root, machines)
    for path, text in new.items():
        path.write_text(text)
    wanted = pictures_of(root, machines)
    for path in _pictures(root):
        if path not in wanted:
            path.unlink()
    for name, report in machines.items():
        for end, data in plots.pictures(report, title(report)):
            (root / RESULTS / f"{name}-{end}").write_bytes(data)
    return [*new, *wanted]


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where a file is stale"
    )
    check = parser.parse_args(argv).check
    try:
        found = stale(root) if check else write(root)
    except BadFile as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if check:
        print(
            "\n".join(f"report: {line}; run make bench-report" for line in found), end="\n" if found else ""
        )
        return 1 if found else 0
    print("\n".join(f"wrote {path.relative_to(root)}" for path in found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
