"""The GPU report as text and picture: verdicts on the targets of the design, a Markdown page, plots.

All numbers come from the report's JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.case import ANY_K, BOTH, FORWARD, LINEAR, MODULATED, OURS

Row = dict[str, Any]
Report = dict[str, Any]

NOT_PEERS = {OURS, MODULATED, LINEAR}
RATIO_LIMITS = {FORWARD: 1.15, BOTH: 1.25}


def group(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows of a case and pass together, by contender."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["pass"]), {})[row["contender"]] = row
    return groups


def ratio(rows: dict[str, Row], above: str, below: str) -> float | None:
    """Time of ``above`` over that of ``below``, where both were measured."""
    times = [rows.get(name, {}).get("microseconds") for name in (above, below)]
    return times[0] / times[1] if all(times) else None


def _verdict(
    what: str, found: list[tuple[float, str]], limit: float, *, at_least: bool = False, whole: bool = True
) -> Row:
    """The worst of ``found`` (value, shape) against ``limit``; not ``whole``: some shapes have no number."""
    if not found:
        return {"what": what, "limit": limit, "measured": None, "where": "", "verdict": "not measured"}
    value, where = min(found) if at_least else max(found)
    met = value >= limit if at_least else value <= limit
    verdict = ("met" if whole else "met where measured") if met else "missed"
    return {"what": what, "limit": limit, "measured": value, "where": where, "verdict": verdict}


def _whole(report: Report, operation: str, *notes: str) -> bool:
    """Whether all cases of an operation (with one of the notes) were measured, ours in each."""
    failed = [row for row in report["cases"] if row["ours"] and row["failure"]]
    return not any(
        row.get("operation") == operation and (not notes or row["note"] in notes)
        for row in (*failed, *report["not_measured"])
    )


def verdicts(report: Report) -> list[Row]:
    """The targets of the design for an H200: ratios are judged on any GPU, microseconds on an H200 only."""
    groups = group(report["cases"])
    any_of = {key: next(iter(rows.values())) for key, rows in groups.items()}
    found: list[Row] = []
    whole = _whole(report, "expert_linear", "")
    for which, limit in RATIO_LIMITS.items():
        ratios, speedups = [], []
        for (case, passed), rows in groups.items():
            if passed != which or LINEAR not in rows or rows[LINEAR]["shape"]["T"] != 256:
                continue
            to_linear = ratio(rows, OURS, LINEAR)
            if to_linear is not None:
                ratios.append((to_linear, case))
            to_peers = [ratio(rows, peer, OURS) for peer in rows if peer not in NOT_PEERS]
            measured = [value for value in to_peers if value is not None]
            if measured:
                speedups.append((min(measured), case))
        found.append(_verdict(f"expert_linear {which} / F.linear", ratios, limit, whole=whole))
        if which == BOTH:
            what = f"fastest generic peer / expert_linear, {which}"
            found.append(_verdict(what, speedups, 2.0, at_least=True, whole=whole))
    whole = _whole(report, "expert_linear", ANY_K)
    for which in RATIO_LIMITS:
        over_k = []
        for (case, passed), rows in groups.items():
            if passed == which and any_of[case, passed]["note"] == ANY_K:
                times = {name: ratio(rows, name, "k=1") for name in rows}
                over_k += [(value, f"{case}: {name}") for name, value in times.items() if value is not None]
        found.append(_verdict(f"expert_linear at any k / k=1, {which}", over_k, 1.1, whole=whole))
    for operation, which, limit in (
        ("timestep_gate", FORWARD, 30.0),
        ("matching + prior loss", BOTH, 200.0),
    ):
        times = [
            (rows[OURS]["microseconds"], case)
            for (case, passed), rows in groups.items()
            if passed == which and any_of[case, passed]["operation"] == operation
            if rows.get(OURS, {}).get("microseconds") is not None
        ]
        found.append(_verdict(f"{operation} {which}, us", times, limit, whole=_whole(report, operation)))
        if times and "H200" not in report["machine"]["gpu"]:
            found[-1]["verdict"] = "no target for this GPU"
    waiting = [row["case"] for row in report["cases"] if row["ours"] and row["method"] == "eager"]
    measured = [row for row in report["cases"] if row["ours"] and row["method"]]
    waits = [(float(len(waiting)), ", ".join(dict.fromkeys(waiting)))] if measured else []
    return [*found, _verdict("measurements of ours that wait for the host", waits, 0.0)]


def number(value: float | None, digits: int = 3) -> str:
    """With ``digits`` significant digits, '-' for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(cells) + " |" for cells in rows] + [""]


def _cell(rows: dict[str, Row], name: str, base: str | None) -> str:
    """Microseconds, and how many times those of ``base``."""
    row = rows.get(name)
    if row is None or row["microseconds"] is None:
        return "-" if row is None else "failed"
    text = number(row["microseconds"], 4) + ("*" if row["method"] == "eager" else "")
    against = ratio(rows, name, base) if base and base != name else None
    return text if against is None else f"{text} ({against:.2f})"


