"""Time of steps on a CUDA device: graph replays over rotated inputs, the steps taking turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Step = Callable[[], Any]

ROUNDS = 25  # samples of each contender
ROUND_MILLISECONDS = 2.0  # a sample's least length: the resolution of events and gaps vanish in it
MOST_SETS = 32


class Timing(NamedTuple):
    """Microseconds of one call, a number for each round; method is 'graph' or 'eager'."""

    method: str
    samples: list[float]

    def median(self) -> float:
        return statistics.median(self.samples)

    def quartiles(self) -> list[float]:
        first, _, third = statistics.quantiles(self.samples, n=4)
        return [first, third]


class _Ready(NamedTuple):
    method: str
    run: Step  # every input set once
    repeats: int  # of run in a sample
    calls: int  # of the step in a sample


def input_sets(set_bytes: int, cache_bytes: int) -> int:
    """How many input sets exceed twice the cache together: 2 to MOST_SETS."""
    return max(2, min(MOST_SETS, 2 * cache_bytes // max(set_bytes, 1) + 1))


def time_steps(contenders: dict[str, list[Step]], rounds: int = ROUNDS) -> dict[str, Timing | Exception]:
    """Times each contender's steps, one for each input set, or says what they raised.

    A contender is captured in a CUDA graph unless it waits for the host; such a one runs as it is ('eager').
    The contenders take turns round by round, so that a drift of the clocks hits all alike.
    """
    found: dict[str, Timing | Exception] = {}
    ready: dict[str, _Ready] = {}
    for name, steps in contenders.items():
        stream = torch.cuda.Stream()  # of its own: a capture that fails may leave its stream unusable
        try:
            ready[name] = _prepare(steps, stream)
        except Exception as error:  # handed back: one contender must not end the others
            found[name] = error.with_traceback(None)  # whose frames would keep memory
        torch.cuda.synchronize()  # raises where the device itself failed: nothing can go on then
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (_, run, repeats, calls) in ready.items():
            samples[name].append(1000 * _milliseconds(run, repeats) / calls)
    return found | {name: Timing(ready[name].method, values) for name, values in samples.items()}


def _prepare(steps: list[Step], stream: torch.cuda.Stream) -> _Ready:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:  # warm-up: compiles, loads, allocates
            step()
        eager = waits_for_host(steps[0])
    if eager:
        method, run = "eager", lambda: [step() for step in steps]
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for step in steps:
                step()
        method, run = "graph", graph.replay
    torch.cuda.synchronize()
    run()
    repeats = max(1, math.ceil(ROUND_MILLISECONDS / max(_milliseconds(run, 1), 1e-3)))
    return _Ready(method, run, repeats, repeats * len(steps))


def _milliseconds(run: Step, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def waits_for_host(step: Step) -> bool:
    """Whether ``step`` makes the host wait for the device; such a step cannot be captured."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def ceilings() -> dict[str, float]:
    """What this device reaches: TFLOP/s of large products by type, GB/s (read and write) of a copy."""
    steps: dict[str, list[Step]] = {}
    sizes = {"bfloat16": 8192, "float32": 4096}
    for name, n in sizes.items():
        a, b = (torch.randn(n, n, device="cuda").to(getattr(torch, name)) for _ in range(2))
        steps[name] = [lambda a=a, b=b: a @ b] * 2
    count = min(2 << 30, torch.cuda.get_device_properties(0).total_memory // 16) // 4
    source = torch.randn(count, device="cuda")
    target = torch.empty_like(source)
    steps["copy"] = [lambda: target.copy_(source)] * 2
    found = {}
    for name, timing in time_steps(steps).items():
        if isinstance(timing, Exception):
            raise timing
        seconds = timing.median() / 1e6
        if name == "copy":
            found["gbps"] = 2 * 4 * count / seconds / 1e9
        else:
            found[f"{name}_tflops"] = 2 * sizes[name] ** 3 / seconds / 1e12
    return found


def machine() -> dict[str, Any]:
    """The device, and what limits it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }
