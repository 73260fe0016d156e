"""Data-parallel training, activation checkpointing and compilation leave loss and gradients as they are."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

TIMEOUT_SECONDS = 90


def run_ranks(case: str, folder: Path) -> list[dict[str, Any]]:
    """What both ranks of a case left; fails with the output of all where one fails or hangs."""
    paths = os.pathsep.join(filter(None, sys.path))  # the ranks import what this process does
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"rank{rank}.log" for rank in range(worker.WORLD_SIZE)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, worker.__file__, case, str(rank), str(folder)]
        with open(log, "wb") as output:
            processes.append(
                subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    if any(code != 0 for code in codes):
        output = "\n".join(
            f"--- rank {r}: {f'still running after {TIMEOUT_SECONDS} s' if c is None else f'exit {c}'}\n"
            f"{log.read_text()[-3000:]}"
            for r, (c, log) in enumerate(zip(codes, logs, strict=True))
        )
        pytest.fail(f"case {case!r} failed\n{output}", pytrace=False)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(worker.WORLD_SIZE)]


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Loss and gradients of one process on the whole batch."""
    model = worker.build_model()
    loss = worker.loss_and_backward(worker.TrainingLoss(model), worker.make_batch())
    grads = {name: parameter.grad for name, parameter in worker.trained(model).items()}
    return {"loss": loss, "grads": grads, "model": model}


def assert_same_step(found: dict[str, Any], single: dict[str, Any], prefix: str = "") -> None:
    assert_close(f"{prefix}loss", found["loss"], single["loss"], 1e-5)
    assert set(found["grads"]) == set(single["grads"])
    for name, expected in single["grads"].items():
        assert found["grads"][name] is not None, f"{prefix}{name} has no gradient"
        assert_close(f"{prefix}gradient of {name}", found["grads"][name], expected, 1e-5)


def test_the_batch_covers_what_can_go_wrong(single: dict[str, Any]) -> None:
    """Experts that nobody chose, or only one of the ranks, still have a gradient: DDP waits for all."""
    model, t = single["model"], worker.make_batch()[2]
    with torch.no_grad():
        selected = model.route(model.t_embedder(t)).selected().bool()
    used, first, second = (part.any(0).view(2, 6) for part in (selected, selected[:4], selected[4:]))
    assert not used.all()
    assert not torch.equal(first, second)
    for name, gradient in single["grads"].items():
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.count_nonzero() > 0, f"the gradient of {name} is zero"
    for index in range(2):
        gradient = single["grads"][f"blocks.{index}.moe.weight"]
        assert torch.equal(gradient.flatten(1).any(1), used[index])


def test_ddp(single: dict[str, Any], tmp_path: Path) -> None:
    for found in run_ranks("ddp", tmp_path):
        assert_same_step(found, single)


@pytest.mark.slow
def test_fsdp(single: dict[str, Any], tmp_path: Path) -> None:
    """Blocks and root sharded; also without resharding after the forward, and with recomputed blocks."""
    ranks = run_ranks("fsdp", tmp_path)
    guided = worker.guided_noise(single["model"])
    for way in ("plain", "gathered", "recomputed"):
        for found in ranks:
            assert_same_step(found[way], single, f"{way}: ")
            assert_close(f"{way}: guided noise", found[way]["guided"], guided, 1e-5)
        for name, parameter in single["model"].named_parameters():
            sizes = [found[way]["shards"][name] for found in ranks]
            assert sum(sizes) == parameter.numel(), f"{way}: the ranks hold {sizes} elements of {name}"


@pytest.mark.slow
def test_fsdp_state_dict_round_trip(single: dict[str, Any], tmp_path: Path) -> None:
    expected = single["model"].state_dict()
    for found in run_ranks("fsdp_state", tmp_path):
        for state in (found["state"], found["again"]):
            assert list(state) == list(expected)
            assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert_close("guided", found["guided"], worker.guided_noise(single["model"]), 1e-5)


@pytest.mark.slow
def test_routers_of_tokens_stay_in_float32(tmp_path: Path) -> None:
    """Where the blocks of FSDP compute in bfloat16; every weight has a gradient."""
    for found in run_ranks("mixtures", tmp_path):
        for routing, of_system in found.items():
            model, seen = worker.mixture(routing), of_system["seen"]
            weights = dict(model.blocks.named_parameters())
            mixtures = [name for name in weights if ".moe." in name]
            assert seen.keys() == set(mixtures)
            for name, used in seen.items():
                kept = ".router." in name or ".predictor." in name
                assert used.dtype == (torch.float32 if kept else torch.bfloat16), name
                assert torch.equal(used, weights[name].to(used.dtype)), name
            assert of_system["grads"].keys() == worker.trained(model).keys()
            for name, gradient in of_system["grads"].items():
                assert gradient.dtype == torch.float32
                assert gradient.isfinite().all(), name


@pytest.mark.slow
def test_thresholds_are_the_mean_of_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks("thresholds", tmp_path)
    assert not torch.equal(first["observed"], second["observed"])
    expected = 0.05 * (first["observed"] + second["observed"]) / 2
    for found in (first, second):
        assert_close("thresholds", found["threshold"], expected, 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("part", ["block", "moe"])
def test_activation_checkpointing(part: str, autocast: bool) -> None:
    """Bitwise: the forward runs again with the same routing, under the same autocast."""

    def step(recompute: bool) -> tuple[Tensor, dict[str, Tensor | None], int]:
        model, calls = worker.build_model(), []

        def counted(forward: Callable[..., Tensor], *args: Any, **keywords: Any) -> Tensor:
            calls.append(forward)
            return forward(*args, **keywords)

        for block in model.blocks:
            module = block if part == "block" else block.moe
            module.forward = functools.partial(counted, module.forward)
            if recompute:
                worker.checkpoint_forward(module)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = worker.loss_and_backward(worker.TrainingLoss(model), worker.make_batch())
        return loss, {name: p.grad for name, p in worker.trained(model).items()}, len(calls)

    loss, grads, calls = step(recompute=False)
    loss_again, grads_again, calls_again = step(recompute=True)
    assert (calls, calls_again) == (2, 4)
    assert torch.equal(loss_again, loss)
    for name, gradient in grads.items():
        assert gradient is not None, f"{name} has no gradient"
        assert torch.equal(grads_again[name], gradient), name


@pytest.mark.slow
def test_compiled_whole(single: dict[str, Any]) -> None:
    """One graph for the forward and the prior, and its backward."""
    model = worker.build_model()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    counters.clear()
    model.forward_with_prior = torch.compile(model.forward_with_prior, fullgraph=True, backend=counter)
    loss = worker.loss_and_backward(worker.TrainingLoss(model), worker.make_batch())
    grads = {name: parameter.grad for name, parameter in worker.trained(model).items()}
    assert_same_step({"loss": loss, "grads": grads}, single)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
