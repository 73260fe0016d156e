"""The schedule of a batch against sorting on the host."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    ("batch", "top_k", "num_experts"),
    [(0, 2, 3), (1, 1, 1), (5, 2, 3), (127, 2, 3), (128, 1, 4), (129, 4, 8), (300, 3, 100), (33, 16, 16)],
)
def test_dispatch(batch: int, top_k: int, num_experts: int, device: str) -> None:
    from switch_moe.kernels.dispatch import dispatch

    torch.manual_seed(0)
    index = torch.rand(batch, num_experts).argsort(1)[:, :top_k].int().contiguous()
    order, pairs, offsets = (t.cpu().long() for t in dispatch(index.to(device), num_experts))
    by_expert = index.flatten().long()
    assert torch.equal(pairs, torch.argsort(by_expert, stable=True))
    counts = torch.bincount(by_expert, minlength=num_experts)
    assert torch.equal(offsets, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))
    bits = (1 << index.long()).sum(1) if num_experts <= 31 else None
    assert torch.equal(order.sort().values, torch.arange(batch))
    if bits is not None:
        assert torch.equal(order, torch.argsort(bits, stable=True))


def test_indices_out_of_range_stay_in_the_schedule(device: str) -> None:
    from switch_moe.kernels.dispatch import dispatch

    index = torch.tensor([[-5, 1], [2, 99]], dtype=torch.int32, device=device)
    order, pairs, offsets = (t.tolist() for t in dispatch(index, 3))
    assert sorted(order) == [0, 1]
    assert pairs == [0, 1, 2, 3]
    assert offsets == [0, 1, 2, 4]


def test_shapes_do_not_depend_on_the_routing() -> None:
    from switch_moe.kernels import _launch
    from switch_moe.kernels.dispatch import dispatch

    with _launch.record(90) as launches:
        found = dispatch(torch.empty(200, 2, dtype=torch.int32, device="meta"), 3)
    assert [tuple(t.shape) for t in found] == [(200,), (400,), (4,)]
    assert len(launches) == 1
