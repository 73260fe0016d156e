"""FallingCapacityMoE: experts that choose their tokens, ever fewer of them as training goes on."""

from __future__ import annotations

import math
from typing import Any

from .ops._checks import check_integers, check_positive
from .token_moe import TokenMoE


class FallingCapacityMoE(TokenMoE):
    """The layer of Nucleus-Image (arXiv 2604.12163): a :class:`TokenMoE` with its settings as the defaults.

    Each expert takes its ``ceil(capacity T / M)`` best tokens of a sample, by the score that a router gives
    to [time embedding; token]; the gates of a token are divided by their sum and multiplied by ``scale``; one
    more expert of the same width has every token. The tokens that the router sees are ``router_input``, those
    that the timestep has not modulated yet.

    Args:
        hidden_size: D. num_experts: M.
        capacity: mean number of experts for a token at the end of the training, and without one.
        capacity_start: at the beginning of the training; None is ``capacity``. :meth:`at_step` goes from the
            one to the other.
        stages: in how many steps. Each has other shapes, which a compiler or a CUDA graph takes as another
            program.
        scale, score: see :func:`switch_moe.ops.token_gate`.
        expert_hidden_size: H, of every expert, 4 D by default.
        time_size: of the time embedding, D by default.
        settings: more of :class:`TokenMoE`.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 8,
        *,
        capacity: float = 2.0,
        capacity_start: float | None = None,
        stages: int = 4,
        scale: float = 2.5,
        score: str = "softmax",
        expert_hidden_size: int | None = None,
        time_size: int | None = None,
        **settings: Any,
    ) -> None:
        hidden = 4 * hidden_size if expert_hidden_size is None else expert_hidden_size
        super().__init__(
            hidden_size, num_experts, 1, capacity=capacity, normalise=True, scale=scale, score=score,
            expert_hidden_size=hidden, shared_hidden_size=hidden,
            time_size=hidden_size if time_size is None else time_size, **settings,
        )  # fmt: skip
        start = capacity if capacity_start is None else capacity_start
        check_positive(capacity_start=start)
        check_integers(1, 2**20, stages=stages)
        self.capacity_start, self.capacity_end, self.stages = start, capacity, stages

    def at_step(self, number: int, steps: int) -> bool:
        """The capacity of step ``number``, from 0, of ``steps``: ``stages`` equal parts of the run, linear.

        Returns whether it has changed, and with it the shapes of a forward.
        """
        before, last = self.capacity, self.stages - 1
        stage = min(last, number * self.stages // max(1, steps))
        share = stage / last if last else 1.0
        self.capacity = (1 - share) * self.capacity_start + share * self.capacity_end
        return self.capacity != before

    def tokens_per_expert(self, tokens: int) -> int:
        """How many of a pool's ``tokens`` an expert takes."""
        # In this order, and in floating point, as diffusers' code of the model rounds it.
        assert self.capacity is not None
        return min(tokens, max(1, math.ceil(self.capacity * tokens / self.num_experts)))
