"""benchmarks/report.py on result files that no machine measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.case import BOTH, FORWARD

MACHINE = {
    "device": "cpu", "gpu": None, "cpu": "Made up", "cores": 2, "threads": 2, "isa": "avx2",
    "cpu_family": "family 1, model 2",
    "torch": "2.13", "cuda": None, "triton": "3.9", "commit": "0123456789", "quick": False, "dirty": False,
}  # fmt: skip
GPU = MACHINE | {"device": "cuda", "gpu": "Made Up 100", "cuda": "13.0"}
NOISE = (1.0, 1.5, 0.9, 2.0, 1.1, 1.0, 3.0)  # of a round: all contenders of it are slower alike
SHAPE = {"D": 384, "B": 8, "T": 256, "M": 3, "k": 2}


def row(operation: str, contender: str, milliseconds: float | None, **changes: Any) -> dict[str, Any]:
    samples = [] if milliseconds is None else [1e3 * milliseconds * noise for noise in NOISE]
    return {
        "operation": operation, "note": "", "shape": SHAPE, "dtype": "float32", "device": "cpu", "pass": BOTH,
        "contender": contender, "is_switch_moe": contender.startswith("switch_moe"), "error": 1e-6,
        "allowed": 1e-5, "failure": None, "peak_bytes": 2**20, "saved_bytes": 2**19, "method": "call",
        "samples": samples,
    } | changes  # fmt: skip


def linear_rows(**milliseconds: float | None) -> list[dict[str, Any]]:
    times = {"F.linear": 10.0, "switch_moe": 11.0, "expert loop": 22.0, "grouped_mm": 33.0} | milliseconds
    return [row("expert_linear", name, time) for name, time in times.items()]


def growth_rows() -> list[dict[str, Any]]:
    return [
        row("growth", name, time * size, note=axis, shape=SHAPE | {"L": 1, axis: size})
        for axis in "BTDMkL"
        for size in (1, 2, 4)
        for name, time in {"F.linear": 1.0, "switch_moe": 1.1, "expert loop": 3.0}.items()
    ]


def save(path: Path, rows: list[dict[str, Any]], machine: dict[str, Any] = MACHINE) -> Path:
    benchmarks = [{"group": one["operation"], "extra_info": {"rows": [one]}} for one in rows]
    data = {"machine_info": machine, "datetime": "2026-11-25T00:00:00", "benchmarks": benchmarks}
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a README and no results."""
    for folder in ("benchmarks/results", "switch_moe/kernels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "before\n<!-- benchmarks: x -->\nstale\n<!-- end of benchmarks -->\nafter\n"
    )
    return tmp_path


