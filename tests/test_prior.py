"""DiffusionPrior and the routing that feeds it; parity with the official numbers is in test_golden.py."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

from switch_moe import DiffusionPrior, Router
from switch_moe.reference.diffusion_prior import jensen_shannon
from switch_moe.reference.match_columns import matching_cost


def test_table() -> None:
    table = DiffusionPrior(12, 3, 2).table
    assert table.shape == (1000, 36)
    assert (table.sum(1) == 24).all()
    assert table[0, :24].all()
    assert table[-1, -24:].all()


def test_match_recovers_a_permutation() -> None:
    prior = DiffusionPrior(4, 3, 2, num_timesteps=200)
    shuffled = torch.randperm(12)
    assignment = prior.match(prior.table[:, shuffled])
    assert torch.equal(prior.table[:, assignment], prior.table[:, shuffled])


def test_matching_is_exact_under_autocast() -> None:
    torch.manual_seed(0)
    prior = DiffusionPrior(6, 3, 2)
    selected = (torch.rand(1000, 18) < 0.6).float()

    def cost() -> float:
        return float((selected - prior.table[:, prior.match(selected)]).abs().sum())

    with torch.autocast("cpu", torch.bfloat16):
        lower = cost()
    assert lower == cost()


def test_ties_break_at_random_and_follow_the_seed() -> None:
    prior = DiffusionPrior(4, 3, 2, num_timesteps=50)
    selected = torch.ones(50, 12)  # all columns alike: every matching is optimal
    torch.manual_seed(1)
    first, second = prior.match(selected), prior.match(selected)
    torch.manual_seed(1)
    assert torch.equal(prior.match(selected), first)
    assert not torch.equal(first, second)


def test_ties_do_not_favour_a_column() -> None:
    """All columns alike: every permutation of 4 is as likely, by a chi-squared test (p = 1e-4: 57)."""
    prior = DiffusionPrior(2, 2, 1, num_timesteps=5)
    torch.manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(2400):
        found = tuple(prior.match(torch.ones(5, 4)).tolist())
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 57


def test_match_is_optimal_from_earlier_prices() -> None:
    torch.manual_seed(0)
    prior = DiffusionPrior(4, 3, 2, num_timesteps=100)
    prices, logits = torch.zeros(12, dtype=torch.int64), torch.randn(100, 12)
    for _ in range(20):
        selected = (logits > 0).float()
        least = (selected - prior.table[:, prior.match(selected)]).abs().sum()
        assert (selected - prior.table[:, prior.match(selected, prices)]).abs().sum() == least
        cost = matching_cost(selected, prior.table) - prices  # prices are in the table's order
        assert cost.min(1).values.sum() + prices.sum() == least
        logits += 0.1 * torch.randn_like(logits)
    assert prices.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_match_captured_in_a_cuda_graph() -> None:
    prior = DiffusionPrior(28, 3, 2).cuda()
    selected = (torch.rand(1000, 84, device="cuda") < 0.6).float()
    prices = torch.zeros(84, dtype=torch.int64, device="cuda")
    prior.match(selected, prices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = prior.match(selected, prices)
    seen = set()
    for _ in range(3):
        selected.copy_(torch.rand_like(selected) < 0.6)
        graph.replay()
        least = (selected - prior.table[:, prior.match(selected)]).abs().sum()
        assert (selected - prior.table[:, found]).abs().sum() == least
        selected.fill_(1)
        graph.replay()  # all columns alike: replays draw new random numbers
        seen.add(tuple(found.tolist()))
    assert len(seen) == 3


def test_loss_is_zero_only_for_the_prior() -> None:
    prior = DiffusionPrior(4, 3, 2)
    t, assignment = torch.tensor([0, 500, 999]), torch.randperm(12)
    exact = prior.table[t][:, assignment] * 4 / 8
    assert prior.loss(exact, t, assignment).abs() < 1e-6
    assert prior.loss(exact.flip(1), t, assignment) > 0.01


def test_loss_gradient_in_float64_terms() -> None:
    prior = DiffusionPrior(2, 3, 1, num_timesteps=20)
    t, assignment = torch.tensor([3, 19, 0]), torch.randperm(6)
    probs = torch.softmax(torch.randn(3, 2, 3), -1).flatten(1).requires_grad_()
    loss = prior.loss(probs, t, assignment)
    (gradient,) = torch.autograd.grad(loss, probs)

    def exact(p: torch.Tensor) -> torch.Tensor:
        q, u = p.double() / 2, prior.table[t][:, assignment].double() / 2
        log_middle = ((q + u) / 2 + 1e-6).log()
        return 0.5 * (q * ((q + 1e-6).log() - log_middle) + u * ((u + 1e-6).log() - log_middle)).sum(1).mean()

    leaf = probs.detach().double().requires_grad_()
    assert_close("loss", loss, exact(leaf), 1e-5)
    assert_close("gradient", gradient, torch.autograd.grad(exact(leaf), leaf)[0], 1e-5)


def test_compile_fullgraph() -> None:
    prior = DiffusionPrior(4, 3, 2, num_timesteps=100)
    router = Router(4, 16)
    embedding, t = torch.randn(100, 16), torch.tensor([3, 60])

    def loss(embedding: torch.Tensor) -> torch.Tensor:
        routing = router(embedding)
        assignment = prior.match(routing.selected())
        return prior.loss(routing.probs.transpose(0, 1).flatten(1)[t], t, assignment)

    torch.nn.init.normal_(router.weight)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # eager's random numbers break ties
    torch.manual_seed(0)
    found = compiled(embedding)
    torch.manual_seed(0)
    assert_close("loss", found, loss(embedding), 1e-5)


def test_routing_and_loss_on_the_device(device: str) -> None:
    """One step of what training does, on the GPU's kernels where there is one, against float64."""
    torch.manual_seed(0)
    router = Router(6, 24).to(device)
    prior = DiffusionPrior(6, 3, 2, num_timesteps=60).to(device)
    torch.nn.init.normal_(router.weight)
    times = torch.randn(60, 24, device=device)
    t = torch.tensor([3, 59, 20, 20], device=device)
    with torch.no_grad():
        assignment = prior.match(router(times, selected=True).selected())
    probs = router(times[t]).probs.transpose(0, 1).flatten(1)
    (gradients,) = torch.autograd.grad(prior.loss(probs, t, assignment), [router.weight])

    exact = [weight.detach().double().requires_grad_() for weight in router.weight]
    hidden = torch.nn.functional.silu(times[t].double())
    q = torch.cat([torch.softmax(hidden @ weight.t(), -1) for weight in exact], 1) / 6
    loss = jensen_shannon(q, prior.table.double()[t][:, assignment] / 12)
    for found, expected in zip(gradients, torch.autograd.grad(loss, exact), strict=True):
        assert_close("router weight", found, expected, 1e-5)


