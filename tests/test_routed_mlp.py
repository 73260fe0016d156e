"""Two-layer experts over routes: the reference against a loop over pairs, backends against the reference."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_error_rule
from torch import Tensor
from torch.nn import functional as F

from switch_moe import Routes, ops
from switch_moe.ops.routed_mlp import ACTIVATIONS

NAMES = ("x", "weight_in", "bias_in", "weight_out", "bias_out", "gate", "base")


def case(
    rows: int, size: int, hidden: int, num_experts: int, slots: int, activation: str, bias: bool = True,
    base: bool = True, seed: int = 0,
) -> tuple[dict[str, Tensor | None], Tensor]:  # fmt: skip
    """Arguments in float64 and the experts of each row, some of them none."""
    g = torch.Generator().manual_seed(seed)
    width = 2 * hidden if activation.startswith("swiglu") else hidden

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale

    index = torch.randint(-1, num_experts, (rows, slots), generator=g)
    values = {
        "x": normal(rows, size),
        "weight_in": normal(num_experts, size, width, scale=size**-0.5),
        "bias_in": normal(num_experts, width) if bias else None,
        "weight_out": normal(num_experts, hidden, size, scale=hidden**-0.5),
        "bias_out": normal(num_experts, size) if bias else None,
        "gate": torch.rand((rows, slots), generator=g, dtype=torch.float64),
        "base": normal(rows, size) if base else None,
    }
    return values, index


def run(
    values: dict[str, Tensor | None], index: Tensor, activation: str, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """Output and gradients."""
    types = {"gate": torch.float64 if dtype == torch.float64 else torch.float32}
    given = {
        name: None if v is None else v.to(types.get(name, dtype), copy=True).requires_grad_()
        for name, v in values.items()
    }
    routes = Routes.of_rows(index, given["gate"], len(given["weight_in"]))
    weights = [given[name] for name in ("weight_in", "bias_in", "weight_out", "bias_out")]
    out = ops.routed_mlp(given["x"], *weights, routes, activation, base=given["base"], backend=backend)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(cotangent.to(dtype))
    return [out, *(given[name].grad for name in NAMES if given[name] is not None)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_a_loop_over_pairs(activation: str) -> None:
    values, index = case(7, 6, 10, 3, 2, activation)
    out = run(values, index, activation, torch.float64, "reference")[0]
    act = {
        "gelu": lambda h: F.gelu(h, approximate="tanh"),
        "gelu_erf": F.gelu,
        "relu": F.relu,
        "swiglu": lambda h: F.silu(h[:10]) * h[10:],
        "swiglu_second": lambda h: h[:10] * F.silu(h[10:]),
    }[activation]
    for r in range(7):
        expected = values["base"][r].clone()
        for e, gate in zip(index[r].tolist(), values["gate"][r], strict=True):
            if e >= 0:
                units = act(values["x"][r] @ values["weight_in"][e] + values["bias_in"][e])
                expected += gate * (units @ values["weight_out"][e] + values["bias_out"][e])
        torch.testing.assert_close(out[r], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_native_against_float64(activation: str, dtype: torch.dtype, bias: bool) -> None:
    values, index = case(45, 24, 40, 5, 3, activation, bias, base=bias)
    exact = run(values, index, activation, torch.float64, "reference")
    same = run(values, index, activation, dtype, "reference")
    found = run(values, index, activation, dtype, "native")
    names = ["out", *(name for name in NAMES if values[name] is not None)]
    for name, a, b, c in zip(names, found, exact, same, strict=True):
        assert_error_rule(name, a, b, c, dtype)
