"""The whole steps that are measured compute the same function, and what their rows say is right."""

from __future__ import annotations

import functools
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from switch_dit import SwitchDiT, create_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import counts, official_model, peers, result_files, steps
from benchmarks.case import OURS
from benchmarks.official_structure import OfficialStructure
from benchmarks.steps import DENSE, SAMPLE, STRUCTURE, TRAIN, Contender, Prepared, Setting
from benchmarks.timing import Turns

STEP_KEYS = {"images_per_second", "mfu", "moe_share", "peak_bytes", "operators", "host_waits", "launches",
             "model", "batch", "flops", "error", "allowed"}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(top_k: int = 2, experts: int = 3) -> SwitchDiT:
    torch.manual_seed(0)
    settings = {"hidden_size": 24, "depth": 3, "num_heads": 2, "num_classes": 3}
    model = SwitchDiT(8, 2, 1, **settings, num_experts=experts, top_k=top_k)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=1.0 if name == "router.weight" else 0.1)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 1, 8, 8, generator=generator)
    return x, torch.tensor([0, 999, 400, 400, 30]), torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize(("experts", "top_k"), [(3, 2), (3, 1), (3, 3), (5, 2)])
def test_official_structure_is_ours(experts: int, top_k: int) -> None:
    ours = random_model(top_k, experts).eval()
    structure = OfficialStructure.of(ours).eval()
    assert ours.state_dict().keys() == structure.state_dict().keys()
    assignment = torch.randperm(len(ours.assignment), generator=torch.Generator().manual_seed(2))
    found = []
    for model in (ours, structure):
        model.assignment.copy_(assignment)
        out, prior = model.forward_with_prior(*inputs(), match=False)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grads = torch.autograd.grad([out, prior], list(trained.values()), [grad, torch.tensor(7.0)])
        found.append({"output": out, "prior": prior} | dict(zip(trained, grads, strict=True)))
    for name, expected in found[0].items():
        assert_close(name, found[1][name], expected, 1e-5)


def test_official_structure_matches_at_the_same_cost() -> None:
    ours = random_model()
    structure = OfficialStructure.of(ours)
    chosen = ours.routing_table().selected()
    assert 0 < chosen.mean(0).min() < chosen.mean(0).max() < 1, "the case is not trivial"

    def cost(assignment: torch.Tensor) -> float:
        assert sorted(assignment.tolist()) == list(range(chosen.shape[1]))
        return float((chosen - ours.prior.table[:, assignment]).abs().sum())

    structure.match(chosen)
    assert cost(structure.assignment) == cost(ours.prior.match(chosen))
    structure.forward_with_prior(*inputs())
    assert cost(structure.assignment) == cost(ours.prior.match(chosen))


@functools.cache
def prepared(which: str) -> Prepared:
    return Prepared(Setting(which, "tiny/4", "cpu", 4))


@pytest.mark.parametrize("which", [TRAIN, SAMPLE])
def test_nothing_of_ours_waits(which: str) -> None:
    step = prepared(which).steps
    assert counts.host_waits(step[OURS]) == 0
    assert counts.host_waits(step[DENSE]) == 0
    assert counts.host_waits(step[STRUCTURE]) > 0


@pytest.mark.parametrize("which", [TRAIN, SAMPLE])
def test_rows(which: str) -> None:
    case = prepared(which)
    rows = {row["contender"]: row for row in case.rows(Turns(case.steps, 0.0, least=2).run())}
    assert list(rows) == [OURS, DENSE, STRUCTURE]
    for name, row in rows.items():
        assert set(result_files.ROW_KEYS) | STEP_KEYS <= set(row)
        assert row["failure"] is None
        assert row["error"] <= row["allowed"]
        assert (row["group"], row["pass"], row["ours"]) == (f"{which}_step", which, name == OURS)
        assert row["images_per_second"] == pytest.approx(4e6 / row["microseconds"])
        assert len(row["samples"]) == 2
        assert row["mfu"] > 0
        assert row["peak_bytes"] > 0
        assert row["launches"] is None
    json.dumps(list(rows.values()), allow_nan=False)
    assert rows[DENSE]["moe_share"] is None
    assert 0 < rows[OURS]["moe_share"] < 1
    assert 0 < rows[STRUCTURE]["moe_share"] < 1
    assert rows[DENSE]["operators"] < rows[OURS]["operators"] < rows[STRUCTURE]["operators"]
    assert rows[DENSE]["flops"] < rows[OURS]["flops"] == rows[STRUCTURE]["flops"]


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is a little off."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def spoil_output(model: SwitchDiT) -> None:
    with torch.no_grad():
        model.blocks[1].moe.weight[0].mul_(1.01)


