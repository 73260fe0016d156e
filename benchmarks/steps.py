"""Whole training and sampling steps of Switch-DiT, DiT, the official structure and the official model.

    python -m benchmarks.steps --output benchmarks/results     # S/2, B/2, XL/2 on a GPU; tiny/4, S/2 on a CPU

A training step is switch_dit's Trainer.step for all: forward, losses, backward, AdamW, moving average. A
sampling step is the model's evaluation in a denoising step with guidance: two rows an image, one timestep for
all; the scheduler's update, a few elementwise operations, is left out. Its images/s are images moved on by
one denoising step. Data are noise. All contenders but DiT have the same random weights, and take turns;
one whose results are not those of float64 is not timed.

Host waits are operators that make the host wait for a GPU. On a CPU those without an operator do not show:
the official loop's sizes as a list, forward and backward, and the costs that go to scipy.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from switch_dit import PRESETS, SwitchDiT, create_model
from switch_dit.data import Images
from switch_dit.train import TrainConfig, Trainer
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import counts
from benchmarks.case import OURS, describe, relative_rms
from benchmarks.environment import describe as describe_machine
from benchmarks.official_model import OfficialModel, switch_dit_names
from benchmarks.official_structure import OfficialStructure
from benchmarks.peers import OFFICIAL, parse_peer_path, peer_path, peer_states
from benchmarks.timing import Step, Turns, wait

TRAIN, SAMPLE = "train", "sample"
DENSE, STRUCTURE = "dense DiT", "official structure"
EAGER = "eager"
MODES = {EAGER: {}, "compiled": {"compile": True}, "graphed": {"cuda_graph": True}}  # settings of training
PRODUCT = "matrix product"  # timed in the same rounds: what MFU is a share of
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
GUIDANCE = 1.5
WARM_UP = 6  # steps; Trainer captures its graph in the fourth
ALLOWED = 3e-5  # relative RMS of float32 against float64, through all blocks and back
ALLOWED_PRIOR = 1e-2  # of the prior loss: the matching breaks ties at random
MARK = "mixture of experts"

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
    "S/2": Size(*LATENTS, {("cpu", TRAIN): 2, ("cpu", SAMPLE): 2, ("cuda", TRAIN): 64, ("cuda", SAMPLE): 64}),
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

    @property
    def group(self) -> str:
        return f"{self.which}_step"

    @property
    def settings(self) -> dict[str, int]:
        """Of the model, for create_model."""
        size = SIZES[self.model]
        return {"input_size": size.latent, "in_channels": size.channels, "num_classes": size.classes}

    @property
    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, DTYPES[self.device])
        return torch.autocast(self.device, dtype=dtype, enabled=dtype != torch.float32)

    def __str__(self) -> str:
        mode = "" if self.mode == EAGER else f" {self.mode}"
        return f"{self.model} B={self.batch}{mode}"


def settings_of(which: str, device: str, quick: bool = False) -> list[Setting]:
    """What is measured on a device."""
    models = [name for name, size in SIZES.items() if (device, which) in size.batch]
    modes = MODES if device == "cuda" and not quick else [EAGER]
    return [
        Setting(which, model, device, SIZES[model].batch[device, which], mode)
        for model in models[: 1 if quick else None]
        for mode in modes
    ]


class Contender(NamedTuple):
    """``create``: as switch_dit's create_model. ``parts``: the methods that are its mixture of experts, with
    their owners. ``rename``: its parameters' names to SwitchDiT's.
    """

    name: str
    create: Callable[..., nn.Module]
    parts: Callable[[Any], list[tuple[Any, str]]]
    routing: str = "switch"
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


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

    def of_ours(model: SwitchDiT) -> list[tuple[Any, str]]:
        layers = [(block.moe, "forward") for block in model.blocks]
        prior = [(model.prior, "match"), (model.prior, "loss")]
        return [(model, "route"), (model, "routing_table"), *prior, *layers]

    def of_structure(model: OfficialStructure) -> list[tuple[Any, str]]:
        return [(model, name) for name in ("embed_timesteps", "mixture", "match", "prior_loss")]

    def of_official(model: OfficialModel) -> list[tuple[Any, str]]:
        code = model.model
        return [(part, "forward") for part in (code.t_embedder, code.prior, *code.routers)]

    found = [
        Contender(OURS, with_random_weights, of_ours),
        Contender(DENSE, with_random_weights, lambda model: [], "none"),
    ]
    if mode == EAGER:
        structure = lambda *a, **k: OfficialStructure.of(with_random_weights(*a, **k))  # noqa: E731
        found.append(Contender(STRUCTURE, structure, of_structure))
        if peer_path(OFFICIAL):
            official = lambda *a, **k: OfficialModel(with_random_weights(*a, **k))  # noqa: E731
            found.append(Contender(OFFICIAL, official, of_official, rename=switch_dit_names))
    return found


def train_step(setting: Setting, contender: Contender) -> tuple[nn.Module, Step]:
    """The model of a Trainer, and its next step."""
    size = SIZES[setting.model]
    count = max(4 * setting.batch, size.classes)
    images = torch.randn(count, size.channels, size.latent, size.latent)
    labels = torch.arange(count) % size.classes
    config = TrainConfig(
        model=setting.model, batch_size=setting.batch, routing=contender.routing, lr=1e-4,
        device=setting.device, precision=DTYPES[setting.device], **MODES[setting.mode],
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
    t = torch.full((2 * setting.batch,), 500, device=setting.device)
    guided = torch.compile(model.forward_with_cfg) if setting.mode == "compiled" else model.forward_with_cfg

    @torch.no_grad()
    def step() -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, size.classes)])
        with setting.autocast:
            return guided(torch.cat([x, x]), t, both, GUIDANCE)[: setting.batch]

    if setting.mode != "graphed":
        return model, step
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return model, graph.replay


def results(
    model: nn.Module, setting: Setting, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
) -> dict[str, Tensor]:
    """What two images give: the output, with all gradients and the prior loss in training."""
    generator = torch.Generator().manual_seed(1)
    size, dtype = SIZES[setting.model], next(model.parameters()).dtype
    shape = (2, size.channels, size.latent, size.latent)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    x, grad = x.to(setting.device, dtype), torch.cat([grad, -0.5 * grad], dim=1).to(setting.device, dtype)
    y = torch.tensor([0, size.classes], device=setting.device)
    model.eval()
    if setting.which == SAMPLE:
        t = torch.full((2,), 500, device=setting.device)
        with torch.no_grad():
            return {"output": model.forward_with_cfg(x, t, y, GUIDANCE)}
    t = torch.tensor([120, 950], device=setting.device)
    out = model(x, t, y)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(out, list(trained.values()), grad)
    found = {"output": out.detach(), **rename(dict(zip(trained, gradients, strict=True)))}
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
                self.checks[name] = compare(results(model, setting, contender.rename), exact[routing])
                model.train(setting.which == TRAIN)
                if self.checks[name]["failure"] is None:
                    for _ in range(1 if setting.mode == EAGER else WARM_UP):
                        step()
                    wait(setting.device)
                    self.models[name], self.steps[name] = model, step
            except Exception as error:  # one contender that fails must not end the others
                self.checks[name] = {"error": None, "allowed": ALLOWED, "failure": describe(error)}
        n, dtype = PRODUCT_SIZE[setting.device], getattr(torch, DTYPES[setting.device])
        a, b = (torch.randn(n, n, device=setting.device).to(dtype) for _ in range(2))
        self.steps[PRODUCT] = lambda: a @ b

    def rows(self, samples: dict[str, list[float]]) -> list[Row]:
        """A row for each contender, from the seconds of its turns; PRODUCT's are among them."""
        return [self._row(contender, samples) for contender in self.contenders]

    def _row(self, contender: Contender, samples: dict[str, list[float]]) -> Row:
        setting, name = self.setting, contender.name
        hidden_size, depth, _, patch = PRESETS[setting.model]
        tokens = (SIZES[setting.model].latent // patch) ** 2
        flops = useful_flops(setting, contender.routing)
        times = samples.get(name, [])
        seconds = statistics.median(times) if times else None
        share = None
        if times and PRODUCT in samples:
            rate = 2 * PRODUCT_SIZE[setting.device] ** 3 / statistics.median(samples[PRODUCT])
            share = flops / seconds / rate
        notes = [setting.mode, getattr(self.models.get(name), "note", "")]
        return {
            "group": setting.group, "case": str(setting), "note": ", ".join(filter(None, notes)),
            "shape": {"B": setting.batch, "T": tokens, "D": hidden_size, "L": depth},
            "dtype": DTYPES[setting.device], "device": setting.device, "pass": setting.which,
            "contender": name, "ours": name == OURS, "model": setting.model, "batch": setting.batch,
            "microseconds": round(1e6 * seconds, 3) if times else None,
            "samples": [round(1e6 * time, 3) for time in times], **self.checks[name], "flops": flops,
            "images_per_second": setting.batch / seconds if times else None, "mfu": share,
            **(self._counts(contender) if times else dict.fromkeys(COUNTS)),
        }  # fmt: skip

    def _counts(self, contender: Contender) -> dict[str, Any]:
        setting, step = self.setting, self.steps[contender.name]
        found: dict[str, Any] = dict.fromkeys(COUNTS)
        if setting.mode != "graphed":  # a graph allocates nothing when it is replayed
            found["peak_bytes"] = counts.peak_bytes(step, setting.device)
        if setting.device == "cuda":
            found["launches"] = counts.launches(step)
        if setting.mode == EAGER:  # a compiled or captured step does not pass through torch's dispatcher
            found["operators"], found["host_waits"] = len(counts.operators(step)), counts.host_waits(step)
            found["moe_share"] = moe_share(step, contender.parts(self.models[contender.name]), setting.device)
        return found


COUNTS = ("peak_bytes", "operators", "host_waits", "launches", "moe_share")


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


def moe_share(step: Step, parts: list[tuple[Any, str]], device: str) -> float | None:
    """The share of a step's time, as torch.profiler sees it, in the methods ``parts`` and in their backward.

    Time is that of the CPU, or of the kernels on a GPU. It holds the profiler's own cost, which many small
    operators pay most. The optimizer's work on the experts is not counted, nor are the products with
    ``1 + m`` that the official structure runs outside its mixture. None without parts.
    """
    if not parts:
        return None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with marked(parts), profile(activities=activities) as run, record_function("step"):
        step()
        wait(device)
    events = [event for event in run.events() if event.device_type == DeviceType.CPU]
    time = "device_time_total" if device == "cuda" else "cpu_time_total"
    whole = sum(getattr(event, time) for event in events if event.cpu_parent is None)
    return sum(getattr(event, time) for event in of_mixture(events)) / whole


def of_mixture(events: list[Any]) -> list[Any]:
    """The calls of marked methods in a profile, and the nodes of their backward: those made by an operator
    (the last one with the node's sequence number) inside such a call.
    """
    made: dict[int, Any] = {}  # the last operator of the forward with each sequence number
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not _inside(event, _is_backward):
            made[event.sequence_nr] = event
    numbers = {number for number, event in made.items() if _inside(event, _is_marked)}
    backward = [event for event in events if _is_backward(event) and event.sequence_nr in numbers]
    return [event for event in events if _is_marked(event)] + backward


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _is_marked(event: Any) -> bool:
    return event.name == MARK


def _inside(event: Any, matches: Callable[[Any], bool]) -> bool:
    """Whether an event or one around it matches."""
    while event is not None and not matches(event):
        event = event.cpu_parent
    return event is not None


@contextlib.contextmanager
def marked(parts: list[tuple[Any, str]]) -> Iterator[None]:
    """The methods ``parts`` show in a profile as MARK."""

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with record_function(MARK):
                return method(*args, **options)

        return call

    for owner, name in parts:
        setattr(owner, name, mark(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in parts:
            delattr(owner, name)


def main(argv: list[str] | None = None) -> None:
    from benchmarks.report import ratio_tables

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SIZES), help="default: all of the device")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the turns of one model, at least 5")
    parser.add_argument("--peer-path", action="append", default=[], metavar="official=DIR")
    parser.add_argument("--output", type=Path, help="folder for steps_<device>.json")
    options = parser.parse_args(argv)
    try:
        for text in options.peer_path:
            parse_peer_path(text)
    except ValueError as error:
        parser.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for setting in settings_of(TRAIN, device) + settings_of(SAMPLE, device):
        if setting.model in (options.models or SIZES):
            prepared = Prepared(setting)
            rows += prepared.rows(Turns(prepared.steps, options.seconds, device=device).run())
    report = {"format": 1, **describe_machine(), "quick": False, "peers": peer_states(), "rows": rows}
    print(ratio_tables(report))
    if options.output:
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"steps_{name.lower().replace(' ', '_')}.json"
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
