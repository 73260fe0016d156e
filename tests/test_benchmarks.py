"""`pytest benchmarks` in a process of its own: what its JSON holds, and that a wrong result has no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import case, report
from benchmarks.environment import ROOT
from benchmarks.test_expert_linear import linear_case

# pytest-benchmark times nothing in a process that xdist started.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cpu", "--quick"]


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    """One tiny case: the rows have paired samples, checks, memory and machine, and the report reads them."""
    path = tmp_path / "results.json"
    more = tmp_path / "more.json"
    more.write_text('{"calibration": {"a": 1}}')
    command = [*PYTEST, "benchmarks/test_linear_assignment.py", "-k", "36", f"--benchmark-json={path}"]
    command += [f"--machine-info={more}", "--seconds=1000"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert data["machine_info"]["calibration"] == {"a": 1}
    assert "left_out" not in data["machine_info"]
    assert {"torch", "triton", "commit", "device", "cpu"} <= set(data["machine_info"])
    rows = {row["contender"]: row for row in data["benchmarks"][0]["extra_info"]["rows"]}
    assert set(rows) == {"switch_moe", "scipy"}
    for row in rows.values():
        assert row["failure"] is None
        assert row["error"] <= row["allowed"]
        assert row["shape"] == {"n": 36}
        assert len(row["samples"]) == len(rows["scipy"]["samples"]) >= 3
    (line,) = report.lines(report.load(path))
    assert line.ratio("scipy") > 0


@pytest.mark.slow
def test_what_has_not_begun_in_time_is_left_out(tmp_path: Path) -> None:
    """The first of two cases ends after its time, so the second does not begin; the file names it."""
    (tmp_path / "time_flies.py").write_text(
        "import time\n"
        "real, ended = time.monotonic, []\n"
        "time.monotonic = lambda: real() + 1000 * len(ended)\n"
        "def pytest_runtest_teardown():\n"
        "    ended.append(1)\n"
    )
    path = tmp_path / "results.json"
    command = [*PYTEST, "benchmarks/test_linear_assignment.py", "-k", "36 or 84", "--seconds=900"]
    done = subprocess.run(
        [*command, "-p", "time_flies", f"--benchmark-json={path}"], cwd=ROOT, capture_output=True, text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert len(data["benchmarks"]) == len(data["machine_info"]["left_out"]) == 1
    assert "84" in data["machine_info"]["left_out"][0]


@pytest.mark.slow
def test_a_wrong_result_of_switch_moe_has_no_time(tmp_path: Path) -> None:
    plugin = tmp_path / "break_it.py"
    plugin.write_text(
        "import switch_moe.ops\n"
        "right = switch_moe.ops.linear_assignment\n"
        "switch_moe.ops.linear_assignment = lambda cost: right(-cost)\n"
    )
    path = tmp_path / "results.json"
    command = [*PYTEST, "benchmarks/test_linear_assignment.py", "-k", "36", f"--benchmark-json={path}"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "-p", "break_it"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nothing is timed" in done.stdout
    assert not path.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_check(dtype: torch.dtype) -> None:
    """All contenders of a tiny case are right; one that is off by more than allowed, or raises, is not."""
    tiny = linear_case("cpu", dtype, 3, 5, 16)
    inputs = tiny.make(0)
    for contender in tiny.contenders:
        assert case.check(tiny, contender, inputs)["failure"] is None
    mine = next(one for one in tiny.contenders if one.is_switch_moe)
    off = mine._replace(run=lambda i: (mine.run(i)[0] * 1.1,))
    assert (
        "gradient" in case.check(tiny, off, inputs)["failure"]
        or "out" in case.check(tiny, off, inputs)["failure"]
    )

    def fail(_: case.Inputs) -> case.Outputs:
        raise RuntimeError("no such kernel")

    assert case.check(tiny, mine._replace(run=fail), inputs)["failure"] == "RuntimeError: no such kernel"