def spoil_gradient(model: SwitchDiT) -> None:
    layer = model.blocks[1].moe
    forward = layer.forward
    layer.forward = lambda *args, **options: Scaled.apply(forward(*args, **options))


def spoil_prior(model: SwitchDiT) -> None:
    model.prior.table.copy_(model.prior.table.flip(0))


@pytest.mark.parametrize("spoil", [spoil_output, spoil_gradient, spoil_prior])
def test_a_wrong_contender_is_not_timed(spoil) -> None:
    def create(*args, **options) -> SwitchDiT:
        model = steps.with_random_weights(*args, **options)
        spoil(model)
        return model

    right = steps.contenders()[1]
    case = Prepared(Setting(TRAIN, "tiny/4", "cpu", 4), [Contender("wrong", create, lambda model: []), right])
    assert set(case.steps) == {DENSE, steps.PRODUCT}
    wrong, _ = case.rows(Turns(case.steps, 0.0, least=1).run())
    assert wrong["failure"].startswith("wrong: ")
    assert wrong["microseconds"] is None
    assert wrong["samples"] == []


def test_a_contender_that_raises_does_not_end_the_others() -> None:
    def create(*args, **options) -> SwitchDiT:
        raise OSError("no such model")

    case = Prepared(
        Setting(SAMPLE, "tiny/4", "cpu", 2),
        [Contender("broken", create, lambda model: []), steps.contenders()[1]],
    )
    assert case.checks["broken"]["failure"] == "OSError: no such model"
    assert case.checks[DENSE]["failure"] is None


@pytest.mark.parametrize("which", [TRAIN, SAMPLE])
def test_flops_of_dit_are_those_that_torch_counts(which: str) -> None:
    setting = Setting(which, "tiny/4", "cpu", 3)
    rows = 3 if which == TRAIN else 6
    model = create_model("tiny/4", routing="none", **setting.settings).eval()
    x, t = torch.randn(rows, 1, 8, 8), torch.zeros(rows, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, t, t)
    passes = 3 if which == TRAIN else 1
    assert steps.useful_flops(setting, "none") == passes * counter.get_total_flops()
    merged = passes * rows * 6 * 2 * 4 * 128**2  # 6 blocks, 4 tokens, D = 128
    assert steps.useful_flops(setting, "switch") - steps.useful_flops(setting, "none") == merged


