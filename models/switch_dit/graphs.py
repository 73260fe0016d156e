"""Training steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """Runs ``advance(chosen [B], match)`` as a CUDA graph, one for each value of ``match``.

    The first steps run eagerly, on a side stream as capture asks for, and count like any other: lazy
    initialisation must not fall into a capture. Results are tensors that the next replay overwrites.

    The graphs share a pool of memory, so the activations of a step are held once. They may, in any order,
    because a step passes nothing to the next one but parameters, optimizer state and buffers, all of which
    are older than the captures.
    """

    warmup = 3

    def __init__(self, advance: Callable[[Tensor, bool], dict[str, Tensor]]) -> None:
        self.advance, self.steps = advance, 0
        self.chosen: Tensor | None = None
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}

    def forget(self) -> None:
        """Drops the graphs: a step is another program now, which warms up and is captured anew."""
        self.graphs.clear()
        self.steps = 0

    def __call__(self, chosen: Tensor, match: bool) -> dict[str, Tensor]:
        """One step on the images ``chosen``; every call must choose as many."""
        if self.chosen is None:
            self.chosen = chosen.clone()
        self.chosen.copy_(chosen)
        self.steps += 1
        if self.steps <= self.warmup:
            main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(main)
            with torch.cuda.stream(aside):
                terms = self.advance(self.chosen, match)
            main.wait_stream(aside)
            return terms
        if match not in self.graphs:
            others = [graph.pool() for graph, _ in self.graphs.values()]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=others[0] if others else None):
                terms = self.advance(self.chosen, match)
            self.graphs[match] = graph, terms
        graph, terms = self.graphs[match]
        graph.replay()
        return terms
