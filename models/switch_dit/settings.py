"""The settings of a training run, and its folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from switch_dit.averages import WIDEST
from switch_dit.data import name_of
from switch_dit.devices import resolve_device
from switch_dit.model import PRESETS, ROUTINGS
from switch_dit.objectives import OBJECTIVES, Objective, create_objective
from switch_dit.optimisation import DECAYS
from switch_dit.recipes import RECIPES
from switch_dit.systems import parsed_options
from switch_dit.timesteps import SAMPLERS, Sampler, create_sampler
from switch_dit.tracking import check_tracker
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

    recipe: str = ""
    """Other defaults: digits, digits-dit_moe and so on for the other mixtures, fashion-mnist, imagenet-S,
    imagenet-B, imagenet-L, imagenet-XL or ffhq. What is given beside it counts."""
    # -- model
    model: str = "tiny/4"
    """The size and patch size of the model: {tiny,S,B,L,XL}/{2,4,8}."""
    routing: Literal["switch", "dtr", "none", "dit_moe", "ec_dit", "diffmoe", "mode", "nucleus", "evomoe"] = (
        "switch"
    )
    """switch trains Switch-DiT, dtr uses fixed channel masks, none is a plain DiT; the others are DiTs whose
    feed-forward layers are mixtures."""
    num_experts: int = 3
    """Each block has this many experts."""
    top_k: int = 2
    """The router chooses this many experts for a sample, or for a token."""
    mixture: tuple[str, ...] = ()
    """Options of a mixture that is not switch's, like capacity=1.5 or load_balance=0.02; models/README.md has
    those of each."""
    objective: Literal["eps", "v", "flow"] = "eps"
    """What the model predicts: the noise, the velocity, or the direction of rectified flow."""
    learn_sigma: bool = True
    """Whether a model of the noise (eps) predicts the variance too (hybrid loss)."""
    start_from: str = ""
    """The run begins with the averaged weights in this folder: that of another run, like runs/digits/weights,
    or one that upcycle.py has written. By default weights are fresh."""
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
    lr_decay: Literal["cosine", "constant", "inverse-sqrt"] = "cosine"
    """How the learning rate falls: to zero along a cosine, not at all as in the paper, or as in EDM2."""
    warmup: int = 50
    """The learning rate warms up linearly over this many steps."""
    weight_decay: float = 0.0
    """AdamW decays the weights by this factor times the learning rate."""
    max_grad_norm: float = 0.0
    """Gradients are clipped to this joint norm; 0 clips nothing."""
    ema_decay: float = 0.995
    """The moving average keeps this share of itself at each step; the paper's 0.9999 suits long runs."""
    power_averages: tuple[float, ...] = ()
    """Power-function averages of these widths are tracked too, like 0.05 0.10 (EDM2). From their snapshots
    average_weights.py makes an average of any width after the run."""
    snapshot_every: int = 0
    """Their snapshots are written every this many steps, and at the end; 0 is a 16th of the run."""
    prior_weight: float = 1.0
    """The diffusion prior loss is multiplied by this factor."""
    schedule: Literal["linear", "cosine"] = "linear"
    """The noise grows with the timestep by this schedule."""
    weighting: str = "constant"
    """How the loss is weighted over timesteps: constant, p2, p2_gamma<a>_k<b>, min_snr_<gamma>, or uw, which
    learns the weights of 8 clusters."""
    timesteps: Literal["uniform", "logit-normal", "speed", "curriculum"] = "uniform"
    """How timesteps are drawn; speed is SpeeD (arXiv 2405.17403), with its weights, and curriculum goes from
    noise to images (arXiv 2403.10348)."""
    curriculum_clusters: int = 20
    """The curriculum divides the timesteps into this many clusters."""
    curriculum_patience: int = 10
    """Its next cluster joins after this many lines of stats.jsonl without a lower mse."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto takes bfloat16 autocast on a GPU and on CPUs with AMX, float32 elsewhere. float16 scales the
    loss."""
    accumulate: int = 1
    """A step takes its batch in this many parts, which needs less memory."""
    checkpoint_activations: bool = False
    """Whether the backward computes each block again instead of keeping what is inside it."""
    fsdp: bool = False
    """Whether the processes of torchrun share the weights among them (fully_shard); else each has all."""
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
    pictures_every: int = 0
    """Samples, routing and losses are drawn every this many steps; 0 draws them at the end only."""
    evaluate_every: int = 0
    """--generated samples are drawn and measured every this many steps too, into evaluations.jsonl; 0 does so
    at the end only."""
    track: str = ""
    """Where the numbers and pictures go besides: tensorboard, wandb or trackio. None needs an account."""
    dry_run: bool = False
    """Whether to say what would be trained, and stop."""
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
            checkpoint_every=self.checkpoint_every, accumulate=self.accumulate,
            curriculum_clusters=self.curriculum_clusters, curriculum_patience=self.curriculum_patience,
        )  # fmt: skip
        check_integers(2, keep_checkpoints=self.keep_checkpoints)
        check_integers(
            0, warmup=self.warmup, generated=self.generated, image_size=self.image_size, workers=self.workers,
            pictures_every=self.pictures_every, snapshot_every=self.snapshot_every,
            evaluate_every=self.evaluate_every,
        )  # fmt: skip
        check_integers(0, 2**32 - 1, seed=self.seed)
        check_positive(lr=self.lr, guidance=self.guidance)
        check_numbers(
            0, wanted="0 or more", weight_decay=self.weight_decay, prior_weight=self.prior_weight,
            label_dropout=self.label_dropout, ema_decay=self.ema_decay, max_grad_norm=self.max_grad_norm,
        )  # fmt: skip
        check_top_k(self.top_k, self.num_experts)
        check_flags(
            learn_sigma=self.learn_sigma, conditional=self.conditional, compile=self.compile,
            cuda_graph=self.cuda_graph, resume=self.resume, flip=self.flip, verify_data=self.verify_data,
            checkpoint_activations=self.checkpoint_activations, fsdp=self.fsdp, dry_run=self.dry_run,
        )  # fmt: skip
        check_choice("model", self.model, PRESETS)
        check_choice("routing", self.routing, ROUTINGS)
        self.mixture = tuple(self.mixture)
        parsed_options(self.routing, self.mixture)
        check_choice("unreadable", self.unreadable, ("fail", "skip"))
        check_choice("precision", self.precision, ("auto", "float32", "bfloat16", "float16"))
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("lr_decay", self.lr_decay, DECAYS)
        check_choice("timesteps", self.timesteps, SAMPLERS)
        for name, kinds in (
            ("data", (str, Path)),
            ("output", (str, Path)),
            ("name", str),
            ("device", str),
            ("start_from", (str, Path)),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds) or "\0" in str(value):
                raise TypeError(f"{name} is {value!r}; it must be text without a null character")
        self.data, self.output, self.start_from = str(self.data), Path(self.output), str(self.start_from)
        if self.start_from:
            self.start_from = os.path.normpath(self.start_from)
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
        self.power_averages = tuple(self.power_averages)
        for width in self.power_averages:
            check_numbers(1e-4, WIDEST, f"between 1e-4 and {WIDEST:.4f}", power_averages=width)
        if len(set(self.power_averages)) < len(self.power_averages):
            raise ValueError(f"power_averages is {self.power_averages}; each width must stand there once")
        check_tracker(self.track)
        if self.recipe:
            check_choice("recipe", self.recipe, RECIPES)
        if self.evaluate_every and not (self.generated and self.conditional):
            raise ValueError(
                f"evaluate_every is {self.evaluate_every}; it measures samples of classes, so generated must "
                "be 10 or more, and conditional True"
            )
        sampler_of(self, objective_of(self))
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
    "guidance", "sample_steps", "generated", "workers", "verify_data", "accumulate", "fsdp",
    "checkpoint_activations", "dry_run", "track", "recipe",
    "pictures_every", "snapshot_every", "evaluate_every",
)  # fmt: skip


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """All settings as JSON holds them."""
    return json.loads(json.dumps(asdict(config), default=str))


