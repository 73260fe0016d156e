"""Random calls of every operation and layer against float64; random bad calls, which must be refused by name.

    python tests/fuzz_ops.py --calls 10000 --memory 5000    # make fuzz
    python tests/fuzz_ops.py --seed 4711                    # one call again

A call is a function of its seed: shapes (0, 1, odd, past a tile), types, layouts, the gradients asked for,
autocast, inference mode, thread counts, another thread, the CPU's vector width, the backend.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from switch_moe import DiffusionPrior, Router, Routes, SwitchMoE, native, ops
from switch_moe.cpu import expert_linear as cpu
from switch_moe.ops import _backend

SIZES = (0, 1, 2, 3, 5, 8, 16, 17, 33)
TOKENS = (0, 1, 2, 5, 17, 48, 70)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GROWTH = 8 << 20  # bytes that the process may grow by after WARM_UP calls
WARM_UP = 1000

Arguments = dict[str, Any]
Function = Callable[..., Any]


class Fault(AssertionError):
    """A wrong number, or a bad call that was not refused by name."""


class Chooser(random.Random):
    """Random arguments."""

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(32))
        return torch.randn(shape, generator=generator).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(32))
        return torch.randint(low, max(high, low + 1), shape, generator=generator).to(dtype)

    def layout(self, tensor: Tensor, expanded: bool = True) -> Tensor:
        """The same numbers otherwise in memory; an expanded one repeats its first part."""
        kinds = ("plain", "plain", "transposed", "odd offset", "every second", "expanded")
        kind = self.choice(kinds if expanded else kinds[:-1])
        if tensor.dim() == 0 or tensor.numel() == 0 or kind == "plain":
            return tensor
        if kind == "transposed":
            order = self.sample(range(tensor.dim()), tensor.dim())
            back = [order.index(axis) for axis in range(tensor.dim())]
            return tensor.permute(order).contiguous().permute(back)
        if kind == "odd offset":
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        if kind == "every second":
            return torch.stack([tensor, tensor], dim=-1)[..., 0]
        return tensor.narrow(self.randrange(tensor.dim()), 0, 1).expand(tensor.shape)


def expert_routing(r: Chooser, batch: int, experts: int) -> tuple[Tensor, Tensor]:
    top_k = r.randint(1, 4)
    index = r.integers(0, experts, batch, top_k, dtype=r.choice((torch.int32, torch.int64)))
    gate = r.tensor(batch, top_k).abs()
    if batch and r.random() < 0.3:  # one timestep for all, as in sampling
        index, gate = index[:1].expand(batch, -1), gate[:1].expand(batch, -1)
    return index, gate


def expert_linear(r: Chooser) -> tuple[Function, Arguments]:
    batch, tokens, (d_in, d_out) = r.choice(SIZES[:7]), r.choice(TOKENS), r.choices(SIZES, k=2)
    experts, dtype = r.randint(1, 6), r.choice(FLOATS)
    modulate = r.random() < 0.4
    d_out = d_in if modulate else d_out
    index, gate = expert_routing(r, batch, experts)
    return ops.expert_linear, {
        "x": r.tensor(batch, tokens, d_in, dtype=dtype),
        "weight": r.tensor(experts, d_in, d_out, dtype=dtype) / max(d_in, 1) ** 0.5,
        "bias": r.tensor(experts, d_out, dtype=dtype) if r.random() < 0.7 else None,
        "expert_index": index, "expert_gate": gate, "modulate": modulate,
        "backend": backend(r, ("auto", "native", "reference"), batch * tokens * d_in * d_out, dtype),
    }  # fmt: skip


def expert_mlp(r: Chooser) -> tuple[Function, Arguments]:
    batch, tokens, size, hidden = r.choice(SIZES[:6]), r.choice(TOKENS), r.choice(SIZES), r.choice(SIZES)
    experts, dtype, gated, bias = r.randint(1, 5), r.choice(FLOATS), r.random() < 0.5, r.random() < 0.7
    width = 2 * hidden if gated else hidden
    index, gate = expert_routing(r, batch, experts)
    return ops.expert_mlp, {
        "x": r.tensor(batch, tokens, size, dtype=dtype),
        "weight_in": r.tensor(experts, size, width, dtype=dtype) / max(size, 1) ** 0.5,
        "bias_in": r.tensor(experts, width, dtype=dtype) if bias else None,
        "weight_out": r.tensor(experts, hidden, size, dtype=dtype) / max(hidden, 1) ** 0.5,
        "bias_out": r.tensor(experts, size, dtype=dtype) if bias else None,
        "expert_index": index, "expert_gate": gate, "gated": gated,
        "backend": backend(r, ("auto", "native", "reference"), batch * tokens * size * hidden, dtype),
    }  # fmt: skip


def routed_mlp(r: Chooser) -> tuple[Function, Arguments]:
    rows, size, hidden, slots = r.choice(SIZES), r.choice(SIZES), r.choice(SIZES), r.randint(1, 4)
    experts, dtype, bias = r.randint(1, 5), r.choice(FLOATS), r.random() < 0.7
    activation = r.choice(("gelu", "gelu_erf", "relu", "swiglu", "swiglu_second"))
    width = 2 * hidden if activation.startswith("swiglu") else hidden

    def of_rows(index: Tensor, gate: Tensor, **options: Any) -> Tensor:
        return ops.routed_mlp(routes=Routes.of_rows(index, gate, experts), **options)

    return of_rows, {
        "x": r.tensor(rows, size, dtype=dtype),
        "weight_in": r.tensor(experts, size, width, dtype=dtype) / max(size, 1) ** 0.5,
        "bias_in": r.tensor(experts, width, dtype=dtype) if bias else None,
        "weight_out": r.tensor(experts, hidden, size, dtype=dtype) / max(hidden, 1) ** 0.5,
        "bias_out": r.tensor(experts, size, dtype=dtype) if bias else None,
        "index": r.integers(-1, experts, rows, slots, dtype=r.choice((torch.int32, torch.int64))),
        "gate": r.tensor(rows, slots).abs(), "activation": activation,
        "base": r.tensor(rows, size, dtype=dtype) if r.random() < 0.5 else None,
        "backend": r.choice(("auto", "native", "reference")),
    }  # fmt: skip


def timestep_gate(r: Chooser) -> tuple[Function, Arguments]:
    rows, size, depth, experts = r.choice(SIZES), r.choice(SIZES), r.randint(1, 4), r.randint(1, 9)

    def probs_and_gates(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        if (
            getattr(options["embedding"], "dtype", None) == torch.float64
        ):  # the operation takes float32 routers only
            e, weight, bias = (options[name] for name in ("embedding", "weight", "bias"))
            logits = torch.einsum("nd,lmd->lnm", torch.nn.functional.silu(e), weight) + bias[:, None]
            probs = logits.softmax(-1)
            return probs, probs.sort(dim=-1, descending=True, stable=True).values[..., : options["top_k"]]
        probs, index, gates, *_ = ops.timestep_gate(*arguments, **options)
        if not torch.equal(probs.gather(2, index.long()), gates):
            raise Fault("gates are not the probabilities at expert_index")
        return probs, gates

    return probs_and_gates, {
        "embedding": r.tensor(rows, size, dtype=r.choice((*FLOATS, torch.float32))),
        "weight": r.tensor(depth, experts, size), "bias": r.tensor(depth, experts),
        "top_k": r.randint(1, experts), "selected": r.random() < 0.3,
        "backend": backend(r, ("auto", "reference"), rows * size * depth * experts, torch.float32),
    }  # fmt: skip


def token_gate(r: Chooser) -> tuple[Function, Arguments]:
    batch, tokens, experts = r.choice(SIZES[:5]), r.choice(SIZES), r.randint(1, 9)
    groups = r.choice([size for size in range(1, experts + 1) if experts % size == 0])
    top_groups = r.randint(1, groups)
    choice = {"top_k": r.randint(1, top_groups * experts // groups), "groups": groups}
    choice["top_groups"] = top_groups
    if tokens and r.random() < 0.5:
        pool = r.choice([size for size in range(1, max(2, batch + 1)) if batch % size == 0])
        choice = {"capacity": r.randint(1, pool * tokens), "pool": pool}

    def differentiable(**options: Any) -> tuple[Tensor, ...]:
        out = ops.token_gate(**options)
        return out.probs, out.gate, out.importance

    score = r.choice(("softmax", "sigmoid", "identity"))
    biases = {"sample_logits": (batch, experts), "bias": (experts,), "selection_bias": (experts,)}
    kinds = {name: r.choice((*FLOATS, torch.float32)) for name in ("logits", *biases)}
    return differentiable, {
        "logits": r.tensor(batch, tokens, experts, dtype=kinds["logits"]),
        **{n: r.tensor(*s, dtype=kinds[n]) for n, s in biases.items() if r.random() < 0.5},
        # The sum of an identity's scores may be near zero.
        **choice, "score": score, "normalise": score != "identity" and r.random() < 0.5,
        "scale": r.choice((1.0, 2.5)),
        "backend": backend(r, ("auto", "reference"), 20 * batch * tokens * experts, torch.float32),
    }  # fmt: skip


def diffusion_prior_loss(r: Chooser) -> tuple[Function, Arguments]:
    batch, depth, experts, steps = r.randint(1, 9), r.randint(1, 3), r.randint(1, 5), r.randint(1, 30)
    slots, active = depth * experts, depth * r.randint(1, experts)
    probs = r.tensor(batch, depth, experts).softmax(-1).flatten(1)
    return ops.diffusion_prior_loss, {
        "probs": probs.to(r.choice(FLOATS)), "table": (r.tensor(steps, slots) > 0).to(r.choice(FLOATS)),
        "t": r.integers(0, steps, batch, dtype=r.choice((torch.int32, torch.int64))),
        "assignment": torch.randperm(slots), "depth": depth, "active": active,
        "backend": backend(r, ("auto", "reference"), batch * slots, torch.float32),
    }  # fmt: skip


def layer(r: Chooser) -> tuple[Function, Arguments]:
    size, experts = r.choice(SIZES[1:]), r.randint(1, 5)
    kind = r.choice(("linear", "mlp", "swiglu"))
    made = SwitchMoE(size, experts, r.randint(1, experts), expert=kind, bias=r.random() < 0.7)
    for parameter in made.parameters():
        parameter.data = r.tensor(*parameter.shape) * 0.3
    exact = SwitchMoE(
        size, experts, made.top_k, expert=kind, bias=made.state_dict().keys() & {"bias", "bias_in"} != set()
    )
    exact.load_state_dict(made.state_dict())
    exact.double().backend = "reference"
    modulate = r.random() < 0.5

    def call(x: Tensor, time_embedding: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return made(x, time_embedding, modulate=modulate)
        return exact(x, time_embedding.float(), modulate=modulate)

    batch = r.choice(SIZES[:7])
    return call, {"x": r.tensor(batch, r.choice(TOKENS), size), "time_embedding": r.tensor(batch, size)}


OPERATIONS = (
    expert_linear, expert_linear, expert_mlp, routed_mlp, timestep_gate, token_gate, diffusion_prior_loss,
    layer,
)  # fmt: skip


def backend(r: Chooser, names: tuple[str, ...], work: int, dtype: torch.dtype) -> str:
    """One of the backends; the interpreter of Triton takes small calls only."""
    small = work < 3000 and (dtype != torch.bfloat16 or _backend.INTERPRETER_HAS_BFLOAT16)
    return r.choice((*names, "triton")) if small and _backend.interpreting() else r.choice(names)


@contextlib.contextmanager
def surroundings(r: Chooser) -> Iterator[None]:
    """Other numbers of threads, and the products of a processor with shorter vectors, or with none."""
    threads, width = torch.get_num_threads(), r.choice((None, None, None, 0, 8))
    torch.set_num_threads(r.choice((1, 2, 3)))

    def narrower(dtype: torch.dtype) -> int:
        code = cpu.DTYPE_CODE.get(dtype)
        takes = code is not None and width and native.cpu.require().fused_product_takes(code, width)
        return width if takes else 0

    patch = contextlib.nullcontext() if width is None else mock.patch.object(cpu, "vector_width", narrower)
    try:
        with patch:
            yield
    finally:
        torch.set_num_threads(threads)


def in_another_thread(run: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(run())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def evaluate(
    function: Function, arguments: Arguments, wanted: list[str], grads: list[Tensor] | None, mode: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of ``wanted``; without ``grads`` the gradients of the outputs are ones."""
    given = dict(arguments)
    for name in wanted:
        given[name] = given[name].detach().requires_grad_()
    with torch.inference_mode() if mode == "inference" else contextlib.nullcontext():
        outputs = function(**given)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    found = []
    if wanted:
        weights = [torch.ones_like(out) for out in outputs] if grads is None else grads
        weights = [weight.to(out.dtype) for weight, out in zip(weights, outputs, strict=True)]
        found = list(
            torch.autograd.grad(outputs, [given[name] for name in wanted], weights, allow_unused=True)
        )
        found = [torch.zeros_like(given[n]) if g is None else g for n, g in zip(wanted, found, strict=True)]
    return [out.detach() for out in outputs], found


