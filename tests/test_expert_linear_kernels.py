"""The Triton kernels of expert_linear: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import assert_close, assert_error_rule, break_kernels, check_streams_and_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expert_linear import NAMES, forward_backward, make_inputs, reference
from torch import Tensor

from switch_moe.experts import LinearExperts
from switch_moe.ops import _backend, expert_linear

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, T, Din, Dout, M, k: one token, one of all, odd, past a tile; all experts at once (M <= 4), one by one;
# chosen experts side by side (k <= 4) and in a loop
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 40, 24, 40, 3, 2),
    (2, 33, 17, 17, 3, 1),
    (3, 7, 8, 8, 4, 4),
    (5, 5, 20, 20, 2, 2),
    (3, 17, 18, 18, 8, 3),
    (3, 20, 16, 24, 7, 6),
    (6, 16, 16, 16, 5, 1),
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def use_small_tiles(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles in little data, and programs that take several samples."""
    small = kernels.tiles.Tile(16, 16, 16, 4, 2)
    monkeypatch.setattr(kernels.tiles, "product_tile", lambda *_: small)
    monkeypatch.setattr(kernels.tiles, "weight_tile", lambda *_: small)
    monkeypatch.setattr(kernels.tiles, "sample_splits", lambda *_: 2)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    kernels = importlib.import_module("switch_moe.kernels.expert_linear")
    use_small_tiles(kernels, monkeypatch)
    return kernels


