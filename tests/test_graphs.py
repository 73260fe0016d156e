"""Captured training steps, with CUDA's graphs replaced by a recording of what is asked of them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from switch_dit.graphs import GraphedStep
from torch import Tensor


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    made = 0

    def __init__(self) -> None:
        Graph.made += 1
        self.number, self.replays = Graph.made, 0

    def pool(self) -> tuple[int, int]:
        return (0, self.number)

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The pool that each capture was given, in order."""
    given: list[object] = []

    @contextlib.contextmanager
    def capture(graph: Graph, pool: object = None):
        given.append(pool)
        yield

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return given


def test_both_graphs_share_a_pool(pools: list[object]) -> None:
    """Three steps run as they are, then there is one capture for each kind of step, and replays."""
    calls: list[bool] = []

    def advance(chosen: Tensor, match: bool) -> dict[str, Tensor]:
        calls.append(match)
        return {"loss": chosen.sum()}

    step = GraphedStep(advance)
    for match in (True, False, True, True, False, True, False):
        step(torch.arange(3), match)
    assert calls == [True, False, True, True, False]  # two of them in a capture
    assert pools == [None, (0, 1)]
    assert {match: graph.replays for match, (graph, _) in step.graphs.items()} == {True: 2, False: 2}
