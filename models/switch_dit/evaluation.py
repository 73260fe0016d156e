"""Measures a set of images against a reference: what models/evaluate.py does, as a function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from switch_dit.devices import resolve_device
from switch_dit.distances import (
    Estimate,
    frechet_distance,
    inception_score,
    kernel_distance,
    mind,
    precision_recall,
)
from switch_dit.features import Batch, Cache, Network, check_fits, extract, has_classifier, load_network
from switch_dit.image_sets import ImageSet, load_images
from switch_moe.ops._checks import check_choice, check_flags, check_integers

MEASURES = ("frechet", "kernel", "mind", "precision-recall", "inception-score", "accuracy")
_SPLITS = 10  # of the Inception score
_MEANING = {
    "frechet": "squared distance of Gaussians fitted to both sets; 0 is best",
    "kernel": "squared distance by a polynomial kernel, unbiased; about 0 is best",
    "mind": "squared sliced Wasserstein distance; 0 is best, real images have a little",
    "precision": "share of the samples that look like reference images; 1 is best",
    "recall": "share of the reference that the samples reach; 1 is best",
    "inception-score": "each image has one clear class, and all have many; 1 is worst",
    "accuracy": "share of the samples that the classifier reads as their label",
}


@dataclass(frozen=True)
class Measure:
    name: str  # with the network, unless it is Inception: FID, FD-digits
    value: float
    error: float | None  # of the value, in its unit; None where it is not known
    real: float | None  # the same measure between two halves of the reference
    meaning: str


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what and in which features."""

    samples: ImageSet
    reference: ImageSet
    network: Network
    width: int  # features of an image
    seed: int
    measures: tuple[Measure, ...]

    def __getitem__(self, name: str) -> Measure:
        """The measure of this name; ``KeyError`` lists those there are."""
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise KeyError(f"{name!r} is not among {', '.join(measure.name for measure in self.measures)}")

    def describe(self) -> str:
        """A table for people."""
        wide = max(len(measure.name) for measure in self.measures)
        lines = [
            f"samples    {self.samples}",
            f"reference  {self.reference}",
            f"features   {self.network.name}: {self.network.about}; {self.width:,} for each image",
            "",
            f"{'':{wide}}  {'value':>9}  {'error':>9}  {'real':>9}",
        ]
        for measure in self.measures:
            numbers = "  ".join(
                f"{'' if number is None else format(number, '.4g'):>9}"
                for number in (measure.value, measure.error, measure.real)
            )
            lines.append(f"{measure.name:{wide}}  {numbers}  {measure.meaning}")
        return "\n".join([*lines, "", *_notes(self.measures)])

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        sets = {
            name: {"name": each.name, "shape": list(each.shape), "sha256": each.checksum}
            for name, each in (("samples", self.samples), ("reference", self.reference))
        }
        features = {"name": self.network.name, "weights_sha256": self.network.identity, "width": self.width}
        measures = {measure.name: asdict(measure) for measure in self.measures}
        for measure in measures.values():
            del measure["name"]
        return sets | {"features": features, "seed": self.seed, "measures": measures}


