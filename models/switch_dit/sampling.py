"""Sampling with diffusers' schedulers, for a model of the noise, of the velocity or of rectified flow.

DDIM and DDPM walk the respaced process (every kept timestep follows the one before it), so their coefficients
are those of the official code for any number of steps; DPM-Solver++ chooses its own timesteps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switch_dit.diffusion import GaussianDiffusion
from switch_dit.model import SwitchDiT
from switch_dit.objectives import DiffusionObjective, FlowObjective, Objective
from switch_moe.ops._checks import (
    FLOATS,
    check_choice,
    check_dtype,
    check_flags,
    check_integers,
    check_numbers,
    check_shape,
    check_tensors,
)

SCHEDULERS = ("ddim", "ddpm", "dpm-solver++", "euler")


def make_scheduler(
    name: str, objective: Objective, steps: int, clip: bool = False
) -> tuple[Any, Callable[[int], float]]:
    """A diffusers scheduler, and the trained timestep that its step number i stands for.

    With ``clip`` the predicted image is confined to [-1, 1] in each step, as pixels are and latents are not.
    """
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    )

    check_choice("scheduler", name, SCHEDULERS)
    if (name == "euler") != isinstance(objective, FlowObjective):
        wanted = "euler" if isinstance(objective, FlowObjective) else "ddim, ddpm or dpm-solver++"
        raise ValueError(f"scheduler is {name!r}; a model of {objective.name!r} takes {wanted}")
    if isinstance(objective, FlowObjective):
        check_integers(steps=steps)
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=objective.num_timesteps)
        # Times from 1, noise, towards 0 in even steps; the scheduler adds the 0, the image.
        times = np.linspace(1, 0, steps, endpoint=False)
        scheduler.set_timesteps(sigmas=times.tolist())
        of_model = objective.model_time(torch.from_numpy(times)).tolist()
        return scheduler, of_model.__getitem__
    diffusion, kind = objective.diffusion, {"eps": "epsilon", "v": "v_prediction"}[objective.name]
    respaced, kept = diffusion.respaced(steps)
    if name == "dpm-solver++" and steps >= diffusion.num_timesteps:
        raise ValueError(
            f"steps is {steps}; dpm-solver++ takes fewer than the {diffusion.num_timesteps} trained timesteps"
        )
    if name == "dpm-solver++":
        # variance_type stays None and the model's variance is dropped: learned_range would slice 3 channels.
        # Thresholding is dynamic; a largest value of 1 makes it a clip to [-1, 1].
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=diffusion.num_timesteps, trained_betas=diffusion.betas,
            algorithm_type="dpmsolver++", timestep_spacing="linspace", thresholding=clip,
            sample_max_value=1.0, prediction_type=kind,
        )  # fmt: skip
        scheduler.set_timesteps(steps)
        return scheduler, scheduler.timesteps.tolist().__getitem__
    settings = {
        "num_train_timesteps": steps, "trained_betas": respaced.betas, "clip_sample": clip,
        "prediction_type": kind,
    }  # fmt: skip
    if name == "ddim":
        scheduler = DDIMScheduler(**settings)
    else:
        variance = "learned_range" if objective.learn_sigma else "fixed_small"
        scheduler = DDPMScheduler(variance_type=variance, **settings)
    # The cosine schedule ends at abar = 2e-9; diffusers' float32 product of 1 - beta would round it to 0.
    scheduler.alphas_cumprod = torch.from_numpy(respaced.alphas_cumprod).float()
    scheduler.set_timesteps(steps)
    return scheduler, [kept.tolist()[step] for step in scheduler.timesteps.tolist()].__getitem__


@torch.no_grad()
def sample(
    model: SwitchDiT,
    process: Objective | GaussianDiffusion,
    labels: Tensor | None,
    *,
    count: int | None = None,
    steps: int = 250,
    scheduler: str | None = None,
    guidance: float = 1.5,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    batch_size: int = 250,
    clip: bool | None = None,
) -> Tensor:
    """Images (or latents) float32 [n, C, H, W] from noise, by the model in evaluation mode.

    Args:
        process: what the model predicts, its objective; a GaussianDiffusion stands for the noise in it.
        labels: int64 [n]; an unconditional model takes None, and ``count`` instead.
        steps: model evaluations (twice as many samples each where there is guidance); fewer than the trained
            timesteps for ``dpm-solver++``.
        scheduler: ``ddim`` (eta 0; None is that), ``ddpm`` (with the variance, if it is learned) or
            ``dpm-solver++``; for rectified flow ``euler``, which None is there.
        guidance: classifier-free scale; 1 is none.
        generator: the source of noise, on the CPU, for any device.
        start: the noise to begin with, [n, C, H, W], instead of drawing it.
        batch_size: samples at a time.
        clip: whether each step confines the predicted image to [-1, 1], as it must for pixels: the first
            steps of the cosine schedule divide by as little as 5e-5. None clips 1 and 3 channels (grey and
            colour) and no others, which are latents. ``euler`` confines nothing: it divides by nothing.

    Raises:
        ValueError, TypeError: an argument does not fit. FloatingPointError: a sample is not finite.
    """
    if not isinstance(model, SwitchDiT):
        raise TypeError(f"model is a {type(model).__name__}; it must be a SwitchDiT")
    if not isinstance(process, (Objective, GaussianDiffusion)):
        raise TypeError(
            f"process is a {type(process).__name__}; it must be an Objective or a GaussianDiffusion"
        )
    objective = process
    if isinstance(process, GaussianDiffusion):
        objective = DiffusionObjective(process, "eps", model.learn_sigma)
    if model.learn_sigma != getattr(objective, "learn_sigma", False):
        raise ValueError(
            f"process is an objective {objective.name!r} with another learn_sigma than the model's, "
            f"{model.learn_sigma}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator")
    if (labels is None) != (model.num_classes == 0):
        raise ValueError(f"labels is {labels}; the model has {model.num_classes} classes")
    if model.num_timesteps != objective.num_timesteps:
        raise ValueError(
            f"process has {objective.num_timesteps} timesteps; the model was made for {model.num_timesteps}"
        )
    check_integers(batch_size=batch_size)
    check_numbers(guidance=guidance)
    device = model.pos_embed.device
    if labels is not None:
        check_tensors(labels=labels)
        check_shape("labels", labels, ("n",))
        check_dtype("labels", labels, torch.int64, torch.int32)
        labels = labels.to(device)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes:
            raise ValueError(f"labels holds {labels.tolist()}; each must be in [0, {model.num_classes})")
    if labels is not None and guidance != 1 and model.y_embedder.dropout == 0:
        raise ValueError(
            f"guidance is {guidance}; a model trained with class_dropout_prob 0 has no null label, use 1"
        )
    if labels is None and count is None:
        raise ValueError("count is None; it must say how many samples, as there are no labels")
    if count is not None:
        check_integers(0, count=count)
    n = labels.shape[0] if labels is not None else int(count or 0)
    shape = (n, model.in_channels, model.input_size, model.input_size)
    if start is None:
        start = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    check_tensors(start=start)
    check_shape("start", start, shape)
    check_dtype("start", start, *FLOATS)
    if not bool(start.isfinite().all()):
        raise ValueError("start holds numbers that are not finite; it must be noise")
    x = start.to(device, torch.float32)
    if clip is None:
        clip = model.in_channels in (1, 3)
    check_flags(clip=clip)
    scheduler = scheduler or ("euler" if objective.continuous else "ddim")
    new_scheduler = functools.partial(make_scheduler, scheduler, objective, steps, clip)
    with torch.device("cpu"):  # diffusers makes its tables on the default device
        new_scheduler()  # settings that do not fit are refused before any work, and without samples too
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        parts = []
        for begin in range(0, n, batch_size):
            part = slice(begin, begin + batch_size)
            classes = None if labels is None else labels[part]
            with torch.device("cpu"):
                stepper = new_scheduler()
            parts.append(_sample_batch(model, x[part], classes, *stepper, scheduler, guidance, generator))
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(parts) if parts else x


def _sample_batch(
    model: SwitchDiT,
    x: Tensor,
    labels: Tensor | None,
    stepper: Any,
    trained_timestep: Callable[[int], float],
    scheduler: str,
    guidance: float,
    generator: torch.Generator | None,
) -> Tensor:
    n, device = len(x), x.device
    guided = labels is not None and guidance != 1
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)]) if guided else labels
    for number, step in enumerate(stepper.timesteps.tolist()):
        t = torch.full((1,), trained_timestep(number), device=device)  # of all samples
        if guided:
            out = model.forward_with_cfg(torch.cat([x, x]), t, both, guidance)[:n]
        else:
            out = model(x, t, labels)
        out = out.float()
        if scheduler != "ddpm":
            out = out[:, : model.in_channels]
        # DDIM with a clipped image takes the noise that this image implies, as the official code does.
        extra = {"use_clipped_model_output": True} if scheduler == "ddim" else {"generator": generator}
        with torch.device("cpu"):
            x = stepper.step(out, step, x, **extra).prev_sample
    if not bool(x.isfinite().all()):
        raise FloatingPointError("samples are not finite; the weights may be broken, or the schedule unfit")
    return x
