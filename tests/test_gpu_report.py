"""The GPU report without a GPU: its contenders at tiny shapes, and all of it but the timing."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import types
from itertools import chain
from pathlib import Path

import conftest
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import case as checking  # noqa: E402
from benchmarks import counts, gpu_report, gpu_tables, gpu_timing, plans  # noqa: E402

TINY = list(plans.tiny_plan("cpu", torch.float32))
LIMITS = {"bfloat16_tflops": 100.0, "float32_tflops": 10.0, "gbps": 1000.0}
MACHINE = {
    "gpu": "Made Up 1", "capability": "0.0", "multiprocessors": 1, "memory_bytes": 2**30, "l2_bytes": 2**12
}  # fmt: skip
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, contender.name) for case in TINY for contender in case.contenders],
    ids=[f"{case.name}, {contender.name}" for case in TINY for contender in case.contenders],
)
def test_contenders_are_right(case: checking.Case, name: str) -> None:
    contender = next(contender for contender in case.contenders if contender.name == name)
    found = checking.check(case, contender, case.make(1))
    assert found["failure"] is None
    assert 0 <= found["error"] <= (1e-5 if contender.ours else 2e-6)


def test_bfloat16_by_the_error_of_the_reference() -> None:
    assert plans.run_small("cpu", torch.bfloat16) == []


@pytest.mark.parametrize("change", ["scaled", "nan", "gradient"])
def test_wrong_results_are_noticed(change: str) -> None:
    case = TINY[0]
    ours = next(contender for contender in case.contenders if contender.ours)

    def broken(inputs: checking.Inputs) -> checking.Outputs:
        (out,) = ours.run(inputs)
        bias = inputs["bias"].sum()
        nan = out.masked_fill(out > 3, torch.nan)
        return ({"scaled": out * 1.0001, "nan": nan, "gradient": out + bias - bias.detach()}[change],)

    failure = checking.check(case, ours._replace(run=broken), case.make(0))["failure"]
    assert failure.startswith("wrong: gradient of bias" if change == "gradient" else "wrong: ")


def test_an_assignment_that_is_not_the_best_is_noticed() -> None:
    case = next(case for case in TINY if case.operation.startswith("matching"))
    ours = case.contenders[0]

    def worse(inputs: checking.Inputs) -> checking.Outputs:
        loss, assignment = ours.run(inputs)
        return loss, assignment.roll(5)

    assert "loss" in checking.check(case, ours._replace(run=worse), case.make(0))["failure"]


def test_work_counts_each_tensor_once() -> None:
    case = TINY[0]  # D=48 B=5 T=24, float32
    linear, inputs = case.contenders[0], case.make(0)
    rows, size = 5 * 24, 48
    forward = 4 * (2 * rows * size + size * size + size)
    assert case.work(linear, inputs, checking.FORWARD) == (2.0 * rows * size * size, forward)
    both = forward + 4 * (2 * rows * size + size * size + size)  # gradients of out, x, weight, bias
    assert case.work(linear, inputs, checking.BOTH) == (6.0 * rows * size * size, both)


def test_the_full_plan_has_what_the_design_asks() -> None:
    cases = list(plans.full_plan("cpu"))
    dense = {(c.shape["D"], c.shape["B"]) for c in cases[:16]}
    assert dense == {(size, batch) for size in (384, 768, 1024, 1152) for batch in (32, 64, 128, 256)}
    assert {c.operation for c in cases} == {
        "expert_linear", "matching + prior loss", "timestep_gate", "expert_mlp", "dispatch"
    }  # fmt: skip
    sweeps = [c for c in cases if c.note == checking.ANY_K and c.shape["D"] == 1152]
    assert [[k.name for k in c.contenders] for c in sweeps] == [
        [f"k={k}" for k in range(1, experts + 1)] for experts in (3, 4, 8, 16)
    ]
    assert len({c.name for c in cases}) == len(cases)


def test_input_sets_exceed_twice_the_cache() -> None:
    assert gpu_timing.input_sets(10 << 20, 60 << 20) == 13
    assert gpu_timing.input_sets(1 << 30, 60 << 20) == 2
    assert gpu_timing.input_sets(0, 60 << 20) == gpu_timing.MOST_SETS


def test_floor() -> None:
    assert gpu_report.floor_us(1e9, 1e3, LIMITS, "bfloat16") == pytest.approx(10)  # 1 GFLOP at 100 TFLOP/s
    assert gpu_report.floor_us(1e9, 1e3, LIMITS, "float32") == pytest.approx(100)
    assert gpu_report.floor_us(1e3, 1e6, LIMITS, "float32") == pytest.approx(1)  # 1 MB at 1 TB/s


def test_timing_statistics() -> None:
    timing = gpu_timing.Timing("graph", [5.0, 1.0, 3.0, 2.0, 4.0])
    assert timing.median() == 3
    assert timing.quartiles() == [1.5, 4.5]


def fake_row(contender: str, microseconds: float | None, **changes: object) -> dict:
    """A row of numbers that nobody could take for a measurement."""
    row = {
        "case": "expert_linear made up", "operation": "expert_linear", "note": "", "dtype": "bfloat16",
        "shape": {"D": 7, "B": 2, "T": 256, "M": 3, "k": 2}, "pass": "forward", "contender": contender,
        "ours": contender.startswith(("switch_moe", "k=")), "method": "graph" if microseconds else None,
        "microseconds": microseconds, "quartiles": [1.0, 2.0], "tflops": 1.0, "gbps": 1.0, "floor_us": 1.0,
        "fraction": 0.5, "peak_bytes": 2**20, "sets": 2, "error": 1e-6, "allowed": 1e-5, "failure": None,
    }  # fmt: skip
    return row | changes


def fake_report(rows: list[dict], gpu: str = "Made Up 1") -> dict:
    return {
        "machine": MACHINE | {"gpu": gpu, "driver": "0.0"}, "versions": {"torch": "0.0"}, "commit": "0" * 40,
        "dirty": True, "date": "never", "backend": "triton", "ceilings": LIMITS, "tolerances": "none.",
        "tests": {"passed": 7}, "sanitizer": "not run", "cases": rows,
        "not_measured": [{"what": "something else", "reason": "time"}],
    }  # fmt: skip


def verdict(report: dict, start: str) -> tuple[float | None, str]:
    found = next(row for row in gpu_tables.verdicts(report) if row["what"].startswith(start))
    return found["measured"], found["verdict"]


def test_verdicts_take_the_worst_shape() -> None:
    rows = []
    for case, times in (("a", (1000, 1100, 3000, 2000)), ("b", (1000, 1200, 5000, 9000))):
        for which in ("forward", "forward+backward"):
            names = ("F.linear", "switch_moe", "expert loop", "grouped_mm")
            rows += [fake_row(n, t, case=case, **{"pass": which}) for n, t in zip(names, times, strict=True)]
    few = {"D": 7, "B": 2, "T": 16, "M": 3, "k": 2}
    rows += [fake_row(n, t, case="c", shape=few) for n, t in (("F.linear", 1), ("switch_moe", 99))]
    report = fake_report(rows)
    assert verdict(report, "expert_linear forward / F.linear") == (1.2, "missed")
    assert verdict(report, "expert_linear forward+backward / F.linear") == (1.2, "met")
    assert verdict(report, "fastest generic peer") == (pytest.approx(2000 / 1100), "missed")
    assert verdict(report, "timestep_gate") == (None, "not measured")
    assert verdict(report, "measurements of ours that wait") == (0, "met")


def test_verdicts_over_k() -> None:
    times = {"k=1": 1000, "k=2": 1050, "k=3": 1101}
    rows = [fake_row(name, t, case="sweep", note=checking.ANY_K) for name, t in times.items()]
    assert verdict(fake_report(rows), "expert_linear at any k / k=1, forward") == (1.101, "missed")
    rows[2] |= {"microseconds": None, "method": None, "failure": "wrong"}
    assert verdict(fake_report(rows), "expert_linear at any k / k=1, forward") == (1.05, "met where measured")
    rows[0] |= {"microseconds": None, "method": None, "failure": "wrong"}
    assert verdict(fake_report(rows), "expert_linear at any k / k=1, forward")[1] == "not measured"


def test_a_case_without_time_does_not_count_as_met() -> None:
    report = fake_report([fake_row("F.linear", 1000.0), fake_row("switch_moe", 1000.0)])
    assert verdict(report, "expert_linear forward / F.linear") == (1, "met")
    report["not_measured"].append({"what": "b", "operation": "expert_linear", "note": "", "reason": "time"})
    assert verdict(report, "expert_linear forward / F.linear") == (1, "met where measured")


def test_microseconds_are_judged_on_an_h200_only() -> None:
    rows = [fake_row("switch_moe", 29.0, case="gate", operation="timestep_gate", method="eager")]
    assert verdict(fake_report(rows, "NVIDIA H200"), "timestep_gate") == (29, "met")
    assert verdict(fake_report(rows), "timestep_gate") == (29, "no target for this GPU")
    assert verdict(fake_report(rows), "measurements of ours that wait") == (1, "missed")


def test_markdown_says_what_the_json_says() -> None:
    rows = [
        fake_row("F.linear", 1000.0),
        fake_row("switch_moe", 1234.5),
        fake_row("expert loop", 4000.0, method="eager"),
        fake_row("grouped_mm", None, failure="RuntimeError: made up"),
    ]
    page = gpu_tables.markdown(json.loads(json.dumps(fake_report(rows))))
    for text in (
        "1234 (1.23)", "4000* (4.00)", "| failed |", "RuntimeError: made up", "something else | time",
        "with uncommitted changes", "7 tests passed", "expert_linear forward / F.linear | 1.15 | 1.23 |",
    ):  # fmt: skip
        assert text in page
    assert "None" not in page


@pytest.mark.parametrize("empty", [False, True])
def test_plot(empty: bool, tmp_path: Path) -> None:
    rows = [fake_row("F.linear", 1000.0), fake_row("switch_moe", 900.0)]
    rows += [fake_row(f"k={k}", 1000.0 + k, case="sweep", note=checking.ANY_K) for k in (1, 2)]
    gpu_tables.plot(fake_report([] if empty else rows), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0123456, "0.0123"), (99.97, "100"), (1234.5, "1234"), (0.0, "0")]
)
def test_number(value: float | None, text: str) -> None:
    assert gpu_tables.number(value) == text


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The whole report on the CPU at tiny shapes, the clock replaced. Returns the steps in their order."""
    done: list[str] = []

    def time_steps(contenders: dict, rounds: int = 0) -> dict:
        for steps in contenders.values():
            for step in steps:
                step()
        return {name: gpu_timing.Timing("graph", [1e6, 2e6, 3e6]) for name in contenders}

    def run_tests(files: list[str], processes: int, budget: gpu_report.Budget) -> dict:
        done.append("tests")
        return {"passed": 7, "files": files, "processes": processes}

    tiny = [case for case in plans.tiny_plan("cpu", torch.float32) if case.note != checking.COMPILED]
    monkeypatch.setattr(gpu_report, "find_device", lambda: "cpu")
    monkeypatch.setattr(gpu_report, "build", lambda budget: done.append("build"))
    monkeypatch.setattr(gpu_report, "run_tests", run_tests)
    monkeypatch.setattr(gpu_report, "warm_up", lambda processes, seconds: done.append("warm up"))
    monkeypatch.setattr(gpu_report, "plan", lambda device: tiny)
    monkeypatch.setattr(gpu_timing, "machine", lambda: MACHINE)
    monkeypatch.setattr(gpu_timing, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(gpu_timing, "time_steps", time_steps)
    monkeypatch.setattr(counts, "peak_bytes", lambda step, device: 12345)
    return done


def test_everything(without_a_gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--output", str(tmp_path), "--commit", "abc"]) == 0
    assert without_a_gpu == ["build", "tests", "warm up"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "made-up-1.json",
        "made-up-1.md",
        "made-up-1.png",
    ]
    report = json.loads((tmp_path / "made-up-1.json").read_text())
    assert report["commit"] == "abc"
    assert all(row["reason"].startswith("not importable: ") for row in report["not_measured"])
    assert all(row["microseconds"] == 2e6 and row["failure"] is None for row in report["cases"])
    assert {row["pass"] for row in report["cases"]} == {"forward", "forward+backward"}
    row = next(row for row in report["cases"] if row["contender"] == "F.linear")
    flops, moved = 2 * 5 * 24 * 48 * 48, 4 * (2 * 5 * 24 * 48 + 48 * 48 + 48)
    assert row["tflops"] == pytest.approx(flops / 2e12)
    assert row["gbps"] == pytest.approx(moved / 2e9)
    assert row["fraction"] == pytest.approx(row["floor_us"] / 2e6)
    assert row["sets"] == 2
    assert (tmp_path / "made-up-1.md").read_text() in capsys.readouterr().out


def test_failing_tests_leave_no_speed_and_earlier_results(
    without_a_gpu: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_tests(*_: object) -> dict:
        raise gpu_report.Refused("tests failed:\nFAILED test_made_up")

    (tmp_path / "made-up-1.json").write_text("earlier")
    monkeypatch.setattr(gpu_report, "run_tests", run_tests)
    assert gpu_report.main(["--output", str(tmp_path)]) == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]
    captured = capsys.readouterr()
    assert "no speed is reported" in captured.err
    assert "FAILED test_made_up" in captured.err
    assert without_a_gpu == ["build"]


def test_no_time_left(without_a_gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made-up-1.json").write_text("earlier")
    assert gpu_report.main(["--output", str(tmp_path), "--minutes", "0"]) == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]
    assert "--minutes" in capsys.readouterr().err


@pytest.mark.parametrize("ours", [False, True])
def test_one_that_raises_and_one_that_is_wrong(
    ours: bool, without_a_gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(inputs: checking.Inputs) -> checking.Outputs:
        raise RuntimeError("made up\nand more")

    case = next(case for case in TINY if case.operation == "expert_mlp")
    good, reference, grouped = case.contenders[:3]
    wrong = grouped._replace(run=lambda inputs: (grouped.run(inputs)[0] * 2,), ours=ours)
    broken = dataclasses.replace(case, contenders=[good, reference._replace(run=raises), wrong])
    monkeypatch.setattr(gpu_report, "plan", lambda device: [broken])
    assert gpu_report.main(["--output", str(tmp_path)]) == (1 if ours else 0)
    rows = json.loads((tmp_path / "made-up-1.json").read_text())["cases"]
    found = {row["contender"]: (row["microseconds"], row["failure"]) for row in rows}
    assert found["switch_moe"] == (2e6, None)
    assert found["reference"] == (None, "RuntimeError: made up")
    assert found["grouped_mm"][0] is None
    assert found["grouped_mm"][1].startswith("wrong: ")


def test_cases_that_do_not_fit_are_listed(without_a_gpu: list[str]) -> None:
    slow = dataclasses.replace(TINY[0], seconds=1e9, note="slow")
    rows, skipped = gpu_report.measure([slow, TINY[-2]], MACHINE, LIMITS, gpu_report.Budget(1))
    assert [row["what"] for row in skipped] == [slow.name]
    assert {row["case"] for row in rows} == {TINY[-2].name}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--output", str(tmp_path / "new")]) == 1
    captured = capsys.readouterr()
    assert captured.err == "gpu_report: torch sees no GPU here; run it on a machine with one\n"
    assert captured.out == ""
    assert not (tmp_path / "new").exists()


def test_the_build_comes_before_the_package_is_imported() -> None:
    code = "import sys, benchmarks.gpu_report; assert 'switch_moe' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Five tests and --shard; without the import of torch, which takes seconds in every process."""
    hooks = (conftest.pytest_addoption, conftest.pytest_collection_modifyitems)
    source = "import re\nimport pytest\n\n" + "\n\n".join(inspect.getsource(hook) for hook in hooks)
    (tmp_path / "conftest.py").write_text("from __future__ import annotations\n" + source)
    for name, wrong in (("good", 9), ("bad", 3)):
        mark = "@pytest.mark.parametrize('i', range(5))"
        test = f"import pytest\n\n{mark}\ndef test_it(i):\n    assert i != {wrong}\n"
        (tmp_path / f"test_{name}.py").write_text(test)
    return tmp_path


@pytest.mark.parametrize("count", [0, 1, 5])
def test_shards_hold_every_test_once(count: int) -> None:
    seen = []
    for part in ("1/3", "2/3", "3/3"):
        mine, rest = list(range(count)), []
        deselected = types.SimpleNamespace(pytest_deselected=lambda items, rest=rest: rest.extend(items))
        config = types.SimpleNamespace(getoption=lambda _, part=part: part, hook=deselected)
        conftest.pytest_collection_modifyitems(config, mine)
        assert sorted(mine + rest) == list(range(count))
        seen.append(mine)
    assert sorted(chain(*seen)) == list(range(count))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b", ""])
def test_shards_that_do_not_exist(shard: str) -> None:
    config = types.SimpleNamespace(getoption=lambda _: shard)
    with pytest.raises(pytest.UsageError, match="it must be I/N"):
        conftest.pytest_collection_modifyitems(config, [])


def test_tests_run_in_several_processes(shop: Path) -> None:
    good, bad = (str(shop / f"test_{name}.py") for name in ("good", "bad"))
    assert gpu_report.run_tests([good], 2, gpu_report.Budget(5))["passed"] == 5
    with pytest.raises(gpu_report.Refused, match=r"(?s)FAILED .*test_it\[3\]"):
        gpu_report.run_tests([good, bad], 2, gpu_report.Budget(5))
    with pytest.raises(gpu_report.Refused, match="did not end in time"):
        gpu_report.run_tests([good], 1, gpu_report.Budget(0))


def test_failed_tests() -> None:
    results = [
        (0, "5 passed"),
        (5, "no tests ran"),
        (1, "FAILED a\nERROR b\n"),
        (2, "crashed"),
        (None, "..."),
    ]
    failures = gpu_report.failed_tests(results)
    assert failures[:2] == ["FAILED a", "ERROR b"]
    assert failures[2] == "exit code 2: crashed"
    assert "did not end in time" in failures[3]


def test_the_tests_of_the_kernels_are_found() -> None:
    stems = {Path(name).stem for name in gpu_report.test_files()}
    assert {
        "test_expert_linear",
        "test_expert_linear_kernels",
        "test_timestep_gate",
        "test_dispatch",
    } <= stems
    assert not stems & {
        "test_compiled_kernels",
        "test_build",
        "test_training",
        "test_package",
        "test_gpu_report",
    }


@pytest.mark.parametrize("code", [0, 9])
def test_sanitizer(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    budget = gpu_report.Budget(1)
    assert gpu_report.sanitize(budget) == "not found in CUDA_HOME or PATH"
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho $3 $4 $2 $PYTORCH_NO_CUDA_MEMORY_CACHING\nexit {code}\n")
    tool.chmod(0o755)
    if code:
        with pytest.raises(
            gpu_report.Refused, match=r"(?s)memcheck: exit code 9\n--error-exitcode 9 memcheck 1"
        ):
            gpu_report.sanitize(budget)
    else:
        assert gpu_report.sanitize(budget) == "memcheck and racecheck found nothing"


def test_compiling_ahead_runs_ours_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(inputs: checking.Inputs) -> checking.Outputs:
        ran.append(torch.is_grad_enabled())
        raise RuntimeError("made up")

    case = TINY[0]
    contenders = [contender._replace(run=run) for contender in case.contenders]
    broken = dataclasses.replace(case, contenders=contenders)
    monkeypatch.setattr(plans, "full_plan", lambda device: [broken, broken])
    plans.warm_up("cpu", 2, 3)
    assert ran == [False, True]  # the second of four of ours: switch_moe and x(1+m), twice


@needs_gpu
def test_time_steps_captures_what_does_not_wait() -> None:
    x = torch.randn(256, 256, device="cuda")

    def fails() -> None:
        raise RuntimeError("made up")

    contenders = {
        "product": [lambda: x @ x] * 2,
        "waits": [lambda: float((x @ x)[0, 0])] * 2,
        "fails": [fails],
    }
    found = gpu_timing.time_steps(contenders, rounds=5)
    assert found["product"].method == "graph"
    assert found["waits"].method == "eager"
    assert str(found["fails"]) == "made up"
    assert all(0 < t < 1e4 for name in ("product", "waits") for t in found[name].samples)
    assert counts.peak_bytes(lambda: x @ x, "cuda") >= x.nbytes


@needs_gpu
def test_contenders_on_the_gpu() -> None:
    for case in plans.tiny_plan("cuda", torch.bfloat16):
        for contender in case.contenders:
            if contender.name not in ("grouped_mm", checking.COMPILED):  # not on every GPU; slow
                assert checking.check(case, contender, case.make(0))["failure"] is None
