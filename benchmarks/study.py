"""Does routing by the timestep pay? Dense DiT, DTR and Switch-DiT, trained alike and measured on the way.

    python benchmarks/study.py                      # all parts, on all cores; typed again, it goes on
    python benchmarks/study.py --part digits
    python benchmarks/study.py --report             # the tables and pictures again, from results.json

Every run is a command of models/train_switch_dit.py, so that it can be typed alone; its folder is in
``runs/study``. Results, pictures and words are in ``benchmarks/study/``.

Arms of one seed see the same images, noise and timesteps in the same order, so their differences are taken by
seed. "Equal steps" compares them after as many steps; "equal time" gives the cheaper ones as many more steps
as the time of a Switch-DiT step buys. Step times are measured in turns in one process, before the runs,
because the runs share the machine.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from switch_dit.data import load_data
from switch_dit.files import write_whole
from switch_dit.settings import TrainConfig
from switch_dit.trainer import Trainer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a file
    sys.path.insert(0, str(ROOT))

from benchmarks import environment, study_report  # noqa: E402
from benchmarks.timing import Timed, time_together  # noqa: E402

MEASURES = ("conditional_accuracy", "frechet_distance", "mind")
REFERENCE = "switch"


@dataclass(frozen=True)
class Arm:
    """A kind of model: what differs from Switch-DiT with 3 experts, 2 of them chosen."""

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    equal_time: bool = False  # whether it goes on until it took the time of Switch-DiT


THREE = {
    "switch": Arm("Switch-DiT (M=3, k=2)"),
    "dense": Arm("dense DiT", {"routing": "none"}, equal_time=True),
    "dtr": Arm("DTR (channel masks)", {"routing": "dtr"}, equal_time=True),
}
VARIANTS = {
    "no-prior": Arm("Switch-DiT without prior loss", {"prior_weight": 0.0}),
    "k1": Arm("Switch-DiT, k=1", {"top_k": 1}),
    "k3": Arm("Switch-DiT, k=3", {"top_k": 3}),
    "m2": Arm("Switch-DiT, M=2", {"num_experts": 2}),
    "m4": Arm("Switch-DiT, M=4", {"num_experts": 4}),
    "m8": Arm("Switch-DiT, M=8", {"num_experts": 8}),
}


@dataclass(frozen=True)
class Part:
    """Runs on one data set."""

    title: str
    settings: dict[str, Any]
    seeds: int
    arms: dict[str, Arm]

    @property
    def steps(self) -> int:
        """Those of Switch-DiT."""
        return self.settings.get("steps", TrainConfig.steps)


SHARED = {"lr": 2e-3, "lr_decay": "constant", "generated": 500, "sample_steps": 20}
PARTS = {
    "digits": Part(
        "digits, 8x8",
        {**SHARED, "data": "digits", "steps": 600, "evaluate_every": 100, "ema_decay": 0.995},
        3,
        {**THREE, **VARIANTS},
    ),
    "digits-recipe": Part(
        "digits, by the recipe of the README",
        {"data": "digits", "evaluate_every": 150, "generated": 500, "sample_steps": 20},
        3,
        {
            key: replace(arm, equal_time=False)
            for key, arm in {**THREE, "no-prior": VARIANTS["no-prior"]}.items()
        },
    ),
    "fashion-mnist": Part(
        "Fashion-MNIST, 32x32",
        {**SHARED, "data": "fashion-mnist", "steps": 700, "evaluate_every": 175, "ema_decay": 0.995},
        2,
        THREE,
    ),
}


@dataclass
class StudyConfig:
    """Train dense DiT, DTR and Switch-DiT side by side, and write what came out."""

    part: Literal["all", "digits", "digits-recipe", "fashion-mnist"] = "all"
    """What to study; see PARTS."""
    output: Path = Path("runs/study")
    """The folder of the runs."""
    results: Path = ROOT / "benchmarks" / "study"
    """The folder of results.json, README.md and the pictures."""
    jobs: int = os.cpu_count() or 1
    """This many runs are trained at a time, each by one thread."""
    report: bool = False
    """Whether to make the tables and pictures only, from results.json."""


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    part: str
    arm: str
    seed: int
    steps: int
    folder: Path

    def settings(self) -> dict[str, Any]:
        """What differs from the defaults of models/train_switch_dit.py."""
        part = PARTS[self.part]
        return {**part.settings, **part.arms[self.arm].settings, "steps": self.steps, "seed": self.seed}

    def command(self) -> list[str]:
        """The command that trains it, or goes on with it."""
        options = [word for key, value in self.settings().items() for word in (_flag(key), str(value))]
        place = ["--output", str(self.folder.parent), "--name", self.folder.name, "--device", "cpu"]
        return [sys.executable, str(ROOT / "models" / "train_switch_dit.py"), *options, *place]

    def rows(self) -> list[dict[str, float]]:
        """What was measured so far: step and measures."""
        try:
            text = (self.folder / "evaluations.jsonl").read_text()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
        return [json.loads(line) for line in whole.splitlines()]

    def done(self) -> bool:
        """Whether it has been trained; ``ValueError`` where it was trained by other settings."""
        rows = self.rows()
        if not rows:
            return False
        before = json.loads((self.folder / "config.json").read_text())
        for key, value in self.settings().items():
            if before[key] != value:
                raise ValueError(
                    f"{self.folder} was trained with {key} {before[key]!r} and the study has {value!r}; "
                    "remove it, or choose another --output"
                )
        return rows[-1]["step"] == self.steps


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def step_times(part: Part, path: Path) -> dict[str, float]:
    """Seconds of a training step of each arm by one thread, taken in turns; the file keeps them."""
    settings = {key: {**part.settings, **arm.settings} for key, arm in part.arms.items()}
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == settings:
            return kept["seconds"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = load_data(part.settings["data"])
    calls = {}
    for name, arm in part.arms.items():
        trainer = Trainer(TrainConfig(**{**part.settings, **arm.settings, "device": "cpu"}), images)
        calls[name] = [_stepper(trainer)]
    timed = time_together(calls, "cpu", seconds=60.0)
    torch.set_num_threads(threads)
    found = {}
    for name, times in timed.items():
        if not isinstance(times, Timed):
            raise times
        # Ratios are taken within a round, so that a drift of the machine does not enter them.
        rounds = zip(times.seconds, timed[REFERENCE].seconds, strict=True)
        ratio = statistics.median(one / reference for one, reference in rounds)
        found[name] = ratio * statistics.median(timed[REFERENCE].seconds)
    write(path, {"settings": settings, "seconds": found})
    return found


def _stepper(trainer: Trainer) -> Any:
    steps: Iterator[Any] = enumerate(trainer.batches())

    def step() -> None:
        number, batch = next(steps)
        trainer.step(number, *batch)

    return step


def write(path: Path, value: Any) -> None:
    """JSON, written whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def runs_of(name: str, output: Path) -> list[Run]:
    """The runs of a part: all arms of the first seed, then of the next."""
    part, folder = PARTS[name], output / name
    seconds = step_times(part, folder / "step-seconds.json")
    found = []
    for seed in range(part.seeds):
        for key, arm in part.arms.items():
            steps = part.steps
            if arm.equal_time:
                steps = max(steps, round(steps * seconds[REFERENCE] / seconds[key]))
            found.append(Run(name, key, seed, steps, folder / f"{key}-seed{seed}"))
    return found


