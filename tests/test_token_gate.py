"""token_gate: the reference against loops; values, choices and gradients of the others against float64."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, break_kernels, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switch_moe.ops import TokenGate, token_gate

Settings = dict[str, Any]

# shape of the logits, settings: odd sizes, one of everything, several tiles, groups of an odd size
CASES: list[tuple[tuple[int, int, int], Settings]] = [
    ((2, 7, 5), {"top_k": 2}),
    ((1, 1, 1), {"top_k": 1}),
    ((1, 1, 1), {"capacity": 1, "normalise": True}),
    ((3, 131, 3), {"top_k": 3, "score": "sigmoid", "scale": 2.5}),
    ((2, 70, 40), {"top_k": 7, "normalise": True}),
    ((2, 5, 256), {"top_k": 2, "score": "identity"}),
    ((2, 33, 12), {"top_k": 4, "groups": 4, "top_groups": 2, "score": "sigmoid", "normalise": True}),
    ((3, 9, 6), {"top_k": 2, "groups": 2, "top_groups": 1}),
    ((2, 5, 6), {"top_k": 3, "groups": 6, "top_groups": 4, "score": "identity"}),
    ((3, 33, 3), {"capacity": 9}),
    ((4, 33, 3), {"capacity": 20, "pool": 2, "normalise": True, "scale": 0.5}),
    ((3, 50, 3), {"capacity": 10, "pool": 3, "score": "sigmoid"}),
    ((2, 6, 5), {"capacity": 1, "score": "identity"}),
    ((2, 6, 2), {"capacity": 6, "normalise": True, "score": "sigmoid"}),
    ((1, 1100, 2), {"capacity": 500, "normalise": True}),
    ((0, 4, 3), {"top_k": 2}),
    ((2, 0, 3), {"top_k": 2, "normalise": True}),
    ((0, 4, 3), {"capacity": 2}),
]
NAMES = (*TokenGate._fields, "logits", "sample_logits", "bias")
BACKENDS = ["auto", "triton"]
TOKEN = CASES[6]
EXPERT = (2, 17, 2), {"capacity": 20, "pool": 2, "normalise": True, "scale": 0.5}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_inputs(shape: tuple[int, int, int], device: str = "cpu") -> list[Tensor]:
    """logits, sample_logits, bias and selection_bias, of unit scale."""
    batch, _, experts = shape
    torch.manual_seed(0)
    shapes = shape, (batch, experts), (experts,), (experts,)
    return [torch.randn(size).to(device) for size in shapes]


def make_grads(out: TokenGate) -> list[Tensor | None]:
    """Of probs, gate and importance."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(t.shape, generator=generator) for t in (out.probs, out.gate, out.importance)]
    return [grad.to(out.probs.device) for grad in made]


def call(tensors: list[Tensor | None], **options: Any) -> TokenGate:
    logits, sample_logits, bias, selection_bias = tensors
    return token_gate(
        logits, sample_logits=sample_logits, bias=bias, selection_bias=selection_bias, **options
    )


def forward_backward(
    tensors: list[Tensor | None], options: Settings, absent: tuple[int, ...] = (), function: Any = call
) -> list[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors[:3]]
    out = function([*leaves, tensors[3]], **options)
    pairs = zip((out.probs, out.gate, out.importance), make_grads(out), strict=True)
    used = [(o, g.to(o.dtype)) for i, (o, g) in enumerate(pairs) if i not in absent]
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad([o for o, _ in used], given, [g for _, g in used])
    return [*(t.detach() for t in out), *gradients]


def check(
    tensors: list[Tensor | None], options: Settings, backend: str, absent: tuple[int, ...] = ()
) -> None:
    """Against the reference in float64."""
    found = forward_backward(tensors, options | {"backend": backend}, absent)
    doubled = [None if t is None else t.double() for t in tensors]
    exact = forward_backward(doubled, options | {"backend": "reference"}, absent)
    given = [t for t in tensors[:3] if t is not None]
    names = [n for n, t in zip(NAMES[5:], tensors[:3], strict=True) if t is not None]
    types = [torch.float32, torch.int32, *[torch.float32] * 3, *[t.dtype for t in given]]
    for name, dtype, a, e in zip([*NAMES[:5], *names], types, found, exact, strict=True):
        assert a.dtype == dtype, name
        if name in ("chosen", "load"):
            assert torch.equal(a, e.to(a.dtype)), name
        else:
            narrow = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
            assert_close(name, a, e, max(1e-5, narrow))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: tuple[tuple[int, int, int], Settings], backend: str, device: str) -> None:
    shape, options = case
    check(make_inputs(shape, device), options, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [TOKEN, EXPERT], ids=str)
