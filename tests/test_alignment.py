"""Triton kernels get tensors at addresses that are multiples of 16, whatever slices a caller passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from switch_moe import Routes, ops

pytest.importorskip("triton")


def odd(tensor: Tensor) -> Tensor:
    """The same numbers, one number past a multiple of 16 bytes."""
    memory = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    assert memory.data_ptr() % 16
    return memory


def expert_linear(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x, weight, bias, gate = (
        torch.randn(3, 5, 16),
        torch.randn(3, 16, 16),
        torch.randn(3, 16),
        torch.rand(3, 2),
    )
    leaves = [place(t).requires_grad_() for t in (x, weight, bias, gate)]
    index = place(torch.tensor([[0, 1], [2, 1], [0, 2]], dtype=torch.int32))
    out = ops.expert_linear(*leaves[:3], index, leaves[3], True, backend="triton")
    return [out, *torch.autograd.grad(out, leaves, place(torch.randn(3, 5, 16)))]


def expert_mlp(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    shapes = (3, 5, 16), (3, 16, 8), (3, 8), (3, 8, 16), (3, 16)
    leaves = [place(torch.randn(shape)).requires_grad_() for shape in shapes]
    gate = place(torch.rand(3, 2)).requires_grad_()
    index = place(torch.tensor([[0, 1], [2, 1], [0, 2]], dtype=torch.int32))
    out = ops.expert_mlp(*leaves, index, gate, backend="triton")
    return [out, *torch.autograd.grad(out, [*leaves, gate], place(torch.randn(3, 5, 16)))]


def routed_mlp(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    shapes = (5, 16), (3, 16, 8), (3, 8), (3, 8, 16), (3, 16)
    leaves = [place(torch.randn(shape)).requires_grad_() for shape in shapes]
    index = torch.tensor([[0, 1], [2, 1], [-1, -1], [0, -1], [1, 0]])
    routes = Routes(*(place(t) for t in Routes.of_rows(index, torch.rand(5, 2), 3)))
    gate, base = routes.gate.requires_grad_(), place(torch.randn(5, 16))
    out = ops.routed_mlp(*leaves, routes._replace(gate=gate), base=base, backend="triton")
    return [out, *torch.autograd.grad(out, [*leaves, gate], place(torch.randn(5, 16)))]


def merge_experts(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    weight, bias, gate = (place(torch.randn(shape)) for shape in ((3, 16, 8), (3, 8), (3, 2)))
    index = place(torch.tensor([[0, 1], [2, 1], [0, 2]], dtype=torch.int32))
    return list(ops.merge_experts(weight, bias, index, gate, backend="triton"))


def timestep_gate(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    leaves = [place(torch.randn(shape)).requires_grad_() for shape in ((4, 16), (2, 3, 16), (2, 3))]
    probs, _, gate = ops.timestep_gate(*leaves, 2, backend="triton")
    grads = [place(torch.randn(probs.shape)), place(torch.randn(gate.shape))]
    return [probs, gate, *torch.autograd.grad([probs, gate], leaves, grads)]


def token_gate(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    found = []
    for options in ({"top_k": 2}, {"capacity": 5, "pool": 2, "normalise": True}):
        leaves = [place(torch.randn(shape)).requires_grad_() for shape in ((2, 7, 3), (2, 3), (3,))]
        out = ops.token_gate(leaves[0], sample_logits=leaves[1], bias=leaves[2], **options, backend="triton")
        outputs = [out.probs, out.gate, out.importance]
        grads = [place(torch.randn(output.shape)) for output in outputs]
        found += [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    return found


def route_pairs(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return list(ops.route_pairs(place(torch.randint(-1, 5, (9, 3), dtype=torch.int32)), 5, backend="triton"))


def diffusion_prior_loss(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    probs = place(torch.rand(3, 6)).requires_grad_()
    table, t = place((torch.randn(9, 6) > 0).float()), place(torch.tensor([0, 8, 3]))
    loss = ops.diffusion_prior_loss(probs, table, t, place(torch.randperm(6)), 2, 4, backend="triton")
    return [loss, *torch.autograd.grad(loss, probs)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter; a GPU runs the same code")
@pytest.mark.parametrize(
    "call",
    [
        expert_linear,
        expert_mlp,
        routed_mlp,
        merge_experts,
        timestep_gate,
        token_gate,
        route_pairs,
        diffusion_prior_loss,
    ],
)
def test_slices_at_odd_places(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from switch_moe.kernels import _launch

    addresses: list[int] = []
    original = _launch.launch

    def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        addresses.extend(arg.data_ptr() for arg in args if isinstance(arg, Tensor))
        original(kernel, programs, *args, **meta)

    stems = "_tile dispatch expert_linear expert_mlp routed_mlp merge_experts timestep_gate token_gate"
    for name in (*stems.split(), "route_pairs", "diffusion_prior"):
        monkeypatch.setattr(f"switch_moe.kernels.{name}.launch", launch)
    torch.manual_seed(0)
    expected = call(lambda tensor: tensor)
    torch.manual_seed(0)
    found = call(odd)
    assert len(addresses) > 5
    assert [address % 16 for address in addresses] == [0] * len(addresses)
    for number, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert_close(str(number), a, e, 1e-6)
