"""Checkpoints: a folder with the weights as safetensors and the settings beside them.

model.safetensors  the trained weights
ema.safetensors    their moving average
config.json        the settings of the model and of its objective, as create_objective takes them
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
from switch_dit.files import first_line, give_usual_permissions
from switch_dit.model import SwitchDiT
from switch_dit.objectives import Objective, create_objective
from switch_moe.ops._checks import FLOATS, check_choice


def save_checkpoint(folder: Path | str, model: nn.Module, ema: nn.Module, settings: dict[str, Any]) -> None:
    """Replaces the checkpoint in ``folder`` as a whole.

    ``settings`` holds ``model``, the arguments of SwitchDiT, and ``objective``, those of
    :func:`switch_dit.objectives.create_objective`.

    Wherever this is interrupted, :func:`load_checkpoint` finds a complete checkpoint, the one before or the
    new one: the draft is complete before it takes the place, and what it replaces stays in ``<name>.old``
    until then. ``OSError`` where it cannot be written, a full disk among the reasons; the draft is removed.
    """
    for name, module in (("model", model), ("ema", ema)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} is a {type(module).__name__}; it must be a torch.nn.Module")
    save_weights(folder, {"model": model.state_dict(), "ema": ema.state_dict()}, settings)


def save_weights(
    folder: Path | str, states: Mapping[str, Mapping[str, Tensor]], settings: dict[str, Any]
) -> None:
    """Replaces a checkpoint as :func:`save_checkpoint` does, by states named ``model``, ``ema`` or both."""
    folder = _as_folder(folder)
    if not isinstance(settings, dict) or not {"model", "objective"} <= settings.keys():
        raise TypeError("settings must be a dict with the keys 'model' and 'objective'")
    try:
        config = json.dumps(settings, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(f"settings cannot be written as JSON: {error}") from None
    draft, previous = _beside(folder, "new"), _beside(folder, "old")
    shutil.rmtree(draft, ignore_errors=True)
    size = sum(value.nbytes for state in states.values() for value in state.values())
    try:
        draft.mkdir(parents=True)
        free = shutil.disk_usage(draft).free
        if free < 1.01 * size:
            text = f"{size / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free"
            raise OSError(errno.ENOSPC, f"the checkpoint was not written: {text}", str(folder))
        for name, state in states.items():
            contiguous = {key: value.contiguous() for key, value in state.items()}
            save_file(contiguous, draft / f"{name}.safetensors")
            give_usual_permissions(draft / f"{name}.safetensors")
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


def load_checkpoint(folder: Path | str, weights: str = "ema") -> tuple[SwitchDiT, Objective]:
    """The model in evaluation mode and its objective.

    ``weights`` are the moving average (``ema``) or the trained ones (``model``).

    Raises:
        FileNotFoundError: the folder or a file in it is missing. ValueError: a file is broken or belongs to
            another model; the message names it.
    """
    check_choice("weights", weights, ("ema", "model"))
    found = _whole(_as_folder(folder))
    config, tensors = found / "config.json", found / f"{weights}.safetensors"
    settings = load_settings(folder)
    if not tensors.is_file():
        raise FileNotFoundError(f"{found} is no checkpoint: {tensors.name} is missing")
    model, objective = _from_settings(settings, config)
    try:
        state = load_file(tensors)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{tensors} is broken or cut off ({first_line(error)}); take it from another copy"
        ) from None
    load_weights(model, state, str(tensors))
    return model.eval(), objective


def load_settings(folder: Path | str) -> dict[str, Any]:
    """The settings that :func:`save_checkpoint` was given."""
    found = _whole(_as_folder(folder))
    config = found / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{found} is no checkpoint: config.json is missing")
    try:
        settings = json.loads(config.read_text())
    except ValueError as error:
        raise _broken(config, first_line(error)) from None
    if not isinstance(settings, dict):
        raise _broken(config, f"it holds a {type(settings).__name__}")
    if "objective" not in settings:
        raise ValueError(
            f"{config} lacks the key 'objective', the arguments of create_objective; older versions did not "
            "write it, so train again or add it by hand"
        )
    return settings


def _whole(folder: Path) -> Path:
    """Where the whole checkpoint is: an interrupted call may have left it beside its place."""
    previous = _beside(folder, "old")
    return previous if previous.is_dir() and not folder.exists() else folder


def _from_settings(settings: dict[str, Any], config: Path) -> tuple[SwitchDiT, Objective]:
    """A fresh model and its objective; ``ValueError`` that names the file where they do not fit."""
    try:
        model = SwitchDiT(**settings["model"])
        objective = create_objective(**settings["objective"])
    except (ValueError, TypeError, KeyError, RuntimeError, MemoryError, ArithmeticError) as error:
        raise _broken(config, first_line(error)) from None
    for name in ("num_timesteps", "learn_sigma"):
        own, given = getattr(model, name), getattr(objective, name)
        if own != given:
            raise _broken(config, f"the model has {name} {own} and its objective {given}")
    return model, objective


def _broken(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is broken ({what}); take it from another copy")


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


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")
