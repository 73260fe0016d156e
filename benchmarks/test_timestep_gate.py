"""timestep_gate: the routing of all blocks in one call, of all timesteps and a batch."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.case import Case
from benchmarks.cases import gate_case
from benchmarks.measure import measure


def cases(device: str, quick: bool) -> Iterator[tuple[str, Case]]:
    for depth, size in ((12, 384), (28, 1152))[: 1 if quick else None]:
        yield "gate", gate_case(device, 1000 + 128, size, depth)


def test_timestep_gate(benchmark, recorder, measured) -> None:
    measure(measured, benchmark, recorder)
