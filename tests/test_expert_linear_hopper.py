"""csrc/expert_linear*_hopper.h on an emulated Hopper, against the operator's reference in float64."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import assert_close, assert_error_rule
from hopper_emulation import LATE, ROOT, Schedule, build, schedules
from planted_expert_linear import BUGS, WEIGHT_BUGS, Bug
from torch import Tensor

from switch_moe.experts import LinearExperts
from switch_moe.reference.expert_linear import expert_linear as reference

CSRC = ROOT / "csrc"
CALLERS = [
    ROOT / "tests" / "cuda_on_host" / f"{name}.cpp" for name in ("expert_linear", "expert_linear_weight")
]


BFLOAT, HALF = torch.bfloat16, torch.float16


class Case(NamedTuple):
    batch: int = 2
    tokens: int = 256
    inputs: int = 64
    outputs: int = 384
    num_experts: int = 3
    top_k: int = 2
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True
    modulate: bool = False
    keep: bool = False
    multiprocessors: int = 4
    single: bool = False  # gradients of weights and biases are float32
    sorted: bool = True  # samples with the same experts come together


class Results(NamedTuple):
    """The output, m(x) where it is kept, and gradients; None where a kernel does not form it."""

    out: Tensor | None = None
    mixture: Tensor | None = None
    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None


def load(folder: Path, *sources: Path) -> ctypes.CDLL:
    built = build(folder, *sources)
    for name in ("merged_product", "weight_gradient"):
        if hasattr(built, name):
            getattr(built, name).restype = ctypes.c_char_p
    return built


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    sources = [CSRC / "expert_linear.cu", CSRC / "expert_linear_weight.cu", *CALLERS]
    return load(tmp_path_factory.mktemp("expert_linear"), *sources)


def plant(
    bugs: list[Bug], kernel: str, launcher: str, parameter: str, calls: list[str], function: str
) -> str:
    """C++ of a launcher ``function`` that starts the kernel with bug ``number``, after ``plant(number)``."""
    parts = [
        "#include <algorithm>",
        "#include <stdexcept>",
        '#include "expert_linear_cuda.h"',
        '#include "hopper.h"',
    ]
    kernel = kernel[kernel.index("namespace switch_moe") :]
    for number, (bug, call) in enumerate(zip(bugs, calls, strict=True)):
        text = kernel
        for old, new in bug.changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        parts += [f"namespace bug{number} {{ using namespace ::switch_moe;", text, launcher]
        parts.append(f"void call(const {parameter}& arguments) {{ ({call})(arguments, nullptr); }} }} }} }}")
    names = ", ".join(f"bug{number}::switch_moe::call" for number in range(len(bugs)))
    parts.append(f"""
        static int planted;
        extern "C" void plant(int number) {{ planted = number; }}
        namespace switch_moe {{
        void {function}(const {parameter}& arguments, void*) {{
            void (*const calls[])(const {parameter}&) = {{{names}}};
            calls[planted](arguments);
        }} }}""")
    return "\n".join(parts)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("planted")
    launcher = (CSRC / "expert_linear.cu").read_text()
    launcher = launcher[launcher.index("namespace switch_moe") : launcher.index("// Outputs that the blocks")]
    calls = []
    for bug in BUGS:
        dx, out = (f"start<BFloat16, 3, 2, {one}, {str(bug.modulate).lower()}>" for one in ("true", "false"))
        calls.append(f"arguments.gradient ? {dx} : {out}")
    kernel = (CSRC / "expert_linear_hopper.h").read_text()
    text = plant(BUGS, kernel, launcher, "MergedProduct", calls, "merged_product_cuda")
    (folder / "planted.cpp").write_text(text)
    return load(folder, folder / "planted.cpp", CALLERS[0])


@pytest.fixture(scope="module")
def planted_weight(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("planted_weight")
    launcher = (CSRC / "expert_linear_weight.cu").read_text()
    # The launcher up to the checks; how large the workspace must be is asked of the one without a bug.
    end = launcher.index("void weight_gradient_cuda")
    right = launcher[launcher.index("namespace switch_moe") : end]
    launcher = right[: right.index("void check(")]
    headers = [CSRC / f"expert_linear_weight_{name}.h" for name in ("plan", "hopper", "sum")]
    texts = [header.read_text() for header in headers]
    kernel = "".join(text[text.index("namespace switch_moe") :] for text in texts)
    calls = ["start<BFloat16, 2>"] * len(WEIGHT_BUGS)
    text = plant(WEIGHT_BUGS, kernel, launcher, "WeightGradient", calls, "weight_gradient_cuda")
    includes = "\n".join(f'#include "{header.name}"' for header in headers)
    text = f"{includes}\n{text}\n{right} }}"
    (folder / "planted.cpp").write_text(text)
    return load(folder, folder / "planted.cpp", CALLERS[1])


def run(
    function: Callable[..., bytes | None], case: Case, schedule: Schedule, flags: list[bool],
    tensors: list[Tensor | None],
) -> None:  # fmt: skip
    sizes = (ctypes.c_int64 * 6)(*case[:6])
    bools = (ctypes.c_bool * len(flags))(*flags)
    addresses = (ctypes.c_void_p * len(tensors))(
        *(None if one is None else one.data_ptr() for one in tensors)
    )
    fault = function(sizes, bools, addresses, schedule.as_ints(), case.multiprocessors)
    assert fault is None, fault.decode()


def emulated_products(
    kernels: ctypes.CDLL, case: Case, schedule: Schedule, x: Tensor, experts: LinearExperts,
    grad_mixture: Tensor, grad: Tensor, mixture: Tensor,
) -> Results:  # fmt: skip
    """The forward and the gradient of x."""
    out, dx = torch.full_like(mixture, torch.nan), torch.full_like(x, torch.nan)
    kept = out.clone() if case.modulate and case.keep else None
    flags = [case.dtype == BFLOAT, False, case.modulate]
    run(kernels.merged_product, case, schedule, flags, [*experts, x, None, kept, out])
    flags[1] = True
    tensors = [*experts, grad_mixture, grad, mixture if kept is None else kept, dx]
    run(kernels.merged_product, case, schedule, flags, tensors)
    return Results(out, kept, dx)


def order_of(case: Case, index: Tensor) -> Tensor:
    """Samples with the same experts together, in the order of the smallest sets; or in any order."""
    generator = torch.Generator().manual_seed(7)
    numbers = torch.randperm(case.batch, generator=generator).tolist()
    if case.sorted:
        numbers.sort(key=lambda number: sorted(set(index[number].tolist())))
    return torch.tensor(numbers, dtype=torch.int32)


def emulated_gradients(
    kernels: ctypes.CDLL, case: Case, schedule: Schedule, x: Tensor, experts: LinearExperts,
    grad_mixture: Tensor, *_: Tensor,
) -> Results:  # fmt: skip
    """The gradients of weight, bias and gate."""
    weight, bias, index, gate = experts
    dtype = torch.float32 if case.single else case.dtype
    grads = [
        None if like is None else torch.full_like(like, torch.nan, dtype=of)
        for like, of in ((weight, dtype), (bias, dtype), (gate, torch.float32))
    ]
    tensors = [weight, bias, order_of(case, index), index, gate, x, grad_mixture, *grads]
    run(kernels.weight_gradient, case, schedule, [case.dtype == BFLOAT, case.single], tensors)
    return Results(weight=grads[0], bias=grads[1], gate=grads[2])


def emulated(kernels: ctypes.CDLL, case: Case, schedule: Schedule) -> Callable[..., Results]:
    """What :func:`check` calls, on the emulation."""

    def call(x: Tensor, experts: LinearExperts, grad_mixture: Tensor, *others: Tensor) -> Results:
        results = emulated_products(kernels, case, schedule, x, experts, grad_mixture, *others)
        if case.top_k > 2:
            return results
        grads = emulated_gradients(kernels, case, schedule, x, experts, grad_mixture)
        return grads._replace(out=results.out, mixture=results.mixture, x=results.x)

    return call


def on_gpu(case: Case) -> Callable[..., Results]:
    def call(x: Tensor, experts: LinearExperts, _: Tensor, grad: Tensor, mixture: Tensor) -> Results:
        from switch_moe.kernels import expert_linear_hopper

        experts = LinearExperts(*(None if one is None else one.cuda() for one in experts))
        x, grad, mixture = x.cuda(), grad.cuda(), mixture.cuda()
        assert expert_linear_hopper.reason(x, experts) is None
        keep = case.modulate and case.keep
        out, kept = expert_linear_hopper.forward(x, experts, case.modulate, keep)
        grads = expert_linear_hopper.backward(
            grad, x, experts, kept if keep else mixture, case.modulate, [True] * 4, single=case.single
        )
        cpu = [None if one is None or one.numel() == 0 else one.cpu() for one in (kept, *grads)]
        return Results(out.cpu(), *cpu)

    return call


def check(call: Callable[..., Results], case: Case, index: Tensor | None = None) -> Results:
    """Output and gradients: at most 1.5 times the error of the unmerged reference in the same type."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(case.dtype)

    batch, tokens, inputs, outputs, num_experts, top_k = case[:6]
    x, grad = random(batch, tokens, inputs), random(batch, tokens, outputs)
    weight = random(num_experts, inputs, outputs, scale=inputs**-0.5)
    bias = random(num_experts, outputs) if case.bias else None
    if index is None:
        index = torch.rand(batch, num_experts, generator=generator).argsort(1)[:, :top_k].int().contiguous()
    gate = torch.rand(batch, top_k, generator=generator)
    experts = LinearExperts(weight, bias, index, gate)

    def differentiated(dtype: torch.dtype) -> Results:
        given = [None if one is None else one.to(dtype).requires_grad_() for one in (x, weight, bias)]
        gates = gate.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        wide = LinearExperts(*given[1:], index, gates)
        out = reference(given[0], wide, case.modulate)
        out.backward(grad.to(dtype))
        grads = [None if one is None else one.grad for one in (*given, gates)]
        return Results(out.detach(), reference(given[0], wide).detach(), *grads)

    exact, baseline = differentiated(torch.float64), differentiated(case.dtype)
    grad_mixture = grad * x if case.modulate else grad
    results = call(x, experts, grad_mixture, grad, exact.mixture.to(case.dtype))
    for name, actual, expected, similar in zip(Results._fields, results, exact, baseline, strict=True):
        if actual is None:
            continue
        if case.single and name in ("weight", "bias") and not case.modulate:  # whose dm is rounded
            assert_close(name, actual, expected, 1e-5)
        else:
            assert_error_rule(name, actual.to(similar.dtype), expected, similar, case.dtype)
        assert actual.dtype == (
            torch.float32 if case.single and name in ("weight", "bias") else similar.dtype
        )
    return results


