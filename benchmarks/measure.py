"""Measures a case in a pytest-benchmark test: checks every contender, then times those that are right."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import pytest
import torch

from benchmarks import counts
from benchmarks.case import BOTH, COMPILED, OURS, Case, Contender, Inputs
from benchmarks.conftest import Recorder
from benchmarks.timing import Turns

Name = TypeVar("Name", bound=Hashable)


class Measured(NamedTuple):
    """A pass of a case on a device: what a test measures."""

    group: str
    case: Case
    which: str
    device: str

    def __str__(self) -> str:
        dtype = str(self.case.dtype).removeprefix("torch.")
        return f"{self.case.name}, {dtype}, {self.which}, {self.device}".replace("[", "").replace("]", "")


def measure(measured: Measured, benchmark: Any, recorder: Recorder) -> None:
    """Checks, times in turns and records all contenders of a case; pytest-benchmark times ours."""
    measure_together([measured], benchmark, recorder)


def measure_together(several: list[Measured], benchmark: Any, recorder: Recorder) -> None:
    """:func:`measure` of cases of a group that take turns with one another: their times compare."""
    steps: dict[tuple[int, str], Callable[[], Any]] = {}
    inputs = [one.case.make(0) for one in several]
    found = []
    for number, one in enumerate(several):
        found.append(recorder.check(one.case, inputs[number]))
        right = [c for c in one.case.contenders if not found[number][c.name]["failure"]]
        for contender in right:
            steps[number, contender.name] = one.case.step(contender, inputs[number], one.which)
    wrong = [
        f"{one.case.name}, {contender.name}: {found[number][contender.name]['failure']}"
        for number, one in enumerate(several)
        for contender in one.case.contenders
        if contender.ours and (number, contender.name) not in steps
    ]
    samples: dict[tuple[int, str], list[float]] = {}
    if not wrong:
        benchmark.group = several[0].group
        ours = (len(several) - 1, case_ours(several[-1].case))
        device, seconds = several[0].device, recorder.seconds * len(several)
        samples = time_with(benchmark, steps, ours, seconds, device, least=recorder.least)
    for number, one in enumerate(several):
        for contender in one.case.contenders:
            times = samples.get((number, contender.name), [])
            record(one, contender, inputs[number], times, found[number][contender.name], recorder)
        if any(contender.name == COMPILED for contender in one.case.contenders):
            torch.compiler.reset()  # dynamo compiles one function for a few shapes only
    if wrong:
        pytest.fail("nothing is timed: " + "; ".join(wrong))


def record(
    measured: Measured, contender: Contender, inputs: Inputs, seconds: list[float], found: dict[str, Any],
    recorder: Recorder,
) -> None:  # fmt: skip
    """Adds a row."""
    group, case, which, device = measured
    times = [1e6 * second for second in seconds]
    recorder.add(
        group=group, case=case.name, note=case.note, shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."), device=device, contender=contender.name,
        ours=contender.ours, samples=[round(t, 3) for t in times],
        microseconds=round(statistics.median(times), 3) if times else None,
        flops=case.flops * (3 if which == BOTH else 1), **{"pass": which}, **found,
        **memory(case, contender, inputs, which, device, bool(times)),
    )  # fmt: skip


def case_ours(case: Case) -> str:
    """The contender that pytest-benchmark times: ours, or the first of ours."""
    names = [contender.name for contender in case.contenders if contender.ours]
    return OURS if OURS in names else names[0]


def time_with(
    benchmark: Any,
    steps: dict[Name, Callable[[], Any]],
    ours: Name,
    seconds: float,
    device: str,
    least: int = 5,
) -> dict[Name, list[float]]:
    """Seconds of each step in turns: pytest-benchmark calls ours, and before it the others have theirs, in
    another order every time, for what ran before leaves its caches.
    """
    turns = Turns(steps, seconds, least, device=device)
    names = [name for name in steps if name != ours]
    shuffle = random.Random(0).shuffle

    def others() -> None:
        shuffle(names)
        for name in names:
            turns.sample(name)
        turns.warm_up(ours)

    def step() -> None:
        steps[ours]()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, setup=others, rounds=turns.rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return {}
    turns.samples[ours] = list(benchmark.stats.stats.data)
    return turns.samples


def memory(
    case: Case, contender: Contender, inputs: Inputs, which: str, device: str, timed: bool
) -> dict[str, int | None]:
    """Bytes kept for the backward, and the most held beyond the inputs."""
    if not timed:
        return {"saved_bytes": None, "peak_bytes": None}
    step = case.step(contender, inputs, which)
    parameters = [inputs[name] for name in contender.leaves if "weight" in name or "bias" in name]
    saved = None

    def counted() -> None:
        nonlocal saved
        saved = counts.saved_bytes(step, parameters)

    peak = counts.peak_bytes(counted if which == BOTH else step, device)
    return {"saved_bytes": saved, "peak_bytes": peak}
