"""Two-layer experts over routes on a CPU: products for each expert, and compiled passes around them.

An expert takes its rows a part at a time. What a part needs besides results lies in a workspace, and between
two products it is passed over once (``csrc/routed_mlp.h``).

Legend: R rows, P pairs of a row and an expert, n pairs of a part, D hidden size, H units, W numbers before
the activation (2H for SwiGLU, else H).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..experts import LinearExperts, RoutedExperts
from ..native import address
from . import expert_linear as linear
from .expert_linear import DTYPE_CODE, WORKSPACE_BYTES, workspace

_ACTIVATION_CODE = {
    "gelu": 0,
    "gelu_erf": 1,
    "relu": 2,
    "swiglu": 3,
    "swiglu_second": 4,
}  # Activation of csrc
_MOST_PAIRS = 2048  # of a part


@torch.no_grad()  # an exported program calls the operator with weights that require gradients
def forward(
    x: Tensor, experts: RoutedExperts, base: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the hidden layer before its activation where kept, else an empty tensor."""
    if x.dtype == torch.float16:  # torch's float16 products on a CPU are 40 times slower than float32
        wide = None if base is None else base.float()
        out, pre = forward(x.float(), _in_float32(experts), wide, activation, keep)
        return out.half(), pre.half()
    out, pre = experts.empty_outputs(x, keep)
    native.cpu.require().prefer_huge_pages(address(pre, pre.dtype, pre.numel()), pre.nbytes)
    total = _sums_of(out)
    total.zero_() if base is None else total.copy_(base)
    _, units, size = experts.weight_out.shape
    parts, room = _parts(experts, size, 0 if keep else experts.weight_in.shape[2], units, size)
    for part in parts:
        rows, hidden, active, mlp = (buffer[: part.length] for buffer in room)
        if keep:
            hidden = pre[part.pairs]
        _gather(x, part, rows)
        _multiply(rows, experts.weight_in[part.expert], False, hidden)
        _activate(hidden, part.of(experts.bias_in), activation, active)
        _multiply(active, experts.weight_out[part.expert], False, mlp)
        _add_rows(mlp, part.of(experts.bias_out), part, part.gate, total)
    return _rounded(total, out), pre


