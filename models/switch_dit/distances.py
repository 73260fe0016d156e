"""How far two sets of images are apart, measured on their features. Pure numpy in float64, and deterministic.

Features are what a network makes of images, one row an image: ``[n, d]``.

| function | measures | needs |
|---|---|---|
| :func:`frechet_distance` | Gaussians fitted to both sets: FID, where the network is Inception | n > d |
| :func:`kernel_distance` | a polynomial kernel: KID; it has no bias at any n | few images |
| :func:`mind` | sorted projections on random directions; it sees more than two moments | equal n to compare |
| :func:`precision_recall` | how many look real, and how much of the real set is reached | similar n |
| :func:`inception_score` | whether each image has a clear class, and all have many classes | probabilities |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from switch_moe.ops._checks import check_flags, check_integers

_NUMBERS = 1 << 22  # a block of intermediate results holds at most this many: 32 MiB
_SUM = 1e-3  # probabilities in float16 add up to one within this


class Estimate(NamedTuple):
    """A value, and how uncertain it is in the same unit; each function says what the error counts."""

    value: float
    error: float


class PrecisionRecall(NamedTuple):
    precision: float  # share of generated images among the real ones
    recall: float  # share of real images among the generated ones


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of features, all that :func:`frechet_distance` needs.

    ``ValueError`` or ``TypeError`` where shapes differ, a number is not finite or ``count`` is below 2.
    """

    mean: np.ndarray  # float64 [d]
    covariance: np.ndarray  # float64 [d, d], divided by count - 1
    count: int  # of rows

    def __post_init__(self) -> None:
        check_integers(2, count=self.count)
        mean, covariance = _array("mean", self.mean, 1), _array("covariance", self.covariance, 2)
        if not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"covariance has shape {covariance.shape} and mean {mean.shape}; they must be [d, d] and [d]"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)


def statistics_of(features: np.ndarray) -> Statistics:
    """Mean and covariance of ``features [n, d]``, n >= 2."""
    return _statistics("features", features)


def frechet_distance(
    a: np.ndarray | Statistics, b: np.ndarray | Statistics, *, strict: bool = False
) -> float:
    """The squared Fréchet distance of Gaussians fitted to two sets (FID, arXiv 1706.08500, section 1).

    ``|mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))``

    With n <= d rows a covariance is singular and the distance has a large bias upwards.

    Args:
        a, b: features ``[n, d]`` and ``[m, d]``, or their :class:`Statistics`.
        strict: raises ``ValueError`` where a set has no more rows than features.

    Raises:
        ValueError, TypeError: fewer than 2 rows, other widths, not finite, no matrix.
    """
    check_flags(strict=strict)
    a, b = _statistics("a", a), _statistics("b", b)
    _check_widths("a", len(a.mean), "b", len(b.mean))
    for name, each in (("a", a), ("b", b)):
        width = len(each.mean)
        if strict and each.count <= width:
            raise ValueError(
                f"{name} has {each.count} rows; a covariance of {width} features needs more than {width}: "
                "give more images, or use kernel_distance"
            )
    mean_difference = a.mean - b.mean
    values, vectors = np.linalg.eigh(a.covariance)
    root_a = (vectors * _roots(values)) @ vectors.T
    # trace((cov_a cov_b)^1/2) is that of the symmetric (root_a cov_b root_a)^1/2
    trace_root = _roots(np.linalg.eigvalsh(root_a @ b.covariance @ root_a)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(mean_difference @ mean_difference + traces - 2 * trace_root))


