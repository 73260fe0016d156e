"""Other mixtures of experts behind one interface: two that are built here, two libraries where they are
installed, and the official layer where a clone is given.

The libraries' adapters are written against their sources, at the commit that each names. They need a GPU
and have not been run yet. Every benchmark compares their outputs and gradients with float64 before it times
them. No code of a library is here.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines import Groups, activation, expert_loop, grouped_linear, grouped_mlp

OFFICIAL = "official"
_paths: dict[str, Path] = {}


class Peer(NamedTuple):
    """A way to compute expert_linear and expert_mlp.

    ``metadata(index [B, k], M, T)``: what depends on the routing only. ``linear(x, weight, bias, gate,
    metadata)`` and ``mlp(x, weight_in, bias_in, weight_out, bias_out, gate, metadata, gated)`` return
    ``[B, T, Dout]``; None where it has no such thing. ``only_swiglu``: its mlp has no biases and one
    activation; ``layout`` then makes its own weights of ours, and ``restore`` ours of its own.
    """

    name: str
    metadata: Callable[[Tensor, int, int], Any]
    linear: Callable[..., Tensor] | None
    mlp: Callable[..., Tensor] | None
    only_swiglu: bool = False
    layout: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda a, b: (a, b)
    restore: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda a, b: (a, b)


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, groups: Groups) -> Tensor:
    return grouped_linear(x, weight, bias, groups.index, gate, groups)


def _grouped_mlp(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None,
    gate: Tensor, groups: Groups, gated: bool,
) -> Tensor:  # fmt: skip
    return grouped_mlp(x, weight_in, bias_in, weight_out, bias_out, groups.index, gate, gated, groups)


def _loop(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, groups: Groups) -> Tensor:
    return expert_loop(x, weight, bias, groups.index, gate, groups)


EXPERT_LOOP = Peer("expert loop", Groups, _loop, None)
GROUPED_MM = Peer("grouped_mm", Groups, _grouped_linear, _grouped_mlp)


def parse_peer_path(text: str) -> None:
    """``NAME=DIR``: where the clone of a library is. ``ValueError`` for others."""
    name, _, folder = text.partition("=")
    known = {key.lower(): key for key in (OFFICIAL, *_LIBRARIES)}
    if name.lower() not in known:
        raise ValueError(f"--peer-path is {text!r}; it must be NAME=DIR, NAME one of {', '.join(known)}")
    path = Path(folder).expanduser().resolve()
    if not folder or not path.is_dir():
        raise ValueError(f"--peer-path is {text!r}; {folder!r} is not a folder")
    _paths[known[name.lower()]] = path
    peers.cache_clear()


def peer_path(name: str) -> Path | None:
    """The folder that was given for a library."""
    return _paths.get(name)


@cache
def peers() -> tuple[list[Peer], dict[str, str]]:
    """The libraries that can be imported, and why each of the others cannot."""
    found, missing = [], {}
    for name, load in _LIBRARIES.items():
        folder = _paths.get(name)
        if folder is not None:
            sys.path[:0] = [str(folder), str(folder / "src")]
        try:
            found.append(load())
        except Exception as error:  # an import fails in any way, and must not end the benchmarks
            missing[name] = f"not importable: {type(error).__name__}: {error}"
    return found, missing


def peer_states() -> dict[str, str]:
    """Whether each peer is there, or why not."""
    found, missing = peers()
    states = {peer.name: "available" for peer in found} | missing
    states["grouped_mm"] = f"torch {torch.__version__}"
    why = "no clone was given; --peer-path official=DIR"
    states[OFFICIAL] = "available" if _paths.get(OFFICIAL) else why
    return states


@contextlib.contextmanager
def official_imports() -> Iterator[None]:
    """Inside, the modules of the clone of the official code import; afterwards all is as before."""
    folder = _paths[OFFICIAL]
    names = ("models", "util", "parallel_experts", "diffusion")

    def of_clone() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in names]

    kept = {name: sys.modules.pop(name) for name in of_clone()}
    added = [str(folder), str(folder / "models" / "parallel_linear")]
    sys.path[:0] = added
    try:
        yield
    finally:
        for entry in added:
            sys.path.remove(entry)
        for name in of_clone():
            del sys.modules[name]
        sys.modules.update(kept)


@cache
def official_mixture() -> ModuleType:
    """The official models/MoE.py."""
    with official_imports():
        return importlib.import_module("models.MoE")


def _scattermoe() -> Peer:
    """shawntan/scattermoe, commit 2d15f31: ``parallel_linear`` over tokens, whose order comes from a sort of
    samples: cheaper than its own.
    """
    from scattermoe.parallel_experts import parallel_linear

    def metadata(index: Tensor, experts: int, tokens: int) -> dict[str, Tensor]:
        groups = Groups(index, experts, tokens)
        token = torch.arange(tokens, device=index.device)
        sample, slot = groups.order[:, None] // groups.top_k, groups.order[:, None] % groups.top_k
        return {
            "sorted_expert_idxs": groups.expert[:, None].expand(-1, tokens).flatten(),
            "sorted_scattered_idxs": ((sample * tokens + token) * groups.top_k + slot).flatten(),
            "expert_offsets": groups.ends.long(),
        }

    def linear(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, order: dict[str, Tensor]) -> Tensor:
        out = parallel_linear(
            x.flatten(0, 1), weight, gate.shape[1], **order, expert_biases=bias, gates=for_tokens(gate, x)
        )
        return out.unflatten(0, x.shape[:2])

    def mlp(
        x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None,
        gate: Tensor, order: dict[str, Tensor], gated: bool,
    ) -> Tensor:  # fmt: skip
        hidden = parallel_linear(
            x.flatten(0, 1), weight_in, gate.shape[1], **order, expert_biases=bias_in, grouped_out=True
        )
        out = parallel_linear(
            activation(hidden, gated), weight_out, 1, **order, expert_biases=bias_out, grouped_in=True,
            gates=for_tokens(gate, x),
        )  # fmt: skip
        return out.unflatten(0, x.shape[:2])

    return Peer("ScatterMoE", metadata, linear, mlp)


def for_tokens(of_samples: Tensor, x: Tensor) -> Tensor:
    """Gates ``[B, k]`` for every token of ``x [B, T, D]``, in its type: ``[B*T, k]``."""
    return of_samples.to(x.dtype)[:, None].expand(-1, x.shape[1], -1).flatten(0, 1)


def _sonicmoe() -> Peer:
    """Dao-AILab/sonic-moe, commit 8565e84: ``moe_general_routing_inputs``, which makes its metadata itself;
    SwiGLU without biases. Its weights are ``[2I, D, M]`` (gate and value rows in turn) and ``[D, I, M]``,
    views of contiguous ``[M, ..]``.
    """
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    def metadata(index: Tensor, experts: int, tokens: int) -> tuple[Tensor, Tensor]:
        batch, top_k = index.shape
        token = torch.arange(batch * tokens, dtype=torch.int32, device=index.device)
        expert = index.int()[:, None].expand(-1, tokens, -1).flatten()
        return token.repeat_interleave(top_k), expert

    def mlp(
        x: Tensor, weight_in: Tensor, bias_in: None, weight_out: Tensor, bias_out: None,
        gate: Tensor, order: tuple[Tensor, Tensor], gated: bool,
    ) -> Tensor:  # fmt: skip
        gates = for_tokens(gate, x.float()).flatten()
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        out, _ = moe_general_routing_inputs(
            x.flatten(0, 1), gates, *order, weight_in.permute(1, 2, 0), None, weight_out.permute(1, 2, 0),
            None, len(weight_in), stream, ActivationType.SWIGLU,
        )  # fmt: skip
        return out.unflatten(0, x.shape[:2])

    def layout(weight_in: Tensor, weight_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = weight_in.mT.chunk(2, dim=1)
        return torch.stack([gate, value], dim=2).flatten(1, 2).contiguous(), weight_out.mT.contiguous()

    def restore(weight_in: Tensor, weight_out: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([weight_in[:, ::2], weight_in[:, 1::2]], dim=1)
        return rows.mT, weight_out.mT

    return Peer("SonicMoE", metadata, None, mlp, True, layout, restore)


_LIBRARIES: dict[str, Callable[[], Peer]] = {"ScatterMoE": _scattermoe, "SonicMoE": _sonicmoe}


def official_layer(num_experts: int, top_k: int, size: int) -> Callable[..., Tensor]:
    """The official mixture with parameters of the caller, to ``1 + m(x)``. It routes all N timesteps."""
    module = official_mixture().TaskMoE(size, num_experts, top_k)

    def layer(
        x: Tensor, time_table: Tensor, t: Tensor, gate_weight: Tensor, gate_bias: Tensor, weight: Tensor,
        bias: Tensor,
    ) -> Tensor:  # fmt: skip
        module.set_active_task(t)
        parameters = {
            "f_gate.1.weight": gate_weight, "f_gate.1.bias": gate_bias, "experts.w": weight, "experts.b": bias
        }  # fmt: skip
        one_plus_m, _, _ = torch.func.functional_call(module, parameters, (x, time_table))
        return one_plus_m

    return layer
