"""Checkpoints: a folder with the weights as safetensors and the rest beside them.

model.safetensors  the trained weights           training.pt  optimizer state, step and random state
ema.safetensors    their moving average          config.json  the model's settings and the diffusion process
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from switch_dit.diffusion import GaussianDiffusion
from switch_dit.model import SwitchDiT


def save_checkpoint(
    folder: Path, model: nn.Module, ema: nn.Module, settings: dict[str, Any], training_state: dict[str, Any]
) -> None:
    """Writes the whole folder beside its place, then swaps: a failure while writing leaves the old one."""
    draft = folder.with_name(folder.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, module in (("model", model), ("ema", ema)):
        save_file(
            {key: value.contiguous() for key, value in module.state_dict().items()},
            draft / f"{name}.safetensors",
        )
    torch.save(training_state, draft / "training.pt")
    (draft / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    previous = folder.with_name(folder.name + ".old")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    draft.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def load_checkpoint(folder: Path, weights: str = "ema") -> tuple[SwitchDiT, GaussianDiffusion]:
    """The model in evaluation mode, with its moving average (``ema``) or trained (``model``) weights, and its
    process.

    Raises ``FileNotFoundError`` where the folder or a file in it is missing.
    """
    for name in ("config.json", f"{weights}.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint: {name} is missing")
    settings = json.loads((folder / "config.json").read_text())
    model = SwitchDiT(**settings["model"])
    model.load_state_dict(load_file(folder / f"{weights}.safetensors"))
    return model.eval(), GaussianDiffusion(**settings["diffusion"])
