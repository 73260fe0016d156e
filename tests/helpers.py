"""Shared by the tests: golden files, the error measure of the project, kernels broken on purpose."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    from switch_dit import SwitchDiT

    from switch_moe.experts import LinearExperts

GOLDEN = Path(__file__).parent / "golden"
State = dict[str, Tensor]


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118


def case(name: str, prefix: str = "state_dict.") -> tuple[State, State, dict[str, Any]]:
    """The tensors, the state_dict and the metadata of a golden file."""
    tensors, metadata = golden(name)
    state = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    return tensors, state, metadata


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; 0 for two zero tensors, inf for NaN."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, norm = (actual - expected).norm(), expected.norm()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / norm) if norm > 0 else float("inf") if difference > 0 else 0.0


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fails with the name and the error."""
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"{name}: relative RMS {error:.2e} is above {tolerance:.0e}"


def assert_golden(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """:func:`assert_close` to a number of a golden file; files given by --golden have ten times the room.

    The tolerances in the tests are near what the files here need. Others hold any sizes, and are held to what
    every system must reach: 1e-5 for outputs, 1e-4 for gradients.
    """
    here = Path(__file__).parent / "golden"
    assert_close(name, actual, expected, tolerance if here == GOLDEN else 10 * tolerance)


def assert_error_rule(
    name: str, actual: Tensor, exact: Tensor, same_type: Tensor, dtype: torch.dtype
) -> None:
    """Products in ``dtype``: 1e-5 in float32, else 1.5 times the error of the reference run in that type.

    A gradient of a few numbers may be lucky in one type: half a rounding step is always allowed.
    """
    assert actual.dtype == same_type.dtype, name
    allowed = 1e-5
    if dtype != torch.float32:
        allowed = max(1.5 * relative_rms(same_type, exact), torch.finfo(dtype).eps / 2)
    assert_close(name, actual, exact, allowed)


def break_kernels(
    name: str, right: str, wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """switch_moe.kernels.<name> with ``right`` replaced by ``wrong``, in the place of it.

    Either its own source has it, or that of the device code that all share: then it gets a copy of that.
    """
    import switch_moe.kernels

    qualified = f"switch_moe.kernels.{name}"
    source = Path(importlib.import_module(qualified).__file__).read_text()
    if right not in source and name != "_tile":
        break_kernels("_tile", right, wrong, folder, monkeypatch)
        right = wrong = ""
    assert right in source, "the mutation no longer applies to the kernel"
    path = folder / f"{name}.py"
    path.write_text(source.replace(right, wrong) if right else source)
    spec = importlib.util.spec_from_file_location(qualified, path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setitem(sys.modules, qualified, broken)
    monkeypatch.setattr(switch_moe.kernels, name, broken)
    return broken


def check_streams_and_graph(run: Callable[[], list[Tensor]], expected: list[Tensor]) -> None:
    """``run()`` on a GPU gives ``expected`` as it is, on another stream, and from a CUDA graph."""

    def check(found: list[Tensor]) -> None:
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    check(run())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run()
    torch.cuda.current_stream().wait_stream(stream)
    check(found)
    torch.use_deterministic_algorithms(False)  # filling memory with NaN is not part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    check(captured)


def random_model(seed: int = 0, **settings: Any) -> SwitchDiT:
    """A small Switch-DiT whose trained weights are all random: those of a fresh one are the identity.

    Its routers choose other experts at other timesteps.
    """
    from switch_dit import SwitchDiT

    small = {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3}
    torch.manual_seed(seed)
    model = SwitchDiT(**{**small, "num_classes": 5, **settings})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1.0 if name == "router.weight" else 0.1)
    return model


def top_k_of(routing: str) -> int:
    """A k that a system takes: 2, and 1 of EvoMoE, which ends with one expert."""
    return 1 if routing == "evomoe" else 2


def count_merges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The routes of every expert_linear that merges on a CPU from now on: one merged weight each."""
    from switch_moe.cpu import expert_linear as cpu

    routes: list[int] = []
    name = "_fused_forward" if cpu.vector_width(torch.float32) else "_merged_forward"
    original = getattr(cpu, name)

    def counting(x: Tensor, experts: LinearExperts, samples: list[int]) -> Tensor:
        routes.append(len(samples))
        return original(x, experts, samples)

    monkeypatch.setattr(cpu, name, counting)
    return routes
