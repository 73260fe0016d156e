"""The CPU kernels that merge experts inside a product: sizes around their blocks, every vector width."""

from __future__ import annotations

import platform
import re
from itertools import pairwise

import pytest
import torch
from test_expert_linear import check_against_reference, forward_backward, make_inputs

from switch_moe import native
from switch_moe.cpu import expert_linear as cpu
from switch_moe.ops import expert_linear
from switch_moe.torch_compat import cpu_has

# B, T, Din, Dout, M, k. Tiles are 8 x 48 (AVX-512) or 4 x 24, blocks 8 tiles wide, of a gradient 128 high, or
# 32 for small experts. Sums go on from memory after 384 terms, of bfloat16 after 1,536 (768 tokens), two of
# which share a word; 512 rows share a packing; k up to 4 has kernels of its own.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 5, 7, 3, 2, 1),
    (2, 12, 16, 48, 3, 2),
    (2, 9, 47, 49, 3, 2),
    (2, 20, 129, 193, 3, 3),
    (2, 8, 385, 390, 4, 2),
    (1, 517, 24, 24, 3, 2),
    (2, 400, 130, 60, 3, 2),
    (3, 33, 40, 400, 7, 5),
    (4, 16, 32, 64, 9, 9),
    (5, 16, 256, 256, 3, 2),
    (6, 4, 128, 128, 3, 2),
    (2, 9, 1601, 50, 3, 2),
    (1, 801, 41, 1538, 3, 2),
]


KERNELS = [(torch.float32, 8), (torch.float32, 16), (torch.bfloat16, 16)]


def widest(dtype: torch.dtype) -> int:
    """Floats of the widest vector of this processor that the kernels of a type use."""
    lanes = cpu._VECTOR_WIDTHS.get(torch.backends.cpu.get_cpu_capability(), 0)
    built = native.cpu.require().fused_product_takes(cpu.DTYPE_CODE[dtype], lanes)
    return lanes if built and (dtype == torch.float32 or cpu_has("avx512_bf16")) else 0


Kernel = tuple[torch.dtype, int]


@pytest.fixture(params=KERNELS, ids=lambda kernel: f"{kernel[0]}-{kernel[1]}".removeprefix("torch."))
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Kernel:
    dtype, lanes = request.param
    if widest(dtype) < lanes:
        pytest.skip(f"this processor has no products of {lanes} {dtype}")
    monkeypatch.setattr(cpu, "vector_width", lambda asked: lanes if asked == dtype else 0)
    monkeypatch.setattr(cpu, "merging_pays", lambda *_: True)
    return dtype, lanes


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, ...], kernel: Kernel) -> None:
    check_against_reference(*make_inputs(shape, kernel[0]))


def test_shared_routes(kernel: Kernel) -> None:
    """13 samples of 45 tokens in 3 routes: rows beyond one packing, and a tile that ends inside."""
    tensors, index, grad = make_inputs((13, 45, 40, 56, 3, 2), kernel[0])
    route = [0, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    check_against_reference([*tensors[:3], tensors[3][route]], index[route], grad)


def test_an_expert_for_nobody_one_for_everybody_and_one_twice(kernel: Kernel) -> None:
    tensors, index, grad = make_inputs((6, 10, 60, 100, 5, 3), kernel[0])
    index[:, 0], index[:, 1], index[:, 2] = 2, torch.tensor([0, 3, 0, 3, 0, 3]), 4
    index[1] = 2
    check_against_reference(tensors, index, grad)
    gradients = forward_backward(expert_linear, tensors, index, grad, False)
    assert gradients[2][1].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(3, 50, 200, 300, 3, 2), (2, 400, 400, 30, 3, 2)])
def test_results_do_not_depend_on_threads(shape: tuple[int, ...], kernel: Kernel) -> None:
    inputs = make_inputs(shape, kernel[0])
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        found.append(forward_backward(expert_linear, *inputs, False))
    torch.set_num_threads(before)
    for one, other in pairwise(found):
        for a, b in zip(one[:3], other[:3], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(one[4], other[4])  # not bias: that is torch's


def test_products_count_themselves(kernel: Kernel) -> None:
    count = native.cpu.require().fused_product_flops
    inputs = make_inputs((2, 9, 385, 50, 3, 2), kernel[0])
    before = count()
    forward_backward(expert_linear, *inputs, False)
    assert count() - before == 3 * 2 * 2 * 9 * 385 * 50


def test_widths_that_exist() -> None:
    takes = native.cpu.require().fused_product_takes
    old = re.match(r"[4-9]\.", native.cpu.require().compiler)  # GCC 10 is the first that knows AVX512-BF16
    expected = (KERNELS[:2] if old else KERNELS) if platform.machine() in ("x86_64", "AMD64") else []
    found = [(dtype, n) for dtype, code in cpu.DTYPE_CODE.items() for n in range(65) if takes(code, n)]
    assert found == expected
    assert cpu.vector_width(torch.float32) == widest(torch.float32)
    assert cpu.vector_width(torch.float16) == 0


@pytest.mark.parametrize(
    ("features", "taken"), [((), False), (("avx512_bf16",), True), (("avx512_bf16", "amx_tile"), False)]
)
def test_amx_is_for_torch(features: tuple[str, ...], taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.cpu.require().fused_product_takes(cpu.DTYPE_CODE[torch.bfloat16], widest(torch.float32)):
        pytest.skip("this build, or this processor, has no such products of bfloat16")
    monkeypatch.setattr(cpu, "cpu_has", lambda feature: feature in features)
    monkeypatch.setattr(cpu, "vector_width", cpu.vector_width.__wrapped__)
    assert cpu.vector_width(torch.bfloat16) == (16 if taken else 0)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_rounds_of_the_backward(samples: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """x and the gradient are packed for some samples at a time; experts are first seen in any round."""
    inputs = make_inputs((5, 20, 50, 60, 5, 2), kernel[0])
    at_once = forward_backward(expert_linear, *inputs, False)
    dtype, lanes = kernel
    size = native.cpu.require().fused_product_workspace(20, 5, 50, 60, cpu.DTYPE_CODE[dtype], lanes)
    monkeypatch.setattr(cpu, "WORKSPACE_BYTES", samples * size)
    for a, b in zip(forward_backward(expert_linear, *inputs, False), at_once, strict=True):
        assert torch.equal(a, b)
