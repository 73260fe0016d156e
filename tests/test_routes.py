"""Routes of rows that chose experts and of experts that chose rows, against loops over pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from switch_moe import Routes


def pairs_of(routes: Routes) -> list[tuple[int, int, float]]:
    """Expert, row and gate of every pair."""
    offsets, rows, gates = routes.offsets.tolist(), routes.row.tolist(), routes.gate.tolist()
    return [
        (e, rows[p], gates[p]) for e in range(routes.num_experts) for p in range(offsets[e], offsets[e + 1])
    ]


def check_slots(routes: Routes, rows: int) -> None:
    """Every pair is in one slot, that of its row."""
    used = int(routes.offsets[-1])
    assert len(routes.slot) == rows
    found = [(p, r) for r, slots in enumerate(routes.slot.tolist()) for p in slots if p >= 0]
    assert sorted(found) == list(enumerate(routes.row[:used].tolist()))
    assert all(tensor.dtype == torch.int32 for tensor in routes[:3])
    assert ((routes.row >= 0) & (routes.row < max(rows, 1))).all()


def choices(rows: int, slots: int, experts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    index = torch.randint(-1, experts, (rows, slots), generator=generator)
    return index, torch.rand(rows, slots, generator=generator)


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize(
    ("rows", "slots", "experts"), [(7, 2, 3), (40, 3, 9), (1, 1, 1), (0, 2, 3), (6, 4, 2)]
)
def test_of_rows(rows: int, slots: int, experts: int, backend: str) -> None:
    """Some rows have no expert, some one of them twice."""
    index, gate = choices(rows, slots, experts)
    routes = Routes.of_rows(index, gate, experts, backend=backend)
    expected = [
        (e, r, gate[r, j].item())
        for e in range(experts)
        for r in range(rows)
        for j in range(slots)
        if index[r, j] == e
    ]
    assert pairs_of(routes) == expected
    check_slots(routes, rows)
    assert routes.row.shape == routes.gate.shape == (rows * slots,)
    taken = routes.slot >= 0
    assert torch.equal(taken, index >= 0)
    assert torch.equal(routes.gate[routes.slot[taken].long()], gate[taken])


def test_of_experts() -> None:
    torch.manual_seed(0)
    row_index = torch.stack([torch.randperm(9)[:4] for _ in range(5)])  # some rows have none, some several
    gate = torch.rand(5, 4)
    routes = Routes.of_experts(row_index, gate, 9)
    expected = [(e, row_index[e, c].item(), gate[e, c].item()) for e in range(5) for c in range(4)]
    assert pairs_of(routes) == expected
    check_slots(routes, 9)
    for a, b in zip(Routes.of_experts(row_index.int(), gate, 9), routes, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("experts", "count", "rows"), [(1, 1, 1), (3, 6, 6), (2, 0, 4)])
def test_of_experts_that_take_all_or_none(experts: int, count: int, rows: int) -> None:
    routes = Routes.of_experts(torch.arange(count).expand(experts, count), torch.ones(experts, count), rows)
    check_slots(routes, rows)
    assert len(pairs_of(routes)) == experts * count


def test_both_ways_are_one() -> None:
    """What tokens chose, listed by experts."""
    index = torch.tensor([[0, 1], [1, 2], [2, 0]])
    gate = torch.rand(3, 2)
    of_experts = torch.tensor([[0, 2], [0, 1], [1, 2]])
    gates = torch.stack([gate[[0, 2], [0, 1]], gate[[0, 1], [1, 0]], gate[[1, 2], [1, 0]]])
    assert pairs_of(Routes.of_rows(index, gate, 3)) == pairs_of(Routes.of_experts(of_experts, gates, 3))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_to_one(rows: int) -> None:
    routes = Routes.to_one(torch.zeros(rows, 8))
    assert pairs_of(routes) == [(0, r, 1.0) for r in range(rows)]
    check_slots(routes, rows)


def test_gradients_flow_to_the_gates() -> None:
    index, gate = choices(20, 3, 4)
    weight = torch.rand(60, dtype=torch.float64)
    for make in (
        lambda g: Routes.of_rows(index, g, 4),
        lambda g: Routes.of_experts(torch.stack([torch.randperm(20)[:15]] * 4), g.view(4, 15), 20),
    ):
        leaf = gate.clone().requires_grad_()
        routes = make(leaf)
        (routes.gate * weight).sum().backward()
        order = torch.cat([(routes.gate.detach()[:, None] == leaf.detach().flatten()).float().argmax(1)])
        assert torch.equal(leaf.grad.flatten()[order], weight.float())
        wide = gate.double().requires_grad_()
        assert make(wide).gate.dtype == torch.float64
        narrow = make(gate.bfloat16())
        assert narrow.gate.dtype == torch.float32
        assert torch.autograd.gradcheck(lambda g, make=make: make(g).gate, wide)


CONSTRUCTORS: dict[str, Callable[[str], Routes]] = {
    "of_rows": lambda device: Routes.of_rows(
        torch.zeros(6, 2, dtype=torch.int32, device=device), torch.ones(6, 2, device=device), 3
    ),
    "of_experts": lambda device: Routes.of_experts(
        torch.arange(4, device=device).expand(3, 4), torch.ones(3, 4, device=device), 6
    ),
    "to_one": lambda device: Routes.to_one(torch.ones(6, 2, device=device)),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_compile_fullgraph(name: str) -> None:
    expected = CONSTRUCTORS[name]("cpu")
    compiled = torch.compile(CONSTRUCTORS[name], fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled("cpu"), expected, strict=True):
        assert torch.equal(a, b)


X = torch.zeros(3, 2)
INDEX = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Routes.of_rows([0], X, 2), TypeError, r"expert_index is \[0\]"),
        (lambda: Routes.of_rows(INDEX, None, 2), TypeError, "expert_gate is None"),
        (
            lambda: Routes.of_rows(INDEX[0], X[0], 2),
            ValueError,
            r"expert_index has shape \(2,\); it must be \[R, S",
        ),
        (
            lambda: Routes.of_rows(INDEX, X[:2], 2),
            ValueError,
            r"expert_gate has shape \(2, 2\); it must be \[3, 2\]",
        ),
        (lambda: Routes.of_rows(INDEX, INDEX, 2), TypeError, r"expert_gate is torch\.int64; it must be"),
        (lambda: Routes.of_rows(X, X, 2), TypeError, r"expert_index is torch\.float32"),
        (lambda: Routes.of_rows(INDEX + 2, X, 2), ValueError, "expert_index holds 2 to 2"),
        (
            lambda: Routes.of_rows(INDEX, X.to("meta"), 2),
            ValueError,
            "expert_gate is on meta; it must be on cpu",
        ),
        (lambda: Routes.of_rows(INDEX, X, True), TypeError, "num_experts is True"),
        (lambda: Routes.of_rows(INDEX, X, 2, backend="cudnn"), ValueError, "backend is 'cudnn'"),
        (lambda: Routes.of_experts(3, X, 2), TypeError, "row_index is 3"),
        (lambda: Routes.of_experts(INDEX, X[:, :1], 2), ValueError, r"expert_gate has shape \(3, 1\)"),
        (lambda: Routes.of_experts(INDEX, X.bool(), 2), TypeError, r"expert_gate is torch\.bool"),
        (lambda: Routes.of_experts(INDEX, X.to("meta"), 2), ValueError, "expert_gate is on meta"),
        (
            lambda: Routes.of_experts(INDEX - 1, X, 2),
            ValueError,
            r"row_index holds -1 to -1; it must stay in \[0, 2",
        ),
        (lambda: Routes.of_experts(INDEX, X, 1.0), TypeError, r"rows is 1\.0"),
        (lambda: Routes.of_experts(INDEX, X, -1), ValueError, "rows is -1; it must be at least 0"),
        (lambda: Routes.to_one(X[0]), ValueError, r"x has shape \(2,\); it must be \[R, D\]"),
        (lambda: Routes.to_one(None), TypeError, "x is None"),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
