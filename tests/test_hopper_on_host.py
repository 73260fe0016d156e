"""The emulation of Hopper (cuda_on_host/): a product is right in every schedule, planted bugs are found."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from hopper_emulation import EMULATION, LATE, ROOT, Schedule, build, schedules
from planted_gemm import BUGS, VARIANTS, Bug, Variant
from torch import Tensor

from benchmarks import assembler

WARPGROUPS = 6  # of a cluster of two blocks
IDS = [bug.name.replace(" ", "-") for bug in BUGS]


def kernels(bugs: list[Bug]) -> str:
    """C++ of a table of kernels: the variants, then one with each bug."""
    text = (EMULATION / "gemm.h").read_text().replace("#pragma once", "")
    spaces = [f"namespace right {{\n{text}\n}}"]
    rows = [(variant, "right") for variant in VARIANTS]
    for i, bug in enumerate(bugs):
        assert text.count(bug.old) == 1, bug
        spaces.append(f"namespace bug{i} {{\n{text.replace(bug.old, bug.new)}\n}}")
        rows.append((bug.variant, f"bug{i}"))
    entries = [
        f"{{2, {int(variant.transposed_a)}, {int(variant.transposed_c)}, {space}::kSharedBytes,\n"
        "  [](hopper::TensorMap a, hopper::TensorMap b, hopper::TensorMap c, Problem p) {\n"
        f"      {variant.kernel(space)}(a, b, c, {{p.batch, p.rows, p.columns, p.depth}}); }}}}"
        for variant, space in rows
    ]
    return "\n".join(spaces) + "\nconst Kernel kernels[] = {\n" + ",\n".join(entries) + "};\n"


def library(folder: Path, bugs: list[Bug]) -> ctypes.CDLL:
    (folder / "kernels.inc").write_text(kernels(bugs))
    built = build(folder, EMULATION / "gemm.cpp", include=(folder,))
    built.run_gemm.restype = built.refusal.restype = ctypes.c_char_p
    return built


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library(tmp_path_factory.mktemp("gemm"), [])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library(tmp_path_factory.mktemp("planted"), BUGS)


def fault(
    built: ctypes.CDLL,
    number: int,
    variant: Variant,
    size: tuple[int, int, int, int],
    schedule: Schedule,
    grid: int = 2,
) -> str | None:
    """What went wrong, if anything: a fault of the emulation, or wrong numbers."""
    batch, rows, columns, depth = size
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(variant.dtype)

    a, b = random(batch, rows, depth), random(batch, depth, columns)
    stored = a.mT.contiguous() if variant.transposed_a else a
    c = torch.full(
        (batch, columns, rows) if variant.transposed_c else (batch, rows, columns), torch.nan, dtype=a.dtype
    )
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (stored, b, c)]
    what = built.run_gemm(number, *pointers, *size, grid, schedule.as_ints())
    if what is not None:
        return what.decode()
    expected = a.double() @ b.double()
    error = (c.mT if variant.transposed_c else c).double() - expected
    relative = float(error.norm() / expected.norm())
    # Only the rounding of the output is in the error.
    return (
        None if relative < {torch.bfloat16: 2e-3, torch.float16: 3e-4}[variant.dtype] else f"error {relative}"
    )


def test_quick(right: ctypes.CDLL) -> None:
    for number, variant in enumerate(VARIANTS):
        assert fault(right, number, variant, (1, 72, 264, 200), Schedule(LATE, LATE, LATE)) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_every_schedule(right: ctypes.CDLL, number: int) -> None:
    """Edges in every direction, odd numbers of column blocks, fewer steps than stages, several tiles."""
    for schedule in schedules(WARPGROUPS):
        for size, grid in (((2, 72, 328, 264), 2), ((3, 136, 40, 64), 4)):
            assert fault(right, number, VARIANTS[number], size, schedule, grid) is None, (schedule, size)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BUGS)), ids=IDS)
def test_planted_bug(planted: ctypes.CDLL, number: int) -> None:
    bug = BUGS[number]
    faults = [
        fault(planted, len(VARIANTS) + number, bug.variant, (2, 128, 256, 320), schedule)
        for schedule in schedules(WARPGROUPS)
    ]
    assert any(bug.found in what for what in faults if what is not None), set(faults)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"address": 8}, "address is no multiple of 16"),
        ({"stride": 24}, "stride is a multiple of 16"),
        ({"box": 32}, "does not fill the swizzle"),
        ({"rows": 257}, "side of the box is 1 to 256"),
        ({"threads": 384, "registers": 176}, "24 to 255 registers, a block 65536"),
        ({"bytes": 227 * 1024 + 1}, "at most 227 KiB"),
        ({"grid": 3}, "whole clusters"),
    ],
)
def test_refused(right: ctypes.CDLL, changes: dict[str, int], what: str) -> None:
    sizes = {"address": 0, "stride": 128, "box": 64, "rows": 64, "grid": 2, "threads": 128, "registers": 168}
    given = {**sizes, "bytes": 1024, **changes}
    assert what in right.refusal(*given.values()).decode()


@pytest.mark.skipif(assembler.cuda_tool("nvcc") is None, reason="needs nvcc; CI has it")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """The same text is a kernel of sm_90a: nothing spills, and no product is serialised (C7508 to C7515)."""
    arguments = ", ".join(["const __grid_constant__ hopper::TensorMap"] * 3)
    kernels = [f"template __global__ void {one.kernel('')[2:]}({arguments}, Problem);" for one in VARIANTS]
    (tmp_path / "gemm.cu").write_text("\n".join(['#include "gemm.h"', *kernels]))
    command = [assembler.cuda_tool("nvcc"), "-std=c++17", "-arch=sm_90a", "-cubin", "-Xptxas=-v"]
    command += [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", "gemm.cu", "-o", "gemm.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert len(re.findall(r" 0 bytes spill stores, 0 bytes spill loads", said)) == len(VARIANTS), said
    assert "serialized" not in said
    assert "warning" not in said


@pytest.mark.slow
@pytest.mark.skipif(assembler.cuda_tool("nvcc") is None, reason="needs nvcc; CI has it")
def test_what_the_driver_is_given(tmp_path: Path) -> None:
    """What the emulation replaces asks the driver for the right tensor map, also without a context."""
    sources = [EMULATION.parent / "tensor_map.cu", EMULATION.parent / "tensor_map_driver.cpp"]
    command = [assembler.cuda_tool("nvcc"), "-std=c++17", "-arch=sm_90a", "-cudart=none", "-w"]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", *sources, "-o", tmp_path / "maps"], check=True)
    said = subprocess.run([tmp_path / "maps"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [  # kinds: whether of 16 bits, interleaving, swizzle, what is outside
        "address 0x7000 size 40,30,20 stride 80,2400 box 32,16,1 step 1,1,1 kinds 1,0,2,0",
        "address 0x7000 size 64,8 stride 128 box 64,4 step 1,1 kinds 1,0,3,0",
        "cuTensorMapEncodeTiled: error 1",
    ]
