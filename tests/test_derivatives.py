"""Derivatives beyond the first, and other ways to take them: the numbers of the reference on every backend.

Triton runs in its interpreter here (conftest.py). Numbers are compared with the reference in float64, so that
a missing share of a derivative cannot hide.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close, random_model
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from switch_moe import Router, SwitchMoE, ops

B, T, D, M, K, H = 2, 3, 4, 3, 2, 5
INDEX = torch.tensor([[0, 2], [2, 1]], dtype=torch.int32)
TABLE = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]])


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def linear(backend: str, modulate: bool) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return ops.expert_linear(x, weight, bias, INDEX, gate, modulate, backend=backend)

    return call


def mlp(backend: str, gated: bool) -> Callable[..., Tensor]:
    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return ops.expert_mlp(x, *rest[:4], INDEX, rest[4], gated, backend=backend)

    return call


def gate(backend: str, _: bool) -> Callable[..., Tensor]:
    def call(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if backend == "float64":  # the operation takes float32 routers only
            hidden = embedding * embedding.sigmoid()
            probs = torch.softmax(torch.einsum("nd,lmd->lnm", hidden, weight) + bias[:, None], dim=-1)
            gates = probs.sort(dim=-1, descending=True, stable=True).values[..., :K]
        else:
            probs, _, gates = ops.timestep_gate(embedding, weight, bias, K, backend=backend)
        return torch.cat([probs, 2 * gates], dim=-1)

    return call


def prior(backend: str, _: bool) -> Callable[..., Tensor]:
    t, assignment = torch.tensor([2, 0]), torch.tensor([1, 0, 3, 2])

    def call(logits: Tensor) -> Tensor:
        probs = logits.view(B, 2, 2).softmax(-1).flatten(1)
        return ops.diffusion_prior_loss(probs, TABLE.to(probs), t, assignment, 2, 2, backend=backend)

    return call


def token(backend: str, by_expert: bool) -> Callable[..., Tensor]:
    """Scores and gates that are divided by their sum, one way or the other."""
    options = {"capacity": 4, "pool": 2} if by_expert else {"top_k": K, "score": "sigmoid"}

    def call(logits: Tensor, sample_logits: Tensor, bias: Tensor) -> Tensor:
        out = ops.token_gate(
            logits, **options, sample_logits=sample_logits, bias=bias, normalise=True, backend=backend
        )
        squares = out.probs.square(), out.gate.square()  # their own sums are constant
        return torch.cat([*(t.flatten() for t in squares), out.importance])

    return call


OPERATIONS: dict[str, tuple[Callable[..., Any], list[Tensor], tuple[str, ...]]] = {
    "expert_linear": (linear, leaves((B, T, D), (M, D, D), (M, D), (B, K)), ("native", "triton", "auto")),
    "expert_mlp": (
        mlp, leaves((B, T, D), (M, D, 2 * H), (M, 2 * H), (M, H, D), (M, D), (B, K)), ("triton", "auto"),
    ),
    "timestep_gate": (gate, leaves((B, D), (2, M, D), (2, M)), ("triton", "auto")),
    "token_gate": (token, leaves((B, T, M), (B, M), (M,)), ("triton", "auto")),
    "diffusion_prior_loss": (prior, leaves((B, 4)), ("triton", "auto")),
}  # fmt: skip
CASES = [(name, backend) for name, (_, _, backends) in OPERATIONS.items() for backend in backends]
exactly = pytest.mark.parametrize(("name", "backend"), CASES)


def functions(name: str, backend: str, flag: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The operation, and what it must be in float64."""
    make, _, _ = OPERATIONS[name]
    return make(backend, flag), make("float64" if name == "timestep_gate" else "reference", flag)


def arguments(name: str, flag: bool) -> list[Tensor]:
    """In float64; experts of two layers have the width of GELU or of SwiGLU."""
    found = list(OPERATIONS[name][1])
    if name == "expert_mlp" and not flag:
        found[1], found[2] = found[1][..., :H].contiguous(), found[2][..., :H].contiguous()
    return found


def direction(tensor: Tensor) -> Tensor:
    """Where a derivative along it is taken."""
    return torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype).view_as(tensor)