def carried_settings(config: TrainConfig) -> dict[str, Any] | None:
    """What the run that ``config`` goes on with took over from ``start_from``, once it has a checkpoint.

    It needs that folder no longer, which may have gone or hold other weights by now.
    """
    folder = config.output / (config.name or name_of(config.data))
    if not config.start_from or not config.resume or not any((folder / "checkpoint").glob("step-*")):
        return None
    try:
        return json.loads((folder / "config.json").read_text()).get("carried")
    except (OSError, ValueError):
        return None  # run_folder says what is broken


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
        defaults = settings_of(TrainConfig())
        for key, value in settings_of(config).items():
            before.setdefault(key, defaults[key])  # the run is older than the setting
            if key not in _FREE and before[key] != value:
                raise ValueError(
                    f"{key} is {value!r}, and the run in {folder} has {before[key]!r}; give it the same, "
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


def process_of(config: TrainConfig) -> dict[str, Any]:
    """What create_objective takes."""
    weighting = "constant" if config.weighting == "uw" else config.weighting  # UW is learned beside it
    return {
        "name": config.objective,
        "schedule": config.schedule,
        "weighting": weighting,
        "learn_sigma": config.learn_sigma and config.objective == "eps",
        "num_timesteps": 1000,
    }


def objective_of(config: TrainConfig) -> Objective:
    """What the model is trained to predict."""
    return create_objective(**process_of(config))


def sampler_of(config: TrainConfig, objective: Objective) -> Sampler:
    """How the timesteps are drawn."""
    settings = {}
    if config.timesteps == "curriculum":
        settings = {"clusters": config.curriculum_clusters, "patience": config.curriculum_patience}
    return create_sampler(config.timesteps, objective, **settings)
