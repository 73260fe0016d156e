"""benchmarks/compare.py: the verdict on made-up times, and two trees timed in turns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from test_report import MACHINE, linear_rows, save

from benchmarks import compare
from benchmarks.environment import ROOT

NOISE = 0.05
SEEDS = range(30)


def noisy_rows(seed: int, factor: float = 1.0, drift: float = 1.0) -> list[dict[str, Any]]:
    """expert_linear with noise of its own in every sample, and a drift that hits all alike."""
    generator = random.Random(seed)
    rows = linear_rows(switch_moe=11.0 * factor)
    for row in rows:
        row["samples"] = [drift * t * generator.lognormvariate(0, NOISE) for t in 2 * row["samples"]]
    return rows


def verdicts(folder: Path, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    reports = [compare.load(save(folder / name, rows)) for name, rows in (("old", old), ("new", new))]
    return [change.verdict(1.05) for change in compare.compare_files(*reports)]


@pytest.mark.parametrize("drift", [1.0, 1.5])
def test_nothing_changed(tmp_path: Path, drift: float) -> None:
    """A machine that is slower by half in one of two runs changes nothing."""
    for seed in SEEDS:
        assert verdicts(tmp_path, noisy_rows(seed), noisy_rows(seed + 1000, drift=drift)) == ["same"]


@pytest.mark.parametrize(("factor", "verdict"), [(1.3, "slower"), (0.75, "faster")])
def test_a_change_is_found(tmp_path: Path, factor: float, verdict: str) -> None:
    for seed in SEEDS:
        assert verdicts(tmp_path, noisy_rows(seed), noisy_rows(seed + 1000, factor)) == [verdict]


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = save(tmp_path / "old", noisy_rows(0))
    slow = save(tmp_path / "slow", noisy_rows(1, 1.5))
    other = save(tmp_path / "other", noisy_rows(1), MACHINE | {"cpu": "Another"})
    empty = save(tmp_path / "empty", [])
    files = {
        "same": (old, old, 0),
        "slow": (old, slow, 1),
        "other": (old, other, 2),
        "empty": (old, empty, 2),
    }
    for first, second, code in files.values():
        assert compare.main([str(first), str(second)]) == code
    assert "cpu is 'Made up' and 'Another'" in capsys.readouterr().err
    assert compare.main([str(old), str(tmp_path / "missing")]) == 2
    with pytest.raises(SystemExit):
        compare.main([str(old)])


def test_two_trees_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of one tree against itself; calls that a revision lacks are left out."""
    worker = compare.Worker

    def two_cases(tree: Path, device: str) -> compare.Worker:
        made = worker(tree, device)
        made.cases = ["linear_assignment n=84", "not there"]
        return made

    monkeypatch.setattr(compare, "Worker", two_cases)
    (change,) = compare.compare_trees(ROOT, ROOT, 5, "cpu")
    assert change.case == "linear_assignment n=84"
    assert 0.2 < change.ratio < 5


def test_a_revision_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--base", "no-such-revision"]) == 2
    assert "no-such-revision" in capsys.readouterr().err