def cells(text: str, case: str) -> list[str]:
    line = next(line for line in text.splitlines() if case in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_page_readme_and_pictures_come_from_one_command(root: Path) -> None:
    """GPU figures reach the README by the same way as those of a CPU."""
    save(root / "benchmarks/results/cpu.json", [*linear_rows(), *growth_rows()])
    save(root / "benchmarks/results/gpu.json", linear_rows(switch_moe=9.0), GPU)
    for path in report.write(root):
        assert path.stat().st_size > 0
    text = (root / "README.md").read_text()
    assert text.startswith("before\n<!-- benchmarks: x -->\n")
    assert text.endswith("<!-- end of benchmarks -->\nafter\n")
    assert "stale" not in text
    assert cells(text, "| Made Up 100")[2:] == ["0.90", "2.44", "3.67", "-"]
    assert cells(text, "| Made up (family 1), 2 cores")[2:] == ["**1.10**", "2.00", "3.00", "-"]
    written = {path: path.read_bytes() for path in report.write(root)}
    assert written == {path: path.read_bytes() for path in report.write(root)}


@pytest.mark.parametrize(
    "text", ["", "<!-- benchmarks: x -->", "<!-- end of benchmarks -->\n<!-- benchmarks: x -->"]
)
def test_a_readme_without_the_block_is_an_error(root: Path, text: str) -> None:
    save(root / "benchmarks/results/cpu.json", linear_rows())
    (root / "README.md").write_text(text)
    with pytest.raises(ValueError, match="end of benchmarks"):
        report.write(root)
    assert (root / "README.md").read_text() == text


def test_other_files_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="make bench"):
        report.write(root)
    (root / "benchmarks/results/other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"other\.json"):
        report.write(root)


def test_ratios_are_taken_within_a_round() -> None:
    rows = linear_rows()
    rows[1]["samples"][0] *= 50
    line = report.lines(report.Report(MACHINE, "", rows))[0]
    assert line.ratio("expert loop") == pytest.approx(2.0)
    assert line.ratio("not there") is None


def test_every_column_is_bold_where_switch_moe_is_slower(root: Path) -> None:
    rows = linear_rows(switch_moe=40.0)
    text = report.readme_block([report.Report(MACHINE, "", rows)])
    assert cells(text, "D=384")[1:4] == ["**4.00**", "**0.55**", "**0.82**"]


def test_slower_lists_losses_only() -> None:
    rows = linear_rows()
    assert ["F.linear" in text for text in report.slower([report.Report(MACHINE, "", rows)])] == [True]
    assert not list(report.slower([report.Report(MACHINE, "", linear_rows(switch_moe=9.9))]))


def test_a_contender_that_failed_has_no_time() -> None:
    rows = linear_rows(grouped_mm=None)
    rows[3]["failure"] = "wrong: out of forward is 1.0 off"
    assert (
        cells(report.times_table([report.Report(MACHINE, "", rows)], "expert_linear"), "D=384")[-1]
        == "failed"
    )


def test_the_official_layer_is_held_against_the_table_that_it_needs() -> None:
    rows = [row("layer", name, time) for name, time in
            {"switch_moe": 10.0, "switch_moe + table": 20.0, "official": 40.0}.items()]  # fmt: skip
    assert dict(report.lines(report.Report(MACHINE, "", rows))[0].rivals()) == {
        "official": pytest.approx(2.0)
    }


def test_a_contender_without_a_graph_is_marked() -> None:
    rows = linear_rows()
    for one in rows:
        one["method"] = "eager" if one["contender"] == "expert loop" else "graph"
    line = cells(report.times_table([report.Report(GPU, "", rows)], "expert_linear"), "D=384")
    assert ["*" in cell.replace("**", "") for cell in line[4:]] == [False, True, False]


def test_a_gpu_has_graph_and_eager_times() -> None:
    """A contender without a graph has one time, which is held against the eager one of switch_moe."""
    rows = linear_rows()
    for one, eager in zip(rows, (30.0, 44.0, None, 88.0), strict=True):
        one["method"] = "eager" if eager is None else "graph"
        one |= {} if eager is None else {"eager": [1e3 * eager * noise for noise in NOISE]}
    reports = [report.Report(GPU, "", rows)]
    line = cells(report.times_table(reports, "expert_linear"), "D=384")
    assert line[3:] == ["12.1 ms / 48.4 ms", "**0.91** / **0.68**", r"2.00\* / **0.50**", "3.00 / 2.00"]
    text = report.readme_block(reports)
    assert cells(text, "D=384")[1:4] == ["**1.10** / **1.47**", "2.00 / **0.50**", "3.00 / 2.00"]
    assert "without, where the time of the host shows" in text


def test_calibrations_have_a_table(root: Path) -> None:
    calibration = {
        "copies": {"clock_mhz": 1755.0, "tb_s_from_l2": 5.51234},
        "wgmma": {"left_out": "no sm_90a"},
    }
    machine = GPU | {"calibration": calibration, "assemblers": {"triton": "12.8.93", "second": None}}
    save(root / "benchmarks/results/gpu.json", linear_rows(), machine | {"left_out": ["a", "b"]})
    save(root / "benchmarks/results/cpu.json", linear_rows())
    report.write(root)
    text = (root / "benchmarks/README.md").read_text()
    assert cells(text, "| copies")[1:] == ["1755", "-", "-", "5.512", "-", ""]
    assert cells(text, "| wgmma")[1:] == ["-", "-", "-", "-", "-", "no sm_90a"]
    assert text.count("## Limits of") == 1
    assert "ptxas 12.8.93; the kernels are also tested under no other" in text
    assert "2 cases are left out" in text


def test_text_table_has_all_contenders() -> None:
    rows = [*linear_rows(), *linear_rows()]
    for one in rows[4:]:
        one["pass"] = FORWARD
    text = report.text_table(rows)
    assert text.count("grouped_mm") == 2
    assert f"{statistics.median(rows[0]['samples']) / 1e3:.3g} ms" in text
