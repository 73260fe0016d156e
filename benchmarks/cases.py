"""What the GPU report measures: for each operation and shape its contenders, their inputs and what is right.

python -m benchmarks.cases --small       # our kernels at tiny shapes, checked: for compute-sanitizer
python -m benchmarks.cases --warm 1/8    # compile every 8th case's kernels into the caches on disk
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import expert_loop, grouped_linear, grouped_mlp
from benchmarks.case import (
    ANY_K,
    COMPILED,
    LINEAR,
    MODULATED,
    OURS,
    Case,
    Contender,
    Inputs,
    Outputs,
    check,
)
from benchmarks.peers import peers
from switch_moe import DiffusionPrior
from switch_moe.ops import expert_linear, expert_mlp, linear_assignment, matching_cost, timestep_gate
from switch_moe.reference.diffusion_prior import jensen_shannon
from switch_moe.reference.expert_linear import expert_linear as reference_linear
from switch_moe.reference.expert_mlp import expert_mlp as reference_mlp
from switch_moe.reference.timestep_gate import selected_experts
from switch_moe.reference.timestep_gate import timestep_gate as reference_gate


def random_index(batch: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Different experts for each sample, ``[B, k]`` int32."""
    scores = torch.rand(batch, experts, generator=generator, device=generator.device)
    return scores.argsort(1)[:, :top_k].int().contiguous()


def linear_case(
    device: str,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    size: int,
    experts: int = 3,
    top_ks: Iterable[int] = (2,),
    *,
    note: str = "",
) -> Case:
    """expert_linear: against F.linear and others at one k; at several, ours at each; note 'compiled': against
    torch.compile.
    """
    top_ks = list(top_ks)

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        inputs = {
            "x": normal(batch, tokens, size),
            "weight": normal(experts, size, size) / size**0.5,
            "bias": normal(experts, size),
            "grad": normal(batch, tokens, size),
            "linear_weight": normal(size, size) / size**0.5,
            "linear_bias": normal(size),
        }
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        for k in top_ks:
            inputs[f"index{k}"] = random_index(batch, experts, k, generator)
            inputs[f"gate{k}"] = torch.rand(batch, k, generator=generator, device=device)
        return inputs

    def contender(name: str, function: Callable[..., Tensor], k: int, ours: bool = False, **options: Any):
        def call(function: Callable[..., Tensor], i: Inputs) -> Outputs:
            return (function(i["x"], i["weight"], i["bias"], i[f"index{k}"], i[f"gate{k}"], **options),)

        leaves = ("x", "weight", "bias", f"gate{k}")
        exact = lambda i, _: call(reference_linear, i)  # noqa: E731
        return Contender(name, lambda i: call(function, i), exact, leaves, (f"index{k}",), ours)

    first = top_ks[0]
    if len(top_ks) > 1:
        contenders = [contender(f"k={k}", expert_linear, k, ours=True) for k in top_ks]
    elif note == COMPILED:
        compiled = torch.compile(reference_linear, dynamic=False)
        contenders = [contender(OURS, expert_linear, first, ours=True), contender(COMPILED, compiled, first)]
    else:
        run_linear = lambda i: (F.linear(i["x"], i["linear_weight"], i["linear_bias"]),)  # noqa: E731
        leaves = ("x", "linear_weight", "linear_bias")
        contenders = [
            Contender(LINEAR, run_linear, lambda i, _: run_linear(i), leaves, ()),
            contender(OURS, expert_linear, first, ours=True),
            contender(MODULATED, expert_linear, first, ours=True, modulate=True),
            contender("expert loop", expert_loop, first),
            contender("grouped_mm", grouped_linear, first),
            *(contender(peer.name, peer.linear, first) for peer in peers()[0]),
        ]
    shape: dict[str, int | str] = {"D": size, "B": batch, "T": tokens, "M": experts}
    shape |= {"k": first} if len(top_ks) == 1 else {}
    flops = 2.0 * batch * tokens * size * size
    seconds = 40.0 if note == COMPILED else 2.0 + len(contenders)
    return Case(
        "expert_linear", shape, dtype, make, contenders, {"out": "grad"}, flops, seconds=seconds, note=note
    )


