"""What the routers of a model do, in numbers: which experts each timestep uses, and how near the prior is.

Switch-DiT (Park et al., ECCV 2024, arXiv 2403.09176) routes by the timestep alone, so the routing of a model
is a table over its N timesteps. The paper wants similar timesteps to share experts and different ones to have
their own, and reports that each block has an expert that all timesteps share (its abstract). The numbers here
show how far that is so.

Legend: L blocks, N timesteps, M experts in a block, k of them chosen at a timestep. Entropies and divergences
are in nats, as the diffusion prior loss is; a nat is 1.44 bits.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switch_dit.files import write_whole
from switch_dit.model import SwitchDiT
from switch_moe.ops._checks import check_dtype, check_flags, check_shape, check_tensors
from switch_moe.reference.diffusion_prior import jensen_shannon

_IN_JSON = 101  # the affinity in the file is that of so many timesteps, evenly spread


class Segment(NamedTuple):
    """A range of timesteps at which a block chooses the same experts."""

    first: int
    last: int  # included
    experts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Inspection:
    """The routing of a model at all of its timesteps, and what follows from it. Tensors are on the CPU.

    Args:
        probs: float64 ``[L, N, M]``, the routers' probabilities; those of a block and timestep sum to 1.
        chosen: bool ``[L, N, M]``, the k likeliest experts, the same k everywhere. Their probabilities are
            the gates, which are not normalised again.
        prior: bool ``[N, L*M]``, the experts that the diffusion prior has in use at each timestep, k*L of
            them; its columns are matched to the experts, block after block.
        continuous: the model's time is continuous, as that of a flow; timestep t is then the time t / N.

    Raises ``ValueError`` or ``TypeError`` for tensors that are no routing.
    """

    probs: Tensor
    chosen: Tensor
    prior: Tensor
    continuous: bool = False

    def __post_init__(self) -> None:
        probs, chosen, prior = self.probs, self.chosen, self.prior
        check_flags(continuous=self.continuous)
        check_tensors(probs=probs, chosen=chosen, prior=prior)
        check_shape("probs", probs, ("L", "N", "M"))
        check_dtype("probs", probs, torch.float64)
        if not probs.numel():
            raise ValueError(f"probs has shape {tuple(probs.shape)}; L, N and M must be at least 1")
        for name, tensor, shape in (
            ("chosen", chosen, tuple(probs.shape)),
            ("prior", prior, (self.timesteps, self.blocks * self.experts)),
        ):
            check_shape(name, tensor, shape)
            check_dtype(name, tensor, torch.bool)
        sums = probs.sum(-1)
        if not bool((probs >= 0).all() & ((sums - 1).abs() < 1e-4).all()):  # NaN too
            raise ValueError(
                f"probs holds numbers from {probs.min().item():g} to {probs.max().item():g} and sums from "
                f"{sums.min().item():g} to {sums.max().item():g}; each row of M must be probabilities"
            )
        fewest, most = (bound.item() for bound in chosen.sum(-1).aminmax())
        if fewest != most or fewest == 0:
            raise ValueError(
                f"chosen has rows with {fewest} and rows with {most} experts; each must have the same number "
                "of them, at least 1"
            )
        if bool((probs.masked_fill(~chosen, 2).amin(-1) < probs.masked_fill(chosen, -1).amax(-1)).any()):
            raise ValueError("chosen leaves out an expert that is likelier than a chosen one")
        fewest, most = (bound.item() for bound in prior.sum(-1).aminmax())
        if fewest != most or fewest != self.top_k * self.blocks:
            raise ValueError(
                f"prior has rows with {fewest} to {most} experts; each must have k*L, "
                f"{self.top_k * self.blocks}"
            )

    @property
    def blocks(self) -> int:
        return self.probs.shape[0]

    @property
    def timesteps(self) -> int:
        return self.probs.shape[1]

    @property
    def experts(self) -> int:
        return self.probs.shape[2]

    @property
    def top_k(self) -> int:
        return int(self.chosen[0, 0].sum())

    @property
    def gates(self) -> Tensor:
        """float64 ``[L, N, M]``: what an expert's output is multiplied by, 0 where it is not chosen."""
        return self.probs * self.chosen

    @property
    def usage(self) -> Tensor:
        """float64 ``[L, M]``: the share of the timesteps at which an expert is chosen."""
        return self.chosen.double().mean(1)

    @property
    def shared(self) -> Tensor:
        """bool ``[L, M]``: the experts that all timesteps share."""
        return self.chosen.all(1)

    @property
    def unused(self) -> Tensor:
        """bool ``[L, M]``: the experts that no timestep uses."""
        return ~self.chosen.any(1)

    @property
    def affinity(self) -> Tensor:
        """float64 ``[N, N]``: the share of their experts that two timesteps have in common.

        With S(t) the k*L experts in use at t, over all blocks, it is ``|S(t) & S(t')| / (k*L)``: 1 for the
        same experts everywhere. The diffusion prior is a target for just this, see :attr:`prior_affinity`.
        """
        return _affinity(self.chosen.transpose(0, 1).flatten(1))

    @property
    def prior_affinity(self) -> Tensor:
        """float64 ``[N, N]``: the affinity that the diffusion prior wants. No matching changes it."""
        return _affinity(self.prior)

    @property
    def least_affinity(self) -> float:
        """No affinity can be below this: of M experts two choices of k have at least 2k - M in common."""
        return max(0, 2 * self.top_k - self.experts) / self.top_k

    @property
    def entropy(self) -> Tensor:
        """float64 ``[L, N]``, nats: the entropy of the router's probabilities.

        It is 0 where one expert has everything and log M where all M are alike.
        """
        return torch.special.entr(self.probs).sum(-1)

    @property
    def gate_entropy(self) -> Tensor:
        """float64 ``[L, N]``, nats: the entropy of the k gates, normalised to sum to 1.

        It is 0 where one gate is all that counts, and for k = 1; it is log k where the gates are alike.
        """
        gates = self.gates
        return torch.special.entr(gates / gates.sum(-1, keepdim=True)).sum(-1)

    @property
    def distance_by_block(self) -> Tensor:
        """float64 ``[L, N]``, nats: what each block adds to :attr:`distance`."""
        return self._distance(self.probs)

    @property
    def distance(self) -> Tensor:
        """float64 ``[N]``, nats: the Jensen-Shannon divergence of the routers and the diffusion prior.

        It is the diffusion prior loss of Switch-DiT at each timestep: its mean over timesteps is that of
        :meth:`switch_moe.DiffusionPrior.loss`. It is at least 0 and at most log 2.
        """
        return self.distance_by_block.sum(0)

    @property
    def even_distance(self) -> float:
        """The mean distance, nats, of routers that give each expert 1 / M, as fresh ones nearly do."""
        even = torch.full_like(self.probs, 1 / self.experts)
        return self._distance(even).sum(0).mean().item()

    def _distance(self, probs: Tensor) -> Tensor:
        """The divergence at each block and timestep, ``[L, N]``, of probabilities ``[L, N, M]``."""
        wanted = self.prior.unflatten(1, (self.blocks, self.experts)).transpose(0, 1)  # [L, N, M]
        q, u = probs / self.blocks, wanted.double() / (self.top_k * self.blocks)
        return torch.vmap(torch.vmap(jensen_shannon))(q[:, :, None], u[:, :, None])

    @property
    def agreement(self) -> float:
        """The share of the chosen experts that the prior has in use at the same timestep."""
        both = self.chosen.transpose(0, 1).flatten(1) & self.prior
        return (both.sum() / self.chosen.sum()).item()

    def segments(self) -> list[list[Segment]]:
        """The ranges of timesteps with the same chosen experts, for each block, in order."""
        found = []
        for chosen in self.chosen:  # [N, M]
            changes = (chosen[1:] != chosen[:-1]).any(-1).nonzero().flatten() + 1
            firsts = [0, *changes.tolist()]
            lasts = [*(first - 1 for first in firsts[1:]), self.timesteps - 1]
            found.append(
                [Segment(i, j, tuple(_numbers(chosen[i]))) for i, j in zip(firsts, lasts, strict=True)]
            )
        return found

    def summary(self) -> dict[str, float | int]:
        """The few numbers that say most; entropies and distances in nats, means over blocks and timesteps."""
        return {
            "shared_experts": int(self.shared.sum()),
            "unused_experts": int(self.unused.sum()),
            "segments": sum(map(len, self.segments())),
            "entropy": self.entropy.mean().item(),
            "largest_entropy": math.log(self.experts),
            "gate_entropy": self.gate_entropy.mean().item(),
            "largest_gate_entropy": math.log(self.top_k),
            "affinity_of_ends": self.affinity[0, -1].item(),
            "prior_affinity_of_ends": self.prior_affinity[0, -1].item(),
            "least_affinity": self.least_affinity,
            "prior_distance": self.distance.mean().item(),
            "prior_distance_of_even_gates": self.even_distance,
            "prior_agreement": self.agreement,
        }

    def to_json(self) -> str:
        """All of it as strict JSON, a key on each line; numbers have six decimals.

        ``gates`` ``[L][N][M]`` are 0 where an expert is not chosen. ``affinity`` is that of the timesteps in
        ``affinity_timesteps``, at most 101; all of it follows from the segments.
        """
        some = torch.linspace(0, self.timesteps - 1, min(self.timesteps, _IN_JSON)).round().long()
        by_block = zip(
            _numbers_by_row(self.shared), _numbers_by_row(self.unused), _rounded(self.usage), self.segments(),
            _rounded(self.entropy.mean(1)), _rounded(self.gate_entropy.mean(1)),
            _rounded(self.distance_by_block.mean(1)), strict=True,
        )  # fmt: skip
        keys = ("shared_experts", "unused_experts", "usage", "segments", "entropy", "gate_entropy",
                "prior_distance")  # fmt: skip
        content: dict[str, Any] = {
            "blocks": self.blocks, "experts": self.experts, "top_k": self.top_k,
            "timesteps": self.timesteps, "continuous": self.continuous,
            "units": {"entropy": "nats", "prior_distance": "nats", "usage": "share of the timesteps",
                      "affinity": "share of the experts in use that two timesteps have in common"},
            "in_words": " ".join(self.in_words()),
            "summary": {key: round(value, 6) for key, value in self.summary().items()},
            "by_block": [dict(zip(keys, values, strict=True)) for values in by_block],
            "prior_distance": _rounded(self.distance),
            "entropy": _rounded(self.entropy), "gate_entropy": _rounded(self.gate_entropy),
            "affinity_timesteps": some.tolist(),
            "affinity": _rounded(self.affinity[some][:, some]),
            "prior_affinity": _rounded(self.prior_affinity[some][:, some]),
            "gates": _rounded(self.gates),
        }  # fmt: skip
        for block in content["by_block"]:
            block["segments"] = [segment._asdict() for segment in block["segments"]]
        lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def write_json(self, path: Path | str) -> None:
        """Writes :meth:`to_json` as a whole; ``OSError`` where it cannot be written."""
        write_whole(Path(path), self.to_json().encode())

    def time(self, timestep: int) -> str:
        """A timestep as it is told: its number, or in continuous time its place between 0 and 1."""
        return f"{timestep / self.timesteps:.3g}" if self.continuous else str(timestep)

    def _range(self, segment: Segment) -> str:
        first, last = self.time(segment.first), self.time(segment.last)
        return first if segment.first == segment.last else f"{first}-{last}"

    def describe(self) -> str:
        """A table of the blocks and what it adds up to, for a screen."""
        rows = [("block", "always", "never", "changes", "entropy", "to prior", "experts by timestep")]
        by_block = zip(
            _numbers_by_row(self.shared), _numbers_by_row(self.unused), self.segments(),
            self.entropy.mean(1).tolist(), self.distance_by_block.mean(1).tolist(), strict=True,
        )  # fmt: skip
        for block, (shared, unused, segments, entropy, distance) in enumerate(by_block):
            ranges = [f"{self._range(segment)}: {_listed(segment.experts)}" for segment in segments[:3]]
            if len(segments) > 3:
                ranges.append(f"{len(segments) - 3} more")
            rows.append((
                str(block), _listed(shared), _listed(unused), str(len(segments) - 1), f"{entropy:.3f}",
                f"{distance:.4f}", "; ".join(ranges),
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        lines = ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]
        return "\n".join([
            *lines,
            "",
            "always, never: experts that the block chooses at all timesteps, and at none",
            "changes: how often the choice changes from a timestep to the next",
            f"entropy: of the router, in nats; 0 is one expert alone, {math.log(self.experts):.3f} all alike",
            "to prior: what the block adds to the distance to the diffusion prior, in nats",
            "",
            *self.in_words(),
        ])  # fmt: skip

    def in_words(self) -> list[str]:
        """Sentences that say what the numbers add up to."""
        said, total = self.summary(), self.blocks * self.experts
        first, last = self.time(0), self.time(self.timesteps - 1)
        least = f"; less than {self.least_affinity:.0%} is impossible" if self.least_affinity else ""
        return [
            f"Each of {self.blocks} blocks chooses {self.top_k} of its {self.experts} experts at each of "
            f"{self.timesteps} {'times' if self.continuous else 'timesteps'}, from {first}, the clean image, "
            f"to {last}, noise.",
            f"Experts chosen at every timestep: {said['shared_experts']} of {total}; at none: "
            f"{said['unused_experts']}.",
            f"{'Times' if self.continuous else 'Timesteps'} {first} and {last} have "
            f"{said['affinity_of_ends']:.0%} of their experts in common. "
            f"The diffusion prior, a fixed plan that training pulls the routing towards, wants "
            f"{said['prior_affinity_of_ends']:.0%}{least}.",
            f"The distance to it is {said['prior_distance']:.4f} nats, where 0 is none and gates that are "
            f"all alike have {self.even_distance:.4f}.",
        ]


@torch.no_grad()
def inspect_model(model: SwitchDiT, *, continuous: bool = False) -> Inspection:
    """The routing of a model at its N timesteps, computed by its own routers in float32.

    The prior's columns are matched to the model's experts as in training; ties break in the order of the
    columns, so that the same weights give the same numbers. No random state is touched.

    Args:
        model: with ``routing="switch"``, on any device.
        continuous: whether its objective has continuous time (:class:`switch_dit.objectives.Objective`). It
            is then looked at at the times 0, 1 / N, ..., (N - 1) / N, the rows of the prior's table.

    Raises:
        TypeError: model is no SwitchDiT. ValueError: it has no routers, or their outputs are not finite.
    """
    if not isinstance(model, SwitchDiT):
        raise TypeError(f"model is a {type(model).__name__}; it must be a SwitchDiT")
    if model.routing != "switch":
        raise ValueError(
            f"model has routing {model.routing!r} and no routers to look at; it must be a model with 'switch'"
        )
    routing = model.route_all_timesteps()
    probs, selected = routing.probs, routing.selected()
    if not bool(probs.isfinite().all()):
        raise ValueError("model has routers whose probabilities are not finite; take weights that are")
    columns = torch.arange(selected.shape[1], device=selected.device).repeat(2, 1)
    prior = model.prior.table[:, model.prior.match(selected, ties=columns)]
    chosen = selected.unflatten(1, (-1, probs.shape[2])).transpose(0, 1)  # [L, N, M]
    return Inspection(probs.cpu().double(), chosen.cpu() > 0, prior.cpu() > 0, continuous)


def _affinity(in_use: Tensor) -> Tensor:
    """The share of the ones of a row that two rows of a 0/1 table ``[N, L*M]`` have in common."""
    in_use = in_use.double()
    return in_use @ in_use.t() / in_use[0].sum()


def _numbers(flags: Tensor) -> list[int]:
    return flags.nonzero().flatten().tolist()


def _numbers_by_row(flags: Tensor) -> list[list[int]]:
    return [_numbers(row) for row in flags]


def _listed(experts: list[int] | tuple[int, ...]) -> str:
    return " ".join(map(str, experts)) or "-"


def _rounded(values: Tensor) -> Any:
    """Nested lists of numbers with six decimals."""
    return values.round(decimals=6).tolist()
