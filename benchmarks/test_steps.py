"""Whole training and sampling steps of Switch-DiT, of DiT without experts, and of the official structure.

For all of them a training step is switch_dit's Trainer.step: forward, losses, backward, AdamW, moving
average. A sampling step is the model's evaluation in a denoising step with guidance: two rows an image, one
timestep for all. What sampling does once for all of its batches is left out: routing the timesteps and
merging the experts of Switch-DiT. So is the scheduler's update, a few elementwise operations. Images per
second are images moved on by one denoising step. Data are noise. Switch-DiT and the official structure have
the same random weights. The contenders take turns, and one whose results are not those of float64 is not
timed.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from switch_dit import PRESETS, SwitchDiT, create_model
from switch_dit.data import Images
from switch_dit.merged import MergedSwitchDiT
from switch_dit.settings import TrainConfig
from switch_dit.trainer import Trainer
from torch import Tensor, nn

from benchmarks import counts
from benchmarks.case import SWITCH_MOE, describe, relative_rms
from benchmarks.conftest import Bench, describe_time
from benchmarks.official_structure import OfficialStructure
from benchmarks.timing import Timed, wait

TRAIN, SAMPLE = "train", "sample"
DENSE, STRUCTURE = "dense DiT", "official structure"
EAGER = "eager"
MODES = {EAGER: {}, "compiled": {"compile": True}, "graphed": {"cuda_graph": True}}  # settings of training
PRODUCT = "matrix product"  # timed in the same rounds: what MFU is a share of
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
GUIDANCE = 1.5
TIMESTEP = 500  # of a sampling step
WARM_UP = 6  # steps; Trainer captures its graph in the fourth
ALLOWED = 3e-5  # relative RMS of float32 against float64, through all blocks and back
ALLOWED_PRIOR = 1e-2  # of the prior loss: the matching breaks ties at random

Row = dict[str, Any]


class Size(NamedTuple):
    """What a model is fed."""

    latent: int
    channels: int
    classes: int
    batch: dict[tuple[str, str], int]  # by device and pass


LATENTS = (32, 4, 1000)
SIZES = {
    "tiny/4": Size(8, 1, 10, {("cpu", TRAIN): 128, ("cpu", SAMPLE): 64}),  # as the README trains it
    "S/2": Size(*LATENTS, {("cpu", TRAIN): 8, ("cpu", SAMPLE): 2, ("cuda", TRAIN): 64, ("cuda", SAMPLE): 64}),
    "B/2": Size(*LATENTS, {("cuda", TRAIN): 64, ("cuda", SAMPLE): 64}),
    "XL/2": Size(*LATENTS, {("cuda", TRAIN): 32, ("cuda", SAMPLE): 32}),
}


class Setting(NamedTuple):
    """A step of a model on a device; pass, mode: of TRAIN and SAMPLE, of MODES."""

    which: str
    model: str
    device: str
    batch: int
    mode: str = EAGER
    dtype: str = "float32"

    @property
    def group(self) -> str:
        return f"{self.which}_step"

    @property
    def settings(self) -> dict[str, int]:
        """The settings of the model, for create_model."""
        size = SIZES[self.model]
        return {"input_size": size.latent, "in_channels": size.channels, "num_classes": size.classes}

    @property
    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.device, dtype=dtype, enabled=dtype != torch.float32)

    def __str__(self) -> str:
        mode = "" if self.mode == EAGER else f" {self.mode}"
        return f"{self.model} B={self.batch} {self.dtype}{mode}"


def settings_of(which: str, device: str, quick: bool = False) -> list[Setting]:
    """What is measured on a device."""
    models = [name for name, size in SIZES.items() if (device, which) in size.batch]
    modes = MODES if device == "cuda" and not quick else [EAGER]
    return [
        Setting(which, model, device, SIZES[model].batch[device, which], mode, dtype)
        for model in models[: 1 if quick else None]
        for dtype in DTYPES[device][: 1 if quick else None]
        for mode in modes
    ]


Step = Callable[[], Any]


class Contender(NamedTuple):
    """A kind of model; ``create`` takes what switch_dit's create_model takes."""

    name: str
    create: Callable[..., nn.Module]
    routing: str = "switch"


