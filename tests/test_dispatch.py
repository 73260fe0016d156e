"""The schedule of a batch against sorting on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from switch_moe import Router, ops


def parts(schedule: Tensor, batch: int, top_k: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, pairs and offsets of a schedule."""
    return schedule[: batch + batch * top_k + num_experts + 1].split([batch, batch * top_k, num_experts + 1])


@pytest.mark.parametrize(
    ("batch", "top_k", "num_experts"),
    [
        (0, 2, 3),
        (1, 1, 1),
        (5, 2, 3),
        (127, 2, 3),
        (128, 1, 4),
        (129, 4, 8),
        pytest.param(300, 3, 100, marks=pytest.mark.slow),
        (33, 16, 16),
    ],
)
def test_dispatch(batch: int, top_k: int, num_experts: int, device: str) -> None:
    from switch_moe.kernels.dispatch import dispatch

    torch.manual_seed(0)
    index = torch.rand(batch, num_experts).argsort(1)[:, :top_k].int().contiguous()
    schedule = dispatch(index.to(device), num_experts).cpu().long()
    order, pairs, offsets = parts(schedule, batch, top_k, num_experts)
    by_expert = index.flatten().long()
    assert torch.equal(pairs, torch.argsort(by_expert, stable=True))
    counts = torch.bincount(by_expert, minlength=num_experts)
    assert torch.equal(offsets, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))
    bits = (1 << index.long()).sum(1) if num_experts <= 31 else None
    assert torch.equal(order.sort().values, torch.arange(batch))
    if bits is not None:
        assert torch.equal(order, torch.argsort(bits, stable=True))


def test_all_blocks_at_once(device: str) -> None:
    from switch_moe.kernels.dispatch import dispatch

    index = torch.randint(5, (3, 70, 2), dtype=torch.int32).to(device)
    found = dispatch(index, 5)
    assert found.shape[1] % 4 == 0  # every block begins at a multiple of 16 bytes
    for block, schedule in zip(index, found, strict=True):
        used = 70 + 140 + 6
        assert torch.equal(schedule[:used], dispatch(block.contiguous(), 5)[:used])


def test_an_index_out_of_range_counts_as_expert_0(device: str) -> None:
    from switch_moe.kernels.dispatch import dispatch

    index = torch.tensor([[-5, 1], [2, 99]], dtype=torch.int32, device=device)
    order, pairs, offsets = (t.tolist() for t in parts(dispatch(index, 3), 2, 2, 3))
    assert sorted(order) == [0, 1]
    assert pairs == [0, 3, 1, 2]
    assert offsets == [0, 2, 3, 4]


def test_shapes_do_not_depend_on_the_routing() -> None:
    from switch_moe.kernels import _launch
    from switch_moe.kernels.dispatch import dispatch

    with _launch.record(90) as launches:
        found = dispatch(torch.empty(200, 2, dtype=torch.int32, device="meta"), 3)
    assert found.shape == (604,)
    assert len(launches) == 1


class TestSchedule:
    """The schedule as an argument of the expert operations."""

    @staticmethod
    def inputs(experts: int, top_k: int, device: str) -> tuple[list[Tensor], Tensor]:
        shapes = (6, 9, 16), (experts, 16, 16), (experts, 16), (6, top_k)
        leaves = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
        return leaves, torch.rand(6, experts, device=device).argsort(1)[:, :top_k].int().contiguous()

    @pytest.mark.parametrize(("experts", "top_k"), [(3, 2), (7, 2)])
    def test_it_changes_no_bit(self, experts: int, top_k: int, device: str) -> None:
        leaves, index = self.inputs(experts, top_k, device)
        found = []
        for schedule in (None, ops.dispatch(index, experts)):
            out = ops.expert_linear(*leaves[:3], index, leaves[3], True, schedule=schedule, backend="triton")
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)

    def test_expert_mlp_too(self, device: str) -> None:
        leaves, index = self.inputs(4, 2, device)
        x, weight, bias, gate = leaves
        arguments = x, weight, bias, weight, bias, index, gate
        expected = ops.expert_mlp(*arguments, backend="triton")
        schedule = ops.dispatch(index, 4)
        assert torch.equal(ops.expert_mlp(*arguments, schedule=schedule, backend="triton"), expected)
        with pytest.raises(ValueError, match="schedule has shape"):
            ops.expert_mlp(*arguments, schedule=schedule[:-4], backend="triton")

    def test_bad_input(self, device: str) -> None:
        leaves, index = self.inputs(3, 2, device)
        right = ops.dispatch(index, 3)
        wrongs = [(right[1:], ValueError, "schedule has shape"), (right.long(), TypeError, "schedule is")]
        wrongs += [(right.tolist(), TypeError, "schedule is")]
        if device == "cpu":  # elsewhere nobody looks
            other = ops.dispatch((index + 1) % 3, 3)
            wrongs += [(other, ValueError, "schedule is of other experts than expert_index")]
        for schedule, error, words in wrongs:
            with pytest.raises(error, match=words):
                ops.expert_linear(*leaves[:3], index, leaves[3], schedule=schedule, backend="triton")
        with pytest.raises(ValueError, match=r"expert_index has shape \(4,\); it must be \[L, B, k\]"):
            ops.dispatch(torch.zeros(4, dtype=torch.int32, device=device), 3)
        with pytest.raises(TypeError, match=r"expert_index is torch\.float32"):
            ops.dispatch(torch.zeros(4, 2, device=device), 3)
        if device == "cpu":
            with pytest.raises(ValueError, match=r"expert_index holds 0 to 3; it must stay in \[0, 3\)"):
                ops.dispatch(torch.tensor([[0, 3]]), 3)

    def test_int64_and_opcheck(self, device: str) -> None:
        _, index = self.inputs(3, 2, device)
        assert torch.equal(ops.dispatch(index.long(), 3)[:22], ops.dispatch(index, 3)[:22])
        torch.library.opcheck(
            torch.ops.switch_moe.dispatch, (index, 3), test_utils=("test_schema", "test_faketensor")
        )

    def test_a_routing_of_all_blocks(self, device: str) -> None:
        """scheduled() launches once; a block's schedule is that of its experts, and goes with them only."""
        router = Router(3, 16, backend="triton").to(device)
        routing = router(torch.randn(5, 16, device=device))
        with torch.no_grad():
            scheduled = routing.scheduled("triton")
        assert routing.schedule is None
        for i, block in enumerate(scheduled.blocks()):
            used = 5 + 10 + 4
            expected = ops.dispatch(routing.expert_index[i].contiguous(), 3)[:used]
            assert torch.equal(block.schedule[:used], expected)
            assert torch.equal(scheduled.block(i).schedule[:used], expected)
            assert block._replace(expert_index=block.expert_index.clone()).schedule is None
        assert routing.scheduled("reference") is routing
        assert routing.scheduled("native") is routing


def test_without_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a routing stays as it is, and the operation says what it needs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    routing = Router(3, 16)(torch.randn(5, 16))
    assert routing.scheduled() is routing
    with pytest.raises(RuntimeError, match="dispatch cannot run: a CPU runs Triton kernels in its interpr"):
        ops.dispatch(routing.expert_index, 3)
