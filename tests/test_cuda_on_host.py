"""The CUDA kernels' logic without a GPU: compiled for the CPU, lane by lane (see cuda_on_host/)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from assignment_problems import problems, starts, total
from scipy.optimize import linear_sum_assignment

from switch_moe import native
from switch_moe.ops import linear_assignment

ROOT = Path(__file__).parent.parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Answer = tuple[np.ndarray, np.ndarray | None]  # columns, final prices


def build(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("compiles the CUDA source for the CPU with g++, which is not here; CI has it")
    source = (ROOT / "csrc" / "linear_assignment.cu").read_text()
    launched, count = re.subn(
        r"solve<<<1, (\w+), 0, on>>>\((.*?)\);", r"launch(\1, [&] { solve(\2); });", source, flags=re.DOTALL
    )
    assert count == 2
    (folder / "kernel.cpp").write_text(launched)
    shim = ROOT / "tests" / "cuda_on_host"
    common = ["-std=c++20", "-pthread", "-U_FORTIFY_SOURCE", f"-I{shim}", f"-I{ROOT / 'csrc'}"]
    files = [str(folder / "kernel.cpp"), str(shim / "main.cpp"), "-o", str(folder / "solver")]
    subprocess.run([compiler, *common, *flags, *files], check=True)
    return folder / "solver"


@pytest.fixture(scope="module")
def solver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cuda_on_host"), "-O2")


def solve(solver: Path, given: list[tuple[np.ndarray, np.ndarray | None]], *arguments: str) -> list[Answer]:
    """Columns and final prices of problems with the prices that they start from, if any."""
    stdin = b"".join(
        np.array([cost.dtype == np.int64, prices is not None, len(cost)], dtype=np.int64).tobytes()
        + cost.tobytes()
        + (b"" if prices is None else prices.tobytes())
        for cost, prices in given
    )
    out = subprocess.run([solver, *arguments], input=stdin, capture_output=True, check=True).stdout
    answers: list[Answer] = []
    at = 0
    for cost, prices in given:
        columns = np.frombuffer(out, np.int64, len(cost), at)
        at += columns.nbytes
        final = None
        if prices is not None:
            final = np.frombuffer(out, cost.dtype, len(cost), at)
            at += final.nbytes
        answers.append((columns, final))
    assert at == len(out)
    return answers


def on_the_cpu(cost: np.ndarray, prices: np.ndarray | None, device: str = "cpu") -> Answer:
    start = None if prices is None else torch.from_numpy(prices).to(device, copy=True)
    column = linear_assignment(torch.from_numpy(cost).to(device), prices=start).cpu().numpy()
    return column, None if start is None else start.cpu().numpy()


def check(cost: np.ndarray, found: Answer, expected: Answer) -> None:
    """The least total, and the CPU's columns and prices to the last bit."""
    rows, columns = linear_sum_assignment(cost.astype(float))
    assert total(cost, found[0]) == pytest.approx(float(cost[rows, columns].sum()), rel=1e-9, abs=1e-9)
    assert np.array_equal(found[0], expected[0])
    assert found[1] is None or np.array_equal(found[1], expected[1])


def with_integers(costs: list[np.ndarray]) -> list[np.ndarray]:
    """And, of those that hold whole numbers, copies in small and in large integers."""
    whole = [cost for cost in costs if np.isfinite(cost).all() and (cost == np.round(cost)).all()]
    small = [cost.astype(np.int64) for cost in whole]
    return costs + small + [cost * 2**40 for cost in small[::4]]


def sizes() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    costs = [rng.integers(0, 3 if n == 96 else 1000, (n, n)) for n in (0, 1, 2, 31, 33, 84, 96, 97, 300)]
    costs += [cost * 2**40 for cost in costs[:6]] + [cost.astype(float) for cost in costs[:6]]
    # The largest costs that are copied in 31 bits, and one more.
    costs += [np.where(rng.random((84, 84)) < 0.5, size, -size) for size in (2**17 - 1, 2**17)]
    return costs


