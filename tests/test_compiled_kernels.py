"""Every Triton kernel at every shipped tile, compiled for sm_80, sm_90, sm_100: what machine code it becomes.

It takes no more registers than the committed benchmarks/results/compiled.json. The compiler runs in a process
of its own, because in this one Triton interprets (conftest.py).
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 90, 100)
COMMITTED = ROOT / "benchmarks" / "results" / "compiled.json"
RESULTS = "benchmarks/results/compiled"
REMEDY = f"if that is meant: python -m benchmarks.compiled --json {RESULTS}.json --markdown {RESULTS}.md"
IDENTITY = ("kernel", "arch", "dtype", "tile", "odd", "top_k", "branches", "warps", "stages")
PROPERTIES = ("compiles", "spills", "tensor cores", "float32", "shared memory", "registers")


def compiled(directory: Path, *arguments: str) -> dict:
    """The report of ``benchmarks.compiled``; it exits with 1 where it found a fault."""
    path = directory / "compiled.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--json", str(path), *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=1800
    )
    assert path.exists(), result.stderr[-4000:]
    report = json.loads(path.read_text())
    assert result.returncode == (1 if any(row["faults"] for row in report["rows"]) else 0)
    return report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return compiled(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    path = Path(__file__).parent / "planted_kernels.py"
    return compiled(tmp_path_factory.mktemp("planted"), "--calls", str(path))["rows"]


@pytest.mark.slow
def test_calls_of_other_sizes_share_binaries(tmp_path: Path) -> None:
    """Batches and tokens of 24 sizes: no size compiles a kernel again, but for tiles and sums."""
    code = """
from functools import partial
import torch
from benchmarks import kernel_calls
from benchmarks.compiled import record
sizes = [(batch, tokens) for batch in (1, 2, 3, 8, 17, 64, 128, 256) for tokens in (64, 255, 256)]
call = partial(kernel_calls.expert_linear, torch.bfloat16)
found = record([partial(call, *size, 768, 3, 2, True, True) for size in sizes], 90)
print(len(sizes), len(found), len({spec.key for spec in found}))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    calls, launches, binaries = map(int, done.stdout.split())
    assert calls == 24
    assert launches > 100
    assert binaries <= 20


