"""Makes a grid of samples from the checkpoint of a run.

Usage:

    python models/sample_switch_dit.py --run runs/digits
    python models/sample_switch_dit.py --run runs/digits --labels 3 5 --scheduler dpm-solver++ --steps 20
"""

import sys

import tyro
from switch_dit.sample_cli import SampleConfig, run


def main() -> None:
    config = tyro.cli(SampleConfig, description=__doc__)
    try:
        run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
