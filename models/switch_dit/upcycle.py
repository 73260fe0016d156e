"""Weights of other codes as SwitchDiT, and dense ones as a mixture that computes the same at first.

``dit``: facebookresearch/DiT. ``sit``: willisma/SiT with the linear path. ``diffusers_dit``: the
DiTTransformer2DModel of diffusers. Mixtures are in :mod:`switch_dit.official`. A model that was loaded
follows the conventions of this package, so that its training loop, its samplers and its pipeline take it:
time grows from data to noise, within [0, N).

Sparse upcycling: Komatsuzaki et al., arXiv 2212.05055. The experts of Switch-DiT multiply the tokens by
``1 + m(x)``; with all of them zero a block is the dense one, whatever its router says. Those of DiT-MoE stand
in the place of a block's MLP; all of them are copies of it, with gates that sum to one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from switch_dit.checkpoint import load_weights
from switch_dit.convert import plain_tensors
from switch_dit.model import PRESETS, SwitchDiT
from switch_dit.official import FLOWS, NAMES, from_official_names, ratio
from switch_dit.systems import Mixture, options_of
from switch_moe.ops._checks import FLOATS, check_choice, check_integers, check_numbers

SYSTEMS = ("dit", "sit", "diffusers_dit", *NAMES)
FREQUENCIES = ("dit", "diffusers")

# diffusers' names of the layers of a block, of its embedders and of the model, with the names here.
_OF_BLOCK = {
    "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}  # fmt: skip
_OF_EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
_OF_MODEL = {
    "pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}  # fmt: skip
_TABLE = "norm1.emb.class_embedder.embedding_table.weight"


def from_official(
    system: str,
    state_dict: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    input_size: int | None = None,
    class_dropout_prob: float = 0.1,
    frequencies: str | None = None,
    num_timesteps: int = 1000,
    process: str | None = None,
    top_k: int | None = None,
    capacity: float | None = None,
) -> SwitchDiT:
    """A SwitchDiT in evaluation mode with weights of another code: dense, or the mixture that ``system`` is.

    Args:
        system: ``dit``, ``sit`` or ``diffusers_dit``, which are dense, or ``dit_moe``, ``ec_dit`` or
            ``diffmoe``. The model of ``dit`` and ``diffusers_dit`` predicts the noise at timesteps in [0, N).
            That of ``sit`` is one of rectified flow (:class:`switch_dit.objectives.FlowObjective`): where SiT
            has a time s in [0, 1], it takes ``N (1 - s)`` and returns the opposite velocity, noise minus
            data, without SiT's unused channels.
        state_dict: names to tensors, or a training checkpoint, of which the moving average ``ema`` is taken.
        num_heads: the weights do not tell; None takes that of the published size.
        input_size: height and width of a latent. The table of positions tells it, but diffusers' weights have
            none.
        class_dropout_prob: the last row of the label table is the null label, unless this is 0.
        frequencies: ``dit`` or ``diffusers``, which divide the exponents of the timestep frequencies by 128
            and 127. None takes what the code of ``system`` has. A checkpoint of DiT that was converted to
            diffusers was trained with ``dit``; diffusers itself runs it with its own.
        num_timesteps: N.
        process: what a mixture was trained for, ``flow`` (the default) or ``eps``. Flows of ``ec_dit`` and
            ``diffmoe`` are turned round as that of ``sit``, and ``dit_moe`` has its time from data to noise
            already; they take N times that time. With ``eps`` a model takes its timesteps as they are and
            keeps all channels, as DiT-MoE's does that was trained as DiT.
        top_k: experts of a token of ``dit_moe``, 2 by default. capacity: of ``ec_dit`` (2 by default) and
            ``diffmoe`` (1). The weights do not tell them.

    diffusers has the eps 1e-5 in the second norm of a block, this model 1e-6.

    Raises:
        ValueError, TypeError: an argument does not fit. Keys that are missing or unknown are named.
    """
    check_choice("system", system, SYSTEMS)
    if frequencies is None:
        frequencies = "diffusers" if system == "diffusers_dit" else "dit"
    check_choice("frequencies", frequencies, FREQUENCIES)
    check_numbers(0, 1, "between 0 and 1", class_dropout_prob=class_dropout_prob)
    for name, given, systems in (
        ("process", process, tuple(NAMES)), ("top_k", top_k, ("dit_moe",)),
        ("capacity", capacity, ("ec_dit", "diffmoe")),
    ):  # fmt: skip
        if given is not None and system not in systems:
            raise ValueError(f"{name} is {given}; only {' and '.join(systems)} have one, leave it out")
    check_choice("process", process or "flow", ("flow", "eps"))
    state = _tensors(state_dict)
    for pattern, systems, remedy in _ELSEWHERE:
        name = next((name for name in state if re.match(pattern, name)), None)
        if name is not None and system not in systems:
            raise ValueError(f"system is {system!r} and state_dict holds {name!r}; {remedy}")
    of_mixture: dict[str, Any] = {"routing": "none"}
    if system == "diffusers_dit":
        state = _from_diffusers(state)
    elif system in NAMES:
        state, of_mixture = from_official_names(system, state, top_k, capacity)
    elif any(name.startswith("transformer_blocks.") for name in state):
        raise ValueError(
            f"system is {system!r}; state_dict holds transformer_blocks.*, which are 'diffusers_dit'"
        )
    settings = _sizes(state, class_dropout_prob, num_heads, of_mixture.pop("inner_size", None))
    if input_size is None and "input_size" not in settings:
        raise ValueError("input_size is None; the weights do not tell it, so it must be given")
    if input_size is not None and settings.setdefault("input_size", input_size) != input_size:
        raise ValueError(f"input_size is {input_size}; the positions are for {settings['input_size']}")
    settings |= {"num_timesteps": num_timesteps, "frequency_shift": int(frequencies == "diffusers")}
    if system in FLOWS and process != "eps":
        state = _one_velocity(state, settings, FLOWS[system].sign)
        settings |= {"learn_sigma": False, **FLOWS[system].time(num_timesteps)}
    model = SwitchDiT(**settings, **of_mixture)
    state.setdefault("pos_embed", model.pos_embed.detach())  # diffusers computes it
    load_weights(model, state, "state_dict")
    return model.eval()


# Names that weights of other systems have, the systems that have them, and what to do.
_ELSEWHERE = (
    (r"routers\.", (), "this is Switch-DiT or DTR: convert_official_state_dict takes it"),
    (r"blocks\.\d+\.moe\.(gate|\w*experts)\.", ("dit_moe",), "this is 'dit_moe'"),
    (r"blocks\.\d+\.mlp\.(gate_weight|experts\.)", ("ec_dit", "diffmoe"), "this is 'ec_dit' or 'diffmoe'"),
    (
        r"blocks\.\d+\.(mlp\.)?moe\.(weight|bias|router)", (),
        "this is SwitchDiT already: load_checkpoint or from_pretrained takes it",
    ),
)  # fmt: skip


def upcycle(
    source: nn.Module | Mapping[str, Any],
    system: str | None = None,
    *,
    routing: str = "switch",
    num_experts: int = 3,
    top_k: int = 2,
    mixture: Mapping[str, Any] | None = None,
    backend: str = "auto",
    **settings: Any,
) -> SwitchDiT:
    """A mixture in evaluation mode whose output is that of a dense model, until it is trained.

    ``switch``: the experts are zero, so ``1 + m(x)`` is one and the output is the dense model's to the bit.
    ``dit_moe``: every expert is a copy of its block's MLP, there is no shared expert, and the gates of a
    token sum to one, so the output is the dense model's up to rounding. Routers are new, drawn from torch's
    generator.

    Args:
        source: a dense SwitchDiT; or the state_dict or the module of another code.
        system: of another code, see :func:`from_official`, as the ``settings``; None is that of diffusers
            where the names are its own. Those of DiT and SiT are the same, so they must be told apart.
        routing: ``switch`` or ``dit_moe``.
        num_experts: M.
        top_k: k.
        mixture: options of ``dit_moe`` (:data:`switch_dit.systems.SYSTEMS`), but those that keep the output.
        backend: see :func:`switch_moe.ops.expert_linear`.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    check_integers(num_experts=num_experts, top_k=top_k)
    check_choice("routing", routing, ("switch", "dit_moe"))
    options = _copying_options(routing, mixture)
    if isinstance(source, SwitchDiT):
        if source.routing != "none":
            raise ValueError(f"source has routing {source.routing!r}; it must be dense, 'none'")
        given = [*({} if system is None else {"system": system}), *settings]
        if given:
            raise ValueError(f"{given[0]} is given; a SwitchDiT has its own")
        dense = source
    else:
        if isinstance(source, nn.Module):
            settings = _told_by(source) | settings
            source = source.state_dict()
        if system is None:
            system = detect(source)
        if system in NAMES:
            raise ValueError(f"system is {system!r}, which is a mixture; it must be a dense one")
        dense = from_official(system, source, **settings)
    of_mixture = {
        "routing": routing, "num_experts": num_experts, "top_k": top_k, "mixture": options, "backend": backend
    }  # fmt: skip
    parameter = dense.x_embedder.proj.weight
    model = SwitchDiT(**{**dense.settings, **of_mixture})
    nn.Module.to(model, parameter.device, parameter.dtype)  # that of diffusers warns of every dtype
    own, state = model.state_dict(), dense.state_dict()
    for number, block in enumerate(model.blocks):
        if isinstance(block.mlp, Mixture):
            state |= _copies(state, f"blocks.{number}.mlp.", num_experts)
    model.load_state_dict(own | state)
    return model.eval()


