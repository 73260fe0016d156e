"""The diffusion prior loss in Triton: value and gradient in one pass over the probabilities."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch


@triton.jit(do_not_specialize=["batch", "timesteps"])
def _divergence_kernel(
    probs_ptr, table_ptr, t_ptr, assignment_ptr, loss_ptr, grad_ptr, batch, timesteps,
    S: tl.constexpr, DEPTH: tl.constexpr, ACTIVE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """With q = p / DEPTH, u = U[t, assignment] / ACTIVE, m = (q + u) / 2 and a = 1e-6:

        loss  = 1/2 sum q log((q + a) / (m + a)) + u log((u + a) / (m + a))
        dp    = 1/2 (log((q + a) / (m + a)) + q / (q + a) - m / (m + a)) / (DEPTH B)

    Inputs are p [B, S], U [N, S], t [B] and assignment [S]; outputs are the loss [B] and dp [B, S]. A program
    owns one sample: it reads its probabilities and its row of the table, and writes its loss and the gradient
    of the mean over the batch. Timesteps and columns out of range are clamped, so all reads are in the table.
    """
    b = tl.program_id(0).to(tl.int64)
    t = tl.minimum(tl.maximum(tl.load(t_ptr + b), 0), timesteps - 1).to(tl.int64)
    total = tl.zeros([BLOCK_S], tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = s < S
        column = tl.minimum(tl.maximum(tl.load(assignment_ptr + s, mask=mask, other=0), 0), S - 1)
        q = tl.load(probs_ptr + b * S + s, mask=mask, other=0.0).to(tl.float32) / DEPTH
        u = tl.load(table_ptr + t * S + column, mask=mask, other=0.0).to(tl.float32) / ACTIVE
        middle = (q + u) / 2
        log_q = tl.log((q + 1e-6) / (middle + 1e-6))
        log_u = tl.log((u + 1e-6) / (middle + 1e-6))
        total += tl.where(mask, q * log_q + u * log_u, 0.0)
        slope = log_q + q / (q + 1e-6) - middle / (middle + 1e-6)
        tl.store(grad_ptr + b * S + s, slope / (2.0 * DEPTH * batch), mask=mask)
    tl.store(loss_ptr + b, tl.sum(total, 0) / 2)


def forward(
    probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor, depth: int, active: int
) -> tuple[Tensor, Tensor]:
    """The mean over the batch, in a fixed order, and its gradient [B, S] in float32."""
    batch, slots = probs.shape
    losses = probs.new_empty(batch, dtype=torch.float32)
    grad = probs.new_empty(batch, slots, dtype=torch.float32)
    block = min(1024, triton.next_power_of_2(slots))
    launch(
        _divergence_kernel, batch, probs, table, t, assignment, losses, grad, batch, table.shape[0],
        S=slots, DEPTH=depth, ACTIVE=active, BLOCK_S=block, num_warps=1 if block <= 256 else 4, num_stages=1,
    )  # fmt: skip
    return losses.mean(), grad