def check(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(str(number), a, e, tolerance)


def penalty_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the norm of all gradients, with upstream nodes: each input is twice another tensor."""
    sources = [tensor.clone().requires_grad_() for tensor in inputs]
    doubled = [2 * source for source in sources]
    out = function(*doubled).square().sum()
    slopes = torch.autograd.grad(out, doubled, create_graph=True)
    assert all(slope.requires_grad for slope in slopes)
    norm = sum(slope.square().sum() for slope in slopes)
    return list(torch.autograd.grad(norm, sources))


@exactly
@pytest.mark.parametrize("flag", [False, True])
def test_gradient_penalties(name: str, backend: str, flag: bool) -> None:
    function, exact = functions(name, backend, flag)
    inputs = arguments(name, flag)
    check(penalty_gradients(function, [t.float() for t in inputs]), penalty_gradients(exact, inputs))


@exactly
@pytest.mark.parametrize("flag", [False, True])
def test_products_with_jacobians_and_hessians(name: str, backend: str, flag: bool) -> None:
    function, exact = functions(name, backend, flag)
    inputs = arguments(name, flag)
    results = []
    for call, given in ((function, [t.float() for t in inputs]), (exact, inputs)):
        vectors = [direction(t) for t in given]
        scalar = lambda *a, call=call: call(*a).square().sum()  # noqa: E731
        found = [
            torch.autograd.functional.jvp(call, tuple(given), tuple(vectors))[1],
            *torch.autograd.functional.hvp(scalar, tuple(given), tuple(vectors))[1],
            *torch.autograd.functional.vhp(scalar, tuple(given), tuple(vectors))[1],
        ]
        results.append(found)
    check(*results)


def test_third_derivatives() -> None:
    function, exact = functions("expert_mlp", "triton", True)
    inputs = arguments("expert_mlp", True)
    results = []
    for call, given in ((function, [t.float() for t in inputs]), (exact, inputs)):
        x = given[0].clone().requires_grad_()
        value = call(x, *given[1:]).sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            value = slope.square().sum()
        results.append([value])
    check(*results)


@exactly
def test_transforms(name: str, backend: str) -> None:
    """grad, vjp, jvp, vmap, per-sample gradients and Hessians of torch.func; dual numbers."""
    function, exact = functions(name, backend, True)
    inputs = arguments(name, True)
    results = []
    for call, given in ((function, [t.float() for t in inputs]), (exact, inputs)):
        numbers = tuple(range(len(given)))
        scalar = lambda *a, call=call: call(*a).square().sum()  # noqa: E731
        tangents = tuple(direction(t) for t in given)
        out, pull = vjp(call, *given)
        with forward_ad.dual_level():
            dual = call(*map(forward_ad.make_dual, given, tangents))
            tangent = forward_ad.unpack_dual(dual).tangent
        ensemble = [torch.stack([t, 2 * t]) for t in given]
        results.append([
            out, *pull(torch.ones_like(out)), tangent, jvp(call, tuple(given), tangents)[1],
            *grad(scalar, numbers)(*given), *vmap(grad(scalar, numbers))(*ensemble), vmap(call)(*ensemble),
            jacfwd(call)(*given), hessian(scalar)(*given),
        ])  # fmt: skip
    check(*results)


@exactly
@pytest.mark.parametrize("flag", [False, True])
def test_a_backward_inside_a_transform(
    name: str, backend: str, flag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward outside, backward inside: jvp, grad and dual numbers of the backward alone."""
    reference = importlib.import_module("switch_moe.reference.expert_mlp")
    monkeypatch.setattr(reference, "silu", lambda x: x * x.sigmoid())  # torch's has no such derivative
    function, exact = functions(name, backend, flag)
    inputs = arguments(name, flag)
    results = []
    for call, given in ((function, [t.float() for t in inputs]), (exact, inputs)):
        leaves = [t.clone().requires_grad_() for t in given]
        out = call(*leaves)

        def pull(v: Tensor, out: Tensor = out, leaves: list[Tensor] = leaves, graph: bool = False) -> Any:
            return torch.autograd.grad(out, leaves, v, retain_graph=True, create_graph=graph)

        v = direction(out.detach()) if out.dim() else torch.ones_like(out)
        _, tangents = jvp(pull, (v,), (v.flip(0) if v.dim() else v,))
        norm = lambda v, pull=pull: sum(g.square().sum() for g in pull(v, graph=True))  # noqa: E731
        with forward_ad.dual_level():
            duals = [forward_ad.unpack_dual(g).tangent for g in pull(forward_ad.make_dual(v, v))]
        results.append([*tangents, *duals, grad(norm)(v)])
    check(*results)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_linearize_and_batches_of_gradients(backend: str) -> None:
    x, weight, bias, gates = (t.float() for t in OPERATIONS["expert_linear"][1])
    call = linear(backend, True)
    out, slope = torch.func.linearize(lambda x: call(x, weight, bias, gates), x)
    right, tangent = jvp(lambda x: call(x, weight, bias, gates), (x,), (direction(x),))
    check([out, slope(direction(x))], [right, tangent], 1e-5)
    x.requires_grad_()
    out = call(x, weight, bias, gates)
    many = torch.stack([torch.ones_like(out), direction(out.detach())])
    (batch,) = torch.autograd.grad(out, x, many, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in many]
    check(batch, each, 1e-5)


def test_an_index_of_inference_mode() -> None:
    x, weight, bias, gates = (t.float().requires_grad_() for t in OPERATIONS["expert_linear"][1])
    with torch.inference_mode():
        index = INDEX.clone()
    ops.expert_linear(x, weight, bias, index, gates).sum().backward()
    assert x.grad is not None


def test_an_index_out_of_range_is_refused_under_a_transform() -> None:
    x, weight, _, gates = (t.float() for t in OPERATIONS["expert_linear"][1])
    for wrong in (-1, M):
        index = torch.full((B, K), wrong)
        call = lambda x, i, g: ops.expert_linear(x[None], weight, None, i[None], g[None])  # noqa: E731
        with pytest.raises(ValueError, match=f"expert_index holds {wrong} to {wrong}; it must stay in"):
            vmap(call)(x, index, gates)


@pytest.mark.parametrize("expert", ["linear", "mlp", "swiglu"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_per_sample_gradients_and_ensembles_of_a_layer(backend: str, expert: str) -> None:
    torch.manual_seed(0)
    layer = SwitchMoE(D, expert=expert, backend=backend)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, e = torch.randn(B, T, D), torch.randn(B, D)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, e: Tensor) -> Tensor:
        return functional_call(layer, p, (x, e)).square().sum()

    each = vmap(grad(lambda p, x, e: loss(p, x[None], e[None])), (None, 0, 0))(parameters, x, e)
    layer(x, e).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert_close(name, each[name].sum(0), parameter.grad, 1e-5)
    two = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    out = vmap(lambda p: functional_call(layer, p, (x, e)))(two)
    assert_close("first of two", out[0], layer(x, e), 1e-5)


@pytest.mark.parametrize("routing", ["switch", "none"])
def test_the_whole_model(routing: str) -> None:
    """Consistency models and MeanFlow need jvp through the model, in its input and its time.

    Times are embedded in float32, so differences of them are wide.
    """
    torch.manual_seed(0)
    model = random_model(routing=routing).eval().double()
    x, t, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([100.0, 700.0]).double(), torch.tensor([1, 2])
    with sdpa_kernel(SDPBackend.MATH):
        for wrt, point, step in ((lambda z: model(z, t, y), x, 1e-5), (lambda z: model(x, z, y), t, 0.05)):
            along = torch.ones_like(point)
            out, slope = jvp(wrt, (point,), (along,))
            numeric = (wrt(point + step * along) - wrt(point - step * along)) / (2 * step)
            assert_close("out", out, wrt(point), 1e-5)
            assert_close("slope", slope, numeric, 1e-2)


def test_a_router_with_a_transform_inside_a_compiled_program() -> None:
    router, e = Router(2, 16, backend="auto"), torch.randn(3, 16)
    of = grad(lambda z: router(z).probs[..., 0].sum())
    assert_close("gradient", torch.compile(of, fullgraph=True, backend="aot_eager")(e), of(e), 1e-5)


def test_double_backward_of_a_compiled_program_is_an_error() -> None:
    x, *rest = (t.float() for t in OPERATIONS["expert_linear"][1])
    x.requires_grad_()
    out = torch.compile(linear("auto", True), backend="aot_eager")(x, *rest)
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        slope.square().sum().backward()