def train(runs: list[Run], jobs: int, log_folder: Path) -> bool:
    """Trains what is not done yet, ``jobs`` at a time; ends all of them where one fails or at Ctrl-C.

    Returns whether there was anything to train.
    """
    waiting = [run for run in runs if not run.done()]
    if not waiting:
        return False
    log_folder.mkdir(parents=True, exist_ok=True)
    running: dict[subprocess.Popen[bytes], Run] = {}
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        with tqdm(total=len(runs), initial=len(runs) - len(waiting), desc="runs", unit="run") as bar:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    with open(log_folder / f"{run.folder.name}.log", "ab") as log:
                        process = subprocess.Popen(
                            run.command(), stdout=log, stderr=log, env=one_thread, start_new_session=True
                        )
                    running[process] = run
                time.sleep(0.5)
                for process in [process for process in running if process.poll() is not None]:
                    run = running.pop(process)
                    if process.returncode or not run.done():
                        raise RuntimeError(
                            f"a run failed; see {log_folder / (run.folder.name + '.log')}. Its command:\n"
                            + shlex.join(run.command())
                        )
                    bar.update()
                    last = run.rows()[-1]
                    told = ", ".join(f"{name} {last[name]:.3f}" for name in MEASURES)
                    tqdm.write(f"{run.part} {run.folder.name}: {told}")
    finally:
        for process in running:  # each saves a checkpoint, from which the same command goes on
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
    return True


def collect(name: str, output: Path) -> dict[str, Any]:
    """What is known of a part, for results.json."""
    part = PARTS[name]
    seconds = step_times(part, output / name / "step-seconds.json")
    arms: dict[str, Any] = {}
    real: dict[str, float] = {}
    for run in runs_of(name, output):
        rows = run.rows()
        if not run.done():
            continue
        options = shlex.join(run.command()[2:-6])
        arm = arms.setdefault(run.arm, {"options": options, "steps": run.steps, "seeds": {}})
        arm["seeds"][str(run.seed)] = [{key: row[key] for key in ("step", *MEASURES)} for row in rows]
        real = {key: rows[-1][key] for key in ("classifier_accuracy", "frechet_floor")}
    return {
        "title": part.title, "steps": part.steps, "step_seconds": seconds, "real": real,
        "arms": {key: {"title": part.arms[key].title, **arm} for key, arm in arms.items()},
    }  # fmt: skip


def add_minutes(path: Path, begin: float) -> float:
    """Adds the minutes since ``begin`` to those of earlier calls, and returns all."""
    before = json.loads(path.read_text()) if path.exists() else 0.0
    write(path, before + (time.perf_counter() - begin) / 60)
    return json.loads(path.read_text())


def results(path: Path) -> dict[str, Any]:
    """What results.json holds; nothing where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def study(config: StudyConfig) -> None:
    """Trains what is missing of the parts asked for, and writes results, tables and pictures."""
    path = config.results / "results.json"
    machine = environment.describe("cpu")
    for name in () if config.report else PARTS if config.part == "all" else (config.part,):
        begin, spent = time.perf_counter(), config.output / name / "minutes.json"
        try:
            runs = runs_of(name, config.output)
            trained = train(runs, config.jobs, config.output / name / "logs")
        finally:
            minutes = add_minutes(spent, begin)
        found = results(path)  # another process may have written its part
        facts = {
            "minutes": minutes, "jobs": config.jobs, "torch": torch.__version__,
            "machine": f"{machine['cpu']}, {machine['cores']} cores", "date": date.today().isoformat(),
        }  # fmt: skip
        before = found["parts"].get(name)
        if before is not None and not trained:
            facts = {key: before[key] for key in facts}
        found["parts"][name] = {**collect(name, config.output), **facts}
        write(path, found)
    found = results(path)
    if not found["parts"]:
        raise ValueError(f"report is True; {path} has no results yet, run the study first")
    for written in study_report.write_report(found, config.results):
        print(f"written: {written}")


def main() -> None:
    config = tyro.cli(StudyConfig, description=__doc__)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler)
    try:
        study(config)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
