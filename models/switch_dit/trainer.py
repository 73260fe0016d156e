"""Training: the model, its moving averages, its optimizer and its data, and one step of them."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from switch_dit.averages import MovingAverage, PowerAverage
from switch_dit.checkpoint import load_checkpoint, load_settings, save_checkpoint
from switch_dit.data import Data, batches, loaded
from switch_dit.data.memory import mirrored
from switch_dit.devices import peak_flops, resolve_device, resolve_precision
from switch_dit.distributed import Spread, World, local, whole
from switch_dit.graphs import GraphedStep
from switch_dit.model import PRESETS, create_model
from switch_dit.optimisation import Optimisation, create_optimizer, learning_rate
from switch_dit.randomness import Stream, normal
from switch_dit.resume import Checkpoints
from switch_dit.sampling import sample
from switch_dit.settings import TrainConfig, objective_of, process_of, sampler_of
from switch_dit.systems import options_of, parsed_options
from switch_dit.timesteps import Curriculum, CurriculumState
from switch_dit.weightings import UncertaintyWeighting
from switch_moe.gumbel import gumbel_of

TERMS = ("loss", "mse", "vb", "prior")
CARRIED = ("mlp_ratio", "frequency_shift", "time_scale", "time_offset")  # settings of a model, of no run
SETTINGS_OF = {
    **dict.fromkeys(("hidden_size", "depth", "num_heads", "patch_size"), "model"),
    **{name: name for name in ("routing", "num_experts", "top_k", "mixture", "schedule", "learn_sigma")},
    "name": "objective", "class_dropout_prob": "label_dropout", "in_channels": "data",
    "input_size": "data and image_size", "num_classes": "data and conditional",
}  # fmt: skip


class Draws(NamedTuple):
    """What is random about the samples of a step."""

    noise: Tensor  # [B, C, H, W]
    t: Tensor  # timesteps, int64 [B]
    weight: Tensor | None  # of the losses [B], None for ones
    drop: Tensor  # whose labels are left out, bool [B]
    flip: Tensor  # which images are mirrored, bool [B]


class Trainer:
    """Owns the model, its moving average, the optimizer and the data of one run.

    Args:
        create: makes the model, from what :func:`switch_dit.model.create_model` takes.
        world: the processes of the run; each trains on its part of every batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: Data,
        create: Callable[..., torch.nn.Module] = create_model,
        world: World | None = None,
        carried: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.images, self.world = config, images, world or World()
        self.device = resolve_device(config.device)
        self.dtype = resolve_precision(config.precision, self.device)
        self._check_processes()
        torch.manual_seed(config.seed)
        channels, height = images.channels, images.size
        patch_size = PRESETS[config.model].patch_size
        if height % patch_size:
            raise ValueError(
                f"model is {config.model!r}; its patch size must divide the images' {height} pixels"
            )
        self.objective = objective_of(config)
        self.sampler = sampler_of(config, self.objective)
        self.create = functools.partial(
            create,
            config.model,
            input_size=height,
            in_channels=channels,
            num_classes=images.num_classes if config.conditional else 0,
            class_dropout_prob=config.label_dropout,
            learn_sigma=config.learn_sigma and config.objective == "eps",
            routing=config.routing,
            num_experts=config.num_experts,
            top_k=config.top_k,
            mixture=parsed_options(config.routing, config.mixture) or None,
        )
        state = None
        if config.start_from and carried is None:
            carried, state = self._start()
        self.carried = carried
        self.create = functools.partial(self.create, **(carried or {}))
        self.model = self.create().to(self.device)
        if state is not None:
            self.model.load_state_dict(state)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        if config.checkpoint_activations:
            # A block is given its random numbers; diffusers' own function would keep the generators' states.
            recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            self.model.enable_gradient_checkpointing(recompute)
        if config.compile and self.world.size > 1:
            for block in self.model.blocks:
                block.compile()
        self.spread = Spread(self.model, self.world, self.dtype, config.fsdp)
        if config.fsdp:
            Spread(self.ema, self.world, torch.float32, True)
        self.forward = self.spread.forward
        if config.compile and self.world.size == 1:
            self.forward = torch.compile(self.forward)
        self.uncertainty = None
        if config.weighting == "uw":
            self.uncertainty = UncertaintyWeighting(self.objective.num_timesteps).to(self.device)
        # Device scalars: a captured step reads what each replay finds in them.
        self.rate = torch.tensor(config.lr, device=self.device)
        optimizer = create_optimizer(
            self.model.parameters(),
            self.rate,
            weight_decay=config.weight_decay,
            uncertainty=self.uncertainty,
        )
        self.optimisation = Optimisation(optimizer, self.dtype, config.max_grad_norm)
        self.averaged = {name: local(p.detach()) for name, p in self.model.named_parameters()}
        of_copy = {name: local(p.detach()) for name, p in self.ema.named_parameters()}
        self.average = MovingAverage(self.averaged, config.ema_decay, of_copy)
        # What a mixture learns without gradients, its thresholds: the average has the newest.
        parameters, of_copy = dict(self.model.named_parameters()), dict(self.ema.named_buffers())
        self.learned_buffers = [
            (name, value, of_copy[name])
            for name, value in self.model.state_dict(keep_vars=True).items()
            if name not in parameters
        ]
        self.powers = [PowerAverage(self.averaged, width) for width in config.power_averages]
        self.curriculum = CurriculumState() if isinstance(self.sampler, Curriculum) else None
        self.lowest = torch.zeros((), dtype=torch.int64, device=self.device)  # timestep of the curriculum
        self._set_lowest()
        self.advance = GraphedStep(self._advance) if config.cuda_graph else self._advance
        # Bytes on the device, where a batch is scaled: the whole set, or the present batch of a set on disk.
        self.own = config.batch_size // self.world.size
        held = images.in_memory
        if held is None:
            one, label = images.batch(torch.zeros(1, dtype=torch.int64), torch.full((1,), config.flip))
            held = one.new_empty(self.own, *one.shape[1:]), label.new_empty(self.own)
        self.train_images, self.train_labels = (tensor.to(self.device) for tensor in held)
        # Every random number is a function of the seed, the step and the sample's position in the batch.
        self.of_samples, self.of_ties = Stream(config.seed, 0), Stream(config.seed, 1)
        self.of_latents, self.of_experts = Stream(config.seed, 2), Stream(config.seed, 3)
        self.flops = self.flops_per_image() if self.device.type == "cuda" else 0
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)  # of the step
        self.everyone = torch.arange(config.batch_size, device=self.device)  # in the batch of all processes
        first = self.world.rank * self.own
        self.positions = self.everyone[first : first + self.own]
        self.of_each_tie = torch.arange(2, device=self.device)

    def _start(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Of ``start_from``, the settings of the model that a run does not have, and the weights.

        ``ValueError`` where they are of another model or another objective.
        """
        folder = self.config.start_from
        model, _ = load_checkpoint(folder)
        process = load_settings(folder)["objective"]
        ours = {**PRESETS[self.config.model]._asdict(), **self.create.keywords}
        theirs = {name: model.settings[name] for name in ours}
        carried = {name: model.settings[name] for name in CARRIED}
        if self.config.mixture:
            for settings in (ours, theirs):
                settings["mixture"] = options_of(settings["routing"], settings["mixture"])
        else:  # the options of the start, whatever they are
            carried["mixture"] = theirs["mixture"]
            del ours["mixture"]
        own_process = process_of(self.config)
        for name in ("name", "schedule", "num_timesteps"):
            ours[name] = own_process[name]
            theirs[name] = process.get(name, ours[name])
        for name, value in ours.items():
            if theirs[name] != value:
                how = f"by the setting {SETTINGS_OF[name]}" if name in SETTINGS_OF else "as every run has it"
                raise ValueError(
                    f"start_from is {folder}; its {name} is {theirs[name]!r} and that of this run {value!r}, "
                    f"{how}"
                )
        return carried, model.state_dict()

    def _check_processes(self) -> None:
        config, size = self.config, self.world.size
        if config.batch_size % (size * config.accumulate):
            raise ValueError(
                f"batch_size is {config.batch_size}; it must be a multiple of {size * config.accumulate}, "
                f"for {size} processes of torchrun and accumulate {config.accumulate}"
            )
        if config.fsdp and size == 1:
            raise ValueError("fsdp is True; it needs several processes, as torchrun starts them")
        if config.fsdp and config.power_averages:
            raise ValueError(
                f"power_averages is {config.power_averages}; they need whole weights, leave fsdp out"
            )
        if config.fsdp and config.weighting == "uw" and self.dtype == torch.float16:
            raise ValueError(
                "weighting is 'uw'; with fsdp and float16 torch cannot scale its weights, take bfloat16"
            )
        if config.cuda_graph and size > 1:
            raise ValueError(
                f"cuda_graph is True; the messages of {size} processes are not captured, leave it out"
            )

    def draw(self, number: Tensor | int, shape: tuple[int, ...], positions: Tensor | None = None) -> Draws:
        """What is random about samples of a step, by default this process's, with noise [B, *shape]."""
        positions = self.positions if positions is None else positions
        count = math.prod(shape)
        uniform = self.of_samples.uniform(number, positions, 4 + 2 * -(-count // 2))
        noise = normal(uniform[:, 4:])[:, :count].view(-1, *shape)
        # Timesteps are drawn for the batch of all processes: samplers may pair samples of it.
        alone = len(positions) == len(self.everyone)
        of_time = uniform if alone else self.of_samples.uniform(number, self.everyone, 1)
        t, weight = self.sampler.draw(of_time[:, 0], self.lowest if self.curriculum else None)
        if not alone:
            t, weight = t[positions], None if weight is None else weight[positions]
        drop = uniform[:, 1] < self.config.label_dropout
        return Draws(noise, t, weight, drop, self._flips(uniform))

    def _flips(self, uniform: Tensor) -> Tensor:
        return (uniform[:, 2] < 0.5) & self.config.flip

    def flips(self, number: int) -> Tensor:
        """The mirrored images of a step as :meth:`draw` has them, on the CPU, for a set on disk."""
        return self._flips(self.of_samples.uniform(number, self.positions.cpu(), 4))

    def loss_terms(
        self, x_start: Tensor, y: Tensor | None, match: bool = True, positions: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Means of loss, mse, vb (zero without learned variance) and prior, at the step's timesteps."""
        noise, t, weight, drop, _ = self.draw(self.number, x_start.shape[1:], positions)
        x_t = self.objective.q_sample(x_start, t, noise)
        time = self.objective.model_time(t)
        told: dict[str, Tensor] = {}
        if y is not None and self.config.label_dropout > 0:
            told["drop"] = drop
        if self.config.routing == "switch" and match:
            slots = len(self.model.assignment)
            told["ties"] = self.of_ties.uniform(self.number, self.of_each_tie, slots)
        if self.model.draws:
            shape = self.model.noise_shape(len(x_t))
            where = self.positions if positions is None else positions
            uniform = self.of_experts.uniform(self.number, where, math.prod(shape[1:]))
            told["expert_noise"] = gumbel_of(uniform).view(shape)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            out, prior = self.forward(x_t, time, y, with_prior=True, match=match, **told)
        losses = self.objective.losses(out, x_start, x_t, t, noise, weight)
        terms = {name: value.mean() for name, value in losses.items()}
        mse, vb = terms["mse"], terms.get("vb", torch.zeros_like(prior))
        of_noise = mse + vb
        if self.uncertainty is not None:
            of_noise = self.uncertainty(sum(losses.values()), time).mean()
        return {"loss": of_noise + self.config.prior_weight * prior, "mse": mse, "vb": vb, "prior": prior}

    def rate_at(self, number: int) -> float:
        """The learning rate of a step."""
        config = self.config
        return learning_rate(
            number, lr=config.lr, steps=config.steps, warmup=config.warmup, decay=config.lr_decay
        )

    def step(
        self, number: int, chosen: Tensor, batch: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One optimizer step on this process's training images ``chosen``; its loss terms, detached.

        ``batch`` are these images and their labels, where they were read ahead from a set on disk.

        The moving average's decay starts low, so that the first weights are soon forgotten. Nothing here
        waits for a GPU: the indices are copied from pinned memory.
        """
        self.number.fill_(number)
        changed = [model.at_step(number, self.config.steps) for model in (self.model, self.ema)]
        if any(changed) and isinstance(self.advance, GraphedStep):
            self.advance.forget()
        self.rate.fill_(self.rate_at(number))
        for average in (self.average, *self.powers):
            average.prepare(number)
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
        parts = self.config.accumulate
        found: list[dict[str, Tensor]] = []
        for one, positions in zip(chosen.chunk(parts), self.positions.chunk(parts), strict=True):
            first, last = not found, len(found) == parts - 1
            with self.spread.adding(last):
                terms = self.loss_terms(*self._images(one, positions), match and first, positions)
                self.optimisation.backward(terms["loss"] if parts == 1 else terms["loss"] / parts)
            found.append({name: value.detach() for name, value in terms.items()})
        if self.uncertainty is not None:
            self.spread.mean_gradient(self.uncertainty.loss_scale)
        self.optimisation.step()
        for average in (self.average, *self.powers):
            average.advance(self.averaged)
        self._copy_buffers()
        if parts == 1:
            return found[0]
        return {name: torch.stack([terms[name] for terms in found]).mean(0) for name in TERMS}

    @torch.no_grad()
    def _copy_buffers(self) -> None:
        for _, value, of_average in self.learned_buffers:
            of_average.copy_(value)

    def _images(self, chosen: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images at positions of the batch as the model learns them, and their labels."""
        x = self.train_images[chosen]
        if self.config.flip and self.images.in_memory is not None:
            x = mirrored(x, self._flips(self.of_samples.uniform(self.number, positions, 4)))
        noise = None
        if self.images.needs_noise:
            count = self.images.channels * x.shape[2] * x.shape[3]
            uniform = self.of_latents.uniform(self.number, positions, 2 * -(-count // 2))
            noise = normal(uniform)[:, :count].view(len(x), -1, *x.shape[2:])
        y = self.train_labels[chosen] if self.config.conditional else None
        return self.images.scale(x, noise), y

    def tensors(self) -> dict[str, Tensor]:
        """All that a run carries from step to step, by name: weights, averages, optimizer, assignment."""
        trained = {f"model.{name}": p for name, p in self.model.named_parameters()}
        if self.uncertainty is not None:
            trained["loss_scale"] = self.uncertainty.loss_scale
        found = {name: p.detach() for name, p in trained.items()}
        found |= {f"ema.{name}": p.detach() for name, p in self.ema.named_parameters()}
        for power in self.powers:
            found |= {f"power{power.sigma_rel}.{name}": p for name, p in power.parameters.items()}
        found |= {f"buffer.{name}": b for name, b in self.model.named_buffers() if name == "assignment"}
        found |= {f"buffer.{name}": buffer for name, buffer, _ in self.learned_buffers}
        for name, parameter in trained.items():
            if not parameter.requires_grad:
                continue
            state = self.optimisation.optimizer.state[parameter]
            if not state:  # as AdamW makes it at its first step
                state["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(parameter, requires_grad=False) for _ in range(2)
                )
            of_parameter = name.removeprefix("model.")
            found |= {f"optimizer.{key}.{of_parameter}": value for key, value in state.items()}
        return found

    def numbers(self) -> dict[str, Any]:
        """What a run carries beside its tensors, for JSON."""
        curriculum = self.curriculum.to_json() if self.curriculum else None
        return {"scaler": self.optimisation.state_dict(), "curriculum": curriculum}

    def restore(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """Goes back to the newest checkpoint that is whole; its state, or None where there is none."""
        state = checkpoints.latest()
        if state is not None:
            checkpoints.load(state["step"], self.tensors())
            self._copy_buffers()
            self.optimisation.load_state_dict(state["scaler"])
            if self.curriculum:
                self.curriculum = CurriculumState.from_json(state["curriculum"])
                self._set_lowest()
        return state

    def learned(self, mse: float) -> None:
        """Tells the curriculum the mse of a logged line."""
        if self.curriculum:
            self.curriculum = self.sampler.after(self.curriculum, mse)
            self._set_lowest()

    def _set_lowest(self) -> None:
        if self.curriculum:
            self.lowest.fill_(self.sampler.lowest_timestep(self.curriculum))

    def batches(self, start: int = 0) -> Iterator[tuple[Any, ...]]:
        """What :meth:`step` takes, from a step on: indices, and the batch itself where it is read ahead from
        disk.
        """
        config = self.config
        order = self.order(start)
        if self.images.in_memory is not None:
            yield from zip(order)
            return
        ahead, order = itertools.tee(order)
        plan = ((chosen, self.flips(number)) for number, chosen in enumerate(ahead, start))
        pin = self.device.type == "cuda"
        yield from zip(order, loaded(self.images, plan, config.workers, pin), strict=True)

    def order(self, start: int) -> Iterator[Tensor]:
        """The images of this process at each step, from a step on."""
        config, world = self.config, self.world
        return batches(len(self.images), config.batch_size, config.seed, start, world.rank, world.size)

    def flops_per_image(self) -> int:
        """Floating-point operations of a step's products for an image; the backward counts twice."""
        with torch.device("meta"):
            model, images = self.create(), self.images
            count = model.pool  # experts that choose among several images need as many
            x = torch.zeros(count, images.channels, images.size, images.size)
            t = torch.zeros(count, dtype=torch.int64)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(x, t, t if self.config.conditional else None)
        return 3 * counter.get_total_flops() // count

    def of_gpu(self, images_per_second: float) -> dict[str, float]:
        """For a line of stats.jsonl: the most memory so far, in GiB, and mfu, the share of the peak."""
        if self.device.type != "cuda":
            return {}
        found = {"memory_gib": torch.cuda.max_memory_allocated(self.device) / 2**30}
        peak = peak_flops(self.device, self.dtype)
        if peak is not None:
            found["mfu"] = images_per_second * self.flops / (peak * self.world.size)
        return found

    def generate(self, count: int, model: torch.nn.Module | None = None) -> tuple[Tensor, Tensor | None]:
        """Samples of a model, by default of the moving average, on the CPU, the classes in turn, and their
        labels.
        """
        conditional, classes = self.config.conditional, self.images.num_classes
        labels = torch.arange(count, device="cpu") % classes if conditional else None
        images = sample(
            self.ema if model is None else model,
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
        """The weights alone, to sample from; ``FloatingPointError`` where the weights are not finite.

        All processes call it, and the first one writes. From then on they have the whole moving average.
        """
        model, self.ema = (whole(module, self.create) for module in (self.model, self.ema))
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise FloatingPointError(f"{name} is not finite after training; nothing is saved")
        settings = {"model": model.settings, "objective": process_of(self.config)}
        self.world.on_first(lambda: save_checkpoint(folder / "weights", model, self.ema, settings))
