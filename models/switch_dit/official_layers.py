"""Weights of single layers and blocks of other codes, to and from the modules here.

``mode``: a block of intuitive-robots/MoDE_Diffusion_Policy, as :class:`switch_dit.mode.ModeBlock`.
``evomoe``: the gate of codecaution/EvoMoE and experts of two layers, as :class:`switch_moe.DenseToSparseMoE`.
``nucleus``: the NucleusMoELayer of diffusers, as :class:`switch_moe.FallingCapacityMoE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switch_dit.convert import plain_tensors
from switch_dit.mode import ModeBlock
from switch_moe import DenseToSparseMoE, FallingCapacityMoE, NoiseMoE
from switch_moe.ops._checks import check_choice

State = dict[str, Tensor]


class _Layer(NamedTuple):
    """How a system's weights are read and written. ``{e}`` in a name is the number of an expert."""

    names: tuple[str, ...]
    read: Callable[[State], State]
    write: Callable[[State], State]
    make: Callable[[State, dict[str, Any]], nn.Module]


def layer_from_official(system: str, state_dict: Mapping[str, Any], **settings: Any) -> nn.Module:
    """The module here with weights of another code.

    Args:
        system: ``mode``, ``evomoe`` or ``nucleus``, see above. state_dict: names to tensors.
        settings: what the weights do not tell, of the constructor of :class:`switch_moe.NoiseMoE` and
            ``causal`` (True as in MoDE), of :class:`switch_moe.DenseToSparseMoE` or of
            :class:`switch_moe.FallingCapacityMoE`.

    Raises ``ValueError`` or ``TypeError`` for an argument that does not fit. Keys that are missing or unknown
    are named.
    """
    state = layer_state(system, state_dict)
    module = _LAYERS[system].make(state, settings)
    module.to(next(iter(state.values())).dtype)
    own = module.state_dict()
    for name, value in state.items():
        if value.shape != own[name].shape:
            wanted = tuple(own[name].shape)
            raise ValueError(f"state_dict makes a {name} of shape {tuple(value.shape)}; it must be {wanted}")
    module.load_state_dict(state)
    return module


