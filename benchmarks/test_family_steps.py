"""A training step of every system of the family beside that of a dense DiT of equal active FLOPs.

The dense DiT has a wider feed-forward layer in each block, such that a token meets as many weights there as
it does in the system: those of its k experts, the shared one and the router. Both take turns through
switch_dit's Trainer.step, so what is left are the passes around the products, routing and the optimizer,
which updates all experts. A system whose output is not that of its plain PyTorch reference is not timed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from switch_dit import PRESETS, SwitchDiT
from switch_dit.systems import SYSTEMS
from torch import nn

from benchmarks.case import SWITCH_MOE, relative_rms
from benchmarks.conftest import Bench, describe_time
from benchmarks.test_steps import (
    DTYPES,
    SIZES,
    TRAIN,
    Contender,
    Row,
    Setting,
    Step,
    train_step,
    with_random_weights,
)

DENSE = "dense DiT, equal active FLOPs"
EXPERTS, TOP_K = 8, 2
# These two change during a run and are timed as they end: EvoMoE with one expert for a token, Nucleus-Image
# with its last capacity.
AT_THE_END = {
    "evomoe": {"top_k": 1, "mixture": {"switch": -1}},
    "nucleus": {"mixture": {"capacity": 2.0, "capacity_end": 2.0}},
}
ALLOWED = 3e-5  # relative RMS against the reference in the same type; routers agree, so choices do


def settings_of(device: str, quick: bool) -> list[tuple[str, Setting]]:
    """What is measured: every system at size S, one of them at the tiny size in a quick run."""
    model, names = ("tiny/4", ["dit_moe"]) if quick else ("S/2", list(SYSTEMS))
    batch = SIZES[model].batch[device, TRAIN]
    dtypes = DTYPES[device][:1]  # a step of one type takes two minutes on a CPU already
    return [(name, Setting(TRAIN, model, device, batch, dtype=dtype)) for name in names for dtype in dtypes]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, quick = (metafunc.config.getoption(option) for option in ("--device", "--quick"))
    found = settings_of(device, quick)
    metafunc.parametrize(("system", "setting"), found, ids=[f"{name} {one}" for name, one in found])


def create(system: str, preset: str, **settings: Any) -> SwitchDiT:
    """The model of a system with random weights, whatever number of experts a run would have."""
    of_system = {"routing": system, "num_experts": EXPERTS, "top_k": TOP_K, **AT_THE_END.get(system, {})}
    return with_random_weights(preset, **{**settings, **of_system})


def equal_ratio(model: SwitchDiT, dense: SwitchDiT) -> float:
    """``mlp_ratio`` of a dense DiT with as many active parameters as ``model``, from one with a ratio."""
    depth, size = len(dense.blocks), dense.pos_embed.shape[-1]
    missing = model.active_parameters() - dense.active_parameters()
    return dense.config.mlp_ratio + missing / (depth * 2 * size**2)


def error_of(model: SwitchDiT, setting: Setting) -> float:
    """Relative RMS of the output against the reference, in evaluation, two images."""
    twin = SwitchDiT(**model.settings, backend="reference").eval()
    twin.load_state_dict(model.state_dict())
    size = SIZES[setting.model]
    x = torch.randn(2, size.channels, size.latent, size.latent, generator=torch.Generator().manual_seed(1))
    arguments = x, torch.tensor([120, 950]), torch.tensor([0, size.classes])
    twin = twin.to(setting.device)
    with torch.no_grad():
        out, expected = (
            one(*(argument.to(setting.device) for argument in arguments)) for one in (model.eval(), twin)
        )
    model.train()
    return relative_rms(out, expected)


def test_family_step(bench: Bench, system: str, setting: Setting) -> None:
    of_system = functools.partial(create, system)
    model, step = train_step(setting, Contender(SWITCH_MOE, of_system, system))
    assert isinstance(model, SwitchDiT)
    base = with_random_weights(setting.model, routing="none", **setting.settings)
    ratio = equal_ratio(model, base)
    dense = functools.partial(with_random_weights, mlp_ratio=ratio)
    wide, dense_step = train_step(setting, Contender(DENSE, dense, "none"))
    steps: dict[str, Step] = {SWITCH_MOE: step, DENSE: dense_step}
    check = error_of(model, setting)
    failure = None if check <= ALLOWED else f"wrong: the output is {check:.1e} off, {ALLOWED} is allowed"
    for one in (*steps.values(), *steps.values()):  # from its second step on EvoMoE has one expert
        one()
    timed = {} if failure else bench.time({name: [one] for name, one in steps.items()}, graphs=False)
    rows: list[Row] = []
    preset = PRESETS[setting.model]
    models: dict[str, nn.Module] = {SWITCH_MOE: model, DENSE: wide}
    for name, one in models.items():
        active = one.active_parameters() if isinstance(one, SwitchDiT) else 0
        row: Row = {
            "operation": "family_step", "note": system,
            "shape": {"B": setting.batch, "D": preset.hidden_size},
            "dtype": setting.dtype, "device": setting.device, "pass": TRAIN, "contender": name,
            "model": setting.model, "error": check if name == SWITCH_MOE else None, "allowed": ALLOWED,
            "failure": failure if name == SWITCH_MOE else None, "active_parameters": active,
            "parameters": sum(p.numel() for p in one.parameters()), "is_switch_moe": name == SWITCH_MOE,
        }  # fmt: skip
        time = timed.get(name)
        rows.append(row | (describe_time(time) if time is not None else {}))
    bench.record("family_step", rows)
