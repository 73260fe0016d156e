"""TokenMoE: a mixture of experts in the place of a feed-forward layer, routed token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .balance import load_balance_loss, z_loss
from .ops._backend import BACKENDS
from .ops._checks import (
    check_choice,
    check_flags,
    check_integers,
    check_numbers,
    check_positive,
    check_shape,
    check_tensors,
)
from .ops._checks import check_top_k as _check_top_k
from .ops._operator import without_autocast
from .ops.routed_mlp import ACTIVATIONS, routed_mlp
from .ops.token_gate import SCORES, TokenGate, check_groups, token_gate
from .routes import Routes

ROUNDINGS = {"down": math.floor, "up": math.ceil}


class TokenRouter(nn.Module):
    """Logits of the experts for every token, and for every sample where the router sees the timestep too.

    Parameters: ``weight [M, D]``; ``bias [M]``, if asked for; ``time_weight [M, E]`` with a ``time_size`` E:
    one matrix on [time embedding; token] is the sum of two (Nucleus-Image, arXiv 2604.12163). Computed in
    float32 always.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, bias: bool = False, time_size: int = 0) -> None:
        super().__init__()
        check_integers(hidden_size=hidden_size, num_experts=num_experts)
        check_integers(0, time_size=time_size)
        check_flags(bias=bias)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.time_weight = nn.Parameter(torch.empty(num_experts, time_size)) if time_size else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A small random router."""
        nn.init.normal_(self.weight, std=0.02)
        for parameter in (self.bias, self.time_weight):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of tokens x ``[B, T, D]``: ``[B, T, M]``, and ``[B, M]`` of the timesteps or None."""
        if (time_embedding is None) != (self.time_weight is None):
            wanted = "None" if self.time_weight is None else f"[B, {self.time_weight.shape[1]}]"
            given = "None" if time_embedding is None else "given"
            raise ValueError(f"time_embedding is {given}; it must be {wanted} for this router")
        if time_embedding is not None and self.time_weight is not None:
            check_tensors(time_embedding=time_embedding)
            check_shape("time_embedding", time_embedding, (x.shape[0], self.time_weight.shape[1]))
        with without_autocast(x.device):
            logits = linear_in_float32(x, self.weight, self.bias)
            if time_embedding is None or self.time_weight is None:
                return logits, None
            return logits, linear_in_float32(time_embedding, self.time_weight, None)


