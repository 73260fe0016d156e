"""Weights of DiT-MoE, EC-DIT and DiffMoE in the names of their codes, to and from those of SwitchDiT.

``dit_moe``: feizc/DiT-MoE. ``ec_dit`` and ``diffmoe``: KwaiVGI/DiffMoE, which has both. The layers of an
expert are ``gate_proj, up_proj, down_proj`` there with SwiGLU and ``fc1, fc2`` with GELU, and all experts of
a block are one tensor here, transposed: ``weight_in [M, D, ..]`` and ``weight_out [M, .., D]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switch_dit.model import SwitchDiT
from switch_dit.systems import options_of
from switch_moe import DiffMoE, TokenMoE
from switch_moe.ops._checks import check_choice, check_flags


class Names(NamedTuple):
    """What a code calls the mixture of a block, and its router's weight."""

    mixture: str
    router: str


NAMES = {
    "dit_moe": Names("moe", "gate.weight"),
    "ec_dit": Names("mlp", "gate_weight"),
    "diffmoe": Names("mlp", "gate_weight"),
}


class Flow(NamedTuple):
    """How a code has rectified flow: all embed a time in [0, 1], a SwitchDiT takes N times that from data."""

    sign: int
    """-1 where the code's velocity goes from noise to data, and its time is 1 at the data."""

    def time(self, num_timesteps: int) -> dict[str, float]:
        """The settings of a SwitchDiT that embeds its timesteps as the code does."""
        scale, offset = (1.0, 0.0) if self.sign == 1 else (-1.0, 1.0)
        return {"time_scale": scale / num_timesteps, "time_offset": offset}


FLOWS = {"sit": Flow(-1), "dit_moe": Flow(1), "ec_dit": Flow(-1), "diffmoe": Flow(-1)}
_PREDICTOR = {
    f"capacity_predictor.{theirs}.{kind}": f"predictor.{ours}.{kind}"
    for theirs, ours in ((0, "first"), (2, "last"))
    for kind in ("weight", "bias")
} | {"expert_threshold": "predictor.threshold"}
_SHARED = {
    "weight_in": "shared_in", "bias_in": "shared_bias_in", "weight_out": "shared_out",
    "bias_out": "shared_bias_out",
}  # fmt: skip

# What the codes compute, of the options that change what a model computes. Others may be anything.
_SWIGLU, _GELU = {"activation": "swiglu", "bias": False}, {"activation": "gelu", "bias": True}
_COMPUTED = {
    "dit_moe": {"normalise": False, "every": 1, **_SWIGLU},
    "ec_dit": {"pool": 1, "router_input": "modulated"},
    "diffmoe": {"router_input": "modulated"},
}


