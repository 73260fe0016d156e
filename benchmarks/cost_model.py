"""What the programs of each kernel read and compute, and the time that a plain model of one H200 makes of it.

A model, not a measurement:

    launch = LAUNCH + max(tiles on the fullest SM * tile, bytes of all arguments, each once / DRAM)
    tile   = max(FLOPs of products / (FLOPS / SMS), bytes / (L2 / SMS), other operations / (LANES * CLOCK))
             + LATENCY / programs resident on an SM

A program reads its operands from L2 once in each step of its main loop. An element of a merged weight costs
k multiply-adds, and in 16 bits also k conversions and a rounding. True float32 products run on CUDA cores,
TF32 at half the rate of bf16. LATENCY fills and drains a program's pipeline; others on the SM work meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

# bf16 products, DRAM and L2 as large products and copies reach them; the start of a kernel in a CUDA graph.
FLOPS, DRAM, L2, CLOCK, SMS, LANES, LAUNCH, LATENCY = 790e12, 4.3e12, 5.5e12, 1.755e9, 132, 128, 2e-6, 1e-6

DEPTHS = {384: 12, 768: 12, 1024: 24, 1152: 28}  # L by D: Switch-DiT S, B, L, XL


class Cost(NamedTuple):
    """What one program does."""

    steps: float  # of its main loop
    bytes: float  # read in a step
    flops: float = 0  # of products, in a step
    other: float = 0  # operations of CUDA cores in a step
    end_bytes: float = 0  # read and written after the loop
    end_other: float = 0
    exact: bool = False  # products in float32 whatever the type of the arguments


def _steps(size: int, block: int) -> int:
    return -(-size // block)


def _merge(elements: int, top_k: int, size: int) -> int:
    return elements * (top_k if size == 4 else 2 * top_k + 1)


def _forward(a: dict[str, Any]) -> Cost:
    t, n, i, k, size = a["BLOCK_T"], a["BLOCK_N"], a["BLOCK_K"], a["TOP_K"], a["x_ptr"].element_size()
    loads, passes = (t * i + k * i * n) * size, 1 + a["MODULATE"] + a["KEEP"]
    steps = _steps(a["D_IN"], i)
    return Cost(steps, loads, 2 * t * n * i, _merge(i * n, k, size), t * n * size * passes, 2 * t * n)


def _grad_x(a: dict[str, Any]) -> Cost:
    t, n, o, k, size = a["BLOCK_T"], a["BLOCK_N"], a["BLOCK_K"], a["TOP_K"], a["x_ptr"].element_size()
    loads, passes = (t * o * (1 + a["MODULATE"]) + k * o * n) * size, 1 + 2 * a["MODULATE"]
    other = _merge(o * n, k, size) + t * o * a["MODULATE"]
    return Cost(_steps(a["D_OUT"], o), loads, 2 * t * n * o, other, t * n * size * passes, 2 * t * n)


def _grad_weights(a: dict[str, Any], each: bool) -> Cost:
    """For one expert (``each``), or for all; an even routing, k/M of the samples for each expert."""
    i, n, t, k, size = a["BLOCK_I"], a["BLOCK_N"], a["BLOCK_T"], a["TOP_K"], a["x_ptr"].element_size()
    samples = a["batch"] / a["splits"] * (k / a["M"] if each else 1)
    steps, modulate = _steps(a["tokens"], t), a["MODULATE"]
    reads, experts = (1, 1) if each else (k, a["M"])
    loads = (t * i + t * n * (1 + modulate)) * size + reads * i * n * size / steps
    other = t * n * modulate + i * n * (2 * reads + experts) / steps
    written = experts * i * n * a["grad_weight_ptr"].element_size()
    return Cost(samples * steps, loads, 2 * t * i * n, other, written)


def _hidden(a: dict[str, Any]) -> Cost:
    r, c, i, both, size = a["ROWS"], a["COLS"], a["INNER"], 1 + a["GATED"], a["x_ptr"].element_size()
    written = r * c * size * (1 + a["KEEP"] * both)
    return Cost(
        _steps(a["D"], i), (r * i + i * c * both) * size, 2 * r * c * i * both, 0, written, 10 * r * c
    )


def _mixture(a: dict[str, Any]) -> Cost:
    r, c, i, size = a["ROWS"], a["COLS"], a["INNER"], a["a_ptr"].element_size()
    return Cost(a["TOP_K"] * _steps(a["K"], i), (r * i + i * c) * size, 2 * r * c * i, 0, r * c * size)


def _hidden_grad(a: dict[str, Any]) -> Cost:
    r, c, i, both, size = a["ROWS"], a["COLS"], a["INNER"], 1 + a["GATED"], a["grad_ptr"].element_size()
    return Cost(
        _steps(a["D"], i), (r * i + i * c) * size, 2 * r * c * i, 0, r * c * size * (1 + 2 * both), 20 * r * c
    )


def _weight_grad(a: dict[str, Any]) -> Cost:
    r, c, i, size = a["ROWS"], a["COLS"], a["INNER"], a["left_ptr"].element_size()
    pairs = a["pairs_ptr"].numel() / a["M"] / a["splits"]
    written = r * c * a["out_ptr"].element_size()
    return Cost(pairs * _steps(a["tokens"], i), (r * i + i * c) * size, 2 * r * c * i, 0, written)


def _gate_forward(a: dict[str, Any]) -> Cost:
    n, columns, size = a["BLOCK_N"], a["BLOCK_L"] * a["M"], a["embedding_ptr"].element_size()
    loads, written = 128 * (n * size + columns * 4), n * a["BLOCK_L"] * (4 * a["M"] + 8 * a["K"])
    silu = 8 * n * 128  # its exponential takes as long as 8 multiply-adds
    end = 32 * n * columns  # sums over the lanes
    return Cost(_steps(a["D"], 128), loads, 2 * n * columns * 128, silu, written, end, exact=True)


def _gate_backward(a: dict[str, Any], of_weight: bool) -> Cost:
    n, d, columns, size = (
        a["BLOCK_N"],
        a["BLOCK_D"],
        a["BLOCK_L"] * a["MP"],
        a["embedding_ptr"].element_size(),
    )
    gradients = n * a["BLOCK_L"] * (8 * a["M"] + 8 * a["K"])
    flops, other = 2 * n * columns * d, n * columns * (6 + 2 * a["K"])
    if of_weight:
        steps, loads, other = _steps(a["rows"], n), gradients + n * d * size, other + 8 * n * d
        return Cost(steps, loads, flops, other, columns * d * 4, exact=True)
    steps, loads = _steps(a["L"], a["BLOCK_L"]), gradients + a["BLOCK_L"] * a["M"] * d * 4
    return Cost(steps, loads, flops, other, 2 * n * d * size, 8 * n * d, exact=True)


# By module and name of a kernel, from its arguments by name. One without is taken to be bound by DRAM.
COSTS: dict[str, Callable[[dict[str, Any]], Cost]] = {
    "expert_linear._forward_kernel": _forward,
    "expert_linear._grad_x_kernel": _grad_x,
    "expert_linear._grad_weights_kernel": lambda a: _grad_weights(a, each=False),
    "expert_linear._grad_each_weight_kernel": lambda a: _grad_weights(a, each=True),
    "timestep_gate._forward_kernel": _gate_forward,
    "timestep_gate._grad_weight_kernel": lambda a: _gate_backward(a, of_weight=True),
    "timestep_gate._grad_embedding_kernel": lambda a: _gate_backward(a, of_weight=False),
    "expert_mlp._hidden_kernel": _hidden,
    "expert_mlp._mixture_kernel": _mixture,
    "expert_mlp._hidden_grad_kernel": _hidden_grad,
    "expert_mlp._weight_grad_kernel": _weight_grad,
}


def seconds(
    name: str, dtype: str, programs: int, arguments: dict[str, Any], resident: int
) -> tuple[float, str]:
    """Time of a launch and what bounds it."""
    tensors = {id(a): a for a in arguments.values() if isinstance(a, Tensor)}.values()
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return _seconds(COSTS[name](arguments) if name in COSTS else None, dtype, programs, moved, resident)


def problems() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Shapes that Switch-DiT trains with, in bf16: operation, its arguments, and its floor in seconds."""
    batches = itertools.product(DEPTHS, ((3, 2),), (32, 64, 128, 256))
    routings = itertools.product(DEPTHS, ((3, 1), (3, 3), (8, 2), (16, 4)), (128,))
    for (size, (experts, top_k), batch), train in itertools.product((*batches, *routings), (False, True)):
        rows, products = batch * 256, 3 if train else 1
        # Forward x and out; to train also m, and then x, m and dr to dx. Weights once, or twice and dW.
        moved = 2 * rows * size * (7 if train else 2) + 2 * experts * size**2 * products
        row = {
            "operation": "expert_linear " + ("forward + backward" if train else "forward"),
            "shape": f"B={batch} T=256 D={size} {top_k} of {experts}",
            "floor": max(2 * rows * size**2 * products / FLOPS, moved / DRAM),
            "linear": products * linear_seconds(rows, size, size),
        }
        yield "expert_linear", (batch, 256, size, experts, top_k, True, train), row
    for (size, depth), rows in itertools.product(DEPTHS.items(), (1032, 1128, 1256)):
        # In: embedding, weights. Out: probabilities, 2 indices and gates of 3, and the 0/1 table of choices.
        moved = 2 * rows * size + 4 * depth * 3 * size + 4 * depth * rows * (3 + 2 * 2 + 3)
        row = {
            "operation": "timestep_gate forward",
            "shape": f"N'={rows} D={size} L={depth} 2 of 3",
            "floor": max(2 * rows * size * depth * 3 / FLOPS, moved / DRAM),
        }
        yield "timestep_gate", (rows, size, 3, 2, False), row


