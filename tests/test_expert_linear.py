"""expert_linear: forward and every gradient against the float64 reference, on the CPU paths.

That where experts merge inside the product has more tests in test_fused_product.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import assert_close, assert_error_rule, count_merges
from torch import Tensor

from switch_moe import native
from switch_moe.cpu import expert_linear as cpu
from switch_moe.ops import expert_linear

reference = functools.partial(expert_linear, backend="reference")
# B, T, Din, Dout, M, k: merged and grouped, odd sizes, one token, one sample, sizes past a tile of the merge
SHAPES = [
    (5, 70, 48, 40, 3, 2),
    (5, 3, 48, 40, 3, 2),
    (4, 201, 33, 33, 8, 4),
    (3, 7, 17, 17, 3, 1),
    (6, 200, 16, 16, 3, 1),
    (1, 1, 5, 3, 2, 2),
    (1, 64, 130, 130, 4, 3),
    (40, 33, 8, 8, 16, 16),
    (30, 64, 24, 24, 2, 2),
]
NAMES = ("x", "weight", "bias", "gate")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_workspace(poisoned_memory: None) -> None:
    """The kept workspace holds NaN, as all fresh memory does."""
    for kept in vars(cpu._workspaces).values():
        kept.fill_(float("nan"))


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, weight, bias, gate (unit-scale outputs), then the index and a gradient of the output."""
    batch, tokens, d_in, d_out, experts, top_k = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, d_in, generator=generator).to(dtype)
    weight = (torch.randn(experts, d_in, d_out, generator=generator) / d_in**0.5).to(dtype)
    bias = torch.randn(experts, d_out, generator=generator).to(dtype)
    gate = torch.rand(batch, top_k, generator=generator)
    index = torch.rand(batch, experts, generator=generator).argsort(1)[:, :top_k].int()
    grad = torch.randn(batch, tokens, d_out, generator=generator).to(dtype)
    return [x, weight, bias, gate], index, grad