def check(
    tensors: list[Tensor], index: Tensor, grad: Tensor, modulate: bool, device: str, **options: str
) -> None:
    """Output and every gradient of the kernels against the reference in float64."""
    dtype = tensors[0].dtype
    tensors, index, grad = [t.to(device) for t in tensors], index.to(device), grad.to(device)
    options.setdefault("backend", "triton")
    actual = forward_backward(expert_linear, tensors, index, grad, modulate, **options)
    exact = forward_backward(reference, [t.double() for t in tensors], index, grad.double(), modulate)
    same_type = forward_backward(reference, tensors, index, grad, modulate)
    for name, a, e, s in zip(("out", *NAMES), actual, exact, same_type, strict=True):
        assert_error_rule(name, a, e, s, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_small_tiles(shape: tuple[int, ...], dtype: torch.dtype, device: str, small_tiles) -> None:
    for modulate in [False, True] if shape[2] == shape[3] else [False]:
        check(*make_inputs(shape, dtype), modulate, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*SHAPES, (2, 130, 72, 72, 3, 2), (1, 257, 136, 136, 8, 2), (2, 65, 80, 80, 4, 3)]
)
def test_shipped_tiles(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(*make_inputs(shape, dtype), shape[2] == shape[3], device)


@pytest.mark.parametrize("num_experts", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_samples_split_between_programs(num_experts: int, device: str, small_tiles, monkeypatch) -> None:
    monkeypatch.setattr(small_tiles.tiles, "sample_splits", lambda *_: 3)
    check(*make_inputs((7, 18, 24, 24, num_experts, 2), torch.float32), True, device)
    check(
        *make_inputs((2, 18, 24, 24, num_experts, 2), torch.float32), True, device
    )  # a split without samples


def test_many_partial_sums(device: str) -> None:
    """Any of the three places, and any type of the result; what no sum is asked for stays as it is."""
    from switch_moe.kernels._tile import sum_partials

    partials = [torch.randn(count, 3, size, device=device) for count, size in ((7, 450), (1, 45), (77, 45))]
    for asked in ((0, 1, 2), (0,), (1, 2), (2,)):
        outs = [torch.full_like(partial[0], -1.0) for partial in partials]
        outs[1] = outs[1].half()
        sum_partials(
            *((p, o) if i in asked else None for i, (p, o) in enumerate(zip(partials, outs, strict=True)))
        )
        for i, (partial, out) in enumerate(zip(partials, outs, strict=True)):
            expected = partial.double().sum(0) if i in asked else torch.full_like(partial[0], -1.0)
            assert_close("sum", out, expected, 1e-3 if i == 1 else 1e-6)


@pytest.mark.parametrize("num_experts", [4, 6])
def test_an_expert_for_nobody_and_one_for_everybody(num_experts: int, device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((6, 10, 16, 16, num_experts, 2), torch.float32)
    index[:, 0], index[:, 1] = 2, torch.tensor([0, 3, 0, 3, 0, 3])
    check(tensors, index, grad, True, device)
    moved = [t.to(device) for t in tensors]
    grads = forward_backward(expert_linear, moved, index.to(device), grad.to(device), False, backend="triton")
    assert grads[2][1].count_nonzero() == 0
    assert grads[3][1].count_nonzero() == 0


@pytest.mark.parametrize("num_experts", [3, 6])
def test_an_expert_chosen_twice_counts_twice(num_experts: int, device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((3, 10, 16, 16, num_experts, 2), torch.float32)
    index[:] = 1
    check(tensors, index, grad, True, device)


@pytest.mark.parametrize(
    ("shape", "modulate"),
    [
        ((0, 5, 8, 8, 3, 2), True), ((2, 0, 8, 8, 3, 2), True),
        ((2, 5, 0, 8, 3, 2), False), ((2, 5, 8, 0, 3, 2), False),
    ],
)  # fmt: skip
def test_empty(shape: tuple[int, ...], modulate: bool, device: str) -> None:
    check(*make_inputs(shape, torch.float32), modulate, device)
    tensors, index, grad = make_inputs(shape, torch.float32)  # the operator itself, too
    x, weight, bias, gate = (t.to(device) for t in tensors)
    arguments = (x, weight, bias, index.to(device), gate)
    out, _ = torch.ops.switch_moe.expert_linear(*arguments, modulate, False, "triton")
    assert out.shape == grad.shape
    grads = torch.ops.switch_moe.expert_linear_backward(
        grad.to(device), *arguments, torch.empty_like(out), modulate, [True] * 4, "triton"
    )
    for found, like in zip(grads, (x, weight, bias, gate), strict=True):
        assert torch.equal(found, torch.zeros_like(like))


def test_not_contiguous(device: str, small_tiles) -> None:
    tensors, index, _ = make_inputs((4, 12, 24, 24, 3, 2), torch.float32)
    x, weight, bias, gate = tensors
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    bias = torch.stack([bias, bias], dim=-1)[..., 0]
    index = index.repeat_interleave(2, dim=1)[:, ::2]
    expanded = torch.randn(4, 1, 1).expand(4, 12, 24)
    assert not any(t.is_contiguous() for t in (x, weight, bias, index, expanded))
    check([x, weight, bias, gate], index, expanded, True, device)
    transposed = torch.randn(24, 12, 4).permute(2, 1, 0)
    check([x, weight, bias, gate], index, transposed, True, device)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "gate"])
def test_only_the_wanted_gradient(wanted: str, device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((3, 9, 16, 16, 3, 2), torch.float32)
    named = dict(zip(NAMES, [t.to(device) for t in tensors], strict=True))
    named[wanted].requires_grad_()
    expected = {name: t.double().detach().requires_grad_(name == wanted) for name, t in named.items()}
    results = []
    for function, n, options in ((expert_linear, named, {"backend": "triton"}), (reference, expected, {})):
        out = function(n["x"], n["weight"], n["bias"], index.to(device), n["gate"], True, **options)
        results.append(torch.autograd.grad(out, n[wanted], grad.to(device, out.dtype))[0])
    assert_close(wanted, *results, 1e-5)


def test_without_bias(device: str, small_tiles) -> None:
    (x, weight, _, gate), index, grad = make_inputs((3, 9, 16, 16, 3, 2), torch.float32)
    leaves = [t.to(device).requires_grad_() for t in (x, weight, gate)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out = expert_linear(leaves[0], leaves[1], None, index.to(device), leaves[2], True, backend="triton")
    expected = reference(exact[0], exact[1], None, index.to(device), exact[2], True)
    assert_close("out", out, expected, 1e-5)
    grads = torch.autograd.grad(out, leaves, grad.to(device))
    for name, a, e in zip(
        ("x", "weight", "gate"),
        grads,
        torch.autograd.grad(expected, exact, grad.to(device).double()),
        strict=True,
    ):
        assert_close(name, a, e, 1e-5)


def test_saved_for_backward(device: str, small_tiles) -> None:
    """Autograd keeps x alone of the size of the tokens, and m(x) where x is modulated and has a gradient."""
    for modulate, expected in ((False, 1), (True, 2)):
        tensors, index, _ = make_inputs((4, 64, 16, 16, 3, 2), torch.float32)
        x, weight, bias, gate = (t.to(device).requires_grad_() for t in tensors)
        sizes: list[int] = []
        pack = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        )
        with pack:
            expert_linear(x, weight, bias, index.to(device), gate, modulate, backend="triton")
        assert sum(size >= x.numel() for size in sizes) == expected


@pytest.mark.slow
def test_the_same_bits_every_time(device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((5, 20, 24, 24, 3, 2), torch.float32)
    moved = [t.to(device) for t in tensors], index.to(device), grad.to(device), True
    first, second = (forward_backward(expert_linear, *moved, backend="triton") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_an_index_out_of_range_is_nan_in_its_sample_alone(device: str, small_tiles) -> None:
    (x, weight, bias, gate), index, _ = make_inputs((3, 9, 16, 16, 3, 2), torch.float32)
    index[1, 0] = 7
    arguments = [t.to(device) for t in (x, weight, bias, index, gate)]
    out, _ = torch.ops.switch_moe.expert_linear(*arguments, True, False, "triton")
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert out.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("num_experts", [3, 6])
def test_an_index_out_of_range_means_the_same_everywhere(num_experts: int, device: str, small_tiles) -> None:
    """It is expert 0 with a gate of NaN: in out, in dx, and in the gradients of expert 0 alone."""
    (x, weight, bias, gate), index, grad = make_inputs((3, 9, 16, 16, num_experts, 2), torch.float32)
    for wrong in (-1, num_experts, 2**31 - 1, -(2**31)):
        index[1, 0] = wrong
        arguments = [t.to(device) for t in (x, weight, bias, index, gate)]
        grads = torch.ops.switch_moe.expert_linear_backward(
            grad.to(device), *arguments, x.to(device), True, [True] * 4, "triton"
        )
        assert grads[0].isnan().flatten(1).all(1).tolist() == [False, True, False]
        for of_experts in grads[1:3]:
            expected = [expert == 0 for expert in range(num_experts)]
            assert of_experts.isnan().flatten(1).all(1).tolist() == expected
            assert of_experts.isnan().flatten(1).any(1).tolist() == expected
        assert not grads[3].isnan().any()  # <P, W>: the gates do not enter


def test_opcheck(device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((3, 9, 16, 16, 3, 2), torch.float32)
    x, weight, bias, gate = (t.to(device) for t in tensors)
    for keep in (False, True):
        arguments = (x, weight, bias, index.to(device), gate)
        torch.library.opcheck(torch.ops.switch_moe.expert_linear, (*arguments, True, keep, "triton"))
    for wanted in ([True] * 4, [False, True, False, False]):
        torch.library.opcheck(
            torch.ops.switch_moe.expert_linear_backward,
            (grad.to(device), *arguments, x, True, wanted, "triton"),
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_compile(autocast: bool, device: str, small_tiles) -> None:
    tensors, index, grad = make_inputs((3, 9, 16, 16, 3, 2), torch.float32)
    moved, index, grad = [t.to(device) for t in tensors], index.to(device), grad.to(device)

    def run(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, gate: Tensor, modulate: bool) -> Tensor:
        with torch.autocast(device, dtype=torch.float16, enabled=autocast):
            return expert_linear(x, weight, bias, index, gate, modulate, backend="triton").float()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager = forward_backward(run, moved, index, grad, True)
    for name, a, e in zip(
        ("out", *NAMES), forward_backward(compiled, moved, index, grad, True), eager, strict=True
    ):
        assert_close(name, a, e, 1e-3 if autocast else 1e-6)


def test_autocast_of_the_operator_itself(device: str, small_tiles) -> None:
    tensors, index, _ = make_inputs((3, 9, 16, 16, 3, 2), torch.float32)
    x, weight, bias, gate = (t.to(device) for t in tensors)
    with torch.autocast(device, dtype=torch.float16):
        out, _ = torch.ops.switch_moe.expert_linear(
            x, weight, bias, index.to(device), gate, False, False, "triton"
        )
    assert out.dtype == torch.float16


sizes = st.integers(1, 40)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 5), tokens=sizes, d_in=sizes, d_out=sizes, num_experts=st.integers(1, 7),
    data=st.data(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 100),
)  # fmt: skip
def test_any_shape(batch, tokens, d_in, d_out, num_experts, data, dtype, seed) -> None:
    top_k = data.draw(st.integers(1, num_experts), label="top_k")
    modulate = data.draw(st.booleans(), label="modulate")
    shape = (batch, tokens, d_in, d_in if modulate else d_out, num_experts, top_k)
    with pytest.MonkeyPatch.context() as monkeypatch:
        kernels = importlib.import_module("switch_moe.kernels.expert_linear")
        use_small_tiles(kernels, monkeypatch)
        check(*make_inputs(shape, dtype, seed), modulate, "cuda" if GPU else "cpu")


# Each a mistake that someone could make; the tests above must see it.
MUTATIONS = {
    "forgets the gate": ("merged += gates[j] * tile.to(tl.float32)", "merged += tile.to(tl.float32)"),
    "takes one expert only": (
        "for j in tl.static_range(TOP_K):\n            tile",
        "for j in tl.static_range(1):\n            tile",
    ),
    "drops the bias": ("if BIAS:\n            m +=", "if False:\n            m +="),
    "modulates without the identity": ("m = x_out + x_out * m", "m = x_out * m"),
    "forgets dr in dx": ("dx += grad + grad *", "dx += grad *"),
    "forgets to start P anew": ("            p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)\n", ""),
    "swaps the experts' gradients": (
        "weight = weights[e] + gate", "weight = weights[M - 1 - e] + gate",
    ),
    "leaves the bias out of dgate": ("grad_gate += tl.sum(s * b.to(tl.float32))", "pass"),
    "does not transpose": ("D_OUT, D_IN, 1, D_OUT, M", "D_OUT, D_IN, D_IN, 1, M"),
    "skips the last tokens": ("steps = tl.cdiv(tokens, BLOCK_K)", "steps = tokens // BLOCK_K"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_fails(mutation: str, tmp_path: Path, device: str, monkeypatch) -> None:
    broken = break_kernels("expert_linear", *MUTATIONS[mutation], tmp_path, monkeypatch)
    use_small_tiles(broken, monkeypatch)
    with pytest.raises(AssertionError, match="relative RMS"):
        check(*make_inputs((4, 19, 16, 16, 3, 2), torch.float32), True, device)


def test_true_float32_unless_tf32_is_allowed() -> None:
    from switch_moe.kernels import _launch, expert_linear

    x, weight, gate = (torch.empty(s, device="meta") for s in ((2, 16, 16), (3, 16, 16), (2, 2)))
    index = torch.empty(2, 2, dtype=torch.int32, device="meta")
    experts = LinearExperts(weight, None, index, gate)
    try:
        for allowed, precision in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(allowed)
            with _launch.record(90) as launches:
                expert_linear.forward(x, experts, True, True)
                expert_linear.backward(x, x, experts, x, True, [True] * 4)
            found = {launch.meta["PRECISION"] for launch in launches if "PRECISION" in launch.meta}
            assert found == {precision}
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, weight, bias, gate), index, _ = make_inputs((2, 4, 8, 8, 3, 2), torch.float32)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        expert_linear(x.double(), weight.double(), bias.double(), index, gate, backend="triton")
    if GPU:
        return
    monkeypatch.setattr(_backend, "INTERPRETER_HAS_BFLOAT16", False)  # as it is without the tests' cure
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    with pytest.raises(RuntimeError, match="bfloat16 products are wrong in Triton's interpreter"):
        expert_linear(x, weight, bias, index, gate, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        expert_linear(x, weight, bias, index, gate, backend="triton")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_on_a_gpu_by_default_on_any_stream_and_in_a_graph() -> None:
    tensors, index, grad = make_inputs((4, 64, 64, 64, 3, 2), torch.float32)
    moved = [t.cuda() for t in tensors], index.cuda(), grad.cuda(), True
    expected = forward_backward(expert_linear, *moved, backend="triton")
    check_streams_and_graph(lambda: forward_backward(expert_linear, *moved), expected)  # auto


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one() -> None:
    inputs = make_inputs((4, 64, 64, 64, 3, 2), torch.float32)
    with torch.cuda.device(0):
        check(*inputs, True, "cuda:1")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_more_than_two_billion_numbers() -> None:
    """Addresses past int32: the last samples of 2**31 + 2**22 numbers, against the same samples alone."""
    torch.use_deterministic_algorithms(False)
    batch, tokens, size = 2050, 1024, 1024
    if torch.cuda.mem_get_info()[0] < 4 * batch * tokens * size * 2:
        pytest.skip("needs 17 GB of GPU memory")
    x = torch.randn(1, tokens, size, device="cuda", dtype=torch.bfloat16).repeat(batch, 1, 1)
    weight = torch.randn(3, size, size, device="cuda", dtype=torch.bfloat16) / size**0.5
    index = torch.rand(batch, 3, device="cuda").argsort(1)[:, :2].int().contiguous()
    gate = torch.rand(batch, 2, device="cuda")
    out = expert_linear(x, weight, None, index, gate, True)
    assert torch.equal(out[-3:], expert_linear(x[-3:], weight, None, index[-3:], gate[-3:], True))
