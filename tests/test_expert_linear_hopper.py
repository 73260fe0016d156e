"""csrc/expert_linear_hopper.h on an emulated Hopper, against the operator's reference in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import assert_error_rule
from hopper_emulation import LATE, ROOT, Schedule, build, schedules
from planted_expert_linear import BUGS
from torch import Tensor

from switch_moe.experts import LinearExperts
from switch_moe.reference.expert_linear import expert_linear as reference

CSRC = ROOT / "csrc"
CALLER = ROOT / "tests" / "cuda_on_host" / "expert_linear.cpp"


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


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = build(tmp_path_factory.mktemp("expert_linear"), CSRC / "expert_linear.cu", CALLER)
    built.merged_product.restype = ctypes.c_char_p
    return built


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Instead of the launcher one that starts the kernel with bug ``number``, after ``plant(number)``."""
    folder = tmp_path_factory.mktemp("planted")
    kernel = (CSRC / "expert_linear_hopper.h").read_text()
    launcher = (CSRC / "expert_linear.cu").read_text()
    launcher = launcher[launcher.index("namespace switch_moe") : launcher.index("// Outputs that the blocks")]
    parts = ["#include <algorithm>", '#include "expert_linear_cuda.h"', '#include "hopper.h"']
    calls = []
    for number, bug in enumerate(BUGS):
        text = kernel[kernel.index("namespace switch_moe") :]
        for old, new in bug.changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        parts += [f"namespace bug{number} {{ using ::switch_moe::MergedProduct;", text, launcher]
        dx, out = (f"start<BFloat16, 3, 2, {one}, {str(bug.modulate).lower()}>" for one in ("true", "false"))
        parts.append(f"""
            void call(const MergedProduct& product) {{
                (product.gradient ? {dx} : {out})(product, nullptr);
            }} }} }} }}""")
        calls.append(f"bug{number}::switch_moe::call")
    parts.append(f"""
        static int planted;
        extern "C" void plant(int number) {{ planted = number; }}
        namespace switch_moe {{
        void merged_product_cuda(const MergedProduct& product, void*) {{
            void (*const calls[])(const MergedProduct&) = {{{", ".join(calls)}}};
            calls[planted](product);
        }} }}""")
    (folder / "planted.cpp").write_text("\n".join(parts))
    built = build(folder, folder / "planted.cpp", CALLER)
    built.merged_product.restype = ctypes.c_char_p
    return built


def run(
    kernels: ctypes.CDLL, case: Case, schedule: Schedule, gradient: bool, tensors: list[Tensor | None]
) -> None:
    sizes = (ctypes.c_int64 * 6)(*case[:6])
    flags = (ctypes.c_bool * 3)(case.dtype == torch.bfloat16, gradient, case.modulate)
    addresses = (ctypes.c_void_p * 8)(*(None if one is None else one.data_ptr() for one in tensors))
    fault = kernels.merged_product(sizes, flags, addresses, schedule.as_ints(), case.multiprocessors)
    assert fault is None, fault.decode()


Results = tuple[Tensor, Tensor | None, Tensor]  # the output, m(x) where kept, and the gradient of x


def emulated(kernels: ctypes.CDLL, case: Case, schedule: Schedule) -> Callable[..., Results]:
    """What :func:`check` calls, on the emulation."""

    def call(
        x: Tensor, experts: LinearExperts, grad_mixture: Tensor, grad: Tensor, mixture: Tensor
    ) -> Results:
        out, dx = torch.full_like(mixture, torch.nan), torch.full_like(x, torch.nan)
        kept = out.clone() if case.modulate and case.keep else None
        run(kernels, case, schedule, False, [*experts, x, None, kept, out])
        if kept is not None:
            mixture = kept
        run(kernels, case, schedule, True, [*experts, grad_mixture, grad, mixture, dx])
        return out, kept, dx

    return call


