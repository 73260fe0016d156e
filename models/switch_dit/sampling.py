"""Sampling with diffusers' schedulers.

DDIM and DDPM walk the respaced process (every kept timestep follows the one before it), so their coefficients
are those of the official code for any number of steps; DPM-Solver++ chooses its own timesteps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from switch_dit.diffusion import GaussianDiffusion
from switch_dit.model import SwitchDiT

SCHEDULERS = ("ddim", "ddpm", "dpm-solver++")


def make_scheduler(
    name: str, diffusion: GaussianDiffusion, steps: int, learn_sigma: bool
) -> tuple[Any, dict[int, int]]:
    """A diffusers scheduler, and the trained timestep that each of its timesteps stands for.

    clip_sample is off: latents are not confined to [-1, 1].
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    if name not in SCHEDULERS:
        raise ValueError(f"scheduler is {name!r}; it must be one of {', '.join(SCHEDULERS)}")
    respaced, kept = diffusion.respaced(steps)
    trained_timestep = dict(enumerate(kept.tolist()))
    if name == "dpm-solver++":
        # variance_type stays None and the model's variance is dropped: learned_range would slice 3 channels.
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=diffusion.num_timesteps, trained_betas=diffusion.betas,
            algorithm_type="dpmsolver++", timestep_spacing="linspace",
        )  # fmt: skip
        trained_timestep = {t: t for t in range(diffusion.num_timesteps)}
    else:
        settings = {"num_train_timesteps": steps, "trained_betas": respaced.betas, "clip_sample": False}
        if name == "ddim":
            scheduler = DDIMScheduler(**settings)
        else:
            variance = "learned_range" if learn_sigma else "fixed_small"
            scheduler = DDPMScheduler(variance_type=variance, **settings)
        # The cosine schedule ends at abar = 2e-9; diffusers' float32 product of 1 - beta would round it to 0.
        scheduler.alphas_cumprod = torch.from_numpy(respaced.alphas_cumprod).float()
    scheduler.set_timesteps(steps)
    return scheduler, trained_timestep


@torch.no_grad()
def sample(
    model: SwitchDiT,
    diffusion: GaussianDiffusion,
    labels: Tensor | None,
    *,
    count: int | None = None,
    steps: int = 250,
    scheduler: str = "ddim",
    guidance: float = 1.5,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    batch_size: int = 250,
) -> Tensor:
    """Images (or latents) float32 [n, C, H, W] from noise.

    Args:
        labels: int64 [n] on the model's device; an unconditional model takes None, and ``count`` instead.
        steps: model evaluations (twice as many samples each where there is guidance).
        scheduler: ``ddim`` (eta 0), ``ddpm`` (with the learned variance) or ``dpm-solver++``.
        guidance: classifier-free scale; 1 is none.
        generator: the source of noise, on the CPU, for any device.
        start: the noise to begin with, [n, C, H, W], instead of drawing it.
        batch_size: samples at a time.
    """
    if (labels is None) != (model.num_classes == 0):
        raise ValueError(f"labels is {labels}; the model has {model.num_classes} classes")
    if (
        labels is not None
        and len(labels)
        and not 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes
    ):
        raise ValueError(f"labels holds {labels.tolist()}; each must be in [0, {model.num_classes})")
    if labels is not None and guidance != 1 and model.y_embedder.dropout == 0:
        raise ValueError(
            f"guidance is {guidance}; a model trained with class_dropout_prob 0 has no null label, use 1"
        )
    if labels is None and (count is None or count < 0):
        raise ValueError(f"count is {count}; it must say how many samples, as there are no labels")
    n = len(labels) if labels is not None else int(count or 0)
    shape = (n, model.in_channels, model.input_size, model.input_size)
    x = torch.randn(shape, generator=generator).to(model.pos_embed.device) if start is None else start
    parts = []
    for begin in range(0, n, batch_size):
        part = slice(begin, begin + batch_size)
        classes = None if labels is None else labels[part]
        parts.append(_sample_batch(model, diffusion, x[part], classes, steps, scheduler, guidance, generator))
    return torch.cat(parts) if parts else x


def _sample_batch(
    model: SwitchDiT,
    diffusion: GaussianDiffusion,
    x: Tensor,
    labels: Tensor | None,
    steps: int,
    scheduler: str,
    guidance: float,
    generator: torch.Generator | None,
) -> Tensor:
    n, device = len(x), x.device
    stepper, trained_timestep = make_scheduler(scheduler, diffusion, steps, model.learn_sigma)
    guided = labels is not None and guidance != 1
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)]) if guided else labels
    for step in stepper.timesteps.tolist():
        t = torch.full((2 * n if guided else n,), trained_timestep[step], device=device)
        if guided:
            out = model.forward_with_cfg(torch.cat([x, x]), t, both, guidance)[:n]
        else:
            out = model(x, t, labels)
        out = out.float()
        if scheduler != "ddpm":
            out = out[:, : model.in_channels]
        extra = {} if scheduler == "ddim" else {"generator": generator}
        x = stepper.step(out, step, x, **extra).prev_sample
    return x