def _sections(report: Report) -> Iterator[str]:
    """One table for each operation, note and pass."""
    groups = group(report["cases"])
    sections: dict[tuple[str, str, str], list[dict[str, Row]]] = {}
    for (_, which), rows in groups.items():
        first = next(iter(rows.values()))
        sections.setdefault((first["operation"], first["note"], which), []).append(rows)
    for (operation, note, which), cases in sections.items():
        names = list(dict.fromkeys(name for rows in cases for name in rows))
        base = next((name for name in (LINEAR, "k=1", OURS) if name in names), None)
        ours = next((name for name in names if name == OURS), base)
        against = f", in brackets the ratio to {base}" if base and len(names) > 1 else ""
        yield f"### {operation}{', ' + note if note else ''}: {which}\n"
        yield f"Microseconds{against}. TFLOP/s and what follows are those of {ours}.\n"
        shape = list(next(iter(cases[0].values()))["shape"])
        extra = ["TFLOP/s", "GB/s", "floor us", "of floor", "peak MiB"]
        lines = []
        for rows in cases:
            first, mine = next(iter(rows.values())), rows.get(ours or "", {})
            peak = mine.get("peak_bytes")
            lines.append(
                [str(first["shape"][key]) for key in shape]
                + [_cell(rows, name, base) for name in names]
                + [number(mine.get(key)) for key in ("tflops", "gbps", "floor_us", "fraction")]
                + [number(None if peak is None else peak / 2**20)]
            )
        yield "\n".join(table([*shape, *names, *extra], lines))


def markdown(report: Report) -> str:
    """The report as a page."""
    m, c, v = report["machine"], report["ceilings"], report["versions"]
    dirty = " with uncommitted changes" if report["dirty"] else ""
    out = [
        f"# switch_moe on {m['gpu']}\n",
        f"{report['date']}, commit {report['commit']}{dirty}. Compute capability {m['capability']}, "
        f"{m['multiprocessors']} multiprocessors, {m['memory_bytes'] / 2**30:.0f} GiB, driver {m['driver']}, "
        + ", ".join(f"{name} {version}" for name, version in v.items())
        + f". Backend of expert_linear: {report['backend']}.\n",
        "Ceilings measured here: "
        f"{number(c['bfloat16_tflops'])} TFLOP/s (bfloat16 product), {number(c['float32_tflops'])} TFLOP/s "
        f"(float32 product), {number(c['gbps'], 4)} GB/s (copy, bytes read and written). "
        f"{report['tests']['passed']} tests passed on this GPU. compute-sanitizer: {report['sanitizer']}.\n",
        "Medians over rounds in which the contenders take turns: CUDA graph replays over rotated random "
        "inputs that exceed twice the L2 together (32 sets at most). * waits for the host and ran without a "
        "graph. Forward runs without gradients. The floor is max(FLOPs / rate, bytes / bandwidth), each "
        "input read once, each output written once; TFLOP/s count the FLOPs of merged experts for all. Peak "
        "is the memory beyond the inputs. Before timing, outputs and gradients were compared with float64: "
        f"{report['tolerances']}\n",
        "## Targets\n",
        "Stated for an H200; the worst shape counts.\n",
    ]
    lines = [
        [row["what"], number(row["limit"]), number(row["measured"]), row["where"], row["verdict"]]
        for row in verdicts(report)
    ]
    out += table(["what", "limit", "measured", "where", "verdict"], lines)
    out += ["## Times\n", *_sections(report)]
    failures = [row for row in report["cases"] if row["failure"]]
    if failures:
        out += ["## Failed\n"]
        lines = [[row["case"], row["pass"], row["contender"], row["failure"]] for row in failures]
        out += table(["case", "pass", "contender", "why"], lines)
    missing = [[row["what"], row["reason"]] for row in report["not_measured"]]
    if missing:
        out += ["## Not measured\n", *table(["what", "reason"], missing)]
    return "\n".join(out).replace("\n\n\n", "\n\n")


def plot(report: Report, path: Path) -> None:
    """Ours over F.linear by batch size and D; time over that of k = 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = group(report["cases"])
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for (which, limit), (left, right) in zip(RATIO_LIMITS.items(), panels, strict=True):
        by_size: dict[int, list[tuple[int, float]]] = {}
        by_experts: dict[str, list[tuple[int, float]]] = {}
        for (_, passed), rows in groups.items():
            first = next(iter(rows.values()))
            shape, to_linear = first["shape"], ratio(rows, OURS, LINEAR)
            if passed == which and to_linear is not None and shape["T"] == 256:
                by_size.setdefault(shape["D"], []).append((shape["B"], to_linear))
            if passed == which and first["note"] == ANY_K:
                label = f"D={shape['D']}, M={shape['M']}"
                over_k = [(int(name[2:]), ratio(rows, name, "k=1")) for name in rows]
                by_experts[label] = [(k, value) for k, value in over_k if value is not None]
        for size, points in sorted(by_size.items()):
            left.plot(*zip(*sorted(points), strict=True), marker="o", label=f"D={size}")
        for label, points in by_experts.items():
            if points:
                right.plot(*zip(*points, strict=True), marker="o", label=label)
        left.set(title=f"expert_linear / F.linear, {which}", xlabel="B (T = 256)", xscale="log")
        right.set(title=f"time / time at k = 1, {which}", xlabel="k experts for each sample")
        left.axhline(limit, color="gray", linestyle="--", label=f"target {limit}")
        right.axhline(1.1, color="gray", linestyle="--", label="target 1.1")
        for panel in (left, right):
            panel.set_ylim(bottom=0)
            panel.legend(fontsize=8)
    batches = sorted({row["shape"]["B"] for row in report["cases"] if row["contender"] == LINEAR})
    for panel in panels[:, 0]:
        panel.set_xticks(batches, [str(batch) for batch in batches], minor=False)
        panel.minorticks_off()
    figure.suptitle(f"{report['machine']['gpu']}, commit {report['commit'][:10]}")
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
