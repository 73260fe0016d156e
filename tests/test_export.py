"""torch.export and torch.onnx.export of the layers and of the whole model."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from helpers import assert_close, random_model
from switch_dit import GaussianDiffusion
from torch import Tensor, nn

from switch_moe import SwitchMoE

KINDS = ("linear", "mlp", "swiglu")


def layer(kind: str, backend: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    made = SwitchMoE(16, expert=kind, backend=backend).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made, (torch.randn(4, 20, 16), torch.randn(4, 16))


def model(routing: str, backend: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    return random_model(routing=routing, backend=backend).eval(), (x, torch.tensor([3, 500]), y)


def modules(backend: str) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    return [
        *(layer(kind, backend) for kind in KINDS),
        *(model(r, backend) for r in ("switch", "dtr", "none")),
    ]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_torch_export(backend: str) -> None:
    for module, inputs in modules(backend):
        program = torch.export.export(module, inputs)
        assert_close("out", program.module()(*inputs), module(*inputs), 1e-6)
        operators = {str(node.target) for node in program.graph.nodes}
        own = any("switch_moe" in name for name in operators)
        assert own == (backend == "auto" and any(isinstance(part, SwitchMoE) for part in module.modules()))


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_a_loss_leaves_the_process_alone(strict: bool) -> None:
    """Its tables move to a device once, and must not stay there as an export's tensors without values."""
    diffusion = GaussianDiffusion()

    class Noised(nn.Module):
        def forward(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            return diffusion.q_sample(x, t, noise)

    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    program = torch.export.export(Noised(), (x, t, x), strict=strict)
    right = GaussianDiffusion().q_sample(x, t, x)
    for found in (diffusion.q_sample(x, t, x), program.module()(x, t, x)):
        assert type(found) is Tensor
        assert torch.equal(found, right)


def test_an_exported_operator_checks_its_arguments() -> None:
    """What a program calls is the operator, which must not read beyond its arguments."""
    x, weight, bias = torch.zeros(2, 60, 16), torch.zeros(3, 16, 16), torch.zeros(3, 16)
    index, gate = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2)
    right = {"x": x, "weight": weight, "bias": bias, "index": index, "gate": gate}
    wrong = {
        "x": x[..., :8], "weight": weight[:, :8], "bias": bias[:1], "index": index[:1], "gate": gate[:, :1],
    }  # fmt: skip
    forward, backward = torch.ops.switch_moe.expert_linear, torch.ops.switch_moe.expert_linear_backward
    for name, value in wrong.items():
        given = list((right | {name: value}).values())
        for backend in ("native", "triton"):
            with pytest.raises(ValueError, match=r"shape|numbers side by side"):
                forward(*given, False, False, backend)
            with pytest.raises((ValueError, RuntimeError)):
                backward(torch.zeros(2, 60, 16), *given, None, False, [True] * 4, backend)
    with pytest.raises(ValueError, match="grad has shape"):
        backward(torch.zeros(2, 59, 16), *right.values(), None, False, [True] * 4, "native")
    with pytest.raises(ValueError, match="expert_index holds"):
        forward(x, weight, bias, index + 3, gate, False, False, "native")
    probs, table, steps = torch.zeros(2, 6), torch.zeros(9, 6), torch.zeros(2).long()
    with pytest.raises(ValueError, match="table has shape"):
        torch.ops.switch_moe.diffusion_prior_loss(probs, table[0], steps, torch.arange(6), 2, 4)
    embedding, router = torch.zeros(4, 8), torch.zeros(2, 3, 8)
    for shape in ((2, 3, 7), (2, 3)):
        with pytest.raises(ValueError, match="weight has shape"):
            torch.ops.switch_moe.timestep_gate(
                embedding, torch.zeros(shape), torch.zeros(2, 3), 2, False, "triton"
            )
    with pytest.raises(ValueError, match="bias has shape"):
        torch.ops.switch_moe.timestep_gate(embedding, router, torch.zeros(2, 2), 2, False, "triton")
    for cost in (torch.zeros(3, 4), torch.zeros(3)):
        with pytest.raises(ValueError, match="numbers side by side"):
            torch.ops.switch_moe.linear_assignment(cost)
    with pytest.raises(ValueError, match="numbers side by side"):
        torch.ops.switch_moe.linear_assignment_from(torch.zeros(3, 3), torch.zeros(2, dtype=torch.float64))
    with pytest.raises((ValueError, TypeError)):
        torch.ops.switch_moe.linear_assignment_from(torch.zeros(3, 3), torch.zeros(3))
    tables, orders = [torch.zeros(5, 4)] * 2, [torch.arange(4)] * 2
    with pytest.raises(ValueError, match="numbers side by side"):
        torch.ops.switch_moe.match_columns(tables[0], tables[1][:4], *orders)
    with pytest.raises(ValueError, match="numbers side by side"):
        torch.ops.switch_moe.match_columns(*tables, orders[0][:3], orders[1])


def test_onnx() -> None:
    """The graph holds plain products, and computes the same; onnx and onnxscript need not be installed."""
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    for module, inputs in modules("auto"):
        program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
        session = evaluator(program.model_proto)
        feed = {name: value.numpy() for name, value in zip(session.input_names, inputs, strict=True)}
        (out,) = session.run(None, feed)
        assert_close("out", torch.from_numpy(np.asarray(out)), module(*inputs), 1e-4)


def test_what_onnx_traces_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has neither operators of our own nor a stable sort."""
    for name in ("ops._backend", "ops.timestep_gate", "reference.timestep_gate"):
        module = importlib.import_module(f"switch_moe.{name}")
        monkeypatch.setattr(module, "exporting_onnx", lambda: True)
    for module, inputs in modules("auto"):
        program = torch.export.export(module, inputs)
        operators = {str(node.target) for node in program.graph.nodes}
        assert not [name for name in operators if "switch_moe" in name or "sort" in name]
        assert_close("out", program.module()(*inputs), module(*inputs), 1e-5)
