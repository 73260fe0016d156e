"""Moving averages of the weights: with a decay, and by a power function, from which any width can be had
later.

EDM2: Karras et al., arXiv 2312.02696, section 3; equations have its numbers. An average after t steps is
``sum_s w_s theta(s)``; a power-function average has weights that follow ``s^gamma``, so its width grows with
the run, and is named by sigma_rel, the standard deviation of its profile in units of t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switch_moe.ops._checks import check_integers, check_numbers, check_shape, check_tensors

WIDEST = 12**-0.5
"""sigma_rel of the plain mean of all weights, gamma = 0."""


def decayed_weight(step: int, decay: float) -> float:
    """What the newest weights count in a moving average at step n from 0: 1 - min(decay, n / (9 + n)).

    The decay starts low, so that the first weights are soon forgotten.
    """
    return 1 - min(decay, step / (9 + step))


def power_weight(step: int, gamma: float) -> float:
    """What the newest weights count in a power-function average: 1 - beta, beta = (1 - 1/t)^(gamma + 1).

    That is EDM2's beta of eq. 127, with t = step + 1 for steps from 0. Then theta(s) counts
    (s/t)^(gamma + 1) - ((s - 1)/t)^(gamma + 1), the integral of the profile over that step.
    """
    return 1.0 if step == 0 else -math.expm1((gamma + 1) * math.log1p(-1 / (step + 1)))


def sigma_rel_of(gamma: float) -> float:
    """Standard deviation of the profile p(s) ~ s^g on [0, 1]: sqrt((g + 1) / (g + 3)) / (g + 2) (eq. 123)."""
    check_numbers(0, wanted="0 or more and finite", gamma=gamma)
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a width in [1e-4, 12^-0.5], the inverse of :func:`sigma_rel_of`.

    The largest root of ``g^3 + 7 g^2 + (16 - c) g + 12 - c`` with c = sigma_rel^-2 (eq. 126).
    """
    check_numbers(1e-4, WIDEST, f"between 1e-4 and 12^-0.5 = {WIDEST:.4f}", sigma_rel=sigma_rel)
    inverse = float(sigma_rel) ** -2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


