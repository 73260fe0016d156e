"""The time of several calls on one device, taken in turns, so that a drift of the machine hits all alike.

round 0    A B C        The order changes from round to round, since a call leaves its data in the caches.
round 1    B A C        Sample i of every contender is from round i, so ratios are taken within a round.
round 2    C A B        On a CPU a sample is one call (or the mean of many short ones); on a GPU it is the
                        replay of a CUDA graph that runs the call on several input sets in a row, which
                        together exceed the L2 cache twice. The same calls without the graph are timed in
                        the same turn: where a kernel is short they take as long as the host needs for them.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)

SAMPLE_SECONDS = 2e-3  # shortest sample: the resolution of clocks and events, and gaps, vanish in it
MOST_ROUNDS = 15
MOST_SETS = 32


class Timed(NamedTuple):
    """Seconds of one call, a number for each round; method is 'call', 'graph' or, on a GPU, 'eager'.

    ``eager`` has those of the same calls without a graph, where ``seconds`` are with one.
    """

    method: str
    seconds: list[float]
    eager: Sequence[float] = ()


def time_together(
    calls: dict[Name, list[Call]], device: str, seconds: float = 3.0, least: int = 7, graphs: bool = True
) -> dict[Name, Timed | Exception]:
    """Times contenders in turns, for about ``seconds`` and at least ``least`` rounds.

    Args:
        calls: for each contender the same call on different inputs; a CPU takes the first only.
        graphs: whether a GPU may capture the calls. A call that makes the host wait is never captured.

    A contender that raises is handed back with its exception, so that it does not end the others.
    """
    found: dict[Name, Timed | Exception] = {}
    samplers: dict[Name, Sampler] = {}
    for name, each in calls.items():
        try:
            samplers[name] = sampler(each, device, graphs)
        except Exception as error:
            found[name] = error.with_traceback(None)  # the frames of a traceback would keep memory
        wait(device)  # raises where the device itself failed: nothing can go on then
    a_round = sum(one.cost for one in samplers.values())
    rounds = int(min(MOST_ROUNDS, max(least, seconds / max(a_round, 1e-9))))
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    eager: dict[Name, list[float]] = {name: [] for name in samplers}
    order, shuffle = list(samplers), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name].sample())
            eager[name] += samplers[name].sample_eager()
    return found | {name: Timed(one.method, samples[name], eager[name]) for name, one in samplers.items()}


def wait(device: str) -> None:
    """Waits for the device, where it runs on its own."""
    if device == "cuda":
        torch.cuda.synchronize()


def sampler(calls: list[Call], device: str, graphs: bool = True) -> Sampler:
    """What takes one sample of a contender, ready to do so."""
    return GpuSampler(calls, graphs) if device == "cuda" else Sampler(calls[0])


class Sampler:
    """Samples on a CPU. ``cost``: seconds that one sample takes in all."""

    method = "call"

    def __init__(self, call: Call) -> None:
        self.call = call
        call()  # compiles, allocates
        self.repeats = 1
        once = self._seconds()
        if once < 10 * SAMPLE_SECONDS:  # it may have paid for what another contender left
            once = min(once, self._seconds(), self._seconds())
        self.repeats = max(1, math.ceil(SAMPLE_SECONDS / once))
        self.cost = once * (self.repeats + (self.repeats > 1))

    def sample(self) -> float:
        """Seconds of one call."""
        if self.repeats > 1:
            self.call()  # a short call would be timed with the caches that the contender before it left
        return self._seconds()

    def sample_eager(self) -> list[float]:
        """Seconds of one call without the graph; nothing where :meth:`sample` has none either."""
        return []

    def _seconds(self) -> float:
        started = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        return (time.perf_counter() - started) / self.repeats


class GpuSampler(Sampler):
    """Samples on a GPU: events around graph replays and, apart, around plain calls; around plain calls alone
    where no graph can be captured.
    """

    def __init__(self, calls: list[Call], graphs: bool) -> None:
        self.calls = calls
        stream = torch.cuda.Stream()  # a capture that fails may leave its stream unusable: each has its own
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.call_all()  # compiles, loads, allocates
            captured = graphs and not waits_for_host(calls[0])
        self.method, self.run = "eager", self.call_all
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.call_all()
            self.method, self.run = "graph", graph.replay
        self.repeats, self.cost = self._settle(self.run)
        self.eager_repeats = 0
        if captured:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):  # the graph keeps its memory
                self.eager_repeats, cost = self._settle(self.call_all)
                self.cost += cost

    def call_all(self) -> None:
        for call in self.calls:
            call()

    def sample(self) -> float:
        return self._seconds_of(self.run, self.repeats)

    def sample_eager(self) -> list[float]:
        return [self._seconds_of(self.call_all, self.eager_repeats)] if self.eager_repeats else []

    def _settle(self, run: Callable[[], None]) -> tuple[int, float]:
        """How often a sample runs the calls, and the seconds that it takes."""
        torch.cuda.synchronize()
        run()
        once = self._seconds_of(run, 1) * len(self.calls)
        repeats = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-6)))
        return repeats, once * repeats

    def _seconds_of(self, run: Callable[[], None], repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats / len(self.calls)


def waits_for_host(call: Call) -> bool:
    """Whether ``call`` makes the host wait for the GPU; such a call cannot be captured."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def input_sets(set_bytes: int, device: str) -> int:
    """How many input sets exceed twice the L2 cache of a GPU together: 2 to MOST_SETS; one on a CPU."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MOST_SETS, 2 * cache // max(set_bytes, 1) + 1))
