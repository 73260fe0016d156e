"""The pairs of rows and experts by expert: both backends against sorting a list."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from helpers import break_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switch_moe.ops import route_pairs

BACKENDS = ["auto", "triton"]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_index(rows: int, slots: int, experts: int, seed: int = 0) -> Tensor:
    """Experts of each row, some of them none, some the same twice; nobody chooses the last but one."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, experts, (rows, slots), generator=generator, dtype=torch.int32)
    return torch.where(index == experts - 2, experts - 1, index)


def check(index: Tensor, experts: int, backend: str) -> None:
    found = route_pairs(index, experts, backend=backend)
    offsets, pair, slot = (tensor.tolist() for tensor in found)
    assert all(tensor.dtype == torch.int32 and tensor.device == index.device for tensor in found)
    keys = [e if e >= 0 else experts for e in index.flatten().tolist()]
    expected = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    assert pair == expected
    assert offsets == [sum(key < e for key in keys) for e in range(experts + 1)]
    place = {number: position for position, number in enumerate(expected)}
    slots = [place[i] if keys[i] < experts else -1 for i in range(len(keys))]
    assert torch.tensor(slot).flatten().tolist() == slots
    assert len(slot) == len(index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "slots", "experts"),
    [(1, 1, 1), (5, 2, 3), (128, 1, 4), (257, 3, 8), (700, 2, 5), (33, 16, 100), (9, 4, 256), (70, 1, 300),
     (0, 2, 3), (4, 0, 3)],
)  # fmt: skip
def test_matches_a_sorted_list(rows: int, slots: int, experts: int, backend: str, device: str) -> None:
    check(make_index(rows, slots, experts).to(device), experts, backend)
    if experts == 8:
        check(make_index(rows, slots, experts, 1).long().to(device), experts, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expert", [-1, 0, 6])
def test_all_choose_one(expert: int, backend: str, device: str) -> None:
    check(torch.full((600, 2), expert, dtype=torch.int32, device=device), 7, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str, device: str) -> None:
    index = make_index(70, 3, 5).to(device)
    check(index.t().contiguous().t(), 5, backend)
    check(index[:1].expand(70, 3), 5, backend)
    check(torch.cat([index.flatten()[:1], index.flatten()])[1:].view(70, 3), 5, backend)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_choice(data: st.DataObject) -> None:
    kernels = importlib.import_module("switch_moe.kernels.route_pairs")
    experts, slots = 5, data.draw(st.integers(1, 3))
    rows = data.draw(
        st.lists(st.lists(st.integers(-1, experts - 1), min_size=slots, max_size=slots), min_size=1)
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.MonkeyPatch.context() as patch:  # many blocks, and several tiles of each
        patch.setattr(kernels, "_BLOCK", 16)
        patch.setattr(kernels, "_NUMBERS", 32)
        check(torch.tensor(rows, dtype=torch.int32, device=device), experts, "triton")


def test_what_is_out_of_range_is_none(device: str) -> None:
    """On a GPU nobody looks; the kernels then write inside of their results all the same."""
    from switch_moe.kernels.route_pairs import route_pairs as sort

    wrong = torch.tensor([[-5, 1], [2, 99], [3, 0]], dtype=torch.int32, device=device)
    right = torch.where((wrong < 0) | (wrong > 2), -1, wrong)
    for a, b in zip(sort(wrong, 3), sort(right, 3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tl.cumsum(mine, 0) + before", "tl.sum(mine, 0)[None, :] + before"),
        ("tl.store(offsets_ptr + expert, ends - totals", "tl.store(offsets_ptr + expert, ends"),
        ("tl.where(has > 0, place, -1)", "place"),
    ],
)
def test_a_broken_kernel_is_noticed(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    # Each of these faults still writes inside of the results.
    broken = break_kernels("route_pairs", right, wrong, tmp_path, monkeypatch)
    monkeypatch.setattr(broken, "_BLOCK", 64)
    monkeypatch.setattr(broken, "_NUMBERS", 128)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        check(make_index(100, 2, 5).to(device), 5, "triton")


def test_shapes_do_not_depend_on_the_choices() -> None:
    from switch_moe.kernels import _launch
    from switch_moe.kernels.route_pairs import route_pairs as sort

    with _launch.record(90) as launches:
        found = sort(torch.empty(65536, 2, dtype=torch.int32, device="meta"), 64)
    assert [tuple(tensor.shape) for tensor in found] == [(65,), (131072,), (65536, 2)]
    assert [launch.programs for launch in launches] == [256, 8, 256]


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_opcheck(path: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    for experts in (1, 5):
        arguments = (make_index(9, 2, experts).to(device), experts, path)
        torch.library.opcheck(torch.ops.switch_moe.route_pairs.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    index = make_index(50, 2, 5).to(device)
    compiled = torch.compile(
        lambda i: route_pairs(i, 5, backend=backend), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(compiled(index), route_pairs(index, 5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("index", "experts", "error", "message"),
    [
        ([[0]], 2, TypeError, r"expert_index is \[\[0\]\] \(list\); it must be a tensor"),
        (torch.zeros(3).int(), 2, ValueError, r"expert_index has shape \(3,\); it must be \[R, S\]"),
        (torch.zeros(3, 1), 2, TypeError, r"expert_index is torch\.float32; it must be torch\.int32 or"),
        (
            torch.tensor([[0, 2]]),
            2,
            ValueError,
            r"expert_index holds 0 to 2; it must stay in \[0, 2\), the ex",
        ),
        (torch.tensor([[0, -2]]), 2, ValueError, "expert_index holds -2 to 0"),
        (torch.tensor([[0]]), 0, ValueError, "num_experts is 0; it must be at least 1"),
        (torch.tensor([[0]]), 1.5, TypeError, r"num_experts is 1\.5"),
    ],
)
def test_errors(index: Tensor, experts: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route_pairs(index, experts)


def test_a_backend_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.tensor([[0]])
    with pytest.raises(ValueError, match="backend is 'cudnn'; it must be one of"):
        route_pairs(index, 1, backend="cudnn")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' of route_pairs cannot run: a CPU"):
        route_pairs(index, 1, backend="triton")