def on_gpu(case: Case) -> Callable[..., Results]:
    def call(x: Tensor, experts: LinearExperts, *grads: Tensor) -> Results:
        from switch_moe.kernels import expert_linear_hopper

        experts = LinearExperts(*(None if one is None else one.cuda() for one in experts))
        x, grad_mixture, grad, mixture = (one.cuda() for one in (x, *grads))
        assert expert_linear_hopper.reason(x, experts) is None
        keep = case.modulate and case.keep
        out, kept = expert_linear_hopper.forward(x, experts, case.modulate, keep)
        dx = expert_linear_hopper.grad_x(
            grad_mixture, grad, kept if keep else mixture, experts, case.modulate
        )
        return out.cpu(), kept.cpu() if keep else None, dx.cpu()

    return call


def check(call: Callable[..., Results], case: Case, index: Tensor | None = None) -> None:
    """The forward and dx: at most 1.5 times the error of the unmerged reference in the same type."""
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
    wide = LinearExperts(weight.double(), None if bias is None else bias.double(), index, gate.double())

    def with_gradient(x: Tensor, experts: LinearExperts, grad: Tensor) -> list[Tensor]:
        """The output, m(x), and the gradient of x."""
        x = x.clone().requires_grad_()
        out = reference(x, experts, case.modulate)
        out.backward(grad)
        return [out.detach(), reference(x.detach(), experts), x.grad]

    exact, baseline = with_gradient(x.double(), wide, grad.double()), with_gradient(x, experts, grad)
    grad_mixture = grad * x if case.modulate else grad
    results = call(x, experts, grad_mixture, grad, exact[1].to(case.dtype))
    for name, actual, *others in zip(("out", "mixture", "dx"), results, exact, baseline, strict=True):
        if actual is not None:
            assert_error_rule(name, actual, *others, case.dtype)


@pytest.mark.slow
def test_quick(kernels: ctypes.CDLL) -> None:
    for case in (Case(), Case(inputs=128, outputs=128, modulate=True, keep=True)):
        check(emulated(kernels, case, Schedule(LATE, LATE, LATE)), case)


BFLOAT, HALF = torch.bfloat16, torch.float16
CASES = [
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
def test_index(kernels: ctypes.CDLL) -> None:
    """One expert twice, and all samples alike; an index out of range makes its sample NaN and no other."""
    case = Case(3, 40, 64, 64, num_experts=4)
    twice = torch.tensor([[1, 1], [1, 1], [1, 1]], dtype=torch.int32)
    check(emulated(kernels, case, Schedule(LATE)), case, twice)
    x, weight, gate = torch.randn(3, 40, 64).bfloat16(), torch.randn(4, 64, 64).bfloat16(), torch.ones(3, 2)
    index, out = torch.tensor([[0, 1], [2, 4], [-1, 3]], dtype=torch.int32), torch.empty_like(x)
    run(kernels, case, Schedule(), False, [weight, None, index, gate, x, None, None, out])
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, True]
    assert out[0].isfinite().all()


@pytest.mark.parametrize("changes", [{"top_k": 5}, {"inputs": 12}, {"outputs": 4}, {"tokens": 0}])
def test_refused(kernels: ctypes.CDLL, changes: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match="sizes that no kernel takes"):
        run(kernels, Case()._replace(**changes), Schedule(), False, [None] * 8)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BUGS)), ids=[bug.name.replace(" ", "-") for bug in BUGS])
def test_planted_bug(planted: ctypes.CDLL, number: int) -> None:
    planted.plant(number)
    case = Case(2, 264, 384, 384, modulate=BUGS[number].modulate, keep=True, multiprocessors=2)
    with pytest.raises(AssertionError):  # noqa: PT012
        for schedule in schedules(8):
            check(emulated(planted, case, schedule), case)


IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_on_the_gpu(number: int) -> None:
    check(on_gpu(CASES[number]), CASES[number])