def from_official_names(
    system: str, state: Mapping[str, Tensor], top_k: int | None, capacity: float | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict in SwitchDiT's names, and settings of a SwitchDiT, with ``inner_size``, of an expert.

    ``ValueError`` names keys of a mixture that are missing or unknown; those of all else stay as they are.
    """
    names, found = NAMES[system], dict(state)
    settings: dict[str, Any] = {}
    blocks = sorted({int(m[1]) for m in map(re.compile(r"blocks\.(\d{1,6})\.").match, state) if m})
    with_mixture = []
    for number in blocks:
        prefix = f"blocks.{number}.{names.mixture}."
        dense = f"{prefix}fc1.weight" in state
        if dense and system != "dit_moe":
            continue
        with_mixture.append(number)
        own, options, sizes = mixture_from_official(system, found, prefix)
        found |= {f"blocks.{number}.mlp.moe.{name}": value for name, value in own.items()}
        settings = settings or {"routing": system, **sizes, "mixture": options}
    every = with_mixture[0] + 1 if with_mixture else 0
    if not with_mixture or with_mixture != [number for number in blocks if number % every == every - 1]:
        raise ValueError(
            f"state_dict holds mixtures in the blocks {with_mixture}; they must be at equal steps"
        )
    given = {} if capacity is None else {"capacity": capacity}
    settings["mixture"] = options_of(system, {**settings["mixture"], "every": every, **given})
    return found, settings | {"top_k": 2 if top_k is None else top_k}


def mixture_from_official(
    system: str, state: dict[str, Tensor], prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Takes a mixture, whose names begin with ``prefix``, out of a state_dict.

    Returns its tensors by the names of a TokenMoE, the options of the system that they tell, and
    ``num_experts`` and ``inner_size``. ``ValueError`` names a key that is missing or unknown.
    """
    return _Part(prefix, state).own(system)


class _Part:
    """The entries of a state_dict under a prefix, which are taken out of it one by one."""

    def __init__(self, prefix: str, state: dict[str, Tensor]) -> None:
        names = [name for name in state if name.startswith(prefix)]
        self.prefix, self.left = prefix, {name.removeprefix(prefix): state.pop(name) for name in names}

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise ValueError(f"state_dict lacks {self.prefix + name!r}")
        return self.left.pop(name)

    def own(self, system: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Tensors by the names of a TokenMoE, options of the system, and sizes of the experts."""
        own = {"router.weight": self.take(NAMES[system].router)}
        gated = any(name.endswith("gate_proj.weight") for name in self.left)
        matches = (re.match(r"experts\.(\d{1,6})\.", name) for name in self.left)
        count = max((int(match[1]) for match in matches if match), default=0) + 1
        experts = [self._mlp(f"experts.{number}", gated) for number in range(count)]
        for name, first in experts[0].items():
            parts = [expert[name] for expert in experts]
            if any(part.shape != first.shape for part in parts):
                raise ValueError(f"state_dict holds {self.prefix}experts of several shapes")
            own[name] = torch.stack(parts)
        _, hidden_size, width = own["weight_in"].shape
        options: dict[str, Any] = dict(_SWIGLU if gated else _GELU)
        options["shared_ratio"] = 0.0
        if any(name.startswith("shared_experts.") for name in self.left):
            shared = self._mlp("shared_experts", gated)
            own |= {_SHARED[name]: value for name, value in shared.items()}
            options["shared_ratio"] = ratio(own["shared_out"].shape[0], hidden_size)
        if system == "diffmoe":
            own |= {ours: self.take(theirs) for theirs, ours in _PREDICTOR.items()}
            options["decay"] = round(float(self.take("ema_decay")), 6)  # a float32 there
        if self.left:
            raise ValueError(f"state_dict has unknown {self.prefix}{min(self.left)}")
        return own, options, {"num_experts": count, "inner_size": width // (2 if gated else 1)}

    def _mlp(self, owner: str, gated: bool) -> dict[str, Tensor]:
        """The two layers of an expert as rows times columns."""
        if gated:
            first = [self.take(f"{owner}.{name}_proj.weight") for name in ("gate", "up")]
            return {
                "weight_in": torch.cat(first).t(),
                "weight_out": self.take(f"{owner}.down_proj.weight").t(),
            }
        return {
            "weight_in": self.take(f"{owner}.fc1.weight").t(), "bias_in": self.take(f"{owner}.fc1.bias"),
            "weight_out": self.take(f"{owner}.fc2.weight").t(), "bias_out": self.take(f"{owner}.fc2.bias"),
        }  # fmt: skip


def ratio(width: int, size: int) -> float:
    """The smallest r above about ``width / size`` for which ``int(r * size)`` is ``width``."""
    found = width / size
    return math.nextafter(found, math.inf) if int(size * found) < width else found


def to_official(model: SwitchDiT, *, unused_channels: bool = True) -> dict[str, Tensor]:
    """The state_dict of a SwitchDiT with routing ``dit_moe``, ``ec_dit`` or ``diffmoe`` for the code of it.

    The model must embed time as that code does: as :func:`switch_dit.upcycle.from_official` sets it for
    rectified flow, or unscaled, for timesteps in [0, N). A velocity is turned round where the code has it the
    other way.

    Args:
        model: with all its weights. unused_channels: whether the last layer of a flow gets a second half of
            channels, zeros, as those codes build it by default without using it.

    ``ValueError`` or ``TypeError`` for a model that the code cannot compute.
    """
    if not isinstance(model, SwitchDiT):
        raise TypeError(f"model is a {type(model).__name__}; it must be a SwitchDiT")
    check_flags(unused_channels=unused_channels)
    check_choice("the routing of model", model.routing, tuple(NAMES))
    names, settings, options = NAMES[model.routing], model.settings, model.options
    for name, wanted in _COMPUTED[model.routing].items():
        if options[name] != wanted:
            raise ValueError(f"model has {name} {options[name]!r}; {model.routing}'s code has {wanted!r}")
    kind = {name: options[name] for name in _GELU}
    if kind not in (_GELU, _SWIGLU):
        raise ValueError(
            f"model has experts with activation {kind['activation']!r} and bias {kind['bias']}; the code of "
            f"{model.routing} has 'gelu' with and 'swiglu' without"
        )
    flow = FLOWS[model.routing]
    of_flow, of_steps = flow.time(model.num_timesteps), {"time_scale": 1.0, "time_offset": 0.0}
    time = {name: settings[name] for name in of_flow}
    for name, wanted in (("time", (of_flow, of_steps)), ("frequency_shift", (0,))):
        value = time if name == "time" else settings[name]
        if value not in wanted:
            texts = " or ".join(str(one) for one in wanted)
            raise ValueError(f"model embeds timesteps with {name} {value}; the code has {texts}")
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for number, block in enumerate(model.blocks):
        moe = getattr(block.mlp, "moe", None)
        if moe is not None:
            own = {name: state.pop(f"blocks.{number}.mlp.moe.{name}") for name in moe.state_dict()}
            prefix = f"blocks.{number}.{names.mixture}."
            official = mixture_to_official(model.routing, moe, own)
            state |= {prefix + name: value for name, value in official.items()}
    if time == of_flow:
        _to_official_velocity(state, model, flow.sign, unused_channels)
    return {name: value.contiguous() for name, value in state.items()}


def mixture_to_official(system: str, moe: TokenMoE, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of ``moe``'s state_dict (weights, or their gradients) by those of a code."""
    found = {NAMES[system].router: own["router.weight"]}
    gated = moe.activation == "swiglu"
    for number in range(moe.num_experts):
        parts = {name: own[name][number] for name in ("weight_in", "bias_in", "weight_out", "bias_out")
                 if name in own}  # fmt: skip
        found |= _official_mlp(f"experts.{number}", parts, gated)
    shared = {name: own[ours] for name, ours in _SHARED.items() if ours in own}
    if shared:
        found |= _official_mlp("shared_experts", shared, gated)
    if isinstance(moe, DiffMoE):
        found |= {theirs: own[ours] for theirs, ours in _PREDICTOR.items()}
        found["ema_decay"] = torch.tensor([moe.predictor.decay])
    return found


def _official_mlp(owner: str, parts: dict[str, Tensor], gated: bool) -> dict[str, Tensor]:
    if gated:
        gate, up = parts["weight_in"].t().chunk(2)
        layers = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": parts["weight_out"].t()}
    else:
        layers = {
            "fc1.weight": parts["weight_in"].t(), "fc1.bias": parts["bias_in"],
            "fc2.weight": parts["weight_out"].t(), "fc2.bias": parts["bias_out"],
        }  # fmt: skip
    return {f"{owner}.{name}": value for name, value in layers.items()}


def _to_official_velocity(
    state: dict[str, Tensor], model: SwitchDiT, sign: int, unused_channels: bool
) -> None:
    """Changes the last layer: the sign of its output, and channels that the code does not use."""
    for kind in ("weight", "bias"):
        name = f"final_layer.linear.{kind}"
        value = sign * state[name]
        if unused_channels:
            patches = value.unflatten(0, (model.patch_size**2, -1))  # rows are patch, patch, channels
            value = torch.cat([patches, torch.zeros_like(patches)], 1).flatten(0, 1)
        state[name] = value
