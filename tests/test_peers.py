"""Adapters of other libraries, on stand-ins that compute what their sources say, and of the official code."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cases as plans  # noqa: E402
from benchmarks import peers as libraries  # noqa: E402
from benchmarks.case import check  # noqa: E402

LIBRARIES = ("ScatterMoE", "MegaBlocks", "grouped_gemm", "SonicMoE", "QuACK", "Liger")


def scattermoe_parallel_linear(
    inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,
    expert_biases=None, gates=None, grouped_in=False, grouped_out=False,
):  # fmt: skip
    """What ScatterMoE's function computes, as its source at commit 2d15f31 reads."""
    counts = torch.bincount(sorted_expert_idxs, minlength=len(expert_weights))
    assert torch.equal(expert_offsets, counts.cumsum(0))
    assert len(sorted_scattered_idxs) == len(sorted_expert_idxs) == len(inputs) * k
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    out = torch.einsum("ri,rio->ro", rows, expert_weights[sorted_expert_idxs])
    if expert_biases is not None:
        out = out + expert_biases[sorted_expert_idxs]
    if not grouped_out:
        out = torch.zeros_like(out).index_copy(0, sorted_scattered_idxs, out)
    if gates is not None:
        out = (gates[:, None] @ out.view(*gates.shape, -1)).squeeze(1)
    return out


def quack_gemm(a, b, cu_seqlens_m=None, cu_seqlens_k=None, tuned=True):
    """What QuACK's function computes, as gemm_ref of its source at commit 0555417 reads."""
    assert not tuned
    if cu_seqlens_m is not None:
        bounds = cu_seqlens_m.tolist()
        return torch.cat([a[i:j] @ w for (i, j), w in zip(itertools.pairwise(bounds), b, strict=True)])
    bounds = cu_seqlens_k.tolist()
    return torch.stack([a[:, i:j] @ b[i:j] for i, j in itertools.pairwise(bounds)])


def gmm(a, b, batch_sizes, trans_b=False):
    """What grouped_gemm's product computes; its sizes are int64 on the host."""
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.device.type == "cpu"
    assert not trans_b
    return torch.cat([rows @ w for rows, w in zip(a.split(batch_sizes.tolist()), b, strict=True)])


