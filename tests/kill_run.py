"""Kills a training run again and again, starts it again, and compares what it ends with to the bit.

    python tests/kill_run.py --kills 100        # `make kill-test`

Half of the kills come at random moments, half while a checkpoint is being written. Attempts are forks of this
process, which imports everything once and runs no operation itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

import train_switch_dit  # noqa: E402
from switch_dit.settings import TrainConfig  # noqa: E402

SETTINGS: dict[str, Any] = {
    "steps": 60, "batch_size": 16, "checkpoint_every": 7, "log_every": 5, "generated": 0, "prior_every": 3,
    "device": "cpu", "precision": "float32", "warmup": 5,
}  # fmt: skip


def start(output: Path) -> int:
    """Starts an attempt in a process of its own and returns its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        with open(output / "log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        train_switch_dit.run(TrainConfig(output=output, name="run", **SETTINGS))
        code = 0
    except SystemExit:
        code = 3  # it was asked to stop, and said how to go on
    finally:
        os._exit(code)


def wait(process: int, seconds: float, until: Path | None = None) -> int | None:
    """The exit code of an attempt that ends in time; None where it does not, or where ``until/*.incomplete``
    appears.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until is not None and next(until.glob("*.incomplete"), None):
            return None
        time.sleep(0.0005)
    return None


def results(output: Path) -> dict[str, Any]:
    """What must not depend on interruptions: weights, moving average, losses."""
    rows = [json.loads(line) for line in (output / "run" / "stats.jsonl").read_text().splitlines()]
    for row in rows:
        del row["images_per_second"]
    names = ("model", "ema")
    found: dict[str, Any] = {
        name: (output / "run" / "weights" / f"{name}.safetensors").read_bytes() for name in names
    }
    return found | {"stats": rows}


def disturbed(output: Path, kills: int, seconds: float, chance: random.Random) -> int:
    """Runs until the end with up to ``kills`` kills; how many there were."""
    done = 0
    while True:
        process = start(output)
        if done == kills:
            code = wait(process, 100 * seconds)
            assert code == 0, (output / "log").read_text()[-3000:]
            return done
        saving = output / "run" / "checkpoint" if chance.random() < 0.5 else None
        code = wait(process, chance.uniform(0, 0.4 * seconds), saving)
        if code is None:
            os.kill(process, signal.SIGTERM if chance.random() < 0.1 else signal.SIGKILL)
            code = wait(process, 100 * seconds)
            assert code in (-signal.SIGKILL, -signal.SIGTERM, 0, 3), (output / "log").read_text()[-3000:]
            done += 1
        if code == 0:
            return done


def check(kills: int, seed: int) -> int:
    """Compares disturbed runs with an undisturbed one until there were ``kills`` kills; how many runs."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        calm = Path(folder, "calm")
        calm.mkdir()
        started = time.monotonic()
        code = wait(start(calm), 600)
        assert code == 0, (calm / "log").read_text()[-3000:]
        seconds, expected = time.monotonic() - started, results(calm)
        runs = 0
        while kills > 0:
            output = Path(folder, f"run-{runs}")
            output.mkdir()
            kills -= max(1, disturbed(output, min(kills, 12), seconds, chance))
            runs += 1
            found = results(output)
            for name, value in expected.items():
                assert found[name] == value, f"{name} of disturbed run {runs} differs (seed {seed})"
            assert not list((output / "run").rglob("*.incomplete")), "a half-written file is left"
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    runs = check(arguments.kills, arguments.seed)
    print(f"{arguments.kills} kills in {runs} runs: every run ended the same to the bit")


if __name__ == "__main__":
    main()
