"""Options of the benchmarks, and the fixture that checks, times and records what a case compares.

    pytest benchmarks --benchmark-json=FILE

A test is one line of a table: one case, one pass, all contenders. What they took goes to
``extra_info["rows"]`` of pytest-benchmark's JSON, a row for each contender; sample i of all rows of a test is
from the same round.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import counts, measured
from benchmarks.case import BOTH, COMPILED, SWITCH_MOE, Case, check, describe
from benchmarks.environment import DEVICE, ROOT, measures_cuda_kernels
from benchmarks.environment import describe as describe_machine
from benchmarks.peers import parse_peer_path, peer_states
from benchmarks.timing import Call, Timed, input_sets, time_together
from switch_moe import native

STARTED, LEFT_OUT = pytest.StashKey[float](), pytest.StashKey[list[str]]()
# At the end of the path: packages that are installed come before the folders here.
sys.path += [str(Path(__file__).resolve().parent.parent / name) for name in ("models", "tests")]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("switch_moe")
    group.addoption("--quick", action="store_true", help="few shapes and rounds: about a minute on two cores")
    group.addoption("--device", choices=("cpu", "cuda"), default=DEVICE, help=f"{DEVICE} by default")
    group.addoption(
        "--peer-path", action="append", default=[], metavar="NAME=DIR",
        help="a clone of another library, for example official=../Switch-DiT; may be given several times",
    )  # fmt: skip
    group.addoption("--seconds", type=float, help="leave out the cases that have not begun by then")
    group.addoption(
        "--machine-info", type=Path, metavar="FILE", help="JSON to add to what describes the machine"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED], config.stash[LEFT_OUT] = time.monotonic(), []
    if config.getoption("--device") == "cpu" and native.cpu.reason is not None:
        raise pytest.UsageError(f"plain PyTorch would be timed: {native.cpu.reason}")
    try:
        for text in config.getoption("--peer-path"):
            parse_peer_path(text)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case`` and ``which``: the passes of ``cases(device, quick)`` of the module."""
    if {"case", "which"} <= set(metafunc.fixturenames):
        device, quick = (metafunc.config.getoption(option) for option in ("--device", "--quick"))
        both = [(case, which) for case in metafunc.module.cases(device, quick) for which in case.passes]
        ids = [f"{case}, {which}".replace("[", "").replace("]", "") for case, which in both]
        metafunc.parametrize(("case", "which"), both, ids=ids)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Replaces pytest-benchmark's description of the machine; adds what the options say."""
    machine_info.clear()
    machine_info |= describe_machine(config.getoption("--device"))
    machine_info |= {"quick": config.getoption("--quick"), "peers": peer_states()}
    if config.getoption("--device") == "cuda" and measures_cuda_kernels():
        machine_info["cuda_kernels"] = measured.kernels(ROOT)
    if file := config.getoption("--machine-info"):
        machine_info |= json.loads(file.read_text())
    if config.stash[LEFT_OUT]:
        machine_info["left_out"] = config.stash[LEFT_OUT]


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leaves out what the rows hold already, and objects that are no numbers."""
    for one in output_json["benchmarks"]:
        for key in ("params", "param", "options"):
            del one[key]
        one["stats"] = {key: one["stats"][key] for key in ("median", "iqr", "rounds")}


def pytest_unconfigure(config: pytest.Config) -> None:
    """Puts each row of the JSON on a line of its own: a line for each sample makes it three times as long."""
    path = config.getoption("benchmark_json", None)
    if isinstance(path, Path) and path.exists():
        text = json.dumps(json.loads(path.read_text()))
        for start in ('{"group": ', '{"operation": '):
            text = text.replace(start, "\n" + start)
        path.write_text(text + "\n")


class Bench:
    """What a benchmark does: check every contender, time in turns those that are right, record all."""

    def __init__(self, benchmark: Any, config: pytest.Config) -> None:
        self.benchmark = benchmark
        self.quick: bool = config.getoption("--quick")
        self.device: str = config.getoption("--device")

    def measure(self, cases: Case | list[Case], which: str) -> None:
        """One pass of a case, or of several that take turns with one another."""
        cases = cases if isinstance(cases, list) else [cases]
        calls: dict[tuple[int, str], list[Call]] = {}
        rows: dict[tuple[int, str], dict[str, Any]] = {}
        for number, case in enumerate(cases):
            first, memo = case.make(0), {}
            smallest = min(sum(first[n].nbytes for n in (*c.leaves, *c.reads)) for c in case.contenders)
            sets = [first, *(case.make(seed) for seed in range(1, input_sets(smallest, self.device)))]
            for contender in case.contenders:
                key = number, contender.name
                rows[key] = {
                    "operation": case.operation, "note": case.note, "shape": case.shape,
                    "dtype": str(case.dtype).removeprefix("torch."), "device": self.device, "pass": which,
                    "contender": contender.name, "is_switch_moe": contender.is_switch_moe,
                    **check(case, contender, first, (which,), memo),
                }  # fmt: skip
                if rows[key]["failure"] is None:
                    calls[key] = [case.call(contender, inputs, which) for inputs in sets]
                    weights = [first[name] for name in contender.leaves if "weight" in name or "bias" in name]
                    rows[key] |= memory(calls[key][0], weights, which, self.device)
        if not any(row["failure"] and row["is_switch_moe"] for row in rows.values()):
            for key, timed in self.time(calls, seconds=3.0 * len(cases)).items():
                rows[key] |= describe_time(timed)
        self.record(cases[0].operation, list(rows.values()))
        if any(case.contenders[-1].name == COMPILED for case in cases):
            torch.compiler.reset()  # dynamo compiles one function for a few shapes only

    def time(
        self, calls: dict[Any, list[Call]], seconds: float = 3.0, graphs: bool = True
    ) -> dict[Any, Timed | Exception]:
        """:func:`benchmarks.timing.time_together`, shorter in a quick run, empty if it is disabled."""
        if self.benchmark.disabled:
            return {}
        seconds, least = (0.1 * seconds, 3) if self.quick else (seconds, 7)
        return time_together(calls, self.device, seconds, least, graphs)

    def record(self, group: str, rows: list[dict[str, Any]]) -> None:
        """Hands the rows to pytest-benchmark, whose own table shows the last row of switch_moe. Fails the
        test, and reports no time, where a result of switch_moe is wrong.
        """
        self.benchmark._mode = "turns"  # else pytest-benchmark warns that nobody used its fixture
        wrong = [
            f"{row['contender']} {row['shape']}: {row['failure']}"
            for row in rows
            if row["failure"] and row.get("is_switch_moe", row["contender"] == SWITCH_MOE)
        ]
        if wrong:
            pytest.fail("nothing is timed: " + "; ".join(wrong), pytrace=False)
        samples = [row["samples"] for row in rows if row["contender"] == SWITCH_MOE and row.get("samples")]
        if not samples:
            return
        self.benchmark.group = group
        self.benchmark.extra_info["rows"] = rows
        stats = self.benchmark._make_stats(1)  # there is no public way to record times taken elsewhere
        for microseconds in samples[-1]:
            stats.update(microseconds / 1e6)


@pytest.fixture
def bench(benchmark: Any, pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Bench:
    seconds = pytestconfig.getoption("--seconds")
    if seconds is not None and time.monotonic() - pytestconfig.stash[STARTED] > seconds:
        pytestconfig.stash[LEFT_OUT].append(request.node.name)
        pytest.skip(f"not begun after {seconds:.0f} s")
    return Bench(benchmark, pytestconfig)


def describe_time(timed: Timed | Exception) -> dict[str, Any]:
    """The part of a row about its time: microseconds of each round, to five digits."""
    if isinstance(timed, Exception):
        return {"failure": describe(timed)}
    found = {"method": timed.method, "samples": microseconds(timed.seconds)}
    return found | ({"eager": microseconds(timed.eager)} if timed.eager else {})


def microseconds(seconds: Sequence[float]) -> list[float]:
    return [float(f"{1e6 * second:.5g}") for second in seconds]


def memory(call: Call, parameters: list[torch.Tensor], which: str, device: str) -> dict[str, int]:
    """Bytes that autograd keeps for the backward, and the most held beyond the inputs."""
    found = {"peak_bytes": counts.peak_bytes(call, device)}
    if which == BOTH:
        found["saved_bytes"] = counts.saved_bytes(call, parameters)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A line for each contender: its time as a multiple of switch_moe's, taken round by round."""
    session = getattr(config, "_benchmarksession", None)
    rows = [row for one in getattr(session, "benchmarks", []) for row in one.extra_info.get("rows", [])]
    if rows:
        from benchmarks.report import text_table

        terminalreporter.section("median times, and multiples of switch_moe's")
        terminalreporter.write(text_table(rows))
