"""Kills a training run again and again, starts it again, and compares what it ends with to the bit.

    python tests/kill_run.py --kills 100        # `make kill-test`
    python tests/kill_run.py --kills 20 --processes 2

Half of the kills come at random moments, half while a checkpoint is being written. Of several processes one
is killed, and the others end as torchrun ends them. Attempts are forks of this process, which imports
everything once and runs no operation itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

import torch  # noqa: E402
import train_switch_dit  # noqa: E402
from switch_dit.settings import TrainConfig  # noqa: E402

ASKED = 3  # the exit code of a process that was asked to stop, and said how to go on
SETTINGS: dict[str, Any] = {
    "steps": 60, "batch_size": 16, "checkpoint_every": 7, "log_every": 5, "generated": 0, "prior_every": 3,
    "device": "cpu", "precision": "float32", "warmup": 5,
}  # fmt: skip


def start(output: Path, count: int = 1) -> list[int]:
    """Starts an attempt in processes of its own and returns their numbers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [_start(output, rank, count, port) for rank in range(count)]


def _start(output: Path, rank: int, count: int, port: int) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        if count > 1:  # what torchrun sets
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in places.items()} | {"MASTER_ADDR": "localhost"}
            torch.set_num_threads(1)
        with open(output / "log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        train_switch_dit.run(TrainConfig(output=output, name="run", **SETTINGS))
        code = 0
    except SystemExit:
        code = ASKED
    finally:
        os._exit(code)


def wait(processes: list[int], seconds: float, until: Path | None = None) -> int | None:
    """The exit code of an attempt that ends in time; None where it does not, or where ``until/*.incomplete``
    appears.

    Processes that have ended leave the list. One that fails ends the others, as torchrun does.
    """
    end, code = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for process in list(processes):
            found, status = os.waitpid(process, os.WNOHANG)
            if not found:
                continue
            processes.remove(process)
            code = code or os.waitstatus_to_exitcode(status)
            if code not in (0, ASKED):
                for other in processes:
                    os.kill(other, signal.SIGKILL)
        if not processes:
            return code
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


def disturbed(output: Path, kills: int, seconds: float, chance: random.Random, count: int) -> int:
    """Runs until the end with up to ``kills`` kills; how many there were."""
    done = 0
    while True:
        processes = start(output, count)
        if done == kills:
            code = wait(processes, 100 * seconds)
            assert code == 0, (output / "log").read_text()[-3000:]
            return done
        saving = output / "run" / "checkpoint" if chance.random() < 0.5 else None
        code = wait(processes, chance.uniform(0, 0.4 * seconds), saving)
        if code is None:
            asked = chance.random() < 0.1
            os.kill(chance.choice(processes), signal.SIGTERM if asked else signal.SIGKILL)
            code = wait(processes, 100 * seconds)
            expected = (-signal.SIGKILL, -signal.SIGTERM, 0, ASKED, *([1] if count > 1 else []))
            assert code in expected, (output / "log").read_text()[-3000:]
            done += 1
        if code == 0:
            return done


def check(kills: int, seed: int, count: int) -> int:
    """Compares disturbed runs with an undisturbed one until there were ``kills`` kills; how many runs."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        calm = Path(folder, "calm")
        calm.mkdir()
        started = time.monotonic()
        code = wait(start(calm, count), 600)
        assert code == 0, (calm / "log").read_text()[-3000:]
        seconds, expected = time.monotonic() - started, results(calm)
        runs = 0
        while kills > 0:
            output = Path(folder, f"run-{runs}")
            output.mkdir()
            kills -= max(1, disturbed(output, min(kills, 12), seconds, chance, count))
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
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    runs = check(arguments.kills, arguments.seed, arguments.processes)
    print(f"{arguments.kills} kills in {runs} runs: every run ended the same to the bit")


if __name__ == "__main__":
    main()