def forward_backward(function, tensors: list[Tensor], index: Tensor, grad: Tensor, modulate: bool, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    x, weight, bias, gate = leaves
    out = function(x, weight, bias, index, gate, modulate, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def merge_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged weights go through memory, as on a processor without AVX2."""
    monkeypatch.setattr(cpu, "vector_width", lambda dtype: 0)


def check_against_reference(
    tensors: list[Tensor], index: Tensor, grad: Tensor, modulate: bool = False, **options: str
) -> None:
    dtype = tensors[0].dtype
    actual = forward_backward(expert_linear, tensors, index, grad, modulate, **options)
    exact = forward_backward(reference, [t.double() for t in tensors], index, grad.double(), modulate)
    same_type = forward_backward(reference, tensors, index, grad, modulate)
    for name, a, e, s in zip(("out", *NAMES), actual, exact, same_type, strict=True):
        assert_error_rule(name, a, e, s, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype)
    for modulate in [False, True] if shape[2] == shape[3] else [False]:
        check_against_reference(*inputs, modulate=modulate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["grouped", "merged", "fused"])
@pytest.mark.parametrize("shape", [(9, 20, 40, 24, 3, 2), (64, 2, 48, 48, 3, 2), (3, 2, 70, 70, 5, 5)])
def test_every_path(shape, path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "merging_pays", lambda *_: path != "grouped")
    if path == "merged":
        merge_apart(monkeypatch)
    check_against_reference(*make_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routes_in_a_round", [1, 2, 3])
def test_rounds(routes_in_a_round: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_apart(monkeypatch)
    itemsize = 4 if dtype == torch.float16 else dtype.itemsize  # float16 is computed in float32
    monkeypatch.setattr(cpu, "WORKSPACE_BYTES", routes_in_a_round * 30 * 30 * itemsize)
    check_against_reference(*make_inputs((5, 50, 30, 30, 4, 2), dtype))


@pytest.mark.parametrize("merged", [False, True])
def test_an_expert_for_nobody_and_one_for_everybody(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "merging_pays", lambda *_: merged)
    tensors, index, grad = make_inputs((6, 10, 16, 16, 4, 2), torch.float32)
    index[:, 0], index[:, 1] = 2, torch.tensor([0, 3, 0, 3, 0, 3])
    check_against_reference(tensors, index, grad)
    gradients = forward_backward(expert_linear, tensors, index, grad, False)
    assert gradients[2][1].count_nonzero() == 0
    assert gradients[3][1].count_nonzero() == 0


@pytest.mark.parametrize("merged", [False, True])
def test_one_expert_twice_and_zero_gates(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "merging_pays", lambda *_: merged)
    tensors, index, grad = make_inputs((4, 10, 16, 16, 3, 2), torch.float32)
    index[0] = 1
    tensors[3][1] = 0
    check_against_reference(tensors, index, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 8, 4, 4, 3, 2), (2, 0, 4, 4, 3, 2), (2, 40, 4, 0, 3, 2), (2, 40, 0, 4, 3, 2)]
)
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, index, grad = make_inputs((*shape[:2], max(shape[2], 1), *shape[3:]), dtype)
    tensors[0], tensors[1] = tensors[0][:, :, : shape[2]], tensors[1][:, : shape[2]]
    actual = forward_backward(expert_linear, tensors, index, grad, False)
    expected = forward_backward(reference, tensors, index, grad, False)
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        assert_close(name, a, e, 1e-2)


def test_without_bias() -> None:
    (x, weight, _, gate), index, _ = make_inputs((3, 50, 12, 20, 3, 2), torch.float32)
    out = expert_linear(x, weight, None, index, gate)
    assert_close("out", out, reference(x.double(), weight.double(), None, index, gate.double()), 1e-5)


@pytest.mark.parametrize("frozen", range(4))
def test_only_wanted_gradients(frozen: int) -> None:
    tensors, index, grad = make_inputs((3, 50, 12, 12, 3, 2), torch.float32)
    every = forward_backward(expert_linear, tensors, index, grad, True)[1:]
    for wanted in ([i for i in range(4) if i != frozen], [frozen]):
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(tensors)]
        out = expert_linear(leaves[0], leaves[1], leaves[2], index, leaves[3], modulate=True)
        found = torch.autograd.grad(out, [leaves[i] for i in wanted], grad)
        for i, gradient in zip(wanted, found, strict=True):
            assert_close(NAMES[i], gradient, every[i], 1e-6)


@pytest.mark.parametrize("tokens", [4, 90])
def test_strides_do_not_matter(tokens: int) -> None:
    (x, weight, bias, gate), index, _ = make_inputs((4, tokens, 24, 24, 3, 2), torch.float32)
    expected = forward_backward(expert_linear, [x, weight, bias, gate], index, torch.ones_like(x), False)
    strided = [x.transpose(0, 2).contiguous().transpose(0, 2), weight.transpose(1,
    2).contiguous().transpose(1, 2),
               bias.t().contiguous().t(), gate.t().contiguous().t()]  # fmt: skip
    leaves = [tensor.detach().requires_grad_() for tensor in strided]
    out = expert_linear(leaves[0], leaves[1], leaves[2], index.long().t().contiguous().t(), leaves[3])
    out.sum().backward()  # the gradient of a sum is an expanded scalar
    for name, a, e in zip(("out", *NAMES), [out, *[leaf.grad for leaf in leaves]], expected, strict=True):
        assert_close(name, a, e, 1e-6)


@pytest.mark.parametrize("modulate", [False, True])
@pytest.mark.parametrize("tokens", [3, 90])
def test_gradients_in_any_layout(tokens: int, modulate: bool) -> None:
    """The output is permuted, expanded or sliced after the layer, so its gradient is not contiguous."""
    tensors, index, _ = make_inputs((4, tokens, 12, 12, 3, 2), torch.float32)
    scale = torch.randn(12, tokens, 4, generator=torch.Generator().manual_seed(1))

    def permuted(out: Tensor) -> Tensor:
        return (out.permute(2, 1, 0) * scale).sum()

    def sliced(out: Tensor) -> Tensor:
        return out[::2, :, 1:].square().sum()

    for loss in (permuted, sliced, Tensor.sum):
        gradients = []
        for backend in ("native", "reference"):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            x, weight, bias, gate = leaves
            loss(expert_linear(x, weight, bias, index, gate, modulate, backend=backend)).backward()
            gradients.append([leaf.grad for leaf in leaves])
        for name, a, e in zip(NAMES, *gradients, strict=True):
            assert_close(name, a, e, 1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_samples_that_share_a_timestep_share_one_merge(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        merge_apart(monkeypatch)
    merged = count_merges(monkeypatch)
    tensors, index, grad = make_inputs((12, 40, 16, 16, 3, 2), torch.float32)
    for routes, expected in [([0] * 12, 1), ([0, 1, 2] * 4, 3), (list(range(12)), 12)]:
        merged.clear()
        shared = [*tensors[:3], tensors[3][routes]]
        with torch.no_grad():
            expert_linear(shared[0], shared[1], shared[2], index[routes], shared[3])
        assert merged == [expected]
        check_against_reference(shared, index[routes], grad)


class Broken:
    """The compiled module with one function wrong."""

    def __init__(self, name: str, breaks: Callable) -> None:
        self.name, self.breaks = name, breaks

    def require(self) -> Broken:
        return self

    def __getattr__(self, name: str):
        original = getattr(native.cpu.module, name)
        return functools.partial(self.breaks, original) if name == self.name else original


def wrong_gates(function: Callable, *arguments: int) -> None:
    """The gates of the first route are a thousandth too large."""
    gate = ctypes.c_float.from_address(arguments[4 if function.__name__ == "merge_experts" else 8])
    right, gate.value = gate.value, gate.value * 1.001
    function(*arguments)
    gate.value = right


def wrong_result(function: Callable, *arguments: int) -> None:
    """The first of the gates' gradients is a hundredth too large."""
    function(*arguments)
    ctypes.c_float.from_address(arguments[-1]).value *= 1.01


@pytest.mark.parametrize(
    ("fused", "function", "breaks"),
    [
        (False, "merge_experts", wrong_gates),
        (False, "merge_experts_backward", wrong_result),
        (True, "fused_product", wrong_gates),
        (True, "fused_product_backward", wrong_result),
    ],
)
def test_a_broken_kernel_is_noticed(
    fused: bool, function: str, breaks: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        merge_apart(monkeypatch)
    elif cpu.vector_width(torch.float32) == 0:
        pytest.skip("this processor has no AVX2: experts are merged apart from the product")
    monkeypatch.setattr(cpu, "native", type("native", (), {"cpu": Broken(function, breaks)}))
    with pytest.raises(AssertionError, match="relative RMS"):
        check_against_reference(*make_inputs(SHAPES[0], torch.float32))


def test_inference_first_and_training_afterwards() -> None:
    vars(cpu._workspaces).clear()
    tensors, index, grad = make_inputs(SHAPES[0], torch.float32)
    with torch.inference_mode():
        expert_linear(tensors[0], tensors[1], tensors[2], index, tensors[3])
    check_against_reference(tensors, index, grad)


@pytest.mark.parametrize("tokens", [2, 90])
def test_default_types_do_not_leak_in(tokens: int) -> None:
    inputs = make_inputs((4, tokens, 12, 12, 3, 2), torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        check_against_reference(*inputs)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_do_not_depend_on_threads() -> None:
    inputs = make_inputs((7, 60, 96, 96, 3, 2), torch.float32)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        p = torch.randn(7, 96, 96, generator=torch.Generator().manual_seed(0))
        (_, weight, _, gate), index, _ = inputs
        grad_weight, grad_gate = torch.empty_like(weight), torch.empty_like(gate)
        native.cpu.require().merge_experts_backward(
            p.data_ptr(), weight.data_ptr(), 3, 96 * 96, index.data_ptr(), gate.data_ptr(), 7, 2, True, True,
            0, threads, 0, grad_weight.data_ptr(), grad_gate.data_ptr(),
        )  # fmt: skip
        found.append((grad_weight, grad_gate))
    torch.set_num_threads(before)
    for (weight_a, gate_a), (weight_b, gate_b) in pairwise(found):
        assert torch.equal(weight_a, weight_b)
        assert torch.equal(gate_a, gate_b)


@pytest.mark.parametrize("tokens", [3, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(tokens: int, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)
    (x, weight, bias, gate), index, grad = make_inputs((4, tokens, 12, 12, 3, 2), dtype)
    operators = torch.ops.switch_moe
    for modulate, keep in ((False, False), (True, False), (True, True), (False, True)):
        options = (modulate, keep, "native")
        torch.library.opcheck(operators.expert_linear.default, (x, weight, bias, index, gate, *options))
    torch.library.opcheck(operators.expert_linear.default, (x, weight, None, index, gate, *options))
    for wanted in ([True] * 4, [True, False, True, False], [False, True, False, True]):
        torch.library.opcheck(
            operators.expert_linear_backward.default,
            (grad, x, weight, bias, index, gate, x, True, wanted, "native"),
        )


@pytest.mark.parametrize(
    ("modulate", "autocast", "backend"),
    [
        (False, False, "aot_eager"),
        (False, True, "aot_eager"),
        (True, False, "inductor"),
        (True, True, "inductor"),
    ],
)
def test_compile_fullgraph(modulate: bool, autocast: bool, backend: str) -> None:
    torch.use_deterministic_algorithms(False)
    tensors, index, grad = make_inputs((4, 80, 16, 16, 3, 2), torch.float32)

    def function(*arguments) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return expert_linear(*arguments)

    if autocast:
        grad = grad.bfloat16()
    eager = forward_backward(function, tensors, index, grad, modulate)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    compiled = forward_backward(compiled, tensors, index, grad, modulate)
    for name, a, e in zip(("out", *NAMES), compiled, eager, strict=True):
        assert a.dtype == e.dtype
        assert_close(name, a, e, 1e-2 if autocast else 1e-5)


def test_autocast_computes_in_the_lower_type() -> None:
    tensors, index, grad = make_inputs((4, 80, 16, 16, 3, 2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, *gradients = forward_backward(expert_linear, tensors, index, grad.bfloat16(), False)
    lower = forward_backward(
        expert_linear, [*[t.bfloat16() for t in tensors[:3]], tensors[3]], index, grad.bfloat16(), False
    )
    assert out.dtype == torch.bfloat16
    for name, a, e in zip(("out", *NAMES), [out, *gradients], lower, strict=True):
        assert_close(name, a.to(e.dtype), e, 0)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("modulate", [False, True])
def test_reference_gradients(modulate: bool) -> None:
    tensors, index, _ = make_inputs((2, 3, 4, 4, 3, 2), torch.float64)
    leaves = [tensor.double().requires_grad_() for tensor in tensors]

    def function(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return expert_linear(x, weight, bias, index, gate, modulate)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x has shape \(2, 3\); it must be \[B, T, Din\]"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, TypeError, "x is torch.int32; it must be"),
        (
            {"weight": torch.zeros(3, 5, 4)},
            ValueError,
            r"weight has shape \(3, 5, 4\); it must be \[M, 4, Dout\]",
        ),
        (
            {"weight": torch.zeros(3, 4, 4).bfloat16()},
            TypeError,
            "weight is torch.bfloat16 and x is torch.float32",
        ),
        ({"bias": torch.zeros(3, 5)}, ValueError, r"bias has shape \(3, 5\); it must be \[3, 4\]"),
        (
            {"expert_index": torch.zeros(2, 2)},
            TypeError,
            "expert_index is torch.float32; it must be torch.int32",
        ),
        (
            {"expert_index": torch.full((2, 2), 3, dtype=torch.int32)},
            ValueError,
            r"expert_index holds 3 to 3; .*\[0, 3\)",
        ),
        (
            {"expert_index": torch.full((2, 2), -1, dtype=torch.int32)},
            ValueError,
            "expert_index holds -1 to -1",
        ),
        (
            {"expert_gate": torch.zeros(2, 1)},
            ValueError,
            r"expert_gate has shape \(2, 1\); it must be \[2, 2\]",
        ),
        ({"expert_gate": torch.zeros(2, 2).int()}, TypeError, "expert_gate is torch.int32"),
        ({"x": None}, TypeError, r"x is None \(NoneType\); it must be a tensor"),
        (
            {"expert_index": [[0, 1]]},
            TypeError,
            r"expert_index is \[\[0, 1\]\] \(list\); it must be a tensor",
        ),
        ({"weight": torch.zeros(3, 4, 4).to_sparse()}, TypeError, "weight is torch.sparse_coo"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.complex64)}, TypeError, "x is torch.complex64"),
        ({"bias": 0.0}, TypeError, r"bias is 0.0 \(float\); it must be a tensor"),
        ({"modulate": None}, TypeError, "modulate is None"),
        (
            {"backend": "cudnn"},
            ValueError,
            "backend is 'cudnn'; it must be one of auto, reference, native, triton, cuda",
        ),
        (
            {"weight": torch.zeros(3, 4, 5), "bias": None, "modulate": True},
            ValueError,
            "modulate needs square experts",
        ),
        ({"x": torch.zeros(2, 3, 4, device="meta")}, ValueError, "weight is on cpu; it must be on meta"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 3, 4), "weight": torch.zeros(3, 4, 4), "bias": torch.zeros(3, 4),
        "expert_index": torch.zeros(2, 2, dtype=torch.int32), "expert_gate": torch.zeros(2, 2),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        expert_linear(**{**arguments, **change})


def test_a_missing_backend_raises_and_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        native, "cpu", native.NativeModule("switch_moe._absent", "build it with: make install")
    )
    (x, weight, bias, gate), index, _ = make_inputs(SHAPES[0], torch.float32)
    with pytest.raises(RuntimeError, match=r"switch_moe\._absent is not built; build it with: make install"):
        expert_linear(x, weight, bias, index, gate, backend="native")
    out = expert_linear(x, weight, bias, index, gate)
    assert torch.equal(out, reference(x, weight, bias, index, gate))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("path", "tokens"), [("fused", 90), ("merged", 90), ("grouped", 2), ("triton", 9), ("reference", 9)]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_sample_that_is_not_finite_reaches_its_own_experts_only(
    path: str, tokens: int, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "merged":
        merge_apart(monkeypatch)
    backend = path if path in ("triton", "reference") else "native"
    tensors, _, grad = make_inputs((4, tokens, 16, 16, 3, 2), dtype)
    index = torch.tensor([[0, 1], [1, 2], [0, 1], [2, 1]], dtype=torch.int32)
    tensors[0][2, 0, 3] = grad[0, 1, 5] = value  # samples 0 and 2 choose the experts 0 and 1
    found = forward_backward(expert_linear, tensors, index, grad, True, backend=backend)
    others = [[*tensors[:3], tensors[3]], index, grad]
    others[0][0], others[2] = tensors[0].clone(), grad.clone()
    others[0][0][2], others[2][0] = 0, 0
    right = forward_backward(reference, others[0], index, others[2], True)
    for name, actual, expected in zip(("out", "x", "weight", "bias", "gate"), found, right, strict=True):
        own = (slice(2, 3),) if name in ("weight", "bias") else ([1, 3],)  # expert 2, samples 1 and 3
        assert actual[own].isfinite().all(), name
        assert_close(name, actual[own], expected[own], 1e-5 if dtype == torch.float32 else 2e-2)
