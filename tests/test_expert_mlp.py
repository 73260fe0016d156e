"""expert_mlp: gradients and errors; its values are checked by hand in test_layer.py."""

from __future__ import annotations

import pytest
import torch

from switch_moe.ops import expert_mlp


def make_arguments(gated: bool = False) -> dict:
    torch.manual_seed(0)
    return {
        "x": torch.randn(2, 3, 4),
        "weight_in": torch.randn(3, 4, 10),
        "bias_in": torch.randn(3, 10),
        "weight_out": torch.randn(3, 5 if gated else 10, 4),
        "bias_out": torch.randn(3, 4),
        "expert_index": torch.tensor([[0, 2], [1, 1]]),
        "expert_gate": torch.rand(2, 2),
        "gated": gated,
    }


@pytest.mark.parametrize("gated", [False, True])
def test_gradients(gated: bool) -> None:
    arguments = make_arguments(gated)
    names = ["x", "weight_in", "bias_in", "weight_out", "bias_out", "expert_gate"]
    leaves = [arguments[name].double().requires_grad_() for name in names]

    def function(*values: torch.Tensor) -> torch.Tensor:
        return expert_mlp(**{**arguments, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"x has shape \(2, 4\); it must be \[B, T, D\]"),
        ({"weight_in": torch.zeros(3, 5, 10)}, ValueError, r"weight_in has shape \(3, 5, 10\)"),
        ({"weight_out": torch.zeros(3, 9, 4)}, ValueError, r"weight_out has .* must be \[3, 10, 4\]"),
        ({"bias_in": torch.zeros(3, 9)}, ValueError, r"bias_in has shape \(3, 9\); it must be \[3, 10\]"),
        ({"bias_out": torch.zeros(3, 9)}, ValueError, r"bias_out has shape \(3, 9\); it must be \[3, 4\]"),
        ({"expert_index": torch.full((2, 2), -1)}, ValueError, "expert_index holds -1 to -1"),
        ({"expert_gate": torch.zeros(1, 2)}, ValueError, r"expert_gate has shape \(1, 2\)"),
        ({"expert_index": torch.zeros(2, 2)}, TypeError, "expert_index is torch.float32"),
        ({"gated": True, "weight_in": torch.zeros(3, 4, 9)}, ValueError, "its last size must be even"),
        ({"backend": "native"}, RuntimeError, "expert_mlp has no compiled kernel for cpu tensors; use"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        expert_mlp(**{**make_arguments(), **change})
