"""diffusers' schedulers, set up for an objective, and the steps that they take.

DDIM and DDPM walk the respaced process (every kept timestep follows the one before it), so their coefficients
are those of the official code for any number of steps; DPM-Solver++ and UniPC choose their own timesteps. A
flow goes from t = 1, noise, to t = 0 in even steps.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from switch_dit.diffusion import GaussianDiffusion
from switch_dit.objectives import DiffusionObjective, FlowObjective, Objective
from switch_moe.ops._checks import check_integers

SCHEDULERS = {
    "eps": ("ddim", "ddpm", "dpm-solver++", "unipc"),
    "v": ("ddim", "ddpm", "dpm-solver++", "unipc"),
    "flow": ("euler", "dpm-solver++", "unipc"),
}
"""The schedulers that fit each objective; the first is the default."""
_NAMES = {"DPMSolverMultistepScheduler": "dpm-solver++", "UniPCMultistepScheduler": "unipc"}


class Walk(NamedTuple):
    """The steps of a schedule."""

    scheduler: Any  # ready for the first step
    timesteps: list[Any]  # [S] what its step() takes
    times: Tensor  # [S] what the model takes


def create_scheduler(name: str, objective: Objective, clip: bool = False) -> Any:
    """A diffusers scheduler for models of an objective, as a pipeline keeps it.

    With ``clip`` the predicted image is confined to [-1, 1] in each step, as pixels are and latents are not;
    Euler's scheduler has no such setting.
    """
    fitting = SCHEDULERS[objective.name]
    if name not in fitting:
        raise ValueError(f"scheduler is {name!r}; {objective.name} takes {', '.join(fitting)}")
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    settings: dict[str, Any] = {"num_train_timesteps": objective.num_timesteps}
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(**settings)
    if isinstance(objective, FlowObjective):
        settings |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    else:
        assert isinstance(objective, DiffusionObjective)
        # diffusers' velocity has the sign of ours: sqrt(abar) noise - sqrt(1 - abar) x_start.
        settings["prediction_type"] = {"eps": "epsilon", "v": "v_prediction"}[objective.name]
        settings["trained_betas"] = objective.diffusion.betas.tolist()
    if name == "ddim":
        return DDIMScheduler(**settings, clip_sample=clip)
    if name == "ddpm":
        variance = "learned_range" if objective.learn_sigma else "fixed_small"
        return DDPMScheduler(**settings, variance_type=variance, clip_sample=clip)
    # Thresholding is dynamic; a largest value of 1 makes it a clip to [-1, 1].
    settings |= {"timestep_spacing": "linspace", "thresholding": clip, "sample_max_value": 1.0}
    if name == "unipc":
        return UniPCMultistepScheduler(**settings)
    # variance_type stays None and the model's variance is dropped: learned_range would slice 3 channels.
    return DPMSolverMultistepScheduler(**settings, algorithm_type="dpmsolver++")


def objective_of(scheduler: Any, learn_sigma: bool) -> Objective:
    """What a model predicts by the settings of its scheduler; ``ValueError`` where that is unknown."""
    config = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return FlowObjective(config.num_train_timesteps)
    name = {"epsilon": "eps", "v_prediction": "v"}.get(config.get("prediction_type"))
    if name is None:
        raise ValueError(
            f"scheduler has prediction_type {config.get('prediction_type')!r}; it must be 'epsilon', "
            "'v_prediction' or that of a flow"
        )
    betas = scheduler.betas.double().numpy() if config.trained_betas is None else config.trained_betas
    return DiffusionObjective(GaussianDiffusion(betas=betas), name, learn_sigma)


def walk(scheduler: Any, steps: int) -> Walk:
    """The schedule of ``steps`` model evaluations of any diffusers scheduler, which stays as it is.

    ``ValueError`` for a number of steps that the scheduler cannot take.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    if isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
        return _respaced(scheduler, steps)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.get("use_flow_sigmas"):
        return _flow(scheduler, steps)
    check_integers(steps=steps)
    trained = config.num_train_timesteps
    if steps >= trained:
        name = _NAMES.get(type(scheduler).__name__, type(scheduler).__name__)
        raise ValueError(f"steps is {steps}; {name} takes fewer than the {trained} trained timesteps")
    stepper = copy.deepcopy(scheduler)
    stepper.set_timesteps(steps)
    return Walk(stepper, stepper.timesteps.tolist(), stepper.timesteps)


def _respaced(scheduler: Any, steps: int) -> Walk:
    betas = scheduler.config.trained_betas
    process = GaussianDiffusion(betas=scheduler.betas.double().numpy() if betas is None else betas)
    respaced, kept = process.respaced(steps)
    settings = {"num_train_timesteps": steps, "trained_betas": respaced.betas.tolist()}
    stepper = type(scheduler).from_config(scheduler.config, **settings)
    # The cosine schedule ends at abar = 2e-9; diffusers' float32 product of 1 - beta would round it to 0.
    stepper.alphas_cumprod = torch.from_numpy(respaced.alphas_cumprod).float()
    stepper.set_timesteps(steps)
    return Walk(stepper, stepper.timesteps.tolist(), kept[stepper.timesteps])


def _flow(scheduler: Any, steps: int) -> Walk:
    check_integers(steps=steps)
    stepper = copy.deepcopy(scheduler)
    stepper.set_timesteps(steps)
    t = np.linspace(1, 0, steps, endpoint=False)
    shift = stepper.config.get("flow_shift", stepper.config.get("shift", 1.0))
    times = torch.from_numpy(shift * t / (1 + (shift - 1) * t)).float()
    # By default Euler's last step would be 1 / N, and DPM-Solver++ would begin at t = 1 - 1 / N. Its error on
    # a Gaussian in 320 steps is 6e-5 with these times, 4e-4 with its own.
    stepper.sigmas = torch.cat([times, torch.zeros(1)])
    stepper.set_begin_index(0)  # else it looks for its first timestep, which occurs twice in many steps
    model_times = FlowObjective(stepper.config.num_train_timesteps).model_time(times)
    return Walk(stepper, stepper.timesteps.tolist(), model_times)