def _roots(values: np.ndarray) -> np.ndarray:
    """Square roots of eigenvalues [d]; 0 for those that rounding alone can have made of 0.

    The root of 1e-16 is 1e-8: without this a singular covariance would have noise in the eighth digit.
    """
    rounding = len(values) * np.finfo(np.float64).eps * max(values.max(), 0.0)
    return np.sqrt(np.where(values > rounding, values, 0.0))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """The kernel distance KID (arXiv 1801.01401, section 4): unbiased squared MMD, kernel ``(x.y/d + 1)^3``.

    The value is the mean over random subsets of both sets; it may be below zero where the sets are alike.

    Args:
        a, b: features ``[n, d]`` and ``[m, d]``; at least 4 rows each.
        subsets: how many; at least 2.
        subset_size: rows of each set in a subset, at least 2. Where that is over half of the smaller set,
            subsets have half of it: the estimate stays unbiased, and the error needs subsets that differ.
        seed: of the choice of rows. Another order of rows is another choice.

    Returns:
        The value, and its standard error for other images of the same kind. The subsets overlap, so this is
        not their spread over the root of their number but the delete-d jackknife (Shao and Wu 1989) and the
        Monte Carlo error: ``spread * sqrt(1 / subsets + m / (n - m))``, where a subset has m rows and the
        smaller set n. It is rather too large where n differs or the sets are alike.
    """
    a, b = _pair("a", a, "b", b, least=4)
    check_integers(2, subsets=subsets, subset_size=subset_size)
    check_integers(0, seed=seed)
    smaller = min(len(a), len(b))
    size = min(subset_size, smaller // 2)
    random = np.random.default_rng(seed)
    values = np.empty(subsets)
    for place in range(subsets):
        x = a[random.choice(len(a), size, replace=False)]
        y = b[random.choice(len(b), size, replace=False)]
        values[place] = _unbiased_mmd(x, y)
    error = values.std(ddof=1) * np.sqrt(1 / subsets + size / (smaller - size))
    return Estimate(float(values.mean()), float(error))


def _unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Squared MMD of ``x`` and ``y`` [m, d]; pairs of a row with itself do not count."""
    size, width = x.shape
    total = 0.0
    for each in (x, y):
        kernel = (each @ each.T / width + 1) ** 3  # [m, m]
        total += (kernel.sum() - np.trace(kernel)) / (size * (size - 1))
    return total - 2 * float(((x @ y.T / width + 1) ** 3).mean())


def inception_score(probabilities: np.ndarray, splits: int = 10, seed: int = 0) -> Estimate:
    """The exponential of the mean ``KL(p(y|x) || p(y))`` (arXiv 1606.03498, section 4), in [1, K].

    Args:
        probabilities: of each class, ``[n, K]``: not negative, each row adding up to one.
        splits: the images are dealt to this many parts at random, for samples often come sorted by class.
        seed: of the dealing.

    Returns:
        Mean over the parts, and their standard deviation, as papers report it.
    """
    check_integers(1, splits=splits)
    check_integers(0, seed=seed)
    rows = _features("probabilities", probabilities, least=splits)
    sums = rows.sum(1)
    if rows.min() < 0 or np.abs(sums - 1).max() > _SUM:
        worst = sums[np.abs(sums - 1).argmax()]
        raise ValueError(
            f"probabilities holds {rows.min():.6g} and a row that adds up to {worst:.6g}; "
            "no entry may be negative, and each row must add up to 1"
        )
    scores = []
    for part in np.array_split(np.random.default_rng(seed).permutation(len(rows)), splits):
        p = rows[part]
        marginal = np.broadcast_to(p.mean(0), p.shape)
        seen = p > 0  # 0 log 0 is 0
        divergence = (p[seen] * np.log(p[seen] / marginal[seen])).sum() / len(p)
        scores.append(np.exp(divergence))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991, equations 1 and 2), both in [0, 1].

    A set covers the balls around its rows that reach to their k-th nearest other row. Precision is the share
    of generated rows that the real set covers, recall the share of real rows that the generated set covers.
    Both depend on n: compare equal numbers only. Memory beyond the features is about 100 MiB.

    Args:
        real, generated: features ``[n, d]`` and ``[m, d]``; more than ``k`` rows each.
    """
    check_integers(1, k=k)
    real, generated = _pair("real", real, "generated", generated, least=k + 1)
    centre = real.mean(0)  # |x|^2 + |y|^2 - 2 x.y cancels less near the origin
    real, generated = real - centre, generated - centre
    return PrecisionRecall(
        precision=_covered(generated, real, _radii(real, k)),
        recall=_covered(real, generated, _radii(generated, k)),
    )


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, _NUMBERS // columns)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _squared_distances(x: np.ndarray, y: np.ndarray, y_squared: np.ndarray) -> np.ndarray:
    """``[len(x), len(y)]``; ``y_squared`` [m] are the squared norms of ``y``."""
    distances = x @ y.T
    distances *= -2
    distances += np.square(x).sum(1)[:, None]
    distances += y_squared
    return distances.clip(min=0, out=distances)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row, [n]."""
    squared, radii = np.square(x).sum(1), np.empty(len(x))
    for block in _blocks(len(x), len(x)):
        distances = _squared_distances(x[block], x, squared)
        own = np.arange(block.start, block.stop)
        distances[own - block.start, own] = np.inf
        radii[block] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _covered(x: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    """The share of rows of ``x`` in one of the balls, whose squared radii are given."""
    squared, covered = np.square(centres).sum(1), 0
    for block in _blocks(len(x), len(centres)):
        inside = _squared_distances(x[block], centres, squared) <= radii
        covered += int(inside.any(1).sum())
    return covered / len(x)


def mind(a: np.ndarray, b: np.ndarray, directions: int = 1024, seed: int = 0) -> Estimate:
    """The sliced squared 2-Wasserstein distance of features (MIND, arXiv 2605.06797).

    Each direction projects both sets on a line, where the sorted values are matched quantile by quantile. For
    unequal n the match is still exact, for a row may be shared among several. The value is the mean over
    directions of the mean squared difference, so a shift of all features by v gives ``|v|^2 / d``. Sets from
    one distribution have a distance above zero, of order 1/n.

    Args:
        a, b: features ``[n, d]`` and ``[m, d]``; at least 2 rows each.
        directions: how many, at least 2, drawn evenly from the unit sphere.
        seed: of the directions.

    Returns:
        The value, and its standard error over directions. It does not count that other images would differ.
    """
    a, b = _pair("a", a, "b", b, least=2)
    check_integers(2, directions=directions)
    check_integers(0, seed=seed)
    n, m, width = len(a), len(b), a.shape[1]
    # In units of 1 / (n m), row i of a holds the quantiles [i m, (i + 1) m) and row j of b [j n, (j + 1) n).
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    begins = np.concatenate([[0], ends[:-1]])
    weights, rows_a, rows_b = (ends - begins) / (n * m), begins // m, begins // n
    random = np.random.default_rng(seed)
    values = np.empty(directions)
    for block in _blocks(directions, len(ends)):
        lines = random.standard_normal((block.stop - block.start, width))
        lines /= np.linalg.norm(lines, axis=1, keepdims=True)
        sorted_a, sorted_b = (np.sort(lines @ each.T, axis=1) for each in (a, b))
        values[block] = np.square(sorted_a[:, rows_a] - sorted_b[:, rows_b]) @ weights
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(directions)))


def _array(name: str, value: Any, dimensions: int) -> np.ndarray:
    """``value`` in float64, or the error that names it."""
    wanted = "numbers [n, d]" if dimensions == 2 else "numbers [d]"
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a numpy array of {wanted}")
    if value.dtype.kind not in "fiu":
        raise TypeError(f"{name} is {value.dtype}; it must be real {wanted}")
    if value.ndim != dimensions:
        raise ValueError(f"{name} has shape {value.shape}; it must be {wanted}")
    if not np.isfinite(value).all():
        wrong = value[~np.isfinite(value)][0]
        raise ValueError(f"{name} holds {wrong}; all of its numbers must be finite")
    return value.astype(np.float64, copy=False)


def _features(name: str, value: Any, least: int) -> np.ndarray:
    """Features ``[n, d]`` in float64, n >= least."""
    array = _array(name, value, 2)
    if not array.shape[1]:
        raise ValueError(f"{name} has shape {array.shape}; it must have at least one column")
    if len(array) < least:
        raise ValueError(f"{name} has {len(array)} rows; it must have at least {least}")
    return array


def _pair(name_a: str, a: Any, name_b: str, b: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = _features(name_a, a, least), _features(name_b, b, least)
    _check_widths(name_a, first.shape[1], name_b, second.shape[1])
    return first, second


def _check_widths(name_a: str, a: int, name_b: str, b: int) -> None:
    if a != b:
        raise ValueError(
            f"{name_b} has {b} features a row; {name_a} has {a}, and they must be the same features"
        )


def _statistics(name: str, value: Any) -> Statistics:
    if isinstance(value, Statistics):
        return value
    features = _features(name, value, least=2)
    width = features.shape[1]
    return Statistics(features.mean(0), np.cov(features, rowvar=False).reshape(width, width), len(features))
