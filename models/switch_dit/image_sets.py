"""Sets of images to measure, as bytes in batches: .npz files of ADM, folders of pictures, data sets, arrays.

A set is never in memory as floats, and one on the disk is not in memory at all: each pass reads it again.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from switch_dit.data import Data, Latents, load_data
from switch_dit.data.pictures import Pictures, Unreadable, load_folder, read_picture
from switch_dit.files import first_line
from switch_moe.ops._checks import check_choice, check_integers

SPLITS = ("auto", "held-out", "train")
_NAMES = ("digits", "mnist-5k", "fashion-mnist")
_PREFIXES = ("fashion-mnist:", "images:", "latents:", "hf:")
_WANTED = (
    "an .npz file with arr_0, a folder of pictures, or a data set: digits, mnist-5k, fashion-mnist[:DIR], "
    "images:DIR, hf:NAME_OR_PATH or an .npz file with images and labels"
)
_GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L")  # modes of Pillow
_CHECKED = 256  # images at a time, for the checksum


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images that can be read from the beginning any number of times."""

    name: str  # what messages and reports call the set
    shape: tuple[int, int, int, int]  # [n, C, H, W]
    read: Callable[[int], Iterable[Tensor]]  # from a batch size to batches, uint8 [b, C, H, W]
    labels: np.ndarray | None = None  # int64 [n]

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def checksum(self) -> str:
        """sha256 of the shape and all pixels; the labels and where the images are do not count."""
        digest = hashlib.sha256(repr(tuple(self.shape)).encode())
        for batch in self.read(_CHECKED):
            digest.update(batch.contiguous().numpy())
        return digest.hexdigest()

    def __str__(self) -> str:
        count, channels, height, width = self.shape
        return f"{self.name}: {count:,} images {channels}x{height}x{width}"


def load_images(images: Any, argument: str, *, split: str = "auto", image_size: int = 0) -> ImageSet:
    """The set of images that ``images`` names.

    - a path ending in .npz: ``arr_0``, uint8 [n, H, W, C], C = 1 or 3, and perhaps ``arr_1``, labels [n].
      This is what sample_switch_dit.py writes and the evaluation of ADM (arXiv 2105.05233) reads.
    - a folder: pictures, or a folder of pictures for each class. Transparent ones are put on white.
    - a string that names a data set as ``--data`` of train_switch_dit.py takes it. A folder of the same name
      is ``./NAME``, or a Path. ``images:DIR`` is the folder DIR.
    - an array or a tensor, uint8 [n, C, H, W]; an :class:`ImageSet` stays as it is.

    Args:
        argument: what messages call ``images``.
        split: of a data set. ``auto`` takes the held-out images, or those for training if none are held out.
        image_size: pictures are cropped and resized to this, as for training. With 0 those of a folder stay
            as they are; ``hf:`` needs it, and other sets have their own size.

    Raises:
        ValueError, TypeError, FileNotFoundError, ModuleNotFoundError: name the argument, its value and what
            would be right.
    """
    check_choice("split", split, SPLITS)
    check_integers(0, image_size=image_size)
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, (np.ndarray, Tensor)):
        return _from_array(images, argument)
    if not isinstance(images, (str, Path)):
        raise TypeError(f"{argument} is a {type(images).__name__}; it must be {_WANTED}, or an array")
    name = str(images)
    if isinstance(images, str) and (name in _NAMES or name.startswith(_PREFIXES)):
        if name.startswith("hf:") and not image_size:
            raise ValueError(f"image_size is 0; {argument}, {name}, needs the size to resize pictures to")
        if name.startswith("images:") and not image_size and split != "held-out" and name != "images:":
            return _from_folder(name.removeprefix("images:"), argument, 0)  # as they are
        return _from_data(name, argument, split, image_size)
    if name.endswith(".npz"):
        arrays = _arrays_in(name, argument)
        if "arr_0" in arrays:
            return _from_npz(name, argument, arrays)
        if "images" in arrays:
            return _from_data(name, argument, split, image_size)
        raise ValueError(
            f"{argument} is {name!r}; it holds {', '.join(arrays) or 'nothing'} and must hold arr_0, "
            "images as uint8 [n, H, W, C]"
        )
    if Path(name).is_dir():
        return _from_folder(name, argument, image_size)
    if Path(name).exists():
        raise ValueError(f"{argument} is {name!r}, a file; it must be {_WANTED}")
    raise FileNotFoundError(
        f"{argument} is {name!r}; there is no such file or data set. It must be {_WANTED}"
    )


