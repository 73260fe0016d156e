"""The mixtures of the family by name: what ``routing`` of a SwitchDiT may be beside switch, dtr and none.

Each is a DiT whose feed-forward layers, or some of them, are mixtures. The options of a system are those of
its entry in :data:`SYSTEMS`, with their defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switch_dit.layers import Block, Mlp
from switch_dit.mode import ModeBlock
from switch_moe import DenseToSparseMoE, DiffMoE, FallingCapacityMoE, NoiseMoE, TokenMoE
from switch_moe.balance import add_gradient_of
from switch_moe.ops._checks import check_choice, check_integers, check_numbers

ROUTER_INPUTS = ("modulated", "normed", "stream")


class Shape(NamedTuple):
    """What a system is told of the model, and of the block that it makes."""

    hidden_size: int
    num_heads: int
    mlp_ratio: float
    num_experts: int
    top_k: int
    backend: str
    index: int  # of the block
    depth: int  # blocks

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layer, or of an expert."""
        return int(self.hidden_size * self.mlp_ratio)


class System(NamedTuple):
    """A mixture of the family."""

    source: str
    options: dict[str, Any]
    make_block: Callable[[Shape, dict[str, Any]], nn.Module]
    """The block of a shape, with these options."""


class Mixture(nn.Module):
    """The feed-forward layer of a block as a mixture, with what its router sees and what its losses weigh.

    Args:
        moe: what has the experts and the router; its parameters are the block's ``mlp.moe.*``.
        router_input: ``modulated`` as the experts see the tokens, ``normed`` before the timestep modulates
            them, or ``stream``, the block's tokens after the attention.
        weights: of the losses that ``moe`` returns, by name; others count nothing.
        inject: whether they are added to the gradient with factor one in the place of the loss, see
            :func:`switch_moe.balance.add_gradient_of`.
    """

    def __init__(
        self, moe: TokenMoE, weights: dict[str, float], router_input: str = "modulated", inject: bool = False
    ) -> None:
        super().__init__()
        check_choice("router_input", router_input, ROUTER_INPUTS)
        self.moe, self.weights, self.router_input, self.inject = moe, weights, router_input, inject

    @property
    def draws(self) -> bool:
        """Whether a forward draws random numbers."""
        return bool(getattr(self.moe, "draws", False))

    def forward(
        self, z: Tensor, normed: Tensor, stream: Tensor, time_embedding: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Tokens ``[B, T, D]``, the weighted losses, a float32 scalar, and what :meth:`learn` takes.

        Args:
            z: modulated tokens, normed: before that, stream: before the norm. time_embedding: ``[B, D]``.
            noise: Gumbel noise ``[B, T, M]``, for a mixture that draws.
        """
        seen = {"modulated": z, "normed": normed, "stream": stream}[self.router_input]
        sees_time = self.moe.router.time_weight is not None
        time = time_embedding.expand(len(z), -1) if sees_time else None
        more: dict[str, Any] = {"observe": True} if isinstance(self.moe, DiffMoE) else {}
        if self.draws:
            more["noise"] = noise
        if not self.training and not torch.is_grad_enabled():  # a sampler wants no losses
            out = self.moe(z, router_input=seen, time_embedding=time)
            return out, z.new_zeros(()).float()
        out, losses, *observed = self.moe(
            z, router_input=seen, time_embedding=time, with_losses=True, **more
        )  # fmt: skip
        # Those that weigh nothing too: DDP waits for a gradient of every parameter, a predictor's among them.
        weighted = (weight * losses[name] for name, weight in self.weights.items())
        loss = sum(weighted, z.new_zeros(()).float())
        if self.inject:
            return (add_gradient_of(loss, out), loss.detach() * 0, *observed)
        return (out, loss, *observed)

    def learn(self, observed: Tensor) -> None:
        """What thresholds learn from a step, once, after the forward, which checkpointing may run twice."""
        assert isinstance(self.moe, DiffMoE)
        self.moe.predictor.learn(observed)


def dense_or(shape: Shape, options: dict[str, Any], make: Callable[[], nn.Module]) -> nn.Module:
    """A block of DiT, whose feed-forward is a mixture in the last of every ``every`` blocks."""
    check_integers(1, shape.depth, every=options["every"])
    is_mixture = shape.index % options["every"] == options["every"] - 1
    mlp = make() if is_mixture else Mlp(shape.hidden_size, shape.inner_size)
    return Block(shape.hidden_size, shape.num_heads, shape.mlp_ratio, None, mlp)


def _dit_moe(shape: Shape, options: dict[str, Any]) -> nn.Module:
    def make() -> Mixture:
        moe = TokenMoE(
            shape.hidden_size, shape.num_experts, shape.top_k, expert_hidden_size=shape.inner_size,
            shared_hidden_size=int(options["shared_ratio"] * shape.hidden_size),
            normalise=options["normalise"], activation=options["activation"], bias=options["bias"],
            backend=shape.backend,
        )  # fmt: skip
        weights = {"load_balance": options["load_balance"], "z": options["z_loss"]}
        return Mixture(moe, weights, inject=options["inject"])

    return dense_or(shape, options, make)


def _ec_dit(shape: Shape, options: dict[str, Any]) -> nn.Module:
    def make() -> Mixture:
        moe = TokenMoE(
            shape.hidden_size, shape.num_experts, shape.top_k, capacity=options["capacity"],
            pool=options["pool"], activation=options["activation"], bias=options["bias"],
            expert_hidden_size=shape.inner_size,
            shared_hidden_size=int(options["shared_ratio"] * shape.hidden_size), backend=shape.backend,
        )  # fmt: skip
        return Mixture(moe, {"z": options["z_loss"]}, options["router_input"])

    return dense_or(shape, options, make)


def _diffmoe(shape: Shape, options: dict[str, Any]) -> nn.Module:
    def make() -> Mixture:
        moe = DiffMoE(
            shape.hidden_size, shape.num_experts, capacity=options["capacity"], decay=options["decay"],
            activation=options["activation"], bias=options["bias"], expert_hidden_size=shape.inner_size,
            shared_hidden_size=int(options["shared_ratio"] * shape.hidden_size), backend=shape.backend,
        )  # fmt: skip
        weights = {"capacity": options["capacity_loss"], "z": options["z_loss"]}
        return Mixture(moe, weights, options["router_input"])

    return dense_or(shape, options, make)


def _mode(shape: Shape, options: dict[str, Any]) -> nn.Module:
    moe = NoiseMoE(
        shape.hidden_size, shape.num_experts, shape.top_k, sample=options["sample"],
        expert_hidden_size=shape.inner_size, backend=shape.backend,
        router_hidden_size=int(options["router_ratio"] * shape.hidden_size),
    )  # fmt: skip
    # MoDE weights the mean over the blocks, and the losses of all blocks are added.
    weights = {"load_balance": options["load_balance"] / shape.depth, "z": options["z_loss"] / shape.depth}
    return ModeBlock(shape.hidden_size, shape.num_heads, moe, weights, options["causal"])


def _evomoe(shape: Shape, options: dict[str, Any]) -> nn.Module:
    if shape.top_k != 1:
        raise ValueError(f"top_k is {shape.top_k}; it must be 1 for 'evomoe', which ends with one expert")

    def make() -> Mixture:
        names = ("decay", "highest", "lowest", "decay_steps", "switch", "threshold", "gumbel_gates",
                 "eval_fraction", "activation", "bias")  # fmt: skip
        moe = DenseToSparseMoE(
            shape.hidden_size, shape.num_experts, expert_hidden_size=shape.inner_size, backend=shape.backend,
            **{name: options[name] for name in names},
        )  # fmt: skip
        weights = {"load_balance": options["load_balance"], "z": options["z_loss"]}
        return Mixture(moe, weights, options["router_input"])

    return dense_or(shape, options, make)


def _nucleus(shape: Shape, options: dict[str, Any]) -> nn.Module:
    first, last = options["dense_first"], options["dense_last"]
    check_integers(0, shape.depth - 1, dense_first=first, dense_last=last)
    if first + last >= shape.depth:
        raise ValueError(
            f"mixture has dense_first {first} and dense_last {last}; they must leave at least one of "
            f"{shape.depth} blocks"
        )
    if not first <= shape.index < shape.depth - last:
        return Block(shape.hidden_size, shape.num_heads, shape.mlp_ratio, None)
    moe = FallingCapacityMoE(
        shape.hidden_size, shape.num_experts, capacity=options["capacity_end"],
        capacity_start=options["capacity"], stages=options["stages"], scale=options["scale"],
        score=options["score"], expert_hidden_size=int(options["expert_ratio"] * shape.hidden_size),
        backend=shape.backend,
    )  # fmt: skip
    return Block(
        shape.hidden_size, shape.num_heads, shape.mlp_ratio, None,
        Mixture(moe, {"z": options["z_loss"]}, options["router_input"]),
    )  # fmt: skip


SYSTEMS = {
    "dit_moe": System(
        "DiT-MoE, arXiv 2407.11633",
        {"shared_ratio": 2.0, "load_balance": 0.01, "z_loss": 0.0, "normalise": False, "inject": False,
         "activation": "swiglu", "bias": False, "every": 1},
        _dit_moe,
    ),
    "ec_dit": System(
        "EC-DIT, arXiv 2410.02098",
        {"capacity": 2.0, "pool": 1, "activation": "gelu", "bias": True, "shared_ratio": 0.0, "z_loss": 0.0,
         "router_input": "modulated", "every": 2},
        _ec_dit,
    ),
    "diffmoe": System(
        "DiffMoE, arXiv 2503.14487",
        {"capacity": 1.0, "decay": 0.95, "capacity_loss": 1.0, "activation": "gelu", "bias": True,
         "shared_ratio": 0.0, "z_loss": 0.0, "router_input": "modulated", "every": 2},
        _diffmoe,
    ),
    "mode": System(
        "MoDE, arXiv 2412.12953",
        {"sample": True, "router_ratio": 2.0, "load_balance": 0.01, "z_loss": 0.0, "causal": False},
        _mode,
    ),
    "evomoe": System(
        "EvoMoE, arXiv 2112.14397",
        {"decay": "exponential", "highest": 2.0, "lowest": 0.3, "decay_steps": 0, "switch": 0,
         "threshold": 0.001, "gumbel_gates": False, "eval_fraction": 0.0, "activation": "gelu", "bias": True,
         "load_balance": 0.01, "z_loss": 0.0, "router_input": "modulated", "every": 1},
        _evomoe,
    ),
    "nucleus": System(
        "Nucleus-Image, arXiv 2604.12163",
        {"capacity": 4.0, "capacity_end": 2.0, "stages": 4, "scale": 2.5, "score": "softmax",
         "expert_ratio": 0.75, "z_loss": 0.0, "router_input": "normed", "dense_first": 0, "dense_last": 0},
        _nucleus,
    ),
}  # fmt: skip
"""By the name of ``routing``. ``every``: the mixtures are in the last of every so many blocks.

``mode``: the arguments of :class:`switch_moe.NoiseMoE` and :class:`switch_dit.mode.ModeBlock`; the router is
``router_ratio`` D wide. ``evomoe``: those of :class:`switch_moe.DenseToSparseMoE`. ``nucleus``: those of
:class:`switch_moe.FallingCapacityMoE`, with ``capacity`` at the beginning of the training and
``capacity_end`` at its end; experts are ``expert_ratio`` D wide, and the first ``dense_first`` and last
``dense_last`` blocks are dense ones (3 and 1 of the original's 24 blocks, whose experts are .66 D wide).
"""


OPTIONS: dict[str, dict[str, Any]] = {
    "switch": {"load_balance": 0.0, "z_loss": 0.0},
    **{name: system.options for name, system in SYSTEMS.items()},
}
"""What ``mixture`` may hold for a routing, with the defaults. Switch-DiT has none of these losses; they can
be added to its diffusion prior."""


def options_of(routing: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """All options of a routing, those given and the defaults.

    ``ValueError`` or ``TypeError`` for an option that the system does not have, or of another type.
    """
    defaults, given = OPTIONS.get(routing, {}), dict(given or {})
    for name, value in given.items():
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise ValueError(f"mixture holds {name!r}; the options of {routing!r} are {known}")
        wanted = type(defaults[name])
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            given[name] = float(value)
        elif type(value) is not wanted:
            raise TypeError(f"mixture's {name} is {value!r}; it must be of type {wanted.__name__}")
        if wanted is float:
            check_numbers(**{f"mixture's {name}": given[name]})
    return {**defaults, **given}


def parsed_options(routing: str, texts: tuple[str, ...]) -> dict[str, Any]:
    """Options written as ``NAME=VALUE``, those alone; errors as in :func:`options_of`."""
    of_type = {bool: _as_flag, int: int, float: float, str: str}
    given: dict[str, Any] = {}
    known = OPTIONS.get(routing, {})
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"mixture holds {text!r}; it must be NAME=VALUE")
        try:
            given[name] = of_type[type(known.get(name, ""))](value)
        except ValueError:
            wanted = type(known[name]).__name__
            raise ValueError(f"mixture holds {text!r}; its value must be of type {wanted}") from None
    options = options_of(routing, given)
    return {name: options[name] for name in given}


def _as_flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
