"""Networks whose features images are measured in, and features of whole sets, kept in a cache.

| name | features of an image | names of its distances | needs |
|---|---|---|---|
| ``inception`` | 2,048 of Inception v3, and 1,008 class probabilities | FID, KID, IS | extra ``[eval]`` |
| ``efficientnet-lite0`` | 1,280 of EfficientNet-Lite0 | FD-EffNetLite0 and so on | a wheel, see there |
| a data set, as ``digits`` | 64 of a classifier fitted on its training images | FD-digits and so on | |
| any callable | what it returns | FD and its name | |

Numbers in the features of different networks cannot be compared, so only those of Inception are called FID.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from switch_dit import efficientnet
from switch_dit.data import Images, load_data
from switch_dit.files import checksum, first_line, write_whole
from switch_dit.image_sets import ImageSet
from switch_dit.metrics import Classifier, fitting_images

NETWORKS = ("inception", "efficientnet-lite0")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # the name ends with the begin of its sha256
_INCEPTION_SHA256 = "6726825d"
_WANTED = (
    f"{', '.join(NETWORKS)}, a data set with held-out images (digits, mnist-5k, fashion-mnist[:DIR], an .npz "
    "file), or a callable from uint8 [n, C, H, W] to features [n, d]"
)


class Batch(NamedTuple):
    """What a network makes of n images."""

    features: np.ndarray  # float32 or float64 [n, d]
    probabilities: np.ndarray | None = None  # of classes [n, K], for the Inception score
    predicted: np.ndarray | None = None  # labels, int64 [n]


@dataclass(frozen=True, eq=False)
class Network:
    """A function of images, and what must be known to name and to keep its features."""

    name: str  # as it is asked for
    title: str  # as the names of measures have it; "" for Inception
    about: str  # what it is, in a line
    width: int | None  # d, where it is known before the first image
    identity: str | None  # a checksum of weights and preparation; None: features are not kept
    function: Callable[[Tensor], Batch]  # of uint8 [n, C, H, W] on the CPU
    shape: tuple[int, int, int] | None = None  # of an image, where it takes only one
    scores: bool = False  # whether it gives probabilities
    classifies: bool = False  # whether it gives labels


def load_network(
    features: str | Callable[[Tensor], Any],
    weights: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> Network:
    """The network that ``features`` names: see the table above.

    Args:
        features: a name, or a callable from uint8 [n, C, H, W] on the CPU to numbers [n, d], a tensor or an
            array. Its ``__name__`` goes into the names of the measures; if it has a string ``identity``, a
            checksum of all that its features depend on, they may be kept in a cache.
        weights: the file with the weights of Inception or EfficientNet-Lite0, where they are not installed.
        device: where the network computes; classifiers of data sets are on the CPU.

    Raises:
        ValueError, TypeError: names what does not fit. ModuleNotFoundError, FileNotFoundError, OSError: what
            is missing, and how to get it.
    """
    if weights is not None and features not in NETWORKS:
        raise ValueError(
            f"weights is {str(weights)!r}; {', '.join(NETWORKS)} take a file of weights, and no other"
        )
    if callable(features):
        return _from_callable(features)
    if not isinstance(features, str):
        raise TypeError(f"features is a {type(features).__name__}; it must be {_WANTED}")
    path = None if weights is None else Path(weights)
    if features == "inception":
        return _inception(path, torch.device(device))
    if features == "efficientnet-lite0":
        return _efficientnet(path, torch.device(device))
    return _classifier(features)


def _from_callable(function: Callable[[Tensor], Any]) -> Network:
    name = getattr(function, "__name__", type(function).__name__).strip("<>")
    identity = getattr(function, "identity", None)
    if identity is not None and not isinstance(identity, str):
        raise TypeError(f"features has an identity that is a {type(identity).__name__}; it must be a string")

    def run(images: Tensor) -> Batch:
        found = function(images)
        array = found.detach().cpu().numpy() if isinstance(found, Tensor) else found
        if not isinstance(array, np.ndarray) or array.ndim != 2 or len(array) != len(images):
            shown = getattr(array, "shape", type(array).__name__)
            raise ValueError(
                f"features gave {shown} for {len(images)} images; it must give numbers [{len(images)}, d]"
            )
        return Batch(array)

    return Network(name, name, "a function of the caller", None, identity, run)


def _as_colours(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [n, 1 or 3, H, W] to [n, 3, H, W] on the device."""
    return images.to(device).expand(-1, 3, -1, -1)


def _efficientnet(weights: Path | None, device: torch.device) -> Network:
    network = efficientnet.load_efficientnet(weights).to(device)

    def run(images: Tensor) -> Batch:
        return Batch(network(_as_colours(images, device)).cpu().numpy())

    return Network(
        "efficientnet-lite0", "EffNetLite0", "EfficientNet-Lite0 of ImageNet; images become 224x224",
        efficientnet.WIDTH, efficientnet.SHA256, run,
    )  # fmt: skip


def _inception(weights: Path | None, device: torch.device) -> Network:
    """Inception v3 of 2015, as FID is defined; torch-fidelity resizes and scales as TensorFlow did."""
    module = _torch_fidelity()
    path = _downloaded_inception(module) if weights is None else weights
    if not path.is_file():
        raise FileNotFoundError(
            f"weights is {str(path)!r}; there is no such file. It must be {INCEPTION_FILE} from "
            f"{module.URL_INCEPTION_V3}"
        )
    found = checksum(path)
    if not found.startswith(_INCEPTION_SHA256):  # compared before torch-fidelity unpickles the file
        raise ValueError(
            f"weights is {str(path)!r}; its sha256 is {found} and must begin with {_INCEPTION_SHA256}: get "
            f"{module.URL_INCEPTION_V3}"
        )
    network = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    network.to(device).eval()

    def run(images: Tensor) -> Batch:
        features, logits = network(_as_colours(images, device).contiguous())
        return Batch(features.cpu().numpy(), logits.double().softmax(1).float().cpu().numpy())

    return Network(
        "inception",
        "",
        "Inception v3, the network of FID; images become 299x299",
        2048,
        found,
        run,
        scores=True,
    )


