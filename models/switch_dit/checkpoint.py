"""Checkpoints: a folder with the weights as safetensors and the settings beside them.

model.safetensors  the trained weights
ema.safetensors    their moving average
config.json        the settings of the model and of its objective: what create_objective takes
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from switch_dit.convert import without_wrappers
from switch_dit.model import SwitchDiT
from switch_dit.objectives import Objective, create_objective
from switch_moe.ops._checks import FLOATS, check_choice


def save_checkpoint(folder: Path | str, model: nn.Module, ema: nn.Module, settings: dict[str, Any]) -> None:
    """Replaces the checkpoint in ``folder`` as a whole.

    Wherever this is interrupted, :func:`load_checkpoint` finds a complete checkpoint, the one before or the
    new one: the draft is complete before it takes the place, and what it replaces stays in ``<name>.old``
    until then. ``OSError`` where it cannot be written, a full disk among the reasons; the draft is removed.
    """
    folder = _as_folder(folder)
    for name, module in (("model", model), ("ema", ema)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} is a {type(module).__name__}; it must be a torch.nn.Module")
    if not isinstance(settings, dict) or not {"model", "diffusion"} <= settings.keys():
        raise TypeError("settings must be a dict with the keys 'model' and 'diffusion'")
    try:
        config = json.dumps(settings, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(f"settings cannot be written as JSON: {error}") from None
    draft, previous = _beside(folder, "new"), _beside(folder, "old")
    shutil.rmtree(draft, ignore_errors=True)
    states = {
        name: {key: value.contiguous() for key, value in module.state_dict().items()}
        for name, module in (("model", model), ("ema", ema))
    }
    size = sum(value.nbytes for state in states.values() for value in state.values())
    try:
        draft.mkdir(parents=True)
        free = shutil.disk_usage(draft).free
        if free < 1.01 * size:
            text = f"{size / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free"
            raise OSError(errno.ENOSPC, f"the checkpoint was not written: {text}", str(folder))
        for name, state in states.items():
            save_file(state, draft / f"{name}.safetensors")
            _give_usual_permissions(draft / f"{name}.safetensors")
        (draft / "config.json").write_text(config)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, SafetensorError):  # what it raises for a full disk
            raise OSError(errno.EIO, f"the checkpoint was not written: {error}", str(folder)) from None
        raise
    if folder.exists():  # else an interrupted call may have left the only checkpoint in previous
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    draft.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def _give_usual_permissions(path: Path) -> None:
    """Those that the user's umask gives; safetensors may leave a file that only its owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def load_checkpoint(folder: Path | str, weights: str = "ema") -> tuple[SwitchDiT, Objective]:
    """The model in evaluation mode and its objective.

    ``weights`` are the moving average (``ema``) or the trained ones (``model``).

    Raises:
        FileNotFoundError: the folder or a file in it is missing. ValueError: a file is broken or belongs to
            another model; the message names it.
    """
    check_choice("weights", weights, ("ema", "model"))
    folder = _as_folder(folder)
    previous = _beside(folder, "old")
    found = previous if previous.is_dir() and not folder.exists() else folder
    config, tensors = found / "config.json", found / f"{weights}.safetensors"
    for path in (config, tensors):
        if not path.is_file():
            raise FileNotFoundError(f"{found} is no checkpoint: {path.name} is missing")
    try:
        settings = json.loads(config.read_text())
        model = SwitchDiT(**settings["model"])
        objective = create_objective(**settings["diffusion"], learn_sigma=model.learn_sigma)
    except (ValueError, TypeError, KeyError, RuntimeError, MemoryError, ArithmeticError) as error:
        raise ValueError(f"{config} is broken ({_first_line(error)}); take it from another copy") from None
    if model.num_timesteps != objective.num_timesteps:
        counts = f"{model.num_timesteps} timesteps and its diffusion process {objective.num_timesteps}"
        raise ValueError(f"{config} is broken (the model has {counts}); take it from another copy")
    try:
        state = load_file(tensors)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{tensors} is broken or cut off ({_first_line(error)}); take it from another copy"
        ) from None
    load_weights(model, state, str(tensors))
    return model.eval(), objective


def load_weights(model: SwitchDiT, state: Mapping[str, Tensor], source: str) -> None:
    """Loads a state_dict of SwitchDiT, whole or not at all; prefixes that DDP and torch.compile add are cut.

    ``ValueError`` that names ``source`` where keys or shapes are those of another model.
    """
    state = without_wrappers(state)
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{key} is {tuple(state[key].shape)} and not {tuple(own[key].shape)}"
              for key in own if key in state and state[key].shape != own[key].shape]  # fmt: skip
    found = [f"{text} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
             for text, keys in (("lacks", missing), ("has unknown", unknown)) if keys]  # fmt: skip
    if found or shapes:
        raise ValueError(f"{source} is of another model: it {', '.join([*found, *shapes[:1]])}")
    for key, value in state.items():
        if value.dtype not in FLOATS or not bool(value.isfinite().all()):
            what = value.dtype if value.dtype not in FLOATS else "not finite"
            raise ValueError(f"{source} is broken: {key} is {what}; take it from another copy")
    model.load_state_dict(state)


def _as_folder(folder: Path | str) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder is {folder!r}; it must be a path")
    return Path(folder)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")