def exactly(arguments: Arguments) -> Arguments:
    """The arguments of the reference in float64."""
    doubled = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()
    }
    return doubled | ({"backend": "reference"} if "backend" in doubled else {})


def error_of(actual: Tensor, expected: Tensor) -> float:
    difference, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def check_values(r: Chooser) -> str:
    """One valid call; returns what it was."""
    function, arguments = r.choice(OPERATIONS)(r)
    # Expanded routers have ties, which rounding breaks in another order than float64.
    arguments = {
        n: r.layout(v, "embedding" not in arguments) if isinstance(v, Tensor) and n != "assignment" else v
        for n, v in arguments.items()
    }
    mode = r.choice(("grad", "grad", "grad", "inference", "no_grad"))
    floats = [
        n
        for n, v in arguments.items()
        if isinstance(v, Tensor) and v.is_floating_point() and n not in ("table", "selection_bias")
    ]
    wanted = r.sample(floats, r.randint(1, len(floats))) if mode == "grad" else []
    what = ", ".join(f"{n}={shown(v)}" for n, v in arguments.items()) + f"; {mode}, gradients of {wanted}"
    with torch.no_grad() if mode == "no_grad" else contextlib.nullcontext():
        right, _ = evaluate(function, exactly(arguments), [], None, "grad")
        grads = [r.layout(r.tensor(*out.shape)) for out in right]
        right, right_grads = evaluate(function, exactly(arguments), wanted, grads, "grad")
        same, same_grads = right, right_grads
        narrow = {v.dtype for v in arguments.values() if isinstance(v, Tensor)} & {
            torch.bfloat16,
            torch.float16,
        }
        if narrow and "backend" in arguments:
            same, same_grads = evaluate(function, arguments | {"backend": "reference"}, wanted, grads, "grad")
        with surroundings(r):
            run = lambda: evaluate(function, arguments, wanted, grads, mode)  # noqa: E731
            found, found_grads = in_another_thread(run) if r.random() < 0.1 else run()
    names = [f"output {i}" for i in range(len(right))] + [f"gradient of {name}" for name in wanted]
    for name, actual, expected, rounded in zip(
        names, found + found_grads, right + right_grads, same + same_grads, strict=True
    ):
        if actual.shape != expected.shape:
            raise Fault(f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}: {what}")
        # The reference may be lucky where there are few numbers, so one rounding step is always allowed.
        step = max((torch.finfo(dtype).eps for dtype in narrow), default=0.0)
        allowed = max(2e-5, step, 3 * error_of(rounded, expected) if narrow else 0.0)
        tiny = 1e-6 * max(float(expected.double().abs().max()) if expected.numel() else 0.0, 1.0)
        error = error_of(actual, expected)
        if not error <= allowed and not float((actual.double() - expected).abs().max()) <= tiny:
            raise Fault(f"{name} is off by {error:.1e}, {allowed:.1e} is allowed: {what}")
    return what


