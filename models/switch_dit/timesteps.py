"""Which timesteps a batch is trained on, as functions of uniform numbers.

A sampler has no random state: ``draw(u)`` maps u ``[B]``, uniform in [0, 1), to timesteps and the weights of
their squared errors. To be independent of the number of ranks, draw for the whole global batch and keep a
rank's part: SpeeD pairs samples of different positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from switch_dit.diffusion import GaussianDiffusion
from switch_dit.objectives import DiffusionObjective, Objective
from switch_dit.weightings import cluster_bounds
from switch_moe.ops._checks import (
    check_choice,
    check_device,
    check_dtype,
    check_flags,
    check_integers,
    check_numbers,
    check_positive,
    check_range,
    check_shape,
    check_tensors,
)

SAMPLERS = ("uniform", "logit-normal", "speed", "curriculum")
STILL_SLOPE = 1e-4  # SpeeD: below this growth of the noise per timestep, timesteps are alike


class Draw(NamedTuple):
    """Timesteps ``[B]``, int64 in [0, N) or float32 in [0, 1]; weights float32 ``[B]``, None for ones."""

    t: Tensor
    weight: Tensor | None = None


class Sampler:
    """Uniform timesteps: every integer in [0, N), or every t in [0, 1), is as likely.

    Base class of the others.

    Args:
        num_timesteps: N. continuous: whether t is float32 in [0, 1] instead of int64 in [0, N).

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    def __init__(self, num_timesteps: int = 1000, continuous: bool = False) -> None:
        check_integers(high=2**24, num_timesteps=num_timesteps)
        check_flags(continuous=continuous)
        self.num_timesteps, self.continuous = num_timesteps, continuous

    def draw(self, u: Tensor, lowest: int | Tensor | None = None) -> Draw:
        """Timesteps for u ``[B]``, uniform in [0, 1), of float32 or float64, on u's device.

        ``lowest`` is for the curriculum only. Nothing waits for a GPU, and a CUDA graph can capture it.
        """
        if lowest is not None:
            raise ValueError(f"lowest is {lowest}; only the curriculum has a lowest timestep")
        return self._timesteps(_checked(u))

    def _timesteps(self, u: Tensor) -> Draw:
        return Draw(self._on_the_way(u))

    def _on_the_way(self, fraction: Tensor) -> Tensor:
        """Timesteps of a share of the way from data to noise, float64 ``[B]`` in [0, 1]."""
        if self.continuous:
            return fraction.float()
        return (fraction * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)


class LogitNormal(Sampler):
    """t = sigmoid(mean + std z), z normal (SD3, arXiv 2403.03206, section 3.1), t = 1 being noise.

    At integer timesteps, floor(N t).

    Args:
        mean: positive for more noise. std: positive.
    """

    def __init__(
        self, num_timesteps: int = 1000, continuous: bool = True, mean: float = 0.0, std: float = 1.0
    ) -> None:
        super().__init__(num_timesteps, continuous)
        check_numbers(mean=mean)
        check_positive(std=std)
        self.mean, self.std = mean, std

    def _timesteps(self, u: Tensor) -> Draw:
        return Draw(self._on_the_way(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))))


