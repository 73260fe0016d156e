"""The study of benchmarks/study.py: which runs it makes, how it ends, and what its tables say."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from switch_dit.settings import TrainConfig

from benchmarks import study, study_report
from benchmarks.study import PARTS, Arm, Part, Run, StudyConfig

SECONDS = {"switch": 0.12, "dense": 0.1, "dtr": 0.1, "k1": 0.12}


def rows(*measured: tuple[int, float, float, float]) -> list[dict[str, float]]:
    keys = ("step", "conditional_accuracy", "frechet_distance", "mind")
    return [dict(zip(keys, row, strict=True)) for row in measured]


def results() -> dict[str, Any]:
    """A made-up part of 2 seeds."""
    switch = {
        "0": rows((5, 0.4, 6.0, 0.3), (10, 0.8, 3.0, 0.1)),
        "1": rows((5, 0.6, 8.0, 0.5), (10, 1.0, 5.0, 0.2)),
    }
    dense = {
        "0": rows((5, 0.3, 9.0, 0.4), (10, 0.7, 4.0, 0.2), (12, 0.9, 2.0, 0.1)),
        "1": rows((5, 0.5, 9.5, 0.4), (10, 0.7, 4.5, 0.2), (12, 0.9, 2.5, 0.1)),
    }
    arms = {
        "switch": {"title": "Switch", "options": "", "steps": 10, "seeds": switch},
        "dense": {"title": "dense", "options": "", "steps": 12, "seeds": dense},
        "dtr": {"title": "DTR", "options": "", "steps": 12, "seeds": dense},
        "k1": {"title": "Switch, k=1", "options": "", "steps": 10, "seeds": json.loads(json.dumps(switch))},
    }
    return {
        "parts": {
            "digits": {
                "title": "digits", "steps": 10, "step_seconds": SECONDS, "arms": arms, "minutes": 3.4,
                "real": {"classifier_accuracy": 0.98, "frechet_floor": 0.65}, "machine": "a machine, 2 cores",
                "torch": "2.13.0", "jobs": 2, "date": "2026-01-02",
            }
        }
    }  # fmt: skip


def cells(page: str, begin: str) -> list[list[str]]:
    """The lines of all tables that begin with a cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    return [line for line in lines if line[0] == begin]


def test_tables_have_means_spreads_and_differences_by_seed(tmp_path: Path) -> None:
    written = study_report.write_report(results(), tmp_path)
    assert [path.name for path in written] == ["README.md", "digits.png", "digits-arms.png"]
    assert all(path.stat().st_size > 1000 for path in written)
    page = written[0].read_text()
    equal_steps, equal_time, on_the_way = cells(page, "dense")
    assert equal_steps == [
        "dense", "1.00", "0.700 ± 0.000", "4.25 ± 0.35", "0.200 ± 0.000", "+0.25 ± 1.06 (1 of 2)",
    ]  # fmt: skip
    assert equal_time[1:] == ["12", "0.900 ± 0.000", "2.25 ± 0.35", "0.100 ± 0.000", "-1.75 ± 1.06 (2 of 2)"]
    assert on_the_way[1:] == ["9.25 ± 0.35", "4.25 ± 0.35"]
    assert cells(page, "Switch")[0] == [
        "Switch",
        "1.20",
        "0.900 ± 0.141",
        "4.00 ± 1.41",
        "0.150 ± 0.071",
        "-",
    ]
    assert "2 seeds" in page
    assert "3 minutes, 2 runs at a time, on a machine, 2 cores, torch 2.13.0, 2026-01-02" in page
    assert "accuracy of 0.980" in page


def test_the_words_of_the_page_stay() -> None:
    first = study_report.fill_in("", results())
    changed = results()
    changed["parts"]["digits"]["minutes"] = 77.0
    page = study_report.fill_in("# Words\n\n" + first + "\nThe end, C:\\new \\1.\n", changed)
    expected = first.replace("Took 3 minutes", "Took 77 minutes")
    assert page == "# Words\n\n" + expected + "\nThe end, C:\\new \\1.\n"


def test_results_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    lacking = results()
    del lacking["parts"]["digits"]["arms"]["dense"]
    with pytest.raises(ValueError, match="digits have no runs of dense"):
        study_report.write_report(lacking, tmp_path)
    broken = results()
    broken["parts"]["digits"]["arms"]["k1"]["seeds"]["1"][0]["mind"] = math.nan
    with pytest.raises(ValueError, match="digits, k1, seed 1 are not finite"):
        study_report.write_report(broken, tmp_path)
    with pytest.raises(ValueError, match="not measured at step 7; it was at 5, 10"):
        study_report.at(7)(results()["parts"]["digits"]["arms"]["k1"]["seeds"]["0"])
    assert not list(tmp_path.iterdir())
    page = study_report.fill_in("", results()).replace("<!-- end of digits -->", "")
    with pytest.raises(ValueError, match="no line <!-- end of digits -->"):
        study_report.fill_in(page, results())


def test_a_single_seed_has_no_spread() -> None:
    assert study_report.spread([0.5], 2) == "0.50"


