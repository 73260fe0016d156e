"""A case: an operation at one shape, who computes it, and whether that is right."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Memo = dict[Any, Outputs]  # what is right, computed for one contender and good for the next with equal inputs

OURS, MODULATED, LINEAR, COMPILED = "switch_moe", "switch_moe x(1+m)", "F.linear", "torch.compile"
FORWARD, BOTH = "forward", "forward+backward"
ANY_K = "any k"  # the note of a case that runs ours at several k
PEER_TOLERANCE = 3e-2  # of others in bfloat16; some round gates or sums that ours keep in float32


class Contender(NamedTuple):
    """One way to compute a case. ``run`` returns the compared outputs first; it gets the inputs and, where
    there is ``prepare``, what that made of them ahead of time.
    """

    name: str
    run: Callable[..., Outputs]
    exact: Callable[[Inputs, Outputs], Outputs]  # from inputs in float64, and the outputs of ``run``
    leaves: tuple[str, ...]  # inputs that get gradients
    reads: tuple[str, ...]  # other inputs that it needs
    ours: bool = False
    prepare: Callable[[Inputs], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation at one shape."""

    operation: str
    shape: dict[str, int | str]
    dtype: torch.dtype
    make: Callable[[int], Inputs]  # from a seed
    contenders: list[Contender]
    outputs: dict[str, str]  # each compared output, and the input that is its gradient ('' for none)
    flops: float  # of one forward; a backward has twice as many
    seconds: float = 4.0  # a guess at the time that building, checking and timing it takes
    note: str = ""
    exact_by_inputs: bool = True  # what is right does not depend on the outputs of a contender

    @property
    def name(self) -> str:
        sizes = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.operation} {sizes}{' ' + self.note if self.note else ''}"

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD, BOTH) if all(self.outputs.values()) else (FORWARD,)

    def step(self, contender: Contender, inputs: Inputs, which: str) -> Callable[[], Outputs]:
        """One pass: returns the outputs, then the gradients of the leaves."""
        prepared = () if contender.prepare is None else (contender.prepare(inputs),)
        if which == FORWARD:
            return torch.no_grad()(lambda: contender.run(inputs, *prepared))
        leaves = [inputs[name].requires_grad_() for name in contender.leaves]
        grads = [inputs[name] for name in self.outputs.values()]

        def run() -> Outputs:
            outputs = contender.run(inputs, *prepared)
            return (*outputs, *torch.autograd.grad(outputs[: len(grads)], leaves, grads))

        return run

    def work(self, contender: Contender, inputs: Inputs, which: str) -> tuple[float, int]:
        """FLOPs and least bytes: each input read once, each output and gradient written once."""
        outputs = self.step(contender, inputs, FORWARD)()
        moved = [*outputs, *(inputs[name] for name in (*contender.leaves, *contender.reads))]
        if which == BOTH:
            moved += [inputs[name] for name in (*self.outputs.values(), *contender.leaves)]
        return self.flops * (3 if which == BOTH else 1), sum(t.nbytes for t in moved)


def check(
    case: Case,
    contender: Contender,
    inputs: Inputs,
    host: bool = False,
    memo: Memo | None = None,
) -> dict[str, Any]:
    """``error`` and ``allowed`` (relative RMS against float64) of the worst tensor, and ``failure`` or None.

    Ours: 1e-5 in float32, else 1.5 times the error of the reference run in that type or half a rounding step.
    Others: PEER_TOLERANCE. Every pass is checked, since a forward alone may start other kernels. ``host``
    computes what is right on the CPU.
    """
    worst: dict[str, Any] = {"error": None, "allowed": None, "failure": None}
    excess = -1.0
    for which in case.passes:
        for name, error, allowed in _errors(case, contender, inputs, which, host, memo):
            if error / allowed > excess:
                excess = error / allowed
                wrong = f"wrong: {name} of {which} is {error:.1e} off, {allowed:.1e} is allowed"
                worst = {"error": error, "allowed": allowed, "failure": None if error <= allowed else wrong}
    return worst


def checked(case: Case, contender: Contender, inputs: Inputs, memo: Memo | None = None) -> dict[str, Any]:
    """What :func:`check` found, numbers that JSON can hold; an exception is a failure."""
    try:
        found = check(case, contender, inputs, memo=memo)
    except Exception as error:  # one contender that fails must not end a report
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the device itself failed: nothing can go on then
        return {"error": None, "allowed": None, "failure": describe(error)}
    finite = found["error"] is not None and math.isfinite(found["error"])
    return found | {"error": found["error"] if finite else None}


def describe(error: BaseException) -> str:
    """One line about an error."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"


def _errors(
    case: Case, contender: Contender, inputs: Inputs, which: str, host: bool, memo: Memo | None
) -> Iterator[tuple[str, float, float]]:
    """Name, error and allowed error of each output and gradient."""
    with poisoned_memory() if contender.ours else contextlib.nullcontext():
        found = case.step(contender, inputs, which)()
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    if host:
        inputs = {name: tensor.cpu() for name, tensor in inputs.items()}
        found = tuple(tensor.cpu() for tensor in found)
    leaves = contender.leaves if which == BOTH else ()
    outputs, gradients = found[: len(found) - len(leaves)], found[len(found) - len(leaves) :]
    twin = contender._replace(
        run=lambda given: contender.exact(given, outputs)[: len(case.outputs)], prepare=None
    )
    in_float64 = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    memo = memo if memo is not None and case.exact_by_inputs else {}
    key = (contender.exact, contender.leaves, which)
    if key not in memo:
        memo[key] = case.step(twin, in_float64, which)()
    exact = memo[key]
    lossy = contender.ours and case.dtype != torch.float32
    rounded = case.step(twin, inputs, which)() if lossy else exact
    names = [*case.outputs, *(f"gradient of {leaf}" for leaf in leaves)]
    compared = (*outputs[: len(case.outputs)], *gradients)
    for name, a, e, r in zip(names, compared, exact, rounded, strict=True):
        allowed = 1e-5 if contender.ours else PEER_TOLERANCE
        if lossy:
            allowed = max(1.5 * relative_rms(r, e), torch.finfo(case.dtype).eps / 2)
        yield name, relative_rms(a, e), allowed


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||``; infinite for other shapes and for NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, norm = (actual - expected).norm(), expected.norm()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / norm) if norm > 0 else float("inf") if difference > 0 else 0.0


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN: what is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