class MovingAverage:
    """The moving average of named parameters that keeps ``decay`` of itself at each step.

    Args:
        parameters: what is averaged, by name, like ``dict(model.named_parameters())``.
        decay: in [0, 1); the start of a run keeps less, see :func:`decayed_weight`.
        averaged: tensors to hold the average, by the same names, like those of a copy of the model. They are
            taken as they are. By default they are new ones.

    Attributes:
        parameters: the average by name, each of the shape, type and device of its parameter.

    ``update`` is ``prepare``, which writes a number to the device, and ``advance``, which reads it there: a
    CUDA graph can hold ``advance``. Nothing waits for a GPU.

    Raises ``ValueError`` or ``TypeError`` for an argument that does not fit.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: float = 0.9999,
        averaged: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_numbers(0, math.nextafter(1, 0), "in [0, 1)", decay=decay)
        self.decay = decay
        if not isinstance(parameters, Mapping) or not parameters:
            raise TypeError(f"parameters is a {type(parameters).__name__}; it must hold tensors by name")
        if averaged is None:
            averaged = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.parameters = dict(averaged)
        for name, parameter in self._in_order(parameters):
            check_shape(f"averaged[{name!r}]", self.parameters[name], tuple(parameter.shape))
        self.weight = torch.zeros((), device=next(iter(self.parameters.values())).device)

    def weight_at(self, step: int) -> float:
        """What the newest weights count at that step, from 0."""
        return decayed_weight(step, self.decay)

    def prepare(self, step: int) -> None:
        """Sets the weight of the update after step number ``step``, from 0."""
        check_integers(0, step=step)
        self.weight.fill_(self.weight_at(step))

    @torch.no_grad()
    def advance(self, parameters: Mapping[str, Tensor]) -> None:
        """Moves the average towards the parameters by the weight that was set."""
        pairs = self._in_order(parameters)
        averaged = [self.parameters[name] for name, _ in pairs]
        change = torch._foreach_sub([parameter for _, parameter in pairs], averaged)
        torch._foreach_mul_(change, self.weight)
        torch._foreach_add_(averaged, change)

    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Takes in the parameters as they are after step number ``step``, from 0."""
        self.prepare(step)
        self.advance(parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by name, not copied. The step is all else that a resumed run needs."""
        return dict(self.parameters)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies an average into this one."""
        for name, value in self._in_order(state):
            check_tensors(**{f"state[{name!r}]": value})
            check_shape(f"state[{name!r}]", value, tuple(self.parameters[name].shape))
            self.parameters[name].copy_(value)

    def _in_order(self, given: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        _check_names(given, self.parameters)
        return [(name, given[name]) for name in self.parameters]


@dataclass(frozen=True)
class Snapshot:
    """A power-function average as it was after ``steps`` steps.

    ``parameters`` may be any mapping, also one that reads a tensor from a file when it is asked for.
    """

    steps: int
    sigma_rel: float
    parameters: Mapping[str, Tensor]


class PowerAverage(MovingAverage):
    """A power-function average of named parameters (EDM2, section 3).

    Args:
        parameters, averaged: as in :class:`MovingAverage`.
        sigma_rel: the width, in [1e-4, 12^-0.5]. EDM2 tracks 0.05 and 0.10.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        sigma_rel: float = 0.05,
        averaged: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.gamma, self.sigma_rel = gamma_of(sigma_rel), sigma_rel
        super().__init__(parameters, 0.0, averaged)

    def weight_at(self, step: int) -> float:
        return power_weight(step, self.gamma)

    def snapshot(self, steps: int) -> Snapshot:
        """A copy on the CPU, for a run that has done ``steps`` steps."""
        check_integers(steps=steps)
        copies = {name: value.detach().to("cpu", copy=True) for name, value in self.parameters.items()}
        return Snapshot(steps, self.sigma_rel, copies)

    @staticmethod
    def reconstruct(
        snapshots: Sequence[Snapshot], sigma_rel: float, steps: int | None = None
    ) -> dict[str, Tensor]:
        """The average of another width, from snapshots of tracked ones.

        Args:
            snapshots: of one or more widths, at several times of one run. More of them come nearer.
            sigma_rel: the width, in [1e-4, 12^-0.5].
            steps: the time of the average; by default the latest snapshot's, which is the latest possible.

        Returns:
            The average by name, on the CPU, in the types of the first snapshot, summed in float64.

        Raises ``ValueError`` or ``TypeError`` for an argument that does not fit.
        """
        snapshots = list(snapshots)
        coefficients = reconstruction([(each.steps, each.sigma_rel) for each in snapshots], sigma_rel, steps)
        first = snapshots[0].parameters
        for each in snapshots:
            _check_names(each.parameters, first)
        total: dict[str, Tensor] = {}
        for name in first:
            like = first[name]
            exact = torch.zeros(like.shape, dtype=torch.float64, device="cpu")
            for coefficient, each in zip(coefficients.tolist(), snapshots, strict=True):
                exact += coefficient * each.parameters[name].detach().cpu()
            total[name] = exact.to(like.dtype)
        return total


def reconstruction(
    tracked: Iterable[tuple[int, float]], sigma_rel: float, steps: int | None = None
) -> np.ndarray:
    """How much of each snapshot the average of a width takes, float64 [n]; they may be negative.

    With the profile p_i(s) = (g_i + 1) s^g_i / t_i^(g_i + 1) on [0, t_i] of each snapshot, and p that of the
    wanted average, the coefficients x minimise the integral of (p - sum_i x_i p_i)^2. So A x = b, where A_ij
    = <p_i, p_j> and b_i = <p_i, p> (eq. 151).

    Args:
        tracked: (t, sigma_rel) of each snapshot. sigma_rel, steps: of the wanted average.
    """
    found = list(tracked)
    if not found:
        raise ValueError("snapshots is empty; it must hold at least one snapshot")
    for at, _ in found:
        check_integers(steps=at)
    latest = max(at for at, _ in found)
    steps = latest if steps is None else steps
    check_integers(steps=steps)
    if steps > latest:
        raise ValueError(f"steps is {steps}; it must be at most {latest}, the time of the latest snapshot")
    times = np.array([float(at) for at, _ in found])
    gammas = np.array([gamma_of(width) for _, width in found])
    gram = _inner_products(times[:, None], gammas[:, None], times, gammas)
    wanted = _inner_products(times, gammas, np.float64(steps), np.float64(gamma_of(sigma_rel)))
    # The profiles are scaled to one norm for the condition of A; least squares copes with snapshots alike.
    norm = np.sqrt(gram.diagonal())
    return np.linalg.lstsq(gram / norm[:, None] / norm, wanted / norm, rcond=None)[0] / norm


def _inner_products(t1: Any, gamma1: Any, t2: Any, gamma2: Any) -> np.ndarray:
    """The integral of the product of two profiles, which is up to the earlier of their times."""
    early, late = np.minimum(t1, t2), np.maximum(t1, t2)
    gamma_of_late = np.where(t1 > t2, gamma1, gamma2)
    return (gamma1 + 1) * (gamma2 + 1) / (gamma1 + gamma2 + 1) * (early / late) ** gamma_of_late / late


def _check_names(given: Any, expected: Mapping[str, Tensor]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"parameters is a {type(given).__name__}; it must hold tensors by name")
    if given.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        raise ValueError(
            f"parameters lacks {missing[:3]} and has {extra[:3]}; it must have the names averaged"
        )
