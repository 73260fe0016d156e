"""Are the generated images what was asked for, and do they look like the real ones?

Both measures use a small classifier fitted on the real training images. Small images are what it is meant
for; models/evaluate.py has FID and other measures for natural images.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from switch_dit.data.memory import Images
from switch_dit.distances import frechet_distance, mind
from switch_moe.ops._checks import FLOATS, check_dtype, check_range, check_shape, check_tensors

_MEANING = {
    "conditional_accuracy": "share of generated images that the classifier reads as the label asked for",
    "classifier_accuracy": "the same classifier on real held-out images: what perfect samples would get",
    "frechet_distance": "generated against held-out real images, in the classifier's features; 0 is best",
    "frechet_floor": "the same distance between two halves of the real images, by sampling noise alone",
    "mind": "sliced Wasserstein distance in the same features (MIND); 0 is best, real images have a little",
    "out_of_range": "share of generated pixels beyond [-1, 1], where a picture cuts them off",
}
_ROUNDING = 1 / 510  # half a grey value
_FITTED = 10_000  # training images that the classifier sees at most: it is as good, and fits the memory


@dataclass
class Metrics:
    conditional_accuracy: float
    classifier_accuracy: float
    frechet_distance: float
    frechet_floor: float
    mind: float
    out_of_range: float
    generated: int

    def describe(self) -> str:
        """One line per number, with its meaning."""
        return "\n".join(f"  {name:21} {getattr(self, name):7.3f}  {text}" for name, text in _MEANING.items())


class Classifier:
    """A perceptron with one hidden layer on pixels; the hidden layer is the feature space."""

    def __init__(self, images: Tensor, labels: Tensor, features: int = 64) -> None:
        from sklearn.neural_network import MLPClassifier

        self._model = MLPClassifier(
            (features,), alpha=1e-2, max_iter=300, early_stopping=False, random_state=0
        )
        self._model.fit(_pixels(images), labels.numpy())

    def predict(self, images: Tensor) -> np.ndarray:
        """The label of each image, int64 [n]."""
        return self._model.predict(_pixels(images))

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        return float((self.predict(images) == labels.numpy()).mean())

    def checksum(self) -> str:
        """sha256 of the weights."""
        digest = hashlib.sha256()
        for array in (*self._model.coefs_, *self._model.intercepts_):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def features(self, images: Tensor) -> np.ndarray:
        """float64 [n, features]."""
        hidden = _pixels(images) @ self._model.coefs_[0] + self._model.intercepts_[0]
        return np.maximum(hidden, 0).astype(np.float64)


def fitting_images(images: Images) -> tuple[Tensor, Tensor]:
    """What the classifier of a data set is fitted on: float32 [n, C, H, W] in [-1, 1], and labels [n]."""
    order = np.random.default_rng(0).permutation(len(images.train))[:_FITTED]
    order.sort()
    return images.scale(images.train[order]), images.train_labels[order]


def _pixels(images: Tensor) -> np.ndarray:
    """What a picture of 8 bits shows of the images."""
    return ((images.flatten(1).double().clamp(-1, 1) + 1) * 127.5).round().div(127.5).sub(1).numpy()


class Evaluator:
    """Measures generated images against a data set that has held-out images.

    The classifier is fitted once, at the first call.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    @cached_property
    def _real(self) -> tuple[Classifier, float, np.ndarray, float]:
        """The classifier and, of the held-out images, its accuracy and features; and the floor."""
        images = self.images
        train, labels = fitting_images(images)
        held_out = images.scale(images.held_out)
        classifier = Classifier(train, labels)
        features = classifier.features(held_out)
        real = np.concatenate([classifier.features(train), features])
        order = np.random.default_rng(0).permutation(len(real))
        half = len(real) // 2
        floor = frechet_distance(real[order[:half]], real[order[half:]])
        return classifier, classifier.accuracy(held_out, images.held_out_labels), features, floor

    def __call__(self, generated: Tensor, labels: Tensor) -> Metrics:
        """Measures for generated images [n, C, H, W] on the CPU, asked for with ``labels [n]``.

        ``ValueError`` or ``TypeError`` where they do not fit, or are not finite.
        """
        images = self.images
        check_tensors(generated=generated, labels=labels)
        check_shape("generated", generated, ("n", *images.train.shape[1:]))
        check_dtype("generated", generated, *FLOATS)
        check_shape("labels", labels, (generated.shape[0],))
        check_dtype("labels", labels, torch.int64, torch.int32)
        check_range("labels", labels, images.num_classes, "the classes")
        if generated.shape[0] < 2:
            raise ValueError(f"generated has {generated.shape[0]} images; it takes at least 2 to measure")
        generated = generated.detach()
        if not bool(generated.isfinite().all()):
            raise ValueError("generated holds numbers that are not finite; there is nothing to measure")
        classifier, accuracy, real, floor = self._real
        drawn = classifier.features(generated)
        return Metrics(
            conditional_accuracy=classifier.accuracy(generated, labels),
            classifier_accuracy=accuracy,
            frechet_distance=frechet_distance(drawn, real),
            frechet_floor=floor,
            mind=mind(drawn, real).value,
            out_of_range=float((generated.abs() > 1 + _ROUNDING).double().mean()),
            generated=len(generated),
        )


def evaluate(images: Images, generated: Tensor, labels: Tensor) -> Metrics:
    """What an :class:`Evaluator` of ``images`` finds; it is fitted for this one call."""
    return Evaluator(images)(generated, labels)