@pytest.mark.slow
@pytest.mark.skipif(native.cpu.reason is not None, reason="compares with the compiled CPU solver")
def test_the_whole_suite(solver: Path) -> None:
    costs = with_integers(list(problems(4000, 40)))
    for cost, found in zip(costs, solve(solver, [(cost, None) for cost in costs]), strict=True):
        check(cost, found, on_the_cpu(cost, None))


@pytest.mark.slow
@pytest.mark.skipif(native.cpu.reason is not None, reason="compares with the compiled CPU solver")
def test_any_start(solver: Path) -> None:
    costs = sizes() + with_integers(list(problems(80, 40, seed=3)))
    given = [(cost, prices) for i, cost in enumerate(costs) if len(cost) for prices in starts(cost, i)]
    given += [(cost, None) for cost in costs]
    for (cost, prices), found in zip(given, solve(solver, given), strict=True):
        check(cost, found, on_the_cpu(cost, prices))


@pytest.mark.slow
def test_the_order_of_lanes_does_not_matter(solver: Path) -> None:
    given = [(cost, prices) for cost in with_integers(list(problems(64, 70))) for prices in starts(cost)]
    for one, other in zip(solve(solver, given), solve(solver, given, "last-first"), strict=True):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


@pytest.mark.slow
def test_no_data_races(tmp_path: Path) -> None:
    try:
        racy = build(tmp_path, "-O1", "-g", "-fsanitize=thread", "-DCUDA_ON_HOST_THREADS")
        solve(racy, [])
    except subprocess.CalledProcessError:
        pytest.skip("this compiler has no working -fsanitize=thread; CI's has")
    costs = with_integers(list(problems(8, 12, seed=2)))
    given = [(cost, prices) for cost in costs for prices in (None, np.zeros(len(cost), cost.dtype))]
    for (cost, _), found in zip(given, solve(racy, given), strict=True):
        total(cost, found[0])


def test_costs_without_an_answer(solver: Path) -> None:
    nan = np.array([[1.0, np.nan], [0.0, 0.0]])
    infinite = np.array([[np.inf, np.inf], [0.0, 0.0]])
    crowded = np.array([[0.0, np.inf, np.inf], [0.0, np.inf, np.inf], [0.0, 0.0, 0.0]])
    huge = np.full((2, 2), 2**61, dtype=np.int64)
    least = np.full((2, 2), -(2**63), dtype=np.int64)
    for cost in (nan, -infinite, infinite, infinite.T.copy(), crowded, huge, least):
        start = np.arange(len(cost)).astype(cost.dtype)
        for column, prices in solve(solver, [(cost, None), (cost, start)]):
            assert (column == -1).all()
            assert prices is None or np.array_equal(prices, start)


@needs_gpu
def test_on_the_gpu() -> None:
    assert native.cuda.reason is None, native.cuda.reason
    for i, cost in enumerate(sizes() + with_integers(list(problems(400, 60)))):
        for prices in [None, *(starts(cost, i) if len(cost) else ())]:
            check(cost, on_the_cpu(cost, prices, "cuda"), on_the_cpu(cost, prices))
    with pytest.raises(ValueError, match="at most 1024"):
        linear_assignment(torch.zeros(1025, 1025, device="cuda"), backend="native")


@needs_gpu
@pytest.mark.parametrize("n", [84, 300])
def test_captured_in_a_cuda_graph(n: int) -> None:
    costs = torch.randint(0, 1000, (8, n, n), device="cuda")
    cost, prices = costs[0].clone(), torch.zeros(n, dtype=torch.int64, device="cuda")
    linear_assignment(cost, prices=prices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        column = linear_assignment(cost, prices=prices)
    for new in costs:
        cost.copy_(new)
        start = prices.cpu().numpy()
        graph.replay()
        check(
            new.cpu().numpy(),
            (column.cpu().numpy(), prices.cpu().numpy()),
            on_the_cpu(new.cpu().numpy(), start),
        )
