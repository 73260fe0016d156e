"""The pictures of a routing: who is used when, what timesteps share, how sure the routers are, and the prior.

All colour maps and colours can be told apart by the colour-blind, and in grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from switch_dit.inspection import Inspection
from switch_dit.plots import new_figure, save_figure

_ALWAYS, _SOMETIMES, _NEVER = "#e69f00", "#0072b2", "#d55e00"  # of Okabe and Ito's palette
_DPI = 110


def write_routing(folder: Path | str, inspection: Inspection) -> list[Path]:
    """Writes the pictures in ``PICTURES`` and routing.json into a folder; returns their paths.

    ``OSError`` where they cannot be written.
    """
    folder = Path(folder)
    paths = {name: folder / f"{name}.png" for name in PICTURES}
    for name, plot in PICTURES.items():
        plot(paths[name], inspection)
    inspection.write_json(folder / "routing.json")
    return [*paths.values(), folder / "routing.json"]


def plot_use(path: Path | str, inspection: Inspection) -> None:
    """The experts in use by timestep, with their gates, and how much; below, what the prior wants."""
    blocks, experts = inspection.blocks, inspection.experts
    rows = blocks * experts
    used = inspection.gates.transpose(1, 2).flatten(0, 1)  # [L*M, N]
    height = min(16.0, max(5.0, 1.6 + 0.1 * rows))
    figure, axes = new_figure(
        2, 2, figsize=(10, height), gridspec_kw={"width_ratios": [5, 1]}, sharex="col", sharey=True
    )
    each = f"in each block expert 0 at the top, {experts - 1} at the bottom" if experts > 1 else "one a block"
    told = (f"Experts in use: {each}; black is not chosen",
            "The same experts as the diffusion prior wants them: bright is in use, black is not")  # fmt: skip
    for (left, right), title, values in zip(axes, told, (used, inspection.prior.t()), strict=True):
        picture = _over_time(left, inspection, values, rows, cmap="magma", vmin=0, vmax=1)
        if left is axes[0, 0]:
            _colour_bar(figure, picture, axes[0], "gate (weight of the output)")
        left.hlines(np.arange(1, blocks) * experts - 0.5, *left.get_xlim(), colors="white", linewidth=0.8)
        left.set_title(title, fontsize=9)
        left.set_ylabel("block", fontsize=8)
        _shares(right, (values > 0).double().mean(1))
    _block_ticks(axes[0, 0], blocks, experts)
    axes[0, 1].set_title("how often", fontsize=9)
    axes[1, 1].set_xlabel("% of timesteps", fontsize=8)
    _time_label(axes[1, 0], inspection)
    legend = (("always", _ALWAYS, "s"), ("at some", _SOMETIMES, "s"), ("never", _NEVER, "x"))
    handles = [axes[0, 1].plot([], [], mark, color=colour, label=name)[0] for name, colour, mark in legend]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path, _DPI)


def _shares(axis: Any, shares: Tensor) -> None:
    """Bars of the shares of timesteps, in per cent, of experts in rows downwards; never is a cross."""
    rows, values = np.arange(len(shares)), 100 * shares.numpy()
    colours = [_ALWAYS if value == 100 else _SOMETIMES for value in values]
    axis.barh(rows, values, height=0.8, color=colours)
    axis.plot(values[values == 0] + 3, rows[values == 0], "x", color=_NEVER, markersize=5)
    axis.set_xlim(0, 105)
    axis.set_xticks([0, 50, 100])
    axis.tick_params(labelsize=8)


def plot_affinity(path: Path | str, inspection: Inspection) -> None:
    """The share of experts that two timesteps have in common, beside what the diffusion prior wants."""
    figure, ((left, right),) = new_figure(1, 2, figsize=(9, 4.3), sharex=True, sharey=True)
    least = inspection.least_affinity if inspection.least_affinity < 1 else 0.0
    for axis, title, values in (
        (left, "Experts that two timesteps have in common", inspection.affinity),
        (right, "What the diffusion prior wants", inspection.prior_affinity),
    ):
        extent = 2 * _ends(inspection)
        pixels = values.float().numpy()
        picture = axis.imshow(pixels, origin="lower", cmap="viridis", vmin=least, vmax=1, extent=extent)
        axis.set_title(title, fontsize=9)
        _time_label(axis, inspection)
        axis.set_yticks(axis.get_xticks())
    left.set_ylabel("time" if inspection.continuous else "timestep", fontsize=8)
    floor = f"\n({least:.0%} is the least there can be)" if least else ""
    bar = _colour_bar(figure, picture, (left, right), "share of the experts in use" + floor, shrink=0.8)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    save_figure(figure, path, _DPI)


def plot_entropy(path: Path | str, inspection: Inspection) -> None:
    """The entropies of routers and gates by block and timestep."""
    parts = [("How evenly each router rates its experts", inspection.entropy, inspection.experts)]
    if inspection.top_k > 1:
        parts.append(("How even the gates of the chosen ones are", inspection.gate_entropy, inspection.top_k))
    height = len(parts) * min(5.0, max(1.7, 0.8 + 0.12 * inspection.blocks)) + 0.4
    figure, axes = new_figure(len(parts), 1, figsize=(9, height), sharex=True)
    for axis, (title, values, most) in zip(axes[:, 0], parts, strict=True):
        largest = math.log(most)
        picture = _over_time(
            axis, inspection, values, inspection.blocks, cmap="viridis", vmin=0, vmax=largest or 1
        )
        _block_ticks(axis, inspection.blocks)
        axis.set_ylabel("block", fontsize=8)
        axis.set_title(title, fontsize=9)
        bar = _colour_bar(figure, picture, axis, "entropy (nats)")
        bar.set_ticks([0, largest], labels=["0: one has all", f"{largest:.2f}: all {most} alike"])
    _time_label(axes[-1, 0], inspection)
    save_figure(figure, path, _DPI)


def plot_distance(path: Path | str, inspection: Inspection) -> None:
    """The distance to the diffusion prior by timestep, and what each block adds to it."""
    blocks = inspection.blocks
    height = 3.4 + min(4.0, max(1.2, 0.12 * blocks))
    figure, axes = new_figure(
        2, 1, figsize=(9, height), sharex=True, gridspec_kw={"height_ratios": [2.4, height - 3.4]}
    )
    (above,), (below,) = axes
    distance, even = inspection.distance.numpy(), inspection.even_distance
    times = np.arange(len(distance)) / (len(distance) if inspection.continuous else 1)
    above.plot(times, distance, color=_SOMETIMES, marker="o" if len(times) == 1 else "", label="this model")
    above.axhline(distance.mean(), color=_SOMETIMES, linestyle="--", label=f"its mean, {distance.mean():.4f}")
    above.axhline(even, color=_NEVER, linestyle=":", label=f"gates that are all alike, {even:.4f}")
    above.set_ylim(0, 1.1 * max(even, distance.max(), 1e-3))
    above.set_ylabel("divergence (nats)", fontsize=8)
    above.set_title("Distance to the diffusion prior (Jensen-Shannon; 0 is best, 0.69 the most)", fontsize=9)
    above.tick_params(labelsize=8)
    above.legend(fontsize=8)
    above.grid(alpha=0.3)
    values = inspection.distance_by_block.clamp(min=0)
    picture = _over_time(
        below, inspection, values, blocks, cmap="viridis", vmin=0, vmax=max(values.max().item(), 1e-4)
    )
    _block_ticks(below, blocks)
    below.set_ylabel("block", fontsize=8)
    below.set_title("What each block adds to it", fontsize=9)
    _time_label(below, inspection)
    _colour_bar(figure, picture, below, "divergence (nats)")
    save_figure(figure, path, _DPI)


PICTURES: dict[str, Callable[[Path | str, Inspection], None]] = {
    "routing": plot_use,
    "routing-affinity": plot_affinity,
    "routing-entropy": plot_entropy,
    "routing-distance": plot_distance,
}
"""What draws each picture, by the stem of its file. Module report says how to read them."""


def _ends(inspection: Inspection) -> tuple[float, float]:
    """The left and right edge of the timesteps on an axis: each is a cell in discrete time."""
    return (0.0, 1.0) if inspection.continuous else (-0.5, inspection.timesteps - 0.5)


def _over_time(axis: Any, inspection: Inspection, values: Tensor, rows: int, **options: Any) -> Any:
    """A map of values ``[rows, N]``, the first row at the top, over time."""
    extent = (*_ends(inspection), rows - 0.5, -0.5)
    return axis.imshow(
        values.float().numpy(), aspect="auto", interpolation="nearest", extent=extent, **options
    )


def _block_ticks(axis: Any, blocks: int, rows: int = 1) -> None:
    """The numbers of blocks, each in the middle of its rows; at most 30 of them."""
    shown = np.arange(0, blocks, -(-blocks // 30))
    axis.set_yticks(shown * rows + (rows - 1) / 2, [str(block) for block in shown], fontsize=8)


def _colour_bar(figure: Any, picture: Any, axes: Any, label: str, **options: Any) -> Any:
    bar = figure.colorbar(picture, ax=axes, **options)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return bar


def _time_label(axis: Any, inspection: Inspection) -> None:
    """Says what the times are, and marks five of them with both ends."""
    last = inspection.timesteps - 1
    if inspection.continuous:
        axis.set_xticks(np.linspace(0, 1, 5))
        axis.set_xlabel("time (0: clean image, 1: noise)", fontsize=8)
    else:
        axis.set_xticks(np.unique(np.linspace(0, last, 5).round()))
        axis.set_xlabel(f"timestep (0: clean image, {last}: noise)", fontsize=8)
    axis.tick_params(labelsize=8)
