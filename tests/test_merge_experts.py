"""merge_experts, and expert_linear where all samples share a route."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import assert_close, assert_error_rule
from test_expert_linear import DTYPES, NAMES, forward_backward, make_inputs
from torch import Tensor

from switch_moe.ops import expert_linear, merge_experts

reference = functools.partial(merge_experts, backend="reference")
BACKENDS = ("auto", "triton")


def make(
    routes: int, d_in: int, d_out: int, experts: int, top_k: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    weight = torch.randn(experts, d_in, d_out).to(dtype)
    index = torch.rand(routes, experts).argsort(1)[:, :top_k].int()
    return weight, torch.randn(experts, d_out).to(dtype), index, torch.rand(routes, top_k)


def run(function, weight: Tensor, bias: Tensor, index: Tensor, gate: Tensor, **options) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (weight, bias, gate)]
    merged, shift = function(leaves[0], leaves[1], index, leaves[2], **options)
    loss = (merged.double().cos().sum() + (2 * shift.double()).sin().sum()).to(weight.dtype)
    return [merged.detach(), shift.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48, 40, 3, 2), (5, 33, 17, 7, 6), (3, 1, 1, 1, 1), (0, 8, 8, 3, 2)])
def test_against_the_reference(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: str) -> None:
    weight, bias, index, gate = (t.to(device) for t in make(*shape, dtype))
    actual = run(merge_experts, weight, bias, index, gate, backend=backend)
    exact = run(reference, weight.double(), bias.double(), index, gate.double())
    same_type = run(reference, weight, bias, index, gate)
    names = ("merged", "shift", "weight", "bias", "gate")
    for name, a, e, s in zip(names, actual, exact, same_type, strict=True):
        assert_error_rule(name, a, e, s, dtype)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_without_a_bias_and_second_derivatives(backend: str, device: str) -> None:
    weight, _, index, gate = (t.to(device) for t in make(2, 4, 3, 3, 2, torch.float32))
    weight.requires_grad_()
    merged, shift = merge_experts(weight, None, index.long(), gate, backend=backend)
    assert shift is None
    (first,) = torch.autograd.grad(merged.pow(3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    expected = torch.zeros_like(weight)
    for route in range(2):
        for j in range(2):  # d/dW of sum_r 3 V_r^2 g_rj, summed over all experts of the route
            scale = 6 * merged[route] * gate[route, j] * gate[route].sum()
            expected[index[route, j]] += scale
    assert_close("second derivative", second, expected, 1e-5)


def test_an_index_out_of_range(device: str) -> None:
    weight, bias, index, gate = (t.to(device) for t in make(2, 4, 3, 3, 2, torch.float32))
    index[1, 0] = 3
    if device == "cpu":
        with pytest.raises(ValueError, match=r"expert_index holds 0 to 3"):
            merge_experts(weight, bias, index, gate)
    merged, shift = torch.ops.switch_moe.merge_experts(weight, bias, index, gate, "triton")
    assert merged.isnan().flatten(1).all(1).tolist() == shift.isnan().all(1).tolist() == [False, True]


def test_opcheck(device: str) -> None:
    arguments = [t.to(device) for t in make(2, 8, 8, 3, 2, torch.float32)]
    for backend in ("triton", "native") if device == "cpu" else ("triton",):
        torch.library.opcheck(torch.ops.switch_moe.merge_experts, (*arguments, backend))
        torch.library.opcheck(
            torch.ops.switch_moe.merge_experts, (arguments[0], None, *arguments[2:], backend)
        )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("modulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_route_for_a_batch(dtype: torch.dtype, modulate: bool, backend: str, device: str) -> None:
    """Index and gate of one row give what the same row gives for each sample, gradients too."""
    (x, weight, bias, gate), index, grad = make_inputs((5, 9, 16, 16, 3, 2), dtype)
    tensors = [t.to(device) for t in (x, weight, bias, gate[:1])]
    index, grad = index[:1].to(device), grad.to(device)

    def each(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, gate: Tensor, modulate: bool) -> Tensor:
        rows = index.expand(5, 2), gate.expand(5, 2)
        return expert_linear(x, weight, bias, *rows, modulate, backend="reference")

    actual = forward_backward(expert_linear, tensors, index, grad, modulate, backend=backend)
    exact = forward_backward(each, [t.double() for t in tensors], index, grad.double(), modulate)
    same_type = forward_backward(each, tensors, index, grad, modulate)
    for name, a, e, s in zip(("out", *NAMES), actual, exact, same_type, strict=True):
        assert_error_rule(name, a, e, s, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_route_merges_once(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the kernels' path one launch merges, and the product is torch's; no schedule is made."""
    (x, weight, bias, gate), index, _ = make_inputs((5, 9, 16, 16, 3, 2), torch.float32)
    arguments = [t.to(device) for t in (x, weight, bias, index[:1], gate[:1])]
    names: list[str] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(operator.name().split("::")[-1])
            return operator(*args, **(kwargs or {}))

    with torch.no_grad(), Calls():
        expert_linear(*arguments, True, backend=backend)
    ours = [name for name in names if name in ("merge_experts", "expert_linear", "dispatch")]
    assert ours == (["merge_experts"] if backend == "triton" or device == "cuda" else ["expert_linear"])


def test_bad_input(device: str) -> None:
    (x, weight, bias, gate), index, _ = make_inputs((5, 9, 16, 16, 3, 2), torch.float32)
    for rows, of_gate in ((2, 2), (1, 5), (5, 1)):
        with pytest.raises(ValueError, match=r"expert_(index|gate) has shape \(\d, 2\); it must be \["):
            expert_linear(x, weight, bias, index[:rows], gate[:of_gate])
    with pytest.raises(ValueError, match=r"expert_index holds 0 to 9; it must stay in \[0, 3\)"):
        expert_linear(x, weight, bias, torch.tensor([[0, 9]]), gate[:1])
    with pytest.raises(ValueError, match=r"bias has shape \(3, 15\); it must be \[3, 16\]"):
        merge_experts(weight, bias[:, :15], index, gate)
    with pytest.raises(TypeError, match=r"weight is torch\.int64"):
        merge_experts(weight.long(), None, index, gate)
    with pytest.raises(ValueError, match=r"expert_index has shape \(5, 0\); at least one expert"):
        merge_experts(weight, None, index[:, :0], gate[:, :0])
