"""Makes a mixture of a trained dense model: DiT, SiT, diffusers' or one trained here. It draws the same.

python models/upcycle.py DiT-XL-2-256x256.pt runs/upcycled --system dit
python models/upcycle.py SiT-XL-2-256.pt runs/upcycled --system sit
python models/upcycle.py DiT-XL-2-256 runs/upcycled                    # a folder of diffusers
python models/upcycle.py runs/dense runs/upcycled                      # of train_switch_dit.py --routing none
python models/upcycle.py runs/dense runs/upcycled --routing dit_moe --num-experts 8

It becomes a Switch-DiT, whose experts are zero, or a DiT-MoE, whose experts are copies of the MLP; the router
is new. Training gives both their use:
python models/train_switch_dit.py --start-from runs/upcycled/weights --model XL/2 --data latents:DIR

Weights of the codes of DiT-MoE, EC-DIT and DiffMoE are mixtures already, and become runs as they are:
python models/upcycle.py dit_moe_xl.pt runs/dit-moe --system dit_moe
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import load_file
from switch_dit.checkpoint import load_checkpoint, load_settings, save_weights
from switch_dit.files import first_line
from switch_dit.model import SwitchDiT
from switch_dit.official import FLOWS
from switch_dit.upcycle import detect, from_official, schedule_of_config, told_by_config, upcycle


@dataclass
class UpcycleConfig:
    """Make a mixture of a dense model, or a run of the weights of a mixture."""

    source: Annotated[Path, tyro.conf.Positional]
    """A file of weights (.pt, .pth, .safetensors), a folder of diffusers (a pipeline or its transformer), or
    the folder of a run of train_switch_dit.py."""
    output: Annotated[Path, tyro.conf.Positional]
    """The folder to write, which must not exist; sample_switch_dit.py takes it as --run."""
    system: Literal["auto", "dit", "sit", "diffusers_dit", "dit_moe", "ec_dit", "diffmoe"] = "auto"
    """Whose weights they are. auto tells those of diffusers and of mixtures; DiT and SiT look alike."""
    routing: Literal["switch", "dit_moe"] = "switch"
    """The mixture that a dense model becomes: experts that multiply the tokens, chosen for a sample by its
    timestep, or copies of the MLP, chosen for each token."""
    num_experts: int = 3
    """Each block of a dense model gets this many experts."""
    top_k: int = 2
    """The router chooses this many experts for a sample, or for a token."""
    capacity: float | None = None
    """Mean experts of a token, which weights of ec_dit (2 by default) and diffmoe (1) do not tell."""
    process: Literal["auto", "flow", "eps"] = "auto"
    """What the weights of a mixture were trained for: auto is flow; some of DiT-MoE's are eps, as DiT."""
    num_heads: int | None = None
    """Attention heads, which the weights do not tell. By default those of the published sizes."""
    input_size: int | None = None
    """Height and width of a latent. By default the positions, or the config of diffusers, tell it."""
    class_dropout_prob: float = 0.1
    """The last class of the weights is the null label, unless this is 0."""
    frequencies: Literal["auto", "dit", "diffusers"] = "auto"
    """How timesteps are embedded: auto is as the code of the system does. A checkpoint of DiT that was
    converted to diffusers was trained with dit."""
    schedule: Literal["auto", "linear", "cosine"] = "auto"
    """The noise schedule that a model of the noise was trained with; flows have none. auto is that of a
    pipeline of diffusers, and linear, DiT's own, for others."""
    dense: bool = False
    """Whether to write the dense model itself instead of a mixture."""
    seed: int = 0
    """The router is drawn from this seed."""


def run(config: UpcycleConfig) -> Path:
    """Writes ``output``/weights, prints and returns that path. What does not fit raises before it writes."""
    if config.output.exists():
        raise ValueError(f"output is {config.output}; it exists, choose another folder")
    torch.manual_seed(config.seed)
    own = of_a_run(config.source)
    model, objective = of_other_code(config) if own is None else from_run(config, own)
    defaults = UpcycleConfig(config.source, config.output)
    for name in ("routing", "num_experts", "top_k", "dense"):
        if model.routing != "none" and getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"{name} is given; the weights are those of a {model.routing}, leave it out")
    if not config.dense and model.routing == "none":
        model = upcycle(model, routing=config.routing, num_experts=config.num_experts, top_k=config.top_k)
    folder = config.output / "weights"
    config.output.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    settings = {"model": model.settings, "objective": objective}
    try:
        save_weights(folder, {"model": weights, "ema": weights}, settings)
    except BaseException:
        with contextlib.suppress(OSError):
            config.output.rmdir()  # so that the same command can be typed again
        raise
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"a model of {total:,} parameters is in {folder}/; its output is that of {config.source}")
    decode = "" if model.in_channels in (1, 3) else " --vae stabilityai/sd-vae-ft-ema"
    program = Path(sys.argv[0]).parent / "sample_switch_dit.py"
    print(f"samples: python {program} --run {config.output}{decode}")
    start = f"python {program.with_name('train_switch_dit.py')} --start-from {folder}"
    print(f"training: {start} {training(model, objective)}")
    return folder


