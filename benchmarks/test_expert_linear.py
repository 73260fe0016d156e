"""expert_linear, forward and backward, against nn.Linear of the same shape and the official code's loop over
experts.

    pytest benchmarks/

The ratios at the end are medians of functions that take turns in one process; the table of pytest-benchmark
times each on its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.baselines import expert_loop
from benchmarks.timing import interleaved_medians
from switch_moe.ops import expert_linear

SHAPES = [(32, 256, 384), (16, 256, 768), (8, 256, 1152)]
DTYPES = [torch.float32, torch.bfloat16]
EXPERTS, TOP_K = 3, 2


def make_steps(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One forward and backward of each contender, on the same random data."""
    batch, _, size = shape
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    linear = torch.nn.Linear(size, size, dtype=dtype)
    weight = (torch.randn(EXPERTS, size, size) / size**0.5).to(dtype).requires_grad_()
    bias = torch.randn(EXPERTS, size).to(dtype).requires_grad_()
    index = torch.rand(batch, EXPERTS).argsort(1)[:, :TOP_K].int()
    gate = torch.rand(batch, TOP_K, requires_grad=True)

    def step(function: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Callable[[], object]:
        def run() -> object:
            return torch.autograd.grad(function(), (x, *leaves), grad)

        return run

    leaves = (weight, bias, gate)
    return {
        "nn.Linear": step(lambda: linear(x), linear.weight, linear.bias),
        "expert_linear": step(lambda: expert_linear(x, weight, bias, index, gate), *leaves),
        "x*(1+m(x))": step(lambda: expert_linear(x, weight, bias, index, gate, modulate=True), *leaves),
        "expert loop": step(lambda: expert_loop(x, weight, bias, index, gate), *leaves),
    }


@pytest.mark.parametrize("contender", ["nn.Linear", "expert_linear", "x*(1+m(x))", "expert loop"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_forward_backward(benchmark, shape, dtype: torch.dtype, contender: str) -> None:
    step = make_steps(shape, dtype)[contender]
    step()
    benchmark.group = f"B x T x D = {shape}, {dtype}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_ratios(ratios: list[str], shape, dtype: torch.dtype) -> None:
    steps = make_steps(shape, dtype)
    for ours, loop in zip(steps["expert_linear"](), steps["expert loop"](), strict=True):
        error = (ours.float() - loop.float()).norm() / loop.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), (
            "no speed is reported for different results"
        )
    medians = interleaved_medians(steps)
    linear, ours, loop = medians["nn.Linear"], medians["expert_linear"], medians["expert loop"]
    ratios.append(
        f"{shape!s:16} {str(dtype).removeprefix('torch.'):9} expert_linear / nn.Linear {ours / linear:.2f}"
        f" (modulated {medians['x*(1+m(x))'] / linear:.2f}), expert loop / expert_linear {loop / ours:.2f}"
    )