class MegaBlocksOps:
    """What megablocks.ops computes: sort to (bin ids, indices), counts, sums, gather and weighted scatter."""

    @staticmethod
    def sort(x, end_bit):
        assert x.dtype == torch.int32
        assert int(x.max()) < 2**end_bit
        return torch.sort(x, stable=True)

    @staticmethod
    def histogram(x, bins):
        return torch.bincount(x, minlength=bins).int()

    @staticmethod
    def inclusive_cumsum(x, dim):
        return x.cumsum(dim)

    @staticmethod
    def gather(x, indices, bin_ids, bins, top_k):
        assert int(bins[-1]) == len(indices) == len(x) * top_k
        return x[indices // top_k]

    @staticmethod
    def scatter(x, indices, bin_ids, weights, bins, top_k):
        out = torch.zeros(len(indices) // top_k, x.shape[1], dtype=x.dtype)
        return out.index_add(0, indices // top_k, x * weights[indices][:, None])


def moe_general_routing_inputs(
    x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
    is_inference_mode_enabled=False,
):  # fmt: skip
    """What SonicMoE's function computes: w1 [2I, D, E], gate rows even, w2 [D, I, E]."""
    assert activation_type == "swiglu"
    assert b1 is None
    assert b2 is None
    assert torch.equal(token_indices, token_indices.sort().values)
    hidden = torch.einsum("rd,odr->ro", x[token_indices], w1[:, :, expert_indices])
    hidden = F.silu(hidden[:, ::2]) * hidden[:, 1::2]
    rows = torch.einsum("ri,dir->rd", hidden, w2[:, :, expert_indices])
    return torch.zeros_like(x).index_add(0, token_indices, rows * router_scores[:, None]), None


class LigerFusedMoEFunction:
    """What Liger's function computes: gate_up_proj [E, 2I, D], down_proj [E, D, I]."""

    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        assert top_k_index.dtype == torch.int32
        out = torch.zeros_like(x)
        for k in range(top_k_index.shape[1]):
            gate, up = torch.einsum("td,tod->to", x, gate_up_proj[top_k_index[:, k]]).chunk(2, dim=-1)
            rows = torch.einsum("ti,tdi->td", F.silu(gate) * up, down_proj[top_k_index[:, k]])
            out = out + rows * top_k_weights[:, k : k + 1]
        return out


def module(name: str, **attributes: object) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(attributes)
    return made


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (
        module("scattermoe"),
        module("scattermoe.parallel_experts", parallel_linear=scattermoe_parallel_linear),
        module("quack"),
        module("quack.gemm_interface", gemm=quack_gemm),
        module("grouped_gemm"),
        module("grouped_gemm.ops", gmm=gmm),
        module("megablocks", ops=MegaBlocksOps),
        module("sonicmoe"),
        module("sonicmoe.enums", ActivationType=types.SimpleNamespace(SWIGLU="swiglu")),
        module("sonicmoe.functional", moe_general_routing_inputs=moe_general_routing_inputs),
        module("liger_kernel"),
        module("liger_kernel.ops", LigerFusedMoEFunction=LigerFusedMoEFunction),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    found, missing = libraries.peers.__wrapped__()
    assert not missing
    assert tuple(peer.name for peer in found) == LIBRARIES
    monkeypatch.setattr(libraries, "peers", lambda: (found, missing))
    monkeypatch.setattr(plans, "peers", lambda: (found, missing))


def check_lines(case, name: str, expected: bool) -> None:
    """Both lines of a peer, where one expert is everybody's."""
    inputs = case.make(0)
    for key in inputs:
        if key.startswith("index"):
            inputs[key][:, 0] = 2  # with k = 1, nobody's are the others
    found = {c.name: c for c in case.contenders}
    assert (name in found) == (f"{name}, prepared" in found) == expected
    for contender in [found[line] for line in (name, f"{name}, prepared") if expected]:
        result = check(case, contender, inputs)
        assert result["failure"] is None
        assert result["error"] <= 2e-6


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("library", ["expert loop", "grouped_mm", *LIBRARIES])
@pytest.mark.parametrize("top_k", [1, 3])
def test_lines_of_peers(library: str, top_k: int) -> None:
    has_linear = library not in ("SonicMoE", "Liger")
    check_lines(plans.linear_case("cpu", torch.float32, 5, 6, 8, 4, (top_k,)), library, has_linear)
    has_mlp, has_biases = library != "expert loop", has_linear and library != "expert loop"
    for gated, bias in itertools.product((False, True), (False, True)):
        expected = has_mlp if gated and not bias else has_biases
        case = plans.mlp_case("cpu", torch.float32, 3, 4, 8, 4, top_k, gated, bias=bias)
        check_lines(case, library, expected)


@pytest.mark.usefixtures("stand_ins")
def test_layers_of_peers() -> None:
    case = plans.layer_case("cpu", torch.float32, 4, 6, 16)
    inputs = case.make(0)
    assert len(case.contenders) == 3 + 2 * 6
    for contender in case.contenders:
        assert check(case, contender, inputs)["failure"] is None


def test_libraries_that_are_missing_say_why() -> None:
    found, missing = libraries.peers()
    assert {peer.name for peer in found} | set(missing) == set(LIBRARIES)
    assert all(reason.startswith("not importable: ") for reason in missing.values())
    states = libraries.peer_states()
    assert set(states) == {*LIBRARIES, "grouped_mm", "official"}
    assert "--peer-path official=DIR" in states["official"]


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
        libraries.parse_peer_path(text)


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
def official_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
    monkeypatch.setattr(libraries, "_paths", {})
    libraries.official_mixture.cache_clear()
    yield tmp_path
    libraries.official_mixture.cache_clear()


def test_official_layer(official_clone: Path) -> None:
    path_before, modules_before = list(sys.path), set(sys.modules)
    libraries.parse_peer_path(f"official={official_clone}")
    assert libraries.peer_states()["official"] == "available"
    case = plans.layer_case("cpu", torch.float32, 4, 6, 16)
    lines = [contender for contender in case.contenders if contender.name.startswith("official")]
    assert [line.name for line in lines] == ["official", "official, prepared"]
    inputs = case.make(0)
    for line in lines:
        assert check(case, line, inputs)["failure"] is None
    assert sys.path == path_before
    assert not {"models.MoE", "util.model_util", "parallel_experts"} & (set(sys.modules) - modules_before)


def test_a_wrong_official_layer_is_not_timed(official_clone: Path) -> None:
    file = official_clone / "models" / "MoE.py"
    file.write_text(file.read_text().replace("softmax(1)", "sigmoid()"))
    libraries.parse_peer_path(f"official={official_clone}")
    case = plans.layer_case("cpu", torch.float32, 4, 6, 16)
    line = next(contender for contender in case.contenders if contender.name == "official")
    assert check(case, line, case.make(0))["failure"].startswith("wrong: ")
