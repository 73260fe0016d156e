"""Side-by-side timing: the contenders take turns, so that drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], Any]

SHORT = 1e-3  # seconds; a step below it finds the caches that the contender before it left: it is warmed up


def wait(device: str) -> None:
    """Waits for the device, where it runs on its own."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Step, device: str = "cpu", repeats: int = 1) -> float:
    """Seconds of one call."""
    wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    wait(device)
    return (time.perf_counter() - started) / repeats


class Turns:
    """Calls contenders in turn.

    Args:
        steps: by name. seconds: time for all rounds, in all. least, most: rounds.
    """

    def __init__(
        self, steps: dict[str, Step], seconds: float, least: int = 5, most: int = 101, device: str = "cpu"
    ) -> None:
        self.steps, self.device = steps, device
        once = {name: self.least_seconds(step) for name, step in steps.items()}
        self.warm = {name: took < SHORT for name, took in once.items()}
        a_round = sum(took * (1 + self.warm[name]) for name, took in once.items())
        self.rounds = int(min(most, max(least, seconds / max(a_round, 1e-9))))
        self.samples: dict[str, list[float]] = {name: [] for name in steps}

    def least_seconds(self, step: Step) -> float:
        """Of a call after the first: of three if they are short, for one may free what another step left."""
        step()
        took = seconds_of(step, self.device)
        return took if took > 20 * SHORT else min(took, *(seconds_of(step, self.device) for _ in range(2)))

    def sample(self, name: str) -> None:
        """One more sample of a contender."""
        self.warm_up(name)
        self.samples[name].append(seconds_of(self.steps[name], self.device))

    def warm_up(self, name: str) -> None:
        """The untimed call before a timed one, of a short step."""
        if self.warm[name]:
            self.steps[name]()

    def run(self) -> dict[str, list[float]]:
        """Seconds of each contender: sample i of all of them is from round i."""
        for _ in range(self.rounds):
            for name in self.steps:
                self.sample(name)
        return self.samples


def interleaved_medians(steps: dict[str, Step], rounds: int = 15) -> dict[str, float]:
    """Median seconds of each step over ``rounds`` turns."""
    samples = Turns(steps, 0.0, least=rounds, most=rounds).run()
    return {name: statistics.median(values) for name, values in samples.items()}
