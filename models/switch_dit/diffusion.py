"""Gaussian diffusion: schedules, the forward process and the hybrid loss with learned variance.

DDPM: Ho et al. (arXiv 2006.11239). Learned variance, cosine schedule, hybrid loss and respacing: Nichol and
Dhariwal (arXiv 2102.09672). Sampling is in :mod:`switch_dit.sampling`, with diffusers' schedulers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switch_dit.weightings import PREDICTIONS, snr_weight
from switch_moe.ops._checks import (
    FLOATS,
    check_choice,
    check_device,
    check_dtype,
    check_integers,
    check_range,
    check_shape,
    check_tensors,
)

SCHEDULES = ("linear", "cosine")
SMALLEST_BETA = 1e-12  # below, 1 - beta rounds so far that the posterior is not finite


def betas_of(schedule: str, num_timesteps: int) -> np.ndarray:
    """float64 [N]: ``linear`` from 1e-4 to 0.02 at N = 1000 (scaled for other N), or ``cosine`` (eq. 17)."""
    check_choice("schedule", schedule, SCHEDULES)
    check_integers(num_timesteps=num_timesteps)
    if schedule == "linear" and num_timesteps <= 20:  # the last beta is 20 / N
        raise ValueError(f"num_timesteps is {num_timesteps}; the linear schedule needs at least 21")
    if schedule == "linear":
        scale = 1000 / num_timesteps
        return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps)
    time = np.linspace(0, 1, num_timesteps + 1)
    alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _as_betas(betas: Any) -> np.ndarray:
    try:
        found = np.asarray(betas)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TypeError(f"betas is {type(betas).__name__}; it must be float64 [N] ({error})") from None
    if found.dtype.kind not in "fiu":
        raise TypeError(f"betas is {type(betas).__name__} of {found.dtype}; it must be float64 [N]")
    return found.astype(np.float64)


class GaussianDiffusion:
    """The process ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise`` of N steps.

    Args:
        schedule: ``linear`` or ``cosine``.
        num_timesteps: N.
        weighting: how the squared error is weighted, see :func:`switch_dit.weightings.snr_weight`.
        betas: float64 [N], each in (0, 1), instead of a schedule.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    def __init__(
        self,
        schedule: str = "linear",
        num_timesteps: int = 1000,
        weighting: str = "constant",
        betas: np.ndarray | None = None,
    ) -> None:
        self.betas = betas_of(schedule, num_timesteps) if betas is None else _as_betas(betas)
        if self.betas.ndim != 1 or not len(self.betas):
            raise ValueError(f"betas has shape {self.betas.shape}; it must be [N]")
        outside = ~((self.betas >= SMALLEST_BETA) & (self.betas < 1))  # NaN too
        if outside.any():
            raise ValueError(
                f"betas holds {self.betas[outside][0]}; each must be in (0, 1), and at least {SMALLEST_BETA}"
            )
        self.num_timesteps = len(self.betas)
        self.weighting = weighting
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        # At t = 0 the posterior has no variance; its logarithm takes the value of t = 1, as officially.
        first = posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        tables = {
            "signal": np.sqrt(self.alphas_cumprod),
            "noise": np.sqrt(1 - self.alphas_cumprod),
            "posterior_x_start": self.betas * np.sqrt(previous) / (1 - self.alphas_cumprod),
            "posterior_x_t": (1 - previous) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod),
            "min_log_variance": np.log(np.append(first, posterior_variance[1:])),
            "max_log_variance": np.log(self.betas),
            "eps_weight": self.mse_weight(weighting),
            "v_weight": self.mse_weight(weighting, "v"),
        }
        self._tables = {name: torch.from_numpy(table).float() for name, table in tables.items()}

    def mse_weight(self, weighting: str, prediction: str = "eps") -> np.ndarray:
        """Weight of the squared error of the prediction at each timestep, float64 [N].

        The weightings are those of :func:`switch_dit.weightings.snr_weight`.
        """
        return snr_weight(weighting, self.alphas_cumprod / (1 - self.alphas_cumprod), prediction)

    def respaced(self, steps: int) -> tuple[GaussianDiffusion, Tensor]:
        """The process through ``steps`` evenly spaced timesteps, and those, int64 [steps] rising."""
        check_integers(-self.num_timesteps, steps=steps)
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(
                f"steps is {steps}; it must be between 1 and the {self.num_timesteps} trained timesteps"
            )
        kept = np.round(np.linspace(self.num_timesteps - 1, 0, steps))[::-1].astype(np.int64)
        alphas_cumprod = self.alphas_cumprod[kept]
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return GaussianDiffusion(betas=betas, weighting=self.weighting), torch.from_numpy(kept.copy())

    def _at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """float32 entries of a table at t, to broadcast over ``like``; a table moves to a device once."""
        found = self._tables[table] if t.device.type == "cpu" else self._on_device.get((table, t.device))
        if found is None:
            found = self._tables[table].to(t.device)
            if type(found) is Tensor:  # not one that an export makes up, without values
                self._on_device[table, t.device] = found
        return found[t].view(-1, *[1] * (like.dim() - 1))

    def _check(self, t: Tensor, **images: Tensor) -> None:
        """``ValueError`` or ``TypeError`` unless the images are alike and t fits them."""
        check_tensors(t=t, **images)
        first_name, first = next(iter(images.items()))
        if first.dim() < 2:
            raise ValueError(f"{first_name} has shape {tuple(first.shape)}; it must be [B, C, H, W]")
        for name, image in images.items():
            check_shape(name, image, tuple(first.shape))
            check_dtype(name, image, *FLOATS)
            check_device(name, image, first.device)
        check_device("t", t, first.device)
        check_shape("t", t, (first.shape[0],))
        check_dtype("t", t, torch.int64, torch.int32)
        check_range("t", t, self.num_timesteps, "the timesteps of the process")

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t for x_start and noise [B, C, H, W], t int64 [B] (DDPM eq. 4)."""
        self._check(t, x_start=x_start, noise=noise)
        return self._at("signal", t, x_start) * x_start + self._at("noise", t, x_start) * noise

    def predict_x_start(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The x_start that ``noise`` implies."""
        self._check(t, x_t=x_t, noise=noise)
        return (x_t - self._at("noise", t, x_t) * noise) / self._at("signal", t, x_t)

    def velocity(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``v = sqrt(abar) noise - sqrt(1 - abar) x_start``, [B, C, H, W] (arXiv 2202.00512)."""
        self._check(t, x_start=x_start, noise=noise)
        return self._at("signal", t, noise) * noise - self._at("noise", t, noise) * x_start

    def x_start_and_noise(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The x_start and the noise that a velocity implies: the inverse of that rotation."""
        self._check(t, velocity=velocity, x_t=x_t)
        signal, noise = self._at("signal", t, x_t), self._at("noise", t, x_t)
        return signal * x_t - noise * velocity, noise * x_t + signal * velocity

    def q_posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_start) (DDPM eq. 7)."""
        self._check(t, x_start=x_start, x_t=x_t)
        return self._at("posterior_x_start", t, x_t) * x_start + self._at("posterior_x_t", t, x_t) * x_t

    def p_mean_variance(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Mean, log variance and predicted x_start of p(x_{t-1} | x_t) from an output with 2C channels.

        The second half of the channels interpolates the log variance between its bounds (eq. 15 of arXiv
        2102.09672).
        """
        self._check(t, x_t=x_t)
        check_tensors(model_output=model_output)
        check_shape("model_output", model_output, (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:]))
        check_dtype("model_output", model_output, *FLOATS)
        noise, v = model_output.chunk(2, dim=1)
        share = (v + 1) / 2
        low, high = self._at("min_log_variance", t, x_t), self._at("max_log_variance", t, x_t)
        x_start = self.predict_x_start(x_t, t, noise)
        mean = self.q_posterior_mean(x_start, x_t, t)
        return {"mean": mean, "log_variance": share * high + (1 - share) * low, "pred_xstart": x_start}

    def training_losses(
        self,
        model_output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor,
        prediction: str = "eps",
    ) -> dict[str, Tensor]:
        """Losses per sample, float32 [B]: ``mse``, weighted, and ``vb`` where the variance is learned.

        The model predicts the noise (``eps``) or the velocity (``v``). The variance is learned beside the
        noise only. ``vb`` is in bits per dimension and trains the variance only: the mean is detached (arXiv
        2102.09672).
        """
        check_choice("prediction", prediction, PREDICTIONS)
        self._check(t, x_start=x_start, x_t=x_t, noise=noise)
        check_tensors(model_output=model_output)
        learned = prediction == "eps" and model_output.dim() > 1 and model_output.shape[1] > x_t.shape[1]
        channels = x_t.shape[1] * (1 + learned)
        check_shape("model_output", model_output, (x_t.shape[0], channels, *x_t.shape[2:]))
        check_dtype("model_output", model_output, *FLOATS)
        check_device("model_output", model_output, x_t.device)
        model_output, x_start, x_t, noise = (x.float() for x in (model_output, x_start, x_t, noise))
        predicted = model_output[:, : x_t.shape[1]]
        target = noise if prediction == "eps" else self.velocity(x_start, t, noise)
        weight = self._at(f"{prediction}_weight", t, t)
        losses = {"mse": weight * (predicted - target).square().flatten(1).mean(1)}
        if learned:
            frozen = torch.cat([predicted.detach(), model_output[:, x_t.shape[1] :]], dim=1)
            losses["vb"] = self.variational_bound(frozen, x_start, x_t, t)
        return losses

    def variational_bound(self, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The term of the variational bound at t, bits per dimension [B]; a likelihood at t = 0."""
        model = self.p_mean_variance(model_output, x_t, t)
        true_mean = self.q_posterior_mean(x_start, x_t, t)
        true_log_variance = self._at("min_log_variance", t, x_t)
        kl = gaussian_kl(true_mean, true_log_variance, model["mean"], model["log_variance"])
        decoder = -discretized_gaussian_log_likelihood(x_start, model["mean"], 0.5 * model["log_variance"])
        per_sample = torch.where(t == 0, decoder.flatten(1).mean(1), kl.flatten(1).mean(1))
        return per_sample / math.log(2)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of two diagonal Gaussians, elementwise, in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (-1 - difference + difference.exp() + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood, in nats, of 8-bit images scaled to [-1, 1]: the Gaussian's mass in each value's bin.

    The distribution function is the tanh approximation that the published models were trained with.
    """
    centred = x - mean
    inverse = torch.exp(-log_scale)
    upper = _approximate_normal_cdf(inverse * (centred + 1 / 255))
    lower = _approximate_normal_cdf(inverse * (centred - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _approximate_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
