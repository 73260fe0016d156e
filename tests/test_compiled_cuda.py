"""The CUDA kernels for Hopper, compiled for sm_90a: their machine code under each assembler here."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import assembler, compiled, compiled_cuda

COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "compiled.json"
RESULTS = "benchmarks/results/compiled"
REMEDY = (
    f"if that is meant: python -m benchmarks.compiled --cuda --json {RESULTS}.json --markdown {RESULTS}.md"
)


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(COMMITTED.read_text())["cuda"]


def by_kernel(rows: list[dict]) -> dict[str, dict]:
    found = {json.dumps([row["kernel"], row["arguments"]]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_the_committed_rows_are_sound(committed: dict) -> None:
    assert [fault for row in committed["rows"] for fault in compiled_cuda.all_faults(row)] == []
    assert [compiled_cuda.faults(row) for row in committed["rows"]] == [{}] * len(committed["rows"])
    assert all(row["others"].keys() == set(committed["others"]) for row in committed["rows"])
    assert len(committed["others"]) >= 2


def test_every_merged_product_is_committed(committed: dict) -> None:
    rows = [row for row in committed["rows"] if row["kernel"] == "merged_product"]
    values = (("bfloat16", "float16"), (2, 3), (1, 2, 3, 4), (False, True), (False, True))
    assert {tuple(row["arguments"].values()) for row in rows} == set(itertools.product(*values))


def test_every_gradient_is_committed(committed: dict) -> None:
    rows = [row for row in committed["rows"] if row["kernel"] != "merged_product"]
    assert {(row["kernel"], *row["arguments"].values()) for row in rows} == {
        *itertools.product(["weight_gradient"], ["bfloat16", "float16"], [1, 2]),
        *itertools.product(["add_gradient_parts"], ["bfloat16", "float16"]),
    }


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("losses", {"losses": ["(C7512) Potential Performance Loss: products one after another"]}),
        ("spills", {"spilled": 8}),
        ("spills", {"spills_in_loop": 1}),
        ("registers", {"budgets": [[160, 161], [32, 20]]}),
        ("registers", {"budgets": [[160, 156], [32, 33]]}),
        ("registers", {"budgets": []}),
        ("pool", {"budgets": [[168, 156], [32, 20]]}),
        ("pool", {"registers": 120}),
        ("pool", {"registers": 136}),  # more than an SM has
        ("products", {"products": 2, "from_registers": 2}),
        ("first operand", {"from_registers": 3}),
        ("main loop", {"loop_products": 0}),
        ("multicast", {"multicast": 0}),
        ("shared memory", {"shared": 227 * 1024 + 8}),
    ],
)
def test_each_fault_is_found(committed: dict, name: str, change: dict) -> None:
    sound = {"dtype": "bfloat16", "groups": 3, "top_k": 2, "gradient": False, "modulate": False}
    (row,) = [row for row in committed["rows"] if row["arguments"] == sound]
    assert list(compiled_cuda.faults(row | change)) == [name]


@pytest.mark.parametrize(
    ("kernel", "name", "change"),
    [
        ("weight_gradient", "first operand", {"from_registers": 4}),
        ("weight_gradient", "multicast", {"multicast": 1}),
        ("weight_gradient", "registers", {"budgets": [[224, 220], [56, 57]]}),
        ("add_gradient_parts", "products", {"products": 1}),
        ("add_gradient_parts", "registers", {"budgets": [[224, 40]]}),
        ("add_gradient_parts", "spills", {"spilled": 8}),
    ],
)
def test_each_fault_of_gradients_is_found(committed: dict, kernel: str, name: str, change: dict) -> None:
    row = next(row for row in committed["rows"] if row["kernel"] == kernel)
    assert list(compiled_cuda.faults(row | change)) == [name]


def test_what_another_assembler_does_is_told(committed: dict) -> None:
    row = committed["rows"][0]
    version = committed["others"][0]
    other = row["others"][version] | {
        "agrees": False,
        "changed": {"products": 3},
        "faults": {"products": "3"},
    }
    told = list(compiled_cuda.all_faults(row | {"others": row["others"] | {version: other}}))
    assert [line.split(f"ptxas {version}")[1] for line in told] == [
        ": products: 3",
        " changes {'products': 3}",
    ]


def test_names() -> None:
    name = "_ZN10switch_moe14merged_productIN6hopper{}ELi3ELi4ELb0ELb1EEEvNS_17MergedProductMapsIT_EEPKi"
    arguments = {"groups": 3, "top_k": 4, "gradient": False, "modulate": True}
    for mangled, dtype in (("8BFloat16", "bfloat16"), ("7Float16", "float16")):
        found = compiled_cuda.identify(name.format(mangled))
        assert found == ("merged_product", {"dtype": dtype, **arguments})
    with pytest.raises(ValueError, match="the kernel unheard_of is not in FAMILIES"):
        compiled_cuda.identify("_ZN10switch_moe10unheard_ofIN6hopper8BFloat16ELi3EEEvPKi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cuda"], "--json is None; with --cuda it must be a file that a run without --cuda wrote"),
        (["--cuda", "--ptxas", "/no/ptxas"], "--ptxas is /no/ptxas; it must be a ptxas that runs"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compiled", *arguments])
    with pytest.raises(SystemExit, match=re.escape(message)):
        compiled.main()


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "compiled.json").write_text('{"rows": []}')
    monkeypatch.setattr(assembler, "cuda_tool", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["compiled", "--cuda", "--json", str(tmp_path / "compiled.json")])
    with pytest.raises(SystemExit, match="--cuda: nvcc was not found in CUDA_HOME"):
        compiled.main()


def test_each_command_keeps_the_part_of_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "compiled.json"
    sound: dict = {"kernel": "merged_product", "arguments": {}, "faults": {}, "others": {}}
    monkeypatch.setattr(compiled, "triton_report", lambda arguments: {"triton": "3", "rows": [sound]})
    monkeypatch.setattr(compiled_cuda, "report", lambda more: {"ptxas": "13", "rows": [sound] * 2})
    expected: dict = {"triton": "3", "rows": [sound]}
    for option in ([], ["--cuda"], []):
        monkeypatch.setattr(sys, "argv", ["compiled", "--json", str(path), *option])
        compiled.main()
        expected |= {"cuda": {"ptxas": "13", "rows": [sound] * 2}} if option else {}
        assert json.loads(path.read_text()) == expected


@pytest.fixture(scope="module")
def ptx() -> str:
    if assembler.cuda_tool("nvcc") is None:
        pytest.skip("needs nvcc; CI has it")
    return compiled_cuda.translate(compiled_cuda.SOURCES[0])


@pytest.fixture(scope="module")
def report() -> dict:
    if assembler.cuda_tool("nvcc") is None:
        pytest.skip("needs nvcc; CI has it")
    return json.loads(json.dumps(compiled_cuda.report([])))  # as it is committed


@pytest.mark.slow
def test_machine_code(report: dict) -> None:
    """Without faults, and alike, under the toolkit's assembler and the two that Triton brings."""
    assert [fault for row in report["rows"] for fault in compiled_cuda.all_faults(row)] == []
    assert len({report["ptxas"], *report["others"]}) >= 2


