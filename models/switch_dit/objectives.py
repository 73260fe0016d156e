"""What a model is trained to predict: the noise, the velocity, or the direction of rectified flow.

An objective knows its process, its target, its losses and how a prediction becomes an image and a noise. It
holds no random state: timesteps and noise come in as arguments, timesteps from :mod:`switch_dit.timesteps`.
One training step, with noise and x_start [B, C, H, W]::

    t, weight = sampler.draw(u)
    x_t = objective.q_sample(x_start, t, noise)
    model_output = model(x_t, objective.model_time(t), y)
    losses = objective.losses(model_output, x_start, x_t, t, noise, weight)  # float32 [B] each
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from switch_dit.diffusion import GaussianDiffusion
from switch_moe.ops._checks import (
    FLOATS,
    check_choice,
    check_device,
    check_dtype,
    check_flags,
    check_integers,
    check_shape,
    check_tensors,
    has_values,
)

OBJECTIVES = ("eps", "v", "flow")


class Prediction(NamedTuple):
    """What an output of the model says about x_t, both float32 or float64 ``[B, C, H, W]``."""

    x_start: Tensor
    noise: Tensor


class Objective(ABC):
    """What :func:`create_objective` returns.

    Attributes:
        name: one of ``OBJECTIVES``.
        num_timesteps: N of the model, whose timesteps are in [0, N).
        continuous: whether t is float32 in [0, 1], from data to noise; otherwise it is an integer in [0, N).
        learn_sigma: whether outputs have a second half of channels, for the variance.

    Every method raises ``ValueError`` or ``TypeError`` that names the argument that does not fit.
    """

    name: str
    num_timesteps: int
    continuous: bool
    learn_sigma: bool

    @abstractmethod
    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ``[B, C, H, W]`` of x_start and noise of that shape, t ``[B]``."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """The timestep that the model takes for t ``[B]``, in [0, N)."""

    @abstractmethod
    def losses(
        self,
        model_output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses per sample, float32 ``[B]``: ``mse`` and, with a learned variance, ``vb``.

        ``vb`` is in bits per dimension. The objective's weighting and ``weight`` ``[B]``, a sampler's,
        multiply ``mse`` alone.
        """

    @abstractmethod
    def predict(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The image and the noise that an output implies, as samplers take them."""


class DiffusionObjective(Objective):
    """The noise (``eps``) or the velocity (``v``) of a :class:`GaussianDiffusion`, at integer timesteps.

    Noise: DDPM, arXiv 2006.11239, eq. 14; with ``learn_sigma`` the hybrid loss of arXiv 2102.09672.
    Velocity: Salimans and Ho, arXiv 2202.00512: ``v = sqrt(abar) noise - sqrt(1 - abar) x_start``, so that
    ``x_start = sqrt(abar) x_t - sqrt(1 - abar) v``.
    """

    continuous = False

    def __init__(
        self, diffusion: GaussianDiffusion, prediction: str = "eps", learn_sigma: bool = False
    ) -> None:
        if not isinstance(diffusion, GaussianDiffusion):
            raise TypeError(f"diffusion is a {type(diffusion).__name__}; it must be a GaussianDiffusion")
        check_choice("prediction", prediction, ("eps", "v"))
        check_flags(learn_sigma=learn_sigma)
        if learn_sigma and prediction != "eps":
            raise ValueError(f"learn_sigma is True; it must be False for {prediction}, which has no variance")
        self.diffusion, self.name, self.learn_sigma = diffusion, prediction, learn_sigma
        self.num_timesteps = diffusion.num_timesteps

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.diffusion.q_sample(x_start, t, noise)

    def model_time(self, t: Tensor) -> Tensor:
        """t itself, an integer."""
        return t

    def losses(
        self,
        model_output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        self._check_channels(model_output, x_t)
        losses = self.diffusion.training_losses(model_output, x_start, x_t, t, noise, self.name)
        return _weighted(losses, weight)

    def predict(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The image and the noise that an output implies. For the noise this divides by sqrt(abar_t)."""
        self._check_channels(model_output, x_t)
        predicted = _at_least_float32(model_output[:, : x_t.shape[1]])
        x_t = _at_least_float32(x_t)
        if self.name == "eps":
            return Prediction(self.diffusion.predict_x_start(x_t, t, predicted), predicted)
        return Prediction(*self.diffusion.x_start_and_noise(predicted, x_t, t))

    def _check_channels(self, model_output: Tensor, x_t: Tensor) -> None:
        check_tensors(model_output=model_output, x_t=x_t)
        check_shape("x_t", x_t, ("B", "C", "H", "W"))
        channels = x_t.shape[1] * (2 if self.learn_sigma else 1)
        check_shape("model_output", model_output, (x_t.shape[0], channels, *x_t.shape[2:]))
        check_dtype("model_output", model_output, *FLOATS)


class FlowObjective(Objective):
    """Rectified flow: ``x_t = (1 - t) x_start + t noise``, target ``noise - x_start``.

    Liu et al., arXiv 2209.03003, with time from data to noise as in SD3 (arXiv 2403.03206, section 3).
    There, ``x_start = x_t - t v`` and ``noise = x_t + (1 - t) v``.

    The model takes the time ``N t``, and for t = 1 the largest float32 below N: its timestep embedder, and so
    its router, see fractional timesteps, and its prior the row floor(N t), so that each row stands for an
    N-th of [0, 1] and is met as often as at integer timesteps. Schedulers that count a flow's time by 1000
    agree.

    Args:
        num_timesteps: N of the model.
    """

    name = "flow"
    continuous = True
    learn_sigma = False

    def __init__(self, num_timesteps: int = 1000) -> None:
        check_integers(high=2**24, num_timesteps=num_timesteps)
        self.num_timesteps = num_timesteps
        limit = torch.tensor(float(num_timesteps))
        self._largest = float(torch.nextafter(limit, torch.zeros(())))

    def _check(self, t: Tensor, **images: Tensor) -> Tensor:
        """t ``[B]`` in float32, or float64 if it was, to broadcast over the images."""
        check_tensors(**images)
        first_name, first = next(iter(images.items()))
        check_shape(first_name, first, ("B", "C", "H", "W"))
        for name, image in images.items():
            check_shape(name, image, tuple(first.shape))
            check_dtype(name, image, *FLOATS)
            check_device(name, image, first.device)
        _check_time(t)
        check_shape("t", t, (first.shape[0],))
        check_device("t", t, first.device)
        return t[:, None, None, None]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        time = self._check(t, x_start=x_start, noise=noise)
        return (1 - time) * x_start + time * noise

    def model_time(self, t: Tensor) -> Tensor:
        """float32 ``[B]`` in [0, N): N t, but the largest float32 below N where that would be N."""
        _check_time(t)
        return (t * self.num_timesteps).float().clamp(max=self._largest)

    def losses(
        self,
        model_output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        self._check(t, x_t=x_t, x_start=x_start, noise=noise, model_output=model_output)
        error = model_output.float() - (noise.float() - x_start.float())
        return _weighted({"mse": error.square().flatten(1).mean(1)}, weight)

    def predict(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        time = self._check(t, x_t=x_t, model_output=model_output)
        velocity, x_t = _at_least_float32(model_output), _at_least_float32(x_t)
        return Prediction(x_t - time * velocity, x_t + (1 - time) * velocity)


def create_objective(
    name: str = "eps",
    *,
    schedule: str = "linear",
    num_timesteps: int = 1000,
    weighting: str = "constant",
    learn_sigma: bool = False,
) -> Objective:
    """The objective with a name: ``eps``, ``v`` or ``flow``.

    Args:
        schedule: of the noise, for ``eps`` and ``v``; ``flow`` has none and takes ``linear``, the default.
        num_timesteps: N of the model.
        weighting: see :func:`switch_dit.weightings.snr_weight`; ``flow`` takes ``constant`` only.
        learn_sigma: whether the output has a second half for the variance; ``eps`` only.

    Raises ``ValueError`` or ``TypeError`` for settings that do not fit together.
    """
    check_choice("name", name, OBJECTIVES)
    check_flags(learn_sigma=learn_sigma)
    if name != "flow":
        return DiffusionObjective(GaussianDiffusion(schedule, num_timesteps, weighting), name, learn_sigma)
    if learn_sigma:
        raise ValueError("learn_sigma is True; it must be False for flow, which has no variance")
    if weighting != "constant":
        raise ValueError(
            f"weighting is {weighting!r}; flow takes 'constant', and the logit-normal sampler for emphasis"
        )
    if schedule != "linear":
        raise ValueError(f"schedule is {schedule!r}; flow has no schedule and takes 'linear', the default")
    return FlowObjective(num_timesteps)


def _weighted(losses: dict[str, Tensor], weight: Tensor | None) -> dict[str, Tensor]:
    if weight is None:
        return losses
    check_tensors(weight=weight)
    check_shape("weight", weight, tuple(losses["mse"].shape))
    check_dtype("weight", weight, *FLOATS)
    check_device("weight", weight, losses["mse"].device)
    return {**losses, "mse": weight.float() * losses["mse"]}


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_time(t: Tensor) -> None:
    """``ValueError`` or ``TypeError`` unless t is ``[B]``, floating and, where one can look, in [0, 1]."""
    check_tensors(t=t)
    check_shape("t", t, ("B",))
    check_dtype("t", t, torch.float32, torch.float64)
    if t.numel() and has_values(t):
        low, high = (bound.item() for bound in t.detach().aminmax())
        if not (low >= 0 and high <= 1) or math.isnan(low):
            raise ValueError(f"t holds {low} to {high}; it must stay in [0, 1], from data to noise")
