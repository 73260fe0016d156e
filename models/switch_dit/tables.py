"""Fixed tables of a model: positions of patches, DTR's channels of timesteps, and the row of a timestep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from switch_moe.prior import prior_table

DTR_CHANNELS_ON = 0.8  # share of channels that a timestep uses
DTR_ALPHA = 4.0


def table_row(t: Tensor) -> Tensor:
    """The row of a table over [0, N) for timesteps t [B]: t itself, or the integer below a t between two."""
    return t.floor().long() if t.is_floating_point() else t


def sincos_positions(hidden_size: int, grid: int, device: torch.device | None = None) -> Tensor:
    """Fixed 2D sine-cosine positions [grid * grid, D], a quarter each for sin and cos of x and y."""
    quarter = hidden_size // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    angles = torch.arange(grid, dtype=torch.float64, device=device)[:, None] * rates  # [grid, D/4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, D/2]
    columns = axis[None].expand(grid, grid, -1)
    rows = axis[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def dtr_mask(num_timesteps: int, hidden_size: int, device: torch.device | None = None) -> Tensor:
    """The channel mask of DTR, float32 0/1 [N, D]: floor(0.8 D) neighbouring channels slide with t."""
    active = math.floor(DTR_CHANNELS_ON * hidden_size)
    return prior_table(num_timesteps, hidden_size, active, DTR_ALPHA, device)