@pytest.mark.slow
def test_the_committed_report_is_of_these_kernels(report: dict, committed: dict) -> None:
    found, expected = by_kernel(report["rows"]), by_kernel(committed["rows"])
    assert sorted(found) == sorted(expected), REMEDY
    if report["ptxas"] != committed["ptxas"]:
        pytest.skip(f"ptxas is {report['ptxas']}; {COMMITTED.name} is of {committed['ptxas']}")
    both = set(report["others"]) & set(committed["others"])
    for kernel, row in found.items():
        for rows in (row, expected[kernel]):
            rows["others"] = {version: rows["others"][version] for version in both}
        assert row == expected[kernel], REMEDY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        # Without setmaxnreg the consumers keep the 128 registers of the launch, as many as they have sums.
        (r"setmaxnreg\.\S+ \d+;", "", {"losses", "registers", "spills"}),
        (r"\.multicast::cluster( \[.*\]), %\w+;", r"\1;", {"multicast"}),
    ],
)
def test_planted_fault(ptx: str, old: str, new: str, names: set[str]) -> None:
    """In the PTX of one kernel."""
    head, *kernels = ptx.split(".visible .entry ")
    (sound,) = [text for text in kernels if re.match(r"\w+BFloat16ELi3ELi2ELb0ELb0E", text)]
    planted, count = re.subn(old, new, sound)
    assert count > 0
    own = compiled_cuda.assemblers([])[:1]
    for text, expected in ((sound, set()), (planted, names)):
        (row,) = compiled_cuda.inspect_all(head + ".visible .entry " + text, own)["rows"]
        assert row["faults"].keys() == expected, row["faults"]