def with_random_weights(preset: str, **settings: Any) -> SwitchDiT:
    """create_model with the same random weights in every call: a fresh model is the identity."""
    torch.manual_seed(0)
    model = create_model(preset, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                std = 1.0 if name == "router.weight" else 0.02  # 1.0: other experts at other timesteps
                parameter.add_(torch.randn_like(parameter), alpha=std)
    return model


def contenders(mode: str = EAGER) -> list[Contender]:
    """Who runs in a mode: what waits for the host is only run as it is written."""
    found = [
        Contender(SWITCH_MOE, with_random_weights),
        Contender(DENSE, with_random_weights, "none"),
    ]
    if mode == EAGER:
        structure = lambda *a, **k: OfficialStructure.of(with_random_weights(*a, **k))  # noqa: E731
        found.append(Contender(STRUCTURE, structure))
    return found


def train_step(setting: Setting, contender: Contender) -> tuple[nn.Module, Step]:
    """The model of a Trainer, and its next step."""
    size = SIZES[setting.model]
    count = max(4 * setting.batch, size.classes)
    images = torch.randn(count, size.channels, size.latent, size.latent)
    labels = torch.arange(count) % size.classes
    config = TrainConfig(
        model=setting.model, batch_size=setting.batch, routing=contender.routing, lr=1e-4,
        device=setting.device, precision=setting.dtype, **MODES[setting.mode],
    )  # fmt: skip
    trainer = Trainer(config, Images(images, labels, images[:1], labels[:1], size.classes), contender.create)
    numbers = itertools.count()

    def step() -> Any:
        return trainer.step(next(numbers), torch.randint(count, (setting.batch,)))

    return trainer.model, step


def sample_step(setting: Setting, contender: Contender) -> tuple[nn.Module, Step]:
    """A model, and its evaluation in a denoising step with guidance."""
    model = contender.create(setting.model, routing=contender.routing, **setting.settings)
    model = model.to(setting.device).eval()  # before a graph is captured: training drops labels
    size = SIZES[setting.model]
    x = torch.randn(setting.batch, size.channels, size.latent, size.latent, device=setting.device)
    labels = torch.arange(setting.batch, device=setting.device) % size.classes
    guided = guided_evaluation(model)
    guided = torch.compile(guided) if setting.mode == "compiled" else guided

    @torch.no_grad()
    def step() -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, size.classes)])
        with setting.autocast:
            return guided(torch.cat([x, x]), both)[: setting.batch]

    if setting.mode != "graphed":
        return model, step
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return model, graph.replay


