"""Trains Switch-DiT. Without arguments: the tiny model on handwritten digits, a few minutes on two CPU cores.

Usage:

    python models/train_switch_dit.py
    python models/train_switch_dit.py --help
    python models/train_switch_dit.py --routing none --name dense      # the same without experts
"""

import sys

import tyro
from switch_dit.train import TrainConfig, run


def main() -> None:
    config = tyro.cli(TrainConfig, description=__doc__)
    try:
        run(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
