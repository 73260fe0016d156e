"""The loop of a training run: lines, checkpoints, snapshots and pictures as it goes, and how it stops."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from switch_dit.distributed import Vote, whole
from switch_dit.resume import Checkpoints, stop_on_signals
from switch_dit.settings import settings_of
from switch_dit.snapshots import save_snapshot
from switch_dit.tracking import Tracker, create_tracker
from switch_dit.trainer import TERMS, Trainer

Rows = list[dict[str, float]]


class Interrupted(Exception):
    """A signal has stopped the run, after a checkpoint."""


def rows_until(path: Path, step: int) -> list[dict[str, float]]:
    """The lines of a file such as stats.jsonl up to a step. The file is cut off there, as what follows is
    computed again.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            break
        if row["step"] > step:
            break
        rows.append(row)
    draft = path.with_suffix(".incomplete")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.replace(path)
    return rows


class Loop:
    """Trains in a folder, which holds what has been done so far, and writes there as it goes.

    Args:
        trainer: with fresh weights; the newest checkpoint in the folder replaces them.
        draw: called by the first process every ``pictures_every`` steps, with the moving average, the number
            of steps and the rows so far.
        measure: called by the first process every ``evaluate_every`` steps, with the moving average and the
            number of steps.

    Attributes:
        rows: the lines of stats.jsonl, after :meth:`run` all of them.
        tracker: where numbers and pictures go too; nowhere before :meth:`run`.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        draw: Callable[[torch.nn.Module, int, Rows], None] | None = None,
        measure: Callable[[torch.nn.Module, int], None] | None = None,
    ) -> None:
        self.trainer, self.folder, self.draw, self.measure = trainer, folder, draw, measure
        self.config, self.world = trainer.config, trainer.world
        on_gpu = trainer.device.type == "cuda"
        self.checkpoints = Checkpoints(
            folder / "checkpoint", self.config.keep_checkpoints, self.world, background=on_gpu
        )
        self.rows: Rows = []
        self.losses = Losses(trainer)
        self.tracker = Tracker("")
        self.timed, self.logged_at = 0, 0.0  # the step and the moment of the last line

    def run(self) -> Rows:
        """Takes the steps that are left, with a progress bar, and returns all lines of stats.jsonl.

        SIGTERM and SIGINT save a checkpoint and raise :class:`Interrupted`.
        """
        trainer, config, world = self.trainer, self.config, self.world
        start = self._go_on()
        trainer.model.train()
        self.timed, self.logged_at = start, time.perf_counter()
        file = self.folder / "stats.jsonl" if world.first else Path(os.devnull)
        with (
            open(file, "a") as stats,
            tqdm(
                total=config.steps, initial=start, desc="training", unit="step", disable=not world.first
            ) as bar,
            stop_on_signals() as stop,
        ):
            vote = Vote(world)
            for number, batch in zip(range(start, config.steps), trainer.batches(start), strict=False):
                self.losses.add(trainer.step(number, *batch))
                bar.update()
                done = number + 1
                last, stopped = done == config.steps, vote.ask(stop.name is not None)
                if done % config.log_every == 0 or last:
                    row = self._line(done)
                    stats.write(json.dumps(row) + "\n")
                    stats.flush()
                    bar.set_postfix(
                        loss=f"{row['loss']:.3f}", prior=f"{row['prior']:.3f}",
                        images_s=f"{row['images_per_second']:.0f}",
                    )  # fmt: skip
                if done % (config.snapshot_every or -(-config.steps // 16)) == 0 or last:
                    self._save_snapshots(done)
                if config.evaluate_every and done % config.evaluate_every == 0 and not last:
                    self._show(self.measure, done)
                if done % config.checkpoint_every == 0 or last or stopped:
                    self._save_checkpoint(done)
                if config.pictures_every and done % config.pictures_every == 0 and not last:
                    self._show(self.draw, done, self.rows)
                if stopped and not last:
                    self._wait()
                    kept = max(self.checkpoints.steps(), default=0)
                    raise Interrupted(
                        f"{stop.name or 'a signal'} stopped the run after {done} of {config.steps} steps; "
                        f"the same command goes on from step {kept}"
                    )
        self._wait()
        return self.rows

    def _go_on(self) -> int:
        """Goes back to the newest checkpoint that is whole; the steps that it has done."""
        state = self.trainer.restore(self.checkpoints)
        done = 0 if state is None else state["step"]
        self.rows = self.world.on_first(lambda: rows_until(self.folder / "stats.jsonl", done))
        self.losses = Losses(self.trainer, state["pending"] if state else [])
        if self.world.first:
            settings = settings_of(self.config)
            self.tracker = create_tracker(self.config.track, self.folder, settings, done)
            if done:
                where = self.checkpoints.folder
                print(f"going on from step {done} of {self.config.steps}, from {where}", flush=True)
        return done

    def _line(self, done: int) -> dict[str, float]:
        """The next line of stats.jsonl; the curriculum and the tracker hear of it."""
        means = self.losses.means(done)
        now = time.perf_counter()
        rate = (done - self.timed) * self.config.batch_size / (now - self.logged_at)
        self.timed, self.logged_at = done, now
        numbers = {**means, "lr": self.trainer.rate_at(done - 1), "images_per_second": rate}
        numbers |= self.trainer.of_gpu(rate)
        self.rows.append({"step": done, **numbers})
        self.tracker.log(done, numbers)
        self.trainer.learned(means["mse"])
        return self.rows[-1]

    def _save_checkpoint(self, done: int) -> None:
        """Writes a checkpoint; a disk that is full is said, and the run goes on."""
        state = {"pending": self.losses.settled(done), **self.trainer.numbers()}
        self._wait()
        try:
            self.checkpoints.save(
                done, self.trainer.tensors(), {**state, "settings": settings_of(self.config)}
            )
        except OSError as error:
            self._say("no checkpoint", done, error)

    def _wait(self) -> None:
        """Waits for the checkpoint that a thread writes."""
        try:
            self.checkpoints.wait()
        except OSError as error:
            self._say("the last checkpoint was not written", None, error)

    def _save_snapshots(self, done: int) -> None:
        """Writes the power averages as they are; a disk that is full is said, and the run goes on."""
        try:
            for power in self.trainer.powers if self.world.first else ():
                save_snapshot(self.folder / "averages", power.snapshot(done))
        except OSError as error:
            self._say("no snapshot", done, error)

    def _say(self, what: str, step: int | None, error: OSError) -> None:
        if self.world.first:
            at = "" if step is None else f" at step {step}"
            tqdm.write(f"{what}{at}: {error}. What was written before stays, the run goes on.")

    def _show(self, to: Callable[..., None] | None, *what: Any) -> None:
        """Shows the moving average to a function of the first process. The time does not count as training.

        All processes call it, for they may share the weights.
        """
        begin = time.perf_counter()
        average = whole(self.trainer.ema, self.trainer.create)
        if self.world.first and to is not None:
            to(average, *what)
        self.logged_at += time.perf_counter() - begin


class Losses:
    """The loss terms of the steps since the last line of stats.jsonl.

    settled: means over all processes, of a checkpoint that the run goes on from.
    """

    def __init__(self, trainer: Trainer, settled: list[list[float]] | None = None) -> None:
        self.trainer, self._settled = trainer, settled or []
        self.pending: list[Tensor] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        """Takes in a step, without waiting for a GPU."""
        self.pending.append(torch.stack([terms[name].float() for name in TERMS]))

    def settled(self, done: int) -> list[list[float]]:
        """The terms of each step, means over all processes; raises where one is not finite."""
        if self.pending:
            values = self.trainer.world.mean(torch.stack(self.pending).cpu())
            self._check(values, done)
            self._settled, self.pending = self._settled + values.tolist(), []
        return self._settled

    def means(self, done: int) -> dict[str, float]:
        """The mean of each term, which begins a new line."""
        values = torch.tensor(self.settled(done), dtype=torch.float64, device="cpu")
        self._settled = []
        return dict(zip(TERMS, values.mean(0).tolist(), strict=True))

    def _check(self, values: Tensor, done: int) -> None:
        wrong = (~values.isfinite().all(1)).nonzero()
        if len(wrong):
            number = done - len(values) + int(wrong[0])
            t = self.trainer.draw(number, (1,)).t
            chosen = next(self.trainer.order(number))
            raise FloatingPointError(
                f"the loss is not finite at step {number + 1}, images {chosen.tolist()[:8]}..., timesteps "
                f"{t.tolist()[:8]}...; a smaller lr may help. Nothing is saved after it"
            )
