"""csrc/expert_linear_hopper.h on an emulated Hopper, against the operator's reference in float64."""

from __future__ import annotations

import ctypes
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


def check(kernels: ctypes.CDLL, case: Case, schedule: Schedule, index: Tensor | None = None) -> None:
    """The forward and dx: at most 1.5 times the error of the unmerged reference in the same type."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(case.dtype)

    def empty(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=case.dtype)

    batch, tokens, inputs, outputs, num_experts, top_k = case[:6]
    x, grad = random(batch, tokens, inputs), random(batch, tokens, outputs)
    weight = random(num_experts, inputs, outputs, scale=inputs**-0.5)
    bias = random(num_experts, outputs) if case.bias else None
    if index is None:
        index = torch.rand(batch, num_experts, generator=generator).argsort(1)[:, :top_k].int().contiguous()
    gate = torch.rand(batch, top_k, generator=generator)
    experts = LinearExperts(weight, bias, index, gate)
    wide = LinearExperts(weight.double(), None if bias is None else bias.double(), index, gate.double())

    def with_gradient(x: Tensor, experts: LinearExperts, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = reference(x, experts, case.modulate)
        out.backward(grad)
        return out.detach(), x.grad

    expected = with_gradient(x.double(), wide, grad.double())
    baseline = with_gradient(x, experts, grad)
    out, dx = empty(batch, tokens, outputs), empty(batch, tokens, inputs)
    mixture = empty(batch, tokens, outputs) if case.modulate and case.keep else None
    run(kernels, case, schedule, False, [weight, bias, index, gate, x, None, mixture, out])
    if mixture is not None:
        exact, baseline_mixture = reference(x.double(), wide), reference(x, experts)
        assert_error_rule("mixture", mixture, exact, baseline_mixture, case.dtype)
    elif case.modulate:
        mixture = reference(x.double(), wide).to(case.dtype)
    grad_mixture = grad * x if case.modulate else grad
    run(kernels, case, schedule, True, [weight, None, index, gate, grad_mixture, grad, mixture, dx])
    for name, actual, exact, other in zip(("out", "dx"), (out, dx), expected, baseline, strict=True):
        assert_error_rule(name, actual, exact, other, case.dtype)


def test_quick(kernels: ctypes.CDLL) -> None:
    check(kernels, Case(), Schedule(LATE, LATE, LATE))
    check(kernels, Case(inputs=128, outputs=128, modulate=True, keep=True), Schedule(LATE, LATE, LATE))


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
    check(kernels, CASES[number], orders[number % len(orders)])
    check(kernels, CASES[number], orders[-1 - number % 2])


@pytest.mark.slow
@pytest.mark.parametrize("modulate", [False, True])
@pytest.mark.parametrize(("width", "warpgroups"), [(384, 8), (256, 6)])
def test_every_schedule(kernels: ctypes.CDLL, width: int, warpgroups: int, modulate: bool) -> None:
    """Several tiles for each cluster, more steps than stages."""
    case = Case(2, 264, width, width, modulate=modulate, keep=True, multiprocessors=2)
    for schedule in schedules(warpgroups):
        check(kernels, case, schedule)


@pytest.mark.slow
def test_index(kernels: ctypes.CDLL) -> None:
    """One expert twice, and all samples alike; an index out of range makes its sample NaN and no other."""
    case = Case(3, 40, 64, 64, num_experts=4)
    check(kernels, case, Schedule(LATE), torch.tensor([[1, 1], [1, 1], [1, 1]], dtype=torch.int32))
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
            check(planted, case, schedule)
