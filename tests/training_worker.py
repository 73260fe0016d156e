"""One process of the tests of distributed training: ``torchrun training_worker.py FOLDER``.

Each case trains a few steps and leaves there, from the first process, what all of them have together.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from switch_dit.data import load_data
from switch_dit.distributed import World, joined, local
from switch_dit.resume import Checkpoints
from switch_dit.settings import TrainConfig
from switch_dit.trainer import Trainer
from torch.distributed.tensor import DTensor

SETTINGS: dict[str, Any] = {
    "batch_size": 16, "steps": 6, "device": "cpu", "precision": "float32", "warmup": 0, "num_experts": 3,
    "max_grad_norm": 1.0, "prior_every": 2, "timesteps": "speed", "weighting": "uw",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fsdp": {"fsdp": True},
    "accumulated": {"accumulate": 2},
    "fsdp, accumulated, recomputed": {"fsdp": True, "accumulate": 2, "checkpoint_activations": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, fsdp": {"precision": "bfloat16", "fsdp": True},
    "v, float16": {"precision": "float16", "objective": "v", "timesteps": "curriculum"},
    "v, float16, fsdp": {
        "precision": "float16", "objective": "v", "timesteps": "curriculum", "fsdp": True,
        "weighting": "min_snr_5",
    },
}  # fmt: skip


def trainer_of(case: str, world: World | None = None) -> Trainer:
    """A trainer whose weights are not those of a fresh model, which is the identity."""
    settings = {**SETTINGS, **CASES[case]}
    if world is None:
        settings["fsdp"] = False
    config = TrainConfig(**settings)
    config.validate()
    trainer = Trainer(config, load_data("digits"), world=world)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                whole = torch.distributed.tensor.distribute_tensor(
                    noise, parameter.device_mesh, parameter.placements
                ) if isinstance(parameter, DTensor) else noise  # fmt: skip
                parameter.copy_(whole * (10 if name == "router.weight" else 1))
    return trainer


def advance(trainer: Trainer, first: int, steps: int) -> torch.Tensor:
    """Takes steps; the terms of each, [steps, 4], means over all processes."""
    trainer.model.train()
    terms = []
    for number, batch in zip(range(first, first + steps), trainer.batches(first), strict=False):
        found = trainer.step(number, *batch)
        terms.append(torch.stack([found[name].float() for name in ("loss", "mse", "vb", "prior")]))
    return trainer.world.mean(torch.stack(terms))


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All tensors of a run, whole."""
    found = {}
    for name, tensor in trainer.tensors().items():
        found[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        for case in CASES:
            trainer = trainer_of(case, world)
            if trainer.config.fsdp:
                shares = [local(p).numel() / p.numel() for p in trainer.model.blocks.parameters()]
                assert max(shares) < 0.7, "a process has all of a weight"
            terms = {"terms": advance(trainer, 0, 2)}
            state = state_of(trainer)
            # A checkpoint, written aside while the weights change.
            checkpoints = Checkpoints(folder / f"checkpoint {case}", 2, world, background=True)
            checkpoints.save(2, trainer.tensors(), trainer.numbers())
            terms["more"] = advance(trainer, 2, 2)
            checkpoints.wait()
            later = state_of(trainer)
            assert trainer.restore(checkpoints) == {"step": 2, **trainer.numbers()}
            again = state_of(trainer)
            for name, value in state.items():
                assert torch.equal(again[name], value), f"{case}: {name} is not what it was at step 2"
            assert any(not torch.equal(later[name], value) for name, value in state.items())
            assert torch.equal(advance(trainer, 2, 2), terms["more"]), f"{case}: not the same to the bit"
            for name, value in state_of(trainer).items():
                assert torch.equal(later[name], value), f"{case}: {name} is not the same to the bit"
            if world.first:
                save_file({**state, **terms}, folder / f"{case}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
