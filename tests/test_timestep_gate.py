"""timestep_gate: values, ties and gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from switch_moe.ops import timestep_gate
from switch_moe.reference.timestep_gate import timestep_gate as reference

SHAPES = [
    (3, 7, 3, 16, 2),
    (1, 1, 1, 1, 1),
    (12, 33, 8, 48, 4),
    (2, 0, 3, 16, 2),
    (4, 5, 3, 10, 3),
]  # L, N', M, D, k


def make_inputs(shape: tuple[int, ...]) -> list[Tensor]:
    depth, rows, experts, size, _ = shape
    torch.manual_seed(0)
    return [torch.randn(rows, size), torch.randn(depth, experts, size), torch.randn(depth, experts)]


def forward_backward(function, tensors: list[Tensor], top_k: int, grads: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    probs, index, gate = function(*leaves, top_k)
    total = (probs * grads[0]).sum() + (gate * grads[1]).sum()
    return [probs.detach(), index, gate.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, ...]) -> None:
    depth, rows, experts, _, top_k = shape
    tensors = make_inputs(shape)
    grads = [torch.randn(depth, rows, experts), torch.randn(depth, rows, top_k)]
    actual = forward_backward(timestep_gate, tensors, top_k, grads)
    exact = forward_backward(reference, [t.double() for t in tensors], top_k, [g.double() for g in grads])
    assert actual[1].dtype == torch.int32
    assert torch.equal(actual[1], exact[1])
    for name, i in [("probs", 0), ("gate", 2), ("embedding", 3), ("weight", 4), ("bias", 5)]:
        assert actual[i].dtype == torch.float32
        assert_close(name, actual[i], exact[i], 1e-5)


def test_lowest_index_wins_a_tie() -> None:
    _, index, _ = timestep_gate(torch.ones(2, 4), torch.zeros(1, 40, 4), torch.zeros(1, 40), 5)
    assert index.tolist() == [[[0, 1, 2, 3, 4]] * 2]
    bias = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    _, index, _ = timestep_gate(torch.ones(1, 4), torch.zeros(1, 4, 4), bias, 3)
    assert index.tolist() == [[[1, 2, 0]]]


def test_gates_are_not_renormalised() -> None:
    probs, index, gate = timestep_gate(*make_inputs((3, 7, 5, 16, 2)), 2)
    assert torch.equal(gate, probs.gather(2, index.long()))
    assert (gate.sum(-1) < 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_inside_whatever_comes_in(dtype: torch.dtype) -> None:
    embedding, weight, bias = make_inputs((3, 7, 3, 16, 2))
    low = embedding.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        probs, _, gate = timestep_gate(low, weight, bias, 2)
    expected = reference(low.double(), weight.double(), bias.double(), 2)
    assert_close("probs", probs, expected[0], 1e-5)
    assert_close("gate", gate, expected[2], 1e-5)


def test_opcheck() -> None:
    embedding, weight, bias = make_inputs((3, 7, 4, 16, 2))
    torch.library.opcheck(torch.ops.switch_moe.timestep_gate.default, (embedding, weight, bias, 2))
    probs, index, gate = timestep_gate(embedding, weight, bias, 2)
    torch.library.opcheck(
        torch.ops.switch_moe.timestep_gate_backward.default,
        (torch.randn_like(probs), torch.randn_like(gate), embedding, weight, probs, index),
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph(autocast: bool) -> None:
    tensors = make_inputs((3, 7, 4, 16, 2))
    grads = [torch.randn(3, 7, 4), torch.randn(3, 7, 2)]

    def function(*arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return timestep_gate(*arguments)

    eager = forward_backward(function, tensors, 2, grads)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if autocast else "inductor")
    compiled = forward_backward(compiled, tensors, 2, grads)
    for i, (a, e) in enumerate(zip(compiled, eager, strict=True)):
        assert_close(str(i), a, e, 1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embedding": torch.zeros(4)}, ValueError, r"embedding has shape \(4,\); it must be \[N', D\]"),
        (
            {"weight": torch.zeros(2, 3, 5)},
            ValueError,
            r"weight has shape \(2, 3, 5\); it must be \[L, M, 4\]",
        ),
        ({"bias": torch.zeros(2, 4)}, ValueError, r"bias has shape \(2, 4\); it must be \[2, 3\]"),
        (
            {"weight": torch.zeros(2, 3, 4).double()},
            TypeError,
            "weight is torch.float64; it must be torch.float32",
        ),
        ({"top_k": 0}, ValueError, "top_k is 0; it must be between 1 and the number of experts, 3"),
        ({"top_k": 4}, ValueError, "top_k is 4; it must be between 1"),
        ({"backend": "native"}, RuntimeError, "timestep_gate has no compiled kernel for cpu tensors; use"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "embedding": torch.zeros(5, 4),
        "weight": torch.zeros(2, 3, 4),
        "bias": torch.zeros(2, 3),
        "top_k": 2,
    }
    with pytest.raises(error, match=message):
        timestep_gate(**{**arguments, **change})


def test_reference_gradients() -> None:
    leaves = [tensor.double().requires_grad_() for tensor in make_inputs((2, 3, 3, 4, 2))]
    assert torch.autograd.gradcheck(lambda e, w, b: reference(e, w, b, 2)[::2], leaves)
