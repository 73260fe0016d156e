"""Data sets of image files, decoded when they are needed: class folders and sets of the package datasets."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from switch_dit.data.memory import mirrored

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Unreadable(ValueError):
    """An image that cannot be decoded, with its name."""


class Pictures:
    """``count`` image files of any size, cropped to [3, size, size] bytes.

    ``name(i)`` is what messages call image i and ``opened(i)`` its path or a file with its bytes. Where
    ``skip`` is set, an image that cannot be decoded is replaced by the next one of its class, so that a batch
    still depends on its indices alone. The replaced ones are noted in memory that the workers share.
    """

    in_memory = held_out = held_out_labels = None
    needs_noise, threads, channels = False, False, 3

    def __init__(
        self,
        data: str,
        labels: Tensor,  # int64 [n]
        num_classes: int,
        size: int,
        skip: bool,
        name: Callable[[int], str],
        opened: Callable[[int], str | IO[bytes]],
    ) -> None:
        self.data, self.labels, self.num_classes, self.size, self.skip = data, labels, num_classes, size, skip
        self.name, self.opened = name, opened
        self.bad = torch.zeros(len(labels), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def skipped(self) -> dict[int, str]:
        return {i: self.name(i) for i in self.bad.nonzero().flatten().tolist()}

    def batch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, 3, size, size] and labels [B]; ``Unreadable`` names one that cannot be decoded."""
        pixels = [self._read(index) for index in indices.tolist()]
        return mirrored(torch.from_numpy(np.stack(pixels)), flips), self.labels[indices]

    def _read(self, index: int) -> np.ndarray:
        """Image ``index`` [3, size, size], or the one that stands for it."""
        try:
            if not self.bad[index]:
                return read_picture(self.opened(index), self.size)
        except Unreadable as error:
            if not self.skip:
                raise Unreadable(
                    f"data is {self.data!r}; {self.name(index)} cannot be read ({error}); remove it, or say "
                    "--unreadable skip"
                ) from None
            self._note(index, error)
        others = (self.labels == self.labels[index]).nonzero().flatten()
        others = others.roll(-1 - int((others == index).nonzero()))  # those that follow, then those before
        for other in others.tolist():
            if not self.bad[other]:
                try:
                    return read_picture(self.opened(other), self.size)
                except Unreadable as error:
                    self._note(other, error)
        raise Unreadable(
            f"data is {self.data!r}; none of the {len(others)} images of class {int(self.labels[index])} can "
            f"be read, {self.name(index)} among them"
        )

    def _note(self, index: int, error: Unreadable) -> None:
        self.bad[index] = True
        text = f"{self.name(index)} cannot be read ({error}); the next image of its class takes its place"
        warnings.warn(text, stacklevel=2)

    def scale(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Bytes to float32 in [-1, 1]."""
        return x.float() * (2 / 255) - 1

    def identity(self) -> str:
        """The checksum of the names and labels, in order."""
        digest = hashlib.sha256(self.labels.numpy())
        for index in range(len(self)):
            digest.update(self.name(index).encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()


def read_picture(file: str | IO[bytes], size: int) -> np.ndarray:
    """The first frame of an image file, uint8 [3, size, size]. ``Unreadable`` says why it cannot be decoded.

    With size 0 it is not cropped: [3, H, W].
    ``OSError`` and ``MemoryError`` of the machine are no fault of the file and pass through.
    """
    try:
        with Image.open(file) as picture:
            colours = _as_rgb(picture)
            pixels = np.asarray(centre_crop(colours, size) if size else colours)
    except MemoryError:
        raise
    except Exception as error:  # broken files make Pillow raise almost anything
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, PermissionError):
            raise
        reason = str(error).splitlines()[0].split(" '/")[0] if str(error) else ""
        raise Unreadable(f"{type(error).__name__}: {reason}") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # noise is drawn in the order of memory


def _as_rgb(picture: ImageFile.ImageFile) -> Image.Image:
    """8 bits for each channel: 16-bit grey is divided by 257, and what is transparent is white."""
    if picture.mode.startswith("I"):  # Pillow's own conversion would cut off at 255
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError("its pixels have 32 bits")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floats")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture.load()
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return picture.convert("RGB")


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The square in the middle, [size, size], as ADM (arXiv 2105.05233) prepares its images.

    They are halved while the shorter side is at least twice ``size``, and then resized to it.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    factor = size / min(picture.size)
    width, height = (max(size, round(side * factor)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


class _Files:
    """The files of a folder, by number."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def name(self, index: int) -> str:
        return self.names[index]

    def opened(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])


