"""What it costs to match the experts of a model to the columns of the diffusion prior."""

from __future__ import annotations

import torch
from torch import Tensor

from switch_moe import native
from switch_moe.ops._dispatch import check_device, check_dtype, check_shape, choose, register
from switch_moe.reference.matching_cost import MOST_TIMESTEPS
from switch_moe.reference.matching_cost import matching_cost as reference_matching_cost


def matching_cost(
    selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor, *, backend: str = "auto"
) -> Tensor:
    """``C[a, b] = sum_t |selected[t, rows[a]] - table[t, columns[b]]|``, exact.

    Switch-DiT (arXiv 2403.09176), the costs of the Hungarian matching. The official code adds up an
    ``[N, S, S]`` tensor; this is a product, and on a CPU a count of bits.

    Args:
        selected: the experts that the model selects, 0/1 of any real type or bool ``[N, S]``.
        table: the prior, likewise.
        rows, columns: int64 ``[S]``, which column of ``selected`` and of ``table`` a row and a column of C is
            for. Random permutations break ties at random.
        backend: ``auto``, ``native`` (compiled, for a CPU) or ``reference``.

    Returns:
        int64 ``[S, S]`` on the device of ``selected``.

    Raises:
        ValueError: a shape or device does not fit; N is over 2^24, what float32 counts to; ``native``: rows
            or columns leave ``[0, S)``. TypeError: rows or columns are not int64. RuntimeError: the named
            backend cannot run here. IndexError, ``reference``: rows or columns leave ``[0, S)``.
    """
    check_shape("selected", selected, ("N", "S"))
    check_shape("table", table, tuple(selected.shape))
    check_device("table", table, selected.device)
    for name, index in (("rows", rows), ("columns", columns)):
        check_shape(name, index, (table.shape[1],))
        check_dtype(name, index, torch.int64)
        check_device(name, index, selected.device)
    if len(table) > MOST_TIMESTEPS:
        raise ValueError(f"table has {len(table)} rows; at most 2^24 can be counted")
    if choose("matching_cost", backend, selected.device, native_devices=("cpu",)) == "reference":
        return reference_matching_cost(selected, table, rows, columns)
    cost: Tensor = torch.ops.switch_moe.matching_cost(selected, table, rows, columns)
    return cost


def _fake(selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], rows.shape[0])


@register(
    "matching_cost(Tensor selected, Tensor table, Tensor rows, Tensor columns) -> Tensor", _fake, key="CPU"
)
def _cpu(selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    timesteps, slots = table.shape
    tables = [tensor.float().contiguous() for tensor in (selected, table)]
    orders = [tensor.contiguous() for tensor in (rows, columns)]
    cost = rows.new_empty(slots, slots)
    addresses = [tensor.data_ptr() for tensor in (*tables, *orders, cost)]
    if not native.cpu.require().matching_cost(timesteps, slots, *addresses):
        for name, index in (("rows", rows), ("columns", columns)):
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high >= slots:
                raise ValueError(f"{name} holds {low} to {high}; it must stay in [0, {slots})")
    return cost
