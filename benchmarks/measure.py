"""Measures a case in a pytest-benchmark test: checks every contender, then times those that are right."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import counts
from benchmarks.case import BOTH, COMPILED, OURS, Case, Contender, Inputs
from benchmarks.conftest import Recorder
from benchmarks.timing import Turns


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
    group, case, which, device = measured
    inputs = case.make(0)
    found = {contender.name: recorder.check(case, contender, inputs) for contender in case.contenders}
    right = [contender for contender in case.contenders if not found[contender.name]["failure"]]
    wrong = [
        f"{contender.name}: {found[contender.name]['failure']}"
        for contender in case.contenders
        if contender.ours and contender not in right
    ]
    samples: dict[str, list[float]] = {}
    if not wrong:
        steps = {contender.name: case.step(contender, inputs, which) for contender in right}
        benchmark.group = group
        samples = time_with(benchmark, steps, case_ours(case), recorder.seconds, device)
    for contender in case.contenders:
        times = [1e6 * seconds for seconds in samples.get(contender.name, [])]
        recorder.add(
            group=group, case=case.name, note=case.note, shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."), device=device, contender=contender.name,
            ours=contender.ours, samples=[round(t, 3) for t in times],
            microseconds=round(statistics.median(times), 3) if times else None,
            flops=case.flops * (3 if which == BOTH else 1), **{"pass": which}, **found[contender.name],
            **memory(case, contender, inputs, which, device, bool(times)),
        )  # fmt: skip
    if any(contender.name == COMPILED for contender in case.contenders):
        torch.compiler.reset()  # dynamo compiles one function for a few shapes only
    if wrong:
        pytest.fail("nothing is timed: " + "; ".join(wrong))


def case_ours(case: Case) -> str:
    """The contender that pytest-benchmark times: ours, or the first of ours."""
    names = [contender.name for contender in case.contenders if contender.ours]
    return OURS if OURS in names else names[0]


def time_with(
    benchmark: Any, steps: dict[str, Callable[[], Any]], ours: str, seconds: float, device: str
) -> dict[str, list[float]]:
    """Seconds of each step in turns: pytest-benchmark calls ours, and before it the others have theirs."""
    turns = Turns(steps, seconds, device=device)

    def others() -> None:
        for name in steps:
            if name != ours:
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
    saved = counts.saved_bytes(step, parameters) if which == BOTH else None
    return {"saved_bytes": saved, "peak_bytes": counts.peak_bytes(step, device)}