def _torch_fidelity() -> Any:
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError, AttributeError) as error:  # a torchvision for another torch raises any
        reason = first_line(error)
        raise ModuleNotFoundError(
            f"features is 'inception'; torch-fidelity, which has this network, cannot be imported "
            f"({reason}): pip install -e '.[eval]' with a torchvision built for this torch, or take "
            "efficientnet-lite0, whose distances are no FID"
        ) from None


def _downloaded_inception(module: Any) -> Path:
    """The weights in the folder of torch.hub, where they are fetched to once."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(module.URL_INCEPTION_V3, str(path), _INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
            raise OSError(
                f"features is 'inception'; its weights cannot be fetched ({reason}): get "
                f"{module.URL_INCEPTION_V3} and name the file with --weights"
            ) from None
    return path


def _classifier(name: str) -> Network:
    """A perceptron fitted on the training images of a data set, as training measures its samples by."""
    try:
        data = load_data(name)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise type(error)(f"features is {name!r}; it must be {_WANTED}. As a data set: {error}") from None
    if not isinstance(data, Images):
        raise ValueError(f"features is {name!r}, a data set without held-out images; it must be {_WANTED}")
    classifier = Classifier(*fitting_images(data))

    def run(images: Tensor) -> Batch:
        x = images.double() / 127.5 - 1
        return Batch(classifier.features(x), predicted=classifier.predict(x))

    shape = (data.channels, data.size, data.size)
    title, about = Path(name.partition(":")[0]).stem, f"a classifier fitted on the training images of {name}"
    width = classifier.features(torch.zeros(1, *shape)).shape[1]
    return Network(
        name, title, about, width, classifier.checksum(), run, shape, classifies=True
    )  # fmt: skip


def has_classifier(name: Any) -> bool:
    """Whether ``name`` is a data set with a classifier."""
    return isinstance(name, str) and name.partition(":")[0] in (
        "digits",
        "mnist-5k",
        "fashion-mnist",
    )


def check_fits(network: Network, images: ImageSet, argument: str) -> None:
    """``ValueError`` where the network cannot take images of this shape."""
    if network.shape is not None and images.shape[1:] != network.shape:
        shown, wanted = ("x".join(map(str, shape)) for shape in (images.shape[1:], network.shape))
        raise ValueError(
            f"features is {network.name!r}; its classifier takes images {wanted}, and {argument}, "
            f"{images.name}, has {shown}: take {' or '.join(NETWORKS)}"
        )


def extract(network: Network, images: ImageSet, argument: str, batch_size: int, progress: bool) -> Batch:
    """Features of all images, in order; a bar shows where it is, if ``progress``.

    On a GPU convolutions are in true float32, by deterministic algorithms: TF32 keeps 10 bits of a number.
    """
    parts = []
    bar = tqdm(total=len(images), desc=f"features of {argument}", leave=False, disable=not progress)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact, bar:
        for batch in images.read(batch_size):
            part = network.function(batch)
            if not np.isfinite(part.features).all():
                raise ValueError(f"features gave numbers that are not finite for {argument}, {images.name}")
            parts.append(part)
            bar.update(len(batch))
    columns = [None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)]
    return Batch(*columns)


class Cache:
    """A folder of features, each file named by the checksums of the images and of the network.

    A file also has the checksum of its own content. One that is damaged or has been renamed is not used: a
    warning says so, and it is written again.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, network: Network, images: ImageSet) -> Path:
        key = hashlib.sha256(json.dumps(self._key(network, images)).encode()).hexdigest()
        return self.folder / f"{network.title or 'inception'}-{key[:20]}.safetensors"

    def _key(self, network: Network, images: ImageSet) -> dict[str, str]:
        return {
            "format": "1",  # another number where the preparation of the images changes
            "images": images.checksum,
            "features": network.name,
            "weights": str(network.identity),
        }

    def load(self, network: Network, images: ImageSet) -> np.ndarray | None:
        """The features [n, d], or None where there are none that are whole."""
        path = self.path(network, images)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "numpy") as file:
                note, features = dict(file.metadata() or {}), file.get_tensor("features")
        except (SafetensorError, OSError, ValueError) as error:
            return self._refuse(path, f"cannot be read ({type(error).__name__})")
        whole = note.pop("sha256", None) == hashlib.sha256(np.ascontiguousarray(features)).hexdigest()
        if not whole:
            return self._refuse(path, "does not have the checksum that it was written with")
        if note != self._key(network, images) or len(features) != len(images):
            return self._refuse(path, "is of other images or of another network than its name says")
        return features

    @staticmethod
    def _refuse(path: Path, reason: str) -> None:
        warnings.warn(f"{path} {reason}; its features are computed again", stacklevel=4)

    def save(self, network: Network, images: ImageSet, features: np.ndarray) -> None:
        """Whole or not at all."""
        features = np.ascontiguousarray(features)
        note = self._key(network, images) | {"sha256": hashlib.sha256(features).hexdigest()}
        path = self.path(network, images)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"features": features}, note))
