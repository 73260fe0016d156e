"""The Triton kernels of routed_mlp against the reference in float64: on a GPU, or in Triton's interpreter.

The interpreter takes about a second for a step, so by default few of these tests run.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import assert_close, assert_error_rule, break_kernels, check_streams_and_graph
from torch import Tensor

from switch_moe import Routes
from switch_moe.experts import RoutedExperts
from switch_moe.ops import routed_mlp
from switch_moe.ops.routed_mlp import ACTIVATIONS

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

reference = functools.partial(routed_mlp, backend="reference")
GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = ("weight_in", "bias_in", "weight_out", "bias_out")
NAMES = ("x", *WEIGHTS, "gate", "base")
# R, D, H, M, S: one of all, one expert, past a tile, as many slots as experts
SHAPES = [(1, 1, 1, 1, 1), (5, 17, 33, 1, 1), (40, 24, 20, 5, 3), (7, 8, 8, 6, 6)]

Arguments = dict[str, Tensor | None]


def use_small_tiles(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, splits: int = 1) -> None:
    """Many tiles in little data, and pairs of an expert split between programs."""
    tile = importlib.import_module("switch_moe.kernels._tile").Tile(16, 16, 16, 4, 2)
    monkeypatch.setattr(kernels, "mlp_tile", lambda *_: tile)
    monkeypatch.setattr(kernels, "pair_splits", lambda *_: splits)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    kernels = importlib.import_module("switch_moe.kernels.routed_mlp")
    use_small_tiles(kernels, monkeypatch)
    return kernels


def make_inputs(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Arguments, Tensor]:
    """The tensors of NAMES (unit-scale outputs), and the experts of each row, some of which are none.

    Experts that are chosen for no slot leave pairs of padding at the end.
    """
    rows, size, hidden, experts, slots = shape
    width = 2 * hidden if activation.startswith("swiglu") else hidden
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "x": (rows, size), "weight_in": (experts, size, width), "bias_in": (experts, width),
        "weight_out": (experts, hidden, size), "bias_out": (experts, size), "base": (rows, size),
    }  # fmt: skip
    scales = {"weight_in": max(1, size) ** -0.5, "weight_out": max(1, hidden) ** -0.5}
    given = {
        name: (torch.randn(size, generator=generator) * scales.get(name, 1)).to(dtype)
        for name, size in sizes.items()
    }
    index = torch.rand(rows, experts, generator=generator).argsort(1)[:, :slots].int()
    index[torch.rand(rows, slots, generator=generator) < 0.2] = -1
    return given | {"gate": torch.rand(rows, slots, generator=generator)}, index


def grad_of(given: Arguments) -> Tensor:
    return torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(9)).to(given["x"].dtype)


def run(
    function, given: Arguments, index: Tensor, activation: str, device: str, wanted: tuple[str, ...] = NAMES
) -> dict[str, Tensor]:
    """The output and the wanted gradients."""
    leaves = {
        name: None if t is None else t.detach().to(device, copy=True).requires_grad_(name in wanted)
        for name, t in given.items()
    }
    routes = Routes.of_rows(index.to(device), leaves["gate"], len(leaves["weight_in"]))
    weights = [leaves[name] for name in WEIGHTS]
    out = function(leaves["x"], *weights, routes, activation, base=leaves["base"])
    asked = [name for name in wanted if given[name] is not None]
    grads = torch.autograd.grad(out, [leaves[name] for name in asked], grad_of(given).to(out))
    return {"out": out.detach(), **dict(zip(asked, grads, strict=True))}


triton = functools.partial(routed_mlp, backend="triton")


def check(
    given: Arguments, index: Tensor, activation: str, device: str, wanted: tuple[str, ...] = NAMES
) -> dict[str, Tensor]:
    """Output and gradients of the kernels against the reference in float64."""
    dtype = given["x"].dtype
    doubles = {name: None if t is None else t.double() for name, t in given.items()}
    exact = run(reference, doubles, index, activation, device, wanted)
    same_type = run(reference, given, index, activation, device, wanted)
    found = run(triton, given, index, activation, device, wanted)
    for name, actual in found.items():
        assert_error_rule(name, actual, exact[name], same_type[name], dtype)
    return found


@pytest.mark.parametrize(
    ("activation", "dtype"), list(zip(("gelu", "swiglu_second", "gelu_erf"), DTYPES, strict=True))
)
def test_small_tiles(activation: str, dtype: torch.dtype, device: str, small_tiles) -> None:
    check(*make_inputs((9, 17, 20, 3, 2), activation, dtype), activation, device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "activation", "dtype"),
    [
        *(((19, 20, 24, 3, 2), activation, dtype) for activation in ACTIVATIONS for dtype in DTYPES),
        *((shape, activation, DTYPES[0]) for shape in SHAPES for activation in ("gelu", "swiglu")),
    ],
)
def test_more_small_tiles(shape, activation: str, dtype: torch.dtype, device: str, small_tiles) -> None:
    check(*make_inputs(shape, activation, dtype), activation, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "activation"), [((300, 40, 24, 3, 2), "gelu"), ((90, 24, 136, 5, 2), "swiglu")]
)
def test_shipped_tiles(shape, activation: str, dtype: torch.dtype, device: str) -> None:
    check(*make_inputs(shape, activation, dtype), activation, device)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 3])
def test_pairs_split_between_programs(splits: int, device: str, small_tiles, monkeypatch) -> None:
    monkeypatch.setattr(small_tiles, "pair_splits", lambda *_: splits)
    for rows in (1, 50):  # fewer pairs than programs, and more than a step for each
        check(*make_inputs((rows, 8, 8, 3, 2), "gelu"), "gelu", device)


@pytest.mark.slow
def test_an_expert_for_nobody_and_one_for_everybody(device: str, small_tiles) -> None:
    given, index = make_inputs((35, 8, 8, 4, 2), "swiglu")
    index[:, 0], index[:, 1] = 2, torch.where(torch.arange(35) % 2 > 0, 3, 0)
    found = check(given, index, "swiglu", device)
    for name in WEIGHTS:
        assert found[name][1].count_nonzero() == 0, name


@pytest.mark.parametrize("base", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_row_without_experts_and_padding(base: bool, device: str, small_tiles) -> None:
    given, index = make_inputs((9, 24, 16, 3, 2), "gelu")
    index[5] = index[7] = -1
    if not base:
        given["base"] = None
    found = check(given, index, "gelu", device)
    expected = given["base"].to(device) if base else torch.zeros(9, 24, device=device)
    for row in (5, 7):
        assert torch.equal(found["out"][row], expected[row])
        assert found["x"][row].count_nonzero() == 0
        assert found["gate"][row].count_nonzero() == 0
    index[:] = -1  # all is padding
    found = check(given, index, "gelu", device)
    assert torch.equal(found["out"], expected)
    assert all(found[name].count_nonzero() == 0 for name in ("x", *WEIGHTS, "gate"))


def test_padding_is_never_read(device: str, small_tiles) -> None:
    """Nor does it have a gradient, whatever stands there."""
    given, index = make_inputs((9, 24, 16, 3, 2), "gelu")
    x, *weights = (given[name].to(device) for name in ("x", *WEIGHTS))
    routes = Routes.of_rows(index.to(device), given["gate"].to(device), 3)
    end = int(routes.offsets[-1])
    row, gate = routes.row.clone(), routes.gate.clone()
    row[end:], gate[end:] = 2**30, float("nan")
    operators, results = torch.ops.switch_moe, []
    for of_rows in (routes, routes._replace(row=row, gate=gate)):
        out, pre = operators.routed_mlp(x, *weights, *of_rows, None, "gelu", True, "triton")
        pre[end:] = float("nan")
        grads = operators.routed_mlp_backward(x, x, *weights, *of_rows, pre, "gelu", [True] * 6, "triton")
        results.append([out, *grads])
    assert 0 < end < len(row)
    assert results[0][6][end:].count_nonzero() == 0
    for name, found, expected in zip(("out", *NAMES), *results, strict=False):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_no_pair(rows: int, device: str, small_tiles) -> None:
    given, index = make_inputs((rows, 8, 8, 3, 2), "gelu")
    check(given, index, "gelu", device)
    none = torch.zeros(4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    slot, gate = torch.full((rows, 0), -1, dtype=torch.int32), torch.zeros(0)
    x, *weights = (given[name].to(device) for name in ("x", *WEIGHTS))
    routes = [t.to(device) for t in (*none, slot, gate)]
    operators = torch.ops.switch_moe
    out, pre = operators.routed_mlp(x, *weights, *routes, None, "gelu", True, "triton")
    assert torch.equal(out, torch.zeros_like(x))
    grads = operators.routed_mlp_backward(x, x, *weights, *routes, pre, "gelu", [True] * 6, "triton")
    for found, like in zip(grads, (x, *weights, routes[3]), strict=True):
        assert torch.equal(found, torch.zeros_like(like))


@pytest.mark.slow
def test_experts_that_choose_rows(device: str, small_tiles) -> None:
    """Any number of experts for a row, and a slot for each of them."""
    given, _ = make_inputs((12, 16, 20, 6, 1), "gelu_erf")
    rows = torch.rand(6, 12).argsort(1)[:, :5]
    results = []
    for function, dtype in ((triton, torch.float32), (reference, torch.float64)):
        leaves = [given[name].to(device, dtype).requires_grad_() for name in ("x", *WEIGHTS)]
        gate = torch.linspace(0, 1, 30).view(6, 5).to(device, dtype).requires_grad_()
        routes = Routes.of_experts(rows.to(device), gate, 12)
        out = function(*leaves, routes, "gelu_erf")
        results.append([out, *torch.autograd.grad(out, [*leaves, gate], grad_of(given).to(out))])
    for name, actual, exact in zip(("out", *NAMES[:6]), *results, strict=True):
        assert_close(name, actual, exact, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [("bias_in",), ("bias_out", "base"), ("bias_in", "bias_out")])
def test_without_biases(missing: tuple[str, ...], device: str, small_tiles) -> None:
    given, index = make_inputs((9, 16, 20, 3, 2), "swiglu")
    given |= dict.fromkeys(missing)
    check(given, index, "swiglu", device)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [*((name,) for name in NAMES), NAMES[1::2]])
def test_only_wanted_gradients(wanted: tuple[str, ...], device: str, small_tiles) -> None:
    check(*make_inputs((9, 16, 20, 3, 2), "swiglu_second"), "swiglu_second", device, wanted)


@pytest.mark.slow
def test_not_contiguous(device: str, small_tiles) -> None:
    given, index = make_inputs((6, 24, 16, 3, 2), "gelu")
    results = []
    for function, dtype in ((triton, torch.float32), (reference, torch.float64)):
        strided = [given[name].to(device, dtype) for name in ("x", *WEIGHTS, "base")]
        strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in strided]
        *leaves, base = strided
        routes = Routes.of_rows(index.to(device), given["gate"].to(device), 3)
        out = function(*leaves, routes, base=base)
        grad = torch.linspace(-1, 1, 6, dtype=dtype, device=device)[:, None].expand(6, 24)
        results.append([out, *torch.autograd.grad(out, strided, grad)])
    for name, actual, exact in zip(("out", *NAMES), *results, strict=False):
        assert_close(name, actual, exact, 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_activations(activation: str, device: str, small_tiles) -> None:
    """Far out, exp overflows: act and its slope are still finite."""
    given, index = make_inputs((5, 16, 16, 3, 2), activation)
    given["x"] *= 1000
    check(given, index, activation, device)


def test_saved_for_backward(device: str, small_tiles) -> None:
    """The arguments and the hidden layer before its activation; nothing without grad."""
    given, index = make_inputs((9, 16, 20, 3, 2), "swiglu")
    x, *weights = (given[name].to(device).requires_grad_() for name in ("x", *WEIGHTS))
    routes = Routes.of_rows(index.to(device), given["gate"].to(device), 3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        triton(x, *weights, routes, "swiglu")
    own = {t.data_ptr() for t in (x, *weights, *routes)}
    assert [t.shape for t in saved if t.data_ptr() not in own] == [(18, 40)]
    arguments = (x, *weights, *routes, None, "swiglu", False, "triton")
    with torch.no_grad():
        assert torch.ops.switch_moe.routed_mlp(*arguments)[1].numel() == 0


@pytest.mark.slow
def test_the_same_bits_every_time(device: str, small_tiles) -> None:
    given, index = make_inputs((40, 16, 16, 3, 2), "gelu")
    first, second = (run(triton, given, index, "gelu", device) for _ in range(2))
    for name, found in first.items():
        assert torch.equal(found, second[name]), name


@pytest.mark.slow
def test_opcheck(device: str, small_tiles) -> None:
    torch.use_deterministic_algorithms(False)
    given, index = make_inputs((4, 8, 8, 2, 1), "swiglu")
    x, *weights, base = (given[name].to(device) for name in ("x", *WEIGHTS, "base"))
    routes = Routes.of_rows(index.to(device), given["gate"].to(device), 2)
    forward, backward = torch.ops.switch_moe.routed_mlp, torch.ops.switch_moe.routed_mlp_backward
    torch.library.opcheck(forward, (x, *weights, *routes, base, "swiglu", True, "triton"))
    pre = x.new_ones(4, 16)
    for wanted in ([True] * 6, [False, True, False, True, False, False]):
        torch.library.opcheck(backward, (x, x, *weights, *routes, pre, "swiglu", wanted, "triton"))


@pytest.mark.slow
def test_compile(device: str, small_tiles) -> None:
    torch.use_deterministic_algorithms(False)
    given, index = make_inputs((5, 8, 8, 3, 2), "gelu")
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    eager = run(triton, given, index, "gelu", device)
    for name, found in run(compiled, given, index, "gelu", device).items():
        assert_close(name, found, eager[name], 1e-6)


# Each a mistake that someone could make; the tests above must see it. None leaves the tensors.
MUTATIONS = {
    "forgets the gate": ("if SCALE:\n        out *=", "if False:\n        out *="),
    "gives all pairs the first gates": ("out *= tl.load(gate_ptr + pair", "out *= tl.load(gate_ptr"),
    "forgets the gate in dpre": ("dh *= gate[:, None]", "pass"),
    "forgets the gate in dW2": ("(gate[:, None] * units).to", "units.to"),
    "scales the gate's gradient": ("tl.sum(units * dh, 1)", "tl.sum(units * dh * gate[:, None], 1)"),
    "drops the bias": ("if BIAS:\n            a +=", "if False:\n            a +="),
    "drops the second bias": ("if BIAS:\n        out +=", "if False:\n        out +="),
    "leaves the bias out of dgate": ("grad_gate += tl.sum(dy * c", "pass  # tl.sum(dy * c"),
    "does not scale db2": ("tl.sum(gate[:, None] * dy, 0)", "tl.sum(dy, 0)"),
    "does not gather": ("x_ptr, row * D,", "x_ptr, (pair + p) // 4 * D,"),
    "reads the rows a step late": ("row_ptr + first + BLOCK_K", "row_ptr + first"),
    "reads one row of the gradient": ("if LEFT_OF_ROWS else row)", "if LEFT_OF_ROWS else 0 * row)"),
    "loses the last pair of a tile": ("tl.minimum(end - begin, ROWS)", "tl.minimum(end - begin, ROWS - 1)"),
    "starts each tile at the first pair": (" + inside * ROWS", ""),
    "launches a tile too few": ("pairs // rows + num_experts)", "pairs // rows)"),
    "forgets a split": ("begin + split * length, end)", "begin, end)"),
    "adds the tiles of another expert": ("e < expert, tiles", "e < expert - 1, tiles"),
    "forgets the base": ("if BASE:", "if False:"),
    "takes the first pair for none": ("tl.where(pair >= 0, N, 0)", "tl.where(pair > 0, N, 0)"),
    "takes one slot only": ("tl.range(0, SLOTS,", "tl.range(0, 1,"),
    "swaps the halves": ("slope_b = (s + b * s * (1 - s)) * a", "slope_b = b * s"),
    "forgets the density": ("slope_a = s + a * 0.3989422804014327", "slope_a = s + 0 * a"),
}  # fmt: skip


@pytest.mark.parametrize(
    "mutation",
    [name if n == 0 else pytest.param(name, marks=pytest.mark.slow) for n, name in enumerate(MUTATIONS)],
)
def test_a_broken_kernel_fails(mutation: str, tmp_path: Path, device: str, monkeypatch) -> None:
    broken = break_kernels("routed_mlp", *MUTATIONS[mutation], tmp_path, monkeypatch)
    use_small_tiles(broken, monkeypatch, splits=2 if mutation == "forgets a split" else 1)
    activation = {"swaps the halves": "swiglu_second", "forgets the density": "gelu_erf"}.get(
        mutation, "gelu"
    )
    with pytest.raises(AssertionError, match="relative RMS"):
        check(*make_inputs((30, 16, 20, 2, 2), activation), activation, device)


def test_true_float32_unless_tf32_is_allowed() -> None:
    from switch_moe.kernels import _launch, routed_mlp

    x, weight_in, weight_out = (torch.empty(s, device="meta") for s in ((2, 16), (3, 16, 32), (3, 32, 16)))
    offsets, row, slot = (torch.empty(s, dtype=torch.int32, device="meta") for s in ((4,), (4,), (2, 2)))
    experts = RoutedExperts(
        weight_in, None, weight_out, None, offsets, row, slot, torch.empty(4, device="meta")
    )
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for allowed in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = allowed
            with _launch.record(90) as launches:
                _, pre = routed_mlp.forward(x, experts, None, "gelu", True)
                routed_mlp.backward(x, x, experts, pre, "gelu", [True] * 6)
            precisions = [launch.meta["PRECISION"] for launch in launches if "PRECISION" in launch.meta]
            assert precisions == [allowed] * 6
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("pairs", [0, 1, 15, 16, 17, 40])
def test_no_routing_makes_more_tiles(pairs: int) -> None:
    """The bound on tiles holds for every way to share the pairs out among three experts."""
    from switch_moe.kernels.routed_mlp import _row_tiles

    most = 0
    for first in range(pairs + 1):
        for second in range(pairs + 1 - first):
            counts = first, second, pairs - first - second
            most = max(most, sum(-(-count // 16) for count in counts))
    assert most <= _row_tiles(pairs, 3, 16) <= most + 1


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_gpu_by_default_on_any_stream_and_in_a_graph(activation: str) -> None:
    given, index = make_inputs((256, 64, 128, 5, 2), activation)
    leaves = [given[name].cuda().requires_grad_() for name in ("x", *WEIGHTS, "base")]
    gate = given["gate"].cuda().requires_grad_()
    routes = Routes.of_rows(index.cuda(), gate, 5)
    grad = grad_of(given).cuda()

    def call(**options: str) -> list[Tensor]:
        out = routed_mlp(*leaves[:5], routes, activation, base=leaves[5], **options)
        grads = torch.autograd.grad(out, [*leaves, routes.gate], grad, retain_graph=True)
        return [out.detach(), *grads]

    check_streams_and_graph(call, call(backend="triton"))  # auto


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_more_than_two_billion_numbers() -> None:
    """Addresses past int32: the last rows of a hidden layer of 2**31 + 2**22 numbers, against them alone."""
    torch.use_deterministic_algorithms(False)
    rows, size, hidden, last = 2**21 + 2**12, 64, 1024, 300
    if torch.cuda.mem_get_info()[0] < 5 * rows * hidden * 2:
        pytest.skip("needs 22 GB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight_in, weight_out = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16() * 0.1
        for shape in ((rows, size), (2, size, hidden), (2, hidden, size))
    )
    index = torch.ones(rows, 1, dtype=torch.int32, device="cuda")
    index[0] = 0
    results = []
    for given, of_rows in ((x, index), (x[-last:], index[-last:])):
        leaf = given.clone().requires_grad_()
        routes = Routes.of_rows(of_rows, torch.ones(of_rows.shape, device="cuda"), 2)
        out = routed_mlp(leaf, weight_in, None, weight_out, None, routes)
        results.append((out[-last:], torch.autograd.grad(out, leaf, torch.ones_like(out))[0][-last:]))
    for name, found, expected in zip(("out", "x"), *results, strict=True):
        assert_close(name, found, expected, 1e-2)
