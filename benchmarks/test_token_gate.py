"""token_gate and route_pairs: who chooses whom, token by token, and the pairs that follow by expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import SWITCH_MOE, Case, Contender, Inputs, Outputs
from switch_moe import ops


def cases(device: str, quick: bool) -> Iterator[Case]:
    batch = 32 if device == "cpu" else 256
    for experts, top_k in ((8, 2), (64, 6))[: 1 if quick else None]:
        yield tokens_choose(device, batch, 256, experts, top_k)
        yield experts_choose(device, batch, 256, experts, top_k)
        yield pairs_case(device, 256 * batch, top_k, experts)


def test_token_gate(bench, case, which) -> None:
    bench.measure(case, which)


def gate_case(
    device: str, shape: dict[str, int | str], gate_shape: tuple[int, ...], options: dict, topk
) -> Case:
    """The operation, its reference, and ``topk``, which is what one writes without it."""
    size = tuple(shape[name] for name in ("B", "T", "M"))

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {"logits": size, "grad_probs": size, "grad_gate": gate_shape}
        return {n: torch.randn(s, generator=generator, device=device) for n, s in shapes.items()}

    def call(i: Inputs, backend: str) -> Outputs:
        out = ops.token_gate(i["logits"], **options, backend=backend)
        return out.probs, out.gate

    def reference(i: Inputs, _: Outputs = ()) -> Outputs:
        return call(i, "reference")

    contenders = [
        Contender(SWITCH_MOE, lambda i: call(i, "auto"), reference, ("logits",), (), True),
        Contender("reference", reference, reference, ("logits",), ()),
        Contender("topk", topk, lambda i, _: topk(i), ("logits",), ()),
    ]
    outputs = {"probs": "grad_probs", "gate": "grad_gate"}
    return Case("token_gate", shape, torch.float32, make, contenders, outputs)


def tokens_choose(device: str, batch: int, tokens: int, experts: int, top_k: int) -> Case:
    """Each token its ``top_k`` experts, with gates that sum to one."""

    def topk(i: Inputs) -> Outputs:
        probs = i["logits"].softmax(-1)
        gate = probs.topk(top_k, dim=-1).values
        return probs, gate / gate.sum(-1, keepdim=True)

    shape: dict[str, int | str] = {"B": batch, "T": tokens, "M": experts, "k": top_k}
    options = {"top_k": top_k, "normalise": True}
    return gate_case(device, shape, (batch, tokens, top_k), options, topk)


def experts_choose(device: str, batch: int, tokens: int, experts: int, top_k: int) -> Case:
    """Each expert its tokens of the whole batch: as many pairs as where tokens choose."""
    count = batch * tokens * top_k // experts

    def topk(i: Inputs) -> Outputs:
        probs = i["logits"].softmax(-1)
        return probs, probs.flatten(0, 1).t().topk(count, dim=-1).values[None]

    shape: dict[str, int | str] = {"B": batch, "T": tokens, "M": experts, "C": count}
    return gate_case(device, shape, (1, experts, count), {"capacity": count, "pool": batch}, topk)


def pairs_case(device: str, rows: int, slots: int, experts: int) -> Case:
    """The pairs of all rows by expert."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        return {"index": torch.randint(experts, (rows, slots), generator=generator, device=device)}

    def sort(i: Inputs) -> Outputs:
        ordered, pair = i["index"].flatten().sort(stable=True)
        return torch.searchsorted(ordered, torch.arange(experts + 1, device=device)), pair

    def run(i: Inputs) -> Outputs:
        return ops.route_pairs(i["index"], experts)

    contenders = [
        Contender(SWITCH_MOE, run, lambda i, _: sort(i), (), (), True),
        Contender("sort", sort, lambda i, _: sort(i), (), ()),
    ]
    shape: dict[str, int | str] = {"rows": rows, "k": slots, "M": experts}
    return Case("route_pairs", shape, torch.float32, make, contenders, {"offsets": "", "pair": ""})