@pytest.mark.parametrize("absent", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_absent_gradients(case: Any, absent: tuple[int, ...], backend: str, device: str) -> None:
    shape, options = case
    check(make_inputs(shape, device), options, backend, absent)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(1,), (2,), (3,), (1, 2, 3)])
def test_absent_inputs(absent: tuple[int, ...], backend: str, device: str) -> None:
    shape, options = TOKEN
    tensors = [None if i in absent else t for i, t in enumerate(make_inputs(shape, device))]
    check(tensors, options, backend)


def loops(tensors: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Choices and gates, written as what they are, for one token or expert after the other."""
    logits, sample_logits, bias, selection = tensors
    batch, tokens, experts = logits.shape
    x = logits + bias + sample_logits[:, None]
    probs = {"softmax": x.softmax(-1), "sigmoid": x.sigmoid(), "identity": x}[options.get("score", "softmax")]
    ranked, scale, normalise = probs + selection, options.get("scale", 1.0), options.get("normalise")

    def best(values: list[float], count: int) -> list[int]:
        return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]

    if "top_k" in options:
        groups, chosen = options.get("groups", 1), torch.zeros(batch, tokens, options["top_k"]).long()
        size = experts // groups
        for b in range(batch):
            for t in range(tokens):
                row = ranked[b, t].tolist()
                worth = [sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
                inside = best(worth, options.get("top_groups", 1))
                allowed = [e for e in range(experts) if e // size in inside]
                chosen[b, t] = torch.tensor(
                    [allowed[i] for i in best([row[e] for e in allowed], options["top_k"])]
                )
        gate = probs.gather(-1, chosen)
        total = gate.sum(-1, keepdim=True).expand_as(gate)
        return chosen, scale * gate / (total if normalise else 1)
    pool, count = options.get("pool", 1), options["capacity"]
    of_pool = (batch // pool, pool * tokens, experts)
    ranked, probs = ranked.reshape(of_pool), probs.reshape(of_pool)
    chosen = torch.zeros(of_pool[0], experts, count).long()
    total = torch.zeros(of_pool[:2])
    for g in range(of_pool[0]):
        for e in range(experts):
            chosen[g, e] = torch.tensor(sorted(best(ranked[g, :, e].tolist(), count)))
            total[g, chosen[g, e]] += probs[g, chosen[g, e], e]
    gate = torch.zeros(chosen.shape)
    for g in range(of_pool[0]):
        for e in range(experts):
            gate[g, e] = probs[g, chosen[g, e], e] / (total[g, chosen[g, e]] if normalise else 1)
    return chosen, scale * gate


@pytest.mark.parametrize("case", [case for case in CASES if 0 not in case[0]], ids=str)
def test_the_reference_is_loops(case: Any) -> None:
    shape, options = case
    tensors = make_inputs(shape)
    out = call(tensors, **options, backend="reference")
    chosen, gate = loops(tensors, **options)
    assert torch.equal(out.chosen.long(), chosen)
    assert_close("gate", out.gate, gate, 1e-6)
    assert_close("importance", out.importance, out.probs.sum((0, 1)), 1e-6)
    experts = torch.arange(shape[2])
    pairs = out.chosen if "top_k" in options else experts[None, :, None].expand_as(out.chosen)
    assert torch.equal(out.load, torch.bincount(pairs.flatten(), minlength=shape[2]).float())


def special(shape: tuple[int, int, int]) -> Tensor:
    """Logits with many ties, both zeros, infinities and NaN."""
    torch.manual_seed(3)
    logits = torch.randint(-2, 3, shape).float()
    for value in (-0.0, float("inf"), float("-inf"), float("nan"), -float("nan"), 1e-42):
        logits[torch.rand(shape) < 0.05] = value
    return logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{"top_k": 3}, {"top_k": 3, "groups": 4, "top_groups": 2}, {"top_k": 8, "normalise": True},
     {"capacity": 5}, {"capacity": 30, "pool": 2, "normalise": True}, {"capacity": 40}],
    ids=str,
)  # fmt: skip
def test_ties_nan_and_infinity(options: Settings, backend: str, device: str) -> None:
    """The lowest index wins a tie, NaN comes first, and what is not finite stays in its token."""
    logits = special((2, 40, 8)).to(device)
    found = token_gate(logits, score="identity", backend=backend, **options)
    expected = token_gate(logits, score="identity", backend="reference", **options)
    assert torch.equal(found.chosen, expected.chosen)
    assert torch.equal(found.load, expected.load)
    for name in ("probs", "gate", "importance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softmax_of_nan(backend: str, device: str) -> None:
    logits = make_inputs((2, 9, 3))[0].to(device)
    clean = token_gate(logits, 2, backend=backend)
    logits[0, 4, 2], logits[1, 6, 0] = float("nan"), float("inf")
    found = token_gate(logits, 2, backend=backend)
    for sample, token in ((0, 4), (1, 6)):
        assert found.probs[sample, token].isnan().all()
        assert found.chosen[sample, token].tolist() == [0, 1]
    rest = torch.ones(2, 9, dtype=torch.bool, device=device)
    rest[0, 4] = rest[1, 6] = False
    for name in ("probs", "chosen", "gate"):
        assert torch.equal(getattr(found, name)[rest], getattr(clean, name)[rest])


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_choice_of_experts(data: st.DataObject) -> None:
    """Few different scores, so that ties are everywhere, in pools that do and do not fit into registers."""
    kernels = importlib.import_module("switch_moe.kernels.token_gate")
    length = data.draw(st.integers(1, 70))
    values = st.lists(st.sampled_from([-3.0, -0.0, 0.0, 1.0, 1.5]), min_size=length, max_size=length)
    logits = torch.tensor(data.draw(values)).view(1, length, 1)
    options = {"capacity": data.draw(st.integers(1, length)), "score": "identity"}
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(kernels, "_ON_CHIP", 8)
            patch.setattr(kernels, "_AT_A_TIME", 16)
        if torch.cuda.is_available():
            logits = logits.cuda()
        found = token_gate(logits, **options, backend="triton")
    expected = token_gate(logits, **options, backend="reference")
    assert torch.equal(found.chosen, expected.chosen)
    assert torch.equal(found.gate, expected.gate)


def test_a_pool_that_no_program_holds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("switch_moe.kernels.token_gate")
    monkeypatch.setattr(kernels, "_ON_CHIP", 32)
    monkeypatch.setattr(kernels, "_AT_A_TIME", 64)
    for shape, options in (((2, 75, 2), {"capacity": 70, "pool": 2}), ((1, 100, 2), {"capacity": 100})):
        check(make_inputs(shape, device), options, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [TOKEN, EXPERT], ids=str)
def test_float32_inside_whatever_comes_in(case: Any, dtype: torch.dtype, backend: str, device: str) -> None:
    shape, options = case
    tensors = [tensor.to(dtype) for tensor in make_inputs(shape, device)]
    with torch.autocast(device, torch.bfloat16):
        check(tensors, options, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [TOKEN, EXPERT], ids=str)
def test_strides_do_not_matter(case: Any, backend: str, device: str) -> None:
    shape, options = case
    tensors = make_inputs(shape, device)
    results = []
    for layout in (lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t.mT.contiguous().mT):
        leaves = [layout(t) if t.dim() > 1 else t for t in tensors]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = call(leaves, **options, backend=backend)
        steps = torch.arange(1.0, 1.0 + shape[1], device=device)
        ((out.probs.mT * steps).sum() + out.gate.sum() + out.importance.sum()).backward()
        results.append([*out, *[leaf.grad for leaf in leaves[:3]]])
    for found in results[1:]:
        for name, a, e in zip(NAMES, found, results[0], strict=True):
            assert_close(name, a, e, 1e-6)


@pytest.mark.parametrize("case", [TOKEN, EXPERT], ids=str)
def test_triton_repeats_bit_for_bit(case: Any, device: str) -> None:
    shape, options = case
    tensors = make_inputs(shape, device)
    first, second = (forward_backward(tensors, options | {"backend": "triton"}) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("right", "wrong", "case"),
    [
        ("tl.where(key == tl.max(key, 1)[:, None], column, W)", "tl.where(key > -9, column, W)", TOKEN),
        ("number_tie < ties", "number_tie <= ties", ((2, 17, 2), {"capacity": 5, "score": "identity"})),
        ("h - tl.sum(h * kept, 1)[:, None] / s", "h", EXPERT),
        ("probs * (grad - tl.sum(grad * probs, 1)[:, None])", "probs * grad", EXPERT),
        ("importance += tl.sum(", "importance = tl.sum(", ((1, 300, 8), {"top_k": 1})),
    ],
)
def test_a_broken_kernel_is_noticed(
    right: str, wrong: str, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    shape, options = case
    broken = break_kernels("token_gate", right, wrong, tmp_path, monkeypatch)
    monkeypatch.setattr(broken, "_PROGRAMS", 1)
    logits, *biases = make_inputs(shape, device)
    with pytest.raises(AssertionError):
        check([logits.round(), *biases], options, "triton")


def test_shapes_do_not_depend_on_the_choices() -> None:
    from switch_moe.experts import TokenChoice
    from switch_moe.kernels import _launch
    from switch_moe.kernels.token_gate import forward

    logits = torch.empty(256, 256, 8, dtype=torch.bfloat16, device="meta")
    for settings_, launches in (
        ((2, False, "softmax", 1, True, 1.0, 1, 1), 2),
        ((64, True, "softmax", 1, False, 1.0, 1, 1), 3),
        ((64, True, "softmax", 1, True, 1.0, 1, 1), 4),
    ):
        with _launch.record(90) as found:
            forward(logits, None, None, None, TokenChoice(*settings_))
        assert len(found) == launches
        assert found[0].programs >= 132  # the multiprocessors of an H200


def operator_arguments(case: Any, device: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    shape, options = case
    tensors = make_inputs(shape, device)
    options = {"score": "softmax", "pool": 1, "normalise": False, "scale": 1.0, "groups": 1, "top_groups": 1,
               **options}  # fmt: skip
    quota, by_expert = (options.get("top_k") or options["capacity"]), "capacity" in options
    names = ("score", "pool", "normalise", "scale", "groups", "top_groups")
    settings_ = (quota, by_expert, *[options[name] for name in names])
    probs, chosen, gate, totals, places = torch.ops.switch_moe.token_gate(*tensors, *settings_)
    grads = torch.randn_like(probs), torch.randn_like(gate), torch.randn_like(totals[0])
    backward = *grads, tensors[0], probs, chosen, places, [True, True], *settings_
    return (*tensors, *settings_), backward


@pytest.mark.parametrize("case", [((2, 7, 4), {"top_k": 2}), ((2, 7, 2), {"capacity": 3})], ids=str)
def test_opcheck(case: Any, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    forward, backward = operator_arguments(case, device)
    operators = torch.ops.switch_moe
    torch.library.opcheck(operators.token_gate.default, forward)
    torch.library.opcheck(operators.token_gate_backward.default, backward)
    without = (None, backward[1], None, *backward[3:7], [False, False], *backward[8:])
    torch.library.opcheck(operators.token_gate_backward.default, without)


def test_operators_stay_in_float32_under_autocast(device: str) -> None:
    forward, backward = operator_arguments(TOKEN, device)
    operators = torch.ops.switch_moe

    def both() -> list[Tensor]:
        return [*operators.token_gate(*forward), *operators.token_gate_backward(*backward)]

    with torch.autocast(device, torch.bfloat16):
        lower = both()
    for a, e in zip(lower, both(), strict=True):
        assert a.dtype == e.dtype
        assert relative_rms(a, e) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", [TOKEN, EXPERT], ids=str)
def test_compile_fullgraph(case: Any, autocast: bool, backend: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    shape, options = case
    tensors = make_inputs(shape, device)

    def function(*arguments: Any, **given: Any) -> TokenGate:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return call(*arguments, **given)

    options = options | {"backend": backend}
    eager = forward_backward(tensors, options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = forward_backward(tensors, options, function=compiled)
    for name, a, e in zip(NAMES, found, eager, strict=True):
        assert_close(name, a, e, 1e-5)


@pytest.mark.parametrize("case", [TOKEN, EXPERT], ids=str)
def test_what_onnx_traces_has_no_sort(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor an operator of our own."""
    shape, options = case
    tensors = make_inputs(shape)
    expected = call(tensors, **options)
    for name in ("ops._backend", "reference.token_gate"):
        module = importlib.import_module(f"switch_moe.{name}")
        monkeypatch.setattr(module, "exporting_onnx", lambda: True)

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            return tuple(call(list(given), **options))

    program = torch.export.export(Module(), tuple(tensors))
    operators = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in operators if "switch_moe" in name or "sort" in name]
    for name, a, e in zip(NAMES, program.module()(*tensors), expected, strict=False):
        assert_close(name, a, e, 1e-6)


