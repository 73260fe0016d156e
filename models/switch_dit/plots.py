"""The pictures of a run: loss, routing and grids of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from switch_dit.model import SwitchDiT


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt, figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_samples(path: Path, images: Tensor, labels: list[int] | None, columns: int, title: str) -> None:
    """A grid of images [n, C, H, W] in [-1, 1], row by row; rows are named where labels are given."""
    plt = _pyplot()
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(0.6 * columns + 0.6, 0.6 * rows + 0.6), squeeze=False, layout="constrained"
    )
    pixels = ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    for i, axis in enumerate(axes.flat):
        axis.set_xticks([])
        axis.set_yticks([])
        if i >= len(pixels):
            axis.set_axis_off()
            continue
        grey = pixels.shape[-1] != 3
        axis.imshow(pixels[i, ..., 0] if grey else pixels[i], cmap="gray" if grey else None, vmin=0, vmax=1)
        if labels is not None and i % columns == 0:
            axis.set_ylabel(str(labels[i]), rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    _save(plt, figure, path)


def plot_loss(path: Path, stats: list[dict]) -> None:
    """The logged losses over steps; each point is the mean since the last one."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    steps = [row["step"] for row in stats]
    for axis, keys, title in (
        (axes[0], ("mse", "vb"), "denoising loss (mse of the noise; vb in bits/dim)"),
        (axes[1], ("prior",), "diffusion prior loss (Jensen-Shannon, nats)"),
    ):
        for key in keys:
            axis.plot(steps, [row[key] for row in stats], label=key)
        axis.set_yscale("log" if key != "prior" else "linear")
        axis.set_xlabel("step")
        axis.set_title(title, fontsize=9)
        axis.legend()
        axis.grid(alpha=0.3)
    _save(plt, figure, path)


@torch.no_grad()
def plot_routing(path: Path, model: SwitchDiT) -> None:
    """The routing of a model above, and below it the prior that training pulls it towards.

    The left shows the experts that each timestep uses, block by block, with their gates; the right shows the
    share of experts that two timesteps have in common, over all blocks.
    """
    plt = _pyplot()
    routing = model.route_all_timesteps()
    gates = torch.zeros_like(routing.probs).scatter(2, routing.expert_index.long(), routing.expert_gate)
    depth, timesteps, experts = gates.shape
    selected = routing.selected().cpu()
    used = gates.permute(0, 2, 1).flatten(0, 1).cpu().numpy()  # [L*M, N]
    matched = model.prior.table[:, model.prior.match(routing.selected())].cpu()
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 7.5), layout="constrained", gridspec_kw={"width_ratios": [1.7, 1]}, sharex="col"
    )
    rows = (
        ("experts in use (brightness: gate)", used, selected),
        ("the prior, matched to these experts", matched.t().numpy(), matched),
    )
    for (left, right), (title, use, choice) in zip(axes, rows, strict=True):
        left.imshow(np.asarray(use), aspect="auto", interpolation="nearest", cmap="magma", vmin=0, vmax=1)
        left.set_yticks(
            np.arange(depth) * experts + (experts - 1) / 2, [f"block {i}" for i in range(depth)], fontsize=7
        )
        for boundary in range(1, depth):
            left.axhline(boundary * experts - 0.5, color="white", linewidth=0.6)
        left.set_title(title, fontsize=9)
        affinity = choice @ choice.t() / choice.sum(1)[:, None]
        picture = right.imshow(affinity.numpy(), origin="lower", cmap="viridis", vmin=0, vmax=1)
        right.set_title("experts shared by two timesteps", fontsize=9)
        right.set_ylabel("timestep")
        figure.colorbar(picture, ax=right, shrink=0.8)
    for axis in axes[1]:
        axis.set_xlabel(f"timestep (0 is the clean image, {timesteps - 1} is noise)")
    _save(plt, figure, path)
