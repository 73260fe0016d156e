"""Settings of runs that are known to work, or that papers report, by name.

    python models/train_switch_dit.py --recipe fashion-mnist
    torchrun --nproc_per_node=8 models/train_switch_dit.py --recipe imagenet-XL --data latents:DIR

What is given beside ``--recipe`` counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """Settings that differ from the defaults, where they come from, and what a run with them gives."""

    settings: dict[str, Any]
    source: str
    result: str


_PUBLISHED = {
    "batch_size": 256, "lr": 1e-4, "lr_decay": "constant", "warmup": 0, "ema_decay": 0.9999,
    "checkpoint_every": 5000, "log_every": 100, "sample_steps": 250,
}  # fmt: skip
_IMAGENET = {**_PUBLISHED, "data": "latents:imagenet", "flip": True, "steps": 400_000}
_FID = {"S": 33.99, "B": 16.21, "L": 8.78, "XL": 8.76}  # of the paper, guidance 1.5, 50,000 images

# Accuracy and Frechet distance of the systems of the family on digits, with seed 0.
_ON_DIGITS = {
    "dit_moe": (0.997, 1.9), "ec_dit": (0.993, 2.1), "diffmoe": (0.995, 2.0), "mode": (0.972, 2.3),
    "nucleus": (0.996, 1.9), "evomoe": (0.993, 2.5),
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "mode": {"num_experts": 4, "lr": 8e-3},  # as many as in its paper; at 4e-3 and with 8 it has learned less
    "evomoe": {"top_k": 1},
}

RECIPES = {
    "digits": Recipe({}, "ours: the defaults", "accuracy 0.995, Frechet distance 2.1, one minute on 2 cores"),
    **{
        f"digits-{routing}": Recipe(
            {"routing": routing, "num_experts": 8, **_OWN.get(routing, {})},
            "ours",
            f"accuracy {accuracy}, Frechet distance {distance}, a few minutes on 2 cores",
        )
        for routing, (accuracy, distance) in _ON_DIGITS.items()
    },
    "fashion-mnist": Recipe(
        {
            "data": "fashion-mnist", "steps": 2600, "lr": 2e-3, "warmup": 100, "ema_decay": 0.998,
            "checkpoint_every": 400, "log_every": 50,
        },
        "ours",
        "accuracy 0.60 (real images 0.84), Frechet distance 18, 26 minutes on 2 cores",
    ),
    **{
        f"imagenet-{size}": Recipe(
            {**_IMAGENET, "model": f"{size}/2"},
            "Switch-DiT, arXiv 2403.09176",
            f"the paper reports FID {_FID[size]}; not run here",
        )
        for size in _FID
    },
    "ffhq": Recipe(
        {**_PUBLISHED, "data": "latents:ffhq", "flip": True, "steps": 100_000, "model": "B/2",
         "conditional": False, "guidance": 1.0},
        "settings as published for ImageNet; the model's size and the steps are ours",
        "not run here",
    ),
}  # fmt: skip
