"""Training images: scikit-learn's handwritten digits, or an .npz file of your own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.2
_SPLIT_SEED = 0  # the split is the same for every run, so that runs can be compared


@dataclass
class Images:
    """Images, split into training and held-out ones, each class in the same proportion.

    They stay in bytes; :meth:`scale` makes floats of a batch on its device.
    """

    train: Tensor  # uint8 [n, C, H, W], or float32 in [-1, 1]
    train_labels: Tensor  # int64 [n]
    held_out: Tensor
    held_out_labels: Tensor
    num_classes: int
    largest: int = 255  # the value of white

    def scale(self, images: Tensor) -> Tensor:
        """Bytes to float32 in [-1, 1]; floats stay as they are."""
        return images if images.is_floating_point() else images.float() * (2 / self.largest) - 1


def load_images(data: str) -> Images:
    """The images that ``data`` names.

    ``digits`` are 1,797 real 8x8 grey digits of 10 classes. A path ending in .npz is a file with the arrays
    ``images``, uint8 [n, H, W] or [n, H, W, C] with H = W, and ``labels``, integers [n] from 0.

    Raises ``ValueError`` naming what does not fit, ``FileNotFoundError`` for a missing file.
    """
    from sklearn.model_selection import train_test_split

    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels, largest = digits.images[..., None].astype(np.uint8), digits.target, 16
    else:
        (images, labels), largest = _load_npz(data), 255
    labels = labels.astype(np.int64)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, random_state=_SPLIT_SEED, stratify=labels
    )

    def part(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(images[chosen].transpose(0, 3, 1, 2).copy())
        return pixels, torch.from_numpy(labels[chosen])

    return Images(*part(train), *part(held_out), num_classes=int(labels.max()) + 1, largest=largest)


def _load_npz(data: str) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(data, (str, Path)):
        raise TypeError(f"data is {data!r}; it must be digits or the path of an .npz file")
    path = Path(data)
    if path.suffix != ".npz":
        raise ValueError(f"data is {data!r}; it must be digits or the path of an .npz file")
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


def batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches of indices, int64 [batch_size], from the seed alone."""
    per_epoch = count // batch_size
    for epoch in itertools.count():
        generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator, device="cpu")
        yield from order[: per_epoch * batch_size].split(batch_size)
