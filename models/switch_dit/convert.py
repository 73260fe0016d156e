"""Weights of the official Switch-DiT and DTR code, to and from SwitchDiT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from switch_dit.tables import dtr_mask
from switch_moe import DiffusionPrior

_EXPERT_NAMES = {"experts.w": "weight", "experts.b": "bias"}
_ROUTER_NAMES = {"f_gate.1.weight": "weight", "f_gate.1.bias": "bias"}


def without_wrappers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict without the prefixes that DDP (``module.``) and torch.compile (``_orig_mod.``) add."""
    for name in state_dict:
        if not isinstance(name, str):
            raise TypeError(f"state_dict holds the key {name!r}; every key must be a name")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state_dict.items()}


def plain_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state_dict, or of the moving average ``ema`` in a whole training checkpoint.

    Prefixes of DDP and torch.compile are cut. ``ValueError`` or ``TypeError`` for what is no state_dict.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is a {type(state_dict).__name__}; it must be a mapping of names to tensors"
        )
    for name in ("ema", "model"):
        if isinstance(state_dict.get(name), Mapping):
            state_dict = state_dict[name]
            break
    state_dict = without_wrappers(state_dict)
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state_dict holds {name!r}, a {type(value).__name__}; every entry must be a tensor"
            )
    return state_dict


def convert_official_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The official names to SwitchDiT's. Tables that SwitchDiT computes itself are left out.

    ``state_dict`` may also be a whole checkpoint of the official training script: then its moving average,
    ``ema``, is taken. Prefixes of DDP and torch.compile are cut. ``ValueError`` or ``TypeError`` for what is
    no state_dict.
    """
    state_dict = plain_tensors(state_dict)
    converted = {}
    routers: dict[str, dict[int, Tensor]] = {}
    for name, value in state_dict.items():
        if name == "full_time" or name.endswith("_unit_mapping"):
            continue
        router = re.fullmatch(r"routers\.(\d{1,6})\.(.+)", name)
        if router is None:
            converted[name] = value
        elif router[2] in _EXPERT_NAMES:
            converted[f"blocks.{router[1]}.moe.{_EXPERT_NAMES[router[2]]}"] = value
        elif router[2] in _ROUTER_NAMES:
            routers.setdefault(_ROUTER_NAMES[router[2]], {})[int(router[1])] = value
        else:
            known = ", ".join([*_ROUTER_NAMES, *_EXPERT_NAMES])
            raise ValueError(f"state_dict holds {name!r}; routers of the official code have {known}")
    for kind, of_block in routers.items():
        if sorted(of_block) != list(range(len(of_block))):
            raise ValueError(f"state_dict holds the routers' {kind} of the blocks {sorted(of_block)} only")
        blocks = [of_block[i] for i in range(len(of_block))]
        if len({(block.shape, block.dtype) for block in blocks}) > 1:
            raise ValueError(
                f"state_dict holds routers of several shapes or types: their {kind} must be alike"
            )
        converted[f"router.{kind}"] = torch.stack(blocks)
    return converted


def convert_to_official_state_dict(
    state_dict: Mapping[str, Tensor], routing: str, top_k: int = 2, num_timesteps: int = 1000
) -> dict[str, Tensor]:
    """From the names of SwitchDiT to the official ones, with the tables the official code stores."""
    converted = {}
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    for name, value in state_dict.items():
        expert = re.fullmatch(r"blocks\.(\d+)\.moe\.(weight|bias)", name)
        router = re.fullmatch(r"router\.(weight|bias)", name)
        if router:
            for i, of_block in enumerate(value):
                converted[f"routers.{i}.f_gate.1.{router[1]}"] = of_block.clone()
        else:
            converted[f"routers.{expert[1]}.experts.{expert[2][0]}" if expert else name] = value
    if routing == "switch":
        num_experts = state_dict["router.weight"].shape[1]
        converted["full_time"] = torch.arange(num_timesteps)
        converted["prior._unit_mapping"] = DiffusionPrior(depth, num_experts, top_k, num_timesteps).table
    elif routing == "dtr":
        mask = dtr_mask(num_timesteps, state_dict["pos_embed"].shape[-1])
        converted |= {f"routers.{i}._unit_mapping": mask.clone() for i in range(depth)}
    return converted
