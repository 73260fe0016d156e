"""Weights of the official Switch-DiT and DTR code, to and from SwitchDiT."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from switch_dit.model import dtr_mask
from switch_moe import DiffusionPrior

_NAMES = {
    "f_gate.1.weight": "router_weight",
    "f_gate.1.bias": "router_bias",
    "experts.w": "weight",
    "experts.b": "bias",
}
_OFFICIAL_NAMES = {ours: official for official, ours in _NAMES.items()}


def convert_official_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official names to SwitchDiT's. Tables that SwitchDiT computes itself are left out."""
    converted = {}
    for name, value in state_dict.items():
        if name == "full_time" or name.endswith("_unit_mapping"):
            continue
        router = re.fullmatch(r"routers\.(\d+)\.(.+)", name)
        if router is None:
            converted[name] = value
        elif router[2] in _NAMES:
            converted[f"blocks.{router[1]}.moe.{_NAMES[router[2]]}"] = value
        else:
            raise ValueError(
                f"state_dict holds {name!r}; routers of the official code have {', '.join(_NAMES)}"
            )
    return converted


def convert_to_official_state_dict(
    state_dict: Mapping[str, Tensor], routing: str, top_k: int = 2, num_timesteps: int = 1000
) -> dict[str, Tensor]:
    """From the names of SwitchDiT to the official ones, with the tables the official code stores."""
    converted = {}
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    for name, value in state_dict.items():
        moe = re.fullmatch(r"blocks\.(\d+)\.moe\.(.+)", name)
        converted[f"routers.{moe[1]}.{_OFFICIAL_NAMES[moe[2]]}" if moe else name] = value
    if routing == "switch":
        num_experts = state_dict["blocks.0.moe.router_weight"].shape[0]
        converted["full_time"] = torch.arange(num_timesteps)
        converted["prior._unit_mapping"] = DiffusionPrior(depth, num_experts, top_k, num_timesteps).table
    elif routing == "dtr":
        mask = dtr_mask(num_timesteps, state_dict["pos_embed"].shape[-1])
        converted |= {f"routers.{i}._unit_mapping": mask.clone() for i in range(depth)}
    return converted