def _from_array(images: np.ndarray | Tensor, argument: str) -> ImageSet:
    dtype = str(images.dtype).removeprefix("torch.")
    if dtype != "uint8" or images.ndim != 4 or images.shape[1] not in (1, 3) or not _size(images.shape):
        raise ValueError(
            f"{argument} is {dtype} {tuple(images.shape)}; it must be uint8 [n, C, H, W] with C = 1 or 3"
        )
    tensor = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images.cpu())
    return ImageSet("an array", tuple(tensor.shape), tensor.split)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


@contextmanager
def _broken_is_said(name: str, argument: str) -> Iterator[None]:
    """A broken file makes zipfile, zlib and numpy raise almost anything."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"{argument} is {name!r}; there is no such file") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, RuntimeError, EOFError, OSError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{argument} is {name!r}; the file is broken or no .npz file ({reason}); write it again"
        ) from None


def _arrays_in(name: str, argument: str) -> dict[str, tuple[tuple[int, ...], bool, np.dtype]]:
    """Shape, whether it is in Fortran's order, and type of each array of an .npz file, from their headers."""
    found = {}
    with _broken_is_said(name, argument), zipfile.ZipFile(name) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as file:
                    found[member.removesuffix(".npy")] = _header(file)
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _from_npz(name: str, argument: str, arrays: dict[str, Any]) -> ImageSet:
    """The images are read through zipfile, which checks the file's own checksums at the end."""
    shape, fortran, dtype = arrays["arr_0"]
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not _size(shape):
        raise ValueError(
            f"{argument} is {name!r}; arr_0 in it is {dtype} {shape} and must be uint8 [n, H, W, C] with "
            "C = 1 or 3, from 0, black, to 255, white"
        )
    if fortran:
        raise ValueError(
            f"{argument} is {name!r}; arr_0 in it has the order of Fortran: write it by way of "
            "numpy.ascontiguousarray"
        )
    count, height, width, channels = shape
    labels = None
    if "arr_1" in arrays:
        (labels_shape, _, labels_dtype) = arrays["arr_1"]
        if labels_shape != (count,) or labels_dtype.kind not in "iu":
            raise ValueError(
                f"{argument} is {name!r}; arr_1 in it is {labels_dtype} {labels_shape} and must be the "
                f"labels, {count} integers"
            )
        with _broken_is_said(name, argument), np.load(name) as file:
            labels = file["arr_1"].astype(np.int64)
        if labels.min() < 0:
            raise ValueError(f"{argument} is {name!r}; arr_1 in it holds the label {labels.min()}, below 0")

    def read(batch_size: int) -> Iterator[Tensor]:
        with zipfile.ZipFile(name) as archive, archive.open("arr_0.npy") as file:
            with _broken_is_said(name, argument):
                _header(file)
            for begin in range(0, count, batch_size):
                rows = min(batch_size, count - begin)
                with _broken_is_said(name, argument):
                    content = bytearray(file.read(rows * height * width * channels))
                    pixels = torch.frombuffer(content, dtype=torch.uint8).view(rows, height, width, channels)
                yield pixels.permute(0, 3, 1, 2).contiguous()
            with _broken_is_said(name, argument):
                file.read(1)  # the end, where the checksum of the content is compared

    return ImageSet(name, (count, channels, height, width), read, labels)