def test_gradients_quick(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("gradients")
    kernels = load(folder, CSRC / "expert_linear_weight.cu", CALLERS[1])
    case = Case(5, 72, 136, 264, 4)
    for schedule in (Schedule(LATE, LATE, LATE), Schedule()):
        check(functools.partial(emulated_gradients, kernels, case, schedule), case)


@pytest.mark.slow
def test_quick(kernels: ctypes.CDLL) -> None:
    for case in (Case(), Case(inputs=128, outputs=128, modulate=True, keep=True)):
        check(emulated(kernels, case, Schedule(LATE, LATE, LATE)), case)


# The edges of test_expert_linear_kernels.py that the kernels accept, and their own: both tiles, tokens and
# sizes on either side of a tile, more steps than stages, blocks without work.
CASES = [
    *(Case(*shape, dtype=dtype, modulate=shape[2] == shape[3], keep=True)
      for dtype in (BFLOAT, HALF)
      for shape in ((3, 40, 24, 40, 3, 2), (3, 7, 8, 8, 4, 4), (3, 17, 24, 24, 8, 3), (6, 16, 16, 16, 5, 1),
                    (2, 130, 72, 72, 3, 2), (1, 257, 136, 136, 8, 2), (2, 65, 80, 80, 4, 3))),
    *(Case(top_k=k, num_experts=5, dtype=dtype) for k in (1, 2, 3, 4) for dtype in (BFLOAT, HALF)),
    *(Case(inputs=512, outputs=256, top_k=k, num_experts=4) for k in (1, 3, 4)),
    *(Case(1, 256, d, d, 4, k, dtype, modulate=True, keep=k != 2)
      for d, k, dtype in ((384, 1, HALF), (192, 2, HALF), (256, 2, HALF), (200, 3, HALF), (384, 4, BFLOAT))),
    Case(batch=1, tokens=1, inputs=8, outputs=8, num_experts=1, top_k=1),
    Case(tokens=7, inputs=40, outputs=136, bias=False),
    Case(tokens=300, inputs=72, outputs=200, num_experts=16, top_k=4, dtype=HALF),
    Case(tokens=257, inputs=392, outputs=392, modulate=True, keep=True),
    Case(batch=7, tokens=40, inputs=96, outputs=520, num_experts=16, top_k=3, multiprocessors=132),
    Case(batch=5, tokens=33, inputs=24, outputs=24, modulate=True, multiprocessors=1),
    # Parts of the samples, an odd tile alone, places that change at every sample.
    Case(9, 70, 264, 136, 4, multiprocessors=132, single=True),
    Case(9, 70, 136, 264, 4, dtype=HALF, multiprocessors=132, single=True, bias=False),
    Case(12, 64, 128, 128, 16, multiprocessors=2, sorted=False),
    Case(12, 320, 136, 392, 5, multiprocessors=6, sorted=False),
    Case(8, 64, 392, 128, 16, 1, HALF, multiprocessors=8, sorted=False),
    Case(4, 100, 256, 256, 2, 2, modulate=True, keep=True, single=True, multiprocessors=132),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_edges(kernels: ctypes.CDLL, number: int) -> None:
    orders = list(schedules(8))
    for schedule in (orders[number % len(orders)], orders[-1 - number % 2]):
        check(emulated(kernels, CASES[number], schedule), CASES[number])


@pytest.mark.slow
@pytest.mark.parametrize("modulate", [False, True])
@pytest.mark.parametrize(("width", "warpgroups"), [(384, 8), (256, 6)])
def test_every_schedule(kernels: ctypes.CDLL, width: int, warpgroups: int, modulate: bool) -> None:
    """Several tiles for each cluster, more steps than stages."""
    case = Case(2, 264, width, width, modulate=modulate, keep=True, multiprocessors=2)
    for schedule in schedules(warpgroups):
        check(emulated(kernels, case, schedule), case)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns", "top_k"), [(392, 264, 2), (264, 392, 2), (136, 136, 1)])
def test_gradients_are_the_same_in_every_schedule(
    kernels: ctypes.CDLL, rows: int, columns: int, top_k: int
) -> None:
    """To the bit, whatever runs first, and whichever cluster does."""
    case = Case(6, 136, rows, columns, 5, top_k, single=True, multiprocessors=32)
    first, *others = (
        check(functools.partial(emulated_gradients, kernels, case, schedule), case)
        for schedule in schedules(6, seeds=4)
    )
    for other in others:
        for name in ("weight", "bias", "gate"):
            assert torch.equal(getattr(other, name), getattr(first, name)), name


@pytest.mark.slow
def test_index(kernels: ctypes.CDLL) -> None:
    """One expert twice, and all samples alike; an index out of range makes its sample NaN and no other."""
    case = Case(3, 40, 64, 64, num_experts=4)
    twice = torch.tensor([[1, 1], [1, 1], [1, 1]], dtype=torch.int32)
    check(emulated(kernels, case, Schedule(LATE)), case, twice)
    for mixed in ([[1, 1], [1, 2], [2, 2]], [[3, 0], [3, 3], [0, 3]], [[0, 0], [1, 1], [0, 1]]):
        index = torch.tensor(mixed, dtype=torch.int32)
        check(emulated(kernels, case._replace(sorted=False), Schedule()), case, index)
    x, weight, gate = torch.randn(3, 40, 64).bfloat16(), torch.randn(4, 64, 64).bfloat16(), torch.ones(3, 2)
    index, out = torch.tensor([[0, 1], [2, 4], [-1, 3]], dtype=torch.int32), torch.empty_like(x)
    flags = [True, False, False]
    run(kernels.merged_product, case, Schedule(), flags, [weight, None, index, gate, x, None, None, out])
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, True]
    assert out[0].isfinite().all()
    experts = LinearExperts(weight, None, index, gate)
    weight_grad = emulated_gradients(kernels, case, Schedule(), x, experts, x).weight
    assert weight_grad.isnan().flatten(1).all(1).tolist() == [True, False, False, False]  # that of expert 0
    assert weight_grad[1:].isfinite().all()


@pytest.mark.slow
def test_what_an_expert_was_not_given_is_not_in_its_gradient(kernels: ctypes.CDLL) -> None:
    """A sample that is not finite spoils the gradients of its own experts; those of no sample are zero."""
    case = Case(3, 40, 64, 64, num_experts=6)
    x, weight, gate = torch.randn(3, 40, 64).bfloat16(), torch.randn(6, 64, 64).bfloat16(), torch.rand(3, 2)
    index = torch.tensor([[0, 1], [3, 2], [1, 0]], dtype=torch.int32)
    x[1] = torch.inf
    experts = LinearExperts(weight, weight[:, 0].clone(), index, gate)
    found = emulated_gradients(kernels, case, Schedule(), x, experts, torch.randn_like(x))
    finite = [True, True, False, False, True, True]
    assert found.weight.isfinite().flatten(1).all(1).tolist() == finite
    assert found.weight[4:].count_nonzero() == found.bias[4:].count_nonzero() == 0
    assert found.bias.isfinite().all()
    assert found.gate.isfinite().tolist() == [[True] * 2, [False] * 2, [True] * 2]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"top_k": 5}, {"inputs": 12}, {"outputs": 4}, {"tokens": 0}])
