"""SwitchMoE: a mixture of experts whose router sees only the diffusion timestep."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .merged import MergedExperts, merge_linear, merge_mlp
from .ops._backend import BACKENDS
from .ops._checks import (
    check_choice,
    check_flags,
    check_integers,
    check_range,
    check_shape,
    check_tensors,
    check_top_k,
)
from .ops.expert_linear import expert_linear
from .ops.expert_mlp import expert_mlp
from .router import Router, Routing, backend_beside

EXPERTS = ("linear", "mlp", "swiglu")


def _rows(tensor: Tensor, x: Tensor) -> int | str:
    """What the first size of ``tensor`` must be: the batch, or 1 for all samples alike."""
    return "B or 1" if tensor.shape[:1] == (1,) else x.shape[0]


class SwitchMoE(nn.Module):
    """``m(x) = sum_j gate_j expert_j(x)``, every token of a sample routed by its timestep (arXiv 2403.09176).

    Fresh layers return zeros, so ``x * (1 + m(x))`` and ``x + m(x)`` start as the identity.

    Args:
        hidden_size: D. num_experts: M. top_k: experts per sample, 1 to M.
        expert: ``linear`` (D to D, Switch-DiT's), ``mlp`` (GELU) or ``swiglu``; the last two have a hidden
            layer.
        expert_hidden_size: width of that hidden layer, 4 D by default; only with ``mlp`` and ``swiglu``.
        bias: whether the experts have biases. The router always has one.
        router: whether the layer has its own router; without one, every call needs ``routing``, from a
            :class:`switch_moe.Router` of all blocks.
        backend: see :func:`switch_moe.ops.expert_linear` and ``expert_mlp``; the router takes it too, but for
            ``native`` and ``cuda``, with which it takes ``auto``.

    Parameters: ``router.weight [1, M, D]`` and ``router.bias [1, M]``, unless ``router=False``; for linear
    experts ``weight [M, D, D]`` and ``bias [M, D]``, for the others ``weight_in [M, D, H]``, ``bias_in``,
    ``weight_out [M, H, D]`` and ``bias_out`` (2H for SwiGLU's input).

    Raises ``ValueError`` for a setting out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 3,
        top_k: int = 2,
        *,
        expert: str = "linear",
        expert_hidden_size: int | None = None,
        bias: bool = True,
        router: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("expert", expert, EXPERTS)
        check_choice("backend", backend, BACKENDS)
        check_flags(bias=bias, router=router)
        check_integers(hidden_size=hidden_size)
        if expert == "linear" and expert_hidden_size is not None:
            raise ValueError(
                f"expert_hidden_size is {expert_hidden_size}; linear experts have no hidden layer"
            )
        if expert != "linear" and backend in ("native", "cuda"):
            kernels = "compiled CPU kernels" if backend == "native" else "CUDA kernels beside Triton's"
            raise ValueError(f"backend is {backend!r}; {expert} experts have no {kernels}")
        hidden = 4 * hidden_size if expert_hidden_size is None else expert_hidden_size
        check_integers(expert_hidden_size=hidden)
        check_top_k(top_k, num_experts)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.expert, self.backend = expert, backend

        of_router = backend_beside(backend)
        self.router = Router(1, hidden_size, num_experts, top_k, backend=of_router) if router else None

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape))

        def bias_parameter(size: int) -> nn.Parameter | None:
            return parameter(size) if bias else None

        if expert == "linear":
            self.weight = parameter(hidden_size, hidden_size)
            self.bias = bias_parameter(hidden_size)
        else:
            width = 2 * hidden if expert == "swiglu" else hidden
            self.weight_in, self.bias_in = parameter(hidden_size, width), bias_parameter(width)
            self.weight_out, self.bias_out = parameter(hidden, hidden_size), bias_parameter(hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A small random router; experts that return zero."""
        if self.router is not None:
            self.router.reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if name == "weight_in":
                for expert_weight in parameter:
                    nn.init.xavier_uniform_(expert_weight)
            else:
                nn.init.zeros_(parameter)

    def route(self, time_embedding: Tensor) -> Routing:
        """The routing of this layer for ``time_embedding [B, D]``, without a leading block dimension."""
        if self.router is None:
            raise ValueError("the layer has no router (router=False); pass routing, see switch_moe.Router")
        routing: Routing = self.router(time_embedding)
        return routing.block(0)

    def merge(self, routing: Routing) -> MergedExperts:
        """The experts that ``routing`` chooses as dense layers, for many calls with samples of one timestep.

        ``layer.merge(routing)(x)`` is ``layer(x, routing=routing)`` up to rounding; differentiable as that.

        Args:
            routing: of one row, for example ``layer.route(embedding)`` with ``embedding [1, D]``.

        Raises ``ValueError`` or ``TypeError`` for a routing that does not fit.
        """
        if isinstance(routing, Routing) and isinstance(routing.expert_index, Tensor):
            check_shape("routing.expert_index", routing.expert_index, (1, "k"))
        return self.merge_each(routing)[0]

    def merge_each(self, routing: Routing) -> list[MergedExperts]:
        """:meth:`merge` for each row of a routing, in one call: for all timesteps of a schedule."""
        if not isinstance(routing, Routing):
            raise TypeError(f"routing is a {type(routing).__name__}; it must be a switch_moe.Routing")
        index, gate = routing.expert_index, routing.expert_gate
        check_tensors(expert_index=index, expert_gate=gate)
        check_shape("routing.expert_index", index, ("R", "k"))
        check_shape("routing.expert_gate", gate, tuple(index.shape))
        if self.expert == "linear":
            return merge_linear(self.weight, self.bias, index, gate, self.backend)
        check_range("routing.expert_index", index, self.num_experts, "the experts")
        weights = self.weight_in, self.bias_in, self.weight_out, self.bias_out
        gated = self.expert == "swiglu"
        routes = zip(index.split(1), gate.split(1), strict=True)
        return [merge_mlp(*weights, *route, gated) for route in routes]

    def forward(
        self,
        x: Tensor,
        time_embedding: Tensor | None = None,
        *,
        routing: Routing | None = None,
        modulate: bool = False,
    ) -> Tensor:
        """``m(x)``, or ``x * (1 + m(x))`` with ``modulate``: ``[B, T, D]``.

        Args:
            x: tokens ``[B, T, D]``.
            time_embedding: ``[B, D]``, what the router sees, or ``[1, D]`` for a batch of one timestep, whose
                linear experts then merge once. routing: that of this layer, computed ahead by a
                :class:`switch_moe.Router`. Exactly one of the two (``ValueError``).
        """
        check_tensors(x=x)
        check_shape("x", x, ("B", "T", self.hidden_size))
        check_flags(modulate=modulate)
        if routing is None and time_embedding is not None:
            check_tensors(time_embedding=time_embedding)
            rows = _rows(time_embedding, x)
            check_shape("time_embedding", time_embedding, (rows, self.hidden_size))
            routing = self.route(time_embedding)
        elif routing is None or time_embedding is not None:
            given = "neither" if routing is None else "both"
            raise ValueError(f"time_embedding and routing: {given} given; it must be exactly one of them")
        if not isinstance(routing, Routing):
            raise TypeError(f"routing is a {type(routing).__name__}; it must be a switch_moe.Routing")
        check_tensors(expert_index=routing.expert_index, expert_gate=routing.expert_gate)
        index, gate, schedule = routing.expert_index, routing.expert_gate, routing.schedule
        check_shape("routing.expert_index", index, (_rows(index, x), "k"))
        if self.expert == "linear":
            return expert_linear(
                x, self.weight, self.bias, index, gate, modulate, schedule=schedule, backend=self.backend
            )
        if index.shape[0] != x.shape[0]:  # one route for all; experts with a hidden layer cannot merge
            index, gate, schedule = index.expand(len(x), -1), gate.expand(len(x), -1), None
        gated = self.expert == "swiglu"
        mixture = expert_mlp(
            x, self.weight_in, self.bias_in, self.weight_out, self.bias_out, index, gate, gated,
            schedule=schedule, backend=self.backend,
        )  # fmt: skip
        if not modulate:
            return mixture
        x = x.to(mixture.dtype)  # under autocast in its type, like linear experts
        return x + x * mixture

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"expert={self.expert}, backend={self.backend}"
        )
