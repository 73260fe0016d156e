"""Reads what ``pytest benchmarks --results FILE`` writes, and sorts its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
Report = dict[str, Any]
Contenders = dict[str, Row]  # the rows of one case by contender

FORMAT = 1
REPORT_KEYS = {"machine": dict, "versions": dict, "commit": str, "date": str, "rows": list}
ROW_KEYS = ("group", "case", "note", "shape", "dtype", "device", "pass", "contender", "ours", "microseconds",
            "samples", "failure")  # fmt: skip


class BadFile(ValueError):
    """A result file that cannot be used; the message is one line, and names the file."""


class Turn(NamedTuple):
    """What the contenders measured in the same rounds have in common."""

    group: str
    case: str
    dtype: str
    device: str
    which: str  # the pass

    @property
    def label(self) -> str:
        """The case without the name of its group."""
        return self.case.removeprefix(self.group).strip() or self.case


def parse(path: Path) -> Any:
    """The JSON in a file."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadFile(f"{path}: not JSON: {error}") from None


def read(path: Path) -> Report:
    """The report in a result file; BadFile says what is wrong with it."""
    report = parse(path)
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        found = report.get("format") if isinstance(report, dict) else type(report).__name__
        raise BadFile(f"{path}: format is {found!r}; it must be {FORMAT} (pytest benchmarks --results FILE)")
    for key, kind in REPORT_KEYS.items():
        if not isinstance(report.get(key), kind):
            raise BadFile(f"{path}: {key} is {report.get(key)!r:.60}; it must be a {kind.__name__}")
    seen: set[tuple[Turn, str]] = set()
    for number, row in enumerate(report["rows"]):
        wrong = _wrong(row)
        if wrong:
            raise BadFile(f"{path}: row {number}: {wrong}")
        key = (turn(row), row["contender"])
        if key in seen:
            raise BadFile(f"{path}: row {number}: {row['case']}, {row['contender']} is there twice")
        seen.add(key)
    return report


def _wrong(row: Any) -> str | None:
    """Why a row cannot be used."""
    if not isinstance(row, dict):
        return f"is {row!r:.60}; it must be a dict"
    missing = [key for key in ROW_KEYS if key not in row]
    if missing:
        return f"has no {missing[0]!r}"
    if not isinstance(row["shape"], dict):
        return f"shape is {row['shape']!r:.60}; it must be a dict"
    times = [row["microseconds"]] if row["microseconds"] is not None else []
    if not isinstance(row["samples"] or [], list):
        return f"samples is {row['samples']!r:.60}; it must be a list"
    for time in (*times, *(row["samples"] or [])):
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 < time < math.inf:
            return f"has a time of {time!r:.60}; it must be a number above 0"
    return None


def turn(row: Row) -> Turn:
    return Turn(row["group"], row["case"], row["dtype"], row["device"], row["pass"])


def turns(rows: Iterable[Row]) -> dict[Turn, Contenders]:
    """The rows measured in the same rounds together, by contender, in the order of the file."""
    found: dict[Turn, Contenders] = {}
    for row in rows:
        found.setdefault(turn(row), {})[row["contender"]] = row
    return found


def ratio(contenders: Contenders, above: str, below: str) -> float | None:
    """Median time of ``above`` over that of ``below``, where both were measured."""
    times = [contenders.get(name, {}).get("microseconds") for name in (above, below)]
    return times[0] / times[1] if all(times) else None
