"""Checkpoints: a folder with the weights as safetensors and the settings beside them.

model.safetensors  the trained weights
ema.safetensors    their moving average
config.json        the settings of the model and of the diffusion process
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from switch_dit.diffusion import GaussianDiffusion
from switch_dit.model import SwitchDiT


def save_checkpoint(folder: Path, model: nn.Module, ema: nn.Module, settings: dict[str, Any]) -> None:
    """Replaces the checkpoint in ``folder`` as a whole.

    Wherever this is interrupted, :func:`load_checkpoint` finds a complete checkpoint, the one before or the
    new one: the draft is complete before it takes the place, and what it replaces stays in ``<name>.old``
    until then.
    """
    draft, previous = _beside(folder, "new"), _beside(folder, "old")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, module in (("model", model), ("ema", ema)):
        state = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(state, draft / f"{name}.safetensors")
    (draft / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if folder.exists():  # else an interrupted call may have left the only checkpoint in previous
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    draft.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def load_checkpoint(folder: Path, weights: str = "ema") -> tuple[SwitchDiT, GaussianDiffusion]:
    """The model in evaluation mode and its diffusion process.

    ``weights`` are the moving average (``ema``) or the trained ones (``model``). Raises
    ``FileNotFoundError`` where the folder or a file in it is missing.
    """
    previous = _beside(folder, "old")
    found = previous if previous.is_dir() and not folder.exists() else folder
    for name in ("config.json", f"{weights}.safetensors"):
        if not (found / name).is_file():
            raise FileNotFoundError(f"{found} is no checkpoint: {name} is missing")
    settings = json.loads((found / "config.json").read_text())
    model = SwitchDiT(**settings["model"])
    model.load_state_dict(load_file(found / f"{weights}.safetensors"))
    return model.eval(), GaussianDiffusion(**settings["diffusion"])


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")
