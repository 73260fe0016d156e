"""The CUDA kernels' logic without a GPU: compiled for the CPU, one thread per lane (see cuda_on_host/)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from assignment_problems import problems, total
from scipy.optimize import linear_sum_assignment

from switch_moe import native
from switch_moe.ops import linear_assignment

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def solver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("compiles the CUDA source for the CPU with g++, which is not here; CI has it")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    source = (ROOT / "csrc" / "linear_assignment.cu").read_text()
    launched, count = re.subn(
        r"solve<<<1, (\w+), 0, on>>>\((.*)\);", r"launch(\1, [&] { solve(\2); });", source
    )
    assert count == 2
    (folder / "kernel.cpp").write_text(launched)
    shim = ROOT / "tests" / "cuda_on_host"
    flags = ["-std=c++20", "-O1", "-pthread", f"-I{shim}", f"-I{ROOT / 'csrc'}"]
    files = [str(folder / "kernel.cpp"), str(shim / "main.cpp"), "-o", str(folder / "solver")]
    subprocess.run([compiler, *flags, *files], check=True)
    return folder / "solver"


def solve(solver: Path, costs: list[np.ndarray]) -> list[np.ndarray]:
    stdin = b"".join(
        np.array([cost.dtype == np.int64, len(cost)], dtype=np.int64).tobytes() + cost.tobytes()
        for cost in costs
    )
    out = subprocess.run([solver], input=stdin, capture_output=True, check=True).stdout
    columns = np.frombuffer(out, dtype=np.int64)
    return np.split(columns, np.cumsum([len(cost) for cost in costs])[:-1])


def test_equals_scipy(solver: Path) -> None:
    costs = list(problems(48, 12)) + list(problems(8, 50, seed=1))
    costs += [cost.astype(np.int64) for cost in problems(24, 12, seed=2) if np.isfinite(cost).all()]
    for cost, column in zip(costs, solve(solver, costs), strict=True):
        rows, columns = linear_sum_assignment(cost)
        assert total(cost, column) == pytest.approx(float(cost[rows, columns].sum()), rel=1e-9, abs=1e-9)


def test_costs_without_an_answer(solver: Path) -> None:
    nan = np.array([[1.0, np.nan], [0.0, 0.0]])
    infinite = np.array([[np.inf, np.inf], [0.0, 0.0]])
    huge = np.full((2, 2), 2**61, dtype=np.int64)
    for column in solve(solver, [nan, -infinite, infinite, huge]):
        assert column.tolist() == [-1, -1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu() -> None:
    assert native.cuda.reason is None, native.cuda.reason
    for cost in problems(400, 60):
        for dtype in [torch.float64, torch.int64] if np.isfinite(cost).all() else [torch.float64]:
            tensor = torch.from_numpy(cost).to("cuda", dtype)
            column = linear_assignment(tensor, backend="native").cpu().numpy()
            exact = tensor.double().cpu().numpy()
            rows, columns = linear_sum_assignment(exact)
            assert total(exact, column) == pytest.approx(
                float(exact[rows, columns].sum()), rel=1e-9, abs=1e-9
            )
    with pytest.raises(ValueError, match="at most 1024"):
        linear_assignment(torch.zeros(1025, 1025, device="cuda"), backend="native")
