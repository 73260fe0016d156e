"""expert_mlp: the reference's gradients, errors, and the Triton kernels against the reference in float64.

The kernels run on a GPU where there is one, else in Triton's interpreter. Values of the reference are checked
by hand in test_layer.py.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import assert_close, assert_error_rule, break_kernels, check_streams_and_graph
from torch import Tensor

from switch_moe.experts import MLPExperts
from switch_moe.ops import _backend, expert_mlp

reference = functools.partial(expert_mlp, backend="reference")
GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("x", "weight_in", "bias_in", "weight_out", "bias_out", "gate")
# B, T, D, H, M, k: one of all, one token, odd, past a tile, every expert chosen, one expert
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 18, 20, 24, 3, 2),
    (2, 1, 17, 33, 4, 3),
    (2, 33, 24, 20, 3, 1),
    (3, 7, 8, 8, 4, 4),
    (2, 5, 20, 12, 1, 1),
]
CASES = [
    (shape, dtype) for shape in SHAPES for dtype in (DTYPES if GPU or shape in SHAPES[1:3] else DTYPES[:1])
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def use_small_tiles(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles in little data, and pairs of an expert split between two programs."""
    tile = importlib.import_module("switch_moe.kernels._tile").Tile(16, 16, 16, 4, 2)
    monkeypatch.setattr(kernels, "mlp_tile", lambda *_: tile)
    monkeypatch.setattr(kernels, "pair_splits", lambda *_: 2)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    kernels = importlib.import_module("switch_moe.kernels.expert_mlp")
    use_small_tiles(kernels, monkeypatch)
    return kernels