def test_refused(kernels: ctypes.CDLL, changes: dict[str, int]) -> None:
    case = Case()._replace(**changes)
    with pytest.raises(AssertionError, match="sizes that no kernel takes"):
        run(kernels.merged_product, case, Schedule(), [False] * 3, [None] * 8)
    with pytest.raises(AssertionError, match="sizes that no kernel takes"):
        run(kernels.weight_gradient, case, Schedule(), [False] * 2, [None] * 10)


@pytest.mark.slow
def test_gradients_refused(kernels: ctypes.CDLL) -> None:
    for changes in ({"top_k": 3}, {"num_experts": 33}):
        with pytest.raises(AssertionError, match="sizes that no kernel takes"):
            run(kernels.weight_gradient, Case()._replace(**changes), Schedule(), [False] * 2, [None] * 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(WEIGHT_BUGS)), ids=[bug.name.replace(" ", "-") for bug in WEIGHT_BUGS]
)
def test_planted_bug_in_gradients(planted_weight: ctypes.CDLL, number: int) -> None:
    planted_weight.plant(number)
    case = Case(9, WEIGHT_BUGS[number].tokens, 392, 264, 5, single=True, multiprocessors=8)
    index = torch.randint(5, (9, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    assert (index[:, 0] == index[:, 1]).any()

    with pytest.raises(AssertionError):  # noqa: PT012
        for schedule in schedules(6, seeds=6):
            check(functools.partial(emulated_gradients, planted_weight, case, schedule), case, index)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BUGS)), ids=[bug.name.replace(" ", "-") for bug in BUGS])
def test_planted_bug(planted: ctypes.CDLL, number: int) -> None:
    planted.plant(number)
    case = Case(2, 264, 384, 384, modulate=BUGS[number].modulate, keep=True, multiprocessors=2)
    with pytest.raises(AssertionError):  # noqa: PT012
        for schedule in schedules(8):
            check(functools.partial(emulated_products, planted, case, schedule), case)


IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_on_the_gpu(number: int) -> None:
    check(on_gpu(CASES[number]), CASES[number])
