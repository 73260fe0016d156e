"""DenseToSparseMoE: tokens that choose many experts first and one at last, as the temperature falls."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .balance import z_loss
from .gumbel import check_noise, gumbel_like
from .ops._checks import (
    check_choice,
    check_flags,
    check_integers,
    check_numbers,
)
from .ops._operator import without_autocast
from .ops.token_gate import TokenGate
from .token_moe import TokenMoE

DECAYS = ("constant", "exponential", "linear")


class Temperature(NamedTuple):
    """The temperature and the stage of the updates of a run, which are counted from 0."""

    decay: str = "exponential"
    highest: float = 2.0
    lowest: float = 0.3
    decay_steps: int = 0  # F; 0 is half of the run
    switch: int = 0  # the first update of the hard stage; 0 is half of the run

    def at(self, number: int, steps: int) -> float:
        """The temperature of an update: the highest of update 0, later ``f(n)`` and never below the lowest.

        ``f(n)`` is ``highest (lowest / highest)^(n / F)``, exponential, or linear,
        ``highest - n (highest - lowest) / F``.
        """
        if number == 0 or self.decay == "constant":
            return self.highest
        share = number / (self.decay_steps or max(1, steps // 2))
        if self.decay == "linear":
            falling = self.highest - share * (self.highest - self.lowest)
        else:
            falling = self.highest * (self.lowest / self.highest) ** share
        return max(falling, self.lowest)

    def is_soft(self, number: int, steps: int) -> bool:
        """Whether tokens choose several experts. Update 0 always is."""
        return number == 0 or number < (self.switch or max(1, steps // 2))


class DenseToSparseMoE(TokenMoE):
    """Each token chooses all experts above a threshold, then one: EvoMoE's gate (arXiv 2112.14397).

    With logits l of a token and Gumbel noise G, ``y = softmax((l + G) / temperature)``. The soft stage
    chooses every expert with y above the threshold, the hard stage the largest y. Gates are ``softmax(l)`` of
    those that are chosen, or their y with ``gumbel_gates``, not renormalised. An evaluation chooses the
    largest ``softmax(l)``, or k of them after :func:`switch_moe.set_top_k`. In training a temperature of zero
    or less means all experts, with ``softmax(l)``.

    :meth:`at_step` moves temperature and stage; a layer that nobody tells is at update 0.

    Args:
        hidden_size: D. num_experts: M.
        decay, highest, lowest, decay_steps, switch: see :class:`Temperature`. ``switch`` -1 is hard from
            update 1 on.
        threshold: of y in the soft stage.
        gumbel_gates: see above.
        eval_fraction: in evaluation an expert takes at most this share of all tokens of the batch, rounded
            up, the first ones in their order, and the others get nothing. 0, the default, drops none: a
            dropped token of an image would be left out of the denoising, and what an image becomes would
            depend on its neighbours in the batch. EvoMoE's code has .25.
        activation, expert_hidden_size, bias, router_bias, shared_hidden_size, backend: see
            :class:`TokenMoE`.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 8,
        *,
        decay: str = "exponential",
        highest: float = 2.0,
        lowest: float = 0.3,
        decay_steps: int = 0,
        switch: int = 0,
        threshold: float = 0.001,
        gumbel_gates: bool = False,
        eval_fraction: float = 0.0,
        activation: str = "gelu",
        bias: bool = True,
        **settings: Any,
    ) -> None:
        check_choice("decay", decay, DECAYS)
        check_numbers(highest=highest, lowest=lowest)
        if decay == "exponential" and not 0 < lowest <= highest:
            raise ValueError(
                f"lowest is {lowest} and highest {highest}; they must be 0 < lowest <= highest with an "
                "exponential decay"
            )
        check_integers(0, decay_steps=decay_steps)
        check_integers(-1, switch=switch)
        check_numbers(0, 1, "between 0 and 1", threshold=threshold, eval_fraction=eval_fraction)
        check_flags(gumbel_gates=gumbel_gates)
        super().__init__(hidden_size, num_experts, 1, activation=activation, bias=bias, **settings)
        self.schedule = Temperature(decay, highest, lowest, decay_steps, switch)
        self.threshold, self.gumbel_gates, self.eval_fraction = threshold, gumbel_gates, eval_fraction
        self.temperature, self.soft = highest, True
        self._divisor: Tensor | None = None

    @property
    def draws(self) -> bool:
        """Whether a forward draws random numbers."""
        return self.training and self.temperature > 0

    def at_step(self, number: int, steps: int) -> bool:
        """The temperature and the stage of update ``number``, from 0, of a run of ``steps``.

        Returns whether the stage has changed, and with it the operations of a forward.
        """
        before = self.soft, self.temperature > 0
        self.temperature, self.soft = self.schedule.at(number, steps), self.schedule.is_soft(number, steps)
        # A tensor, so that a captured CUDA graph reads the newest.
        device = self.router.weight.device
        if self._divisor is None or self._divisor.device != device:
            self._divisor = torch.empty((), device=device)
        self._divisor.fill_(self.temperature)
        return before != (self.soft, self.temperature > 0)

    def noisy(self, logits: Tensor, noise: Tensor) -> Tensor:
        """``y``, ``[B, T, M]``."""
        divisor = self.temperature if self._divisor is None else self._divisor
        return ((logits + noise) / divisor).softmax(-1)

    def gate(self, logits: Tensor, noise: Tensor | None = None) -> TokenGate:
        """The choices for logits ``[B, T, M]``; -1 stands for no expert.

        ``probs`` are the gates of all experts, zero where one is not chosen; in evaluation, and with a
        temperature of zero, ``softmax(l)``. ``load`` counts what was chosen before any token was dropped.
        """
        probs = logits.softmax(-1)
        experts = torch.arange(self.num_experts, device=logits.device)
        if not self.training:
            order = torch.sort(probs.detach(), dim=-1, descending=True, stable=True).indices
            index = order[..., : self.top_k]
            chosen = (index[..., None] == experts).any(-2)
            gate, kept = probs.gather(-1, index), self._within_capacity(index, chosen)
            return TokenGate(probs, kept, gate, *_sums(chosen, probs))
        if self.temperature <= 0:
            index = experts.expand(logits.shape)
            return TokenGate(probs, index, probs, *_sums(torch.ones_like(probs), probs))
        y = self.noisy(logits, gumbel_like(logits) if noise is None else noise)
        of_all = y if self.gumbel_gates else probs
        if self.soft:
            chosen = y > self.threshold
            index, gate = torch.where(chosen, experts, -1), of_all
        else:
            index = y.argmax(-1, keepdim=True)
            chosen, gate = index == experts, of_all.gather(-1, index)
        gates = of_all * chosen
        return TokenGate(gates, index, gate, *_sums(chosen, gates))

    def _within_capacity(self, index: Tensor, chosen: Tensor) -> Tensor:
        """-1 for the tokens that come after the last one that their expert takes."""
        if self.eval_fraction <= 0:
            return index
        rows = chosen.flatten(0, -2)
        place = rows.cumsum(0).gather(-1, index.flatten(0, -2)).view_as(index)  # from 1, of its expert's
        return torch.where(place <= math.ceil(self.eval_fraction * len(rows)), index, -1)

    def forward(
        self,
        x: Tensor,
        *,
        router_input: Tensor | None = None,
        time_embedding: Tensor | None = None,
        noise: Tensor | None = None,
        with_losses: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Tokens x ``[B, T, D]`` to ``[B, T, D]``; the arguments are those of :class:`TokenMoE`, and

        Args:
            noise: Gumbel noise ``[B, T, M]``; None takes torch's generator. Unused in evaluation.

        ``load_balance`` is ``M sum_e mean(gates_e) mean(chosen_e)``, without a gradient through the choice;
        with a temperature of zero it is 0.
        """
        seen = self._router_input(x, router_input)
        if noise is not None:
            check_noise(noise, x, self.num_experts)
        logits, of_time = self.router(seen, time_embedding)
        with without_autocast(x.device):
            logits = logits if of_time is None else logits + of_time[:, None]
            gate = self.gate(logits, noise)
        out = self.mix(x, self.routes(gate, x))
        if not with_losses:
            return out
        rows = max(1, x.shape[0] * x.shape[1])
        balance = self.num_experts * (gate.load * gate.importance).sum() / rows**2
        if self.training and self.temperature <= 0:
            balance = balance * 0
        return out, {"load_balance": balance, "z": z_loss(logits)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature:.4g}, soft={self.soft}"


def _sums(chosen: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens chose each expert, and the sum of its gates, both ``[M]``."""
    load = chosen.detach().to(gates.dtype).sum((0, 1))
    return load, gates.sum((0, 1))
