"""switch_moe/kernels/measured.json: what result files must show before ``auto`` takes the CUDA kernels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import GPU, row, save

from benchmarks import environment, measured, report, test_expert_linear
from benchmarks.case import BOTH, FORWARD, MODULATED, SWITCH_MOE, WITH_CUDA
from benchmarks.environment import ROOT
from switch_moe.kernels import measured as installed

Rows = list[dict[str, Any]]
TESTED = {"tests.test_expert_linear_hopper": {"passed": 3}, "tests.test_dispatch": {"skipped": 2}}


def test_the_committed_file_is_what_the_committed_results_give() -> None:
    """Nobody enables a kernel by hand, and a kernel that changes is Triton's again until it is measured."""
    files = report.load_all(ROOT / "benchmarks" / "results")
    assert installed.FILE.read_text() == measured.text(report.measured_rows(files, ROOT))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the sources of the kernels and no results."""
    for folder in ("benchmarks/results", "switch_moe/kernels"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    name = "switch_moe/kernels/expert_linear_hopper.py"
    shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def machine(root: Path) -> dict[str, Any]:
    return GPU | {"architecture": "sm_90", "tests": TESTED, "cuda_kernels": measured.kernels(root)}


def timed(forward: float = 0.8, both: float = 0.9, modulated: float = 1.1) -> Rows:
    """Two passes with, relative to Triton's, these times of the CUDA kernels."""
    return [
        row("expert_linear", name + end, 10.0 * (over if end else 1.0), dtype="bfloat16", method="graph",
            eager=[9.0, 9.0], **{"pass": which})
        for which, plain in ((FORWARD, forward), (BOTH, both))
        for name, over in ((SWITCH_MOE, plain), (MODULATED, modulated))
        for end in ("", WITH_CUDA)
    ]  # fmt: skip


def derived(root: Path, **files: tuple[Rows, dict[str, Any]]) -> Rows:
    for name, (rows, of) in files.items():
        save(root / f"benchmarks/results/{name}.json", rows, of)
    return report.measured_rows(report.load_all(root / "benchmarks" / "results"), root)


def test_rows_of_a_result_file(root: Path) -> None:
    found = derived(root, gpu=(timed(), machine(root)))
    shape = {"Din": 384, "Dout": 384, "M": 3, "k": 2, "B": 8, "T": 256}
    common = {"architecture": "sm_90", "dtype": "bfloat16", "results": "gpu.json", "commit": "0123456789"}
    assert found == [
        {**common, **shape, "modulate": False, "forward": 0.8, "forward+backward": 0.9, "backend": "cuda"},
        {**common, **shape, "modulate": True, "forward": 1.1, "forward+backward": 1.1, "backend": "triton"},
    ]
    assert json.loads(measured.text(found)) == found
    table = installed.table(found)["sm_90"]
    assert sorted(one.backend for (one,) in table.values()) == ["cuda", "triton"]


def test_both_kinds_of_kernels_take_turns_on_a_gpu_that_has_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(device: str) -> list[str]:
        case = test_expert_linear.linear_case(device, torch.bfloat16, 1, 1, 8)
        return [one.name for one in case.contenders if one.is_switch_moe]

    assert names("cpu") == [SWITCH_MOE, MODULATED]
    monkeypatch.setattr(environment, "device_reason", lambda device: "it has none")
    assert names("cuda") == [SWITCH_MOE, MODULATED]
    monkeypatch.setattr(environment, "device_reason", lambda device: None)
    assert names("cuda") == [name + end for end in ("", WITH_CUDA) for name in measured.CONTENDERS]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cuda_kernels": None}, "no CUDA kernels"),
        ({"cuda_kernels": 1}, "others than those here"),
        ({"dirty": True}, "uncommitted"),
        ({"quick": True}, "quick"),
        ({"tests": {}}, "did not all run"),
        ({"tests": {"tests.test_dispatch": {"passed": 9}}}, "did not all run"),
        ({"tests": {"tests.test_expert_linear_hopper": {"passed": 9, "skipped": 1}}}, "did not all run"),
        ({"tests": TESTED | {"tests.test_expert_linear_hopper_backend": {"failure": 1}}}, "did not all run"),
    ],
)
def test_a_file_that_does_not_count(root: Path, change: dict[str, Any], said: str) -> None:
    of = machine(root)
    assert measured.fault(of, root) is None
    assert said in measured.fault(of | change, root)
    assert derived(root, gpu=(timed(), of | change)) == []


@pytest.mark.parametrize("name", ["csrc/hopper.h", "csrc/expert_linear.cu", "csrc/expert_linear_hopper.h"])
def test_other_kernels_than_the_measured_ones(root: Path, name: str) -> None:
    of = machine(root)
    (root / "csrc" / "match_columns.cpp").write_text("")
    assert measured.fault(of, root) is None
    with (root / name).open("a") as file:
        file.write("// changed\n")
    assert "others than those here" in measured.fault(of, root)


def slow_rounds(count: int) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        mine = rows[1]["samples"]
        mine[:count] = [2 * one for one in mine[:count]]

    return change


def lengthen(rows: Rows) -> None:
    """Twenty-one rounds in place of seven."""
    for one in rows:
        one["samples"] = 3 * one["samples"]


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        (lambda rows: None, "cuda"),
        (slow_rounds(1), "triton"),  # one of seven
        (lambda rows: (lengthen(rows), slow_rounds(2)(rows)), "cuda"),  # two of twenty-one
        (lambda rows: (lengthen(rows), slow_rounds(3)(rows)), "triton"),
        (lambda rows: rows[5].update(eager=[9.1, 9.1]), "triton"),  # the host is slower
        (lambda rows: rows[5].update(eager=[]) or rows[4].update(eager=[]), "triton"),
        (lambda rows: rows[5].update(method="eager"), None),
        (lambda rows: rows[1].update(failure="wrong"), None),
        (lambda rows: rows.pop(5), None),
        (lambda rows: rows.__delitem__(slice(0, 4)), None),  # no forward
    ],
)
def test_faster_means_beyond_the_noise(
    root: Path, change: Callable[[Rows], Any], backend: str | None
) -> None:
    rows = timed()
    change(rows)
    found = [one["backend"] for one in derived(root, gpu=(rows, machine(root))) if not one["modulate"]]
    assert found == ([] if backend is None else [backend])


@pytest.mark.parametrize(("forward", "both", "backend"), [(0.99, 0.9, "triton"), (0.8, 0.985, "triton"),
                                                          (0.97, 0.97, "cuda")])  # fmt: skip
def test_both_passes_must_gain_two_percent(root: Path, forward: float, both: float, backend: str) -> None:
    assert derived(root, gpu=(timed(forward, both), machine(root)))[0]["backend"] == backend


def test_the_worst_gpu_of_an_architecture_decides(root: Path) -> None:
    of = machine(root)
    found = derived(root, a=(timed(both=0.8), of), b=(timed(both=0.95), of), c=(timed(both=0.9), of))
    assert found[0]["results"] == "b.json"
    found = derived(root, a=(timed(forward=1.5, both=0.5), of))
    assert (found[0]["results"], found[0]["backend"]) == ("a.json", "triton")
