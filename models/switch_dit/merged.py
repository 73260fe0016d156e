"""SwitchDiT at the timesteps of a schedule, with merged experts: what sampling evaluates.

While sampling, all images share the timestep, so the routing of every step is known before the first one, and
the experts of a block are one matrix. A step then costs what a DiT with one more linear layer in each block
costs. MoDE's experts of a block are one wider MLP.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from switch_dit.layers import ChannelMask
from switch_dit.model import Prepared, SwitchDiT
from switch_dit.systems import SYSTEMS
from switch_dit.tables import table_row
from switch_moe import MergedExperts, NoiseMoE, Routing
from switch_moe.ops._checks import (
    FLOATS,
    check_dtype,
    check_integers,
    check_range,
    check_shape,
    check_tensors,
)

AHEAD_OF_TIME = ("switch", "dtr", "mode")  # where the timestep alone says what a block computes
AHEAD = 16 * 2**20  # bytes of experts that are merged together, which for small models are many steps
MEMORY = 512 * 2**20
"""Bytes of merged experts that are kept from batch to batch: 1,300 steps of tiny/4, 75 of S/2, 3 of XL/2."""


class MergedSwitchDiT:
    """A model at timesteps that are known beforehand. It holds no gradients and sees no later training.

    Args:
        model: any SwitchDiT; without experts, it is evaluated as it is.
        times: the timestep of each step, ``[S]``, integers or, in continuous time, floating, in [0, N).
        memory: bytes of merged experts to keep for later calls of the same step; the rest is merged again.
    """

    @torch.no_grad()
    def __init__(self, model: SwitchDiT, times: Tensor, memory: int = MEMORY) -> None:
        if not isinstance(model, SwitchDiT):
            raise TypeError(f"model is a {type(model).__name__}; it must be a SwitchDiT")
        check_integers(0, 2**62, memory=memory)
        check_tensors(times=times)
        check_shape("times", times, ("S",))
        check_dtype("times", times, *FLOATS, torch.int64, torch.int32)
        check_range("times", times, model.num_timesteps, "the timesteps")
        self.model, self.left = model, memory
        times = times.to(model.pos_embed.device)
        self.times, self.embedding = times, model.t_embedder(times)  # [S], [S, D]
        self.routing = model.route(self.embedding) if model.routing in ("switch", "mode") else None
        self.masks = model.dtr_mask[table_row(times)] if model.routing == "dtr" else None  # [S, D]
        self._kept: dict[int, list[tuple[Any, ...]]] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, step: int | Tensor, y: Tensor | None = None) -> Tensor:
        """The model's output for images x ``[B, C, H, W]`` and labels y ``[B]``: ``[B, C or 2C, H, W]``.

        Args:
            step: the number of the timestep in ``times``. An int64 tensor ``[1]`` works too: nothing then
                depends on the host, so that a captured CUDA graph takes another step at each replay; the
                experts are merged in every call.
        """
        t = self._row(self.times, step)  # [1]
        if self.model.routing not in AHEAD_OF_TIME:
            return self.model(x, t, y)
        return self.model(x, t, y, prepared=Prepared(self._row(self.embedding, step), self._routings(step)))

    def _row(self, table: Tensor, step: int | Tensor, dim: int = 0, count: int = 1) -> Tensor:
        return table.narrow(dim, step, count) if isinstance(step, int) else table.index_select(dim, step)

    def _routings(self, step: int | Tensor) -> list[tuple[Any, ...]]:
        """What each block takes beside tokens and condition."""
        if self.masks is not None:
            return [(self._row(self.masks, step),)] * len(self.model.blocks)
        if self.routing is None:
            return [()] * len(self.model.blocks)
        if isinstance(step, int) and step in self._kept:
            return self._kept[step]
        if not isinstance(step, int):
            return self._merge(step)[0]
        size = sum(_merged_nbytes(block.moe) for block in self.model.blocks)
        count = min(self.left // size, max(1, AHEAD // size))
        steps = range(step, min(step + max(count, 1), len(self.times)))
        merged = self._merge(step, len(steps))
        if count:  # else there is no memory left to keep any
            new = {
                number: found for number, found in zip(steps, merged, strict=True) if number not in self._kept
            }
            self._kept |= new
            self.left -= size * len(new)
        return merged[0]

    def _merge(self, step: int | Tensor, count: int = 1) -> list[list[tuple[MergedExperts]]]:
        """The experts of all blocks for each of ``count`` timesteps from ``step`` on."""
        assert self.routing is not None
        routing = Routing(*(self._row(part, step, 1, count) for part in self.routing[:3]))
        blocks = zip(self.model.blocks, routing.blocks(), strict=True)
        of_blocks = [block.moe.merge_each(of_block) for block, of_block in blocks]
        return [[(experts,) for experts in of_step] for of_step in zip(*of_blocks, strict=True)]


def _merged_nbytes(moe: nn.Module) -> int:
    """Bytes of what one timestep's experts are merged to: one linear expert, or k with a hidden layer."""
    side_by_side = moe.top_k if isinstance(moe, NoiseMoE) else 1
    return side_by_side * sum(p.nbytes // len(p) for p in moe.parameters(recurse=False))


class DenseStep(nn.Module):
    """A SwitchDiT at one timestep, of torch's own layers: for torch.export, ONNX and other programs.

    ``forward(x [B, C, H, W], y [B])`` returns what the model returns at that timestep. The experts of block i
    are ``blocks.i.moe.linear``, one dense layer each, and ``time_embedding [1, D]`` stands for the timestep;
    all other weights are those of the model, not copies.
    """

    def __init__(self, model: SwitchDiT, timestep: int | float) -> None:
        super().__init__()
        is_number = isinstance(timestep, (int, float)) and not isinstance(timestep, bool)
        if not is_number or not 0 <= timestep < model.num_timesteps:
            raise ValueError(f"timestep is {timestep!r}; it must be a number in [0, {model.num_timesteps})")
        if model.routing in SYSTEMS and model.routing not in AHEAD_OF_TIME:
            raise ValueError(
                f"model has routing {model.routing!r}, whose experts differ from token to token; it must be "
                f"one of none, {', '.join(AHEAD_OF_TIME)}"
            )
        merged = MergedSwitchDiT(model, torch.tensor([timestep], device=model.pos_embed.device))
        self.register_buffer("time_embedding", merged.embedding)
        self.model = copy.copy(model)
        self.model._modules = dict(model._modules)
        for unused in ("t_embedder", "router", "prior"):
            self.model._modules.pop(unused, None)
        blocks = zip(model.blocks, merged._routings(0), strict=True)
        self.model.blocks = nn.ModuleList(_dense_block(block, *routing) for block, routing in blocks)
        self.eval()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        embedding = self.time_embedding
        c = embedding if y is None else embedding + self.model.y_embedder(y)
        c = c.to(self.model.final_layer.linear.weight.dtype)
        return self.model.denoise(x, c, [()] * len(self.model.blocks))


class _DenseExperts(nn.Module):
    """``x (1 + linear(x))``."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(*weight.shape, device="meta")
        self.linear.weight, self.linear.bias = nn.Parameter(weight.t().contiguous()), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, x, self.linear(x))


class _DenseMLP(nn.Module):
    """SwiGLU experts side by side, whose choice is made."""

    def __init__(self, experts: MergedExperts) -> None:
        super().__init__()
        weight, bias, weight_out = experts[:3]
        assert weight_out is not None
        assert bias is not None
        self.linear, self.linear_out = (
            nn.Linear(*w.shape, bias=b is not None, device="meta")
            for w, b in ((weight, bias), (weight_out, None))
        )
        self.linear.weight, self.linear.bias = nn.Parameter(weight.t().contiguous()), nn.Parameter(bias)
        self.linear_out.weight = nn.Parameter(weight_out.t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x).chunk(2, dim=-1)
        return self.linear_out(nn.functional.silu(first) * second)


class _FixedMask(ChannelMask):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.mask)


def _dense_block(block: nn.Module, routing: Any = None) -> nn.Module:
    if routing is None:
        return block
    dense = copy.copy(block)
    dense._modules = dict(block._modules)
    if isinstance(routing, Tensor):
        dense.moe = _FixedMask(routing)
    else:
        dense.moe = _DenseExperts(*routing[:2]) if routing.weight_out is None else _DenseMLP(routing)
    return dense
