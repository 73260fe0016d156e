"""`make gpu` where there is no GPU: what it runs, that a step that fails ends it, and how calls are timed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import assembler, environment, gpu, timing
from benchmarks.assembler import Assembler

OWN, SECOND = Assembler("/own", (12, 8, 93)), Assembler("/second", (13, 1, 80))


XML = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"><properties/></testcase>
<testcase classname="tests.test_a.TestClass" name="two"><system-out>said</system-out></testcase>
<testcase classname="tests.test_a" name="three"><skipped message="needs two GPUs"/></testcase>
<testcase classname="tests.test_b" name="four"><failure message="wrong"/></testcase>
</testsuite></testsuites>"""


class Commands:
    """Takes the place of subprocess.run: records commands, and fails at the one that has ``fail`` in it."""

    def __init__(self, fail: str | None = None) -> None:
        self.fail, self.commands, self.variables = fail, [], []

    def __call__(self, command: list[str], timeout: float, env: dict, **_: object) -> SimpleNamespace:
        self.commands.append(command)
        self.variables.append(env)
        if self.fail == "late" and "tests" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        failed = self.fail in command
        options = dict(argument.split("=", 1) for argument in command if "=" in argument)
        if "--junitxml" in options and not failed:
            Path(options["--junitxml"]).write_text(XML)
        if "benchmarks.calibrate" in command and not failed:
            Path(command[-1]).write_text(json.dumps({"copies": {"tb_s_from_l2": 5.5}}))
        if "--benchmark-json" in options and not failed:
            Path(options["--benchmark-json"]).write_text(Path(options["--machine-info"]).read_text())
        return SimpleNamespace(returncode=int(failed))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that looks as if it had a GPU and two assemblers; the folder of its results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "describe", lambda _: {"gpu": "Made Up 100"})
    monkeypatch.setattr(assembler, "pair", lambda _: (OWN, SECOND, "TRITON_PTXAS_PATH"))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    return tmp_path


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "GPU" in capsys.readouterr().err


def test_all_steps_in_order(machine: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    commands = Commands()
    monkeypatch.setattr(gpu.subprocess, "run", commands)
    assert gpu.main(["--output", str(machine), "--", "--peer-path", "official=x"]) == 0
    build, of_cuda, test, again, calibrate, measure, report = commands.commands
    assert build[:4] == [sys.executable, "-m", "pip", "install"]
    assert commands.variables[0]["SWITCH_MOE_CUDA_ARCHS"] == "90a"
    assert "tests/test_expert_linear_hopper.py" in of_cuda
    assert "tests" in test
    assert "--ignore=tests/test_expert_linear_hopper.py" in test
    assert of_cuda[: len(gpu.TESTS)] == test[: len(gpu.TESTS)] == again[: len(gpu.TESTS)] == gpu.TESTS
    assert "TRITON_PTXAS_PATH" not in commands.variables[2]
    assert "tests/test_expert_linear_kernels.py" in again
    assert commands.variables[3]["TRITON_PTXAS_PATH"] == "/second"
    assert commands.variables[3]["TRITON_CACHE_DIR"] != os.environ.get("TRITON_CACHE_DIR")
    assert "benchmarks.calibrate" in calibrate
    assert measure[-2:] == ["--peer-path", "official=x"]
    assert commands.variables[5]["SWITCH_MOE_MEASURE_CUDA"] == "1"
    assert report[-1] == "benchmarks.report"
    result = json.loads((machine / "made-up-100.json").read_text())
    assert result["calibration"] == {"copies": {"tb_s_from_l2": 5.5}}
    assert result["tests"] == {"tests.test_a": {"passed": 2, "skipped": 1}, "tests.test_b": {"failure": 1}}
    assert [path.name for path in machine.iterdir()] == ["made-up-100.json"]
    said = capsys.readouterr().out
    assert all(f"gpu: {step} took" in said for step in gpu.SHARES if step != "sanitizer")


@pytest.mark.parametrize(
    ("fail", "steps"),
    [("pip", 1), ("tests", 3), ("late", 3), ("tests/test_dispatch.py", 4), ("benchmarks.calibrate", 5),
     ("benchmarks/test_layer.py", 6)],
)  # fmt: skip
def test_a_failed_step_keeps_earlier_results(
    machine: Path, monkeypatch: pytest.MonkeyPatch, fail: str, steps: int
) -> None:
    commands = Commands(fail)
    monkeypatch.setattr(gpu.subprocess, "run", commands)
    earlier = machine / "made-up-100.json"
    earlier.write_text("earlier")
    assert gpu.main(["--output", str(machine)]) == 1
    assert len(commands.commands) == steps
    assert earlier.read_text() == "earlier"
    assert [path.name for path in machine.iterdir()] == ["made-up-100.json"]


@pytest.mark.parametrize("how", ["wrong", "late"])
def test_failed_cuda_kernels_are_left_out(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys, how: str
) -> None:
    """Triton's kernels stand beside them, and are measured all the same; so it is where they hang."""
    file = "tests/test_expert_linear_hopper.py"
    commands = Commands(file)

    def late(command: list[str], **options: object) -> SimpleNamespace:
        done = commands(command, **options)
        if done.returncode:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return done

    monkeypatch.setattr(gpu.subprocess, "run", commands if how == "wrong" else late)
    monkeypatch.setattr(assembler, "cuda_tool", lambda name: name)
    assert gpu.main(["--output", str(machine), "--sanitize"]) == 1
    *_, memcheck, racecheck, _, _, _ = commands.commands
    assert "tests/test_dispatch.py" in memcheck
    assert file not in memcheck + racecheck
    assert commands.variables[-2]["SWITCH_MOE_MEASURE_CUDA"] == "0"
    assert "tests.test_a" in json.loads((machine / "made-up-100.json").read_text())["tests"]
    said = capsys.readouterr().err
    assert "the tests of the CUDA kernels" in said
    assert "the CUDA kernels failed their tests; no speed of theirs is reported" in said


def test_what_is_measured_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "device_reason", lambda device: None)
    assert environment.measures_cuda_kernels()
    monkeypatch.setenv("SWITCH_MOE_MEASURE_CUDA", "0")
    assert not environment.measures_cuda_kernels()
    monkeypatch.delenv("SWITCH_MOE_MEASURE_CUDA")
    monkeypatch.setattr(environment, "device_reason", lambda device: "there are none")
    assert not environment.measures_cuda_kernels()