def test_half_a_line_is_no_result(tmp_path: Path) -> None:
    run = Run("digits", "switch", 0, 5, tmp_path)
    (tmp_path / "evaluations.jsonl").write_text('{"step": 1, "mind": 0.5}\n{"step": 2, "mi')
    assert run.rows() == [{"step": 1, "mind": 0.5}]


def test_every_run_is_a_command_with_settings_that_training_knows() -> None:
    for name, part in PARTS.items():
        for key in part.arms:
            run = Run(name, key, 1, 700, Path("runs/study/x"))
            config = TrainConfig(**run.settings())
            assert (config.steps, config.seed, config.data) == (700, 1, part.settings["data"])
            assert config.steps > config.evaluate_every > 0
            words = run.command()
            assert Path(words[1]).name == "train_switch_dit.py"
            assert Path(words[1]).is_file()
            assert words[words.index("--evaluate-every") + 1] == str(config.evaluate_every)
            assert words[-6:] == ["--output", "runs/study", "--name", "x", "--device", "cpu"]
    arms = PARTS["digits"].arms
    assert {arm.settings.get("top_k", 2) for arm in arms.values()} == {1, 2, 3}
    assert {arm.settings.get("num_experts", 3) for arm in arms.values()} == {2, 3, 4, 8}


def write_seconds(folder: Path, seconds: dict[str, float]) -> None:
    part = PARTS["digits"]
    settings = {key: {**part.settings, **arm.settings} for key, arm in part.arms.items()}
    study.write(folder / "step-seconds.json", {"settings": settings, "seconds": seconds})


def test_the_cheaper_models_get_the_time_of_switch_dit(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    seconds = dict.fromkeys(PARTS["digits"].arms, 0.12) | {"dense": 0.1, "dtr": 0.13}
    write_seconds(folder, seconds)
    runs = study.runs_of("digits", tmp_path)
    assert len(runs) == 3 * len(PARTS["digits"].arms)
    steps = {run.arm: run.steps for run in runs}
    wanted = PARTS["digits"].steps
    assert steps["dense"] == wanted * 12 // 10
    assert {steps[key] for key in steps if key != "dense"} == {wanted}  # never fewer
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_a_run_that_fails_ends_the_others_and_names_its_log(tmp_path: Path, monkeypatch) -> None:
    sleeping = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path({!r}).write_text('saved') and 0))\n"
        "pathlib.Path({!r}).touch(); time.sleep(60)"
    )
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    waiting = f"import pathlib, time\nwhile not pathlib.Path({str(ready)!r}).exists(): time.sleep(0.01)\n"
    codes = {
        "switch": sleeping.format(str(saved), str(ready)),
        "dense": waiting + "raise SystemExit('no disk')",
    }
    monkeypatch.setattr(Run, "command", lambda self: [sys.executable, "-c", codes[self.arm]])
    runs = [Run("digits", arm, 0, 5, tmp_path / arm) for arm in codes]
    with pytest.raises(RuntimeError, match=r"see .*dense\.log"):
        study.train(runs, 2, tmp_path / "logs")
    assert saved.read_text() == "saved"
    assert (tmp_path / "logs" / "dense.log").read_text().strip() == "no disk"


def test_a_report_needs_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report is True; .*results\.json has no results yet"):
        study.study(StudyConfig(results=tmp_path, report=True))


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    committed = study.ROOT / "benchmarks" / "study"
    page = (committed / "README.md").read_text()
    assert study_report.fill_in(page, json.loads((committed / "results.json").read_text())) == page


@pytest.mark.slow
def test_a_small_study(tmp_path: Path, monkeypatch) -> None:
    settings = {
        **PARTS["digits"].settings,
        "model": "tiny/4",
        "steps": 2,
        "evaluate_every": 1,
        "generated": 20,
    }
    arms = {"switch": Arm("Switch"), "dense": Arm("dense", {"routing": "none"})}
    monkeypatch.setitem(PARTS, "digits", Part("digits", settings, 1, arms))
    write_seconds(tmp_path / "runs" / "digits", {"switch": 0.12, "dense": 0.1})
    config = StudyConfig("digits", tmp_path / "runs", tmp_path / "results")
    study.study(config)
    found = json.loads((tmp_path / "results" / "results.json").read_text())["parts"]["digits"]
    for key, arm in found["arms"].items():
        assert [row["step"] for row in arm["seeds"]["0"]] == [1, 2]
        assert shlex.split(arm["options"])[:2] == ["--lr", "0.002"], key
    assert (tmp_path / "results" / "digits.png").exists()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a run that is done was started again")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(study.environment, "describe", lambda _: {"cpu": "another", "cores": 1})
    study.study(config)
    page = (tmp_path / "results" / "results.json").read_text()
    study.study(StudyConfig("digits", tmp_path / "runs", tmp_path / "results", jobs=7))
    assert (tmp_path / "results" / "results.json").read_text() == page
    assert json.loads(page)["parts"]["digits"]["arms"] == found["arms"]
    monkeypatch.setitem(PARTS, "digits", Part("digits", settings | {"lr": 1.0}, 1, arms))
    write_seconds(tmp_path / "runs" / "digits", {"switch": 0.12, "dense": 0.1})
    with pytest.raises(ValueError, match=r"was trained with lr 0\.002 and the study has 1\.0; remove it"):
        study.study(config)
