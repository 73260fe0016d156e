"""benchmarks/compare.py: the verdict on made-up times, and two trees timed in turns."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.environment import ROOT


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "same"), (1.3, "slower"), (0.75, "faster")])
def test_verdicts(factor: float, verdict: str) -> None:
    """From 15 rounds with 5% of noise, one of them disturbed."""
    for seed in range(30):
        generator = random.Random(seed)
        ratios = [math.log(factor * generator.lognormvariate(0, 0.05)) for _ in range(14)]
        assert compare.change("", [*ratios, math.log(50)]).verdict(1.05) == verdict


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for ratios, code in (([0.0] * 5, 0), ([0.5] * 5, 1), ([], 2)):
        found = [compare.change("a call", ratios)] if ratios else []
        monkeypatch.setattr(compare, "compare_revision", lambda *_, found=found: iter(found))
        assert compare.main(["--base", "main"]) == code
    assert "slower  1.649" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main(["--base", "main", "--rounds", "2"])


@pytest.mark.slow
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
