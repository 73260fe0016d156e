"""benchmarks/gpu.py, where there is no GPU: what it runs, and that a step that fails ends it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, timing


class Commands:
    """Takes the place of subprocess.run: records commands, and fails at the one that has ``fail`` in it."""

    stdout = ""

    def __init__(self, fail: str | None = None) -> None:
        self.fail, self.commands = fail, []

    def __call__(self, command: list[str], **options: object) -> Commands:
        if command[0] != "git":
            self.commands.append(command)
        self.returncode = int(self.fail is not None and self.fail in command)
        for argument in command:
            if argument.startswith("--benchmark-json=") and not self.returncode:
                Path(argument.partition("=")[2]).write_text(json.dumps({"new": True}))
        return self


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that looks as if it had a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made Up 100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("machine")
def test_all_steps_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    monkeypatch.setattr(gpu.subprocess, "run", commands)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.main(["--output", str(tmp_path), "--", "--peer-path", "official=x"]) == 0
    build, test, measure, report = commands.commands
    assert build[:4] == [sys.executable, "-m", "pip", "install"]
    assert "tests/test_expert_linear_kernels.py" in test
    assert measure[-2:] == ["--peer-path", "official=x"]
    assert report[-1] == "benchmarks.report"
    assert json.loads((tmp_path / "made-up-100.json").read_text()) == {"new": True}
    assert [path.name for path in tmp_path.iterdir()] == ["made-up-100.json"]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("fail", "steps"),
    [("pip", 1), ("tests/test_dispatch.py", 2), ("benchmarks", 3)],
    ids=["build", "test", "measure"],
)
def test_a_failed_step_keeps_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str, steps: int
) -> None:
    commands = Commands(fail)
    monkeypatch.setattr(gpu.subprocess, "run", commands)
    earlier = tmp_path / "made-up-100.json"
    earlier.write_text("earlier")
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert len(commands.commands) == steps
    assert earlier.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["made-up-100.json"]


def test_test_files_exist() -> None:
    for stem in {*gpu.TESTED, *gpu.SANITIZED}:
        assert gpu.test_files((stem,)), stem


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_graphs_of_rotated_inputs() -> None:
    sets = [torch.randn(1024, 1024, device="cuda") for _ in range(timing.input_sets(4 << 20, "cuda"))]
    calls = {
        "graph": [lambda x=x: x @ x for x in sets],
        "eager": [lambda x=x: (x @ x).sum().item() for x in sets],
    }
    timed = timing.time_together(calls, "cuda")
    assert [timed[name].method for name in calls] == ["graph", "eager"]
    assert all(0 < second < 1 for name in calls for second in timed[name].seconds)
