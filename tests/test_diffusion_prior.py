"""diffusion_prior_loss: value and gradient in Triton and in plain PyTorch against the float64 reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from switch_moe.kernels import _launch
from switch_moe.ops import diffusion_prior_loss
from switch_moe.prior import prior_table
from switch_moe.reference.diffusion_prior import jensen_shannon

# L, M, k, B, N: one of everything, odd sizes, every expert chosen, more columns than a tile
SHAPES = [(4, 3, 2, 5, 50), (1, 1, 1, 1, 1), (12, 3, 2, 33, 1000), (3, 5, 5, 2, 7), (70, 16, 3, 3, 20)]
BACKENDS = ["auto", "triton"]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_inputs(
    shape: tuple[int, ...], device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """probs, table, t, assignment, depth, active."""
    depth, experts, top_k, batch, timesteps = shape
    torch.manual_seed(0)
    slots, active = depth * experts, depth * top_k
    probs = torch.randn(batch, depth, experts).softmax(-1).flatten(1)
    table = prior_table(timesteps, slots, active, 4.0)
    t, assignment = torch.randint(timesteps, (batch,)), torch.randperm(slots)
    return probs.to(device), table.to(device), t.to(device), assignment.to(device), depth, active


def exact(probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor, depth: int, active: int) -> Tensor:
    return jensen_shannon(probs / depth, table.double()[t.long()][:, assignment.long()] / active)


def value_and_gradient(function, probs: Tensor, *rest, scale: float = 1.0, **options: str):
    leaf = probs.detach().clone().requires_grad_()
    loss = function(leaf, *rest, **options)
    return loss.detach(), *torch.autograd.grad(loss * scale, leaf)


def check_against_reference(probs: Tensor, *rest, **options: str) -> None:
    loss, gradient = value_and_gradient(diffusion_prior_loss, probs, *rest, scale=3.0, **options)
    exact_loss, exact_gradient = value_and_gradient(exact, probs.double(), *rest, scale=3.0)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert gradient.dtype == probs.dtype
    assert_close("loss", loss, exact_loss, 1e-5)
    assert_close("gradient", gradient, exact_gradient, max(1e-5, torch.finfo(probs.dtype).eps / 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, ...], backend: str, device: str) -> None:
    probs, *rest = make_inputs(shape, device)
    if shape == SHAPES[1]:
        probs = probs / 2  # one expert in one block: with p = 1 the distributions agree and the loss is 0
    check_against_reference(probs, *rest, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_inside_whatever_comes_in(dtype: torch.dtype, backend: str, device: str) -> None:
    probs, table, *rest = make_inputs(SHAPES[0], device)
    with torch.autocast(device, torch.bfloat16):
        check_against_reference(probs.to(dtype), table.to(dtype), *rest, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_types_and_strides_do_not_matter(backend: str, device: str) -> None:
    probs, table, t, assignment, depth, active = make_inputs(SHAPES[0], device)
    expected = value_and_gradient(
        diffusion_prior_loss, probs, table, t, assignment, depth, active, backend=backend
    )
    strided = table.t().contiguous().t(), t.int().repeat_interleave(2)[::2], assignment.int()
    leaf = probs.t().contiguous().t().requires_grad_()
    loss = diffusion_prior_loss(leaf, *strided, depth, active, backend=backend)
    loss.backward()
    assert_close("loss", loss, expected[0], 1e-7)
    assert_close("gradient", leaf.grad, expected[1], 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_of_zero_and_one(backend: str, device: str) -> None:
    probs, table, t, assignment, depth, active = make_inputs(SHAPES[0], device)
    hard = (probs >= probs.view(5, 4, 3).amax(-1).repeat_interleave(3, 1)).float()
    check_against_reference(hard, table, t, assignment, depth, active, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_has_no_mean(backend: str, device: str) -> None:
    probs, table, t, assignment, depth, active = make_inputs(SHAPES[0], device)
    leaf = probs[:0].requires_grad_()
    loss = diffusion_prior_loss(leaf, table, t[:0], assignment, depth, active, backend=backend)
    assert loss.isnan()
    assert torch.autograd.grad(loss, leaf)[0].shape == (0, 12)


def test_out_of_range_takes_the_nearest(device: str) -> None:
    probs, table, t, assignment, depth, active = make_inputs(SHAPES[0], device)
    wrong_t, wrong_assignment = t.clone(), assignment.clone()
    wrong_t[0], wrong_t[1], wrong_assignment[3] = -(2**40), 2**40, 2**40
    t[0], t[1], assignment[3] = 0, len(table) - 1, table.shape[1] - 1
    operator = torch.ops.switch_moe.diffusion_prior_loss
    expected = operator(probs, table, t, assignment, depth, active)
    found = operator(probs, table, wrong_t, wrong_assignment, depth, active)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_broken_kernel_is_noticed(wrong: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("switch_moe.kernels.diffusion_prior")
    original = kernels.forward

    def broken(*arguments):
        results = original(*arguments)
        results[wrong].view(-1)[0] += results[wrong].norm() / 1000
        return results

    monkeypatch.setattr(kernels, "forward", broken)
    with pytest.raises(AssertionError, match="relative RMS"):
        check_against_reference(*make_inputs(SHAPES[0], device), backend="triton")


def test_one_program_for_each_sample() -> None:
    kernels = importlib.import_module("switch_moe.kernels.diffusion_prior")
    probs, table, t, assignment, depth, active = make_inputs(SHAPES[0], "meta")
    with _launch.record(90) as launches:
        loss, gradient = kernels.forward(probs, table, t, assignment, depth, active)
    assert (loss.shape, gradient.shape) == ((), probs.shape)
    assert [launch.programs for launch in launches] == [5]


def test_opcheck(device: str) -> None:
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.switch_moe.diffusion_prior_loss.default, make_inputs(SHAPES[0], device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph(autocast: bool, backend: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    inputs = make_inputs(SHAPES[0], device)

    def function(*arguments) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return diffusion_prior_loss(*arguments, backend=backend)

    compiler = "inductor" if backend == "triton" and not autocast else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    found, expected = value_and_gradient(compiled, *inputs), value_and_gradient(function, *inputs)
    for name, a, e in zip(("loss", "gradient"), found, expected, strict=True):
        assert_close(name, a, e, 1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"probs": torch.zeros(2, 5)}, ValueError, r"probs has shape \(2, 5\); it must be \[B, 6\]"),
        ({"probs": torch.zeros(2, 6).int()}, TypeError, "probs is torch.int32; it must be torch.float32 or"),
        ({"table": torch.zeros(6)}, ValueError, r"table has shape \(6,\); it must be \[N, S\]"),
        ({"t": torch.zeros(3).long()}, ValueError, r"t has shape \(3,\); it must be \[2\]"),
        ({"t": torch.zeros(2)}, TypeError, "t is torch.float32; it must be torch.int32 or torch.int64"),
        ({"t": torch.tensor([0, 10])}, ValueError, r"t holds 0 to 10; it must stay in \[0, 10\)"),
        ({"t": torch.tensor([-1, 0])}, ValueError, r"t holds -1 to 0; it must stay in \[0, 10\)"),
        ({"assignment": torch.arange(6) - 1}, ValueError, r"assignment holds -1 to 4; it must stay in"),
        ({"table": torch.full((10, 6), 0.5)}, ValueError, "table holds 0.5; every entry must be 0 or 1"),
        (
            {"probs": torch.zeros(2, 6).to_sparse()},
            TypeError,
            "probs is torch.sparse_coo; it must be a dense",
        ),
        ({"probs": torch.zeros(2, 6, dtype=torch.complex64)}, TypeError, "probs is torch.complex64"),
        ({"probs": [[0.5]]}, TypeError, r"probs is \[\[0.5\]\] \(list\); it must be a tensor"),
        ({"depth": 2.5}, TypeError, r"depth is 2.5 \(float\); it must be an integer"),
        ({"active": True}, TypeError, r"active is True \(bool\); it must be an integer"),
        ({"assignment": torch.zeros(5).long()}, ValueError, r"assignment has shape \(5,\); it must be \[6\]"),
        ({"assignment": torch.zeros(6)}, TypeError, "assignment is torch.float32; it must be torch.int32"),
        ({"table": torch.zeros(10, 6, device="meta")}, ValueError, "table is on meta; it must be on cpu"),
        ({"depth": 0}, ValueError, "depth is 0; it must be at least 1"),
        ({"active": 0}, ValueError, "active is 0; it must be at least 1"),
        ({"backend": "native"}, RuntimeError, "diffusion_prior_loss has no compiled kernel for cpu tensors"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "probs": torch.zeros(2, 6), "table": torch.zeros(10, 6), "t": torch.zeros(2).long(),
        "assignment": torch.arange(6), "depth": 2, "active": 4,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        diffusion_prior_loss(**{**arguments, **change})


def test_triton_needs_its_interpreter_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' of diffusion_prior_loss cannot run: a CPU"):
        diffusion_prior_loss(*make_inputs(SHAPES[0]), backend="triton")
