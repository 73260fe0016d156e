"""The numbers and pictures of a run in TensorBoard, Weights & Biases or Trackio, beside the run's own files.

No tool is imported before it is asked for, and none needs an account. TensorBoard and wandb write into the
run's folder, Trackio into its own; ``wandb sync`` sends what was written without an account.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from switch_moe.ops._checks import check_choice

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_tracker(name: str) -> ModuleType | None:
    """The module of a tool, None for "". ``ValueError`` for another name, ``ModuleNotFoundError`` where the
    package is missing.
    """
    if name == "":
        return None
    check_choice("track", name, _MODULES)
    missing = ModuleNotFoundError(f"track is {name!r}; pip install {name}", name=name)
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        raise missing from error
    if getattr(module, "__file__", None) is None:  # a folder of that name, such as wandb leaves behind
        raise missing
    return module


def create_tracker(name: str, folder: Path, settings: dict[str, Any], start: int = 0) -> Tracker:
    """The tracker of the run in ``folder``: tensorboard, wandb, trackio, or "" for one that does nothing.

    A run that goes on after ``start`` steps is the same run to the tool; TensorBoard drops what it has of
    later steps.
    """
    module, tracker = check_tracker(name), Tracker(name)
    if module is not None:
        kind = _TensorBoard if name == "tensorboard" else _Dashboard
        tracker.guard(lambda: setattr(tracker, "tool", kind(module, Path(folder), settings, start)))
    return tracker


class Tracker:
    """Tells a tool what a run does. The first failure of the tool is said, and none ends the run."""

    def __init__(self, name: str) -> None:
        self.name, self.failed = name, False
        self.tool: _TensorBoard | _Dashboard | None = None

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of a step, by name; steps rise."""
        self.guard(lambda: self.tool and self.tool.log(step, numbers))

    def images(self, step: int, pictures: dict[str, Path]) -> None:
        """The picture files of a step, by name."""
        self.guard(lambda: self.tool and self.tool.images(step, pictures))

    def close(self) -> None:
        """Writes what is left; nothing may follow."""
        self.guard(lambda: self.tool and self.tool.close())

    def guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever a disk, a network or the tool itself raises
            if not self.failed:
                text = f"track is {self.name!r}; it has failed ({type(error).__name__}: {error})"
                tqdm.write(f"{text}. The run goes on.", file=sys.stderr)
            self.failed = True


class _TensorBoard:
    def __init__(self, module: ModuleType, folder: Path, settings: dict[str, Any], start: int) -> None:
        purge = start + 1 if start else None
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        text = json.dumps(settings, indent=2, default=str)
        self.writer.add_text("settings", "    " + text.replace("\n", "\n    "), start)  # as Markdown has code

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()

    def images(self, step: int, pictures: dict[str, Path]) -> None:
        for name, path in pictures.items():
            with Image.open(path) as picture:
                self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Dashboard:
    """wandb and trackio, which take the same calls after their ``init``."""

    def __init__(self, module: ModuleType, folder: Path, settings: dict[str, Any], start: int) -> None:
        self.module = module
        told = {"project": "switch_dit", "config": settings, "resume": "allow"}
        if module.__name__ == "wandb":
            told |= {"id": _identity(folder), "name": folder.name, "dir": str(folder), "mode": _mode(module),
                     "allow_val_change": True}  # fmt: skip
        else:
            told["name"] = _identity(folder)
        self.run = module.init(**told)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def images(self, step: int, pictures: dict[str, Path]) -> None:
        self.run.log({name: self.module.Image(str(path)) for name, path in pictures.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


def _identity(folder: Path) -> str:
    """What a tool knows the run by. It is kept in the folder, as a later run may have the folder's name."""
    written = folder / "track-id"
    if not written.exists():
        name = re.sub(r"[^\w.-]", "-", folder.name)[:100]  # wandb refuses /\#?%: and long ones
        written.write_text(f"{name}-{uuid.uuid4().hex[:8]}\n")
    return written.read_text().strip()


def _mode(wandb: ModuleType) -> str | None:
    """offline; or None, so that wandb decides, where the user has set its mode or is logged in."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return None
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except TypeError:  # an older wandb would ask at the terminal
        logged_in = False
    return None if logged_in else "offline"
