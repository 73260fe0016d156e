"""DiffMoE: experts choose among the tokens of a whole batch, and learn how many to take when sampling."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .balance import z_loss
from .ops._checks import check_flags, check_integers, check_numbers, check_shape, check_tensors
from .ops._operator import without_autocast
from .routes import Routes
from .token_moe import TokenMoE, linear_in_float32


class CapacityPredictor(nn.Module):
    """Whether each expert would take a token, from the token alone: two layers and a threshold per expert.

    In training an expert takes a fixed number of tokens of a batch. A sampler's batch may need more of an
    expert, or less, so there the predictor says how many tokens are worth it: those whose ``sigmoid(logit)``
    is above the expert's ``threshold``, a moving average of the values that were just good enough in training
    (DiffMoE, arXiv 2503.14487).

    Parameters: ``first.*`` (D to D) and ``last.*`` (D to M), with SiLU between. Buffer: ``threshold [M]``.
    Computed in float32 always, and the thresholds stay in it.
    """

    threshold: Tensor

    def __init__(self, hidden_size: int, num_experts: int, decay: float = 0.95) -> None:
        super().__init__()
        check_integers(hidden_size=hidden_size, num_experts=num_experts)
        check_numbers(0, 1, "between 0 and 1", decay=decay)
        self.decay = decay
        self.first = nn.Linear(hidden_size, hidden_size)
        self.last = nn.Linear(hidden_size, num_experts)
        self.register_buffer("threshold", torch.empty(num_experts))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier's uniform weights, zero biases, and thresholds of zero: every token is worth an expert."""
        for layer in (self.first, self.last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.threshold.zero_()

    def _apply(self, *arguments: Any, **options: Any) -> CapacityPredictor:
        """``to``, ``half`` and their like end here. In a half type the thresholds would cease to learn."""
        before = self.threshold
        super()._apply(*arguments, **options)
        if self.threshold.dtype in (torch.bfloat16, torch.float16):
            there = self.threshold.device
            self.threshold = before.to(there) if not before.is_meta else self.threshold.float()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[.., M]`` of tokens x ``[.., D]``, to which no gradient flows."""
        with without_autocast(x.device):
            hidden = F.silu(linear_in_float32(x.detach(), self.first.weight, self.first.bias))
            return linear_in_float32(hidden, self.last.weight, self.last.bias)

    def tokens_per_expert(self, logits: Tensor) -> Tensor:
        """How many of the tokens with ``logits [S, M]`` each expert takes, int64 ``[M]``."""
        return (logits.sigmoid() > self.threshold).sum(0)

    @torch.no_grad()
    def learn(self, observed: Tensor) -> None:
        """Moves the thresholds towards ``observed [M]``, in the mean of all processes of torch.distributed.

        Every process must call it as often. Nothing waits for the device.
        """
        check_tensors(observed=observed)
        check_shape("observed", observed, tuple(self.threshold.shape))
        if observed.is_meta:  # where only shapes are computed, on one process perhaps
            return
        observed = observed.detach().to(self.threshold)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            observed = observed.clone()
            dist.all_reduce(observed)
            observed = observed / dist.get_world_size()
        self.threshold.mul_(self.decay).add_(observed, alpha=1 - self.decay)


class DiffMoE(TokenMoE):
    """A :class:`TokenMoE` whose experts each choose among all tokens of a batch (arXiv 2503.14487).

    In training an expert takes the ``S / M * capacity`` tokens, rounded down, with the largest scores of all
    ``S = B T``. In evaluation it takes as many as its :class:`CapacityPredictor` says, again those with the
    largest scores, from none to all S. Before any training that is all: a threshold starts at zero.
    In both a token's experts depend on the other samples of the batch, as in the original.

    Args:
        hidden_size: D. num_experts: M.
        capacity: mean number of experts for a token in training.
        decay: of the moving average that the thresholds are.
        activation, expert_hidden_size, bias, shared_hidden_size, backend: see :class:`TokenMoE`.

    Parameters: those of :class:`TokenMoE`, and ``predictor.*``. Routers and predictors compute in float32.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 8,
        *,
        capacity: float = 1.0,
        decay: float = 0.95,
        activation: str = "gelu",
        expert_hidden_size: int | None = None,
        bias: bool = True,
        shared_hidden_size: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            hidden_size, num_experts, 1, capacity=capacity, pool=0, activation=activation, bias=bias,
            expert_hidden_size=expert_hidden_size, shared_hidden_size=shared_hidden_size, backend=backend,
        )  # fmt: skip
        self.predictor = CapacityPredictor(hidden_size, num_experts, decay)

    def forward(
        self,
        x: Tensor,
        *,
        router_input: Tensor | None = None,
        time_embedding: Tensor | None = None,
        with_losses: bool = False,
        observe: bool = False,
    ) -> Any:
        """Tokens x ``[B, T, D]`` to ``[B, T, D]``. In training the thresholds learn, unless told otherwise.

        Args:
            router_input: what router and predictor see in the place of x, ``[B, T, D]``.
            time_embedding: None; this router sees the tokens only.
            with_losses: whether to return the losses beside the output, scalars by name: ``capacity``, the
                predictor's cross entropy with the choice that was made, and ``z``, see
                :mod:`switch_moe.balance`. Nothing weights them. A loss of balance would be a constant: in
                training all experts take equally many tokens.
            observe: with losses and in training, return what ``predictor.learn`` takes as a third result and
                leave the call to the caller. Where activations are checkpointed the forward runs twice, and
                the thresholds must learn from it once.
        """
        check_flags(with_losses=with_losses, observe=observe)
        seen = self._router_input(x, router_input)
        wanted = self.predictor(seen).flatten(0, 1)  # [S, M]
        if self.training:
            gate, logits = self.route(seen, time_embedding)
            routes = self.routes(gate, x)
            chosen = gate.chosen[0].long()  # [M, K]
            selected = torch.zeros_like(wanted).scatter(0, chosen.t(), 1.0)
        else:
            logits, _ = self.router(seen, time_embedding)
            routes, selected = self._predicted_routes(logits.flatten(0, 1), wanted)
        out = self.mix(x, routes)
        observed = None
        if self.training:
            # The weakest logit among as many of each expert's largest as it took.
            count = routes.row.shape[0] // self.num_experts
            observed = wanted.detach().sigmoid().topk(count, dim=0).values[-1]
            if not (observe and with_losses):
                self.predictor.learn(observed)
        if not with_losses:
            return out
        capacity = F.binary_cross_entropy_with_logits(wanted, selected)
        losses = {"capacity": capacity, "z": z_loss(logits)}
        return (out, losses, observed) if observe and observed is not None else (out, losses)

    def _predicted_routes(self, logits: Tensor, wanted: Tensor) -> tuple[Routes, Tensor]:
        """Routes of S rows by the predictor, and the choices as zeros and ones ``[S, M]``.

        There is room for S M pairs, so shapes do not depend on the choices.
        """
        probs = logits.softmax(-1)  # [S, M]
        order = probs.detach().sort(dim=0, descending=True, stable=True).indices
        place = torch.arange(len(probs), device=probs.device)[:, None].expand_as(order)
        rank = torch.empty_like(order).scatter(0, order, place)
        selected = rank < self.predictor.tokens_per_expert(wanted)
        experts = torch.arange(self.num_experts, device=probs.device).expand_as(order)
        routes = Routes.of_rows(experts.where(selected, -1), probs, self.num_experts)
        return routes, selected.to(wanted.dtype)
