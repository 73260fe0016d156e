"""The regression guard, on result files that no machine measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up_results as made_up
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import compare

Row = dict[str, Any]
NOISE = 0.05
SEEDS = range(40)


def save(path: Path, rows: list[Row], **changes: Any) -> str:
    path.write_text(json.dumps(made_up.report(rows, **changes)))
    return str(path)


def run(folder: Path, old: list[Row], new: list[Row], *options: str, **changes: Any) -> int:
    """``changes``: of the new file."""
    files = save(folder / "old.json", old), save(folder / "new.json", new, **changes)
    return compare.main([*files, *options])


def changed(rows: list[Row], contender: str, **changes: Any) -> list[Row]:
    """The rows, with changes of one contender; a function gets the old value."""

    def value(row: Row, key: str) -> Any:
        return changes[key](row.get(key)) if callable(changes[key]) else changes[key]

    return [
        row | {key: value(row, key) for key in changes} if row["contender"] == contender else row
        for row in rows
    ]


def change_first_of_ours(rows: list[Row], **changes: Any) -> list[Row]:
    first = next(row for row in rows if row["ours"])
    return [row | changes if row is first else row for row in rows]


def times(factor: float) -> Callable[[float | None], float | None]:
    return lambda time: time * factor if time else time


def verdicts(old: list[Row], new: list[Row], limit: float = 1.05) -> list[str]:
    changes, _, _ = compare.compare(made_up.report(old), made_up.report(new), limit)
    return [change.verdict for change in changes]


@pytest.mark.parametrize("drift", [1.0, 1.5])
def test_noise_and_drift_of_the_machine_are_not_reported(drift: float) -> None:
    rows = made_up.rows()
    drifted = [row | {"microseconds": times(drift)(row["microseconds"])} for row in rows]
    found = [
        verdict
        for seed in SEEDS
        for verdict in verdicts(
            made_up.noisy(rows, seed, NOISE), made_up.noisy(drifted, 1000 + seed, NOISE, rounds=11)
        )
    ]
    assert found.count(compare.SAME) >= 0.95 * len(found) > 0


@pytest.mark.parametrize(("factor", "verdict"), [(1.2, compare.SLOWER), (1 / 1.2, compare.FASTER)])
def test_a_change_of_a_fifth_is_found(factor: float, verdict: str) -> None:
    rows = [row for row in made_up.rows() if row["contender"] != "switch_moe + table"]
    new = changed(rows, "switch_moe", microseconds=times(factor))
    found = [
        found
        for seed in SEEDS
        for found in verdicts(
            made_up.noisy(rows, seed, NOISE, rounds=25), made_up.noisy(new, 1000 + seed, NOISE, rounds=25)
        )
    ]
    assert found.count(verdict) >= 0.9 * len(found) > 0
    assert set(found) <= {verdict, compare.SAME}


def test_exit_code_and_output_of_a_slowdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_up.noisy(made_up.rows(), 0, 0.01)
    slow = [
        row | {"samples": [1.2 * time for time in row["samples"]]}
        if (row["group"], row["contender"]) == ("gate", "switch_moe")
        else row
        for row in rows
    ]
    assert run(tmp_path, rows, slow) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("slower   1.200 (")
    assert "beside reference" in lines[0]
    assert "gate: D=384 N=1032, float32, forward, cpu, switch_moe" in lines[0]
    assert lines[-1].endswith(": 1 slower, 0 failed or grew")
    assert run(tmp_path, rows, slow, "--limit", "1.3") == 0
    assert run(tmp_path, rows, rows) == 0


def test_without_a_base_the_times_are_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = [row for row in made_up.rows() if row["contender"] == "switch_moe" and row["group"] == "gate"]
    assert run(tmp_path, alone, changed(alone, "switch_moe", samples=[600.0] * 9)) == 1
    assert "slower   2.000 (2.000 to 2.000), unpaired" in capsys.readouterr().out


def test_few_rounds_give_no_verdict() -> None:
    rows = made_up.rows()
    few = changed(rows, "switch_moe", samples=lambda samples: [2 * time for time in samples[:4]])
    few = changed(few, "F.linear", samples=lambda samples: samples[:4])
    few = [row for row in few if row["group"] == "growth"]
    assert set(verdicts(few, few)) == {compare.UNCLEAR}


@pytest.mark.parametrize("count", compare.COUNTS)
def test_a_count_that_grows_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: str
) -> None:
    rows = changed(made_up.rows(), "switch_moe", **{count: 1000})
    more = change_first_of_ours(rows, **{count: 1001})
    assert run(tmp_path, rows, more) == 1
    assert f"grew: {count} from 1000 to 1001: expert_linear: D=384 B=32" in capsys.readouterr().out
    assert run(tmp_path, more, rows) == 0
    assert run(tmp_path, rows, changed(rows, "F.linear", **{count: 1e6})) == 0


def test_a_new_failure_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_up.rows()
    broken = change_first_of_ours(rows, failure="wrong", microseconds=None, samples=[])
    assert run(tmp_path, rows, broken) == 1
    assert "failed: expert_linear: D=384 B=32 T=256 M=3 k=2" in capsys.readouterr().out
    assert run(tmp_path, broken, rows) == 0
    assert "not timed in both files" in capsys.readouterr().out


def test_rows_of_one_file_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_up.rows()
    assert run(tmp_path, rows[1:], rows[:-1]) == 0
    printed = capsys.readouterr().out
    for where, row in (("old", rows[-1]), ("new", rows[0])):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"only in the {where} file")]
        assert line.endswith(f"cpu, {row['contender']}")


def test_different_machines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_up.rows()
    other = made_up.report()["machine"] | {"cpu": "Made Up 2"}
    assert run(tmp_path, rows, rows, machine=other) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "different machines: cpu is 'Made Up 1' and 'Made Up 2'" in printed.err
    assert run(tmp_path, rows, rows, "--different-machines", machine=other) == 0


def without(key: str) -> str:
    rows = made_up.rows()
    return json.dumps(made_up.report([{name: row[name] for name in row if name != key} for row in rows]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("{", "not JSON: "),
        ("[]", "format is 'list'; it must be 1"),
        ('{"device": "cpu"}', "format is None; it must be 1"),
        (json.dumps(made_up.report() | {"format": 2}), "format is 2; it must be 1"),
        (json.dumps(made_up.report() | {"rows": {}}), "rows is {}; it must be a list"),
        (json.dumps(made_up.report(["row"])), "row 0: is 'row'; it must be a dict"),
        (without("samples"), "row 0: has no 'samples'"),
        (json.dumps(made_up.report(2 * made_up.rows()[:1])), "row 1: expert_linear D=384 B=32"),
        (json.dumps(made_up.report(changed(made_up.rows(), "switch_moe", samples=[0]))), "has a time of 0;"),
        (json.dumps(made_up.report([])), "no row of ours is timed in both files"),
    ],
)  # fmt: skip
def test_bad_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    good, bad = save(tmp_path / "good.json", made_up.rows()), tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    assert compare.main([good, str(bad)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare: ")
    assert message in line
    assert "no row" in message or str(bad) in line


@pytest.mark.parametrize("limit", ["0.9", "nan", "inf", "x"])
def test_bad_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, made_up.rows(), made_up.rows(), "--limit", limit)
    assert "--limit" in capsys.readouterr().err