@pytest.mark.parametrize("case", [TOKEN, EXPERT], ids=str)
def test_compile_for_any_batch(case: Any, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    (batch, tokens, experts), options = case
    compiled = torch.compile(token_gate, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (batch, 2 * batch):
        logits = make_inputs((size, tokens, experts), device)[0]
        found = compiled(logits, **options, backend="triton")
        for a, e in zip(found, token_gate(logits, **options, backend="triton"), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, r"logits is \[1.0\] \(list\); it must be a tensor"),
        ({"logits": torch.zeros(4, 3)}, ValueError, r"logits has shape \(4, 3\); it must be \[B, T, M\]"),
        ({"logits": torch.zeros(2, 4, 3).int()}, TypeError, r"logits is torch\.int32; it must be"),
        ({"sample_logits": torch.zeros(2, 4)}, ValueError, r"sample_logits has shape \(2, 4\); it must"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\); it must be \[3\]"),
        ({"bias": 0.0}, TypeError, "bias is 0.0"),
        ({"selection_bias": torch.zeros(3).int()}, TypeError, r"selection_bias is torch\.int32"),
        ({"selection_bias": torch.zeros(3, device="meta")}, ValueError, "selection_bias is on meta"),
        ({"top_k": 0}, ValueError, "top_k is 0; it must be between 1 and the number of experts, 3"),
        ({"top_k": 4}, ValueError, "top_k is 4; it must be between 1"),
        ({"top_k": 2.0}, TypeError, "top_k is 2.0"),
        ({"top_k": None}, ValueError, "top_k and capacity: neither given; it must be exactly one"),
        ({"capacity": 2}, ValueError, "top_k and capacity: both given; it must be exactly one of them"),
        ({"top_k": None, "capacity": 5}, ValueError, "capacity is 5; it must be at most 4"),
        ({"top_k": None, "capacity": 5, "pool": 3}, ValueError, "pool is 3; it must divide the num"),
        ({"top_k": None, "capacity": 2, "groups": 3}, ValueError, "groups and top_groups are 3 and 1; they"),
        ({"pool": 2}, ValueError, "pool is 2; it must be 1 with top_k"),
        ({"pool": 0}, ValueError, "pool is 0; it must be at least 1"),
        ({"groups": 2}, ValueError, "groups is 2; it must divide the number of experts, 3"),
        ({"groups": 3}, ValueError, "top_k is 2; 1 groups have 1 experts"),
        ({"groups": 3, "top_groups": 4}, ValueError, "top_groups is 4; it must be at most 3"),
        ({"score": "relu"}, ValueError, "score is 'relu'; it must be one of softmax, sigmoid, identity"),
        ({"normalise": 1}, TypeError, "normalise is 1"),
        ({"scale": float("nan")}, ValueError, "scale is nan; it must be a finite number"),
        ({"backend": "native"}, RuntimeError, "token_gate has no compiled kernel for cpu tensors; use"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'; it must be one of auto, reference, native"),
        ({"logits": torch.zeros(2, 4, 3).double(), "backend": "triton"}, TypeError, r"logits is torch"),
    ],
)  # fmt: skip
def test_errors(change: Settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        token_gate(**({"logits": torch.zeros(2, 4, 3), "top_k": 2} | change))


def test_triton_needs_its_interpreter_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' of token_gate cannot run: a CPU"):
        token_gate(torch.zeros(2, 4, 3), 2, backend="triton")


@pytest.mark.parametrize("case", [TOKEN, EXPERT, CASES[7]], ids=str)
def test_reference_gradients(case: Any) -> None:
    (_, _, experts), options = case
    *leaves, selection = [t.double() for t in make_inputs((2, 20, experts))]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        out = call([*given, selection], **options)
        return out.probs, out.gate, out.importance

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])
