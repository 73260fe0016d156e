"""The diffusion prior: matching, loss and gradient."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.case import Case
from benchmarks.cases import matching_case
from benchmarks.measure import measure


def cases(device: str, quick: bool) -> Iterator[tuple[str, Case]]:
    for depth in (12,) if quick else (12, 24, 28):
        yield "prior", matching_case(device, depth, 256, "smooth")


def test_diffusion_prior(benchmark, recorder, measured) -> None:
    measure(measured, benchmark, recorder)