def test_backward_of_the_mixture_is_found() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def part(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.tanh(x @ self.weight)
            out.detach().argsort()  # makes no node: its number is that of the next one, outside
            return out

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(self.part(torch.relu(self.outer(x))))

    model = Model()
    with steps.marked([(model, "part")]), profile(activities=[ProfilerActivity.CPU]) as run:
        model(torch.randn(3, 4)).sum().backward()
    names = [event.name.split(": ")[-1] for event in steps.of_mixture(list(run.events()))]
    assert sorted(names) == ["MmBackward0", "TanhBackward0", steps.MARK]
    assert "part" not in vars(model)


FAKE_DIT = """
    import torch
    from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
    from switch_dit import SwitchDiT, convert_official_state_dict, convert_to_official_state_dict
    from util.model_util import SCALE

    class DiT(torch.nn.Module):
        def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio,
                     class_dropout_prob, num_classes, learn_sigma, router, routing_config):
            super().__init__()
            experts, k = routing_config.param.num_experts, routing_config.param.k
            assert (routing_config.name, routing_config.taskcount) == ("DMoE", 1000)
            assert router(hidden_size, **routing_config.param).made == (hidden_size, experts, k)
            embed = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
            assert embed.num_patches == (input_size // patch_size) ** 2 and embed.patch_size[0] == patch_size
            mlp = Mlp(in_features=hidden_size, hidden_features=4 * hidden_size, act_layer=None, drop=0)
            layers = {"attn": Attention(hidden_size, num_heads=num_heads, qkv_bias=True), "mlp": mlp}
            twin = SwitchDiT(input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio,
                             num_classes, class_dropout_prob, learn_sigma, "switch", experts, k)
            official = convert_to_official_state_dict(twin.state_dict(), "switch", k)
            for layer, module in layers.items():
                assert {f"blocks.0.{layer}.{name}" for name in module.state_dict()} <= set(official)
            assert {f"x_embedder.{name}" for name in embed.state_dict()} <= set(official)
            self.twin = [twin]  # not a submodule: the parameters are those below
            for name, value in official.items():
                *path, last = name.split(".")
                owner = self
                for part in path:
                    if not hasattr(owner, part):
                        owner.add_module(part, torch.nn.Module())
                    owner = getattr(owner, part)
                if name == "full_time" or name.endswith("_unit_mapping"):
                    owner.register_buffer(last, value)
                else:
                    owner.register_parameter(last, torch.nn.Parameter(value, name != "pos_embed"))

        def forward(self, x, t, y):
            state = convert_official_state_dict(dict(self.named_parameters()))
            twin = self.twin[0].train(self.training)
            out, prior = torch.func.functional_call(twin, state, (x, t, y), {"with_prior": True})
            return (SCALE * out, prior) if self.training else SCALE * out
"""


def fake_clone(folder: Path, scale: float) -> Path:
    files = {
        "models/__init__.py": "",
        "models/DiT/models.py": textwrap.dedent(FAKE_DIT),
        "models/MoE.py": textwrap.dedent("""
            from parallel_experts import ParallelExperts

            class TaskMoE:
                def __init__(self, hidden_size, num_experts, k):
                    self.made = hidden_size, num_experts, k
        """),
        "models/parallel_linear/parallel_experts/__init__.py": "class ParallelExperts: pass",
        "util/model_util.py": f"SCALE = {scale}",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_official_model(scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers._paths, peers.OFFICIAL, fake_clone(tmp_path, scale))
    before, path = set(sys.modules), list(sys.path)
    setting = Setting(TRAIN, "tiny/4", "cpu", 4)
    official = next(c for c in steps.contenders() if c.name == peers.OFFICIAL)
    model = official.create("tiny/4", **setting.settings)
    assert sys.path == path
    new = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not new & {"models", "util", "parallel_experts", "timm"}
    assert (model.note == official_model.STANDS_IN) == ("timm" not in sys.modules)
    exact = steps.results(steps.with_random_weights("tiny/4", **setting.settings).double(), setting)
    check = steps.compare(steps.results(model, setting, official.rename), exact)
    assert (check["failure"] is None) == (scale == 1.0)


def test_official_model_only_where_a_clone_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(peers._paths, peers.OFFICIAL, raising=False)
    assert [c.name for c in steps.contenders()] == [OURS, DENSE, STRUCTURE]


def test_command_writes_a_file_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tiny = steps.SIZES["tiny/4"]._replace(batch={("cpu", TRAIN): 2, ("cpu", SAMPLE): 2})
    monkeypatch.setattr(steps, "SIZES", {"tiny/4": tiny})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    steps.main(["--seconds", "0", "--output", str(tmp_path)])
    report = result_files.read(tmp_path / "steps_cpu.json")
    assert [row["group"] for row in report["rows"]] == 3 * ["train_step"] + 3 * ["sample_step"]
    assert "tiny/4 B=2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        steps.main(["--peer-path", "official=/no/such/folder"])
