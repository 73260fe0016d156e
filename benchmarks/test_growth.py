"""How time and memory grow along each axis alone, from one shape in the middle; forward + backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import expert_loop
from benchmarks.case import BOTH, LINEAR, SWITCH_MOE, Case, Contender, Inputs, Outputs
from benchmarks.test_expert_linear import random_index, reference
from switch_moe.ops import expert_linear

MIDDLE = {"B": 8, "T": 256, "D": 384, "M": 8, "k": 2, "L": 1}
AXES = {
    "B": (4, 8, 16, 32),
    "T": (64, 128, 256, 512),
    "D": (192, 384, 576, 768),
    "M": (2, 4, 8, 16),
    "k": (1, 2, 4, 8),
    "L": (1, 2, 4),
}


@pytest.mark.parametrize("axis", AXES)
def test_growth(bench, axis: str) -> None:
    """All shapes of an axis take turns, so that the machine's drift does not bend the line."""
    larger = 8 if bench.device == "cuda" else 1
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    middle = MIDDLE | {"B": larger * MIDDLE["B"]}
    sizes = AXES[axis][:2] if bench.quick else AXES[axis]
    shapes = [middle | {axis: size * (larger if axis == "B" else 1)} for size in sizes]
    bench.measure([stack_case(bench.device, dtype, shape, axis) for shape in shapes], BOTH)


def stack_case(device: str, dtype: torch.dtype, shape: dict[str, int], axis: str) -> Case:
    """L layers in a row, each ``x (1 + m(x))``; the limit has linear layers for m."""
    batch, tokens, size, experts, top_k, depth = (shape[key] for key in ("B", "T", "D", "M", "k", "L"))

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        inputs = {"x": normal(batch, tokens, size), "grad": normal(batch, tokens, size)}
        for j in range(depth):
            inputs[f"weight{j}"] = normal(experts, size, size) * (0.1 / size**0.5)
            inputs[f"bias{j}"] = normal(experts, size) * 0.1
            inputs[f"linear_weight{j}"] = normal(size, size) * (0.1 / size**0.5)
            inputs[f"linear_bias{j}"] = normal(size) * 0.1
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        for j in range(depth):
            inputs[f"index{j}"] = random_index(batch, experts, top_k, generator)
            inputs[f"gate{j}"] = torch.rand(batch, top_k, generator=generator, device=device)
        return inputs

    def stack(layer: Callable[..., Tensor], *names: str) -> Callable[[Inputs], Outputs]:
        def run(i: Inputs) -> Outputs:
            r = i["x"]
            for j in range(depth):
                r = layer(r, *(i[f"{name}{j}"] for name in names))
            return (r,)

        return run

    def loop(x: Tensor, *experts: Tensor) -> Tensor:
        return torch.addcmul(x, x, expert_loop(x, *experts))

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addcmul(x, x, F.linear(x, weight, bias))

    def modulated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: function(*arguments, modulate=True)

    def leaves(*names: str) -> tuple[str, ...]:
        return ("x", *(f"{name}{j}" for j in range(depth) for name in names))

    mixture = ("weight", "bias", "index", "gate")
    dense = stack(linear, "linear_weight", "linear_bias")
    right = stack(modulated(reference), *mixture)
    trained, reads = leaves("weight", "bias", "gate"), tuple(f"index{j}" for j in range(depth))

    def exact(i: Inputs, _: Outputs) -> Outputs:
        return right(i)

    contenders = [
        Contender(LINEAR, dense, lambda i, _: dense(i), leaves("linear_weight", "linear_bias"), ()),
        Contender(SWITCH_MOE, stack(modulated(expert_linear), *mixture), exact, trained, reads, True),
        Contender("expert loop", stack(loop, *mixture), exact, trained, reads),
    ]
    return Case("growth", dict(shape), dtype, make, contenders, {"out": "grad"}, note=axis)