def test_without_another_assembler(machine: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    commands = Commands()
    monkeypatch.setattr(gpu.subprocess, "run", commands)
    monkeypatch.setattr(assembler, "pair", lambda _: (OWN, None, "TRITON_PTXAS_PATH"))
    assert gpu.main(["--output", str(machine), "--no-build", "--no-calibration"]) == 0
    assert len(commands.commands) == 4
    assert "ptxas 12.8.93 is the only one" in capsys.readouterr().out


def test_shares_are_nine_minutes_and_grow_with_the_time() -> None:
    steps = [step for step in gpu.SHARES if step != "sanitizer"]
    assert sum(gpu.Budget(steps, None).shares.values()) == 540
    budget = gpu.Budget(steps, 18)
    assert budget.shares["tests"] == 2 * gpu.SHARES["tests"]
    with budget.step("build"):
        assert budget.left() <= budget.shares["build"]
    with budget.step("tests"):  # the build has left nearly all of its share
        assert budget.left() > budget.shares["tests"]


@pytest.mark.slow
def test_what_is_tested_under_another_assembler() -> None:
    """Products in bfloat16 with all gradients, and only tests that start kernels."""
    command = [*gpu.TESTS, "-k", gpu.CALCULATES, *gpu.test_files(gpu.ASSEMBLED, "tests"), "--collect-only"]
    said = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=True).stdout
    for tiles in ("small", "shipped"):
        assert f"tests/test_expert_linear_kernels.py::test_{tiles}_tiles[shape0-dtype2]" in said
    assert "tests/test_expert_mlp.py::test_shipped_tiles[shape0-False-dtype2]" in said
    assert "tests/test_dispatch.py::test_dispatch" in said
    assert not any(word in said for word in ("test_errors", "opcheck", "broken", "shapes_do_not_depend"))


def test_test_files_exist() -> None:
    for stem in {*gpu.ASSEMBLED, *gpu.SANITIZED, *gpu.CUDA_KERNELS}:
        assert gpu.test_files((stem,), "tests"), stem
    measured = gpu.test_files(gpu.MEASURED, "benchmarks")
    assert sorted(measured) == gpu.test_files(("",), "benchmarks")


def test_rounds_and_turns_on_a_cpu() -> None:
    """Every contender has a sample of every round, and one that fails does not end the others."""
    calls: dict[str, int] = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1

    def fail() -> None:
        raise RuntimeError("does not run here")

    contenders = {"a": [lambda: count("a")], "b": [lambda: count("b")], "wrong": [fail]}
    timed = timing.time_together(contenders, "cpu", seconds=0.01, least=4)
    assert isinstance(timed["wrong"], RuntimeError)
    assert len(timed["a"].seconds) == len(timed["b"].seconds) >= 4
    assert min(timed["a"].seconds) > 0
    assert min(calls.values()) > 4
    assert timed["a"].eager == []


class Event:
    """Takes the place of torch.cuda.Event: the time of the host."""

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def test_eager_times_come_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph both times are taken, without one there is no other."""
    replays, eager, null = [], [], contextlib.nullcontext
    stream, graph = SimpleNamespace(wait_stream=id), SimpleNamespace(replay=lambda: replays.append(1))
    fake = SimpleNamespace(
        Event=Event, Stream=lambda: stream, stream=null, current_stream=int, CUDAGraph=lambda: graph,
        graph=lambda *_, **__: null(), synchronize=int, OutOfMemoryError=MemoryError,
    )  # fmt: skip
    monkeypatch.setattr(timing.torch, "cuda", fake)
    monkeypatch.setattr(timing, "waits_for_host", lambda call: call is int)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-6)
    timed = timing.time_together({"a": [lambda: eager.append(1)] * 2, "waits": [int]}, "cuda", least=4)
    assert (timed["a"].method, timed["waits"].method) == ("graph", "eager")
    assert len(timed["a"].eager) == len(timed["a"].seconds) == len(timed["waits"].seconds) >= 4
    assert timed["waits"].eager == []
    assert len(replays) > len(timed["a"].seconds)
    assert len(eager) > 2 * len(timed["a"].seconds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_graphs_of_rotated_inputs() -> None:
    sets = [torch.randn(1024, 1024, device="cuda") for _ in range(timing.input_sets(4 << 20, "cuda"))]
    calls = {
        "graph": [lambda x=x: x @ x for x in sets],
        "eager": [lambda x=x: (x @ x).sum().item() for x in sets],
    }
    timed = timing.time_together(calls, "cuda")
    assert [timed[name].method for name in calls] == ["graph", "eager"]
    assert len(timed["graph"].eager) == len(timed["graph"].seconds)
    assert all(0 < second < 1 for name in calls for second in timed[name].seconds)
