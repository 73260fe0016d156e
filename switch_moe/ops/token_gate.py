"""Routing by tokens: scores, choices, gates and what losses of balance need, in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..experts import TokenChoice
from ..reference.token_gate import gates, scores, sums
from ..reference.token_gate import token_gate as reference_token_gate
from ._backend import KERNEL_DTYPES, choose, operation
from ._checks import (
    FLOATS,
    check_choice,
    check_device,
    check_dtype,
    check_flags,
    check_integers,
    check_like,
    check_numbers,
    check_shape,
    check_tensors,
    check_top_k,
)
from ._gradient import create_graph, differentiable_gradients
from ._operator import contiguous, operator, without_autocast

SCORES = ("softmax", "sigmoid", "identity")

_OPERATION = operation("token_gate", triton=True)


class TokenGate(NamedTuple):
    """Who chose whom. C stands for ``capacity``, G for the pools, B / ``pool``."""

    probs: Tensor  # [B, T, M] float32, the scores of all experts
    chosen: Tensor  # int32: experts [B, T, k], best first; or tokens of a pool [G, M, C], in their order
    gate: Tensor  # float32, of the shape of chosen
    load: Tensor  # [M] float32, the pairs of each expert; no gradient
    importance: Tensor  # [M] float32, the sum of each expert's scores


def token_gate(
    logits: Tensor,
    top_k: int | None = None,
    *,
    capacity: int | None = None,
    pool: int = 1,
    sample_logits: Tensor | None = None,
    bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    score: str = "softmax",
    normalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    backend: str = "auto",
) -> TokenGate:
    """Tokens choose their ``top_k`` best experts, or each expert its ``capacity`` best tokens of a pool.

    Token choice is that of DiT-MoE (arXiv 2407.11633), expert choice that of EC-DIT (arXiv 2410.02098).
    Computed in float32 whatever autocast says, float64 logits in float64 by the reference. The lowest index
    wins a tie, and NaN comes first.

    Args:
        logits: of the router for every token, ``[B, T, M]`` of any floating type.
        top_k: experts for each token, 1 to M. capacity: tokens for each expert, 1 to ``pool * T``. Exactly
            one of the two.
        pool: neighbouring samples among whose tokens an expert chooses; it divides B, and is B for the whole
            batch. Only with ``capacity``.
        sample_logits: ``[B, M]``, added to the logits of all tokens of a sample: what a router makes of the
            timestep.
        bias: ``[M]``, added to all logits.
        selection_bias: ``[M]``, added to the scores for the choice alone (arXiv 2408.15664); no gradient.
        score: ``softmax`` over the experts, ``sigmoid`` or ``identity``.
        normalise: whether the gates of a token are divided by their sum.
        scale: factor of all gates, after that.
        groups: experts form this many groups of neighbours, and a token chooses within its ``top_groups``
            best (arXiv 2412.19437). Only with ``top_k``.
        backend: ``auto``, ``triton`` or ``reference``, which is plain PyTorch.

    Returns:
        A :class:`TokenGate`, differentiable from ``probs``, ``gate`` and ``importance``. Nothing waits for
        the device.

    Raises:
        ValueError: a shape, device or setting does not fit. TypeError: a type does not.
        RuntimeError: the named backend cannot run here.
    """
    check_tensors(logits=logits)
    check_shape("logits", logits, ("B", "T", "M"))
    check_integers(pool=pool)
    if (top_k is None) == (capacity is None):
        given = "neither" if top_k is None else "both"
        raise ValueError(f"top_k and capacity: {given} given; it must be exactly one of them")
    check_flags(normalise=normalise)
    check_numbers(scale=scale)
    quota = capacity if top_k is None else top_k
    assert quota is not None
    choice = TokenChoice(quota, top_k is None, score, pool, normalise, 1.0 * scale, groups, top_groups)
    tensors = logits, sample_logits, bias, selection_bias
    for name, tensor in zip(("sample_logits", "bias", "selection_bias"), tensors[1:], strict=True):
        if tensor is not None:
            check_tensors(**{name: tensor})
    _check(*tensors, choice)
    if backend == "triton":
        check_dtype("logits", logits, *KERNEL_DTYPES)
    path = choose(_OPERATION, backend, logits)
    if path == "reference" or logits.dtype == torch.float64:
        with without_autocast(logits.device):
            probs, chosen, gate = reference_token_gate(*tensors, choice)
            return TokenGate(probs, chosen, gate, *sums(probs, chosen, choice.by_expert))
    return TokenGate(*_TokenGate.apply(*tensors, *choice))


def _check(
    logits: Tensor, sample_logits: Tensor | None, bias: Tensor | None, selection_bias: Tensor | None,
    choice: TokenChoice,
) -> None:  # fmt: skip
    """What needs no values; the operators check it again for a direct call."""
    check_shape("logits", logits, ("B", "T", "M"))
    check_dtype("logits", logits, *FLOATS)
    batch, tokens, num_experts = logits.shape
    for name, tensor, shape in (
        ("sample_logits", sample_logits, (batch, num_experts)),
        ("bias", bias, (num_experts,)),
        ("selection_bias", selection_bias, (num_experts,)),
    ):
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_dtype(name, tensor, *FLOATS)
            check_device(name, tensor, logits.device)
    check_choice("score", choice.score, SCORES)
    pool, groups = choice.pool, choice.groups
    if not choice.by_expert:
        check_top_k(choice.quota, num_experts)
        if pool != 1:
            raise ValueError(f"pool is {pool}; it must be 1 with top_k, where each token chooses for itself")
        check_groups(num_experts, choice.quota, groups, choice.top_groups)
        return
    check_integers(1, num_experts=num_experts)
    check_integers(1, pool * tokens, capacity=choice.quota)
    if batch % pool:
        raise ValueError(f"pool is {pool}; it must divide the number of samples, {batch}")
    if (groups, choice.top_groups) != (1, 1):
        raise ValueError(
            f"groups and top_groups are {groups} and {choice.top_groups}; they must be 1 with capacity, "
            "where experts choose"
        )


def check_groups(num_experts: int, top_k: int, groups: int, top_groups: int) -> None:
    check_integers(1, num_experts, groups=groups)
    check_integers(1, groups, top_groups=top_groups)
    if num_experts % groups:
        raise ValueError(f"groups is {groups}; it must divide the number of experts, {num_experts}")
    if top_k > top_groups * num_experts // groups:
        raise ValueError(
            f"top_k is {top_k}; {top_groups} groups have {top_groups * num_experts // groups} experts"
        )


class _TokenGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        probs, chosen, gate, totals, places = _forward(logits, *arguments)
        load, importance = totals
        sample_logits, bias, _, *settings = arguments
        ctx.choice = TokenChoice(*settings)
        ctx.save_for_backward(logits, sample_logits, bias, probs, chosen, places)
        ctx.mark_non_differentiable(chosen, load)
        ctx.set_materialize_grads(False)
        return probs, chosen, gate, load, importance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_probs, _, grad_gate, _, grad_importance = grads
        given = grad_probs, grad_gate, grad_importance
        absent: tuple[None, ...] = (None,) * (1 + len(ctx.choice))
        if all(grad is None for grad in given):
            return (None, None, None, *absent)
        *inputs, probs, chosen, places = ctx.saved_tensors
        if create_graph():

            def function(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
                sample_logits, bias = others
                found = scores(logits, sample_logits, bias, ctx.choice.score)
                return found, gates(found, chosen, ctx.choice), found.sum((0, 1))

            wanted = ctx.needs_input_grad[:3]
            return (*differentiable_gradients(function, inputs, given, wanted), *absent)
        logits, sample_logits, bias = inputs
        wanted = [ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        grad_logits, grad_sample, grad_bias = _backward(
            *given, logits, probs, chosen, places, wanted, *ctx.choice
        )
        return (
            grad_logits,
            grad_sample.to(sample_logits.dtype) if wanted[0] else None,
            grad_bias.to(bias.dtype) if wanted[1] else None,
            *absent,
        )


def _fake_forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    sample_logits, bias, selection_bias, *settings = arguments
    choice = TokenChoice(*settings)
    _check(logits, sample_logits, bias, selection_bias, choice)
    return choice.empty_outputs(logits)


@operator("token_gate", fake=_fake_forward, autocast=0)
def _forward(
    logits: Tensor, sample_logits: Tensor | None, bias: Tensor | None, selection_bias: Tensor | None,
    quota: int, by_expert: bool, score: str, pool: int, normalise: bool, scale: float, groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores, choices, gates, load and importance in one tensor, and places, by the Triton kernels."""
    from ..kernels import token_gate as kernels

    choice = TokenChoice(quota, by_expert, score, pool, normalise, scale, groups, top_groups)
    tensors = logits, sample_logits, bias, selection_bias
    _check(*tensors, choice)
    logits, sample_logits, bias, selection_bias = contiguous(*tensors, aligned=True)
    return kernels.forward(logits, sample_logits, bias, selection_bias, choice)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits, probs, wanted = arguments[3], arguments[4], arguments[7]
    batch, _, num_experts = logits.shape
    return (
        torch.empty(logits.shape, dtype=logits.dtype, device=logits.device),
        probs.new_empty((batch, num_experts) if wanted[0] else 0),
        probs.new_empty(num_experts if wanted[1] else 0),
    )