def _from_folder(name: str, argument: str, image_size: int) -> ImageSet:
    try:
        pictures = load_folder(name, Path(name), image_size, "fail")
    except (ValueError, OSError) as error:
        raise type(error)(f"{argument}: {error}") from None
    count = len(pictures)
    with ThreadPoolExecutor(_threads()) as pool:
        kinds = list(pool.map(_kind, repeat(argument), repeat(pictures), range(count)))
    sizes = [size for size, _ in kinds]
    other = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None and not image_size:
        shown = [
            f"{pictures.name(number)} has {sizes[number][0]}x{sizes[number][1]}" for number in (0, other)
        ]
        raise ValueError(
            f"{argument} is {name!r}; its pictures have different sizes, {shown[0]} and {shown[1]} pixels; "
            "image_size crops and resizes them to one"
        )
    width, height = (image_size, image_size) if image_size else sizes[0]
    channels = 1 if all(mode in _GREY for _, mode in kinds) else 3

    def picture(number: int) -> np.ndarray:
        try:
            return read_picture(pictures.opened(number), image_size)[:channels]
        except Unreadable as error:
            raise _unreadable(argument, pictures, number, error) from None

    def read(batch_size: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor(_threads()) as pool:
            for begin in range(0, count, batch_size):
                rows = range(begin, min(begin + batch_size, count))
                yield torch.from_numpy(np.stack(list(pool.map(picture, rows))))

    return ImageSet(name, (count, channels, height, width), read, _labels(pictures))


def _labels(pictures: Pictures) -> np.ndarray | None:
    """int64 [n], where the folders of the classes have the numbers of the classes as their names."""
    places = [Path(pictures.name(number)).parts for number in range(len(pictures))]
    if not all(len(parts) > 1 and parts[0].isdecimal() for parts in places):
        return None
    return np.array([int(parts[0]) for parts in places], np.int64)


def _kind(argument: str, pictures: Pictures, number: int) -> tuple[tuple[int, int], str]:
    """Width and height, and Pillow's mode, from the head of the file."""
    try:
        with Image.open(pictures.opened(number)) as picture:
            return picture.size, picture.mode
    except Exception as error:  # broken files make Pillow raise almost anything
        raise _unreadable(argument, pictures, number, error) from None


def _unreadable(argument: str, pictures: Pictures, number: int, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"{argument} is {pictures.data!r}; {pictures.name(number)} in it cannot be read ({reason}); remove it"
    )


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _from_data(name: str, argument: str, split: str, image_size: int) -> ImageSet:
    try:
        data = load_data(name, image_size=image_size)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise type(error)(f"{argument}: {error}") from None
    if isinstance(data, Latents):
        raise ValueError(f"{argument} is {name!r}; these are latents, and images are measured")
    if data.held_out is None and split == "held-out":
        raise ValueError(f"split is 'held-out'; {name} has no held-out images; it must be train or auto")
    part, read, labels = _part(data, split)
    count = len(labels)
    shape = (count, data.channels, data.size, data.size)

    def batches(batch_size: int) -> Iterator[Tensor]:
        for rows in torch.arange(count).split(batch_size):
            yield ((data.scale(read(rows)) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    return ImageSet(f"{name} ({part})", shape, batches, labels)


def _part(data: Data, split: str) -> tuple[str, Callable[[Tensor], Tensor], np.ndarray]:
    """What of the set it is, how to read rows of it, and its labels."""
    if split != "train" and data.held_out is not None and data.held_out_labels is not None:
        held_out = data.held_out
        return "held-out", lambda rows: held_out[rows], data.held_out_labels.numpy()
    labels = data.labels if isinstance(data, Pictures) else data.in_memory[1]
    return "train", lambda rows: data.batch(rows, torch.zeros(len(rows), dtype=torch.bool))[0], labels.numpy()
