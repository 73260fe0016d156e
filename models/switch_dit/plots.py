"""The pictures of a run: loss and grids of samples. Those of its routing are in routing_plots.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _matplotlib() -> tuple[Any, Any]:
    """What is used of matplotlib. It refuses an unknown MPLBACKEND, which has no part in writing files."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure, FigureCanvasBase


_Figure, _FigureCanvasBase = _matplotlib()


def new_figure(*rows_columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure with axes, without pyplot: no window, no MPLBACKEND, nothing to close."""
    figure = _Figure(layout="constrained", figsize=options.pop("figsize"))
    return figure, figure.subplots(*rows_columns, squeeze=False, **options)


def save_figure(figure: Any, path: Path | str, dpi: int) -> None:
    """Writes a picture. It is drawn once; savefig alone would draw it a first time for the layout."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)
    figure.savefig(path, dpi=dpi)


def check_picture(name: str, path: Path | str) -> None:
    """``ValueError`` unless the ending of ``path`` is one that a picture can have."""
    endings = _FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower().lstrip(".") not in endings:
        raise ValueError(f"{name} is {path}; it must end in one of {', '.join('.' + end for end in endings)}")


def grid_of(images: Tensor, columns: int, border: int = 1) -> np.ndarray:
    """Images [n, C, H, W] in [-1, 1] side by side as one, in [0, 1]: [rows*(H+1)+1, columns*(W+1)+1, C or 3].

    Of images that have neither 1 nor 3 channels the first is shown.
    """
    count, channels, height, width = images.shape
    pixels = ((images.clamp(-1, 1) + 1) / 2).float().cpu()
    if channels != 3:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    rows = -(-count // columns)
    cells = torch.ones(rows * columns, 3, height + border, width + border)
    cells[:count, :, border:, border:] = pixels
    cells = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return torch.nn.functional.pad(cells, (0, 0, 0, border, 0, border), value=1.0).numpy()


def plot_samples(
    path: Path | str, images: Tensor, labels: list[int] | None, columns: int, title: str
) -> None:
    """A grid of images [n, C, H, W] in [-1, 1], row by row; rows are named where labels are given."""
    rows = -(-len(images) // columns)
    size = min(1.0, 60 / max(rows, columns))  # inches of a cell: a picture of 60 inches is enough
    figure, axes = new_figure(1, 1, figsize=(0.6 * size * columns + 0.6, 0.6 * size * rows + 0.6))
    axis = axes[0, 0]
    axis.imshow(grid_of(images, columns), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    if labels is not None and rows:
        step = images.shape[2] + 1
        middles = [row * step + step / 2 for row in range(rows)]
        axis.set_yticks(middles, [str(labels[row * columns]) for row in range(rows)])
        axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, dpi=130)


def plot_loss(path: Path | str, stats: list[dict]) -> None:
    """The logged losses over steps; each point is the mean since the last one."""
    figure, ((left, right),) = new_figure(1, 2, figsize=(9, 3.4))
    steps = [row["step"] for row in stats]
    for axis, keys, title in (
        (left, ("mse", "vb"), "denoising loss (mse of the noise; vb in bits/dim)"),
        (right, ("prior",), "diffusion prior loss (Jensen-Shannon, nats)"),
    ):
        for key in keys:
            axis.plot(steps, [row[key] for row in stats], label=key)
        axis.set_yscale("log" if key != "prior" else "linear")
        axis.set_xlabel("step")
        axis.set_title(title, fontsize=9)
        axis.legend()
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=130)
