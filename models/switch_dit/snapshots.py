"""Snapshots of power-function averages on disk, from which any width can be had after a run.

A folder holds one file for each width and time, like ``sigma0.050-step900.safetensors``: the parameters by
name, and ``steps`` and ``sigma_rel`` in its metadata. A file has that name only when it is whole.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from switch_dit.averages import Snapshot
from switch_dit.files import give_usual_permissions, to_disk
from switch_moe.ops._checks import FLOATS

_DRAFT = ".incomplete"


def width_text(sigma_rel: float) -> str:
    """The width as names of files have it: 0.050, and as many digits as it needs."""
    short = f"{sigma_rel:.3f}"
    return short if float(short) == sigma_rel else repr(float(sigma_rel))


def save_snapshot(folder: Path | str, snapshot: Snapshot, dtype: torch.dtype | None = None) -> Path:
    """Writes a snapshot into the folder, in place of one of its width and time, and returns its path.

    Args:
        folder: made where it is missing.
        dtype: the type of the weights in the file, such as ``torch.float32``; None keeps their own.

    Wherever this is interrupted, the file is whole or missing. ``OSError`` where it cannot be written, a full
    disk among the reasons; the draft is removed.
    """
    if not isinstance(snapshot, Snapshot):
        raise TypeError(f"snapshot is a {type(snapshot).__name__}; it must be a Snapshot")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}; it must be a floating type or None")
    folder = Path(folder)
    path = folder / _name(snapshot.steps, snapshot.sigma_rel)
    draft = path.with_name(path.name + _DRAFT)
    metadata = {"steps": str(snapshot.steps), "sigma_rel": repr(float(snapshot.sigma_rel))}
    tensors = {
        name: value.detach().to("cpu", dtype).contiguous() for name, value in snapshot.parameters.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, draft, metadata)
        give_usual_permissions(draft)
        to_disk(draft)
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # what it raises for a full disk
            raise OSError(errno.EIO, f"the snapshot was not written: {error}", str(path)) from None
        raise
    to_disk(folder)
    return path


def load_snapshots(folder: Path | str) -> list[Snapshot]:
    """The snapshots in a folder, by time and width. Their parameters are read one by one, when asked for.

    Raises:
        FileNotFoundError: there are none. ValueError: a file is broken or no snapshot; the message names it.
            A tensor that is not finite is refused when it is read.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.iterdir() if path.suffix != _DRAFT) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no snapshots; a training run leaves them there with --power-averages 0.05 0.10"
        )
    found = [(path, *_open(path)) for path in paths]
    first_path, _, first = found[0]
    for path, _, tensors in found:
        differs = sorted(name for name, _ in tensors.shapes.items() ^ first.shapes.items())
        if differs:
            raise ValueError(f"{path} is of another model than {first_path}: {differs[0]} differs")
    return sorted((snapshot for _, snapshot, _ in found), key=lambda each: (each.steps, each.sigma_rel))


class _OnDisk(Mapping[str, Tensor]):
    """The tensors of a file by name; each is read when it is asked for, and not kept.

    ``shapes`` and ``metadata`` are read at once.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, safe_open(path, "pt")
        names = self._file.keys()
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        value = self._file.get_tensor(name)
        if value.dtype not in FLOATS or not bool(value.isfinite().all()):
            what = "not finite" if value.dtype in FLOATS else value.dtype
            raise ValueError(f"{self._path} is broken: {name} is {what}; remove it or take another copy")
        return value

    def __contains__(self, name: object) -> bool:  # Mapping's would read the tensor
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _open(path: Path) -> tuple[Snapshot, _OnDisk]:
    try:
        tensors = _OnDisk(path)
    except (SafetensorError, OSError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path} is broken or no snapshot ({what}); remove it or take another copy"
        ) from None
    try:
        steps, sigma_rel = int(tensors.metadata["steps"]), float(tensors.metadata["sigma_rel"])
    except (KeyError, ValueError):
        raise ValueError(
            f"{path} is no snapshot: its metadata lacks steps or sigma_rel; move it elsewhere"
        ) from None
    if not math.isfinite(sigma_rel) or path.name != _name(steps, sigma_rel):
        raise ValueError(
            f"{path} holds the width {sigma_rel:g} after {steps} steps; its name must be "
            f"{_name(steps, sigma_rel)}"
        )
    return Snapshot(steps, sigma_rel, tensors), tensors


def _name(steps: int, sigma_rel: float) -> str:
    return f"sigma{width_text(sigma_rel)}-step{steps}.safetensors"
