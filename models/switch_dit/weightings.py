"""How the loss is weighted over timesteps: by a formula of the signal-to-noise ratio, or by learned weights.

Every named weighting is one function of time, stated by its paper for the squared error of the noise. Where
the model predicts the velocity, the weight of that error is the same function times abar, because ``noise -
noise' = sqrt(abar) (v - v')`` at a given x_t.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor, nn

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

PREDICTIONS = ("eps", "v")
_NUMBER = r"(\d+(?:\.\d+)?)"


def snr_weight(weighting: str, snr: np.ndarray, prediction: str = "eps") -> np.ndarray:
    """Weight of the squared error of the prediction for each signal-to-noise ratio, float64 like ``snr``.

    With ``snr = abar / (1 - abar)``:

    ===================  =============================  ==================================
    weighting            of the noise, ``eps``          of the velocity, ``v``
    ===================  =============================  ==================================
    constant             1                              1
    min_snr_<g>          min(snr, g) / snr              min(snr, g) / (1 + snr)
    p2_gamma<a>_k<b>     (b + snr)^-a                   (b + snr)^-a snr / (1 + snr)
    p2                   p2_gamma1_k1                   p2_gamma1_k1
    ===================  =============================  ==================================

    ``constant`` is the plain mean squared error of either; these two are not the same function of time.
    min-SNR: arXiv 2303.09556. P2: arXiv 2204.00227. Numbers are written like 5 or 0.5; g and b are
    positive.

    Raises ``ValueError`` for another weighting or prediction.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if weighting == "constant":
        return np.ones_like(snr)
    weight = _noise_weight(weighting, snr)
    return weight if prediction == "eps" else weight * (snr / (1 + snr))


def _noise_weight(weighting: str, snr: np.ndarray) -> np.ndarray:
    if weighting == "p2":
        return 1 / (1 + snr)
    match = re.fullmatch(f"min_snr_{_NUMBER}", str(weighting))
    if match and 0 < float(match[1]) < math.inf:
        return np.minimum(snr, float(match[1])) / snr
    match = re.fullmatch(f"p2_gamma{_NUMBER}_k{_NUMBER}", str(weighting))
    if match and 0 < float(match[2]) < math.inf and float(match[1]) < math.inf:
        return (float(match[2]) + snr) ** -float(match[1])
    raise ValueError(
        f"weighting is {weighting!r}; it must be constant, p2 or min_snr_<gamma>, like min_snr_5, or "
        "p2_gamma<gamma>_k<k>, like p2_gamma0.5_k1"
    )


def cluster_bounds(num_timesteps: int, clusters: int) -> list[int]:
    """The ``clusters + 1`` bounds floor(i N / C) of C intervals of timesteps, from 0 to N.

    Raises ``ValueError`` or ``TypeError`` unless both are integers with 1 <= C <= N.
    """
    check_integers(num_timesteps=num_timesteps)
    check_integers(clusters=clusters)
    if clusters > num_timesteps:
        raise ValueError(f"clusters is {clusters}; it must be at most num_timesteps, {num_timesteps}")
    return [i * num_timesteps // clusters for i in range(clusters + 1)]


class UncertaintyWeighting(nn.Module):
    """Learned weights of C clusters of timesteps (UW of ANT, arXiv 2306.00354, after arXiv 1705.07115).

    With the batch in C equal parts, one for each cluster, and l_c the mean loss of a part divided by C, ANT's
    loss is ``sum_c (exp(-s_c) l_c + s_c) / 2``. Here l_c is the sum of the losses of the samples in cluster c
    divided by B, which is the same number for such a batch, and has the same mean for timesteps drawn
    uniformly. So the batch needs no order, a cluster may be empty, and the loss is a mean over samples: ranks
    and accumulation average it like any other.

    Args:
        num_timesteps: N. clusters: C, with bounds floor(i N / C).

    Attributes:
        loss_scale: s, float32 ``[C]``, zeros at first. ANT trains it at a learning rate of 0.025 without
            weight decay (``uncertainty`` of :func:`switch_dit.optimisation.create_optimizer`).

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    bounds: Tensor

    def __init__(self, num_timesteps: int = 1000, clusters: int = 8) -> None:
        super().__init__()
        inner = cluster_bounds(num_timesteps, clusters)[1:-1]
        self.num_timesteps, self.clusters = num_timesteps, clusters
        self.loss_scale = nn.Parameter(torch.zeros(clusters, dtype=torch.float32))
        self.register_buffer("bounds", torch.tensor(inner, dtype=torch.int64), persistent=False)

    def cluster(self, t: Tensor) -> Tensor:
        """The cluster of each timestep, int64 ``[B]``, for t ``[B]`` in [0, N), integral or not."""
        check_tensors(t=t)
        check_shape("t", t, ("B",))
        check_dtype("t", t, torch.int64, torch.int32, torch.float32, torch.float64)
        check_device("t", t, self.loss_scale.device)
        check_range("t", t, self.num_timesteps, "the timesteps")
        return torch.bucketize(t, self.bounds.to(t.dtype), right=True)

    def forward(self, losses: Tensor, t: Tensor) -> Tensor:
        """Per-sample losses, float32 ``[B]``, whose mean over the batch is UW's loss.

        Args:
            losses: what is to be weighted, ``[B]`` of any floating type: the squared error and, with a
                learned variance, the bound, added.
            t: the timesteps as the model takes them, ``[B]`` in [0, N).

        A loss that is not finite stays with its sample and with ``loss_scale``'s gradient of its cluster.
        """
        check_tensors(losses=losses)
        check_shape("losses", losses, ("B",))
        check_dtype("losses", losses, *FLOATS)
        check_tensors(t=t)
        check_shape("t", t, (losses.shape[0],))
        check_device("losses", losses, self.loss_scale.device)
        scale = self.loss_scale[self.cluster(t)]
        return 0.5 * ((-scale).exp() * losses.float() + self.loss_scale.sum())

    def cluster_weight(self) -> Tensor:
        """What the losses of each cluster are multiplied by, exp(-s) / 2: float32 ``[C]``, no gradient."""
        return 0.5 * (-self.loss_scale.detach()).exp()

    def extra_repr(self) -> str:
        return f"num_timesteps={self.num_timesteps}, clusters={self.clusters}"
