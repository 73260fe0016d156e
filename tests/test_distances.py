"""Distances of features, against scipy, scikit-learn, loops and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from switch_dit import distances
from switch_dit.distances import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    mind,
    precision_recall,
    statistics_of,
)


def features(rows: int, width: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Correlated features that are not Gaussian."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width)) / math.sqrt(width)
    return np.maximum(random.standard_normal((rows, width)) @ mixing, -0.5) * scale + shift


@pytest.mark.parametrize(("rows", "width"), [(500, 1), (500, 7), (400, 64), (30, 64)])
def test_frechet_distance_by_sqrtm(rows: int, width: int) -> None:
    a, b = features(rows, width, 0), features(rows + 100, width, 1, 1.5, 0.3)
    cov_a, cov_b = (np.atleast_2d(np.cov(each.T)) for each in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    tolerance = 1e-9 if rows > width else 1e-5  # singular: sqrtm is the one that loses digits
    assert frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(statistics_of(a), b) == frechet_distance(a, statistics_of(b))


def test_frechet_distance_of_singular_covariances() -> None:
    """Features that are always 0, turned among the others, change no digit before the 11th."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(300, 12)), 1.5 * generator.normal(size=(200, 12)) + 0.3
    turn, _ = np.linalg.qr(generator.normal(size=(64, 64)))
    wide = [np.pad(rows, ((0, 0), (0, 52))) @ turn for rows in (a, b)]
    assert frechet_distance(*wide) == pytest.approx(frechet_distance(a, b), rel=1e-11)
    assert frechet_distance(wide[0], wide[0]) == pytest.approx(0, abs=1e-11)
    constant = np.zeros((5, 3))
    assert frechet_distance(constant, constant + 2) == 12


def test_frechet_distance_of_known_gaussians() -> None:
    """Of N(m, s^2) and N(n, t^2) it is (m - n)^2 + (s - t)^2, for each axis."""
    scale, other = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    a = Statistics(np.array([1.0, 0.0, 2.0]), np.diag(scale**2), 1000)
    b = Statistics(np.zeros(3), np.diag(other**2), 1000)
    assert frechet_distance(a, b) == pytest.approx(5 + ((scale - other) ** 2).sum(), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_strict_wants_more_rows_than_features() -> None:
    few, many = features(8, 8), features(9, 8)
    assert frechet_distance(few, many) > 0
    assert frechet_distance(many, many, strict=True) == pytest.approx(0, abs=1e-12)
    message = "b has 8 rows; a covariance of 8 features needs more than 8: give more images, or use kernel"
    with pytest.raises(ValueError, match=message):
        frechet_distance(many, few, strict=True)


def test_kernel_by_scikit_learn() -> None:
    """A subset's MMD, and the value as the mean of subsets."""
    x, y = features(40, 6, 0), features(40, 6, 1, 1.3)
    own = [polynomial_kernel(each, degree=3, gamma=1 / 6, coef0=1) for each in (x, y)]
    expected = sum((k.sum() - np.trace(k)) / (40 * 39) for k in own)
    expected -= 2 * polynomial_kernel(x, y, degree=3, gamma=1 / 6, coef0=1).mean()
    assert distances._unbiased_mmd(x, y) == pytest.approx(expected, rel=1e-10)
    value, error = kernel_distance(x, y, subsets=4000, subset_size=20)
    assert value == pytest.approx(expected, abs=0.2 * error)


@pytest.mark.slow
def test_kernel_distance_has_no_bias() -> None:
    """The expected value is that of the populations, and the error the standard deviation of the value."""
    # x ~ N(0, 1), y ~ N(1, 1) in one dimension: E(xy + 1)^3 needs moments 1, 2, 3 only.
    moments = {0: (0.0, 1.0, 0.0), 1: (1.0, 2.0, 4.0)}

    def expected_kernel(p: int, q: int) -> float:
        return 1 + sum(math.comb(3, i + 1) * moments[p][i] * moments[q][i] for i in range(3))

    truth = expected_kernel(0, 0) + expected_kernel(1, 1) - 2 * expected_kernel(0, 1)
    values, errors = [], []
    for seed in range(100):
        random = np.random.default_rng(seed)
        a, b = random.standard_normal((200, 1)), random.standard_normal((200, 1)) + 1
        value, error = kernel_distance(a, b, subsets=40, subset_size=1000)
        values.append(value)
        errors.append(error)
    spread = np.std(values, ddof=1)
    assert np.mean(values) == pytest.approx(truth, abs=3 * spread / math.sqrt(100))
    # The spread itself is known within 7%.
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.25)


