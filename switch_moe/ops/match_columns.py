"""Matching the experts of a model to the columns of the diffusion prior."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu import match_columns as compiled
from ..reference.match_columns import match_columns as reference_match_columns
from ._backend import choose, operation
from ._checks import check_device, check_dtype, check_shape, check_tensors, check_zero_one, has_values
from ._operator import operator
from .linear_assignment import REAL, linear_assignment

MOST_TIMESTEPS = 2**24  # float32 counts to there

_OPERATION = operation("match_columns", native=("cpu",), differentiable=False)


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
            contiguous; on a CPU, rows or columns are not permutations or a table holds another number than 0
            and 1. TypeError: selected or table is no real type, rows, columns or prices are
            not int64. RuntimeError: the named backend cannot run here.
    """
    check_tensors(selected=selected, table=table, rows=rows, columns=columns)
    check_shape("selected", selected, ("N", "S"))
    for name, tensor in (("selected", selected), ("table", table)):
        check_dtype(name, tensor, *REAL, torch.bool)
    check_shape("table", table, tuple(selected.shape))
    check_device("table", table, selected.device)
    integers = [("rows", rows), ("columns", columns)]
    if prices is not None:
        check_tensors(prices=prices)
        integers.append(("prices", prices))
        if not prices.is_contiguous():
            raise ValueError("prices is not contiguous; it is updated in place, so pass a contiguous tensor")
        prices = prices.detach()
    for name, tensor in integers:
        check_shape(name, tensor, (table.shape[1],))
        check_dtype(name, tensor, torch.int64)
        check_device(name, tensor, selected.device)
    if len(table) > MOST_TIMESTEPS:
        raise ValueError(f"table has {len(table)} rows; at most 2^24 can be counted")
    if choose(_OPERATION, backend, selected) == "native":
        given = (selected, table, rows, columns)
        found: Tensor = _without_prices(*given) if prices is None else _from_prices(*given, prices)
        return found
    if has_values(selected):
        _check_values(selected, table, rows, columns)

    def solve(cost: Tensor, start: Tensor | None) -> Tensor:
        return linear_assignment(cost, prices=start, backend=backend)

    return reference_match_columns(selected, table, rows, columns, prices, solve)


def _check_values(selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor) -> None:
    check_zero_one("selected", selected)
    check_zero_one("table", table)
    for name, order in (("rows", rows), ("columns", columns)):
        if not torch.equal(order.sort().values, torch.arange(len(order), device="cpu")):
            raise ValueError(f"{name} is {order.tolist()}; it must be a permutation of 0 to {len(order) - 1}")


def _fake(selected: Tensor, table: Tensor, rows: Tensor, *_: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0])


# There are two operators for the reason given in linear_assignment.
@operator("match_columns", fake=_fake)
def _without_prices(selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return _compiled((selected, table, rows, columns), None)


@operator("match_columns_from", fake=_fake, mutates=("prices",))
def _from_prices(selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor, prices: Tensor) -> Tensor:
    return _compiled((selected, table, rows, columns), prices)


def _compiled(tables: tuple[Tensor, Tensor, Tensor, Tensor], prices: Tensor | None) -> Tensor:
    match, fits = compiled.match_columns(*tables, prices)
    if not fits:
        _check_values(*tables)
    return match