def check_assignment(r: Chooser) -> str:
    """Linear assignment and matching: at the reference's cost, and a permutation."""
    n = r.choice((0, 1, 2, 3, 7, 16, 20))
    if r.random() < 0.5:
        dtype = r.choice((torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int8))
        cost = (
            r.integers(-100, 100, n, n).to(dtype)
            if not dtype.is_floating_point
            else r.tensor(n, n, dtype=dtype)
        )
        cost = r.layout(cost)
        exact = cost.double()
        prices = torch.zeros(n, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
        with surroundings(r):
            found = ops.linear_assignment(cost, prices=prices if r.random() < 0.5 else None)
        right = ops.linear_assignment(cost, backend="reference")
        what = f"linear_assignment of {shown(cost)}"
    else:
        steps = r.choice((1, 5, 64, 65, 200))
        selected, table = ((r.tensor(steps, n) > 0).to(r.choice(FLOATS)) for _ in range(2))
        orders = [
            torch.randperm(n, generator=torch.Generator().manual_seed(r.getrandbits(32))) for _ in range(2)
        ]
        selected, table = r.layout(selected), r.layout(table)
        exact = (selected.double().t()[:, None] - table.double().t()[None]).abs().sum(-1)
        with surroundings(r):
            found = ops.match_columns(selected, table, *orders)
        right = ops.match_columns(selected, table, *orders, backend="reference")
        what = f"match_columns of {shown(selected)} and {shown(table)}"
    if sorted(found.tolist()) != list(range(n)):
        raise Fault(f"{found.tolist()} is no permutation: {what}")
    totals = [float(exact[torch.arange(n), columns].sum()) for columns in (found, right)]
    if abs(totals[0] - totals[1]) > 1e-9 * max(1.0, abs(totals[1])):
        raise Fault(f"the total is {totals[0]}, not {totals[1]}: {what}")
    return what


def check_routes(r: Chooser) -> str:
    """The rows of every expert in their order, with their gates, and the slots of every row."""
    rows, slots, experts = r.choice(SIZES), r.randint(1, 3), r.randint(1, 9)
    index = r.layout(r.integers(-1, experts, rows, slots, dtype=r.choice((torch.int32, torch.int64))))
    gate, path = r.layout(r.tensor(rows, slots)), backend(r, ("auto", "reference"), 100, torch.float32)
    routes = Routes.of_rows(index, gate, experts, backend=path)
    what = f"Routes.of_rows({shown(index)}, {shown(gate)}, {experts}, backend={path!r})"
    for e in range(experts):
        first, last = routes.offsets[e : e + 2].tolist()
        right = [index == e, torch.arange(rows)[:, None].expand(rows, slots)]
        if not torch.equal(routes.row[first:last], right[1][right[0]].int()):
            raise Fault(f"expert {e} has rows {routes.row[first:last].tolist()}: {what}")
        if not torch.equal(routes.gate[first:last], gate[right[0]]):
            raise Fault(f"expert {e} has gates {routes.gate[first:last].tolist()}: {what}")
    if not torch.equal(routes.slot >= 0, index >= 0):
        raise Fault(f"slots are {routes.slot.tolist()}: {what}")
    taken = routes.slot[index >= 0].long()
    if not torch.equal(routes.gate[taken], gate[index >= 0]):
        raise Fault(f"slots name other pairs: {what}")
    return what


def check_modules(r: Chooser) -> str:
    """Router and prior: shapes, sums to one, a finite loss."""
    depth, experts, size, rows = r.randint(1, 4), r.randint(1, 6), r.choice(SIZES[1:]), r.choice(SIZES[1:])
    top_k, steps = r.randint(1, experts), r.choice((1, 2, 50, 1000))
    routing = Router(depth, size, experts, top_k)(r.layout(r.tensor(rows, size)), selected=True)
    what = f"Router({depth}, {size}, {experts}, {top_k}) of {rows} rows"
    if not torch.allclose(routing.probs.sum(-1), torch.ones(depth, rows), atol=1e-5):
        raise Fault(f"probabilities do not sum to one: {what}")
    if not torch.equal(routing.selected().sum(1), torch.full((rows,), float(depth * top_k))):
        raise Fault(f"selected() has other than k experts a block: {what}")
    prior = DiffusionPrior(depth, experts, top_k, steps, alpha=r.choice((0.5, 1.0, 4.0)))
    assignment = prior.match((r.tensor(steps, depth * experts) > 0).float())
    t = r.integers(0, steps, rows)
    loss = prior.loss(routing.probs.transpose(0, 1).flatten(1), t, assignment)
    if not -1e-6 <= float(loss.detach()) < 1:  # zero up to rounding
        raise Fault(f"the prior loss is {float(loss.detach())}: {what}")
    return what


def check_refusal(r: Chooser) -> str:
    """One argument of a valid call is spoiled; the error must be of the right type and name it."""
    operations = (expert_linear, expert_mlp, timestep_gate, token_gate, diffusion_prior_loss)
    function, arguments = r.choice(operations)(r)
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    name = r.choice(tensors)
    value = arguments[name]
    spoilt: dict[str, Any] = {
        "a list": value.tolist() if value.numel() < 100 else [1.0], "a number": 1.5, "a string": "x",
        "one dimension more": value[None], "no dimension": value.sum(),
        "complex": value.to(torch.complex64), "bool": value > 0, "on meta": value.to("meta"),
    }  # fmt: skip
    if "bias" not in name and name != "sample_logits":
        spoilt["None"] = None
    if value.dim() > 1 and value.numel():
        spoilt["sparse"] = value.to_sparse()
    if name in ("expert_index", "t", "assignment") and value.numel():
        for wrong in (-1, 10**6):
            changed = value.clone()
            changed.view(-1)[r.randrange(value.numel())] = wrong
            spoilt[f"with {wrong}"] = changed
    if name == "table":
        spoilt.pop("bool")
        if value.numel():
            spoilt["with 0.5"] = torch.where(torch.ones_like(value) > 0, 0.5, value).to(value.dtype)
    if name in ("x", "embedding", "logits", "probs"):
        spoilt.pop("on meta")  # then the others are elsewhere
    kind = r.choice(sorted(spoilt))
    what = f"{name} {kind}: " + ", ".join(f"{n}={shown(v)}" for n, v in arguments.items())
    try:
        function(**(arguments | {name: spoilt[kind]}))
    except (ValueError, TypeError) as error:
        if name not in str(error):
            raise Fault(f"the error does not name the argument ({error}): {what}") from None
        return what
    except Exception as error:  # any other kind is a fault of its own
        raise Fault(f"{type(error).__name__} ({error}) in place of ValueError or TypeError: {what}") from None
    raise Fault(f"not refused: {what}")


def shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {list(value.stride())}"


CHECKS = (
    check_values,
    check_values,
    check_values,
    check_refusal,
    check_assignment,
    check_routes,
    check_modules,
)


def call(seed: int) -> str:
    """The call of a seed; raises :class:`Fault` where it is wrong."""
    r = Chooser(seed)
    torch.manual_seed(seed)
    return r.choice(CHECKS)(r)


def fault(seed: int) -> str:
    """What is wrong with the call of a seed; empty where nothing is."""
    try:
        call(seed)
    except Exception as error:  # whatever a call raises that nobody expected is a fault
        return f"{type(error).__name__}: {error}"
    return ""


def resident() -> int:
    """Bytes of memory that the process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000, help="10000 by default")
    parser.add_argument("--memory", type=int, default=0, help="watch the memory over this many more calls")
    parser.add_argument("--first", type=int, default=0, help="seed of the first call")
    parser.add_argument("--seed", type=int, help="the seed of a single call, which is printed")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        print(call(arguments.seed))
        return 0
    wrong = 0
    for seed in range(arguments.first, arguments.first + arguments.calls):
        if found := fault(seed):
            wrong += 1
            print(f"seed {seed}: {found}", flush=True)
    print(f"{arguments.calls} calls, {wrong} wrong", flush=True)
    grown = growth(arguments.memory)
    print(f"memory grew by {grown / 2**20:.1f} MiB over {arguments.memory} calls")
    return 1 if wrong or grown > GROWTH else 0


def growth(calls: int) -> int:
    """Bytes that the process has grown by, over calls after the first WARM_UP.

    The same 250 calls come again and again: torch keeps code for every new shape of a bfloat16 product.
    """
    before = 0
    for number in range(WARM_UP + calls if calls else 0):
        if number == WARM_UP:
            before = resident()
        fault(number % 250)  # said above, if it was among the calls
    return resident() - before if calls else 0


if __name__ == "__main__":
    sys.exit(main())