def linear_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, or in float64 with weights of that type."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class TokenMoE(nn.Module):
    """``y = shared(x) + sum_e gate_e expert_e(x)`` for every token, with experts of two layers.

    With ``top_k`` each token chooses its experts, as in DiT-MoE (arXiv 2407.11633); with ``capacity`` each
    expert chooses its tokens, as in EC-DIT (arXiv 2410.02098) and Nucleus-Image (arXiv 2604.12163).

    Args:
        hidden_size: D. num_experts: M.
        top_k: experts for each token, 1 to M, unless ``capacity`` is given.
        capacity: mean number of experts for a token. Each expert takes ``T / M * capacity`` tokens of a
            sample, rounded ``down`` or ``up`` by ``capacity_rounding`` and at least one.
        pool: samples among whose tokens an expert chooses; 0 is the whole batch. Only with ``capacity``.
        score, normalise, scale, groups, top_groups: see :func:`switch_moe.ops.token_gate`.
        activation: of the experts, see :func:`switch_moe.ops.routed_mlp`.
        expert_hidden_size: H, 4 D by default.
        bias: whether the experts have biases. router_bias: whether the router has one.
        shared_hidden_size: width of one more expert, which every token has; 0 is none.
        time_size: size of the time embedding that the router sees beside the token; 0 is none.
        backend: see :func:`switch_moe.ops.routed_mlp`.

    Parameters: ``router.*``, see :class:`TokenRouter`; ``weight_in [M, D, H or 2H]``, ``bias_in``,
    ``weight_out [M, H, D]``, ``bias_out``; ``shared_in [D, ..]`` and ``shared_out``, with ``shared_bias_in``
    and ``shared_bias_out``. Routers compute in float32 always.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 8,
        top_k: int = 2,
        *,
        capacity: float | None = None,
        capacity_rounding: str = "down",
        pool: int = 1,
        score: str = "softmax",
        normalise: bool = False,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        activation: str = "swiglu",
        expert_hidden_size: int | None = None,
        bias: bool = False,
        router_bias: bool = False,
        shared_hidden_size: int = 0,
        time_size: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        hidden = 4 * hidden_size if expert_hidden_size is None else expert_hidden_size
        check_integers(hidden_size=hidden_size, expert_hidden_size=hidden)
        check_integers(0, pool=pool, shared_hidden_size=shared_hidden_size)
        if capacity is None:
            _check_top_k(top_k, num_experts)
            check_groups(num_experts, top_k, groups, top_groups)
            if pool != 1:
                raise ValueError(f"pool is {pool}; it must be 1 without a capacity, where tokens choose")
        else:
            check_positive(capacity=capacity)
            if groups != 1:
                raise ValueError(f"groups is {groups}; it must be 1 with a capacity, where experts choose")
        check_numbers(scale=scale)
        check_choice("capacity_rounding", capacity_rounding, ROUNDINGS)
        check_choice("score", score, SCORES)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("backend", backend, BACKENDS)
        if backend == "cuda":
            raise ValueError(f"backend is {backend!r}; these experts have no CUDA kernels beside Triton's")
        check_flags(bias=bias, normalise=normalise, router_bias=router_bias)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.capacity, self.capacity_rounding, self.pool = capacity, capacity_rounding, pool
        self.gate_settings: dict[str, Any] = {
            "score": score, "normalise": normalise, "scale": scale, "groups": groups, "top_groups": top_groups
        }  # fmt: skip
        self.activation, self.backend = activation, backend
        self.router = TokenRouter(hidden_size, num_experts, bias=router_bias, time_size=time_size)
        gated = 2 if activation.startswith("swiglu") else 1

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        self.weight_in = parameter(num_experts, hidden_size, gated * hidden)
        self.bias_in = parameter(num_experts, gated * hidden) if bias else None
        self.weight_out = parameter(num_experts, hidden, hidden_size)
        self.bias_out = parameter(num_experts, hidden_size) if bias else None
        shared = shared_hidden_size
        self.shared_in = parameter(hidden_size, gated * shared) if shared else None
        self.shared_bias_in = parameter(gated * shared) if shared and bias else None
        self.shared_out = parameter(shared, hidden_size) if shared else None
        self.shared_bias_out = parameter(hidden_size) if shared and bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier's uniform weights, as for DiT's MLPs, zero biases and a small random router."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        for name, parameter in self.named_parameters(recurse=False):
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                for weight in parameter if parameter.dim() == 3 else parameter[None]:
                    # SwiGLU's two layers lie side by side; each is drawn as a layer of its own.
                    for layer in weight.chunk(2 if self._is_gated(name) else 1, dim=-1):
                        bound = math.sqrt(6 / sum(layer.shape))
                        layer.uniform_(-bound, bound)

    def _is_gated(self, name: str) -> bool:
        return name in ("weight_in", "shared_in") and self.activation.startswith("swiglu")

    def tokens_per_expert(self, tokens: int) -> int:
        """How many of a pool's ``tokens`` an expert takes; ``ValueError`` without a capacity."""
        if self.capacity is None:
            raise ValueError("capacity is None; tokens choose, so experts take what comes")
        # In this order, and in floating point, as the code of EC-DIT's reimplementation rounds it.
        exact = tokens / self.num_experts * self.capacity
        return min(tokens, max(1, ROUNDINGS[self.capacity_rounding](exact)))

    def route(self, x: Tensor, time_embedding: Tensor | None = None) -> tuple[TokenGate, Tensor]:
        """The choices for router inputs x ``[B, T, D]``, and the logits ``[B, T, M]``."""
        logits, of_time = self.router(x, time_embedding)
        choice: dict[str, Any] = {"top_k": self.top_k}
        if self.capacity is not None:
            if x.shape[0] * x.shape[1] == 0:
                raise ValueError(f"x has shape {tuple(x.shape)}; experts that choose need a token at least")
            pool = self.pool or len(x)
            choice = {"capacity": self.tokens_per_expert(pool * x.shape[1]), "pool": pool}
        gate = token_gate(logits, **choice, sample_logits=of_time, **self.gate_settings)
        return gate, logits if of_time is None else logits + of_time[:, None]

    def forward(
        self,
        x: Tensor,
        *,
        router_input: Tensor | None = None,
        time_embedding: Tensor | None = None,
        with_losses: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Tokens x ``[B, T, D]`` to ``[B, T, D]``.

        Args:
            router_input: what the router sees in the place of x, ``[B, T, D]``, for example tokens that the
                timestep has not modulated. time_embedding: ``[B, time_size]``, for a router that sees it.
            with_losses: whether to return the losses of balance beside the output, scalars by name:
                ``load_balance`` and ``z``, see :mod:`switch_moe.balance`. Nothing weights them.
        """
        gate, logits = self.route(self._router_input(x, router_input), time_embedding)
        out = self.mix(x, self.routes(gate, x))
        if not with_losses:
            return out
        tokens = x.shape[0] * x.shape[1]
        balance = load_balance_loss(gate.load, gate.importance, tokens)
        return out, {"load_balance": balance, "z": z_loss(logits)}

    def _router_input(self, x: Tensor, router_input: Tensor | None) -> Tensor:
        """What the router sees; ``ValueError`` or ``TypeError`` unless both are ``[B, T, D]``."""
        check_tensors(x=x)
        check_shape("x", x, ("B", "T", self.hidden_size))
        if router_input is None:
            return x
        check_tensors(router_input=router_input)
        check_shape("router_input", router_input, tuple(x.shape))
        return router_input

    def routes(self, gate: TokenGate, x: Tensor) -> Routes:
        """The routes of the rows of x ``[B, T, D]``, flattened to ``[B*T, D]``."""
        rows = x.shape[0] * x.shape[1]
        if self.capacity is None:
            chosen = gate.chosen.flatten(0, 1), gate.gate.flatten(0, 1)
            return Routes.of_rows(*chosen, self.num_experts)
        pools = len(gate.chosen)
        starts = torch.arange(pools, device=x.device) * (rows // max(1, pools))
        chosen_rows = gate.chosen + starts[:, None, None]  # [pools, M, C]
        row, of_pair = (part.transpose(0, 1).flatten(1) for part in (chosen_rows, gate.gate))
        return Routes.of_experts(row, of_pair, rows)

    def mix(self, x: Tensor, routes: Routes) -> Tensor:
        """The shared expert and the routed ones on x ``[B, T, D]``."""
        rows, base = x.flatten(0, 1), None
        if self.shared_in is not None and self.shared_out is not None:
            biases = (None if b is None else b[None] for b in (self.shared_bias_in, self.shared_bias_out))
            bias_in, bias_out = biases
            base = routed_mlp(
                rows, self.shared_in[None], bias_in, self.shared_out[None], bias_out, Routes.to_one(rows),
                self.activation, backend=self.backend,
            )  # fmt: skip
        out = routed_mlp(
            rows, self.weight_in, self.bias_in, self.weight_out, self.bias_out, routes, self.activation,
            base=base, backend=self.backend,
        )  # fmt: skip
        return out.view(x.shape)

    def extra_repr(self) -> str:
        chosen = f"top_k={self.top_k}" if self.capacity is None else f"capacity={self.capacity}"
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, {chosen}, {self.activation}"
