"""A case: an operation at one shape, who computes it, and whether the results are right."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Memo = dict[Any, Outputs]  # float64 results of one contender, good for the next that has the same inputs

SWITCH_MOE, MODULATED, LINEAR, COMPILED = "switch_moe", "switch_moe x(1+m)", "F.linear", "torch.compile"
WITH_CUDA = " cuda"  # behind the name of a contender: by the CUDA kernels, where the other is Triton's
WITH_TABLE = "switch_moe + table"  # routes all timesteps too, as the official layer does
FORWARD, BOTH = "forward", "forward+backward"
PEER_TOLERANCE = 3e-2  # for others in bfloat16: some round gates or sums that switch_moe keeps in float32


class Contender(NamedTuple):
    """One way to compute a case. ``run`` returns the compared outputs first, and may return more."""

    name: str
    run: Callable[[Inputs], Outputs]
    exact: Callable[[Inputs, Outputs], Outputs]  # from inputs in float64, and the outputs of ``run``
    leaves: tuple[str, ...]  # inputs that get gradients
    reads: tuple[str, ...]  # other inputs that it needs
    is_switch_moe: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation at one shape."""

    operation: str
    shape: dict[str, int | str]
    dtype: torch.dtype
    make: Callable[[int], Inputs]  # from a seed
    contenders: list[Contender]
    outputs: dict[str, str]  # each compared output, and the input that is its gradient ('' for none)
    note: str = ""
    exact_by_inputs: bool = True  # False where the float64 results depend on the outputs of a contender

    def __str__(self) -> str:
        sizes = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return " ".join(filter(None, [self.operation, sizes, self.note, str(self.dtype).split(".")[1]]))

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD, BOTH) if all(self.outputs.values()) else (FORWARD,)

    def call(self, contender: Contender, inputs: Inputs, which: str) -> Callable[[], Outputs]:
        """One pass: it returns the outputs, then the gradients of the leaves."""
        if which == FORWARD:
            return torch.no_grad()(lambda: contender.run(inputs))
        leaves = [inputs[name].requires_grad_() for name in contender.leaves]
        grads = [inputs[name] for name in self.outputs.values()]

        def run() -> Outputs:
            outputs = contender.run(inputs)
            return (*outputs, *torch.autograd.grad(outputs[: len(grads)], leaves, grads))

        return run


def check(
    case: Case, contender: Contender, inputs: Inputs, passes: tuple[str, ...] = (), memo: Memo | None = None
) -> dict[str, Any]:
    """``error`` and ``allowed`` (relative RMS against float64) of the worst tensor, and ``failure`` or None.

    switch_moe: 1e-5 in float32, else 1.5 times the error of the reference run in that type, or half a
    rounding step. Others: PEER_TOLERANCE. Without ``passes`` all are checked: a forward alone may start other
    kernels than the one before a backward.
    """
    worst: dict[str, Any] = {"error": None, "allowed": None, "failure": None}
    excess = -1.0
    try:
        for which in passes or case.passes:
            for name, error, allowed in _errors(case, contender, inputs, which, memo):
                if error / allowed > excess:
                    excess = error / allowed
                    wrong = f"wrong: {name} of {which} is {error:.1e} off, {allowed:.1e} is allowed"
                    worst = {
                        "error": float(f"{error:.2e}") if error < float("inf") else None,
                        "allowed": float(f"{allowed:.2e}"),
                        "failure": None if error <= allowed else wrong,
                    }
    except Exception as error:  # one contender that fails must not end the others
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the device itself failed: nothing can go on then
        return {"error": None, "allowed": None, "failure": describe(error)}
    return worst


def describe(error: BaseException) -> str:
    """One line about an error."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"


def _errors(
    case: Case, contender: Contender, inputs: Inputs, which: str, memo: Memo | None
) -> Iterator[tuple[str, float, float]]:
    """Name, error and allowed error of each output and gradient."""
    with poisoned_memory() if contender.is_switch_moe else contextlib.nullcontext():
        results = case.call(contender, inputs, which)()
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    leaves = contender.leaves if which == BOTH else ()
    outputs, gradients = results[: len(results) - len(leaves)], results[len(results) - len(leaves) :]
    reference = contender._replace(run=lambda given: contender.exact(given, outputs)[: len(case.outputs)])
    memo = memo if memo is not None and case.exact_by_inputs else {}
    key = (contender.exact, contender.leaves, which)
    if key not in memo:
        in_float64 = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        memo[key] = case.call(reference, in_float64, which)()
    expected = memo[key]
    lossy = contender.is_switch_moe and case.dtype != torch.float32
    rounded = case.call(reference, inputs, which)() if lossy else expected
    names = [*case.outputs, *(f"gradient of {leaf}" for leaf in leaves)]
    compared = (*outputs[: len(case.outputs)], *gradients)
    for name, a, e, r in zip(names, compared, expected, rounded, strict=True):
        allowed = 1e-5 if contender.is_switch_moe else PEER_TOLERANCE
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
    """torch.empty holds NaN, so that what a kernel never writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
