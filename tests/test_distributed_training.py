"""Training by two processes is training by one, up to rounding, and to the bit among two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import training_worker as worker
from helpers import random_model, relative_rms
from safetensors.torch import load_file
from switch_dit.distributed import World, shard
from switch_dit.resume import Checkpoints
from torch.testing._internal.distributed.fake_pg import FakeStore

# Of float32 sums in another order, amplified by two steps of Adam; products in half types round far more.
ALLOWED = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 1e-2}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have left."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command += [worker.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_are_one(case: str, two: Path) -> None:
    """Losses of four steps, and after two the sums of gradients that Adam keeps."""
    found = load_file(two / f"{case}.safetensors")
    trainer = worker.trainer_of(case)
    allowed = ALLOWED[trainer.config.precision]
    terms = worker.advance(trainer, 0, 2)
    assert relative_rms(found["terms"], terms) < allowed
    for name, value in worker.state_of(trainer).items():
        if name.startswith("optimizer.exp_avg.") and value.norm() > 1e-6:
            assert relative_rms(found[name], value) < 10 * allowed, name
    assert relative_rms(found["more"], worker.advance(trainer, 2, 2)) < 10 * allowed


@pytest.mark.slow
@pytest.mark.parametrize(("case", "into"), [("plain", "accumulated"), ("fsdp", "plain")])
def test_one_process_goes_on_from_two(case: str, into: str, two: Path) -> None:
    trainer = worker.trainer_of(into)
    assert trainer.restore(Checkpoints(two / f"checkpoint {case}"))["step"] == 2
    expected = load_file(two / f"{case}.safetensors")
    for name, value in worker.state_of(trainer).items():
        assert value.equal(expected[name]), name


@pytest.mark.parametrize(("processes", "dimension"), [(2, 0), (8, 1), (5, 0)])
def test_where_experts_are_cut(processes: int, dimension: int) -> None:
    """Three experts: on the first dimension, or on the second where some of more processes would have none.

    Five processes cannot share 24 rows evenly, which torch asks for on the second dimension.
    """
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        model = random_model(num_experts=3)
        shard(model, World(0, processes), torch.bfloat16)
        for name, parameter in model.named_parameters():
            (placement,) = parameter.placements
            expected = dimension if ".moe." in name else 0
            assert placement.dim == expected, name
            assert parameter.dtype == torch.float32
    finally:
        dist.destroy_process_group()