def layer_state(system: str, state_dict: Mapping[str, Any]) -> State:
    """The state_dict of the module here from the official one; errors as :func:`layer_from_official`."""
    check_choice("system", system, _LAYERS)
    layer, state = _LAYERS[system], plain_tensors(state_dict)
    known = re.compile("|".join(re.escape(name).replace(r"\{e\}", r"\d{1,6}") for name in layer.names))
    unknown = sorted(name for name in state if not known.fullmatch(name))
    experts = _experts(layer, state)
    missing = [name for name in _numbered(layer.names, experts) if name not in state]
    for text, names in (("lacks", missing), ("has the unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"state_dict {text} {names[0]!r}{more}; it is not a layer of {system!r}")
    return layer.read({name: state[name] for name in _numbered(layer.names, experts)})


def layer_to_official(system: str, module: nn.Module) -> State:
    """The weights of a module here, which :func:`layer_from_official` makes, by their official names."""
    check_choice("system", system, _LAYERS)
    return {name: value.contiguous() for name, value in _LAYERS[system].write(module.state_dict()).items()}


def _experts(layer: _Layer, state: State) -> int:
    """One more than the largest number of an expert."""
    numbered = [re.escape(name).replace(r"\{e\}", r"(\d{1,6})") for name in layer.names if "{e}" in name]
    matches = (re.fullmatch(pattern, name) for pattern in numbered for name in state)
    return max((int(match[1]) for match in matches if match), default=0) + 1


def _numbered(names: tuple[str, ...], experts: int) -> list[str]:
    return [name.replace("{e}", str(e)) for name in names for e in range(experts if "{e}" in name else 1)]


def _stacked(state: State, name: str) -> Tensor:
    """The tensors of all experts, [M, ..]."""
    parts, e = [], 0
    while (key := name.replace("{e}", str(e))) in state:
        parts.append(state[key])
        e += 1
    if len({part.shape for part in parts}) > 1:
        of_all = name.replace("{e}", "*")
        raise ValueError(f"state_dict holds {of_all} of several shapes; they must be alike")
    return torch.stack(parts)


def _unstacked(name: str, value: Tensor) -> State:
    return {name.replace("{e}", str(e)): of_expert for e, of_expert in enumerate(value)}


def _swapped(weight: Tensor, dim: int) -> Tensor:
    """SwiGLU's halves in the other order: these codes have ``a SiLU(b)`` of [a; b], here it is SiLU(a) b."""
    return torch.cat(weight.chunk(2, dim=dim)[::-1], dim=dim)


_MODE_EXPERT = "experts.expert_{e}.mlp."
_MODE = {
    "ln_1.g": "norm1.weight", "ln_2.g": "norm2.weight", "attn.q_norm.g": "attn.q_norm.weight",
    "attn.k_norm.g": "attn.k_norm.weight", "attn.c_proj.weight": "attn.proj.weight",
    "router.router.mlp.0.weight": "moe.router.first.weight",
    "router.router.mlp.0.bias": "moe.router.first.bias",
    "router.router.mlp.3.weight": "moe.router.second.weight",
    "router.router.mlp.3.bias": "moe.router.second.bias",
}  # fmt: skip
_MODE_QKV = tuple(f"attn.{part}.{kind}" for kind in ("weight", "bias") for part in ("query", "key", "value"))


def _read_mode(state: State) -> State:
    found = {ours: state[theirs] for theirs, ours in _MODE.items()}
    for kind in ("weight", "bias"):
        parts = [state[f"attn.{part}.{kind}"] for part in ("query", "key", "value")]
        found[f"attn.qkv.{kind}"] = torch.cat(parts)
    found["moe.weight_in"] = _swapped(_stacked(state, f"{_MODE_EXPERT}0.project.weight"), 1).mT
    found["moe.bias_in"] = _swapped(_stacked(state, f"{_MODE_EXPERT}0.project.bias"), 1)
    found["moe.weight_out"] = _stacked(state, f"{_MODE_EXPERT}2.weight").mT
    return found


def _write_mode(state: State) -> State:
    found = {theirs: state[ours] for theirs, ours in _MODE.items()}
    for kind in ("weight", "bias"):
        parts = state[f"attn.qkv.{kind}"].chunk(3)
        found |= {f"attn.{p}.{kind}": v for p, v in zip(("query", "key", "value"), parts, strict=True)}
    found |= _unstacked(f"{_MODE_EXPERT}0.project.weight", _swapped(state["moe.weight_in"].mT, 1))
    found |= _unstacked(f"{_MODE_EXPERT}0.project.bias", _swapped(state["moe.bias_in"], 1))
    return found | _unstacked(f"{_MODE_EXPERT}2.weight", state["moe.weight_out"].mT)


def _make_mode(state: State, settings: dict[str, Any]) -> nn.Module:
    settings = dict(settings)
    causal = settings.pop("causal", True)
    num_experts, size, width = state["moe.weight_in"].shape
    moe = NoiseMoE(
        size, num_experts, expert_hidden_size=width // 2,
        router_hidden_size=len(state["moe.router.first.bias"]), **settings,
    )  # fmt: skip
    heads = size // max(1, len(state["attn.q_norm.weight"]))
    return ModeBlock(size, heads, moe, causal=causal)


_EVOMOE = {
    "fc1.weight": "weight_in",
    "fc1.bias": "bias_in",
    "fc2.weight": "weight_out",
    "fc2.bias": "bias_out",
}


def _read_evomoe(state: State) -> State:
    found = {ours: _stacked(state, f"experts.{{e}}.{theirs}") for theirs, ours in _EVOMOE.items()}
    found = {name: value.mT if value.dim() == 3 else value for name, value in found.items()}
    return found | {"router.weight": state["gate.wg.weight"]}


def _write_evomoe(state: State) -> State:
    found = {"gate.wg.weight": state["router.weight"]}
    for theirs, ours in _EVOMOE.items():
        value = state[ours]
        found |= _unstacked(f"experts.{{e}}.{theirs}", value.mT if value.dim() == 3 else value)
    return found


def _make_evomoe(state: State, settings: dict[str, Any]) -> nn.Module:
    num_experts, size, width = state["weight_in"].shape
    return DenseToSparseMoE(size, num_experts, expert_hidden_size=width, **settings)


def _read_nucleus(state: State) -> State:
    of_time, of_token = state["gate.weight"].chunk(2, dim=1)
    return {
        "router.time_weight": of_time, "router.weight": of_token,
        "weight_in": state["experts.gate_up_proj"], "weight_out": state["experts.down_proj"],
        "shared_in": _swapped(state["shared_expert.net.0.proj.weight"], 0).mT,
        "shared_out": state["shared_expert.net.2.weight"].mT,
    }  # fmt: skip


def _write_nucleus(state: State) -> State:
    return {
        "gate.weight": torch.cat([state["router.time_weight"], state["router.weight"]], dim=1),
        "experts.gate_up_proj": state["weight_in"], "experts.down_proj": state["weight_out"],
        "shared_expert.net.0.proj.weight": _swapped(state["shared_in"].mT, 0),
        "shared_expert.net.2.weight": state["shared_out"].mT,
    }  # fmt: skip


def _make_nucleus(state: State, settings: dict[str, Any]) -> nn.Module:
    num_experts, size, width = state["weight_in"].shape
    return FallingCapacityMoE(size, num_experts, expert_hidden_size=width // 2, **settings)


_LAYERS = {
    "mode": _Layer(
        (*_MODE, *_MODE_QKV, *(f"{_MODE_EXPERT}{name}" for name in
                               ("0.project.weight", "0.project.bias", "2.weight"))),
        _read_mode, _write_mode, _make_mode,
    ),
    "evomoe": _Layer(
        ("gate.wg.weight", *(f"experts.{{e}}.{name}" for name in _EVOMOE)),
        _read_evomoe, _write_evomoe, _make_evomoe,
    ),
    "nucleus": _Layer(
        ("gate.weight", "experts.gate_up_proj", "experts.down_proj", "shared_expert.net.0.proj.weight",
         "shared_expert.net.2.weight"),
        _read_nucleus, _write_nucleus, _make_nucleus,
    ),
}  # fmt: skip
