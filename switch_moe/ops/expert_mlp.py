"""Two-layer experts with per-sample gates. Plain PyTorch in this version."""

from __future__ import annotations

import torch
from torch import Tensor

from switch_moe.ops._dispatch import check_dtype, check_expert_index, check_shape, choose
from switch_moe.reference.expert_mlp import expert_mlp as reference_expert_mlp


def expert_mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    expert_index: Tensor,
    expert_gate: Tensor,
    gated: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """``m(x_b) = sum_j gate_bj MLP_index_bj(x_b)``, gated per sample.

    Args:
        x: tokens, ``[B, T, D]``.
        weight_in: ``[M, D, H]``, with ``gated`` ``[M, D, 2H]``. bias_in: ``[M, H or 2H]``, or None.
        weight_out: ``[M, H, D]``. bias_out: ``[M, D]``, or None.
        expert_index: chosen experts, ``[B, k]`` int32 or int64. expert_gate: their gates, ``[B, k]`` float32.
        gated: SwiGLU, ``SiLU(a) * b`` of the two halves (arXiv 2002.05202), instead of GELU (tanh).
        backend: ``auto`` or ``reference``; both are plain PyTorch.

    Returns:
        ``[B, T, D]``, differentiable in all floating arguments.

    Raises:
        ValueError: a shape or index does not fit. TypeError: a type does not.
        RuntimeError: the named backend does not exist.
    """
    check_shape("x", x, ("B", "T", "D"))
    batch, _, size = x.shape
    check_shape("weight_in", weight_in, ("M", size, "2H" if gated else "H"))
    experts, _, width = weight_in.shape
    if gated and width % 2:
        raise ValueError(
            f"weight_in has shape {tuple(weight_in.shape)}; with gated its last size must be even"
        )
    check_shape("weight_out", weight_out, (experts, width // 2 if gated else width, size))
    if bias_in is not None:
        check_shape("bias_in", bias_in, (experts, width))
    if bias_out is not None:
        check_shape("bias_out", bias_out, (experts, size))
    check_shape("expert_index", expert_index, (batch, "k"))
    check_shape("expert_gate", expert_gate, tuple(expert_index.shape))
    check_dtype("expert_index", expert_index, torch.int32, torch.int64)
    choose("expert_mlp", backend, x.device, native_devices=())
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        check_expert_index(expert_index, experts)
    return reference_expert_mlp(x, weight_in, bias_in, weight_out, bias_out, expert_index, expert_gate, gated)
