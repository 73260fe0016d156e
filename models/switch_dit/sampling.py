"""Sampling: images from noise, by a model whose experts are merged ahead for every step.

On a CPU an image is the same to the bit whatever the batch size and the number of processes. The model sees
groups of a fixed number of images, each at a fixed place: torch's products of another number of rows round in
other ways.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switch_dit.diffusion import GaussianDiffusion
from switch_dit.merged import MergedSwitchDiT
from switch_dit.model import SwitchDiT
from switch_dit.objectives import Objective
from switch_dit.schedulers import SCHEDULERS, Walk, create_scheduler, walk
from switch_moe.ops._checks import (
    FLOATS,
    check_dtype,
    check_flags,
    check_integers,
    check_numbers,
    check_shape,
    check_tensors,
)

__all__ = ["SCHEDULERS", "Guidance", "create_scheduler", "group_size", "sample", "sample_walk"]

GROUP_TOKENS = 256


class Guidance(NamedTuple):
    """How a second prediction sharpens the first: ``second + scale (first - second)``.

    The second is the model's without a label (classifier-free guidance, arXiv 2207.12598), or that of
    ``guide`` (autoguidance, arXiv 2406.02507).
    """

    scale: float = 1.5
    """1 is none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """The times within which it is applied, from 0, data, to 1, noise (arXiv 2404.07724)."""
    channels: int | None = None
    """How many channels of the prediction are guided, the first ones. None is all; DiT's code takes 3."""
    guide: SwitchDiT | None = None
    """A smaller or less trained model for the same data, which sees the same labels."""

    def check(self, model: SwitchDiT) -> None:
        """``ValueError`` or ``TypeError`` where it does not fit ``model``."""
        check_numbers(guidance=self.scale)
        interval = self.interval
        if not isinstance(interval, Sequence) or len(interval) != 2:
            raise ValueError(f"guidance_interval is {interval!r}; it must be two numbers, low and high")
        check_numbers(0, 1, "between 0 (data) and 1 (noise)", guidance_interval=interval[0])
        check_numbers(0, 1, "between 0 (data) and 1 (noise)", guidance_interval=interval[1])
        if interval[0] > interval[1]:
            raise ValueError(f"guidance_interval is {interval}; the first number must not be the larger")
        if self.channels is not None:
            check_integers(1, model.in_channels, guidance_channels=self.channels)
        if self.guide is None:
            if model.num_classes and self.scale != 1 and model.y_embedder.dropout == 0:
                raise ValueError(
                    f"guidance is {self.scale}; a model trained with class_dropout_prob 0 has no null label, "
                    "use 1"
                )
            return
        if not isinstance(self.guide, SwitchDiT):
            raise TypeError(f"guide is a {type(self.guide).__name__}; it must be a SwitchDiT")
        for name in ("in_channels", "input_size", "num_classes", "num_timesteps"):
            given, wanted = getattr(self.guide, name), getattr(model, name)
            if given != wanted:
                raise ValueError(f"guide has {name} {given}; it must be {wanted}, the model's")