def evaluate_images(
    samples: Any,
    reference: Any,
    features: str | Callable[[Tensor], Any] = "auto",
    *,
    measures: Sequence[str] = (),
    weights: Path | str | None = None,
    split: str = "auto",
    image_size: int = 0,
    batch_size: int = 32,
    device: str = "auto",
    cache: Path | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measures ``samples`` against ``reference``, in float64.

    The same images, weights and seed give the same numbers, up to the rounding of the network's float32 on
    other hardware or with another ``batch_size``.

    Args:
        samples, reference: what :func:`switch_dit.image_sets.load_images` takes.
        features: ``inception``, ``efficientnet-lite0``, a data set with a classifier, or a callable: see
            :mod:`switch_dit.features`. ``auto`` is the classifier where the reference is ``digits``,
            ``mnist-5k`` or ``fashion-mnist``, and else ``inception``.
        measures: some of :data:`MEASURES`. By default all that the features allow: the Inception score wants
            ``inception``, accuracy wants a classifier and samples with labels.
        weights: a file with the weights of the network.
        split: which images of a data set are taken, see ``load_images``.
        image_size: pictures are cropped and resized to this, see ``load_images``.
        batch_size: the network takes this many images at a time.
        device: where the network computes.
        cache: a folder that keeps the features of the reference. None keeps nothing.
        seed: of random choices: subsets of the kernel distance, directions of MIND, parts of the Inception
            score, halves of the reference.
        progress: whether bars show where it is.

    Raises:
        ValueError, TypeError, OSError, ModuleNotFoundError: name the argument, its value and what would be
            right. What can be known before the features is said before they are computed.
    """
    check_integers(batch_size=batch_size)
    check_integers(0, seed=seed)
    check_flags(progress=progress)
    for name in measures:
        check_choice("measures", name, MEASURES)
    where = resolve_device(device)
    if not callable(features) and features == "auto":
        features = str(reference) if has_classifier(reference) else "inception"
    sample_set = load_images(samples, "samples", split=split, image_size=image_size)
    reference_set = load_images(reference, "reference", split=split, image_size=image_size)
    _check_sets(sample_set, reference_set)
    network = load_network(features, weights, where)
    for argument, images in (("samples", sample_set), ("reference", reference_set)):
        check_fits(network, images, argument)
    chosen = _choose(tuple(measures), network, sample_set)
    if network.width is not None:
        _check_counts(chosen, sample_set, reference_set, network.width)
    real = _reference_features(network, reference_set, cache, batch_size, progress)
    width = real.shape[1]
    if network.width is None:
        _check_counts(chosen, sample_set, reference_set, width)
    drawn = extract(network, sample_set, "samples", batch_size, progress)
    if drawn.features.shape[1] != width:
        raise ValueError(
            f"features gave {drawn.features.shape[1]} numbers for an image of samples and {width} for one of "
            "reference; it must give as many"
        )
    found = _measure(chosen, network, sample_set, drawn, real, seed, progress)
    return Evaluation(sample_set, reference_set, network, width, seed, found)


def _check_sets(samples: ImageSet, reference: ImageSet) -> None:
    if samples.shape[2:] != reference.shape[2:]:
        raise ValueError(
            f"samples is {samples}, and reference is {reference}; their sizes must be the same. image_size "
            "crops and resizes pictures"
        )
    for argument, images in (("samples", samples), ("reference", reference)):
        if len(images) < 4:
            raise ValueError(f"{argument} is {images}; at least 4 are needed")
    if samples.shape == reference.shape and samples.checksum == reference.checksum:
        raise ValueError(
            f"samples is {samples.name}, and reference, {reference.name}, has the same images to the bit; a "
            "folder that has the name of a data set is written ./NAME"
        )


def _choose(measures: tuple[str, ...], network: Network, samples: ImageSet) -> tuple[str, ...]:
    """The measures asked for, or all that there can be."""
    missing = {}
    if not network.scores:
        missing["inception-score"] = f"features is {network.name!r}; inception alone gives its probabilities"
    if not network.classifies:
        missing["accuracy"] = f"features is {network.name!r}; the classifier of a data set gives labels"
    elif samples.labels is None:
        missing["accuracy"] = (
            f"samples is {samples.name}, without labels (arr_1, or folders named by class numbers)"
        )
    for name in measures:
        if name in missing:
            raise ValueError(f"measures has {name!r}, and {missing[name]}")
    return measures or tuple(name for name in MEASURES if name not in missing)


def _check_counts(chosen: tuple[str, ...], samples: ImageSet, reference: ImageSet, width: int) -> None:
    """``ValueError`` where there are too few images for a measure that was chosen."""
    for argument, images in (("samples", samples), ("reference", reference)):
        if "frechet" in chosen and len(images) <= width:
            others = " ".join(name for name in chosen if name != "frechet") or "kernel mind precision-recall"
            raise ValueError(
                f"{argument} is {images}; the covariance of {width} features, for the Frechet distance, "
                f"needs more than {width}. Give more images, or choose measures that need fewer: {others}"
            )
    if "inception-score" in chosen and len(samples) < _SPLITS:
        raise ValueError(f"samples is {samples}; the Inception score needs at least {_SPLITS}")


def _reference_features(
    network: Network, reference: ImageSet, cache: Path | str | None, batch_size: int, progress: bool
) -> np.ndarray:
    """The features [n, d], from the cache where it has them."""
    kept = None if cache is None or network.identity is None else Cache(cache)
    if kept is not None and (features := kept.load(network, reference)) is not None:
        return features
    features = extract(network, reference, "reference", batch_size, progress).features
    if kept is not None:
        try:
            kept.save(network, reference, features)
        except OSError as error:
            warnings.warn(f"the features are not kept in {cache}: {error}", stacklevel=3)
    return features


def _measure(
    chosen: tuple[str, ...], network: Network, samples: ImageSet, drawn: Batch, real: np.ndarray, seed: int,
    progress: bool,
) -> tuple[Measure, ...]:  # fmt: skip
    own, real = drawn.features.astype(np.float64), real.astype(np.float64)
    halves = np.array_split(real[np.random.default_rng(seed).permutation(len(real))], 2)
    found = []

    def add(kind: str, estimate: Estimate | float, floor: Estimate | float | None = None) -> None:
        value, error = estimate if isinstance(estimate, Estimate) else (estimate, None)
        real = floor.value if isinstance(floor, Estimate) else floor
        found.append(Measure(_name(kind, network), value, error, real, _MEANING[kind]))

    for name in tqdm(chosen, desc="measuring", leave=False, disable=not progress):
        if name == "frechet":
            enough = min(map(len, halves)) > real.shape[1]
            add(name, frechet_distance(own, real, strict=True), frechet_distance(*halves) if enough else None)
        elif name == "kernel":
            floor = kernel_distance(*halves, seed=seed) if min(map(len, halves)) >= 4 else None
            add(name, kernel_distance(own, real, seed=seed), floor)
        elif name == "mind":
            add(name, mind(own, real, seed=seed), mind(*halves, seed=seed))
        elif name == "precision-recall":
            precision, recall = precision_recall(real, own)
            floor = precision_recall(*halves) if min(map(len, halves)) >= 4 else (None, None)
            add("precision", precision, floor[0])
            add("recall", recall, floor[1])
        elif name == "inception-score":
            add(name, inception_score(drawn.probabilities, _SPLITS, seed))
        elif name == "accuracy":
            add(name, float((drawn.predicted == samples.labels).mean()))
    return tuple(found)


def _notes(measures: tuple[Measure, ...]) -> list[str]:
    """What the columns of the table are, as far as they are filled."""
    notes = []
    if any(measure.real is not None for measure in measures):
        notes.append("real: the same between two halves of the reference; half the images raise distances")
    if any(measure.error is not None for measure in measures):
        notes.append("error: a standard error; that of MIND counts its random directions only")
    if any(measure.name == "IS" for measure in measures):
        notes.append(f"error of IS: the standard deviation over {_SPLITS} parts, as papers report it")
    return notes


def _name(kind: str, network: Network) -> str:
    """FID, KID and IS are names of measures in the features of Inception; others say which features."""
    inception = {"frechet": "FID", "kernel": "KID", "mind": "MIND", "inception-score": "IS"}
    others = {"frechet": "FD", "kernel": "KD", "mind": "MIND"}
    if not network.title:
        return inception.get(kind, kind)
    return f"{others.get(kind, kind)}-{network.title}"