def linear_seconds(rows: int, inner: int, columns: int) -> float:
    """F.linear in bf16 by the same model: tiles of 128 x 256 x 64, pairs of which share the weights."""
    cost = Cost(_steps(inner, 64), (128 + 256 / 2) * 64 * 2, 2 * 128 * 256 * 64, 0, 128 * 256 * 2, 128 * 256)
    programs, moved = (
        _steps(rows, 128) * _steps(columns, 256),
        2 * (rows * (inner + columns) + inner * columns),
    )
    return _seconds(cost, "bfloat16", programs, moved, 1)[0]


def _seconds(cost: Cost | None, dtype: str, programs: int, moved: float, resident: int) -> tuple[float, str]:
    times = {"DRAM": moved / DRAM}
    if cost is not None:
        flops, other = cost.steps * cost.flops, cost.steps * cost.other + cost.end_other
        if dtype == "float32" or cost.exact:
            flops, other = 0, other + flops / 2
        tile = {
            "tensor cores": flops * (2 if dtype == "tf32" else 1) / (FLOPS / SMS),
            "L2": (cost.steps * cost.bytes + cost.end_bytes) / (L2 / SMS),
            "CUDA cores": other / (LANES * CLOCK),
        }
        fullest = -(-programs // SMS)
        times |= {unit: fullest * (time + LATENCY / max(resident, 1)) for unit, time in tile.items()}
    bound = max(times, key=times.__getitem__)
    return LAUNCH + times[bound], bound