@operator("token_gate_backward", fake=_fake_backward, autocast=0)
def _backward(
    grad_probs: Tensor | None, grad_gate: Tensor | None, grad_importance: Tensor | None, logits: Tensor,
    probs: Tensor, chosen: Tensor, places: Tensor, wanted: list[bool], quota: int, by_expert: bool,
    score: str, pool: int, normalise: bool, scale: float, groups: int, top_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of logits, sample_logits and bias, the last two in float32, and empty where not wanted."""
    from ..kernels import token_gate as kernels

    choice = TokenChoice(quota, by_expert, score, pool, normalise, scale, groups, top_groups)
    _check(logits, None, None, None, choice)
    batch, tokens, num_experts = logits.shape
    check_shape("probs", probs, (batch, tokens, num_experts))
    check_dtype("probs", probs, torch.float32)
    of_choice = choice.chosen_shape(logits)
    check_like("chosen", chosen, probs.new_empty(0, dtype=torch.int32), of_choice)
    check_like("places", places, chosen, (num_experts, batch * tokens) if by_expert else (0,))
    for name, grad, shape in (
        ("grad_probs", grad_probs, (batch, tokens, num_experts)),
        ("grad_gate", grad_gate, of_choice),
        ("grad_importance", grad_importance, (num_experts,)),
    ):
        if grad is not None:
            check_like(name, grad, probs, shape)
    given = grad_probs, grad_gate, grad_importance, logits, probs, chosen, places
    *grads, logits, probs, chosen, places = contiguous(*given, aligned=True)
    return kernels.backward(grads, logits, probs, chosen, places, wanted, choice)


torch.serialization.add_safe_globals([TokenGate])  # for torch.load with weights_only
