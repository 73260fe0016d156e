"""The backend ``cuda`` of expert_linear: who takes it, what refuses it, and its operators.

On a CPU plain PyTorch stands in the place of the kernels of ``csrc/expert_linear*_hopper.h``, so that all
around them is tested here.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_close, check_streams_and_graph, random_model
from test_expert_linear import check_against_reference, forward_backward, make_inputs, reference
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from switch_moe import Router, SwitchMoE, TokenMoE, __main__, native, warm_up
from switch_moe.experts import LinearExperts
from switch_moe.kernels import expert_linear_hopper as hopper
from switch_moe.kernels import measured
from switch_moe.ops import _backend, dispatch, expert_linear, linear_assignment, routed_mlp, timestep_gate
from switch_moe.reference.expert_linear import expert_linear as unmerged

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SHAPE = (3, 9, 16, 16, 3, 2)  # B, T, Din, Dout, M, k


def plain_forward(x: Tensor, experts: LinearExperts, modulate: bool, keep: bool) -> tuple[Tensor, Tensor]:
    mixture = unmerged(x, experts)
    return torch.addcmul(x, x, mixture) if modulate else mixture, mixture if keep else x.new_empty(0)


def plain_grad_x(
    grad_mixture: Tensor, grad: Tensor, mixture: Tensor | None, experts: LinearExperts, modulate: bool
) -> Tensor:
    transposed = experts._replace(weight=experts.weight.transpose(1, 2), bias=None)
    out = unmerged(grad_mixture, transposed)
    return out + grad + grad * mixture if modulate else out


def plain_gradients(
    grad_mixture: Tensor, x: Tensor, experts: LinearExperts, schedule: Tensor, grads: list[Tensor]
) -> None:
    weight, bias, index, gate = experts
    products = x.float().transpose(1, 2) @ grad_mixture.float()  # [B, Din, Dout]
    of_weight = products[:, None] * gate[..., None, None]  # [B, k, Din, Dout]
    of_bias = grad_mixture.float().sum(1)[:, None] * gate[..., None]
    of_gate = torch.einsum("bio,bkio->bk", products, weight[index].float())
    sums = torch.zeros(weight.shape).index_add_(0, index.flatten(), of_weight.flatten(0, 1))
    grads[0].copy_(sums)
    if bias is not None:
        grads[1].copy_(torch.zeros(bias.shape).index_add_(0, index.flatten(), of_bias.flatten(0, 1)))
        of_gate += torch.einsum("bo,bko->bk", grad_mixture.float().sum(1), bias[index].float())
    grads[2].copy_(of_gate)


@pytest.fixture
def hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU in the place of an H100 whose kernels are built; the list has the products that were formed."""
    if torch.cuda.is_available():
        pytest.skip("samples are sorted in Triton's interpreter, which is off beside a GPU")
    formed: list[str] = []

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        formed.append("forward")
        return plain_forward(*arguments)

    def grad_x(*arguments: Any) -> Tensor:
        formed.append("grad_x")
        return plain_grad_x(*arguments)

    def gradients(*arguments: Any) -> None:
        formed.append("gradients")
        plain_gradients(*arguments)

    for module, name in ((hopper, "device_reason"), (_backend, "cuda_reason"), (measured, "device_reason")):
        monkeypatch.setattr(module, name, lambda device: None)
    monkeypatch.setattr(hopper, "_device_reasons", {})
    monkeypatch.setattr(hopper, "forward", forward)
    monkeypatch.setattr(hopper, "grad_x", grad_x)
    monkeypatch.setattr(hopper, "_launch_gradients", gradients)
    monkeypatch.setattr(measured, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(measured, "_here", {})
    return formed


def row(**changes: Any) -> dict[str, Any]:
    return {
        "architecture": "sm_90", "dtype": "float16", "Din": 16, "Dout": 16, "M": 3, "k": 2, "modulate": False,
        "B": 2, "T": 4, "forward": 0.8, "forward+backward": 0.9, "backend": "cuda", "results": "made-up.json",
        "commit": "0123456789",
    } | changes  # fmt: skip


def use(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> None:
    monkeypatch.setattr(measured, "TABLE", measured.table(rows))
    monkeypatch.setattr(measured, "_here", {})


def call(batch: int = 2, tokens: int = 4, **changes: Any) -> tuple[Tensor, LinearExperts, bool]:
    """Arguments of ``fastest`` that the made-up row speaks for, but for the changes."""
    given = {"d_in": 16, "d_out": 16, "M": 3, "k": 2, "dtype": torch.float16, "modulate": False} | changes
    x = torch.empty(batch, tokens, given["d_in"], dtype=given["dtype"])
    weight = torch.empty(given["M"], given["d_in"], given["d_out"], dtype=given["dtype"])
    index = torch.empty(batch, given["k"], dtype=torch.int32)
    return x, LinearExperts(weight, None, index, torch.empty(batch, given["k"])), given["modulate"]


def test_auto_takes_what_was_measured_to_be_faster(hopper_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, row())
    backend, why = measured.fastest(*call())
    assert backend == "cuda"
    assert "0.80 of Triton's time forward and 0.90" in why
    assert "made-up.json, commit 0123456" in why
    for change in (
        {"d_in": 24}, {"d_out": 24}, {"M": 4}, {"k": 1}, {"dtype": torch.bfloat16}, {"modulate": True},
        {"batch": 1}, {"tokens": 6}, {"tokens": 2},
    ):  # fmt: skip
        assert measured.fastest(*call(**change)) == ("triton", "no call like it was measured on sm_90"), (
            change
        )
    assert measured.fastest(*call(batch=5, tokens=12))[0] == "cuda"


def test_the_measurement_with_the_most_tokens_decides(hopper_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, row(), row(B=64, T=8, backend="triton"))
    assert measured.fastest(*call(63, 8))[0] == "cuda"
    assert measured.fastest(*call(64, 8))[0] == "triton"
    assert measured.fastest(*call(64, 4))[0] == "cuda"


def test_auto_is_triton_without_a_measurement_of_this_gpu(hopper_gpu, monkeypatch) -> None:
    for rows in ([], [row(architecture="sm_100")], [row(backend="triton")]):
        use(monkeypatch, *rows)
        backend, why = measured.fastest(*call(M=1))
        assert backend == "triton"
        assert "no results file of sm_90 shows the CUDA kernels right and faster" in why
    use(monkeypatch, row())
    monkeypatch.setattr(measured, "device_reason", lambda device: "there are no such kernels")
    assert measured.fastest(*call()) == ("triton", "there are no such kernels")


def test_a_gpu_is_asked_once(hopper_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(measured, "device_reason", asked.append)
    monkeypatch.setattr(hopper, "device_reason", asked.append)
    for _ in range(3):
        measured.fastest(*call())
        assert hopper.reason(*call()[:2]) is None
    assert len(asked) == 2  # for the choice, and for what the operator refuses


def test_the_report_says_which_and_why(hopper_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(__main__, "triton_reason", lambda device: None)
    assert __main__._expert_linear() == (
        "triton: no results file of sm_90 shows the CUDA kernels right and faster; "
        "name backend='cuda' to try them"
    )
    use(monkeypatch, row(), row(M=4, backend="triton"))
    assert "cuda for calls like 1 of the 2 that were measured" in __main__._expert_linear()
    monkeypatch.setattr(__main__, "triton_reason", lambda device: "no Triton")
    assert __main__._expert_linear() == "reference: no Triton"
    monkeypatch.setattr(__main__, "triton_reason", lambda device: "old" if device.index else None)
    assert re.fullmatch("on cuda:0 cuda .*; on cuda:1 reference: old", __main__._expert_linear())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU here" in __main__._expert_linear()


@pytest.mark.parametrize("modulate", [False, True])
def test_output_and_gradients(hopper_gpu, modulate: bool, poisoned_memory) -> None:
    tensors, index, grad = make_inputs(SHAPE, torch.float16)
    check_against_reference(tensors, index, grad, modulate, backend="cuda")
    assert hopper_gpu == ["forward", "grad_x", "gradients"]
    x, weight, bias, gate = tensors
    weight = weight.clone().requires_grad_()  # alone: then m(x) is not kept, and dx not formed
    out = expert_linear(x, weight, bias, index, gate, modulate, backend="cuda")
    found = forward_backward(expert_linear, tensors, index, grad, modulate, backend="cuda")
    assert torch.equal(torch.autograd.grad(out, weight, grad)[0], found[2])
    assert hopper_gpu.count("forward") == 1 + hopper_gpu.count("grad_x")


def test_three_experts_of_a_sample_leave_gradients_to_triton(hopper_gpu, poisoned_memory) -> None:
    tensors, index, grad = make_inputs((3, 9, 16, 16, 4, 3), torch.float16)
    check_against_reference(tensors, index, grad, True, backend="cuda")
    assert hopper_gpu == ["forward", "grad_x"]
    many = make_inputs((2, 3, 8, 8, 33, 1), torch.float16)
    check_against_reference(*many, backend="cuda")
    assert "gradients" not in hopper_gpu


@pytest.mark.parametrize(
    ("top_k", "dtypes"),
    [(2, (torch.float32, torch.float32)), (3, (torch.float32, torch.float32)),
     (2, (torch.float32, torch.float16)), (2, (torch.float16, torch.float32))],
)  # fmt: skip
def test_gradients_of_single_weights_are_not_rounded(
    hopper_gpu, top_k: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Under autocast the kernels read half weights, and write the gradients of the float32 ones.

    ``dtypes`` are those of the weight and the bias, of which each has a gradient of its own type.
    """
    (x, weight, bias, gate), index, grad = make_inputs((3, 9, 16, 16, 4, top_k), torch.float16)
    types = (torch.float32, *dtypes, torch.float32)
    leaves = [one.to(of).requires_grad_() for one, of in zip((x, weight, bias, gate), types, strict=True)]
    with torch.autocast("cpu", torch.float16):
        out = expert_linear(*leaves[:3], index, leaves[3], backend="cuda")
    found = torch.autograd.grad(out, leaves, grad)
    wide = [one.double().requires_grad_() for one in (x, weight, bias, gate)]
    exact = torch.autograd.grad(
        unmerged(wide[0], LinearExperts(*wide[1:3], index, wide[3])), wide, grad.double()
    )
    assert [one.dtype for one in found] == list(types)
    for name, one, of in zip(("weight", "bias"), found[1:], exact[1:], strict=False):
        assert_close(name, one, of, 1e-6 if one.dtype == torch.float32 else 1e-3)
    # Without autocast the gradients have the type of the weights.
    halves = forward_backward(expert_linear, [x, weight, bias, gate], index, grad, False, backend="cuda")
    assert [one.dtype for one in halves[2:4]] == [torch.float16] * 2


@pytest.mark.parametrize("backend", ["cuda", "native"])
def test_activation_checkpointing(hopper_gpu, backend: str) -> None:
    """It hands out what a backward has saved once only, and forms the output again under autocast."""
    tensors, index, grad = make_inputs(SHAPE, torch.float16)
    leaves = [one.float().requires_grad_() for one in tensors]

    def run(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return expert_linear(x, weight, bias, index, gate, True, backend=backend)

    with torch.autocast("cpu", torch.float16):
        out, again = run(*leaves), checkpoint(run, *leaves, use_reentrant=False)
    expected = torch.autograd.grad(out, leaves, grad)
    for a, e in zip(torch.autograd.grad(again, leaves, grad), expected, strict=True):
        assert torch.equal(a, e)


def test_second_derivatives_of_single_weights(hopper_gpu) -> None:
    (x, weight, bias, gate), index, grad = make_inputs(SHAPE, torch.float16)
    weight = weight.float().requires_grad_()
    x.requires_grad_()
    found = []
    for backend in ("cuda", "reference"):
        with torch.autocast("cpu", torch.float16):
            out = expert_linear(x, weight, bias.float(), index, gate, True, backend=backend)
        (of_x,) = torch.autograd.grad(out, x, grad, create_graph=True)
        found.append(torch.autograd.grad(of_x.float().square().sum(), weight)[0])
    assert found[0].count_nonzero() > 0
    assert_close("second derivative", found[0], found[1], 1e-3)


def test_frozen_weights_are_not_saved_before_their_cast(hopper_gpu) -> None:
    """A backward needs their cast alone, so they may be inference tensors, or change after the forward."""
    (x, weight, bias, gate), index, grad = make_inputs(SHAPE, torch.float16)
    x.requires_grad_()

    def grad_x(weight: Tensor, change: bool = False) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            out = expert_linear(x, weight, bias.float(), index, gate, backend="cuda")
        if change:
            weight.zero_()
        return torch.autograd.grad(out, x, grad)[0]

    with torch.inference_mode():
        kept = weight.float()
    expected = grad_x(weight)
    assert torch.equal(grad_x(kept), expected)
    assert torch.equal(grad_x(weight.float(), change=True), expected)


def test_single_is_for_the_cuda_kernels(hopper_gpu) -> None:
    (x, weight, bias, gate), index, grad = make_inputs(SHAPE, torch.float16)
    with pytest.raises(ValueError, match="single is True; backend 'triton' has gradients in the type of x"):
        torch.ops.switch_moe.expert_linear_backward(
            grad, x, weight, bias, index, gate, None, False, [True] * 4, "triton", None, True
        )


def test_gradients_of_no_tokens_are_zero(hopper_gpu, poisoned_memory) -> None:
    (x, weight, bias, gate), index, grad = make_inputs((3, 0, 16, 16, 3, 2), torch.float16)
    given = (grad, x, weight, bias, index, gate, None, False, [True] * 4, "cuda")
    found = torch.ops.switch_moe.expert_linear_backward(*given)
    for one, of in zip(found, (x, weight, bias, gate), strict=True):
        assert torch.equal(one, torch.zeros_like(of))


def test_opcheck(hopper_gpu) -> None:
    (x, weight, bias, gate), index, grad = make_inputs(SHAPE, torch.float16)
    given = (x, weight, bias, index, gate)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.switch_moe.expert_linear, (*given, True, True, "cuda"), test_utils=tests)
    for wanted, single in (([True] * 4, False), ([True] * 4, True), ([True, False, False, False], False)):
        torch.library.opcheck(
            torch.ops.switch_moe.expert_linear_backward,
            (grad, *given, x, True, wanted, "cuda", None, single), test_utils=tests,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("dynamic", "autocast"),
    [pytest.param(False, False, marks=pytest.mark.slow), (True, False),
     pytest.param(False, True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_auto_compiles_whole(
    hopper_gpu, dynamic: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is part of the program, and breaks no graph."""
    use(monkeypatch, row(B=1, T=3))
    operation = importlib.import_module("switch_moe.ops.expert_linear")
    monkeypatch.setattr(operation, "choose", lambda *_: "triton")  # as on a GPU
    tensors, index, grad = make_inputs(SHAPE, torch.float16)
    if autocast:
        tensors = [one.float() for one in tensors]

    def run(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return expert_linear(*arguments)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    eager = forward_backward(run, tensors, index, grad, False)
    assert hopper_gpu == ["forward", "grad_x", "gradients"]
    monkeypatch.setattr(measured, "_here", {})
    for _ in range(2):
        for a, e in zip(forward_backward(compiled, tensors, index, grad, False), eager, strict=True):
            assert torch.equal(a, e)
            assert a.dtype == e.dtype
    assert hopper_gpu == 3 * ["forward", "grad_x", "gradients"]
    assert counter.frame_count == 1  # a device that was asked while the call was traced is no new program


def test_a_schedule_is_taken_and_checked(hopper_gpu) -> None:
    tensors, index, grad = make_inputs(SHAPE, torch.float16)
    expected = forward_backward(expert_linear, tensors, index, grad, False, backend="cuda")
    given = {"schedule": dispatch(index, 3), "backend": "cuda"}
    for a, e in zip(
        forward_backward(expert_linear, tensors, index, grad, False, **given), expected, strict=True
    ):
        assert torch.equal(a, e)
    with pytest.raises(ValueError, match="schedule is of other experts"):
        forward_backward(expert_linear, tensors, (index + 1) % 3, grad, False, **given)


def test_one_route_for_all_merges_once(hopper_gpu) -> None:
    (x, weight, bias, gate), index, _ = make_inputs(SHAPE, torch.float16)
    out = expert_linear(x, weight, bias, index[:1], gate[:1], backend="cuda")
    assert_close("out", out, reference(x, weight, bias, index[:1], gate[:1]), 2e-3)
    assert hopper_gpu == []


def test_what_stands_in_the_way(hopper_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Tensor:
        (x, weight, bias, gate), index, _ = make_inputs(shape, dtype)
        return expert_linear(x, weight, bias, index, gate, backend="cuda")

    with pytest.raises(TypeError, match=r"x is torch\.float32; it must be torch\.bfloat16 or torch\.float16"):
        run(SHAPE, torch.float32)
    cannot = "backend 'cuda' of expert_linear cannot run: "
    with pytest.raises(RuntimeError, match=cannot + "Din and Dout are 12 and 16; .* multiples of 8"):
        run((3, 9, 12, 16, 3, 2))
    with pytest.raises(RuntimeError, match=cannot + "top_k is 5; the CUDA kernels take at most 4"):
        run((3, 9, 16, 16, 6, 5))
    x, *rest, gate = make_inputs(SHAPE, torch.float32)[0]
    index = torch.zeros(3, 2, dtype=torch.int32)
    operator = torch.ops.switch_moe.expert_linear
    with pytest.raises(RuntimeError, match=re.escape(cannot + "x is torch.float32")):  # called directly too
        operator(x, *rest, index, gate, False, False, "cuda")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=cannot + "the CUDA kernels run on CUDA tensors, not on cpu"):
        run(SHAPE)


def test_why_a_device_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 9.0, not 8.0" in hopper.device_reason(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "cuda", native.NativeModule("switch_moe._absent", "the remedy"))
    assert hopper.device_reason(device) == "switch_moe._absent is not built; the remedy"
    native.cuda.module = SimpleNamespace(architectures="80 100+PTX", __name__="made_up")
    assert "made_up was built for 80 100+PTX, not for 90a" in hopper.device_reason(device)
    native.cuda.module.architectures = "80 90a"
    assert hopper.device_reason(device) is None
    monkeypatch.setattr(_backend, "triton_reason", lambda device: "no Triton")  # some gradients need it
    monkeypatch.setattr(_backend, "cuda_reason", lambda device: None)
    tensors, index, _ = make_inputs(SHAPE, torch.float16)
    with pytest.raises(RuntimeError, match="cannot run: no Triton"):
        expert_linear(*tensors[:3], index, tensors[3], backend="cuda")


@pytest.mark.skipif(native.cuda.module is None, reason="needs the CUDA module; CI builds it")
def test_the_compiled_module_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers check sizes before they ask for a device, so this runs without one."""
    compiled = native.cuda.module
    with pytest.raises(ValueError, match="weight_gradient: sizes that no kernel takes"):
        compiled.weight_gradient_workspace(
            batch=1, tokens=1, inputs=8, outputs=8, num_experts=33, top_k=1, bias=True
        )
    module = SimpleNamespace(
        weight_gradient_workspace=lambda **sizes: 16,
        weight_gradient=compiled.weight_gradient,
        merged_product=compiled.merged_product,
    )
    monkeypatch.setattr(native.cuda, "module", module)
    monkeypatch.setattr(hopper, "address", lambda tensor, dtype, numbers, device: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    (x, weight, bias, gate), index, grad = make_inputs((2, 3, 8, 8, 6, 5), torch.float16)
    experts = LinearExperts(weight, bias, index, gate)
    with pytest.raises(ValueError, match="weight_gradient: sizes that no kernel takes"):
        hopper._launch_gradients(grad, x, experts, torch.zeros(20, dtype=torch.int32), [weight, bias, gate])
    with pytest.raises(ValueError, match="merged_product_cuda: sizes that no kernel takes"):
        hopper.forward(x, experts, False, False)
    with pytest.raises(ValueError, match="merged_product_cuda: sizes that no kernel takes"):
        hopper.grad_x(grad, grad, None, experts, False)


def test_operations_without_cuda_kernels_say_so() -> None:
    embedding, weight = torch.zeros(2, 4), torch.zeros(1, 3, 4)
    with pytest.raises(RuntimeError, match="backend 'cuda' of timestep_gate cannot run: it has no CUDA"):
        timestep_gate(embedding, weight, torch.zeros(1, 3), 2, backend="cuda")
    with pytest.raises(RuntimeError, match="linear_assignment cannot run: its CUDA kernel is backend 'nat"):
        linear_assignment(torch.zeros(2, 2), backend="cuda")
    others = [one for one in _backend.OPERATIONS if not one.cuda]
    assert len(others) == len(_backend.OPERATIONS) - 1
    for one in others:
        with pytest.raises(RuntimeError, match=f"backend 'cuda' of {one.name} cannot run"):
            _backend.choose(one, "cuda", embedding)
    assert routed_mlp.__name__ in {one.name for one in others}


def test_layers(hopper_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of a layer run by CUDA kernels, and its router and merged experts by what there is."""
    layer = SwitchMoE(16, backend="cuda").half()
    torch.nn.init.normal_(layer.weight)
    x, embedding = torch.randn(2, 5, 16).half(), torch.randn(2, 16)
    assert layer.router.backend == "auto"
    found = layer(x, embedding)
    assert hopper_gpu == ["forward"]
    same = SwitchMoE(16, backend="reference").half()
    same.load_state_dict(layer.state_dict())
    assert_close("layer", found, same(x, embedding), 2e-3)
    merged = layer.merge(layer.route(embedding[:1]))
    assert_close("merged", merged(x), same(x, embedding[:1]), 2e-3)
    routing = layer.route(embedding)
    assert routing.scheduled("cuda").schedule is None  # no Triton kernel reads one on this CPU
    monkeypatch.setattr("switch_moe.router.runs_triton", lambda *_: True)
    assert torch.equal(layer(x, routing=routing.scheduled("cuda")), found)
    hopper_gpu.clear()
    warm_up(layer, [(2, 5)])
    assert set(hopper_gpu) == {"forward", "grad_x", "gradients"}


def test_layers_without_cuda_kernels_say_so() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'; mlp experts have no CUDA kernels"):
        SwitchMoE(16, expert="mlp", backend="cuda")
    with pytest.raises(ValueError, match="backend is 'cuda'; these experts have no CUDA kernels"):
        TokenMoE(16, 4, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'cuda'; these experts have no CUDA kernels"):
        random_model(routing="dit_moe", backend="cuda")
    assert random_model(backend="cuda").router.backend == "auto"
    with pytest.raises(RuntimeError, match="timestep_gate cannot run: it has no CUDA kernel"):
        Router(1, 16, backend="cuda")(torch.zeros(2, 16))


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(3, 40, 24, 40, 3, 2), (5, 256, 192, 192, 16, 4), (4, 300, 384, 384, 3, 1)], ids=str
)
def test_operator_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype, poisoned_memory) -> None:
    """Output and every gradient, with fewer and more experts than the kernels keep sums of at once."""
    tensors, index, grad = make_inputs(shape, dtype)
    tensors, index, grad = [one.cuda() for one in tensors], index.cuda(), grad.cuda()
    for modulate in (False, True) if shape[2] == shape[3] else (False,):
        check_against_reference(tensors, index, grad, modulate, backend="cuda")


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
def test_auto_compiles_whole_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What auto takes is asked for while torch.compile traces the call."""
    use(monkeypatch, row(B=1, T=3))
    tensors, index, grad = make_inputs(SHAPE, torch.float16)
    moved = [one.cuda() for one in tensors], index.cuda(), grad.cuda(), False
    expected = forward_backward(expert_linear, *moved, backend="cuda")
    monkeypatch.setattr(measured, "_here", {})
    compiled = torch.compile(lambda *given: expert_linear(*given), fullgraph=True, backend="aot_eager")
    for a, e in zip(forward_backward(compiled, *moved), expected, strict=True):
        assert torch.equal(a, e)
    assert (
        measured.fastest(moved[0][0], LinearExperts(*moved[0][1:3], moved[1], moved[0][3]), False)[0]
        == "cuda"
    )


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
def test_operator_on_any_stream_and_in_a_graph() -> None:
    tensors, index, grad = make_inputs((4, 256, 384, 384, 3, 2), torch.bfloat16)
    moved = [one.cuda() for one in tensors], index.cuda(), grad.cuda(), True
    expected = forward_backward(expert_linear, *moved, backend="cuda")
    check_streams_and_graph(lambda: forward_backward(expert_linear, *moved, backend="cuda"), expected)
