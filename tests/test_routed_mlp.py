"""Two-layer experts over routes: the reference against a loop over pairs, backends against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, assert_error_rule
from torch import Tensor
from torch.nn import functional as F

from switch_moe import Routes, TokenMoE, ops
from switch_moe.cpu import routed_mlp as cpu
from switch_moe.ops.routed_mlp import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight_in", "bias_in", "weight_out", "bias_out", "gate", "base")


def case(
    rows: int, size: int, hidden: int, num_experts: int, slots: int, activation: str, bias: bool = True,
    base: bool = True, seed: int = 0,
) -> tuple[dict[str, Tensor | None], Tensor]:  # fmt: skip
    """Arguments in float64 and the experts of each row, some of them none."""
    g = torch.Generator().manual_seed(seed)
    width = 2 * hidden if activation.startswith("swiglu") else hidden

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale

    index = torch.randint(-1, num_experts, (rows, slots), generator=g)
    values = {
        "x": normal(rows, size),
        "weight_in": normal(num_experts, size, width, scale=size**-0.5),
        "bias_in": normal(num_experts, width) if bias else None,
        "weight_out": normal(num_experts, hidden, size, scale=hidden**-0.5),
        "bias_out": normal(num_experts, size) if bias else None,
        "gate": torch.rand((rows, slots), generator=g, dtype=torch.float64),
        "base": normal(rows, size) if base else None,
    }
    return values, index


def run(
    values: dict[str, Tensor | None], index: Tensor, activation: str, dtype: torch.dtype, backend: str,
    expanded: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Output and gradients, from a gradient of the output that is ``expanded`` if so wished."""
    types = {"gate": torch.float64 if dtype == torch.float64 else torch.float32}
    given = {
        name: None if v is None else v.to(types.get(name, dtype), copy=True).requires_grad_()
        for name, v in values.items()
    }
    routes = Routes.of_rows(index, given["gate"], len(given["weight_in"]))
    weights = [given[name] for name in ("weight_in", "bias_in", "weight_out", "bias_out")]
    out = ops.routed_mlp(given["x"], *weights, routes, activation, base=given["base"], backend=backend)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(cotangent.to(dtype)[:1].expand(out.shape) if expanded else cotangent.to(dtype))
    return [out, *(given[name].grad for name in NAMES if given[name] is not None)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_a_loop_over_pairs(activation: str) -> None:
    values, index = case(7, 6, 10, 3, 2, activation)
    out = run(values, index, activation, torch.float64, "reference")[0]
    act = {
        "gelu": lambda h: F.gelu(h, approximate="tanh"),
        "gelu_erf": F.gelu,
        "relu": F.relu,
        "swiglu": lambda h: F.silu(h[:10]) * h[10:],
        "swiglu_second": lambda h: h[:10] * F.silu(h[10:]),
    }[activation]
    for r in range(7):
        expected = values["base"][r].clone()
        for e, gate in zip(index[r].tolist(), values["gate"][r], strict=True):
            if e >= 0:
                units = act(values["x"][r] @ values["weight_in"][e] + values["bias_in"][e])
                expected += gate * (units @ values["weight_out"][e] + values["bias_out"][e])
        torch.testing.assert_close(out[r], expected)


def check_native(
    values: dict[str, Tensor | None], index: Tensor, activation: str, dtype: torch.dtype, **options: Any
) -> None:
    """Output and every gradient of the compiled code against the reference in float64."""
    exact = run(values, index, activation, torch.float64, "reference", **options)
    same = run(values, index, activation, dtype, "reference", **options)
    found = run(values, index, activation, dtype, "native", **options)
    names = ["out", *(name for name in NAMES if values[name] is not None)]
    for name, a, b, c in zip(names, found, exact, same, strict=True):
        assert_error_rule(name, a, b, c, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_native_against_float64(activation: str, dtype: torch.dtype, bias: bool, poisoned_memory) -> None:
    check_native(*case(45, 24, 40, 5, 3, activation, bias, base=bias), activation, dtype)


@pytest.mark.parametrize("choose", ["nobody", "one of all", "some", "twice", "one", "not all"])
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.float32), (2, torch.float32), *((67, dtype) for dtype in DTYPES)], ids=str
)
def test_choices_of_experts(rows: int, choose: str, dtype: torch.dtype, poisoned_memory) -> None:
    values, index = case(rows, 17, 35, 4, 3, "swiglu", seed=rows)
    same = {"nobody": [-1, -1, -1], "one of all": [2, -1, -1], "twice": [1, 3, 1], "one": [1, 1, 1]}
    if choose in same:
        index = torch.tensor(same[choose]).expand_as(index)
    check_native(values, index.clamp(max=2) if choose == "not all" else index, "swiglu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_and_compiled_products(dtype: torch.dtype, monkeypatch, poisoned_memory) -> None:
    """An expert's pairs in several parts, and products by the code that large calls take."""
    monkeypatch.setattr(cpu, "_MOST_PAIRS", 16)
    monkeypatch.setattr(cpu.linear, "COMPILED_FROM", 0)
    for activation in ("gelu", "swiglu_second"):
        check_native(*case(70, 50, 52, 3, 2, activation), activation, dtype)


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_layouts(kind: str) -> None:
    values, index = case(9, 6, 10, 3, 2, "gelu")
    if kind == "transposed":
        values = {
            n: None if v is None else v.mT.contiguous().mT if v.dim() > 1 else v for n, v in values.items()
        }
    check_native(values, index.mT.contiguous().mT, "gelu", torch.float32, expanded=kind == "expanded")


def test_no_rows_and_no_pairs() -> None:
    values, index = case(0, 6, 10, 3, 2, "gelu")
    out, *grads = run(values, index, "gelu", torch.float32, "native")
    assert out.shape == (0, 6)
    assert all(grad.eq(0).all() for grad in grads)


def test_one_weight_of_many_needs_a_gradient() -> None:
    """What is not wanted is not computed, and the rest is the same."""
    values, index = case(20, 8, 12, 3, 2, "swiglu")
    every = dict(zip(NAMES, run(values, index, "swiglu", torch.float32, "native")[1:], strict=True))
    for name in NAMES:
        given = {n: v.float().requires_grad_(n == name) for n, v in values.items()}
        routes = Routes.of_rows(index, given["gate"], 3)
        out = ops.routed_mlp(*(given[n] for n in NAMES[:5]), routes, "swiglu", base=given["base"])
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        out.backward(cotangent.float())
        assert torch.equal(given[name].grad, every[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_with_any_number_of_threads(dtype: torch.dtype, monkeypatch) -> None:
    values, index = case(200, 96, 130, 3, 2, "swiglu")
    before, found = torch.get_num_threads(), []
    for compiled_from in (0, 2**60):
        monkeypatch.setattr(cpu.linear, "COMPILED_FROM", compiled_from)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run(values, index, "swiglu", dtype, "native"))
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, found[-3], found[-2]))
        assert all(map(torch.equal, found[-2], found[-1]))


