"""Sets of images to measure: the same pixels from every source, and an error for each that does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from switch_dit.data import load_data
from switch_dit.image_sets import ImageSet, load_images


def pixels(count: int = 7, channels: int = 3, height: int = 6, width: int = 5) -> np.ndarray:
    """uint8 [n, H, W, C]"""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)


def read(images: ImageSet, batch_size: int = 3) -> np.ndarray:
    """All images of a set, uint8 [n, H, W, C]."""
    batches = list(images.read(batch_size))
    assert {batch.dtype for batch in batches} == {torch.uint8}
    assert [len(batch) for batch in batches][:-1] == [batch_size] * (len(batches) - 1)
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


def write_pictures(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_every_source_gives_the_same_pixels_and_checksum(tmp_path: Path, channels: int) -> None:
    images = pixels(channels=channels)
    np.savez(tmp_path / "plain.npz", images, np.arange(7))
    np.savez_compressed(tmp_path / "packed.npz", images)
    sources = [
        tmp_path / "plain.npz",
        str(tmp_path / "packed.npz"),
        write_pictures(tmp_path / "pictures", images),
        images.transpose(0, 3, 1, 2),
        torch.from_numpy(images).permute(0, 3, 1, 2),
    ]
    sets = [load_images(source, "samples") for source in sources]
    for found in sets:
        assert found.shape == (7, channels, 6, 5)
        assert np.array_equal(read(found), images)
        assert np.array_equal(read(found, 7), images)  # again, from the beginning
    assert len({found.checksum for found in sets}) == 1
    assert sets[0].labels.tolist() == list(range(7))
    assert [found.labels for found in sets[1:]] == [None] * 4
    assert load_images(images[::-1].transpose(0, 3, 1, 2), "samples").checksum != sets[0].checksum
    assert load_images(sets[0], "samples") is sets[0]


def test_folders_of_classes_and_cropping(tmp_path: Path) -> None:
    images = pixels(6)
    write_pictures(tmp_path / "classes" / "a", images[:2])
    write_pictures(tmp_path / "classes" / "b", images[2:])
    found = load_images(tmp_path / "classes", "samples")
    assert np.array_equal(read(found), images)
    assert found.labels is None  # the classes have no numbers
    write_pictures(tmp_path / "numbers" / "10", images[:2])
    write_pictures(tmp_path / "numbers" / "3" / "deeper", images[2:])
    numbered = load_images(tmp_path / "numbers", "samples")
    assert numbered.labels.tolist() == [10, 10, 3, 3, 3, 3]
    Image.fromarray(pixels(1, height=9)[0]).save(tmp_path / "classes" / "b" / "9.png")
    with pytest.raises(ValueError, match=r"a/0.png has 5x6 and b/9.png has 5x9 pixels; image_size crops"):
        load_images(tmp_path / "classes", "samples")
    cropped = load_images(tmp_path / "classes", "samples", image_size=4)
    expected = load_data(f"images:{tmp_path / 'classes'}", image_size=4)
    batch, _ = expected.batch(torch.arange(7), torch.zeros(7, dtype=torch.bool))
    assert np.array_equal(read(cropped), batch.permute(0, 2, 3, 1))


def test_data_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_data("digits")
    held_out = load_images("digits", "reference")
    assert str(held_out) == "digits (held-out): 360 images 1x8x8"
    expected = (digits.held_out.double() * 255 / 16).round().permute(0, 2, 3, 1)
    assert np.array_equal(read(held_out), expected)
    assert held_out.labels.tolist() == digits.held_out_labels.tolist()
    train = load_images("digits", "reference", split="train")
    assert len(train) == 1437
    assert train.checksum != held_out.checksum
    write_pictures(tmp_path / "digits", pixels(3))
    monkeypatch.chdir(tmp_path)
    for folder in (Path("digits"), "./digits"):
        assert np.array_equal(read(load_images(folder, "samples")), pixels(3))
    images = np.concatenate([pixels(10, height=5)] * 2)
    images[0] = np.resize(np.arange(256, dtype=np.uint8), (5, 5, 3))
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(20) % 2)
    assert len(load_images(tmp_path / "own.npz", "reference")) == 4
    found = [read(load_images(tmp_path / "own.npz", "reference", split=split)) for split in ("train", "auto")]
    rows = {image.tobytes() for image in np.concatenate(found)}
    assert rows == {image.tobytes() for image in images}  # bytes become floats and bytes again
    write_pictures(tmp_path / "pictures", pixels(3))
    name = f"images:{tmp_path / 'pictures'}"
    assert np.array_equal(read(load_images(name, "reference")), pixels(3))  # not cropped
    cropped = load_images(name, "reference", image_size=4)
    assert str(cropped).endswith("pictures (train): 3 images 3x4x4")
    with pytest.raises(ValueError, match="image_size is 0; reference, hf:x, needs the size"):
        load_images("hf:x", "reference")
    with pytest.raises(ValueError, match=r"split is 'held-out'; images:.* has no held-out images; it must"):
        load_images(name, "reference", split="held-out")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"arr_0": np.zeros((2, 4, 4, 3))},
            r"arr_0 in it is float64 \(2, 4, 4, 3\) and must be uint8",
        ),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"arr_0 in it is uint8 \(2, 3, 4, 4\) and must be"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"arr_0 in it is uint8 \(0, 4, 4, 3\) and must be"),
        ({"arr_0": np.array([None, 1], dtype=object)}, r"arr_0 in it is object \(2,\) and must be"),
        ({"arr_0": np.asfortranarray(pixels())}, "has the order of Fortran"),
        (
            {"arr_0": pixels(), "arr_1": np.zeros(6, int)},
            r"arr_1 in it is int64 \(6,\) and must be the labels",
        ),
        ({"arr_0": pixels(), "arr_1": np.zeros(7)}, r"arr_1 in it is float64 \(7,\) and .*, 7 integers"),
        ({"arr_0": pixels(), "arr_1": np.arange(7) - 1}, "arr_1 in it holds the label -1, below 0"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"it holds mu, sigma and must hold arr_0, images as uint8"),
        ({"images": pixels()}, r"samples: data '.*' has no array labels"),
    ],
)
def test_npz_files_that_do_not_fit(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_images(tmp_path / "x.npz", "samples")
    assert "samples" in str(error.value)
    assert "x.npz" in str(error.value)


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, pixels())
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-200])
    with pytest.raises(ValueError, match=r"samples is '.*x.npz'; the file is broken or no .npz"):
        load_images(path, "samples")
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npz'; the file is broken .*Bad CRC"):
        load_images(path, "samples").checksum  # noqa: B018
    np.savez_compressed(path, pixels())
    content = bytearray(path.read_bytes())
    content[200:220] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npz'; the file is broken"):
        load_images(path, "samples").checksum  # noqa: B018
    write_pictures(tmp_path / "pictures", pixels())
    picture = tmp_path / "pictures" / "3.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"samples is '.*pictures'; 3.png in it cannot be read"):
        read(load_images(tmp_path / "pictures", "samples"))
    picture.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"samples is '.*pictures'; 3.png in it cannot be read"):
        load_images(tmp_path / "pictures", "samples")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (
            "nothing",
            FileNotFoundError,
            "samples is 'nothing'; there is no such file or data set. It must",
        ),
        ("nothing.npz", FileNotFoundError, "samples is 'nothing.npz'; there is no such file"),
        (__file__, ValueError, r"samples is '.*py', a file; it must be an .npz file with arr_0, a folder"),
        (3, TypeError, "samples is a int; it must be an .npz file"),
        (
            np.zeros((2, 3, 4, 4)),
            ValueError,
            r"samples is float64 \(2, 3, 4, 4\); it must be uint8",
        ),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), ValueError, r"samples is uint8 \(2, 4, 4, 3\); it must"),
        ("images:", ValueError, "samples: data is 'images:'; after the colon comes a folder"),
        ("fashion-mnist:/nowhere", FileNotFoundError, r"samples: data is .*apt-get install dataset-fashion"),
    ],
)
def test_what_is_no_set_of_images(images: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_images(images, "samples")


def test_folders_and_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"samples: data is '.*'; it holds no images"):
        load_images(tmp_path, "samples")
    with pytest.raises(ValueError, match=r"image_size is 16; digits is 8x8 and is not resized"):
        load_images("digits", "samples", image_size=16)
    with pytest.raises(ValueError, match="split is 'test'; it must be one of auto, held-out, train"):
        load_images("digits", "samples", split="test")