def make_inputs(
    shape: tuple[int, ...], gated: bool, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The tensors of NAMES (unit-scale outputs), then the index and a gradient of the output."""
    batch, tokens, size, hidden, experts, top_k = shape
    width = 2 * hidden if gated else hidden
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    tensors = [
        random(batch, tokens, size), random(experts, size, width) / size**0.5, random(experts, width),
        random(experts, hidden, size) / hidden**0.5, random(experts, size),
    ]  # fmt: skip
    gate = torch.rand(batch, top_k, generator=generator)
    index = torch.rand(batch, experts, generator=generator).argsort(1)[:, :top_k].int()
    grad = random(batch, tokens, size).to(device, dtype)
    return [*(t.to(device, dtype) for t in tensors), gate.to(device)], index.to(device), grad


def forward_backward(
    function, tensors: list[Tensor], index: Tensor, grad: Tensor, gated: bool, **options
) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves[:5], index, leaves[5], gated, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(tensors: list[Tensor], index: Tensor, grad: Tensor, gated: bool, **options: str) -> None:
    """Output and every gradient of the kernels against the reference in float64."""
    dtype = tensors[0].dtype
    options.setdefault("backend", "triton")
    actual = forward_backward(expert_mlp, tensors, index, grad, gated, **options)
    exact = forward_backward(reference, [t.double() for t in tensors], index, grad.double(), gated)
    same_type = forward_backward(reference, tensors, index, grad, gated)
    for name, a, e, s in zip(("out", *NAMES), actual, exact, same_type, strict=True):
        assert_error_rule(name, a, e, s, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_small_tiles(
    shape: tuple[int, ...], gated: bool, dtype: torch.dtype, device: str, small_tiles
) -> None:
    check(*make_inputs(shape, gated, dtype, device), gated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "gated"),
    [((2, 70, 40, 24, 3, 2), False), ((1, 70, 24, 72, 3, 2), True), ((2, 9, 24, 136, 3, 2), True)],
)
def test_shipped_tiles(shape: tuple[int, ...], gated: bool, dtype: torch.dtype, device: str) -> None:
    check(*make_inputs(shape, gated, dtype, device), gated)


@pytest.mark.parametrize("splits", [1, 3])
def test_pairs_split_between_programs(splits: int, device: str, small_tiles, monkeypatch) -> None:
    monkeypatch.setattr(small_tiles, "pair_splits", lambda *_: splits)
    for batch in (1, 4):  # fewer pairs than programs, and more
        check(*make_inputs((batch, 18, 8, 8, 3, 2), False, torch.float32, device), False)


@pytest.mark.parametrize("gated", [False, True])
def test_an_expert_for_nobody_and_one_for_everybody(gated: bool, device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((4, 5, 8, 8, 4, 2), gated, torch.float32, device)
    index[:, 0], index[:, 1] = 2, torch.tensor([0, 3, 0, 3])
    check(tensors, index, grad, gated)
    grads = forward_backward(expert_mlp, tensors, index, grad, gated, backend="triton")[1:]
    for name, found in zip(NAMES[1:5], grads[1:5], strict=True):
        assert found[1].count_nonzero() == 0, name


@pytest.mark.parametrize("gated", [False, True])
def test_an_expert_chosen_twice_counts_twice(gated: bool, device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((3, 5, 16, 16, 3, 2), gated, torch.float32, device)
    index[:] = 1
    tensors[5][0] = 0  # and gates of zero
    check(tensors, index, grad, gated)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_saturated_activations(device: str, small_tiles) -> None:
    """Far out, exp overflows: act and its slope are still 0 and 1."""
    for gated in (False, True):
        tensors, index, grad = make_inputs((2, 5, 16, 16, 3, 2), gated, torch.float32, device)
        tensors[0] *= 1000
        check(tensors, index, grad, gated)


@pytest.mark.parametrize(
    "shape", [(0, 5, 8, 8, 3, 2), (2, 0, 8, 8, 3, 2), (2, 5, 8, 0, 3, 2), (2, 5, 0, 8, 3, 2)]
)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    (x, *others), index, grad = make_inputs(
        (*shape[:2], max(1, shape[2]), max(1, shape[3]), *shape[4:]), False, torch.float32, device
    )
    size, hidden = shape[2:4]
    weight_in, bias_in, weight_out, bias_out, gate = others
    tensors = [
        x[..., :size], weight_in[:, :size, :hidden], bias_in[:, :hidden], weight_out[:, :hidden, :size],
        bias_out[:, :size], gate,
    ]  # fmt: skip
    grad = grad[..., :size]
    check(tensors, index, grad, False)
    if hidden == 0 or size == 0:
        return
    out, pre = torch.ops.switch_moe.expert_mlp(*tensors[:5], index, gate, False, True)  # the operator too
    assert out.shape == grad.shape
    grads = torch.ops.switch_moe.expert_mlp_backward(grad, *tensors[:5], index, gate, pre, False, [True] * 6)
    for found, like in zip(grads, tensors, strict=True):
        assert torch.equal(found, torch.zeros_like(like))


def test_not_contiguous(device: str, small_tiles) -> None:
    tensors, index, _ = make_inputs((2, 6, 24, 16, 3, 2), False, torch.float32, device)
    x, weight_in, bias_in, weight_out, bias_out, gate = tensors
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight_in, weight_out = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (weight_in, weight_out))
    bias_in, bias_out = (torch.stack([bias, bias], dim=-1)[..., 0] for bias in (bias_in, bias_out))
    gate, index = gate.t().contiguous().t(), index.long().repeat_interleave(2, dim=1)[:, ::2]
    strided = [x, weight_in, bias_in, weight_out, bias_out, gate]
    expanded = torch.randn(2, 1, 1).expand(2, 6, 24).to(device)
    for grad in (expanded, torch.randn(24, 6, 2).permute(2, 1, 0).to(device)):
        assert not any(t.is_contiguous() for t in (*strided, index, grad))
        actual = [t.detach().requires_grad_() for t in strided]  # a clone would be contiguous
        out = expert_mlp(*actual[:5], index, actual[5], backend="triton")
        exact = forward_backward(reference, [t.double() for t in strided], index, grad.double(), False)
        found = torch.autograd.grad(out, actual, grad)
        for name, a, e in zip(("out", *NAMES), [out, *found], exact, strict=True):
            assert_close(name, a, e, 1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("wanted", [*((name,) for name in NAMES), NAMES[1::2]])
def test_only_wanted_gradients(wanted: tuple[str, ...], gated: bool, device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((2, 5, 16, 20, 3, 2), gated, torch.float32, device)
    results = []
    for function, dtype, options in (
        (expert_mlp, torch.float32, {"backend": "triton"}),
        (reference, torch.double, {}),
    ):
        n = {name: t.to(dtype).requires_grad_(name in wanted) for name, t in zip(NAMES, tensors, strict=True)}
        values = list(n.values())
        out = function(*values[:5], index, values[5], gated, **options)
        results.append(torch.autograd.grad(out, [n[name] for name in wanted], grad.to(dtype)))
    for name, a, e in zip(wanted, *results, strict=True):
        assert_close(name, a, e, 1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("missing", [("bias_in",), ("bias_out",), ("bias_in", "bias_out")])
def test_without_biases(missing: tuple[str, ...], gated: bool, device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((2, 5, 16, 20, 3, 2), gated, torch.float32, device)
    results = []
    for function, dtype, options in (
        (expert_mlp, torch.float32, {"backend": "triton"}),
        (reference, torch.double, {}),
    ):
        leaves = [
            None if name in missing else t.to(dtype).requires_grad_()
            for name, t in zip(NAMES, tensors, strict=True)
        ]
        out = function(*leaves[:5], index, leaves[5], gated, **options)
        grads = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad.to(dtype))
        results.append([out.detach(), *grads])
    for name, a, e in zip(("out", *(n for n in NAMES if n not in missing)), *results, strict=True):
        assert_close(name, a, e, 1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_saved_for_backward(gated: bool, device: str, small_tiles) -> None:
    """The arguments, the hidden layer before its activation and the schedule; nothing without grad."""
    shape = batch, tokens, _, hidden, _, top_k = (2, 5, 16, 20, 3, 2)
    tensors, index, _ = make_inputs(shape, gated, torch.float32, device)
    leaves = [t.requires_grad_() for t in tensors]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_mlp(*leaves[:5], index, leaves[5], gated, backend="triton")
    own = {t.data_ptr() for t in (*leaves, index)}
    width = 2 * hidden if gated else hidden
    (schedule,) = (t for t in saved if t.dtype == torch.int32 and t.data_ptr() not in own)
    others = [t.shape for t in saved if t.data_ptr() not in {*own, schedule.data_ptr()}]
    assert others == [(batch, top_k, tokens, width)]
    with torch.no_grad():
        _, pre = torch.ops.switch_moe.expert_mlp(*leaves[:5], index, leaves[5], gated, False)
    assert pre.numel() == 0


def test_nothing_of_the_size_of_expert_outputs(device: str, small_tiles, monkeypatch) -> None:
    batch, tokens, size, hidden, _, top_k = shape = (2, 5, 12, 20, 3, 2)
    tensors, index, grad = make_inputs(shape, False, torch.float32, device)
    launched: list[Tensor] = []
    launch = small_tiles.launch

    def recording(kernel, programs: int, *args, **meta) -> None:
        launched.extend(a for a in args if isinstance(a, Tensor))
        launch(kernel, programs, *args, **meta)

    monkeypatch.setattr(small_tiles, "launch", recording)
    forward_backward(expert_mlp, tensors, index, grad, False, backend="triton")
    sizes = {t.numel() for t in launched}
    assert batch * top_k * tokens * hidden in sizes
    assert batch * top_k * tokens * size not in sizes


@pytest.mark.parametrize("gated", [False, True])
def test_the_same_bits_every_time(gated: bool, device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((3, 20, 16, 16, 3, 2), gated, torch.float32, device)
    first, second = (
        forward_backward(expert_mlp, tensors, index, grad, gated, backend="triton") for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_an_index_out_of_range_is_nan_in_its_sample_alone(device: str, small_tiles) -> None:
    (*tensors, gate), index, _ = make_inputs((3, 5, 16, 16, 3, 2), False, torch.float32, device)
    for wrong in (7, -1):
        index[1, 0] = wrong
        out, _ = torch.ops.switch_moe.expert_mlp(*tensors, index, gate, False, False)
        assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert out.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.slow
def test_opcheck(device: str, small_tiles) -> None:
    torch.use_deterministic_algorithms(False)
    for gated in (False, True):
        (*tensors, gate), index, grad = make_inputs((1, 3, 8, 8, 2, 1), gated, torch.float32, device)
        x, weight_in, _, weight_out, _ = tensors
        pre = grad.new_ones(1, 1, 3, weight_in.shape[2])
        forward, backward = torch.ops.switch_moe.expert_mlp, torch.ops.switch_moe.expert_mlp_backward
        torch.library.opcheck(forward, (*tensors, index, gate, gated, True))
        torch.library.opcheck(forward, (x, weight_in, None, weight_out, None, index, gate, gated, False))
        for wanted in ([True] * 6, [False, True, False, True, False, False]):
            arguments = (grad, *tensors, index, gate, pre, gated, wanted)
            torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_compile(gated: bool, autocast: bool, device: str, small_tiles) -> None:
    torch.use_deterministic_algorithms(False)
    tensors, index, grad = make_inputs((2, 5, 8, 8, 3, 2), gated, torch.float32, device)

    def run(*arguments) -> Tensor:
        with torch.autocast(device, dtype=torch.float16, enabled=autocast):
            return expert_mlp(*arguments, backend="triton").float()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager = forward_backward(run, tensors, index, grad, gated)
    for name, a, e in zip(
        ("out", *NAMES), forward_backward(compiled, tensors, index, grad, gated), eager, strict=True
    ):
        assert a.dtype == e.dtype
        assert_close(name, a, e, 1e-3 if autocast else 1e-6)


def test_autocast_computes_in_the_lower_type(device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((2, 5, 16, 16, 3, 2), False, torch.float32, device)
    with torch.autocast(device, torch.float16):
        found = forward_backward(expert_mlp, tensors, index, grad.half(), False, backend="triton")
        out, _ = torch.ops.switch_moe.expert_mlp(*tensors[:5], index, tensors[5], False, False)
    halves = [*(t.half() for t in tensors[:5]), tensors[5]]
    lower = forward_backward(expert_mlp, halves, index, grad.half(), False, backend="triton")
    assert found[0].dtype == out.dtype == torch.float16
    assert torch.equal(out, lower[0])  # the operator itself
    assert all(gradient.dtype == torch.float32 for gradient in found[1:])
    for name, a, e in zip(("out", *NAMES), found, lower, strict=True):
        assert_close(name, a.to(e.dtype), e, 0)


# Each a mistake that someone could make; the tests above must see it.
MUTATIONS = {
    "forgets the gate": ("        tl.store(place, (gate * units)", "        tl.store(place, (units)"),
    "forgets the gate in dpre": ("dh *= gate", "pass"),
    "scales the gate's gradient": ("tl.sum(units * dh)", "tl.sum(units * dh * gate)"),
    "takes one expert only": ("for step in range(SLOTS * STEPS)", "for step in range(STEPS)"),
    "stays with the first expert": ("(step + 1) // STEPS", "0 // STEPS"),
    "changes the expert a step late": ("(step + 1) // STEPS", "step // STEPS"),
    "changes the pair a step late": ("(step + 1) // steps", "step // steps"),
    "drops the bias": ("if BIAS:\n            a +=", "if False:\n            a +="),
    "drops the second bias": ("if BIAS:\n        for j", "if False:\n        for j"),
    "leaves the bias out of dgate": ("grad_gate += tl.sum(total", "pass  # tl.sum(total"),
    "does not scale db2": ("SCALE=scaled", "SCALE=False"),
    "swaps the halves": ("return value, slope_a, slope_b", "return value, slope_b, slope_a"),
    "forgets the cubic term": ("0.21406443847661511", "0.07135481282553837"),
    "skips the last tokens": ("steps = tl.cdiv(tokens, BLOCK_K)", "steps = tokens // BLOCK_K"),
    "multiplies past the hidden units": ("if K % BLOCK_K != 0:", "if False:"),
    "reads the wrong sample": ("(pair // RIGHT_PER)", "pair"),
    "forgets a split": ("begin + split * length, end)", "begin, end)"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_fails(mutation: str, tmp_path: Path, device: str, monkeypatch) -> None:
    broken = break_kernels("expert_mlp", *MUTATIONS[mutation], tmp_path, monkeypatch)
    use_small_tiles(broken, monkeypatch)
    if mutation != "forgets a split":
        monkeypatch.setattr(broken, "pair_splits", lambda *_: 1)
    gated = mutation == "swaps the halves"
    with pytest.raises(AssertionError, match="relative RMS"):
        check(*make_inputs((2, 5, 16, 20, 2, 2), gated, torch.float32, device), gated)


def test_true_float32_unless_tf32_is_allowed() -> None:
    from switch_moe.kernels import _launch, expert_mlp

    sizes = ((2, 16, 16), (3, 16, 32), (3, 32, 16), (2, 2))
    x, weight_in, weight_out, gate = (torch.empty(size, device="meta") for size in sizes)
    index = torch.empty(2, 2, dtype=torch.int32, device="meta")
    experts = MLPExperts(weight_in, None, weight_out, None, index, gate)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for allowed in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = allowed
            with _launch.record(90) as launches:
                _, hidden = expert_mlp.forward(x, experts, False, True)
                expert_mlp.backward(x, x, experts, hidden, False, [True] * 6)
            precisions = [launch.meta["PRECISION"] for launch in launches if "PRECISION" in launch.meta]
            assert precisions == [allowed] * 6
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_native_on_a_cpu(shape: tuple[int, ...], gated: bool, dtype: torch.dtype) -> None:
    arguments = make_inputs(shape, gated, dtype, "cpu")
    check(*arguments, gated, backend="native")
    found = (forward_backward(expert_mlp, *arguments, gated, backend=name) for name in ("native", "auto"))
    assert all(map(torch.equal, *found))


def test_second_derivatives_on_a_cpu() -> None:
    (*tensors, gate), index, grad = make_inputs((2, 3, 4, 5, 3, 2), True, torch.float32, "cpu")

    def second(backend: str) -> Tensor:
        x = tensors[0].clone().requires_grad_()
        out = expert_mlp(x, *tensors[1:], index, gate, True, backend=backend)
        (first,) = torch.autograd.grad(out, x, grad, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert_close("second derivative", second("native"), second("reference"), 1e-5)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    (*tensors, gate), index, _ = make_inputs((2, 4, 8, 8, 3, 2), False, torch.float32, "cpu")
    doubles, halves = [t.double() for t in tensors], [t.bfloat16() for t in tensors]
    if not GPU:
        with pytest.raises(TypeError, match=r"x is torch\.float64"):
            expert_mlp(*doubles, index, gate, backend="triton")
        monkeypatch.setattr(_backend, "INTERPRETER_HAS_BFLOAT16", False)  # as without the tests' cure
        with pytest.raises(RuntimeError, match="bfloat16 products are wrong in Triton's interpreter"):
            expert_mlp(*halves, index, gate, backend="triton")
        monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        expert_mlp(*tensors, index, gate, backend="triton")


def make_arguments(gated: bool = False) -> dict:
    torch.manual_seed(0)
    return {
        "x": torch.randn(2, 3, 4),
        "weight_in": torch.randn(3, 4, 10),
        "bias_in": torch.randn(3, 10),
        "weight_out": torch.randn(3, 5 if gated else 10, 4),
        "bias_out": torch.randn(3, 4),
        "expert_index": torch.tensor([[0, 2], [1, 1]]),
        "expert_gate": torch.rand(2, 2),
        "gated": gated,
    }


@pytest.mark.parametrize("gated", [False, True])
def test_reference_gradients(gated: bool) -> None:
    arguments = make_arguments(gated)
    names = ["x", "weight_in", "bias_in", "weight_out", "bias_out", "expert_gate"]
    leaves = [arguments[name].double().requires_grad_() for name in names]

    def function(*values: torch.Tensor) -> torch.Tensor:
        return expert_mlp(**{**arguments, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"x has shape \(2, 4\); it must be \[B, T, D\]"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, TypeError, "x is torch.int32; it must be"),
        ({"weight_in": torch.zeros(3, 5, 10)}, ValueError, r"weight_in has shape \(3, 5, 10\)"),
        ({"weight_out": torch.zeros(3, 9, 4)}, ValueError, r"weight_out has .* must be \[3, 10, 4\]"),
        ({"weight_out": torch.zeros(3, 10, 4).half()}, TypeError, "weight_out is torch.float16 and x is"),
        ({"bias_in": torch.zeros(3, 9)}, ValueError, r"bias_in has shape \(3, 9\); it must be \[3, 10\]"),
        ({"bias_out": torch.zeros(3, 9)}, ValueError, r"bias_out has shape \(3, 9\); it must be \[3, 4\]"),
        ({"bias_out": torch.zeros(3, 4).double()}, TypeError, "bias_out is torch.float64 and x is"),
        ({"bias_in": torch.zeros(3, 10, device="meta")}, ValueError, "bias_in is on meta; it must be on cpu"),
        ({"expert_index": torch.full((2, 2), -1)}, ValueError, "expert_index holds -1 to -1"),
        ({"expert_index": torch.full((2, 2), 3)}, ValueError, "expert_index holds 3 to 3"),
        ({"expert_gate": torch.zeros(1, 2)}, ValueError, r"expert_gate has shape \(1, 2\)"),
        ({"expert_gate": torch.zeros(2, 2).int()}, TypeError, "expert_gate is torch.int32"),
        ({"x": None}, TypeError, r"x is None \(NoneType\); it must be a tensor"),
        ({"bias_out": 0.0}, TypeError, r"bias_out is 0.0 \(float\); it must be a tensor"),
        ({"gated": 1}, TypeError, r"gated is 1 \(int\); it must be True or False"),
        ({"expert_index": torch.zeros(2, 2)}, TypeError, "expert_index is torch.float32"),
        (
            {"expert_index": torch.zeros(2, 0).int(), "expert_gate": torch.zeros(2, 0)}, ValueError,
            "at least one expert must be chosen",
        ),
        ({"gated": True, "weight_in": torch.zeros(3, 4, 9)}, ValueError, "its last size must be even"),
    ],
)  # fmt: skip
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        expert_mlp(**{**make_arguments(), **change})


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("gated", [False, True])
def test_on_a_gpu_by_default_on_any_stream_and_in_a_graph(gated: bool) -> None:
    arguments = (*make_inputs((4, 64, 64, 128, 3, 2), gated, torch.float32, "cuda"), gated)
    expected = forward_backward(expert_mlp, *arguments, backend="triton")
    check_streams_and_graph(lambda: forward_backward(expert_mlp, *arguments), expected)  # auto
