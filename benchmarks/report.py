"""Writes benchmarks/README.md, its pictures, the block in README.md and switch_moe/kernels/measured.json from
the files in benchmarks/results.

    python -m benchmarks.report            # make bench-report

A result file is pytest-benchmark's JSON of ``pytest benchmarks``; every number here comes from one.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measured, plots
from benchmarks.case import BOTH, FORWARD, LINEAR, SWITCH_MOE, WITH_TABLE
from benchmarks.environment import ROOT
from benchmarks.peers import OFFICIAL

BLOCK = re.compile(r"(<!-- benchmarks: .*? -->\n).*?(<!-- end of benchmarks -->)", re.DOTALL)
LOOP, GROUPED, DENSE, STRUCTURE = "expert loop", "grouped_mm", "dense DiT", "official structure"
SMALL = (
    "timestep_gate",
    "token_gate",
    "route_pairs",
    "matching",
    "matching + prior loss",
    "linear_assignment",
)
TEMPLATE = Path(__file__).parent / "page.md"
README_ROWS = 8
MARGIN = 1.02  # what is slower by less is not called slower
CALIBRATED = {
    "clock_mhz": "SM clock, MHz", "watts": "W", "tb_s_to_shared": "TB/s into shared memory",
    "tb_s_from_l2": "TB/s from L2", "tflop_s": "TFLOP/s",
}  # fmt: skip
LIMITS = (
    "Steps of a Hopper kernel of merged experts with parts left out (`calibrate.cu`), and the clock that\n"
    "nvidia-smi reports while `F.linear` and `expert_linear` run."
)
Row = dict[str, Any]


class Report(NamedTuple):
    """A result file."""

    machine: dict[str, Any]
    date: str
    rows: list[Row]

    @property
    def name(self) -> str:
        if self.machine["gpu"]:
            return self.machine["gpu"]
        family = self.machine["cpu_family"].partition(",")[0]  # processors of one name differ much by it
        return f"{self.machine['cpu']} ({family}), {self.machine['cores']} cores"


class Line(NamedTuple):
    """The contenders of one case and pass, by name."""

    machine: str
    first: Row
    contenders: dict[str, Row]

    @property
    def case(self) -> str:
        """The case in words."""
        row = self.first
        sizes = [f"{key}={value}" for key, value in row["shape"].items()]
        if "model" in row:
            sizes = [row["model"], f"B={row['shape']['B']}"]
        note = "" if row["operation"] == "growth" or row["note"] == "eager" else row["note"]
        return " ".join(filter(None, [*sizes, note]))

    def ratio(self, name: str, base: str = SWITCH_MOE) -> float | None:
        """Time of one contender over another's: the median over rounds. None where one was not timed."""
        times, others = (self.contenders.get(key, {}).get("samples") for key in (name, base))
        if not times or not others or len(times) != len(others):
            return None
        return statistics.median(a / b for a, b in zip(times, others, strict=True))

    def eager(self) -> Line | None:
        """The same line with the times of calls without CUDA graphs; None where no graph was timed."""
        if not any("eager" in row for row in self.contenders.values()):
            return None
        return self._replace(contenders={name: row | {"samples": eager_samples(row), "method": "eager"}
                                         for name, row in self.contenders.items()})  # fmt: skip

    def rivals(self) -> Iterator[tuple[str, float]]:
        """Other contenders, and their time over switch_moe's. The official layer routes all timesteps, so it
        is held against the contender that does so too.
        """
        for name, row in self.contenders.items():
            base = WITH_TABLE if name == OFFICIAL and WITH_TABLE in self.contenders else SWITCH_MOE
            over = self.ratio(name, base)
            if not row.get("is_switch_moe", name == SWITCH_MOE) and over is not None:
                yield name, over


def eager_samples(row: Row) -> list[float]:
    return row.get("samples", []) if row.get("method") == "eager" else row.get("eager", [])


