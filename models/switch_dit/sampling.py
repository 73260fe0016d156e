"""Sampling with diffusers' schedulers.

DDIM and DDPM walk the respaced process (every kept timestep follows the one before it), so their coefficients
are those of the official code for any number of steps; DPM-Solver++ chooses its own timesteps. A flow goes
from t = 1, noise, to t = 0 in even steps.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switch_dit.diffusion import GaussianDiffusion
from switch_dit.model import SwitchDiT
from switch_dit.objectives import DiffusionObjective, FlowObjective, Objective
from switch_moe.ops._checks import (
    FLOATS,
    check_dtype,
    check_flags,
    check_integers,
    check_numbers,
    check_shape,
    check_tensors,
)

SCHEDULERS = {
    "eps": ("ddim", "ddpm", "dpm-solver++"),
    "v": ("ddim", "ddpm", "dpm-solver++"),
    "flow": ("euler", "dpm-solver++"),
}
"""The schedulers that fit each objective; the first is the default."""


def make_scheduler(name: str, objective: Objective, steps: int, clip: bool = False) -> tuple[Any, Tensor]:
    """A diffusers scheduler, and the time ``[steps]`` that the model takes at each of its steps.

    With ``clip`` the predicted image is confined to [-1, 1] in each step, as pixels are and latents are not;
    Euler's scheduler cannot do that by itself.
    """
    fitting = SCHEDULERS[objective.name]
    if name not in fitting:
        raise ValueError(f"scheduler is {name!r}; {objective.name} takes {', '.join(fitting)}")
    if isinstance(objective, FlowObjective):
        return _flow_scheduler(name, objective, steps, clip)
    assert isinstance(objective, DiffusionObjective)
    return _diffusion_scheduler(name, objective, steps, clip)


def _diffusion_scheduler(
    name: str, objective: DiffusionObjective, steps: int, clip: bool
) -> tuple[Any, Tensor]:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    diffusion = objective.diffusion
    respaced, kept = diffusion.respaced(steps)
    if name == "dpm-solver++" and steps >= diffusion.num_timesteps:
        raise ValueError(
            f"steps is {steps}; dpm-solver++ takes fewer than the {diffusion.num_timesteps} trained timesteps"
        )
    # diffusers' velocity has the sign of ours: sqrt(abar) noise - sqrt(1 - abar) x_start.
    prediction = {"eps": "epsilon", "v": "v_prediction"}[objective.name]
    if name == "dpm-solver++":
        # variance_type stays None and the model's variance is dropped: learned_range would slice 3 channels.
        # Thresholding is dynamic; a largest value of 1 makes it a clip to [-1, 1].
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=diffusion.num_timesteps, trained_betas=diffusion.betas,
            prediction_type=prediction, algorithm_type="dpmsolver++", timestep_spacing="linspace",
            thresholding=clip, sample_max_value=1.0,
        )  # fmt: skip
        scheduler.set_timesteps(steps)
        return scheduler, scheduler.timesteps
    settings = {
        "num_train_timesteps": steps, "trained_betas": respaced.betas, "prediction_type": prediction,
        "clip_sample": clip,
    }  # fmt: skip
    if name == "ddim":
        scheduler = DDIMScheduler(**settings)
    else:
        variance = "learned_range" if objective.learn_sigma else "fixed_small"
        scheduler = DDPMScheduler(variance_type=variance, **settings)
    # The cosine schedule ends at abar = 2e-9; diffusers' float32 product of 1 - beta would round it to 0.
    scheduler.alphas_cumprod = torch.from_numpy(respaced.alphas_cumprod).float()
    scheduler.set_timesteps(steps)
    return scheduler, kept[scheduler.timesteps]


def _flow_scheduler(name: str, objective: FlowObjective, steps: int, clip: bool) -> tuple[Any, Tensor]:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    check_integers(steps=steps)
    t = torch.from_numpy(np.linspace(1, 0, steps, endpoint=False)).float()
    if name == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=objective.num_timesteps)
    else:
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=objective.num_timesteps, prediction_type="flow_prediction",
            use_flow_sigmas=True, algorithm_type="dpmsolver++", thresholding=clip, sample_max_value=1.0,
        )  # fmt: skip
    scheduler.set_timesteps(steps)
    # By default Euler's last step would be 1 / N, and DPM-Solver++ would begin at t = 1 - 1 / N. Its error on
    # a Gaussian in 320 steps is 6e-5 with these times, 4e-4 with its own.
    scheduler.sigmas = torch.cat([t, torch.zeros(1)])
    return scheduler, objective.model_time(t)


@torch.no_grad()
def sample(
    model: SwitchDiT,
    objective: Objective,
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
        objective: what the model was trained for, see :func:`switch_dit.objectives.create_objective`.
        labels: int64 [n]; an unconditional model takes None, and ``count`` instead.
        steps: model evaluations (twice as many samples each where there is guidance); fewer than the trained
            timesteps for ``dpm-solver++``, but any number for a flow.
        scheduler: ``ddim`` (eta 0), ``ddpm`` (with the learned variance, if there is one) or
            ``dpm-solver++``; for a flow ``euler`` or ``dpm-solver++``. None takes the first of them.
        guidance: classifier-free scale; 1 is none.
        generator: the source of noise, on the CPU, for any device.
        start: the noise to begin with, [n, C, H, W], instead of drawing it.
        batch_size: samples at a time.
        clip: whether each step confines the predicted image to [-1, 1], as it must for pixels: the first
            steps of the cosine schedule divide by as little as 5e-5. None clips 1 and 3 channels (grey and
            colour) and no others, which are latents.

    Raises:
        ValueError, TypeError: an argument does not fit. FloatingPointError: a sample is not finite.
    """
    if not isinstance(model, SwitchDiT):
        raise TypeError(f"model is a {type(model).__name__}; it must be a SwitchDiT")
    if isinstance(objective, GaussianDiffusion):
        raise TypeError(
            "objective is a GaussianDiffusion; it must be an Objective, for the noise "
            f"DiffusionObjective(diffusion, 'eps', learn_sigma={model.learn_sigma})"
        )
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is a {type(objective).__name__}; it must be an Objective")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator")
    if (labels is None) != (model.num_classes == 0):
        raise ValueError(f"labels is {labels}; the model has {model.num_classes} classes")
    for name in ("num_timesteps", "learn_sigma"):
        given, wanted = getattr(objective, name), getattr(model, name)
        if given != wanted:
            raise ValueError(f"objective has {name} {given}; it must be {wanted}, the model's")
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
    if scheduler is None:
        scheduler = SCHEDULERS[objective.name][0]
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
            parts.append(
                _sample_batch(model, x[part], classes, *stepper, scheduler, guidance, generator, clip)
            )
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(parts) if parts else x


