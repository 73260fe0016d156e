"""The settings of a training run, its folder and its loop."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from switch_dit.averages import MovingAverage
from switch_dit.checkpoint import save_checkpoint
from switch_dit.data import Data, batches, loaded, name_of
from switch_dit.data.memory import mirrored
from switch_dit.devices import resolve_device, resolve_precision
from switch_dit.diffusion import GaussianDiffusion
from switch_dit.graphs import GraphedStep
from switch_dit.model import PRESETS, ROUTINGS, create_model
from switch_dit.objectives import DiffusionObjective
from switch_dit.optimisation import create_optimizer, learning_rate
from switch_dit.randomness import Stream, normal
from switch_dit.resume import Checkpoints, stop_on_signals
from switch_dit.sampling import sample
from switch_dit.timesteps import create_sampler
from switch_moe.ops._checks import (
    check_choice,
    check_flags,
    check_integers,
    check_numbers,
    check_positive,
    check_top_k,
)


@dataclass
class TrainConfig:
    """Train Switch-DiT. Without arguments: the tiny model on handwritten digits."""

    # -- model
    model: str = "tiny/4"
    """The size and patch size of the model: {tiny,S,B,L,XL}/{2,4,8}."""
    routing: Literal["switch", "dtr", "none"] = "switch"
    """switch trains Switch-DiT, dtr uses fixed channel masks, none is a plain DiT."""
    num_experts: int = 3
    """Each block has this many experts."""
    top_k: int = 2
    """The router chooses this many experts for a sample."""
    learn_sigma: bool = True
    """Whether the model predicts the variance too (hybrid loss)."""
    label_dropout: float = 0.1
    """This share of the labels is replaced by the null label, for guidance."""
    # -- data
    data: str = "digits"
    """What to train on: digits, mnist-5k, fashion-mnist[:DIR], images:DIR (a folder of images per class),
    latents:DIR (written by encode_latents.py), hf:NAME_OR_PATH (a set of the package datasets), or the path
    of an .npz file with images (uint8 [n, H, W, C]) and labels."""
    image_size: int = 0
    """Images of images:DIR and hf:NAME are cropped to this many pixels, 0 is 32; other data has its size."""
    flip: bool = False
    """Whether half of the images are mirrored, chosen anew at each step."""
    unreadable: Literal["fail", "skip"] = "fail"
    """Whether an image that cannot be read ends the run, or the next one of its class takes its place."""
    workers: int = 2
    """This many processes read images or latents ahead; data in memory needs none."""
    verify_data: bool = True
    """Whether the checksums of latents are compared before the run."""
    conditional: bool = True
    """Whether the model sees class labels."""
    # -- training
    steps: int = 900
    """The run takes this many training steps."""
    batch_size: int = 128
    """Each step takes this many images."""
    lr: float = 4e-3
    """The peak learning rate of AdamW. The default suits the tiny model; the published sizes used 1e-4."""
    lr_decay: bool = True
    """Whether the learning rate falls to zero along a cosine; otherwise it is constant, as in the paper."""
    warmup: int = 50
    """The learning rate warms up linearly over this many steps."""
    weight_decay: float = 0.0
    """AdamW decays the weights by this factor times the learning rate."""
    ema_decay: float = 0.995
    """The moving average keeps this share of itself at each step; the paper's 0.9999 suits long runs."""
    prior_weight: float = 1.0
    """The diffusion prior loss is multiplied by this factor."""
    schedule: Literal["linear", "cosine"] = "linear"
    """The noise grows with the timestep by this schedule."""
    weighting: str = "constant"
    """How the squared error is weighted over timesteps: constant, p2, p2_gamma<a>_k<b> or min_snr_<gamma>."""
    timesteps: Literal["uniform", "logit-normal", "speed"] = "uniform"
    """How timesteps are drawn; speed is SpeeD (arXiv 2405.17403), with its weights."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 autocast on a GPU and on CPUs with AMX, float32 elsewhere."""
    compile: bool = False
    """Whether torch.compile compiles the model, which pays off in long runs."""
    cuda_graph: bool = False
    """Whether one CUDA graph replays the whole step, optimizer and moving average included."""
    prior_every: int = 1
    """The diffusion prior is matched again every this many steps."""
    device: str = "auto"
    """auto takes cuda where there is one, else cpu."""
    seed: int = 0
    """The same seed on the same machine gives bitwise the same losses."""
    # -- what a run writes
    output: Path = Path("runs")
    """The folder that holds all runs."""
    name: str = ""
    """The folder of this run inside output. By default it is named after the data."""
    resume: bool = True
    """Whether the run in that folder goes on where it was interrupted. Otherwise a new folder is made."""
    checkpoint_every: int = 300
    """A checkpoint to go on from is written every this many steps, and at the end."""
    keep_checkpoints: int = 2
    """The last this many of them are kept, 2 or more."""
    log_every: int = 20
    """stats.jsonl gets a line every this many steps."""
    # -- sampling at the end
    guidance: float = 1.5
    """The samples are drawn with this classifier-free guidance; 1 is none."""
    sample_steps: int = 50
    """The samples take this many DDIM steps."""
    generated: int = 1000
    """This many samples are drawn and measured at the end; 0 skips that."""

    def validate(self) -> None:
        """Raises ``ValueError`` that names the setting, its value and what would be right."""
        check_integers(
            steps=self.steps, batch_size=self.batch_size, log_every=self.log_every,
            num_experts=self.num_experts, sample_steps=self.sample_steps, prior_every=self.prior_every,
            checkpoint_every=self.checkpoint_every,
        )  # fmt: skip
        check_integers(2, keep_checkpoints=self.keep_checkpoints)
        check_integers(
            0, warmup=self.warmup, generated=self.generated, image_size=self.image_size, workers=self.workers
        )
        check_integers(0, 2**32 - 1, seed=self.seed)
        check_positive(lr=self.lr, guidance=self.guidance)
        check_numbers(
            0, wanted="0 or more", weight_decay=self.weight_decay, prior_weight=self.prior_weight,
            label_dropout=self.label_dropout, ema_decay=self.ema_decay,
        )  # fmt: skip
        check_top_k(self.top_k, self.num_experts)
        check_flags(
            learn_sigma=self.learn_sigma, conditional=self.conditional, lr_decay=self.lr_decay,
            compile=self.compile, cuda_graph=self.cuda_graph, resume=self.resume, flip=self.flip,
            verify_data=self.verify_data,
        )  # fmt: skip
        check_choice("model", self.model, PRESETS)
        check_choice("routing", self.routing, ROUTINGS)
        check_choice("unreadable", self.unreadable, ("fail", "skip"))
        check_choice("precision", self.precision, ("auto", "float32", "bfloat16"))
        for name, kinds in (("data", (str, Path)), ("output", (str, Path)), ("name", str), ("device", str)):
            value = getattr(self, name)
            if not isinstance(value, kinds) or "\0" in str(value):
                raise TypeError(f"{name} is {value!r}; it must be text without a null character")
        self.data, self.output = str(self.data), Path(self.output)
        bounds = {
            "generated": (lambda value: value == 0 or value >= 10, "0, or at least 10 to measure anything"),
            "label_dropout": (lambda value: 0 <= value < 1, "in [0, 1)"),
            "ema_decay": (lambda value: 0 <= value < 1, "in [0, 1)"),
            "sample_steps": (lambda value: 1 <= value <= 1000, "in [1, 1000]"),
            "name": (
                lambda value: Path(value).name == value and value not in (".", ".."),
                "a folder name without separators",
            ),
            "output": (_can_hold_runs, "a folder that can be written to"),
        }
        for name, (fits, wanted) in bounds.items():
            value = getattr(self, name)
            if not fits(value):
                shown = str(value) if isinstance(value, Path) else repr(value)
                raise ValueError(f"{name} is {shown}; it must be {wanted}")
        if self.conditional and self.label_dropout == 0 and self.guidance != 1:
            raise ValueError(
                "label_dropout is 0, so there is no null label to guide with; guidance must be 1"
            )
        check_choice("timesteps", self.timesteps, ("uniform", "logit-normal", "speed"))
        create_sampler(self.timesteps, objective_of(self))
        device = resolve_device(self.device)
        if self.cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph is True; it needs a GPU, and the device is {device}")
        if not self.resume and self.name and (self.output / self.name).exists():
            raise ValueError(f"name is {self.name!r}; {self.output / self.name} exists, choose another")


