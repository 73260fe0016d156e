"""timestep_gate: values, ties and gradients against the float64 reference, in plain PyTorch and in Triton."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import assert_close, relative_rms
from torch import Tensor

from switch_moe.kernels import _launch
from switch_moe.ops import timestep_gate
from switch_moe.ops.timestep_gate import selected_experts
from switch_moe.reference.timestep_gate import timestep_gate as reference

# L, N', M, D, k: odd sizes, one of everything, no rows, no channels, many experts, ragged tiles of channels
SHAPES = [
    (3, 7, 3, 16, 2),
    (1, 1, 1, 1, 1),
    (6, 33, 8, 48, 4),
    (2, 0, 3, 16, 2),
    (2, 3, 3, 0, 2),
    (4, 5, 3, 10, 3),
    (9, 5, 3, 256, 2),
    (2, 66, 16, 130, 2),
    (2, 5, 40, 20, 3),
]
NAMES = ("probs", "index", "gate", "embedding", "weight", "bias")
BACKENDS = ["auto", "triton"]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_inputs(shape: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    """embedding, weight, bias; logits of unit scale."""
    depth, rows, experts, size, _ = shape
    torch.manual_seed(0)
    weight = torch.randn(depth, experts, size) / max(size, 1) ** 0.5
    return [t.to(device) for t in (torch.randn(rows, size), weight, torch.randn(depth, experts))]


def make_grads(shape: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    depth, rows, experts, _, top_k = shape
    return [torch.randn(depth, rows, size).to(device) for size in (experts, top_k)]


def forward_backward(
    function, tensors: list[Tensor], top_k: int, grads: list[Tensor | None], **options: str
) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    probs, index, gate = function(*leaves, top_k, **options)
    pairs = [(out, grad) for out, grad in zip((probs, gate), grads, strict=True) if grad is not None]
    gradients = torch.autograd.grad([out for out, _ in pairs], leaves, [grad for _, grad in pairs])
    return [probs.detach(), index, gate.detach(), *gradients]


def check_against_reference(
    tensors: list[Tensor], top_k: int, grads: list[Tensor | None], **options: str
) -> None:
    actual = forward_backward(timestep_gate, tensors, top_k, grads, **options)
    exact_grads = [None if grad is None else grad.double() for grad in grads]
    exact = forward_backward(reference, [t.double() for t in tensors], top_k, exact_grads)
    assert actual[1].dtype == torch.int32
    assert torch.equal(actual[1], exact[1])
    for name, a, e in zip(NAMES, actual, exact, strict=True):
        if name != "index":
            assert a.dtype == (tensors[0].dtype if name == "embedding" else torch.float32), name
            low = name == "embedding" and a.dtype != torch.float64
            assert_close(name, a, e, max(1e-5, torch.finfo(a.dtype).eps / 2 if low else 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, ...], backend: str, device: str) -> None:
    check_against_reference(make_inputs(shape, device), shape[-1], make_grads(shape, device), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [0, 1])
def test_one_gradient_absent(absent: int, backend: str, device: str) -> None:
    shape = (3, 7, 3, 16, 2)
    grads: list[Tensor | None] = [*make_grads(shape, device)]
    grads[absent] = None
    check_against_reference(make_inputs(shape, device), 2, grads, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_for_nobody_and_one_for_everybody(backend: str, device: str) -> None:
    shape = (3, 7, 4, 16, 2)
    embedding, weight, bias = make_inputs(shape, device)
    bias[:, 1], bias[:, 2] = -8, 4
    check_against_reference([embedding, weight, bias], 2, make_grads(shape, device), backend=backend)
    probs, index, _, table = timestep_gate(embedding, weight, bias, 2, selected=True, backend=backend)
    table = table.view(7, 3, 4)
    assert (table[:, :, 1] == 0).all()
    assert (table[:, :, 2] == 1).all()
    assert torch.equal(table.flatten(1), selected_experts(probs, index))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_selected(shape: tuple[int, ...], backend: str, device: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in make_inputs(shape, device)]
    probs, index, _, table = timestep_gate(*tensors, shape[-1], selected=True, backend=backend)
    assert table.dtype == torch.float32
    assert not table.requires_grad
    assert torch.equal(table, selected_experts(probs.detach(), index))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lowest_index_wins_a_tie(backend: str, device: str) -> None:
    zeros = [torch.zeros(1, 40, 4, device=device), torch.zeros(1, 40, device=device)]
    _, index, _ = timestep_gate(torch.ones(2, 4, device=device), *zeros, 5, backend=backend)
    assert index.tolist() == [[[0, 1, 2, 3, 4]] * 2]
    bias = torch.tensor([[0.0, 1.0, 1.0, 0.0]], device=device)
    ones, zero = torch.ones(1, 4, device=device), torch.zeros(1, 4, 4, device=device)
    _, index, _ = timestep_gate(ones, zero, bias, 3, backend=backend)
    assert index.tolist() == [[[1, 2, 0]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_rows_and_in_range(backend: str, device: str) -> None:
    embedding, weight, bias = make_inputs((3, 9, 3, 16, 2), device)
    clean = timestep_gate(embedding, weight, bias, 2, backend=backend)
    embedding[4, 3], embedding[6, 5] = float("nan"), float("inf")
    probs, index, gate, table = timestep_gate(embedding, weight, bias, 2, selected=True, backend=backend)
    bad = torch.tensor([4, 6], device=device)
    assert probs[:, bad].isnan().all()
    assert gate[:, bad].isnan().all()
    assert (index[:, bad] == torch.tensor([0, 1], device=device)).all()
    assert (table[bad].view(2, 3, 3) == torch.tensor([1.0, 1.0, 0.0], device=device)).all()
    rest = [row for row in range(9) if row not in (4, 6)]
    for after, before in zip((probs, index, gate), clean, strict=True):
        assert torch.equal(after[:, rest], before[:, rest])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_are_not_renormalised(backend: str, device: str) -> None:
    probs, index, gate = timestep_gate(*make_inputs((3, 7, 5, 16, 2), device), 2, backend=backend)
    assert torch.equal(gate, probs.gather(2, index.long()))
    assert (gate.sum(-1) < 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_inside_whatever_comes_in(dtype: torch.dtype, backend: str, device: str) -> None:
    shape = (3, 7, 3, 40, 2)
    embedding, weight, bias = make_inputs(shape, device)
    with torch.autocast(device, torch.bfloat16):
        check_against_reference(
            [embedding.to(dtype), weight, bias], 2, make_grads(shape, device), backend=backend
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str, device: str) -> None:
    tensors = make_inputs((5, 7, 3, 24, 2), device)
    ones = [torch.ones(5, 7, size, device=device) for size in (3, 2)]
    expected = forward_backward(timestep_gate, tensors, 2, [ones[0].cumsum(2), ones[1]], backend=backend)
    embedding, weight, bias = tensors
    strided = [embedding.t().contiguous().t(), weight.mT.contiguous().mT, bias.t().contiguous().t()]
    leaves = [tensor.detach().requires_grad_() for tensor in strided]
    probs, index, gate = timestep_gate(*leaves, 2, backend=backend)
    steps = torch.arange(1.0, 4.0, device=device).repeat(5)  # gradients: transposed, and an expanded scalar
    ((probs.transpose(0, 1).flatten(1) * steps).sum() + gate.sum()).backward()
    found = [probs, index, gate, *[leaf.grad for leaf in leaves]]
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert_close(name, a, e, 1e-6)


def test_triton_repeats_bit_for_bit(device: str) -> None:
    shape = (5, 33, 3, 200, 2)
    tensors, grads = make_inputs(shape, device), make_grads(shape, device)
    first, second = (forward_backward(timestep_gate, tensors, 2, grads, backend="triton") for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("function", "wrong"), [("forward", 0), ("backward", 0), ("backward", 1)])
def test_a_broken_kernel_is_noticed(
    function: str, wrong: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = importlib.import_module("switch_moe.kernels.timestep_gate")
    original = getattr(kernels, function)

    def broken(*arguments):
        results = original(*arguments)
        results[wrong].view(-1)[0] += results[wrong].norm() / 1000
        return results

    monkeypatch.setattr(kernels, function, broken)
    shape = SHAPES[0]
    with pytest.raises(AssertionError, match="relative RMS"):
        check_against_reference(make_inputs(shape, device), 2, make_grads(shape, device), backend="triton")


def test_programs_fill_a_gpu() -> None:
    kernels = importlib.import_module("switch_moe.kernels.timestep_gate")
    embedding, weight = torch.empty(1256, 1152, device="meta"), torch.empty(28, 3, 1152, device="meta")
    with _launch.record(90) as launches:
        probs, index, gate, table = kernels.forward(embedding, weight, weight[:, :, 0], 2, True)
        kernels.backward(probs, gate, embedding, weight, probs, index)
    assert table.shape == (1256, 84)
    assert len(launches) == 3
    assert all(launch.programs >= 132 for launch in launches)  # the multiprocessors of an H200


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_opcheck(path: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    embedding, weight, bias = make_inputs((3, 7, 4, 16, 2), device)
    operators = torch.ops.switch_moe
    for selected in (False, True):
        arguments = (embedding, weight, bias, 2, selected, path)
        torch.library.opcheck(operators.timestep_gate.default, arguments)
    probs, index, gate = timestep_gate(embedding, weight, bias, 2)
    for grads in ((probs, gate), (None, gate), (probs, None)):
        arguments = (*grads, embedding, weight, probs, index, path)
        torch.library.opcheck(operators.timestep_gate_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("absent", [None, 0, 1])
def test_compile_fullgraph(absent: int | None, autocast: bool, backend: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    shape = (3, 7, 4, 16, 2)
    tensors, grads = make_inputs(shape, device), [*make_grads(shape, device)]
    if absent is not None:
        grads[absent] = None

    def function(*arguments):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return timestep_gate(*arguments, backend=backend)

    eager = forward_backward(function, tensors, 2, grads)
    whole = absent is None and not autocast
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if whole else "aot_eager")
    compiled = forward_backward(compiled, tensors, 2, grads)
    for name, a, e in zip(NAMES, compiled, eager, strict=True):
        assert_close(name, a, e, 1e-5)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_operators_stay_in_float32_under_autocast(path: str, device: str) -> None:
    embedding, weight, bias = make_inputs((3, 7, 3, 40, 2), device)
    operators = torch.ops.switch_moe

    def both() -> list[Tensor]:
        probs, index, gate, _ = operators.timestep_gate(embedding, weight, bias, 2, False, path)
        found = operators.timestep_gate_backward(probs, gate, embedding, weight, probs, index, path)
        return [probs, index, gate, *found]

    with torch.autocast(device, torch.bfloat16):
        lower = both()
    for name, a, e in zip(NAMES, lower, both(), strict=True):
        assert a.dtype == e.dtype
        assert relative_rms(a, e) == 0, name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embedding": torch.zeros(4)}, ValueError, r"embedding has shape \(4,\); it must be \[N', D\]"),
        (
            {"weight": torch.zeros(2, 3, 5)},
            ValueError,
            r"weight has shape \(2, 3, 5\); it must be \[L, M, 4\]",
        ),
        ({"bias": torch.zeros(2, 4)}, ValueError, r"bias has shape \(2, 4\); it must be \[2, 3\]"),
        (
            {"weight": torch.zeros(2, 3, 4).double()},
            TypeError,
            "weight is torch.float64; it must be torch.float32",
        ),
        ({"top_k": 0}, ValueError, "top_k is 0; it must be between 1 and the number of experts, 3"),
        ({"top_k": 4}, ValueError, "top_k is 4; it must be between 1"),
        ({"backend": "native"}, RuntimeError, "timestep_gate has no compiled kernel for cpu tensors; use"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'; it must be one of auto, reference, native"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "embedding": torch.zeros(5, 4),
        "weight": torch.zeros(2, 3, 4),
        "bias": torch.zeros(2, 3),
        "top_k": 2,
    }
    with pytest.raises(error, match=message):
        timestep_gate(**{**arguments, **change})


def test_triton_needs_its_interpreter_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' of timestep_gate cannot run: a CPU"):
        timestep_gate(*make_inputs(SHAPES[0]), 2, backend="triton")


def test_reference_gradients() -> None:
    leaves = [tensor.double().requires_grad_() for tensor in make_inputs((2, 3, 3, 4, 2))]
    assert torch.autograd.gradcheck(lambda e, w, b: reference(e, w, b, 2)[::2], leaves)