def training(model: SwitchDiT, objective: dict[str, Any]) -> str:
    """The settings of a training run that goes on with a model, but those that every run has."""
    given = {
        "routing": model.routing, "num-experts": model.settings["num_experts"],
        "top-k": model.settings["top_k"], "objective": objective["name"],
    }  # fmt: skip
    texts = [f"--{name} {value}" for name, value in given.items()]
    if objective["name"] == "eps":
        texts += [f"--schedule {objective['schedule']}"] if objective.get("schedule") else []
        texts += [] if model.learn_sigma else ["--no-learn-sigma"]
    return " ".join(texts)


def of_a_run(source: Path) -> Path | None:
    """The folder of weights, where ``source`` is such a folder or a run of train_switch_dit.py."""
    folders = (source / "weights", source)
    return next((folder for folder in folders if (folder / "ema.safetensors").is_file()), None)


def from_run(config: UpcycleConfig, folder: Path) -> tuple[SwitchDiT, dict[str, Any]]:
    """The averaged weights of a run, and its objective's settings; it needs none of ``config``'s."""
    defaults = UpcycleConfig(config.source, config.output)
    for name in ("system", "num_heads", "input_size", "class_dropout_prob", "frequencies", "schedule",
                 "capacity", "process"):  # fmt: skip
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"{name} is given; {folder} tells it, leave it out")
    model, _ = load_checkpoint(folder)
    if model.routing != "none":
        raise ValueError(f"source is {config.source}; its routing is {model.routing!r} and must be 'none'")
    return model, load_settings(folder)["objective"]


def of_other_code(config: UpcycleConfig) -> tuple[SwitchDiT, dict[str, Any]]:
    """The dense model of another code, and its objective's settings."""
    state, settings = read(config.source)
    for name in ("num_heads", "input_size"):
        if getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    settings["class_dropout_prob"] = config.class_dropout_prob
    if config.frequencies != "auto":
        settings["frequencies"] = config.frequencies
    system = detect(state) if config.system == "auto" else config.system
    if config.capacity is not None:
        settings["capacity"] = config.capacity
    if config.process != "auto":
        settings["process"] = config.process
    if system == "dit_moe":
        settings["top_k"] = config.top_k
    model = from_official(system, state, **settings)
    schedule = schedule_of(config.source)
    if schedule is not None and config.schedule not in ("auto", schedule):
        raise ValueError(
            f"schedule is {config.schedule!r}; the scheduler of {config.source} has {schedule!r}"
        )
    if schedule is None:
        schedule = "linear" if config.schedule == "auto" else config.schedule
    return model, process(model, config.process != "eps" and system in FLOWS, schedule)


def process(model: SwitchDiT, flow: bool, schedule: str) -> dict[str, Any]:
    """What create_objective takes."""
    if flow:
        return {"name": "flow", "num_timesteps": model.num_timesteps}
    return {
        "name": "eps", "schedule": schedule, "learn_sigma": model.learn_sigma,
        "num_timesteps": model.num_timesteps,
    }  # fmt: skip


def read(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names and tensors in a file or a folder of diffusers, and the settings that its config tells."""
    if not source.exists():
        raise FileNotFoundError(f"source is {source}; there is no such file or folder")
    settings: dict[str, Any] = {}
    if source.is_dir():
        folder = source / "transformer" if (source / "transformer").is_dir() else source
        found = [path for path in map(folder.joinpath, _NAMES) if path.is_file()]
        if not found or not (folder / "config.json").is_file():
            raise FileNotFoundError(f"source is {source}; {folder} must hold config.json and {_NAMES[0]}")
        settings, source = told_by_config(read_json(folder / "config.json")), found[0]
    try:
        if source.suffix == ".safetensors":
            return load_file(source), settings
        with torch.serialization.safe_globals([argparse.Namespace]):  # what DiT and SiT save beside weights
            return torch.load(source, map_location="cpu", weights_only=True), settings
    except Exception as error:  # broken files make torch raise almost anything
        reason = first_line(error)
        raise ValueError(f"source is {source}; it is no file of weights, or is cut off ({reason})") from None


def schedule_of(source: Path) -> str | None:
    """The noise schedule of a pipeline of diffusers; None where ``source`` does not tell."""
    path = source / "scheduler" / "scheduler_config.json"
    return schedule_of_config(read_json(path)) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """What a file of settings holds."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); take it from another copy") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it must hold settings by name")
    return found


_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def main() -> None:
    config = tyro.cli(UpcycleConfig, description=__doc__)
    try:
        run(config)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
