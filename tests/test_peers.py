"""What the benchmarks compare with computes the same function; the official layer loads from a clone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import assert_close

from benchmarks import peers
from benchmarks.baselines import expert_loop
from benchmarks.case import FORWARD, Contender, check
from benchmarks.test_layer import layer_case
from switch_moe.ops import expert_linear


@pytest.mark.parametrize("experts", [3, 8])
def test_expert_loop(experts: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(4, 5, 6), torch.randn(experts, 6, 7), torch.randn(experts, 7), torch.rand(4, 2)]
    index = torch.rand(4, experts).argsort(1)[:, :2].int()
    grad = torch.randn(4, 5, 7)
    results = []
    for function in (expert_loop, expert_linear):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = function(leaves[0], leaves[1], leaves[2], index, leaves[3])
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for name, a, e in zip(("out", "x", "weight", "bias", "gate"), *results, strict=True):
        assert_close(name, a, e, 1e-5)


def test_libraries_that_are_missing_say_why() -> None:
    available, missing = peers.peers()
    assert {peer.name for peer in available} | set(missing) == {"ScatterMoE", "SonicMoE"}
    assert all(reason.startswith("not importable: ") for reason in missing.values())
    assert "--peer-path official=DIR" in peers.peer_states()["official"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("official", "'' is not a folder"),
        ("official=/nowhere", "'/nowhere' is not a folder"),
        ("unknown=.", "NAME one of official, scattermoe"),
    ],
)
def test_bad_peer_paths(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peers.parse_peer_path(text)


MIXTURE = """
import torch
from parallel_experts import ParallelExperts
from util.model_util import plus_one

class TaskMoE(torch.nn.Module):
    def __init__(self, hidden_size, num_experts, k):
        super().__init__()
        self.k = k
        self.f_gate = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(hidden_size, num_experts))
        self.experts = ParallelExperts(num_experts, hidden_size, hidden_size)

    def set_active_task(self, active_task):
        self.active_task = active_task

    def forward(self, x, task_full):
        probs = self.f_gate(task_full).softmax(1)[self.active_task]
        gates = torch.zeros_like(probs).scatter(1, probs.topk(self.k).indices, 1.0) * probs
        dense = torch.einsum("btd,mdo,bm->bto", x, self.experts.w, gates) + (gates @ self.experts.b)[:, None]
        return plus_one(dense), probs, None
"""
EXPERTS = """
import torch

class ParallelExperts(torch.nn.Module):
    def __init__(self, num_experts, input_size, output_size):
        super().__init__()
        self.w = torch.nn.Parameter(torch.empty(num_experts, input_size, output_size))
        self.b = torch.nn.Parameter(torch.empty(num_experts, output_size))

    def forward(self, inputs, expert_size):
        parts = zip(inputs.split(expert_size.tolist()), self.w, self.b)
        return torch.cat([rows @ w + b for rows, w, b in parts])
"""


@pytest.fixture
def official_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with modules of the names and signatures of the official code."""
    for name, text in {
        "models/__init__.py": "",
        "models/MoE.py": MIXTURE,
        "util/model_util.py": "def plus_one(x):\n    return 1 + x\n",
        "models/parallel_linear/parallel_experts/__init__.py": EXPERTS,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(peers, "_paths", {})
    peers.official_mixture.cache_clear()
    yield tmp_path
    peers.official_mixture.cache_clear()


def official_contender() -> tuple[Contender, object]:
    case = layer_case("cpu", torch.float32, 4, 6, 16)
    (official,) = [contender for contender in case.contenders if contender.name == peers.OFFICIAL]
    return official, case


def test_official_layer(official_clone: Path) -> None:
    path_before, modules_before = list(sys.path), set(sys.modules)
    peers.parse_peer_path(f"official={official_clone}")
    assert peers.peer_states()["official"] == "available"
    official, case = official_contender()
    assert check(case, official, case.make(0))["failure"] is None
    assert sys.path == path_before
    assert not {"models.MoE", "util.model_util", "parallel_experts"} & (set(sys.modules) - modules_before)


def test_a_wrong_official_layer_is_not_timed(official_clone: Path) -> None:
    file = official_clone / "models" / "MoE.py"
    file.write_text(file.read_text().replace("softmax(1)", "sigmoid()"))
    peers.parse_peer_path(f"official={official_clone}")
    official, case = official_contender()
    assert check(case, official, case.make(0), (FORWARD,))["failure"].startswith("wrong: ")
