"""Timestep routing: the gates of every block, known before the first block runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops._backend import BACKENDS, runs_triton
from .ops._checks import check_choice, check_integers, check_top_k
from .ops.dispatch import dispatch
from .ops.timestep_gate import selected_experts, timestep_gate
from .ops.token_gate import check_groups
from .prior import DiffusionPrior


class Routing(NamedTuple):
    """Where samples go. For one block the shapes are without the leading L."""

    probs: Tensor  # [L, B, M] float32
    expert_index: Tensor  # [L, B, k] int32
    expert_gate: Tensor  # [L, B, k] float32
    # What selected() returns, [B, L*M], and the expert_index that it is of, if the router was asked for it.
    kept: tuple[Tensor, Tensor] | None = None
    # What scheduled() adds: the order of the kernels, [L, S] int32, and the expert_index that it is of.
    order: tuple[Tensor, Tensor] | None = None

    def block(self, index: int) -> Routing:
        """The routing of one block of a routing of L blocks."""
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"index is {index!r} ({type(index).__name__}); it must be the number of a block")
        found = Routing(self.probs[index], self.expert_index[index], self.expert_gate[index])
        schedule = self.schedule
        return found if schedule is None else found._replace(order=(schedule[index], found.expert_index))

    def blocks(self) -> list[Routing]:
        """The routings of all L blocks: what :meth:`block` returns for each, in less host time."""
        probs, index, gate = (part.unbind(0) for part in self[:3])
        if self.schedule is None:
            return [Routing(*block) for block in zip(probs, index, gate, strict=True)]
        orders = zip(self.schedule.unbind(0), index, strict=True)
        return [Routing(*block[:3], order=block[3]) for block in zip(probs, index, gate, orders, strict=True)]

    def scheduled(self, backend: str = "auto") -> Routing:
        """The same with the schedules of all blocks, made in one launch, where Triton kernels take them.

        Without them each expert operation makes its own. ``backend`` is that of the experts. One row, for all
        samples alike, needs none.
        """
        if self.expert_index.shape[-2] == 1 or not runs_triton(backend, self.expert_index.device):
            return self
        order = (dispatch(self.expert_index, self.probs.shape[-1]), self.expert_index)
        return self._replace(order=order)

    @property
    def schedule(self) -> Tensor | None:
        """The schedule, if there is one of this very ``expert_index``."""
        return self.order[0] if self.order is not None and self.order[1] is self.expert_index else None

    def selected(self) -> Tensor:
        """0/1 float32 ``[B, L*M]`` of a routing of L blocks: one where an expert is among the top k."""
        if self.probs.dim() != 3:
            raise ValueError(
                f"probs has shape {tuple(self.probs.shape)}; selected() is of all blocks [L, B, M]"
            )
        if self.kept is not None and self.kept[1] is self.expert_index:
            return self.kept[0]
        return selected_experts(self.probs, self.expert_index)


torch.serialization.add_safe_globals([Routing])  # for torch.load with weights_only


def backend_beside(experts: str) -> str:
    """The backend of a router whose experts have the backend ``experts``: it has no compiled kernels."""
    return "auto" if experts in ("native", "cuda") else experts


class Router(nn.Module):
    """The routers of L blocks in one module, for layers made with ``SwitchMoE(..., router=False)``.

    They run before the first block, so their parameters must not be a block's: FSDP and its like have the
    parameters of a module whole only in that module's own forward.

    Args:
        depth: blocks, L. hidden_size: D. num_experts: M. top_k: experts per sample, 1 to M.
        backend: of :func:`switch_moe.ops.timestep_gate`.

    Parameters: ``weight [L, M, D]`` and ``bias [L, M]``. Gates are computed in float32 always, so parameters
    in a half type only lose precision.

    Raises ``ValueError`` for a setting out of range.
    """

    def __init__(
        self, depth: int, hidden_size: int, num_experts: int = 3, top_k: int = 2, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        check_integers(depth=depth, hidden_size=hidden_size)
        check_top_k(top_k, num_experts)
        check_choice("backend", backend, BACKENDS)
        self.num_experts, self.top_k, self.backend = num_experts, top_k, backend
        self.weight = nn.Parameter(torch.empty(depth, num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(depth, num_experts))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Small random routers."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, embedding: Tensor, *, selected: bool = False) -> Routing:
        """The routing of all blocks for timestep embeddings ``[B, D]``.

        With ``selected`` the same launch writes what :meth:`Routing.selected` returns.
        """
        weight, bias = self.weight.float(), self.bias.float()
        outputs = timestep_gate(embedding, weight, bias, self.top_k, selected=selected, backend=self.backend)
        probs, index, gate = outputs[:3]
        return Routing(probs, index, gate, (outputs[3], index) if selected else None)

    def extra_repr(self) -> str:
        depth, num_experts, hidden_size = self.weight.shape
        return f"depth={depth}, hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}"


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Lets every router and mixture of experts in ``model`` choose ``top_k`` experts from now on.

    The best k of a trained model need not be that of its training: Zhao et al. (arXiv 2410.13964) find that
    harder tasks want more experts. Where gates are not renormalised, as in Switch-DiT, a larger k adds terms
    to the sum of the experts, a smaller one leaves some out, and the others stay what they are.

    Weights and a :class:`switch_moe.DiffusionPrior`, which is about training, keep what they have. Layers
    whose experts choose their tokens have no k.

    Raises ``ValueError`` or ``TypeError``, and changes nothing, where top_k is not between 1 and the number
    of experts of every layer, or where there is none.
    """
    # Those that have both as their own attributes; a model of diffusers has its config as attributes, too.
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if {"top_k", "num_experts"} <= vars(layer).keys()
        and not isinstance(layer, DiffusionPrior)
        and vars(layer).get("capacity") is None
    ]
    if not layers:
        raise ValueError(f"model is a {type(model).__name__} without a layer that chooses top_k experts")
    for layer in layers:
        check_top_k(top_k, layer.num_experts)
        settings = getattr(layer, "gate_settings", {"groups": 1, "top_groups": 1})
        check_groups(layer.num_experts, top_k, settings["groups"], settings["top_groups"])
    for layer in layers:
        layer.top_k = top_k