def load_folder(data: str, folder: Path, size: int, unreadable: str) -> Pictures:
    """A class for each folder in ``folder``, by name; images in it at any depth. Without folders: one class.

    Names that begin with a dot, and files whose ending is not that of an image, are passed over.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data is {data!r}; there is no folder {str(folder)!r}; it must hold a folder of images per class"
        )
    entries = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    classes = [entry for entry in entries if (folder / entry).is_dir()]
    loose = [entry for entry in entries if entry.lower().endswith(ENDINGS) and entry not in classes]
    if classes and loose:
        raise ValueError(
            f"data is {data!r}; it has folders and {len(loose)} images beside them, {loose[0]} among them; "
            "put each image into the folder of its class"
        )
    found = [_images_under(folder, name) for name in classes] if classes else [loose]
    empty = [name for name, images in zip(classes, found, strict=False) if not images]
    if empty or not any(found):
        where = f"its folder {empty[0]!r} (and {len(empty) - 1} more)" if len(empty) > 1 else None
        where = where or (f"its folder {empty[0]!r}" if empty else "it")
        raise ValueError(
            f"data is {data!r}; {where} holds no images ({', '.join(ENDINGS)}); fill or remove it"
        )
    names = [name for images in found for name in images]
    labels = torch.arange(len(found)).repeat_interleave(torch.tensor([len(images) for images in found]))
    files = _Files(folder, names)
    return Pictures(data, labels, len(found), size, unreadable == "skip", files.name, files.opened)


def _images_under(root: Path, name: str) -> list[str]:
    """Paths of images below ``root / name``, relative to ``root``, sorted."""
    found = []
    for place, folders, files in os.walk(root / name, followlinks=True):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        found += [
            os.path.relpath(os.path.join(place, file), root)
            for file in files
            if not file.startswith(".") and file.lower().endswith(ENDINGS)
        ]
    return sorted(found)


class _Rows:
    """The images of a set of the package datasets, undecoded, by number."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows, column

    def name(self, index: int) -> str:
        return f"row {index}"

    def opened(self, index: int) -> str | IO[bytes]:
        image = self.rows[index][self.column]
        if image is None:
            return io.BytesIO(b"")
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]


def load_hugging_face(data: str, name: str, size: int, unreadable: str) -> Pictures:
    """The training split of a set on the hub, or in a folder that ``save_to_disk`` or a person wrote.

    Images are its first column of that type, labels its first column of class labels, or one named label or
    labels; without one, all images are of one class.
    """
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError(
            f"data is {data!r}; the package datasets reads it: pip install datasets"
        ) from None
    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        rows = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
        if isinstance(rows, dict):
            split = "train" if "train" in rows else None
            split = split or (next(iter(rows)) if len(rows) == 1 else None)
            if split is None:
                raise ValueError(f"it has no split named train, but {', '.join(rows)}")
            rows = rows[split]
    except Exception as error:  # the hub, the network and scripts raise almost anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"data is {data!r}; datasets cannot load it ({reason}); it must be a set on the Hugging Face "
            "hub, or a folder with one"
        ) from None
    kinds = rows.features
    column = next((key for key, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if column is None or not len(rows):
        raise ValueError(
            f"data is {data!r}; it has {len(rows)} rows with the columns {', '.join(kinds)}; one must "
            "hold images"
        )
    label = next((key for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)), None)
    label = label or next((key for key in ("label", "labels") if key in kinds), None)
    labels, classes = torch.zeros(len(rows), dtype=torch.int64), 1
    if label is not None:
        values = list(rows[label])
        wrong = next((value for value in values if not isinstance(value, int) or value < 0), 0)
        if wrong != 0:
            raise ValueError(
                f"data is {data!r}; its column {label} holds {wrong!r}; labels must be integers >= 0"
            )
        labels = torch.tensor(values, dtype=torch.int64)
        classes = getattr(kinds[label], "num_classes", None) or int(labels.max()) + 1
        gaps = [] if classes > len(rows) else sorted(set(range(classes)) - set(values))
        if classes > len(rows) or gaps:
            what = f"class {gaps[0]} has no image" if gaps else f"{classes} classes and {len(rows)} images"
            raise ValueError(f"data is {data!r}; {what}; labels must be 0, 1, 2 and so on, each with images")
    source = _Rows(rows.select_columns([column]).cast_column(column, datasets.Image(decode=False)), column)
    return Pictures(data, labels, classes, size, unreadable == "skip", source.name, source.opened)