def test_rows_that_experts_chose_and_a_dense_layer() -> None:
    values, _ = case(12, 6, 10, 3, 1, "gelu")
    given = {name: value.float() for name, value in values.items()}
    chosen = torch.stack(
        [torch.randperm(12, generator=torch.Generator().manual_seed(i))[:5] for i in range(3)]
    )
    for routes, experts in (
        (Routes.of_experts(chosen, torch.rand(3, 5), 12), 3),
        (Routes.to_one(given["x"]), 1),
    ):
        arguments = (given["x"], *(given[name][:experts] for name in NAMES[1:5]), routes)
        found, exact = (ops.routed_mlp(*arguments, backend=name) for name in ("native", "reference"))
        assert_close("out", found, exact, 1e-6)


def test_operators(poisoned_memory) -> None:
    torch.use_deterministic_algorithms(False)
    values, index = case(7, 6, 10, 3, 2, "swiglu")
    given = {name: value.float() for name, value in values.items()}
    routes = Routes.of_rows(
        index.clamp(min=0), given["gate"], 3
    )  # nobody writes what padding has in `hidden`
    forward, backward = torch.ops.switch_moe.routed_mlp, torch.ops.switch_moe.routed_mlp_backward
    arguments = [given["x"], *(given[name] for name in NAMES[1:5]), *routes]
    torch.library.opcheck(forward, (*arguments, given["base"], "swiglu", True, "native"))
    torch.library.opcheck(forward, (*arguments, None, "swiglu", False, "native"))
    hidden = torch.randn(len(routes.row), 20)
    for wanted in ([True] * 6, [False, True, False, True, False, False]):
        torch.library.opcheck(backward, (given["base"], *arguments, hidden, "swiglu", wanted, "native"))


@pytest.mark.parametrize("autocast", [False, True])
def test_compile(autocast: bool) -> None:
    values, index = case(7, 6, 10, 3, 2, "gelu")
    leaves = [values[name].float().requires_grad_() for name in NAMES]

    def layer(x: Tensor, *others: Tensor) -> Tensor:
        *weights, gate, base = others
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return ops.routed_mlp(x, *weights, Routes.of_rows(index, gate, 3), base=base).float()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = layer(*leaves), compiled(*leaves)
    pairs = zip(
        torch.autograd.grad(expected.sum(), leaves), torch.autograd.grad(found.sum(), leaves), strict=True
    )
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in pairs)
    dense = layer(*(leaf.bfloat16() for leaf in leaves[:5]), *leaves[5:6], leaves[6].bfloat16())
    assert torch.equal(dense, expected) == autocast


def test_second_derivatives() -> None:
    values, index = case(5, 4, 6, 3, 2, "gelu")

    def second(backend: str) -> tuple[Tensor, ...]:
        leaves = [values[name].float().requires_grad_() for name in NAMES]
        routes = Routes.of_rows(index, leaves[5], 3)
        out = ops.routed_mlp(*leaves[:5], routes, base=leaves[6], backend=backend)
        first = torch.autograd.grad(out.square().sum(), leaves[:6], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    for name, a, b in zip(NAMES, second("native"), second("reference"), strict=True):
        assert_close(name, a, b, 1e-5)


def test_saved_for_the_backward() -> None:
    """Of the experts the hidden layer before its activation, and no row of an expert's input or output."""
    values, index = case(30, 8, 12, 3, 2, "swiglu")
    given = {name: value.float().requires_grad_() for name, value in values.items()}
    routes, saved = Routes.of_rows(index, given["gate"], 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.routed_mlp(*(given[name] for name in NAMES[:5]), routes, "swiglu", base=given["base"])
    own = {t.data_ptr() for t in (*given.values(), *routes)}
    assert [t.shape for t in saved if t.data_ptr() not in own] == [(60, 24)]


def test_an_exported_program_runs_where_gradients_are_on() -> None:
    """It calls the operator itself, without the autograd.Function around it."""
    layer, x = TokenMoE(8, 3, backend="native"), torch.randn(2, 5, 8)
    program = torch.export.export(layer.eval(), (x,)).module()
    assert_close("exported", program(x), layer(x), 1e-6)
