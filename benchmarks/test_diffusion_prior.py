"""The diffusion prior: matching of the experts to the prior's columns, and the loss with its gradient.

The official way builds the differences of all pairs of columns, ``[N, n, n]``, and solves with scipy on the
host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import SWITCH_MOE, Case, Contender, Inputs, Outputs
from benchmarks.test_linear_assignment import best_columns, if_best
from switch_moe import DiffusionPrior
from switch_moe.reference.diffusion_prior import jensen_shannon

TIMESTEPS = 1000


def cases(device: str, quick: bool) -> Iterator[Case]:
    for depth in (12,) if quick else (12, 24, 28):
        yield matching_case(device, depth, 256, "smooth", loss=True)
    for routing in () if quick else ("fresh", "smooth", "random"):
        yield matching_case(device, 28, 256, routing, loss=False)


def test_diffusion_prior(bench, case, which) -> None:
    bench.measure(case, which)


def matching_case(
    device: str, depth: int, batch: int, routing: str, *, experts: int = 3, top_k: int = 2, loss: bool
) -> Case:
    """The matching, and with ``loss`` the prior loss too."""
    columns = depth * experts
    prior = DiffusionPrior(depth, experts, top_k, TIMESTEPS).to(device)

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(batch, depth, experts, generator=generator, device=device)
        return {
            "selected": select_experts(routing, depth, experts, top_k, generator),
            "probs": logits.softmax(-1).flatten(1),
            "t": torch.randint(TIMESTEPS, (batch,), generator=generator, device=device),
            "table": prior.table.clone(),
            "grad_loss": torch.rand((), generator=generator, device=device) + 0.5,
        }

    def exact_loss(i: Inputs, assignment: Tensor) -> Tensor:
        target = i["table"][i["t"]][:, assignment] / (depth * top_k)
        return jensen_shannon(i["probs"] / depth, target)

    def run(i: Inputs) -> Outputs:
        assignment = prior.match(i["selected"])
        return (prior.loss(i["probs"], i["t"], assignment), assignment) if loss else (assignment,)

    def official(i: Inputs) -> Outputs:
        of_model, of_table = (torch.rand(columns).argsort().to(device) for _ in range(2))  # ties at random
        found = best_columns(official_cost(i["selected"][:, of_model], i["table"][:, of_table]))
        assignment = torch.empty_like(found).index_copy_(0, of_model, of_table[found])
        return (exact_loss(i, assignment), assignment) if loss else (assignment,)

    def exact(i: Inputs, outputs: Outputs) -> Outputs:
        """The loss at the contender's own assignment, which must be one of the best."""
        best = if_best(official_cost(i["selected"], i["table"]), outputs[-1])
        if not loss:
            return (best,)
        return (exact_loss(i, outputs[-1].clamp(0, columns - 1)) + 0 * best.sum(),)

    leaves, reads = ("probs",) if loss else (), ("selected", "table", "t")
    contenders = [
        Contender(SWITCH_MOE, run, exact, leaves, reads, True),
        Contender("official matching", official, exact, leaves, reads),
    ]
    name = "matching + prior loss" if loss else "matching"
    shape: dict[str, int | str] = {"n": columns, "B": batch} if loss else {"n": columns}
    outputs = {"loss": "grad_loss"} if loss else {"assignment": ""}
    note = f"{routing} routing"
    return Case(name, shape, torch.float32, make, contenders, outputs, note, exact_by_inputs=False)


def official_cost(selected: Tensor, table: Tensor) -> Tensor:
    """``sum_t |selected - table|`` of every two columns, added up as the official code does."""
    return (selected[:, :, None] - table[:, None, :]).abs().sum(0)


def select_experts(routing: str, depth: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """0/1 ``[1000, depth * experts]``, chosen by routers that are ``fresh`` (the same at all timesteps, as
    untrained ones nearly do), ``smooth`` (the choice moves with the timestep) or ``random``. The time of the
    matching depends on it.
    """
    device = generator.device
    if routing == "smooth":
        frequency = torch.exp(-torch.arange(16, device=device) / 3)
        wave = torch.sin(torch.arange(TIMESTEPS, device=device)[:, None] * frequency)
        logits = wave @ torch.randn(16, depth * experts, generator=generator, device=device)
        logits = logits.view(TIMESTEPS, depth, experts)
    else:
        rows = 1 if routing == "fresh" else TIMESTEPS
        logits = torch.randn(rows, depth, experts, generator=generator, device=device)
    selected = torch.zeros_like(logits).scatter(2, logits.topk(top_k).indices, 1.0)
    return selected.flatten(1).expand(TIMESTEPS, -1).contiguous()