def guided_evaluation(model: SwitchDiT) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided output [2B, 2C, H, W] at timestep TIMESTEP for images x [2B, C, H, W] and labels y [2B]."""
    if isinstance(model, OfficialStructure):
        return lambda x, y: model.forward_with_cfg(x, torch.full_like(y, TIMESTEP), y, GUIDANCE)
    merged = MergedSwitchDiT(model, torch.tensor([TIMESTEP]))

    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        out = merged(x, 0, y)
        with_label, without = out[:, : model.in_channels].chunk(2)
        guided = without + GUIDANCE * (with_label - without)
        return torch.cat([torch.cat([guided, guided]), out[:, model.in_channels :]], dim=1)

    return evaluate


def results(model: nn.Module, setting: Setting) -> dict[str, Tensor]:
    """What two images give: the output, with all gradients and the prior loss in training."""
    generator = torch.Generator().manual_seed(1)
    size, dtype = SIZES[setting.model], next(model.parameters()).dtype
    shape = (2, size.channels, size.latent, size.latent)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    x, grad = x.to(setting.device, dtype), torch.cat([grad, -0.5 * grad], dim=1).to(setting.device, dtype)
    y = torch.tensor([0, size.classes], device=setting.device)
    model.eval()
    if setting.which == SAMPLE:
        with torch.no_grad():
            return {"output": guided_evaluation(model)(torch.cat([x[:1], x[:1]]), y)}
    t = torch.tensor([120, 950], device=setting.device)
    out = model(x, t, y)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(out, list(trained.values()), grad)
    found = {"output": out.detach(), **dict(zip(trained, gradients, strict=True))}
    model.train()
    with torch.no_grad():
        return found | {"prior loss": model.forward_with_prior(x, t, y)[1]}


def compare(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    """``error`` and ``allowed`` (relative RMS) of the worst of :func:`results`, and ``failure`` or None."""
    if found.keys() != exact.keys():
        return {"error": None, "allowed": ALLOWED, "failure": f"has no {sorted(exact.keys() ^ found.keys())}"}
    limits = {name: ALLOWED_PRIOR if name == "prior loss" else ALLOWED for name in exact}
    errors = {name: relative_rms(found[name], exact[name]) for name in exact}
    worst = max(errors, key=lambda name: errors[name] / limits[name])
    error, allowed = errors[worst], limits[worst]
    wrong = f"wrong: {worst} is {error:.1e} off, {allowed:.1e} is allowed"
    return {
        "error": error if error < float("inf") else None,
        "allowed": allowed,
        "failure": None if error <= allowed else wrong,
    }


class Prepared:
    """The contenders of a setting: those that are right, ready to take turns."""

    def __init__(self, setting: Setting, among: list[Contender] | None = None) -> None:
        self.setting, self.contenders = setting, among or contenders(setting.mode)
        self.models: dict[str, nn.Module] = {}
        self.steps: dict[str, Step] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        exact: dict[str, dict[str, Tensor]] = {}
        gc.collect()  # a Trainer refers to itself: that of the last setting may still hold its memory
        torch.compiler.reset()  # dynamo compiles one function for a few shapes only
        for contender in self.contenders:
            name, routing = contender.name, contender.routing
            if routing not in exact:
                right = with_random_weights(setting.model, routing=routing, **setting.settings)
                exact[routing] = results(right.to(setting.device).double(), setting)
            try:
                model, step = (train_step if setting.which == TRAIN else sample_step)(setting, contender)
                self.checks[name] = compare(results(model, setting), exact[routing])
                model.train(setting.which == TRAIN)
                if self.checks[name]["failure"] is None:
                    for _ in range(1 if setting.mode == EAGER else WARM_UP):
                        step()
                    wait(setting.device)
                    self.models[name], self.steps[name] = model, step
            except Exception as error:  # one contender that fails must not end the others
                self.checks[name] = {"error": None, "allowed": ALLOWED, "failure": describe(error)}
        n, dtype = PRODUCT_SIZE[setting.device], getattr(torch, setting.dtype)
        a, b = (torch.randn(n, n, device=setting.device).to(dtype) for _ in range(2))
        self.steps[PRODUCT] = lambda: a @ b

    def rows(self, timed: dict[str, Timed | Exception]) -> list[Row]:
        """A row for each contender, from the times of all."""
        return [self._row(contender, timed) for contender in self.contenders]

    def _row(self, contender: Contender, timed: dict[str, Timed | Exception]) -> Row:
        setting, name = self.setting, contender.name
        hidden_size, depth, _, patch_size = PRESETS[setting.model]
        tokens = (SIZES[setting.model].latent // patch_size) ** 2
        row: Row = {
            "operation": setting.group, "note": "" if setting.mode == EAGER else setting.mode,
            "shape": {"B": setting.batch, "T": tokens, "D": hidden_size, "L": depth},
            "dtype": setting.dtype, "device": setting.device, "pass": setting.which,
            "contender": name, "model": setting.model, "batch": setting.batch, **self.checks[name],
        }  # fmt: skip
        time = timed.get(name)
        if time is None or isinstance(time, Exception):
            return row | ({} if time is None else describe_time(time))
        seconds = statistics.median(time.seconds)
        row |= {**describe_time(time), "images_per_second": setting.batch / seconds, **self._counts(name)}
        product = timed[PRODUCT]
        if isinstance(product, Timed):
            rate = 2 * PRODUCT_SIZE[setting.device] ** 3 / statistics.median(product.seconds)
            row["mfu"] = useful_flops(setting, contender.routing) / seconds / rate
        return row

    def _counts(self, name: str) -> dict[str, Any]:
        setting, step = self.setting, self.steps[name]
        counted: dict[str, Any] = {}
        if setting.mode != "graphed":  # a graph allocates nothing when it is replayed
            counted["peak_bytes"] = counts.peak_bytes(step, setting.device)
        if setting.device == "cuda":
            counted["launches"] = counts.launches(step)
        if setting.mode == EAGER:  # a compiled or captured step does not pass through torch's dispatcher
            counted |= {"operators": len(counts.operators(step)), "host_waits": counts.host_waits(step)}
        return counted


def useful_flops(setting: Setting, routing: str) -> float:
    """FLOPs of the matrix products that a step needs: those of DiT, and with experts one product
    ``[B*T, D] x [D, D]`` a block, the merged one. A backward has twice as many as the forward. Routing,
    matching, losses and the optimizer are left out. The same for all contenders with experts: their MFU
    compares times.
    """
    size = SIZES[setting.model]
    d, depth, _, patch = PRESETS[setting.model]  # D, L
    t, pixels = (size.latent // patch) ** 2, patch**2 * size.channels  # T, numbers in a patch
    block = 24 * t * d**2 + 4 * t**2 * d + 12 * d**2  # products with weights, attention, adaLN
    moe = 2 * t * d**2 if routing == "switch" else 0
    embedding, final = 2 * t * pixels * d + 2 * (256 * d + d**2), 4 * d**2 + 4 * t * d * pixels
    forward = float(setting.batch * (depth * (block + moe) + embedding + final))
    return forward * (3 if setting.which == TRAIN else 2)  # two rows an image


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``setting``: the steps of the device."""
    device, quick = (metafunc.config.getoption(option) for option in ("--device", "--quick"))
    found = settings_of(TRAIN if metafunc.function is test_train_step else SAMPLE, device, quick)
    metafunc.parametrize("setting", found, ids=[str(setting) for setting in found])


def test_train_step(bench, setting: Setting) -> None:
    measure(bench, setting)


def test_sample_step(bench, setting: Setting) -> None:
    measure(bench, setting)


def measure(bench: Bench, setting: Setting) -> None:
    """Checks, times in turns and records all contenders."""
    prepared = Prepared(setting)
    wrong = prepared.checks[SWITCH_MOE]["failure"] is not None
    calls = {name: [step] for name, step in prepared.steps.items()}
    bench.record(setting.group, prepared.rows({} if wrong else bench.time(calls, graphs=False)))
