"""Measures samples against real images: Frechet distance, kernel distance, MIND, precision and recall.

    python models/sample_switch_dit.py --images 1000 --output digits.npz
    python models/evaluate.py --samples digits.npz --reference digits

    python models/evaluate.py --samples samples.npz --reference images:DIR --image-size 256
    python models/evaluate.py --samples FOLDER --reference FOLDER --features efficientnet-lite0

With the features of Inception, which is the default for pictures, these are FID, KID and the Inception score
of the papers: pip install -e ".[eval]". With other features their names say which.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from switch_dit.evaluation import Evaluation, evaluate_images
from switch_dit.files import write_whole

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "switch_dit" / "features"


@dataclass
class EvaluateConfig:
    """Measure samples against real images."""

    samples: str
    """An .npz file with arr_0, uint8 [n, H, W, C], a folder of pictures or of a folder for each class, or a
    data set."""
    reference: str
    """The real images, given in the same ways: digits, mnist-5k, fashion-mnist[:DIR], images:DIR, hf:NAME."""
    features: str = "auto"
    """inception, efficientnet-lite0, or a data set whose classifier gives the features. auto is the
    classifier for the references digits, mnist-5k and fashion-mnist, and inception for all others."""
    measures: tuple[
        Literal["frechet", "kernel", "mind", "precision-recall", "inception-score", "accuracy"], ...
    ] = ()
    """What to measure. By default it is all that the features allow."""
    weights: Path | None = None
    """The file with the weights of inception or efficientnet-lite0, where they cannot be fetched."""
    split: Literal["auto", "held-out", "train"] = "auto"
    """Which images of a data set are taken. auto takes those that are held out from training, and where there
    are none those for training."""
    image_size: int = 0
    """Pictures of folders and of hf:NAME are cropped and resized to this many pixels, as for training. With 0
    those of folders stay as they are. Other sets and .npz files have their own size."""
    batch_size: int = 32
    """The network takes this many images at a time."""
    device: str = "auto"
    """auto takes cuda where there is one, else cpu."""
    seed: int = 0
    """The seed of random subsets, directions and halves."""
    cache: Path | None = CACHE
    """Features of the reference are kept in this folder. None keeps nothing."""
    output: Path | None = None
    """The .json file to write, which must not exist. By default the numbers are only printed."""


def run(config: EvaluateConfig) -> Evaluation:
    """Measures, prints a table and writes the file. Wrong settings raise first."""
    _check_output(config.output)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        evaluation = evaluate_images(
            config.samples,
            config.reference,
            config.features,
            measures=config.measures,
            weights=config.weights,
            split=config.split,
            image_size=config.image_size,
            batch_size=config.batch_size,
            device=config.device,
            cache=config.cache,
            seed=config.seed,
            progress=True,
        )
    print(evaluation.describe())
    if config.output is not None:
        write_whole(config.output, (json.dumps(evaluation.as_dict(), indent=1) + "\n").encode())
        print(f"\nThe numbers are in {config.output}")
    return evaluation


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix != ".json":
        raise ValueError(f"output is {output}; it must be a file that ends in .json")
    if output.exists():
        raise FileExistsError(f"output is {output}; it exists, choose another")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output is {output}; its folder does not exist")


def main() -> None:
    config = tyro.cli(EvaluateConfig, description=__doc__)
    try:
        run(config)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
