"""Generic mixture-of-experts libraries, where they are installed, behind the signatures of our operations.

Written against the sources of shawntan/scattermoe (commit 2d15f31) and Dao-AILab/quack (commit 0555417) and
never run against them: neither was at hand, and both need a GPU. The report checks them before it times them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import Groups, activation, grouped_linear, grouped_mlp


class Peer(NamedTuple):
    """A library; ``linear`` and ``mlp`` have the arguments of expert_linear and expert_mlp."""

    name: str
    linear: Callable[..., Tensor]
    mlp: Callable[..., Tensor]


@cache
def peers() -> tuple[list[Peer], dict[str, str]]:
    """The libraries that can be imported, and why each of the others cannot."""
    found, missing = [], {}
    for name, load in (("ScatterMoE", _scattermoe), ("QuACK", _quack)):
        try:
            found.append(load())
        except Exception as error:  # noqa: PERF203 - an import fails in any way, and must not end the report
            missing[name] = f"not importable: {type(error).__name__}: {error}"
    return found, missing


def _scattermoe() -> Peer:
    """``parallel_linear`` over tokens, whose order comes from a sort of samples: cheaper than its own."""
    from scattermoe.parallel_experts import parallel_linear

    def schedule(x: Tensor, index: Tensor, gate: Tensor, experts: int) -> tuple[dict[str, Tensor], Tensor]:
        batch, tokens, _ = x.shape
        top_k = index.shape[1]
        groups = Groups(index, experts, tokens)
        token = torch.arange(tokens, device=x.device)
        sample, slot = groups.order[:, None] // top_k, groups.order[:, None] % top_k
        order = {
            "sorted_expert_idxs": groups.expert[:, None].expand(-1, tokens).flatten(),
            "sorted_scattered_idxs": ((sample * tokens + token) * top_k + slot).flatten(),
            "expert_offsets": groups.ends.long(),
        }
        return order, gate.to(x.dtype)[:, None].expand(batch, tokens, top_k).flatten(0, 1)

    def linear(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        order, gates = schedule(x, index, gate, weight.shape[0])
        top_k = index.shape[1]
        out = parallel_linear(x.flatten(0, 1), weight, top_k, **order, expert_biases=bias, gates=gates)
        return out.unflatten(0, x.shape[:2])

    def mlp(
        x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor,
        index: Tensor, gate: Tensor, gated: bool,
    ) -> Tensor:  # fmt: skip
        order, gates = schedule(x, index, gate, weight_in.shape[0])
        hidden = parallel_linear(
            x.flatten(0, 1), weight_in, index.shape[1], **order, expert_biases=bias_in, grouped_out=True
        )
        out = parallel_linear(
            activation(hidden, gated), weight_out, 1, **order, expert_biases=bias_out, grouped_in=True,
            gates=gates,
        )  # fmt: skip
        return out.unflatten(0, x.shape[:2])

    return Peer("ScatterMoE", linear, mlp)


def _quack() -> Peer:
    """QuACK has no mixture of its own: its grouped products between our gather and combine, its default tiles
    (tuning compiles dozens of kernels for a shape), the gather not fused into the product.
    """
    from quack.gemm_interface import gemm

    class GroupedProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
            starts = F.pad(ends, (1, 0))  # [M+1]
            ctx.save_for_backward(rows, weight, starts)
            return gemm(rows, weight, cu_seqlens_m=starts, tuned=False)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
            rows, weight, starts = ctx.saved_tensors
            grad = grad.contiguous()
            grad_rows = gemm(grad, weight.mT, cu_seqlens_m=starts, tuned=False)
            return grad_rows, gemm(rows.T, grad, cu_seqlens_k=starts, tuned=False), None

    product = GroupedProduct.apply
    return Peer("QuACK", partial(grouped_linear, product=product), partial(grouped_mlp, product=product))