def _sample_batch(
    model: SwitchDiT,
    x: Tensor,
    labels: Tensor | None,
    stepper: Any,
    times: Tensor,
    scheduler: str,
    guidance: float,
    generator: torch.Generator | None,
    clip: bool,
) -> Tensor:
    n = len(x)
    guided = labels is not None and guidance != 1
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)]) if guided else labels
    # DDIM with a clipped image takes the noise that this image implies, as the official code does.
    extra: dict[str, Any] = {"generator": generator}
    if scheduler == "ddim":
        extra = {"use_clipped_model_output": True}
    steps = zip(stepper.timesteps.tolist(), times.to(x.device).split(1), strict=True)
    for number, (step, t) in enumerate(steps):  # t [1], of all samples
        if guided:
            out = model.forward_with_cfg(torch.cat([x, x]), t, both, guidance)[:n]
        else:
            out = model(x, t, labels)
        out = out.float()
        if scheduler != "ddpm":
            out = out[:, : model.in_channels]
        if scheduler == "euler" and clip:
            out = _clipped_velocity(out, x, float(stepper.sigmas[number]))
        with torch.device("cpu"):
            x = stepper.step(out, step, x, **extra).prev_sample
    if not bool(x.isfinite().all()):
        raise FloatingPointError("samples are not finite; the weights may be broken, or the schedule unfit")
    return x


def _clipped_velocity(velocity: Tensor, x_t: Tensor, t: float) -> Tensor:
    """The velocity of rectified flow from x_t to its predicted image, confined to [-1, 1], for t > 0."""
    return (x_t - (x_t - t * velocity).clamp(-1, 1)) / t