def test_inception_score() -> None:
    """By a loop; one class for each image and all equally often gives K, no information gives 1."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(5, 0.3), 103)
    scores = []
    for part in np.array_split(np.random.default_rng(7).permutation(103), 4):
        marginal = sum(p[i] for i in part) / len(part)
        scores.append(math.exp(sum(scipy.stats.entropy(p[i], marginal) for i in part) / len(part)))
    value, spread = inception_score(p, 4, seed=7)
    assert value == pytest.approx(np.mean(scores), rel=1e-12)
    assert spread == pytest.approx(np.std(scores), rel=1e-9)
    certain = np.eye(5).repeat(20, axis=0)
    assert inception_score(certain, 1) == pytest.approx((5, 0))
    assert inception_score(certain, 5).value > 4  # though the rows are sorted by class
    assert inception_score(np.full((10, 4), 0.25, np.float16)) == pytest.approx((1, 0))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("numbers", [1 << 22, 100])  # in one block, and in many
def test_precision_recall_by_scikit_learn(k: int, numbers: int, monkeypatch) -> None:
    monkeypatch.setattr(distances, "_NUMBERS", numbers)
    real, generated = features(90, 4, 0), features(70, 4, 1, 0.6, 0.2)

    def covered(x: np.ndarray, by: np.ndarray) -> float:
        radii = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(by).kneighbors(by)[0][:, -1]
        return float((np.linalg.norm(x[:, None] - by, axis=-1) <= radii).any(1).mean())

    expected = covered(generated, real), covered(real, generated)
    assert 0 < expected[1] < expected[0] <= 1
    assert precision_recall(real, generated, k) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_say_different_things() -> None:
    real = features(200, 2)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    narrow = real.mean(0) + 1e-3 * features(200, 2, 1)
    precision, recall = precision_recall(real, narrow)
    assert precision == 1
    assert recall < 0.05


@pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 18), (7, 5), (2, 9)])
def test_mind_in_one_dimension_is_optimal_transport(n: int, m: int) -> None:
    """By assignment: each row is copied until both sets have as many."""
    a, b = features(n, 1, 0), features(m, 1, 1, 2.0)
    common = math.lcm(n, m)
    cost = np.square(a.repeat(common // n) - b.repeat(common // m)[:, None])
    expected = cost[linear_sum_assignment(cost)].mean()
    assert mind(a, b, directions=2) == pytest.approx((expected, 0), rel=1e-10, abs=1e-12)


def test_mind_by_a_loop(monkeypatch) -> None:
    a, b = features(50, 6, 0), features(50, 6, 1, 1.4, 0.1)
    random = np.random.default_rng(5)
    values = []
    for _ in range(30):
        line = random.standard_normal(6)
        line /= np.linalg.norm(line)
        values.append(np.mean((np.sort(a @ line) - np.sort(b @ line)) ** 2))
    expected = np.mean(values), np.std(values, ddof=1) / math.sqrt(30)
    assert mind(a, b, 30, seed=5) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(distances, "_NUMBERS", 200)
    assert mind(a, b, 30, seed=5) == pytest.approx(expected, rel=1e-10)


def test_mind_closed_forms() -> None:
    """A shift by v gives |v|^2 / d; a scale by s gives (s - 1)^2 times the mean square of a feature."""
    a = features(300, 8)
    shift = np.arange(8.0)
    value, error = mind(a, a + shift, 4096)
    assert value == pytest.approx(shift @ shift / 8, abs=4 * error)
    value, error = mind(a, 3 * a, 4096)
    assert value == pytest.approx(4 * np.square(a).sum(1).mean() / 8, abs=4 * error)
    assert mind(a, a) == (0, 0)


def test_order_of_rows_and_repetition() -> None:
    a, b = features(300, 6, 0), features(200, 6, 1, 1.2)
    order_a, order_b = (np.random.default_rng(2).permutation(len(each)) for each in (a, b))
    for measure in (frechet_distance, mind, precision_recall):
        assert measure(a[order_a], b[order_b]) == pytest.approx(measure(a, b), rel=1e-9)
    for measure in (kernel_distance, mind):
        assert measure(a, b) == measure(a, b)
        assert measure(a, b) != measure(a, b, seed=1)
    value, error = kernel_distance(a, b)
    assert kernel_distance(a[order_a], b[order_b]).value == pytest.approx(value, abs=error)


def test_float32_is_measured_in_float64() -> None:
    a, b = (features(50, 4, seed).astype(np.float32) for seed in (0, 1))
    for measure in (frechet_distance, mind, precision_recall, kernel_distance):
        assert measure(a, b) == measure(a.astype(np.float64), b.astype(np.float64))


A = features(10, 3)
NAN = np.where(np.eye(10, 3) > 0, np.nan, A)
PAIRS = [frechet_distance, kernel_distance, mind, precision_recall]


@pytest.mark.parametrize("measure", PAIRS)
@pytest.mark.parametrize(
    ("b", "error", "message"),
    [
        (A[:1], ValueError, "has 1 rows; it must have at least"),
        (A[:, :2], ValueError, "has 2 features a row; .* has 3"),
        (A[:, :0], ValueError, r"has shape \(10, 0\); it must have at least one column"),
        (A[0], ValueError, r"has shape \(3,\); it must be numbers \[n, d\]"),
        (NAN, ValueError, "holds nan; all of its numbers must be finite"),
        (A * np.inf, ValueError, "holds -?inf"),
        (A.tolist(), TypeError, "is a list; it must be a numpy array"),
        (A > 0, TypeError, "is bool; it must be real"),
        (A + 1j, TypeError, "is complex128"),
    ],
)
def test_bad_features(measure, b, error, message: str) -> None:
    name = "generated" if measure is precision_recall else "b"
    with pytest.raises(error, match=f"^{name} {message}"):
        measure(A, b)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: statistics_of(A[:1]), ValueError, "features has 1 rows; it must have at least 2"),
        (lambda: Statistics(A[0], A, 10), ValueError, r"covariance has shape \(10, 3\) and mean \(3,\)"),
        (lambda: Statistics(A[0], A[:3] * np.nan, 10), ValueError, "covariance holds nan"),
        (lambda: Statistics(A[0], np.eye(3), 1), ValueError, "count is 1; it must be at least 2"),
        (lambda: frechet_distance(A, A, strict=1), TypeError, "strict is 1 .*; it must be True or False"),
        (lambda: kernel_distance(A[:3], A), ValueError, "a has 3 rows; it must have at least 4"),
        (lambda: kernel_distance(A, A, subsets=1), ValueError, "subsets is 1; it must be at least 2"),
        (lambda: kernel_distance(A, A, subset_size=1), ValueError, "subset_size is 1"),
        (lambda: kernel_distance(A, A, seed=-1), ValueError, "seed is -1"),
        (lambda: mind(A, A, directions=1.5), TypeError, "directions is 1.5 .*; it must be an integer"),
        (lambda: precision_recall(A, A, k=10), ValueError, "real has 10 rows; it must have at least 11"),
        (lambda: precision_recall(A, A, k=0), ValueError, "k is 0"),
        (lambda: inception_score(A), ValueError, "probabilities holds -.* each row must add up to 1"),
        (lambda: inception_score(np.eye(3)), ValueError, "probabilities has 3 rows; .* at least 10"),
        (lambda: inception_score(np.eye(3), splits=0), ValueError, "splits is 0"),
    ],
)  # fmt: skip
def test_bad_settings(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