@pytest.mark.parametrize("batch", [0, 2])
def test_loss_takes_int32_timesteps_and_an_empty_batch(batch: int) -> None:
    prior = DiffusionPrior(2, 3, 2, num_timesteps=10)
    probs, t, assignment = torch.full((batch, 6), 1 / 3), torch.arange(batch), torch.arange(6)
    loss = prior.loss(probs, t, assignment)
    assert loss.isnan() if batch == 0 else loss > 0
    assert torch.equal(prior.loss(probs, t.int(), assignment), loss) or batch == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"top_k": 4}, "top_k is 4; it must be between 1 and the number of experts, 3"),
        ({"num_timesteps": 0}, "num_timesteps is 0"),
        ({"num_timesteps": 2**24 + 1}, "num_timesteps is 16777217; it must be at most 2\\^24"),
    ],
)
def test_errors(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionPrior(**{"depth": 2, "num_experts": 3, "top_k": 2, **settings})


def test_shape_errors() -> None:
    prior = DiffusionPrior(2, 3, 2, num_timesteps=10)
    with pytest.raises(ValueError, match=r"selected has shape \(5, 6\); it must be \[10, 6\]"):
        prior.match(torch.zeros(5, 6))
    with pytest.raises(ValueError, match=r"probs has shape \(2, 5\); it must be \[B, 6\]"):
        prior.loss(torch.zeros(2, 5), torch.zeros(2).long(), torch.arange(6))