@torch.no_grad()
def backward(
    grad: Tensor, x: Tensor, experts: RoutedExperts, pre: Tensor, activation: str, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, weight_in, bias_in, weight_out, bias_out and gate; empty where not wanted."""
    if x.dtype == torch.float16:
        found = backward(grad.float(), x.float(), _in_float32(experts), pre.float(), activation, wanted)
        return (*(gradient.half() for gradient in found[:5]), found[5])
    grads = experts.empty_gradients(x, wanted)
    (_, units, size), width = experts.weight_out.shape, experts.weight_in.shape[2]
    parts, room = _parts(experts, size, size, units, width, size)
    of_x, of_bias_in, of_bias_out = sums = [_sums_of(grads[i]).zero_() for i in (0, 2, 4)]
    of_weight_in, of_weight_out = (_WeightGradient(grads[i], parts) for i in (1, 3))
    of_gate = torch.zeros_like(experts.gate)
    for part in parts:
        rows, grad_rows, of_units, of_hidden, of_rows = (buffer[: part.length] for buffer in room)
        _gather(grad, part, grad_rows)
        _multiply(grad_rows, experts.weight_out[part.expert], True, of_units)
        _activate_backward(pre[part.pairs], part, activation, of_units, of_hidden, of_gate[part.pairs])
        gated_units = of_units  # they lie where their gradient was
        if wanted[3]:
            of_weight_out.add(part, gated_units, grad_rows)
        if experts.bias_out is not None and (wanted[4] or wanted[5]):
            if wanted[4]:
                _sum_rows(grad_rows, part.gate, of_bias_out[part.expert])
            _add_dots(grad_rows, experts.bias_out[part.expert], of_gate[part.pairs])
        if experts.bias_in is not None and wanted[2]:
            _sum_rows(of_hidden, None, of_bias_in[part.expert])
        if wanted[1]:
            _gather(x, part, rows)
            of_weight_in.add(part, rows, of_hidden)
        if wanted[0]:
            _multiply(of_hidden, experts.weight_in[part.expert], True, of_rows)
            _add_rows(of_rows, None, part, None, of_x)
    for i, total in zip((0, 2, 4), sums, strict=True):
        _rounded(total, grads[i])
    return (*grads[:5], of_gate if wanted[5] else grads[5])


class _Part(NamedTuple):
    """Some pairs of one expert."""

    expert: int
    pairs: slice
    row: Tensor  # [n] int32
    gate: Tensor  # [n] float32
    first: bool  # of its expert
    last: bool

    @property
    def length(self) -> int:
        """n."""
        return self.row.shape[0]

    def of(self, biases: Tensor | None) -> Tensor | None:
        """The bias of the part's expert."""
        return None if biases is None else biases[self.expert]


def _parts(experts: RoutedExperts, *columns: int) -> tuple[list[_Part], list[Tensor]]:
    """The pairs of every expert in parts of about the same size, none of an expert that nobody chose; and
    matrices with room for a part's rows of so many columns each.
    """
    dtype, total = experts.weight_in.dtype, max(1, sum(columns))
    most = max(_MOST_PAIRS // 16, min(_MOST_PAIRS, WORKSPACE_BYTES // (total * dtype.itemsize)))
    parts = []
    for e, (start, end) in enumerate(itertools.pairwise(experts.offsets.tolist())):
        count = -(-(end - start) // most)
        cuts = [start + (end - start) * i // count for i in range(count + 1)] if count else []
        for i, pairs in enumerate(itertools.starmap(slice, itertools.pairwise(cuts))):
            parts.append(_Part(e, pairs, experts.row[pairs], experts.gate[pairs], i == 0, i == count - 1))
    rows = (
        -(-max((part.length for part in parts), default=1) // 16) * 16
    )  # a matrix begins on a line of the cache
    pieces = (
        workspace(dtype, rows * total, 1).view(-1)[: rows * sum(columns)].split([rows * n for n in columns])
    )
    return parts, [piece.view(rows, n) for piece, n in zip(pieces, columns, strict=True)]


class _WeightGradient:
    """Sums of products over the parts of each expert; in float32, but for what a part adds to bfloat16."""

    def __init__(self, gradients: Tensor, parts: list[_Part]) -> None:
        self.gradients, self.sum = gradients, gradients
        chosen = {part.expert for part in parts}
        for e in range(len(gradients)):
            if e not in chosen:
                gradients[e].zero_()

    def add(self, part: _Part, a: Tensor, b: Tensor) -> None:
        """Adds ``a^T b``."""
        gradient = self.gradients[part.expert]
        if part.first and part.last:
            torch.mm(a.t(), b, out=gradient)
        elif gradient.dtype == torch.float32:
            torch.addmm(gradient, a.t(), b, beta=0 if part.first else 1, out=gradient)
        else:
            product = torch.mm(a.t(), b)
            self.sum = product.float() if part.first else self.sum.add_(product)
            if part.last:
                gradient.copy_(self.sum)


def _in_float32(experts: RoutedExperts) -> RoutedExperts:
    weight_in, bias_in, weight_out, bias_out = experts[:4]
    bias_in, bias_out = (None if bias is None else bias.float() for bias in (bias_in, bias_out))
    return RoutedExperts(weight_in.float(), bias_in, weight_out.float(), bias_out, *experts[4:])


def _sums_of(result: Tensor) -> Tensor:
    """Where to sum a result in float32: itself, if it is that."""
    return result if result.dtype == torch.float32 else torch.empty(result.shape, dtype=torch.float32)


def _rounded(total: Tensor, result: Tensor) -> Tensor:
    return result if result is total else result.copy_(total)


def _multiply(a: Tensor, weight: Tensor, transposed: bool, out: Tensor) -> None:
    """``out = a weight``, or ``a weight^T``: a [n, I], weight [I, O]."""
    if (
        a.dtype == torch.float32
        and a.shape[0] * weight.numel() >= linear.COMPILED_FROM
        and linear.vector_width(torch.float32) > 0
    ):
        index, gate = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
        linear.fused_product(
            a[None], LinearExperts(weight[None], None, index, gate), None, [1], transposed, out
        )
    else:
        torch.mm(a, weight.t() if transposed else weight, out=out)


# The passes: each calls a function of csrc/routed_mlp.h, which says what it does.


def _gather(x: Tensor, part: _Part, out: Tensor) -> None:
    native.cpu.require().gather_rows(
        address(x, x.dtype, x.numel()), part.length, address(part.row, torch.int32, part.length), x.shape[1],
        DTYPE_CODE[x.dtype], torch.get_num_threads(), address(out, x.dtype, part.length * x.shape[1]),
    )  # fmt: skip


def _add_rows(y: Tensor, bias: Tensor | None, part: _Part, gate: Tensor | None, out: Tensor) -> None:
    native.cpu.require().add_rows(
        address(y, y.dtype, y.numel()), address(bias, y.dtype, y.shape[1]), part.length,
        address(part.row, torch.int32, part.length), address(gate, torch.float32, part.length), y.shape[1],
        DTYPE_CODE[y.dtype], torch.get_num_threads(), address(out, torch.float32, out.numel()),
    )  # fmt: skip


def _activate(hidden: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    dtype, (count, units) = out.dtype, out.shape
    native.cpu.require().activate(
        address(bias, dtype, hidden.shape[1]), count, units, _ACTIVATION_CODE[activation], DTYPE_CODE[dtype],
        torch.get_num_threads(), address(hidden, dtype, hidden.numel()), address(out, dtype, out.numel()),
    )  # fmt: skip


def _activate_backward(
    hidden: Tensor, part: _Part, activation: str, of_units: Tensor, of_hidden: Tensor, of_gate: Tensor
) -> None:
    dtype, count, width = hidden.dtype, part.length, hidden.shape[1]
    native.cpu.require().activate_backward(
        address(hidden, dtype, count * width), count, address(part.gate, torch.float32, count),
        of_units.shape[1], _ACTIVATION_CODE[activation], DTYPE_CODE[dtype], torch.get_num_threads(),
        address(of_units, dtype, of_units.numel()), address(of_hidden, dtype, count * width),
        address(of_gate, torch.float32, count),
    )  # fmt: skip


def _sum_rows(rows: Tensor, gate: Tensor | None, out: Tensor) -> None:
    count, columns = rows.shape
    native.cpu.require().sum_rows(
        address(rows, rows.dtype, rows.numel()), count, address(gate, torch.float32, count), columns,
        DTYPE_CODE[rows.dtype], torch.get_num_threads(), address(out, torch.float32, columns),
    )  # fmt: skip


def _add_dots(rows: Tensor, bias: Tensor, out: Tensor) -> None:
    count, columns = rows.shape
    native.cpu.require().add_dots(
        address(rows, rows.dtype, rows.numel()), address(bias, rows.dtype, columns), count, columns,
        DTYPE_CODE[rows.dtype], torch.get_num_threads(), address(out, torch.float32, count),
    )  # fmt: skip