class SpeeD(Sampler):
    """SpeeD (Wang et al., arXiv 2405.17403): fewer timesteps that teach little, and a weight for change.

    Timesteps below ``tau`` are k times as likely as the others. Half of a batch of n, its first n // 2 + 1,
    is drawn so; the others are their duals, in order: m - t for t < m, else t - m, where m - 1 is the first
    timestep at which sqrt(1 - abar) grows by less than 1e-4. The weight of the squared error is

        (1 - lam) + (2 lam - 1) (c - min c) / (max c - min c) for t < tau, else 1,

    with c the growth of 1 - abar, and its extremes over all N timesteps.

    Args:
        diffusion: the process, at integer timesteps.
        k: positive; 5 in the paper, 2 for its FFHQ. lam: 0.6 in the paper. tau: in [0, N]; 700 in the paper.

    Attributes:
        probability: float64 ``[N]`` on the CPU, of a drawn timestep. weight: float64 ``[N]`` on the CPU.
        meaningful: m.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit, and for a process without an m
    below N.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, k: float = 5.0, lam: float = 0.6, tau: int = 700
    ) -> None:
        if not isinstance(diffusion, GaussianDiffusion):
            raise TypeError(f"diffusion is a {type(diffusion).__name__}; SpeeD takes a GaussianDiffusion")
        super().__init__(diffusion.num_timesteps)
        check_positive(k=k)
        check_numbers(lam=lam)
        check_integers(0, diffusion.num_timesteps, tau=tau)
        noise = 1 - diffusion.alphas_cumprod
        still = np.flatnonzero(_slope(np.sqrt(noise)) < STILL_SLOPE)
        if not len(still) or still[0] + 1 >= self.num_timesteps:
            raise ValueError(
                f"diffusion has {self.num_timesteps} timesteps; SpeeD needs one before the last at which the "
                f"noise grows by less than {STILL_SLOPE}"
            )
        self.meaningful = int(still[0]) + 1
        below = np.arange(self.num_timesteps) < tau
        likely = np.where(below, float(k), 1.0)
        growth = _slope(noise)
        change = (growth - growth.min()) / (growth.max() - growth.min())
        self.probability = torch.from_numpy(likely / likely.sum())
        self.weight = torch.from_numpy(np.where(below, (1 - lam) + (2 * lam - 1) * change, 1.0))
        self._tables = {torch.device("cpu"): (self.probability.cumsum(0), self.weight.float())}

    def dual(self, t: Tensor) -> Tensor:
        """The timestep that is drawn along with t, of its shape; that of 0 is m."""
        return torch.where(t < self.meaningful, self.meaningful - t, t - self.meaningful)

    def _timesteps(self, u: Tensor) -> Draw:
        if u.device not in self._tables:
            cumulative, weight = self._tables[torch.device("cpu")]
            self._tables[u.device] = cumulative.to(u.device), weight.to(u.device)
        cumulative, weight = self._tables[u.device]
        drawn = torch.searchsorted(cumulative, u[: len(u) // 2 + 1], right=True)
        drawn = drawn.clamp(max=self.num_timesteps - 1)  # the last sum may round below 1
        t = torch.cat([drawn, self.dual(drawn)])[: len(u)]
        return Draw(t, weight[t])


@dataclass(frozen=True)
class CurriculumState:
    """Where a curriculum is; a checkpoint keeps it by ``to_json``.

    stage: n, from 1. best: the lowest loss of the stage so far. waited: updates since.
    """

    stage: int = 1
    best: float = math.inf
    waited: int = 0

    def __post_init__(self) -> None:
        check_integers(stage=self.stage)
        check_integers(0, waited=self.waited)
        if isinstance(self.best, bool) or not isinstance(self.best, (int, float)) or math.isnan(self.best):
            raise ValueError(f"best is {self.best!r}; it must be a loss, or infinity where there is none yet")

    def to_json(self) -> dict[str, Any]:
        """For ``json.dumps``; best is None where it is infinite, which strict JSON cannot say."""
        return {**asdict(self), "best": None if self.best == math.inf else self.best}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> CurriculumState:
        """The state that ``to_json`` described."""
        if not isinstance(saved, dict) or set(saved) != {"stage", "best", "waited"}:
            raise ValueError(f"saved is {saved!r}; it must hold stage, best and waited, and nothing else")
        return cls(**{**saved, "best": math.inf if saved["best"] is None else saved["best"]})


class Curriculum(Sampler):
    """From easy to hard: training begins with the noisiest timesteps (Kim et al., arXiv 2403.10348).

    Of C clusters [floor((i - 1) N / C), floor(i N / C)), stage n trains on the n noisiest, uniformly. After
    each update: a loss below the best so far is the new best, and nothing has waited; any other, NaN too,
    adds 1 to ``waited``, and when that reaches the patience before stage C, the next stage begins without a
    best. Stage C is ordinary training. The paper leaves open whether the loss is smoothed; here it is taken
    as given.

    The state is a fold over the losses, so it can be had from a log alone, see :meth:`replay`.

    Args:
        num_timesteps: N. continuous: t in [0, 1] instead, with the same bounds divided by N.
        clusters: C. patience: updates without a better loss that end a stage.
    """

    def __init__(
        self, num_timesteps: int = 1000, continuous: bool = False, clusters: int = 20, patience: int = 200
    ) -> None:
        super().__init__(num_timesteps, continuous)
        check_integers(patience=patience)
        self.bounds = cluster_bounds(num_timesteps, clusters)
        self.clusters, self.patience = clusters, patience

    def lowest_timestep(self, state: CurriculumState) -> int:
        """The lowest timestep that a stage trains on, in [0, N)."""
        self._check_state(state)
        return self.bounds[self.clusters - state.stage]

    def after(self, state: CurriculumState, loss: float) -> CurriculumState:
        """The state after an update with that loss."""
        self._check_state(state)
        if not isinstance(loss, (int, float)) or isinstance(loss, bool):
            raise TypeError(f"loss is {loss!r}; it must be a number")
        if loss < state.best:
            return CurriculumState(state.stage, float(loss), 0)
        if state.waited + 1 >= self.patience and state.stage < self.clusters:
            return CurriculumState(state.stage + 1)
        return CurriculumState(state.stage, state.best, state.waited + 1)

    def replay(self, losses: Iterable[float], state: CurriculumState | None = None) -> CurriculumState:
        """The state after all these losses, from a state or from the beginning."""
        state = state or CurriculumState()
        for loss in losses:
            state = self.after(state, loss)
        return state

    def draw(self, u: Tensor, lowest: int | Tensor | None = None) -> Draw:
        """Timesteps for u ``[B]``, uniform over [lowest, N).

        ``lowest`` is :meth:`lowest_timestep`, or an int64 tensor ``[]`` with it on u's device: a CUDA graph
        then reads what each replay finds there.
        """
        u = _checked(u)
        if isinstance(lowest, Tensor):
            check_shape("lowest", lowest, ())
            check_dtype("lowest", lowest, torch.int64)
            check_device("lowest", lowest, u.device)
            check_range("lowest", lowest, self.num_timesteps, "the timesteps")
        else:
            check_integers(0, self.num_timesteps - 1, lowest=lowest)
        if self.continuous:
            return Draw(((lowest + u * (self.num_timesteps - lowest)) / self.num_timesteps).float())
        last = self.num_timesteps - 1
        return Draw((lowest + (u * (self.num_timesteps - lowest)).long()).clamp(max=last))

    def _check_state(self, state: CurriculumState) -> None:
        if not isinstance(state, CurriculumState):
            raise TypeError(f"state is a {type(state).__name__}; it must be a CurriculumState")
        if state.stage > self.clusters:
            raise ValueError(
                f"state has stage {state.stage}; it must be at most {self.clusters}, the clusters"
            )


def create_sampler(name: str, objective: Objective, **settings: Any) -> Sampler:
    """The sampler with a name, for an objective.

    Args:
        name: ``uniform``, ``logit-normal`` (settings ``mean``, ``std``), ``speed`` (``k``, ``lam``, ``tau``;
            not for ``flow``) or ``curriculum`` (``clusters``, ``patience``).

    Raises ``ValueError`` or ``TypeError`` for settings that do not fit together.
    """
    check_choice("name", name, SAMPLERS)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is a {type(objective).__name__}; it must be an Objective")
    known = {
        "uniform": (),
        "logit-normal": ("mean", "std"),
        "speed": ("k", "lam", "tau"),
        "curriculum": ("clusters", "patience"),
    }[name]
    for setting, value in settings.items():
        if setting not in known:
            wanted = ", ".join(known) or "none"
            raise ValueError(f"{setting} is {value!r}; the settings of {name} are: {wanted}")
    if name == "speed":
        if not isinstance(objective, DiffusionObjective):
            raise ValueError(
                f"name is 'speed'; {objective.name} has no noise schedule whose growth SpeeD could follow, "
                "use uniform, logit-normal or curriculum"
            )
        return SpeeD(objective.diffusion, **settings)
    kind = {"uniform": Sampler, "logit-normal": LogitNormal, "curriculum": Curriculum}[name]
    return kind(objective.num_timesteps, objective.continuous, **settings)


def _slope(values: np.ndarray) -> np.ndarray:
    """Growth per timestep: central differences, one-sided at the ends."""
    if len(values) < 2:
        raise ValueError(f"diffusion has {len(values)} timesteps; SpeeD needs at least 2")
    return np.gradient(values)


def _checked(u: Tensor) -> Tensor:
    """u ``[B]`` in float64, in which u N is exact: then uniform u give uniform integers."""
    check_tensors(u=u)
    check_shape("u", u, ("B",))
    check_dtype("u", u, torch.float32, torch.float64)
    check_range("u", u, 1, "uniform numbers")
    return u.double()
