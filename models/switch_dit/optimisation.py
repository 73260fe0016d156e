"""Optimiser settings of a run: AdamW, learning rates, clipping, and float16 with a scaled loss.

Nothing here waits for a GPU, and a CUDA graph can capture a whole :class:`Optimisation` step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from switch_dit.weightings import UncertaintyWeighting
from switch_moe.ops._checks import check_choice, check_integers, check_numbers, check_positive, check_tensors

DECAYS = ("constant", "cosine", "inverse-sqrt")
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
UNCERTAINTY_LR = 0.025  # of UW's scales, as ANT trains them


def learning_rate(
    step: int, *, lr: float, steps: int, warmup: int = 0, decay: str = "cosine", plateau: int | None = None
) -> float:
    """The learning rate of step number ``step``, from 0.

    Linear warm-up, ``lr min(1, (step + 1) / warmup)``, times

    - ``constant``: 1.
    - ``cosine``: (1 + cos(pi step / steps)) / 2, to zero (arXiv 1608.03983, without restarts).
    - ``inverse-sqrt``: 1 / sqrt(max((step + 1) / plateau, 1)) (EDM2, arXiv 2312.02696, appendix B).

    Args:
        lr: the peak. steps: of the whole run. warmup: steps, 0 for none.
        plateau: steps before the inverse square root falls; by default the warm-up, and at least 1.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """
    check_choice("decay", decay, DECAYS)
    check_integers(0, step=step, warmup=warmup)
    check_integers(steps=steps)
    check_positive(lr=lr)
    rate = lr * min(1.0, (step + 1) / max(warmup, 1))
    if decay == "cosine":
        return rate * (0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)))
    if decay == "inverse-sqrt":
        plateau = max(warmup, 1) if plateau is None else plateau
        check_integers(plateau=plateau)
        return rate / math.sqrt(max((step + 1) / plateau, 1.0))
    return rate


def create_optimizer(
    parameters: Iterable[Tensor],
    lr: Tensor,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    uncertainty: UncertaintyWeighting | None = None,
) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101) over the parameters that are trained.

    Args:
        parameters: those without ``requires_grad`` are left out.
        lr: float32 ``[]`` on their device; fill it before each step with :func:`learning_rate`.
        weight_decay: 0 or more. betas: each in [0, 1).
        uncertainty: learned weights of the loss, which get their own constant rate of 0.025 and no decay.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """
    check_tensors(lr=lr)
    if lr.shape != () or lr.dtype != torch.float32:
        raise ValueError(f"lr is {lr.dtype} {tuple(lr.shape)}; it must be a float32 scalar")
    check_numbers(0, wanted="0 or more and finite", weight_decay=weight_decay)
    for beta in betas:
        check_numbers(0, math.nextafter(1, 0), "in [0, 1)", betas=beta)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("parameters has none with requires_grad; there must be something to train")
    groups: list[dict[str, Any]] = [{"params": trained}]
    if uncertainty is not None:
        groups.append({"params": list(uncertainty.parameters()), "lr": UNCERTAINTY_LR, "weight_decay": 0.0})
    on_gpu = trained[0].device.type == "cuda"
    return torch.optim.AdamW(
        groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True, capturable=on_gpu
    )


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor | None:
    """Scales all gradients so that their joint norm is at most ``max_norm``; the norm before, float32 ``[]``.

    0 clips nothing and returns None. A norm that is not finite makes gradients that are not finite: nothing
    here looks at it, for that would wait for a GPU.
    """
    check_numbers(0, wanted="0 for none, or a positive finite number", max_norm=max_norm)
    if max_norm == 0:
        return None
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)


class Optimisation:
    """Backward, clipping and step of one optimiser, with a scaled loss where products are in float16.

    float16 gradients below 6e-8 vanish, so the loss is multiplied by a factor that doubles every 2000 steps.
    A step whose gradients are not finite changes no weight and halves the factor (arXiv 1710.03740, section
    3.2); fused AdamW decides that on the device. float32 and bfloat16 need no factor and have none.

    The weights stay float32 in each case; run the model under ``torch.autocast`` with ``dtype``.

    Args:
        optimizer: from :func:`create_optimizer`. dtype: of the matrix products. max_norm: 0 for no clipping;
            the learned weights of the loss are not among what is clipped.
        scale: the first factor.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype = torch.float32,
        max_norm: float = 0.0,
        scale: float = 2.0**16,
    ) -> None:
        if dtype not in PRECISIONS:
            raise ValueError(
                f"dtype is {dtype}; it must be one of {', '.join(str(each) for each in PRECISIONS)}"
            )
        check_numbers(0, wanted="0 for none, or a positive finite number", max_norm=max_norm)
        check_positive(scale=scale)
        self.optimizer, self.dtype, self.max_norm = optimizer, dtype, max_norm
        device = optimizer.param_groups[0]["params"][0].device
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=dtype == torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss`` ``[]``, scaled in float16; more than once to accumulate."""
        self.scaler.scale(loss).backward()

    def step(self) -> Tensor | None:
        """Clips, changes the weights and forgets the gradients; the norm before clipping, if it clips.

        In a float16 step that is skipped the norm is not finite.
        """
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer.param_groups[0]["params"], self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, float]:
        """The scaling factor and how long it held, for JSON; empty but for float16. This waits for a GPU."""
        if not self.scaler.is_enabled():
            return {}
        state = self.scaler.state_dict()
        return {"scale": state["scale"], "growth_tracker": state["_growth_tracker"]}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Sets the factor of ``state_dict``, before the first step."""
        expected = {"scale", "growth_tracker"} if self.scaler.is_enabled() else set()
        if set(state) != expected:
            raise ValueError(
                f"state is {state}; with {self.dtype} it must hold {sorted(expected) or 'nothing'}"
            )
        if state:
            check_positive(scale=state["scale"])
            check_integers(0, growth_tracker=state["growth_tracker"])
            current = self.scaler.state_dict()
            self.scaler.load_state_dict(
                {**current, "scale": state["scale"], "_growth_tracker": state["growth_tracker"]}
            )