def load(path: Path) -> Report:
    """Reads a result file; ``ValueError`` for another JSON."""
    data = json.loads(path.read_text())
    try:
        rows = [row for one in data["benchmarks"] for row in one["extra_info"].get("rows", [])]
        report = Report(data["machine_info"], data["datetime"][:10], rows)
        _ = report.name, report.machine["commit"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON of `pytest benchmarks`: {error!r} is missing") from None
    return report


def load_all(folder: Path) -> dict[str, Report]:
    """The result files of ``pytest benchmarks`` by name."""
    return {path.name: load(path) for path in sorted(folder.glob("*.json")) if path.name != "compiled.json"}


def measured_rows(files: dict[str, Report], root: Path) -> list[Row]:
    """What switch_moe/kernels/measured.json holds: where the CUDA kernels of expert_linear are faster."""
    found: list[Row] = []
    for name, report in files.items():
        found += measured.rows(name, report.machine, lines(report, "expert_linear"), root)
    return measured.merge(found)


def lines(report: Report, *operations: str) -> list[Line]:
    """The lines of some operations, of all without any."""
    found: dict[Any, Line] = {}
    for row in report.rows:
        if not operations or row["operation"] in operations:
            key = (row["operation"], row["dtype"], row["pass"], row["note"], tuple(row["shape"].items()),
                   row.get("model"))  # fmt: skip
            found.setdefault(key, Line(report.name, row, {})).contenders[row["contender"]] = row
    return list(found.values())


def table(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown. Its first column is the machine, left out where there is one only."""
    if not body:
        return "Not measured.\n"
    first = 0 if len({row[0] for row in body}) > 1 else 1
    cells = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row[first:])} |" for row in cells) + "\n"


def clock(row: Row | None) -> str:
    """The median time with its unit."""
    if not row or not row.get("samples"):
        return "failed" if row and row["failure"] else "-"
    microseconds = statistics.median(row["samples"])
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} us"


def multiple(line: Line, name: str, over: float | None) -> str:
    """A time over switch_moe's; bold where the contender is faster, starred where it had no CUDA graph."""
    row = line.contenders.get(name)
    if over is None:
        return "failed" if row and row["failure"] else "-"
    methods = {other.get("method") for other in line.contenders.values()}
    star = r"\*" if row and row.get("method") == "eager" and "graph" in methods else ""
    return bold(f"{over:.2f}", over < 1) + star


def bold(text: str, slower: bool) -> str:
    return f"**{text}**" if slower and float(text) != 1 else text


def times_table(reports: list[Report], *operations: str, passes: tuple[str, ...] = (BOTH, FORWARD)) -> str:
    """A line for each case: the time of switch_moe, and other contenders' as multiples of it."""
    found = [line for which in passes for report in reports for line in lines(report, *operations)
             if line.first["pass"] == which]  # fmt: skip
    found.sort(key=lambda line: operations.index(line.first["operation"]))
    names = list(dict.fromkeys(name for line in found for name in line.contenders if name != SWITCH_MOE))

    def cells(line: Line) -> list[str]:
        over = dict(line.rivals())
        multiples = (multiple(line, name, over.get(name, line.ratio(name))) for name in names)
        return [clock(line.contenders.get(SWITCH_MOE)), *multiples]

    body = []
    for line in found:
        operation = f"{line.first['operation']}, " if len(operations) > 1 else ""
        eager = line.eager()
        both = beside(cells(line), cells(eager) if eager else [])
        body.append([line.machine, operation + line.case, line.first["dtype"], line.first["pass"], *both])
    return table(["machine", "case", "type", "pass", SWITCH_MOE, *names], body)


def beside(graph: list[str], eager: list[str]) -> list[str]:
    """Cells with both numbers, "graph / eager"; one where both are alike or there is no other."""
    pairs = zip(graph, eager or graph, strict=True)
    return [one if one == other else f"{one} / {other}" for one, other in pairs]


def memory_table(reports: list[Report]) -> str:
    """Saved and peak memory of expert_linear's forward + backward."""
    found = [one for report in reports for one in lines(report, "expert_linear") if one.first["pass"] == BOTH]
    names = list(dict.fromkeys(name for line in found for name in line.contenders))

    def cell(row: Row | None) -> str:
        if not row or row.get("peak_bytes") is None:
            return "-"
        return " / ".join(f"{row[key] / 2**20:.3g}" for key in ("saved_bytes", "peak_bytes"))

    body = [[line.machine, line.case, line.first["dtype"], *(cell(line.contenders.get(n)) for n in names)]
            for line in found]  # fmt: skip
    return table(["machine", "case", "type", *names], body)


def slower(reports: list[Report]) -> Iterator[str]:
    """A sentence for each operation and contender that is somewhere faster than switch_moe."""
    for report in reports:
        found: dict[tuple[str, str], list[tuple[float, Line]]] = {}
        for line in lines(report):
            for name, over in line.rivals():
                found.setdefault((line.first["operation"], name), []).append((1 / over, line))
        for (operation, name), cases in found.items():
            lost = [(over, line) for over, line in cases if over > MARGIN]
            if lost:
                over, line = max(lost, key=lambda one: one[0])
                where = f" on {report.name}" if len(reports) > 1 else ""
                at = f"{line.case}, {line.first['dtype']}, {line.first['pass']}"
                count = f"{len(lost)} of {len(cases)} cases"
                most = f"at most {over:.2f} times ({at})"
                yield f"- `{operation}`{where}: slower than {name} in {count}, {most}."


def text_table(rows: list[Row]) -> str:
    """The rows for a terminal: a line for each contender."""
    out = []
    for line in lines(Report({"gpu": "here"}, "", rows)):
        out.append(f"{line.first['operation']} {line.case}, {line.first['dtype']}, {line.first['pass']}")
        for name, row in line.contenders.items():
            over = line.ratio(name)
            cells = f"{clock(row):>10} {'' if over is None else f'{over:.2f}':>7}"
            out.append(f"    {name:24}{cells}  {row['failure'] or ''}".rstrip())
    return "\n".join([*out, ""])


def described(report: Report) -> str:
    """One sentence about the machine."""
    machine = report.machine
    system = (
        f"CUDA {machine['cuda']}, Triton {machine['triton']}"
        if machine["gpu"]
        else f"{machine['cpu_family']}, {machine['isa']}"
    )
    quick = "; a quick run" if machine.get("quick") else ""
    dirty = " with uncommitted changes" if machine.get("dirty") else ""
    if names := machine.get("assemblers"):
        system += (
            f", ptxas {names['triton']}; the kernels are also tested under {names['second'] or 'no other'}"
        )
    if left_out := machine.get("left_out"):
        quick += f"; {len(left_out)} cases are left out for want of time"
    return (
        f"{report.name} ({system}), torch {machine['torch']}, commit {machine['commit'][:7]}{dirty}, "
        f"{report.date}{quick}"
    )


def calibration_section(report: Report) -> str:
    """What calibrate.py measured on a GPU, with a heading; nothing where it did not."""
    calibration = report.machine.get("calibration")
    if not calibration:
        return ""
    body = []
    for name, limits in calibration.items():
        numbers = [f"{limits[key]:.4g}" if key in limits else "-" for key in CALIBRATED]
        body.append(["", name, *numbers, limits.get("left_out") or ""])
    return (
        f"## Limits of {report.name}\n\n{LIMITS}\n\n{table(['', 'kernel', *CALIBRATED.values(), ''], body)}\n"
    )


def readme_block(reports: list[Report]) -> str:
    """The table and the sentences of the README, from the reports that have measured expert_linear."""
    reports = [report for report in reports if lines(report, "expert_linear")]
    body = []
    for report in reports:
        layers = {(str(line.first["shape"]), line.first["dtype"]): line
                  for line in lines(report, "layer") if line.first["pass"] == BOTH}  # fmt: skip
        both = [line for line in lines(report, "expert_linear") if line.first["pass"] == BOTH]
        sizes = sorted({line.first["shape"]["D"] for line in both})
        shown = [line for line in both if line.first["shape"]["D"] in (sizes[0], sizes[-1])]
        for line in shown[: README_ROWS // len(reports)]:
            layer, eager = layers.get((str(line.first["shape"]), line.first["dtype"])), line.eager()
            cells = readme_cells(line, layer)
            if eager is not None:
                cells = beside(cells, readme_cells(eager, layer and layer.eager()))
            body.append([line.machine, f"{line.case}, {line.first['dtype']}", *cells])
    head = ["machine", "`expert_linear`, forward + backward", "switch_moe / F.linear", "loop / switch_moe",
            "grouped_mm / switch_moe", "official layer / switch_moe"]  # fmt: skip
    measured = "; ".join(map(described, reports))
    method = "Every number is a ratio of times, the median over rounds in which all take turns."
    if any("eager" in row for report in reports for row in report.rows):
        method += " On a GPU: in CUDA graphs / without, where the time of the host shows."
    parts = [f"Measured on {measured}. {method} Bold: switch_moe is slower.\n", table(head, body)]
    for report in reports:
        steps = (("train_step", "training"), ("sample_step", "sampling"))
        parts.append(" ".join(step_sentence(report, *step) for step in steps))
    return "\n".join(part for part in parts if part.strip())


def readme_cells(line: Line, layer: Line | None) -> list[str]:
    """Ratios of one line of expert_linear, and of the layer of its shape."""
    dense = line.ratio(SWITCH_MOE, LINEAR)
    official = layer.ratio(OFFICIAL, WITH_TABLE) if layer else None
    others = (line.ratio(LOOP), line.ratio(GROUPED), official)
    return ["-" if dense is None else bold(f"{dense:.2f}", dense > 1),
            *("-" if other is None else bold(f"{other:.2f}", other < 1) for other in others)]  # fmt: skip


def step_sentence(report: Report, operation: str, word: str) -> str:
    """What a step of whole models takes beside a DiT without experts and the official structure."""
    parts = []
    for line in lines(report, operation):
        dense, official = line.ratio(SWITCH_MOE, DENSE), line.ratio(STRUCTURE, DENSE)
        if dense is not None:
            dtype = "" if line.first["dtype"] == "float32" else f" {line.first['dtype']}"
            time = clock(line.contenders[SWITCH_MOE])
            part = f"{line.case}{dtype} {time}, {dense:.2f} times a DiT without experts"
            parts.append(
                part if official is None else f"{part} (the official structure: {official:.2f} times)"
            )
    return f"A {word} step of Switch-DiT on {report.name} takes: {'; '.join(parts)}." if parts else ""


def write(root: Path) -> list[Path]:
    """Writes page, pictures and README block under ``root``; ``ValueError`` where that cannot be done."""
    folder, readme = root / "benchmarks" / "results", root / "README.md"
    files = load_all(folder)
    reports = list(files.values())
    if not reports:
        raise ValueError(f"{folder} has no result file; `make bench` writes one")
    reports.sort(key=lambda report: report.machine["gpu"] is None)  # GPUs come first
    text = readme.read_text()
    if len(BLOCK.findall(text)) != 1:
        wanted = "<!-- benchmarks: ... --> and a line <!-- end of benchmarks -->"
        raise ValueError(f"{readme} must have one line {wanted} after it")
    readme.write_text(BLOCK.sub(lambda found: f"{found[1]}{readme_block(reports)}\n{found[2]}", text))
    shown = next((report for report in reports if lines(report, "growth")), None)
    pictures = plots.draw(shown, folder) if shown else []
    page = root / "benchmarks" / "README.md"
    page.write_text(
        TEMPLATE.read_text().format(
            hero=shown.name if shown else "not measured yet",
            machines="; ".join(map(described, reports)),
            expert_linear=times_table(reports, "expert_linear"),
            layer=times_table(reports, "layer"),
            expert_mlp=times_table(reports, "expert_mlp"),
            routed_mlp=times_table(reports, "routed_mlp"),
            small=times_table(reports, *SMALL),
            steps=times_table(reports, "train_step", "sample_step", passes=("train", "sample")),
            family=times_table(reports, "family_step", passes=("train",)),
            memory=memory_table(reports),
            slower="\n".join(slower(reports)) or "Nowhere.",
            calibration="\n".join(calibration_section(report) for report in reports if report.machine["gpu"]),
        )
    )
    choice = root / "switch_moe" / "kernels" / "measured.json"
    choice.write_text(measured.text(measured_rows(files, root)))
    return [page, readme, choice, *pictures]


def main() -> int:
    try:
        written = write(ROOT)
        for name, report in load_all(ROOT / "benchmarks" / "results").items():
            if report.machine["gpu"] and (fault := measured.fault(report.machine, ROOT)) is not None:
                print(f"report: {name} enables no CUDA kernels: {fault}", file=sys.stderr)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print("wrote " + ", ".join(str(path.relative_to(ROOT)) for path in written))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