def launched_kernels() -> list[str]:
    """module.kernel for every first argument of ``launch`` in switch_moe/kernels."""
    found = set()
    for path in (ROOT / "switch_moe" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "launch":
                names = {part.id for part in ast.walk(node.args[0]) if isinstance(part, ast.Name)}
                found |= {f"{path.stem}.{name}" for name in names if name.endswith("_kernel")}
    return sorted(found)


def describe(row: dict) -> str:
    name = f"{row['kernel']} sm_{row['arch']} {row['dtype']}"
    return f"{name} {row['warps']} warps {row['stages']} stages {row['tile']} {row['branches']}"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", launched_kernels())
def test_is_compiled_for_every_architecture(report: dict, kernel: str) -> None:
    found = {row["arch"] for row in report["rows"] if row["kernel"] == kernel}
    assert found == set(ARCHITECTURES), f"calls() in benchmarks/kernel_calls.py does not reach {kernel}"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("kernel", launched_kernels())
def test_machine_code(report: dict, kernel: str, name: str) -> None:
    rows = [row for row in report["rows"] if row["kernel"] == kernel]
    wrong = [f"{describe(row)}: {row['faults'][name]}" for row in rows if name in row["faults"]]
    assert not wrong, f"{name}:\n" + "\n".join(wrong)


@pytest.mark.slow
def test_no_other_faults(report: dict) -> None:
    assert {name for row in report["rows"] for name in row["faults"]} <= set(PROPERTIES)


@pytest.mark.slow
def test_products_are_of_the_types_that_ship(report: dict) -> None:
    """The checks of tensor cores and of true float32 had something to check."""
    for arch in ARCHITECTURES:
        rows = [row for row in report["rows"] if row["arch"] == arch]
        kinds = {kind for row in rows for _, kind in row.get("products", [])}
        assert {"bf16", "f32", "tf32"} <= kinds


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(COMMITTED.read_text())


@pytest.fixture
def same_compiler(report: dict, committed: dict) -> None:
    if report["triton"] != committed["triton"]:
        pytest.skip(f"Triton is {report['triton']}; {COMMITTED.name} is of {committed['triton']}")


def identified(rows: list[dict]) -> dict[str, dict]:
    """Rows by what was compiled."""
    found = {json.dumps([row[name] for name in IDENTITY], sort_keys=True): row for row in rows}
    assert len(found) == len(rows)
    return found


def worse(row: dict, before: dict) -> list[str]:
    """In which numbers a kernel got worse."""
    found = [name for name in ("registers", "spilled") if row[name] > before[name]]
    found += ["resident"] if row["resident"] < before["resident"] else []
    return found


@pytest.mark.slow
def test_the_committed_report_is_of_these_kernels(report: dict, committed: dict) -> None:
    """Another Triton may change the machine code, but not what is compiled."""
    found, expected = identified(report["rows"]).keys(), identified(committed["rows"]).keys()
    assert sorted(found - expected) == sorted(expected - found) == [], REMEDY


@pytest.mark.slow
@pytest.mark.usefixtures("same_compiler")
@pytest.mark.parametrize("kernel", launched_kernels())
def test_is_not_worse_than_committed(report: dict, committed: dict, kernel: str) -> None:
    before = identified(committed["rows"])
    rows = {key: row for key, row in identified(report["rows"]).items() if row["kernel"] == kernel}
    found = {describe(row): worse(row, before[key]) for key, row in rows.items() if key in before}
    assert {name: numbers for name, numbers in found.items() if numbers} == {}, REMEDY


def test_a_worse_kernel_is_noticed(committed: dict) -> None:
    row = next(row for row in committed["rows"] if row["kernel"] == "expert_linear._forward_kernel")
    assert worse(row, row) == []
    for name, change in (("registers", 1), ("spilled", 8), ("resident", -1)):
        assert worse(row | {name: row[name] + change}, row) == [name]


def test_the_page_is_of_the_committed_report(committed: dict) -> None:
    from benchmarks.compiled import page

    text = COMMITTED.with_suffix(".md").read_text()
    assert page(committed) == text, REMEDY


def test_the_committed_report_is_of_what_the_newest_torch_brings(committed: dict) -> None:
    """Triton 3.7, which torch 2.13 pins, and its two assemblers."""
    assert committed["triton"].startswith("3.7.")
    assert committed["ptxas"].keys() == {"12.8.93", "13.1.80"}
    assert committed["second_ptxas"] == "13.1.80"
    compared = {row["arch"] for row in committed["rows"] if "same_under_both" in row}
    assert compared == {80, 90}


@pytest.mark.slow
@pytest.mark.parametrize(("option", "same"), [("", True), ("--opt-level 1", False)])
def test_other_machine_code_is_seen(option: str, same: bool, tmp_path: Path) -> None:
    """Triton's own assembler as the second one, and with less optimisation."""
    from benchmarks.assembler import of_triton

    ptxas = tmp_path / "ptxas"
    ptxas.write_text(f'#!/bin/sh\nexec "{of_triton(90)[0].path}" {option} "$@"\n')
    ptxas.chmod(0o755)
    arguments = ["--arch", "90", "--only", "merge_experts", "--ptxas", str(ptxas)]
    rows = compiled(tmp_path, *arguments)["rows"]
    assert {row["same_under_both"] for row in rows} == {same}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.slow
class TestPlantedFaults:
    @staticmethod
    def find(planted: list[dict], arch: int, **wanted: object) -> dict:
        rows = [row for row in planted if row["arch"] == arch]
        (row,) = [row for row in rows if {**row, **row["tile"]}.items() >= wanted.items()]
        return row

    def test_sound(self, planted: list[dict], arch: int) -> None:
        row = self.find(planted, arch, dtype="bfloat16", BLOCK_M=64)
        assert row["faults"] == {}
        assert row["products"] == [[64, "bf16"]]
        assert list(row["tensor"]) == {80: ["HMMA"], 90: ["HGMMA"], 100: ["UTCHMMA"]}[arch]
        assert row["resident"] >= 2

    def test_spills(self, planted: list[dict], arch: int) -> None:
        assert "spills" in self.find(planted, arch, dtype="bfloat16", BLOCK_M=256)["faults"]

    def test_shared_memory(self, planted: list[dict], arch: int) -> None:
        assert "shared memory" in self.find(planted, arch, dtype="bfloat16", BLOCK_M=128)["faults"]

    def test_true_float32_takes_no_tensor_core(self, planted: list[dict], arch: int) -> None:
        row = self.find(planted, arch, dtype="float32", BLOCK_M=32)
        assert row["products"] == [[32, "f32"]]
        assert row["tensor"] == {}
        assert "float32" not in row["faults"]

    def test_tf32_takes_tensor_cores(self, planted: list[dict], arch: int) -> None:
        row = self.find(planted, arch, dtype="tf32")
        assert row["products"] == [[64, "tf32"]]
        assert row["tensor"]

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("tensor cores", {"tensor": {}}),
            ("tensor cores", {"tensor": {"HMMA": 8}}),  # not the instruction of a warp group
            ("float32", {"products": [[64, "f32"]]}),
            ("registers", {"registers": 255, "threads": 512}),
            ("registers", {"threads": 2048}),
        ],
    )
    def test_other_faults(self, planted: list[dict], arch: int, name: str, change: dict) -> None:
        from benchmarks.compiled import faults

        row = self.find(planted, arch, dtype="bfloat16", BLOCK_M=64)
        harmless = arch == 80 and change == {"tensor": {"HMMA": 8}}
        assert list(faults(row | change)) == ([] if harmless else [name])

    def test_what_does_not_compile(self, planted: list[dict], arch: int) -> None:
        assert "compiles" in self.find(planted, arch, kernel="calls.refused")["faults"]
