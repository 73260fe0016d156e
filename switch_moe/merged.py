"""The experts of one timestep as dense layers: what they cost while all samples share their routing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu.expert_linear import COMPILED_FROM
from .ops._backend import native_reason
from .ops._checks import check_flags, check_shape, check_tensors
from .ops._operator import autocast_dtype, cast, without_autocast
from .ops.expert_linear import expert_linear
from .ops.merge_experts import merge_experts
from .ops.routed_mlp import routed_mlp
from .routes import Routes
from .torch_compat import silu

# The same of the layers before the activation, which the compiled experts with a hidden layer fuse: .8 of the
# time at width 384 with 1024 tokens, 1.4 at width 128 with 64.
COMPILED_MLP_FROM = 2**29


class MergedExperts(NamedTuple):
    """``m(x)`` of one route, as :meth:`switch_moe.SwitchMoE.merge` makes it; call it with tokens.

    Linear experts are one matrix, ``m(x) = x weight + bias``. Experts with a hidden layer lie side by side in
    one wider layer, their gates multiplied into ``weight_out``: k experts of width H cost one of width k H.
    """

    weight: Tensor  # [D, D], or [D, k H] of a hidden layer; [D, 2 k H] for SwiGLU: all a, then all b
    bias: Tensor | None  # [D], [k H] or [2 k H]
    weight_out: Tensor | None = None  # [k H, D]
    bias_out: Tensor | None = None  # [D]
    gated: bool = False  # SwiGLU
    backend: str = "auto"

    def __call__(self, x: Tensor, modulate: bool = False) -> Tensor:
        """``m(x)``, or ``x * (1 + m(x))`` with ``modulate``, for tokens x ``[B, T, D]``.

        Raises ``ValueError`` or ``TypeError`` for an argument that does not fit.
        """
        check_tensors(x=x)
        check_flags(modulate=modulate)
        check_shape("x", x, ("B", "T", self.weight.shape[0]))
        x, weight, bias, weight_out, bias_out = cast(autocast_dtype(x.device), x, *self[:4])
        if weight_out is None and self._compiled(x, COMPILED_FROM):
            index = torch.zeros(1, 1, dtype=torch.int32)
            shift = None if bias is None else bias[None]
            return expert_linear(
                x, weight[None], shift, index, torch.ones(1, 1), modulate, backend=self.backend
            )
        with without_autocast(x.device):
            if weight_out is not None and x.dtype == torch.float32 and self._compiled(x, COMPILED_MLP_FROM):
                mixture = _compiled_mlp(x, weight, bias, weight_out, bias_out, self.gated)
            else:
                mixture = _linear(x, weight, bias)
                if weight_out is not None:
                    mixture = _linear(_activated(mixture, self.gated), weight_out, bias_out)
            return torch.addcmul(x, x, mixture) if modulate else mixture

    def _compiled(self, x: Tensor, least: int) -> bool:
        if self.backend == "native":
            return True
        takes = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float16)
        work = len(x.flatten(0, 1)) * self.weight.numel()
        return self.backend == "auto" and takes and work >= least and native_reason("cpu") is None

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self[:4] if tensor is not None)


def merge_linear(
    weight: Tensor, bias: Tensor | None, expert_index: Tensor, expert_gate: Tensor, backend: str
) -> list[MergedExperts]:
    """Linear experts of each route, arguments as in :func:`switch_moe.ops.merge_experts`.

    With ``cuda`` Triton merges: the CUDA kernels merge inside of a product only, and merged experts are one
    plain product.
    """
    backend = "triton" if backend == "cuda" else backend
    merged, shift = merge_experts(weight, bias, expert_index, expert_gate, backend=backend)
    shifts = [None] * len(merged) if shift is None else shift.unbind()
    return [MergedExperts(*pair, backend=backend) for pair in zip(merged.unbind(), shifts, strict=True)]


def merge_mlp(
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    expert_index: Tensor,
    expert_gate: Tensor,
    gated: bool,
) -> MergedExperts:
    """Experts with a hidden layer, arguments as in :func:`switch_moe.ops.expert_mlp`, of one route
    ``[1, k]``. The gates are multiplied in float32 at least, and the products rounded once.
    """
    chosen = expert_index[0].long()  # [k]
    gate = expert_gate[0]

    def beside(experts: Tensor | None) -> Tensor | None:
        """Of experts [M, .., W] the chosen ones side by side, [.., k W]; for SwiGLU all a, then all b."""
        if experts is None:
            return None
        halves = experts.index_select(0, chosen).chunk(2 if gated else 1, dim=-1)  # [k, .., H] each
        return torch.cat([half.movedim(0, -2).flatten(-2) for half in halves], dim=-1)

    def weighted(experts: Tensor) -> Tensor:
        taken = experts.index_select(0, chosen)
        return taken * gate.view(-1, *[1] * (taken.dim() - 1))

    merged_in = beside(weight_in)
    assert merged_in is not None
    out = weighted(weight_out).flatten(0, 1).to(weight_out.dtype)
    bias = None if bias_out is None else weighted(bias_out).sum(0).to(bias_out.dtype)
    return MergedExperts(merged_in, beside(bias_in), out, bias, gated)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight + bias`` for x ``[B, T, I]``, weight ``[I, O]``."""
    rows = x.reshape(-1, x.shape[2])
    out = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return out.view(*x.shape[:2], weight.shape[1])


def _compiled_mlp(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, gated: bool
) -> Tensor:
    """The only expert on all rows of x ``[B, T, D]``."""
    rows = x.flatten(0, 1)
    biases = [None if b is None else b[None] for b in (bias, bias_out)]
    out = routed_mlp(
        rows, weight[None], biases[0], weight_out[None], biases[1], Routes.to_one(rows),
        "swiglu" if gated else "gelu", backend="native",
    )  # fmt: skip
    return out.view_as(x)


def _activated(hidden: Tensor, gated: bool) -> Tensor:
    if not gated:
        return F.gelu(hidden, approximate="tanh")
    a, b = hidden.chunk(2, dim=-1)
    return silu(a) * b