# The experts as DiT's MLP is, and gates that leave what all of them say.
_COPYING = {"activation": "gelu", "bias": True, "normalise": True, "shared_ratio": 0.0}


def _copying_options(routing: str, mixture: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """All options of the mixture that a dense model becomes; ``ValueError`` for one that would change it."""
    options = options_of(routing, dict(_COPYING if routing == "dit_moe" else {}) | dict(mixture or {}))
    for name, wanted in _COPYING.items():
        if options.get(name, wanted) != wanted:
            raise ValueError(f"mixture's {name} is {options[name]!r}; an upcycled model has {wanted!r}")
    return options or None


def _copies(state: dict[str, Tensor], prefix: str, num_experts: int) -> dict[str, Tensor]:
    """Takes an MLP out of a state_dict and returns as many experts."""
    names = {
        "fc1.weight": "weight_in", "fc1.bias": "bias_in", "fc2.weight": "weight_out", "fc2.bias": "bias_out"
    }  # fmt: skip
    layers = {ours: state.pop(prefix + theirs).t() for theirs, ours in names.items()}
    return {f"{prefix}moe.{name}": layer.expand(num_experts, *layer.shape) for name, layer in layers.items()}


def detect(state_dict: Mapping[str, Any]) -> str:
    """The system of weights whose names tell it; ``ValueError`` for those of DiT and SiT."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"source is a {type(state_dict).__name__}; it must be a module or a state_dict")
    inside = (state_dict[name] for name in ("ema", "model") if isinstance(state_dict.get(name), Mapping))
    names = [str(name) for name in next(inside, state_dict)]
    for part, system in _TELLING.items():
        if any(part in name for name in names):
            return system
    raise ValueError("system is not given; it must be 'dit' or 'sit', whose weights have the same names")


_TELLING = {
    "transformer_blocks.": "diffusers_dit", ".mlp.capacity_predictor.": "diffmoe",
    ".mlp.gate_weight": "ec_dit", ".moe.gate.weight": "dit_moe",
}  # fmt: skip


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in float32."""
    state = plain_tensors(state_dict)
    for name, value in state.items():
        if value.dtype not in FLOATS:
            raise ValueError(f"state_dict holds {name!r} of {value.dtype}; it must be a floating type")
    return {name: value.float() for name, value in state.items()}


def _taken(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"state_dict lacks {name!r}")
    return state.pop(name)


def _from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names to DiT's. Every block there has a copy of the embedders; here there is one."""
    state, found = dict(state), {}
    depth = _depth(state, "transformer_blocks")
    if not depth:
        raise ValueError("state_dict lacks 'transformer_blocks.0.attn1.to_q.weight'")
    for kind in ("weight", "bias"):
        for theirs, ours in _OF_MODEL.items():
            found[f"{ours}.{kind}"] = _taken(state, f"{theirs}.{kind}")
    for number in range(depth):
        theirs = f"transformer_blocks.{number}."
        shared = {f"{theirs}{_TABLE}": "y_embedder.embedding_table.weight"}
        for kind in ("weight", "bias"):
            parts = [_taken(state, f"{theirs}attn1.to_{part}.{kind}") for part in "qkv"]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"state_dict holds {theirs}attn1.to_q, to_k, to_v of several shapes")
            found[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
            for name, ours in _OF_BLOCK.items():
                found[f"blocks.{number}.{ours}.{kind}"] = _taken(state, f"{theirs}{name}.{kind}")
            shared |= {f"{theirs}{name}.{kind}": f"{ours}.{kind}" for name, ours in _OF_EMBEDDERS.items()}
        for name, ours in shared.items():
            copy = _taken(state, name)
            if not torch.equal(found.setdefault(ours, copy), copy):
                raise ValueError(
                    f"state_dict holds {name!r}, which differs from block 0's; here all blocks share it"
                )
    state.pop("pos_embed.pos_embed", None)  # fixed, and computed anew
    if state:
        raise ValueError(f"state_dict holds {min(state)!r}, which diffusers' DiT does not have")
    return found


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest number of a block."""
    matches = (re.match(prefix + r"\.(\d{1,6})\.", name) for name in state)
    return max((int(match[1]) for match in matches if match), default=-1) + 1


def _sizes(
    state: dict[str, Tensor], class_dropout_prob: float, num_heads: int | None, inner_size: int | None
) -> dict[str, Any]:
    """What the shapes of DiT's weights tell of SwitchDiT's settings; ``inner_size`` is that of experts."""

    def shape(name: str, dims: int) -> torch.Size:
        if name not in state:
            raise ValueError(f"state_dict lacks {name!r}")
        if state[name].dim() != dims:
            raise ValueError(
                f"state_dict holds {name!r} of {state[name].dim()} dimensions; it must have {dims}"
            )
        return state[name].shape

    hidden_size, channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    depth = _depth(state, "blocks")
    if not depth:
        raise ValueError("state_dict lacks 'blocks.0.attn.qkv.weight'")
    rows = shape("final_layer.linear.weight", 2)[0]
    if rows not in (patch_size**2 * channels, 2 * patch_size**2 * channels):
        raise ValueError(
            f"state_dict holds 'final_layer.linear.weight' with {rows} rows; it must have "
            f"{patch_size**2 * channels}, or twice as many"
        )
    labels = shape("y_embedder.embedding_table.weight", 2)[0]
    if num_heads is None:
        known = {(preset.hidden_size, preset.depth): preset.num_heads for preset in PRESETS.values()}
        if (hidden_size, depth) not in known:
            raise ValueError(
                f"num_heads is None; hidden size {hidden_size} and {depth} blocks are no published size, so "
                "it must be given"
            )
        num_heads = known[hidden_size, depth]
    inner = shape("blocks.0.mlp.fc1.weight", 2)[0] if inner_size is None else inner_size
    found = {
        "patch_size": patch_size, "in_channels": channels, "hidden_size": hidden_size, "depth": depth,
        "num_heads": num_heads, "mlp_ratio": ratio(inner, hidden_size),
        "num_classes": labels - (class_dropout_prob > 0), "class_dropout_prob": class_dropout_prob,
        "learn_sigma": rows == 2 * patch_size**2 * channels,
    }  # fmt: skip
    if "pos_embed" in state:
        tokens = shape("pos_embed", 3)[1]
        grid = math.isqrt(tokens)
        if grid**2 != tokens:
            raise ValueError(f"state_dict holds 'pos_embed' for {tokens} tokens; they must form a square")
        found["input_size"] = grid * patch_size
    return found


def _one_velocity(state: dict[str, Tensor], settings: dict[str, Any], sign: int) -> dict[str, Tensor]:
    """A flow's last layer without channels that it does not use, and ``sign`` times its output."""
    state, patch, channels = dict(state), settings["patch_size"] ** 2, settings["in_channels"]
    for kind in ("weight", "bias"):
        name = f"final_layer.linear.{kind}"
        used = _taken(state, name).unflatten(0, (patch, -1))[:, :channels]  # rows are patch, patch, channels
        state[name] = sign * used.flatten(0, 1)
    return state


def _told_by(module: nn.Module) -> dict[str, Any]:
    """What a module of another code says of itself."""
    config = getattr(module, "config", None)
    if isinstance(config, Mapping):
        return told_by_config(config)
    heads = getattr(module, "num_heads", None)
    dropout = getattr(getattr(module, "y_embedder", None), "dropout_prob", None)
    told = {"num_heads": heads, "class_dropout_prob": dropout}
    return {name: value for name, value in told.items() if value is not None}


def told_by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of :func:`from_official` in the config of a DiTTransformer2DModel of diffusers.

    ``ValueError`` where it is one that this model does not compute.
    """
    name = config.get("_class_name", "DiTTransformer2DModel")
    if name not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise ValueError(f"the config is of {name}; it must be of DiTTransformer2DModel")
    wanted = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "attention_bias": True}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"the config has {key} {config[key]!r}; only {value!r} is computed here")
    keys = {"num_attention_heads": "num_heads", "sample_size": "input_size"}
    return {ours: config[theirs] for theirs, ours in keys.items() if theirs in config}


def schedule_of_config(config: Mapping[str, Any]) -> str:
    """The noise schedule in the config of a scheduler of diffusers: ``linear`` or ``cosine``.

    ``ValueError`` where its model does not predict the noise at 1000 such timesteps.
    """
    linear = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    shared = {"prediction_type": "epsilon", "num_train_timesteps": 1000}
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
    for key, value in (shared if cosine else shared | linear).items():
        if config.get(key, value) != value:
            raise ValueError(
                f"the scheduler's config has {key} {config[key]!r}; only {value!r} is known here"
            )
    return "cosine" if cosine else "linear"
