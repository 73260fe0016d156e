"""linear_assignment against scipy, and the matching around it against the official way, at the sizes of S, L
and XL.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.case import Case
from benchmarks.cases import assignment_case, matching_case
from benchmarks.measure import measure


def cases(device: str, quick: bool) -> Iterator[tuple[str, Case]]:
    for rows in (36, 84) if quick else (36, 84, 300, 1024):
        yield "assignment", assignment_case(device, rows)
    for routing in ("smooth",) if quick else ("fresh", "smooth", "random"):
        for depth in (12, 24, 28):
            yield "assignment", matching_case(device, depth, 0, routing, loss=False)


def test_linear_assignment(benchmark, recorder, measured) -> None:
    measure(measured, benchmark, recorder)