def mlp_case(
    device: str, dtype: torch.dtype, batch: int, tokens: int, size: int, experts: int, top_k: int, gated: bool
) -> Case:
    """expert_mlp with a hidden layer of 4 D against the reference and grouped products."""
    hidden = 4 * size
    width = 2 * hidden if gated else hidden

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {
            "x": (batch, tokens, size), "weight_in": (experts, size, width), "bias_in": (experts, width),
            "weight_out": (experts, hidden, size), "bias_out": (experts, size), "grad": (batch, tokens, size),
        }  # fmt: skip
        inputs = {n: torch.randn(s, generator=generator, device=device) for n, s in shapes.items()}
        inputs["weight_in"] /= size**0.5
        inputs["weight_out"] /= hidden**0.5
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        inputs["index"] = random_index(batch, experts, top_k, generator)
        inputs["gate"] = torch.rand(batch, top_k, generator=generator, device=device)
        return inputs

    leaves = ("x", "weight_in", "bias_in", "weight_out", "bias_out", "gate")

    def contender(name: str, function: Callable[..., Tensor], ours: bool = False) -> Contender:
        def call(function: Callable[..., Tensor], i: Inputs) -> Outputs:
            weights = (i[name] for name in leaves[:5])
            return (function(*weights, i["index"], i["gate"], gated),)

        exact = lambda i, _: call(reference_mlp, i)  # noqa: E731
        return Contender(name, lambda i: call(function, i), exact, leaves, ("index",), ours)

    contenders = [
        contender(OURS, expert_mlp, ours=True),
        contender("reference", reference_mlp),
        contender("grouped_mm", grouped_mlp),
        *(contender(peer.name, peer.mlp) for peer in peers()[0]),
    ]
    shape: dict[str, int | str] = {"D": size, "B": batch, "T": tokens, "M": experts, "k": top_k}
    shape["act"] = "SwiGLU" if gated else "GELU"
    flops = 2.0 * batch * tokens * top_k * size * (width + hidden)
    return Case("expert_mlp", shape, dtype, make, contenders, {"out": "grad"}, flops, seconds=8.0)


def gate_case(device: str, rows: int, size: int, depth: int, experts: int = 3, top_k: int = 2) -> Case:
    """timestep_gate of all layers, with the table of chosen experts."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {
            "embedding": (rows, size), "weight": (depth, experts, size), "bias": (depth, experts),
            "grad_probs": (depth, rows, experts), "grad_gate": (depth, rows, top_k),
        }  # fmt: skip
        inputs = {n: torch.randn(s, generator=generator, device=device) for n, s in shapes.items()}
        inputs["weight"] /= size**0.5
        return inputs

    def ours(i: Inputs) -> Outputs:
        probs, index, gate, table = timestep_gate(
            i["embedding"], i["weight"], i["bias"], top_k, selected=True
        )
        return probs, gate, index, table

    def reference(i: Inputs) -> Outputs:
        probs, index, gate = reference_gate(i["embedding"], i["weight"], i["bias"], top_k)
        return probs, gate, index, selected_experts(probs, index)

    leaves = ("embedding", "weight", "bias")
    contenders = [
        Contender(OURS, ours, lambda i, _: reference(i), leaves, (), ours=True),
        Contender("reference", reference, lambda i, _: reference(i), leaves, ()),
    ]
    shape: dict[str, int | str] = {"D": size, "L": depth, "N'": rows, "M": experts, "k": top_k}
    outputs = {"probs": "grad_probs", "gate": "grad_gate"}
    flops = 2.0 * rows * size * depth * experts
    return Case("timestep_gate", shape, torch.float32, make, contenders, outputs, flops)


def matching_case(
    device: str, depth: int, timesteps: int, batch: int, *, fresh: bool, experts: int = 3, top_k: int = 2
) -> Case:
    """Matching, prior loss and its gradient. ``fresh``: all timesteps choose the same experts, as untrained
    routers nearly do; else they choose at random. The time of the matching depends on it.
    """
    slots = depth * experts
    prior = DiffusionPrior(depth, experts, top_k, timesteps).to(device)
    in_order = torch.arange(slots, device=device)

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        rows = 1 if fresh else timesteps
        index = random_index(rows * depth, experts, top_k, generator).view(rows, depth, top_k).transpose(0, 1)
        selected = selected_experts(torch.zeros(depth, rows, experts, device=device), index)
        logits = torch.randn(batch, depth, experts, generator=generator, device=device)
        return {
            "selected": selected.expand(timesteps, slots).contiguous(),
            "probs": logits.softmax(-1).flatten(1),
            "t": torch.randint(timesteps, (batch,), generator=generator, device=device),
            "table": prior.table.clone(),
            "grad_loss": torch.rand((), generator=generator, device=device) + 0.5,
        }

    def ours(i: Inputs) -> Outputs:
        assignment = prior.match(i["selected"])
        return prior.loss(i["probs"], i["t"], assignment), assignment

    def exact_loss(i: Inputs, assignment: Tensor) -> Tensor:
        target = i["table"][i["t"]][:, assignment] / (depth * top_k)
        return jensen_shannon(i["probs"] / depth, target)

    def exact(i: Inputs, outputs: Outputs) -> Outputs:
        """NaN unless the assignment has the least cost; of several such ones any is right."""
        cost, found = matching_cost(i["selected"], i["table"], in_order, in_order).cpu(), outputs[1].cpu()
        rows = torch.arange(slots)
        valid = torch.equal(found.sort().values, rows)
        least = cost[rows, linear_assignment(cost)].sum()
        if not valid or cost[rows, found].sum() != least:
            return (exact_loss(i, outputs[1].clamp(0, slots - 1)) * torch.nan,)
        return (exact_loss(i, outputs[1]),)

    def with_scipy(i: Inputs) -> Outputs:
        from scipy.optimize import linear_sum_assignment

        cost = matching_cost(i["selected"], i["table"], in_order, in_order).cpu().numpy()
        assignment = torch.from_numpy(linear_sum_assignment(cost)[1]).to(device)
        return exact_loss(i, assignment), assignment

    leaves, reads = ("probs",), ("selected", "table", "t")
    contenders = [
        Contender(OURS, ours, exact, leaves, reads, ours=True),
        Contender("scipy on the host", with_scipy, exact, leaves, reads),
    ]
    shape: dict[str, int | str] = {"n": slots, "N": timesteps, "B": batch}
    flops = 2.0 * timesteps * slots * slots
    note = "fresh routers" if fresh else "random routing"
    name = "matching + prior loss"
    return Case(name, shape, torch.float32, make, contenders, {"loss": "grad_loss"}, flops, note=note)


def dispatch_case(device: str, batch: int, experts: int, top_k: int) -> Case:
    """The schedule of a batch against torch's sort."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        return {"index": random_index(batch, experts, top_k, generator)}

    def ours(i: Inputs) -> Outputs:
        from switch_moe.kernels.dispatch import dispatch

        order, pairs, offsets = dispatch(i["index"], experts)
        return pairs, offsets, order

    def sort(i: Inputs) -> Outputs:
        by_expert, pairs = torch.sort(i["index"].flatten(), stable=True)
        bounds = torch.arange(experts + 1, device=i["index"].device, dtype=torch.int32)
        return pairs, torch.searchsorted(by_expert, bounds)

    contenders = [
        Contender(OURS, ours, lambda i, _: sort(i), (), ("index",), ours=True),
        Contender("torch.sort", sort, lambda i, _: sort(i), (), ("index",)),
    ]
    shape: dict[str, int | str] = {"B": batch, "M": experts, "k": top_k}
    outputs = {"pairs": "", "offsets": ""}
    return Case("dispatch", shape, torch.float32, make, contenders, outputs, 0.0)