def _can_hold_runs(folder: Path) -> bool:
    """Whether runs can be made in ``folder``, which need not exist."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


# What may differ where a run goes on: where and how fast it runs, and what is done with the result.
_FREE = (
    "device", "compile", "cuda_graph", "output", "name", "resume", "checkpoint_every", "keep_checkpoints",
    "guidance", "sample_steps", "generated", "workers", "verify_data",
)  # fmt: skip


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """All settings as JSON holds them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def run_folder(config: TrainConfig) -> Path:
    """The folder of the run, made where it is missing; without ``resume`` always a new one.

    ``ValueError`` that names a setting which the run there has otherwise.
    """
    base = config.name or name_of(config.data)
    if config.resume and (config.output / base / "config.json").exists():
        folder = config.output / base
        try:
            before = json.loads((folder / "config.json").read_text())
        except ValueError:
            raise ValueError(f"{folder / 'config.json'} is broken; choose another name") from None
        for key, value in settings_of(config).items():
            if key not in _FREE and before.get(key) != value:
                raise ValueError(
                    f"{key} is {value!r}, and the run in {folder} has {before.get(key)!r}; give it the same, "
                    "or choose another name, or --no-resume"
                )
        return folder
    for number in range(1, 10_000):
        folder = config.output / (base if number == 1 else f"{base}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if config.name:
                raise ValueError(
                    f"name is {config.name!r}; {folder} exists and holds no run, choose another"
                ) from None
            continue
        return folder
    raise ValueError(f"output {config.output} is full of runs named {base}")


def objective_of(config: TrainConfig) -> DiffusionObjective:
    """The noise, with a learned variance where that is asked for."""
    diffusion = GaussianDiffusion(config.schedule, weighting=config.weighting)
    return DiffusionObjective(diffusion, "eps", config.learn_sigma)


class Draws(NamedTuple):
    """What is random about the samples of a step."""

    noise: Tensor  # [B, C, H, W]
    t: Tensor  # timesteps, int64 [B]
    weight: Tensor | None  # of the losses [B], None for ones
    drop: Tensor  # whose labels are left out, bool [B]
    flip: Tensor  # which images are mirrored, bool [B]


class Interrupted(Exception):
    """A signal has stopped the run, after a checkpoint."""


def _rows_until(path: Path, step: int) -> list[dict[str, float]]:
    """The lines of stats.jsonl up to a step; the file is cut off there, as what follows is computed again."""
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


class Trainer:
    """Owns the model, its moving average, the optimizer and the data of one run.

    ``create`` makes the model, from what :func:`switch_dit.model.create_model` takes.
    """

    def __init__(
        self, config: TrainConfig, images: Data, create: Callable[..., torch.nn.Module] = create_model
    ) -> None:
        self.config, self.images, self.steps_done = config, images, 0
        self.device = resolve_device(config.device)
        self.dtype = resolve_precision(config.precision, self.device)
        torch.manual_seed(config.seed)
        channels, height = images.channels, images.size
        patch_size = PRESETS[config.model].patch_size
        if height % patch_size:
            raise ValueError(
                f"model is {config.model!r}; its patch size must divide the images' {height} pixels"
            )
        model_settings = {
            "input_size": height,
            "in_channels": channels,
            "num_classes": images.num_classes if config.conditional else 0,
            "class_dropout_prob": config.label_dropout,
            "learn_sigma": config.learn_sigma,
            "routing": config.routing,
            "num_experts": config.num_experts,
            "top_k": config.top_k,
        }
        self.model = create(config.model, **model_settings).to(self.device)
        self.objective = objective_of(config)
        self.sampler = create_sampler(config.timesteps, self.objective)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        # Device scalars: a captured step reads what each replay finds in them.
        self.rate = torch.tensor(config.lr, device=self.device)
        self.optimizer = create_optimizer(
            self.model.parameters(), self.rate, weight_decay=config.weight_decay
        )
        self.averaged = dict(self.model.named_parameters())
        of_copy = dict(self.ema.named_parameters())
        self.average = MovingAverage(self.averaged, config.ema_decay, of_copy)
        self.with_prior = self.model.forward_with_prior
        if config.compile:
            self.with_prior = torch.compile(self.with_prior)
        self.advance = GraphedStep(self._advance) if config.cuda_graph else self._advance
        # Bytes on the device, where a batch is scaled: the whole set, or the present batch of a set on disk.
        held = images.in_memory
        if held is None:
            one, label = images.batch(torch.zeros(1, dtype=torch.int64), torch.full((1,), config.flip))
            held = one.new_empty(config.batch_size, *one.shape[1:]), label.new_empty(config.batch_size)
        self.train_images, self.train_labels = (tensor.to(self.device) for tensor in held)
        # Every random number is a function of the seed, the step and the sample's position in the batch.
        self.of_samples, self.of_ties = Stream(config.seed, 0), Stream(config.seed, 1)
        self.of_latents = Stream(config.seed, 2)
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)  # of the step
        self.positions = torch.arange(config.batch_size, device=self.device)

    def draw(self, number: Tensor | int, shape: tuple[int, ...]) -> Draws:
        """What is random about the samples of a step, with noise [B, *shape]."""
        count = math.prod(shape)
        uniform = self.of_samples.uniform(number, self.positions, 4 + 2 * -(-count // 2))
        t, weight = self.sampler.draw(uniform[:, 0])
        noise = normal(uniform[:, 4:])[:, :count].view(-1, *shape)
        drop = uniform[:, 1] < self.config.label_dropout
        return Draws(noise, t, weight, drop, self._flips(uniform))

    def _flips(self, uniform: Tensor) -> Tensor:
        return (uniform[:, 2] < 0.5) & self.config.flip

    def flips(self, number: int) -> Tensor:
        """The mirrored images of a step as :meth:`draw` has them, on the CPU, for a set on disk."""
        return self._flips(self.of_samples.uniform(number, self.positions.cpu(), 4))

    def loss_terms(self, x_start: Tensor, y: Tensor | None, match: bool = True) -> dict[str, Tensor]:
        """Batch means of mse, vb (zero without learned variance) and prior, at the step's timesteps."""
        noise, t, weight, drop, _ = self.draw(self.number, x_start.shape[1:])
        x_t = self.objective.q_sample(x_start, t, noise)
        told: dict[str, Tensor] = {}
        if y is not None and self.config.label_dropout > 0:
            told["drop"] = drop
        if self.config.routing == "switch" and match:
            slots = len(self.model.assignment)
            told["ties"] = self.of_ties.uniform(self.number, self.positions[:2], slots)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            out, prior = self.with_prior(x_t, t, y, match, **told)
        losses = self.objective.losses(out, x_start, x_t, t, noise, weight)
        terms = {name: value.mean() for name, value in losses.items()}
        return {"mse": terms["mse"], "vb": terms.get("vb", torch.zeros_like(prior)), "prior": prior}

    def rate_at(self, number: int) -> float:
        """The learning rate of a step."""
        config, decay = self.config, "cosine" if self.config.lr_decay else "constant"
        return learning_rate(number, lr=config.lr, steps=config.steps, warmup=config.warmup, decay=decay)

    def step(
        self, number: int, chosen: Tensor, batch: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One optimizer step on the training images ``chosen [B]``; the loss terms, detached.

        ``batch`` are these images and their labels, where they were read ahead from a set on disk.

        The moving average's decay starts low, so that the first weights are soon forgotten. Nothing here
        waits for a GPU: the indices are copied from pinned memory.
        """
        self.number.fill_(number)
        self.rate.fill_(self.rate_at(number))
        self.average.prepare(number)
        if self.images.in_memory is None:
            for held, read in zip(
                (self.train_images, self.train_labels),
                batch or self.images.batch(chosen, self.flips(number)),
                strict=True,
            ):
                held.copy_(read, non_blocking=True)
            chosen = torch.arange(len(chosen), device="cpu")
        if self.device.type == "cuda":
            chosen = chosen.pin_memory().to(self.device, non_blocking=True)
        return self.advance(chosen, number % self.config.prior_every == 0)

    def _advance(self, chosen: Tensor, match: bool) -> dict[str, Tensor]:
        """The part of a step that a CUDA graph can hold."""
        y = self.train_labels[chosen] if self.config.conditional else None
        x = self.train_images[chosen]
        if self.config.flip and self.images.in_memory is not None:
            x = mirrored(x, self._flips(self.of_samples.uniform(self.number, self.positions, 4)))
        noise = None
        if self.images.needs_noise:
            count = self.images.channels * x.shape[2] * x.shape[3]
            uniform = self.of_latents.uniform(self.number, self.positions, 2 * -(-count // 2))
            noise = normal(uniform)[:, :count].view(len(x), -1, *x.shape[2:])
        terms = self.loss_terms(self.images.scale(x, noise), y, match)
        loss = terms["mse"] + terms["vb"] + self.config.prior_weight * terms["prior"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.average.advance(self.averaged)
        return {"loss": loss.detach(), **{name: value.detach() for name, value in terms.items()}}

    def tensors(self) -> dict[str, Tensor]:
        """All that a run carries from step to step, by name: weights, averages, optimizer, assignment."""
        found = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        found |= {f"ema.{name}": p.detach() for name, p in self.ema.named_parameters()}
        found |= {f"buffer.{name}": b for name, b in self.model.named_buffers() if name == "assignment"}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            state = self.optimizer.state[parameter]
            if not state:  # as AdamW makes it at its first step
                state["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
            found |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
        return found

    def restore(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """Goes back to the newest checkpoint that is whole; its state, or None where there is none."""
        state = checkpoints.latest()
        if state is not None:
            checkpoints.load(state["step"], self.tensors())
        return state

    def batches(self, start: int = 0) -> Iterator[tuple[Any, ...]]:
        """What :meth:`step` takes, from a step on: indices, and the batch itself where it is read ahead from
        disk.
        """
        config = self.config
        order = batches(len(self.images), config.batch_size, config.seed, start)
        if self.images.in_memory is not None:
            yield from zip(order)
            return
        ahead, order = itertools.tee(order)
        plan = ((chosen, self.flips(number)) for number, chosen in enumerate(ahead, start))
        pin = self.device.type == "cuda"
        yield from zip(order, loaded(self.images, plan, config.workers, pin), strict=True)

    def fit(self, folder: Path) -> list[dict[str, float]]:
        """The steps that are left, with a progress bar; writes stats.jsonl as it goes and returns its rows.

        It goes on from the newest checkpoint in the folder. SIGTERM and SIGINT save one more and raise
        :class:`Interrupted`.
        """
        config = self.config
        checkpoints = Checkpoints(folder / "checkpoint", config.keep_checkpoints)
        state = self.restore(checkpoints)
        done = self.steps_done = 0 if state is None else state["step"]
        rows = _rows_until(folder / "stats.jsonl", done)
        pending = [torch.tensor(values, device=self.device) for values in state["pending"]] if state else []
        names = ["loss", "mse", "vb", "prior"]
        if done:
            print(f"going on from step {done} of {config.steps}, from {checkpoints.folder}", flush=True)
        self.model.train()
        logged_at, timed = time.perf_counter(), len(pending)
        with (
            open(folder / "stats.jsonl", "a") as stats,
            tqdm(total=config.steps, initial=done, desc="training", unit="step") as bar,
            stop_on_signals() as stop,
        ):
            for number, batch in zip(range(done, config.steps), self.batches(done), strict=False):
                terms = self.step(number, *batch)
                pending.append(torch.stack([terms[name].float() for name in names]))
                bar.update()
                done = self.steps_done = number + 1
                last = done == config.steps
                if done % config.log_every == 0 or last:
                    values = self._checked(pending, done)
                    now = time.perf_counter()
                    rate = (len(pending) - timed) * config.batch_size / (now - logged_at)
                    means = dict(zip(names, values.double().mean(0).tolist(), strict=True))
                    rows.append({"step": done, **means, "lr": self.rate_at(number),
                                 "images_per_second": rate})  # fmt: skip
                    stats.write(json.dumps(rows[-1]) + "\n")
                    stats.flush()
                    bar.set_postfix(
                        loss=f"{means['loss']:.3f}", prior=f"{means['prior']:.3f}", images_s=f"{rate:.0f}"
                    )
                    pending, timed, logged_at = [], 0, now
                if done % config.checkpoint_every == 0 or last or stop.name:
                    self._save_checkpoint(checkpoints, pending, done)
                if stop.name and not last:
                    kept = max(checkpoints.steps(), default=0)
                    raise Interrupted(
                        f"{stop.name} stopped the run after {done} of {config.steps} steps; the same command "
                        f"goes on from step {kept}"
                    )
        return rows

    def _checked(self, pending: list[Tensor], done: int) -> Tensor:
        """The terms of the steps since the last line, [n, 4] on the CPU; raises where one is not finite."""
        values = torch.stack(pending).cpu() if pending else torch.zeros(0, 4)
        wrong = (~values.isfinite().all(1)).nonzero()
        if len(wrong):
            number = done - len(pending) + int(wrong[0])
            t = self.draw(number, (1,)).t
            chosen = next(batches(len(self.images), self.config.batch_size, self.config.seed, number))
            raise FloatingPointError(
                f"the loss is not finite at step {number + 1}, images {chosen.tolist()[:8]}..., timesteps "
                f"{t.tolist()[:8]}...; a smaller lr may help. Nothing is saved after it"
            )
        return values

    def _save_checkpoint(self, checkpoints: Checkpoints, pending: list[Tensor], done: int) -> None:
        """Writes a checkpoint; a disk that is full is said, and the run goes on."""
        state = {"pending": self._checked(pending, done).tolist(), "settings": settings_of(self.config)}
        try:
            checkpoints.save(done, self.tensors(), state)
        except OSError as error:
            tqdm.write(f"no checkpoint at step {done}: {error}. The last one stays, the run goes on.")

    def generate(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Samples of the moving average on the CPU, the classes in turn, and their labels."""
        conditional, classes = self.config.conditional, self.images.num_classes
        labels = torch.arange(count, device="cpu") % classes if conditional else None
        images = sample(
            self.ema,
            self.objective,
            labels,
            count=count,
            steps=self.config.sample_steps,
            guidance=self.config.guidance,
            generator=torch.Generator("cpu").manual_seed(self.config.seed),
            clip=True,
        )
        return images.cpu(), labels

    def save(self, folder: Path) -> None:
        """The weights alone, to sample from; ``FloatingPointError`` where the weights are not finite."""
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise FloatingPointError(
                    f"{name} is not finite after step {self.steps_done}; nothing is saved"
                )
        objective = {
            "name": self.objective.name,
            "schedule": self.config.schedule,
            "weighting": self.config.weighting,
            "learn_sigma": self.objective.learn_sigma,
            "num_timesteps": self.objective.num_timesteps,
        }
        settings = {"model": self.model.settings, "objective": objective}
        save_checkpoint(folder / "weights", self.model, self.ema, settings)
