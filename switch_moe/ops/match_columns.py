"""Matching the experts of a model to the columns of the diffusion prior."""

from __future__ import annotations

import torch
from torch import Tensor

from switch_moe import native
from switch_moe.ops._dispatch import check_device, check_dtype, check_shape, choose, register
from switch_moe.ops.linear_assignment import address, linear_assignment
from switch_moe.reference.match_columns import MOST_TIMESTEPS
from switch_moe.reference.match_columns import match_columns as reference_match_columns


def match_columns(
    selected: Tensor,
    table: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    prices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The columns of ``table`` matched to those of ``selected`` at the least ``sum |selected - table|``.

    Switch-DiT (arXiv 2403.09176), the Hungarian matching. The official code adds up an ``[N, S, S]`` tensor
    of costs; here they are one product, exact, and on a CPU a count of bits in the operator that solves too.

    Args:
        selected: the experts that the model selects, 0/1 of any real type or bool ``[N, S]``.
        table: the prior, likewise.
        rows, columns: permutations, int64 ``[S]``: the order in which the columns of ``selected`` and of
            ``table`` enter the assignment. It decides ties; random ones break them at random.
        prices: where to start, int64 ``[S]``, one for each column of ``table``, updated in place: see
            :func:`switch_moe.ops.linear_assignment`.
        backend: ``auto``, ``native`` (compiled, for a CPU) or ``reference`` (plain PyTorch). On a GPU
            ``auto`` is a product and the compiled linear_assignment.

    Returns:
        int64 ``[S]`` on the device of ``selected``: the column of ``table`` for each of ``selected``.

    Raises:
        ValueError: a shape or device does not fit; N is over 2^24, what float32 counts to; ``prices`` is not
            contiguous; on a CPU, rows or columns are not permutations. TypeError: rows, columns or prices are
            not int64. RuntimeError: the named backend cannot run here.
    """
    check_shape("selected", selected, ("N", "S"))
    check_shape("table", table, tuple(selected.shape))
    check_device("table", table, selected.device)
    given = [("rows", rows), ("columns", columns)]
    if prices is not None:
        given.append(("prices", prices))
        if not prices.is_contiguous():
            raise ValueError("prices is not contiguous; it is updated in place, so pass a contiguous tensor")
        prices = prices.detach()
    for name, tensor in given:
        check_shape(name, tensor, (table.shape[1],))
        check_dtype(name, tensor, torch.int64)
        check_device(name, tensor, selected.device)
    if len(table) > MOST_TIMESTEPS:
        raise ValueError(f"table has {len(table)} rows; at most 2^24 can be counted")
    if choose("match_columns", backend, selected.device, native_devices=("cpu",)) == "reference":
        if selected.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_permutations(rows, columns)

        def solve(cost: Tensor, start: Tensor | None) -> Tensor:
            return linear_assignment(cost, prices=start, backend=backend)

        return reference_match_columns(selected, table, rows, columns, prices, solve)
    operators = torch.ops.switch_moe
    if prices is None:
        found: Tensor = operators.match_columns(selected, table, rows, columns)
    else:
        found = operators.match_columns_from(selected, table, rows, columns, prices)
    return found


def _check_permutations(rows: Tensor, columns: Tensor) -> None:
    for name, order in (("rows", rows), ("columns", columns)):
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(f"{name} is {order.tolist()}; it must be a permutation of 0 to {len(order) - 1}")


def _fake(
    selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor, prices: Tensor | None = None
) -> Tensor:
    return rows.new_empty(rows.shape[0])


_ARGUMENTS = "Tensor selected, Tensor table, Tensor rows, Tensor columns"


# Two operators, as for linear_assignment.
@register(f"match_columns({_ARGUMENTS}) -> Tensor", _fake, key="CPU")
@register(f"match_columns_from({_ARGUMENTS}, Tensor(a!) prices) -> Tensor", _fake, key="CPU")
def _cpu(
    selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor, prices: Tensor | None = None
) -> Tensor:
    tensors = [
        selected.float().contiguous(),
        table.float().contiguous(),
        rows.contiguous(),
        columns.contiguous(),
    ]
    match = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    addresses = [tensor.data_ptr() for tensor in tensors]
    if not native.cpu.require().match_columns(*table.shape, *addresses, address(prices), match.data_ptr()):
        _check_permutations(rows, columns)
    return match