def full_plan(device: str) -> Iterator[Case]:
    """All that the report measures, the most important first."""
    bf16 = torch.bfloat16
    for size in (1152, 384, 768, 1024):
        for batch in (128, 256, 64, 32):
            yield linear_case(device, bf16, batch, 256, size)
    for fresh in (False, True):
        yield matching_case(device, 28, 1000, 256, fresh=fresh)
    yield gate_case(device, 1256, 1152, 28)
    yield gate_case(device, 1256, 384, 12)
    for experts in (3, 4, 8, 16):
        yield linear_case(device, bf16, 128, 256, 1152, experts, range(1, experts + 1), note=ANY_K)
    for tokens in (64, 16):
        yield linear_case(device, bf16, 128, tokens, 1152)
    for size in (1152, 384):
        for gated in (False, True):
            yield mlp_case(device, bf16, 32, 256, size, 8, 2, gated)
    yield dispatch_case(device, 128, 3, 2)
    yield dispatch_case(device, 128, 16, 16)
    for experts in (3, 4, 8, 16):
        yield linear_case(device, bf16, 128, 256, 384, experts, range(1, experts + 1), note=ANY_K)
    for size in (1152, 384, 768, 1024):
        yield linear_case(device, bf16, 128, 256, size, note=COMPILED)


def tiny_plan(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The same at sizes that take no time: for tests without a GPU, and for compute-sanitizer."""
    yield linear_case(device, dtype, 5, 24, 48)
    yield matching_case(device, 4, 30, 6, fresh=False)
    yield matching_case(device, 4, 30, 6, fresh=True)
    yield gate_case(device, 37, 40, 3)
    yield linear_case(device, dtype, 4, 20, 32, 4, range(1, 5), note=ANY_K)
    yield mlp_case(device, dtype, 3, 16, 32, 4, 2, gated=False)
    yield mlp_case(device, dtype, 3, 16, 32, 4, 2, gated=True)
    yield dispatch_case(device, 9, 4, 2)
    yield linear_case(device, dtype, 3, 16, 32, note=COMPILED)


def run_small(device: str, dtype: torch.dtype) -> list[str]:
    """Our contenders of the tiny plan; what is right is computed on the host. Returns what is wrong."""
    wrong = []
    for case in tiny_plan(device, dtype):
        for contender in case.contenders:
            if contender.ours:
                failure = check(case, contender, case.make(0), host=True)["failure"]
                wrong += [f"{case.name}, {contender.name}: {failure}"] if failure else []
    return wrong


def warm_up(device: str, part: int, parts: int) -> None:
    """Runs our contenders and compiled ones once, so that others find their kernels in the caches on disk."""
    pairs = [(case, contender) for case in full_plan(device) for contender in case.contenders]
    pairs = [(a, b) for a, b in pairs if b.ours or b.name == COMPILED]
    for case, contender in pairs[part - 1 :: parts]:
        inputs = case.make(0)
        for which in case.passes:
            with contextlib.suppress(Exception):  # the report runs it too, and says what it raised
                case.step(contender, inputs, which)()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--warm", metavar="I/N")
    arguments = parser.parse_args()
    if arguments.warm:
        warm_up("cuda", *(int(number) for number in arguments.warm.split("/")))
    wrong = run_small("cuda", torch.bfloat16) if arguments.small else []
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