def group_size(model: SwitchDiT) -> int:
    """Images that a CPU evaluates together: about 256 tokens, and as many without a label."""
    tokens = (model.input_size // model.patch_size) ** 2
    return -(-max(1, GROUP_TOKENS // tokens) // model.pool) * model.pool


class _Predictor:
    """What a scheduler takes at each step: the guided output of the model."""

    def __init__(self, model: SwitchDiT, times: Tensor, guidance: Guidance) -> None:
        self.model, self.guidance = MergedSwitchDiT(model, times), guidance
        guided = guidance.scale != 1 and (guidance.guide is not None or model.num_classes > 0)
        low, high = guidance.interval
        shares = (times.double() / model.num_timesteps).tolist()
        self.guided = [guided and low <= share <= high for share in shares]
        self.guide = None
        if guidance.guide is not None and any(self.guided):
            self.guide = MergedSwitchDiT(guidance.guide, times)
        self.channels = model.in_channels if guidance.channels is None else guidance.channels
        self.null, self.learned = model.num_classes, model.out_channels > model.in_channels
        self.group = None
        self.pool = math.lcm(model.pool, 1 if guidance.guide is None else guidance.guide.pool)
        if model.pos_embed.device.type == "cpu":
            self.group = math.lcm(group_size(model), self.pool)

    def __call__(self, x: Tensor, step: int, labels: Tensor | None) -> Tensor:
        """float32 ``[B, C or 2C, H, W]``."""
        if self.group is None and len(x) % self.pool == 0:
            return self._predict(x, step, labels)
        group = self.group or -(-len(x) // self.pool) * self.pool
        parts = []
        for begin in range(0, len(x), group):
            part = slice(begin, begin + group)
            here, classes = x[part], None if labels is None else labels[part]
            count = len(here)
            if count < group:  # another number of rows would be rounded in other ways
                # Filled up with the same images: experts that choose among a batch see no others.
                again = torch.arange(group, device=x.device) % count
                here, classes = here[again], None if classes is None else classes[again]
            parts.append(self._predict(here, step, classes)[:count])
        return torch.cat(parts) if parts else x

    def _predict(self, x: Tensor, step: int, labels: Tensor | None) -> Tensor:
        if not self.guided[step]:
            return self.model(x, step, labels).float()
        if self.guide is not None:
            out, other = self.model(x, step, labels).float(), self.guide(x, step, labels).float()
        else:
            assert labels is not None
            both = torch.cat([labels, torch.full_like(labels, self.null)])
            out, other = self.model(torch.cat([x, x]), step, both).float().chunk(2)
        here, there = out[:, : self.channels], other[:, : self.channels]
        guided = there + self.guidance.scale * (here - there)
        return torch.cat([guided, out[:, self.channels :]], dim=1)


@torch.no_grad()
def sample(
    model: SwitchDiT,
    objective: Objective,
    labels: Tensor | None,
    *,
    count: int | None = None,
    steps: int = 250,
    scheduler: str | None = None,
    guidance: float | Guidance = 1.5,
    generator: torch.Generator | list[torch.Generator] | None = None,
    start: Tensor | None = None,
    batch_size: int = 250,
    clip: bool | None = None,
) -> Tensor:
    """Images (or latents) float32 [n, C, H, W] from noise, by the model in evaluation mode.

    Args:
        objective: what the model was trained for, see :func:`switch_dit.objectives.create_objective`.
        labels: int64 [n]; an unconditional model takes None, and ``count`` instead.
        steps: model evaluations (twice as many samples each where there is guidance); fewer than the trained
            timesteps for ``dpm-solver++`` and ``unipc``, but any number for a flow.
        scheduler: ``ddim`` (eta 0), ``ddpm`` (with the learned variance, if there is one), ``dpm-solver++``
            or ``unipc``; for a flow ``euler``, ``dpm-solver++`` or ``unipc``. None takes the first of them.
        guidance: a scale (1 is none), or a :class:`Guidance`.
        generator: the source of noise, on the CPU, for any device; or one for each sample, which then does
            not depend on the others.
        start: the noise to begin with, [n, C, H, W], instead of drawing it.
        batch_size: samples at a time.
        clip: whether each step confines the predicted image to [-1, 1], as it must for pixels: the first
            steps of the cosine schedule divide by as little as 5e-5. None clips 1 and 3 channels (grey and
            colour) and no others, which are latents.

    Raises:
        ValueError, TypeError: an argument does not fit. FloatingPointError: a sample is not finite.
    """
    _check_model(model)
    if isinstance(objective, GaussianDiffusion):
        raise TypeError(
            "objective is a GaussianDiffusion; it must be an Objective, for the noise "
            f"DiffusionObjective(diffusion, 'eps', learn_sigma={model.learn_sigma})"
        )
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is a {type(objective).__name__}; it must be an Objective")
    for name in ("num_timesteps", "learn_sigma"):
        given, wanted = getattr(objective, name), getattr(model, name)
        if given != wanted:
            raise ValueError(f"objective has {name} {given}; it must be {wanted}, the model's")
    clip = model.in_channels in (1, 3) if clip is None else clip
    check_flags(clip=clip)
    name = SCHEDULERS[objective.name][0] if scheduler is None else scheduler
    with torch.device("cpu"):  # diffusers makes its tables on the default device
        schedule = create_scheduler(name, objective, clip)
    return sample_walk(
        model, schedule, labels, count=count, steps=steps, guidance=guidance, generator=generator,
        start=start, batch_size=batch_size, clip=clip,
    )  # fmt: skip


@torch.no_grad()
def sample_walk(
    model: SwitchDiT,
    scheduler: Any,
    labels: Tensor | None,
    *,
    count: int | None = None,
    steps: int = 250,
    guidance: float | Guidance = 1.5,
    generator: torch.Generator | list[torch.Generator] | None = None,
    start: Tensor | None = None,
    batch_size: int = 250,
    clip: bool = False,
    progress: Any = None,
) -> Tensor:
    """:func:`sample` with a scheduler of diffusers, whose settings say what the model predicts.

    ``clip`` is for Euler's scheduler, which has no such setting. ``progress``, if given, wraps the numbers of
    the steps of all batches, as tqdm does.
    """
    _check_model(model)
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    check_integers(batch_size=batch_size)
    labels, n = _labels(model, labels, count)
    guidance.check(model)
    generators, x = _noise(model, n, generator, start)
    with torch.device("cpu"):
        schedule = walk(scheduler, steps)  # settings that do not fit are refused without samples too
    if model.pos_embed.device.type == "cpu":  # whole groups, so that an image keeps its place in one
        batch_size = -(-batch_size // group_size(model)) * group_size(model)
    models = [model] if guidance.guide is None else [model, guidance.guide]
    modes = [(module, module.training) for each in models for module in each.modules()]
    for each in models:
        each.eval()
    try:
        predictor = _Predictor(model, schedule.times, guidance)
        parts = []
        batches = [slice(begin, begin + batch_size) for begin in range(0, n, batch_size)]
        numbers: Iterable[int] = range(len(batches) * len(schedule.timesteps))
        ticks = iter(numbers if progress is None else progress(numbers))
        for part in batches:
            classes = None if labels is None else labels[part]
            with torch.device("cpu"):
                fresh = walk(scheduler, steps)
            parts.append(_sample_batch(predictor, x[part], classes, fresh, generators[part], clip, ticks))
        next(ticks, None)
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(parts) if parts else x


def _check_model(model: Any) -> None:
    if not isinstance(model, SwitchDiT):
        raise TypeError(f"model is a {type(model).__name__}; it must be a SwitchDiT")


def _labels(model: SwitchDiT, labels: Tensor | None, count: int | None) -> tuple[Tensor | None, int]:
    """The labels on the model's device, and their number."""
    if (labels is None) != (model.num_classes == 0):
        raise ValueError(f"labels is {labels}; the model has {model.num_classes} classes")
    if count is not None:
        check_integers(0, count=count)
    if labels is None:
        if count is None:
            raise ValueError("count is None; it must say how many samples, as there are no labels")
        return None, count
    check_tensors(labels=labels)
    check_shape("labels", labels, ("n",))
    check_dtype("labels", labels, torch.int64, torch.int32)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes:
        raise ValueError(f"labels holds {labels.tolist()}; each must be in [0, {model.num_classes})")
    return labels.to(model.pos_embed.device), labels.shape[0]


def _noise(
    model: SwitchDiT, n: int, generator: Any, start: Tensor | None
) -> tuple[list[torch.Generator], Tensor]:
    """A generator for each sample, for the noise of the steps, and the noise to begin with, on the device."""
    shape = (n, model.in_channels, model.input_size, model.input_size)
    if isinstance(generator, (list, tuple)):
        generators = list(generator)
        if len(generators) != n:
            raise ValueError(f"generator has {len(generators)} generators; it must be one, or {n}")
    for each in generators if isinstance(generator, (list, tuple)) else [generator]:
        if each is not None and not isinstance(each, torch.Generator):
            raise TypeError(f"generator is a {type(each).__name__}; it must be a torch.Generator")
        if each is not None and each.device.type != "cpu":
            raise ValueError(f"generator is on {each.device}; it must be on the CPU, for any device")
    if start is None and isinstance(generator, (list, tuple)):
        drawn = [torch.randn(1, *shape[1:], generator=each, device="cpu") for each in generators]
        start = torch.cat(drawn) if drawn else torch.empty(shape, device="cpu")
    elif start is None:
        start = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    check_tensors(start=start)
    check_shape("start", start, shape)
    check_dtype("start", start, *FLOATS)
    if not bool(start.isfinite().all()):
        raise ValueError("start holds numbers that are not finite; it must be noise")
    if not isinstance(generator, (list, tuple)):
        seeds = torch.randint(2**62, (n,), generator=generator, device="cpu").tolist()
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return generators, start.to(model.pos_embed.device, torch.float32)


def _sample_batch(
    predictor: _Predictor,
    x: Tensor,
    labels: Tensor | None,
    schedule: Walk,
    generators: list[torch.Generator],
    clip: bool,
    ticks: Any,
) -> Tensor:
    scheduler, timesteps, _ = schedule
    options = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": generators} if "generator" in options else {}
    if "use_clipped_model_output" in options:
        # DDIM with a clipped image takes the noise that this image implies, as the official code does.
        extra["use_clipped_model_output"] = True
    velocity_is_clipped = clip and type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    for number, timestep in enumerate(timesteps):
        next(ticks)
        out = predictor(x, number, labels)
        if not learned:
            out = out[:, : x.shape[1]]
        if velocity_is_clipped:
            out = _clipped_velocity(out, x, float(scheduler.sigmas[number]))
        with torch.device("cpu"):
            x = scheduler.step(out, timestep, x, **extra).prev_sample
    if not bool(x.isfinite().all()):
        raise FloatingPointError("samples are not finite; the weights may be broken, or the schedule unfit")
    return x


def _clipped_velocity(velocity: Tensor, x_t: Tensor, t: float) -> Tensor:
    """The velocity of rectified flow from x_t to its predicted image, confined to [-1, 1], for t > 0."""
    return (x_t - (x_t - t * velocity).clamp(-1, 1)) / t
