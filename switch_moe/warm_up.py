"""Compiling kernels before they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .diffmoe import DiffMoE
from .layer import SwitchMoE
from .noise_moe import NoiseMoE
from .ops._checks import FLOATS, check_dtype, check_flags, check_integers
from .ops._operator import autocast_dtype
from .prior import DiffusionPrior
from .router import Router, Routing
from .token_moe import TokenMoE


def warm_up(
    module: nn.Module,
    shapes: Iterable[tuple[int, int]],
    *,
    dtype: torch.dtype | None = None,
    backward: bool = True,
) -> None:
    """Runs once whatever the layers of ``module`` will run for batches of these shapes.

    Triton compiles a kernel when it first runs, which takes a second or more, and which a CUDA graph's
    capture may not allow. Afterwards no such call compiles. Parameters, gradients and random numbers stay as
    they are; a layer is called on zeros, of which each shape needs a few tensors ``[B, T, D]`` for a moment.
    A layer that does something else in evaluation is warmed up for the mode that it is in.

    Args:
        module: a :class:`SwitchMoE`, :class:`TokenMoE`, :class:`Router` or :class:`DiffusionPrior`, or a
            model that holds them. Call it before the model is sharded.
        shapes: (B, T), the samples and the tokens of each, for every batch that will come.
        dtype: of the tokens; by default the type that autocast wants, or else that of a layer's parameters.
        backward: whether there will be gradients, too.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; it must be a torch.nn.Module")
    check_flags(backward=backward)
    sizes = []
    for shape in shapes:
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise ValueError(f"shapes holds {shape!r}; each must be (B, T), samples and tokens")
        check_integers(B=shape[0], T=shape[1])
        sizes.append((int(shape[0]), int(shape[1])))
    if dtype is not None:
        check_dtype("dtype", torch.empty(0, dtype=dtype, device="cpu"), *FLOATS)
    done = set()
    with torch.set_grad_enabled(backward):
        for layer in module.modules():
            of_parameters = [(p.shape, p.dtype, p.device, p.requires_grad) for p in layer.parameters()]
            key = f"{layer!r} {of_parameters}"
            if isinstance(layer, TokenMoE):
                key += f"{layer.pool} {layer.capacity_rounding} {layer.gate_settings} {layer.backend}"
            if key in done:
                continue  # a layer like this one ran
            if isinstance(layer, SwitchMoE):
                for batch, tokens in sizes:
                    _warm_layer(layer, batch, tokens, dtype)
            elif isinstance(layer, TokenMoE):
                for batch, tokens in sizes:
                    _warm_token_layer(layer, batch, tokens, dtype)
            elif isinstance(layer, Router):
                for batch in {1, *(batch for batch, _ in sizes)}:
                    _warm_router(layer, batch, dtype)
            elif isinstance(layer, DiffusionPrior):
                for batch in {batch for batch, _ in sizes}:
                    _warm_prior(layer, batch)
            done.add(key)


def _differentiate(loss: Tensor, leaves: list[Tensor]) -> None:
    """Takes gradients and throws them away."""
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if torch.is_grad_enabled() and leaves:
        torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)


def _warm_layer(layer: SwitchMoE, batch: int, tokens: int, dtype: torch.dtype | None) -> None:
    parameter = next(p for name, p in layer.named_parameters() if not name.startswith("router"))
    device = parameter.device
    dtype = dtype or autocast_dtype(device) or parameter.dtype
    x = torch.zeros(batch, tokens, layer.hidden_size, dtype=dtype, device=device, requires_grad=True)
    for rows in {1, batch}:  # all samples alike, and each for itself
        index = torch.arange(layer.top_k, dtype=torch.int32, device=device).repeat(rows, 1)
        gate = torch.zeros(rows, layer.top_k, device=device, requires_grad=True)
        probs = torch.zeros(rows, layer.num_experts, device=device)
        routing = Routing(probs, index, gate).scheduled(layer.backend)
        for modulate in (False, True):
            out = layer(x, routing=routing, modulate=modulate)
            _differentiate(out.sum(), [x, gate, *layer.parameters()])
    if layer.router is not None:
        _warm_router(layer.router, batch, dtype)


def _warm_token_layer(layer: TokenMoE, batch: int, tokens: int, dtype: torch.dtype | None) -> None:
    weight, device = layer.weight_in, layer.weight_in.device
    dtype = dtype or autocast_dtype(device) or weight.dtype
    x = torch.zeros(batch, tokens, layer.hidden_size, dtype=dtype, device=device, requires_grad=True)
    options: dict[str, Any] = {"observe": True} if isinstance(layer, DiffMoE) else {}  # thresholds stay
    if getattr(layer, "draws", False):
        options["noise"] = torch.zeros(batch, tokens, layer.num_experts, device=device)
    rows, size = {batch}, 0
    if isinstance(layer, NoiseMoE):
        rows, size = {1, batch}, layer.time_size  # samples of one noise level, and each for itself
    elif layer.router.time_weight is not None:
        size = layer.router.time_weight.shape[1]
    for count in rows:
        time = torch.zeros(count, size, device=device) if size else None
        out, losses, *_ = layer(x, time_embedding=time, with_losses=True, **options)
        for loss in (out.sum(), out.sum() + sum(losses.values())):  # with and without balance
            _differentiate(loss, [x, *layer.parameters()])


def _warm_router(router: Router, batch: int, dtype: torch.dtype | None) -> None:
    hidden_size, device = router.weight.shape[2], router.weight.device
    for of_embedding in {torch.float32, dtype or torch.float32}:
        embedding = torch.zeros(batch, hidden_size, dtype=of_embedding, device=device, requires_grad=True)
        for selected in (False, True):
            routing = router(embedding, selected=selected).scheduled(router.backend)
            of_experts, of_prior = routing.expert_gate.sum(), routing.probs.sum()
            for loss in (of_experts, of_prior, of_experts + of_prior):  # where gradients may come from
                _differentiate(loss, [embedding, *router.parameters()])


def _warm_prior(prior: DiffusionPrior, batch: int) -> None:
    device, slots = prior.table.device, prior.table.shape[1]
    probs = torch.zeros(batch, slots, device=device, requires_grad=True)
    t = torch.zeros(batch, dtype=torch.int64, device=device)
    _differentiate(prior.loss(probs, t, torch.arange(slots, device=device)), [probs])
