"""What is measured: for each operation and shape its contenders, their inputs and what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import expert_loop
from benchmarks.case import (
    COMPILED,
    LINEAR,
    MODULATED,
    OURS,
    Case,
    Contender,
    Inputs,
    Outputs,
)
from benchmarks.peers import (
    EXPERT_LOOP,
    GROUPED_MM,
    OFFICIAL,
    Peer,
    official_layer,
    official_linear,
    peer_path,
    peers,
)
from switch_moe import DiffusionPrior, Router, SwitchMoE
from switch_moe.ops import expert_linear, expert_mlp, linear_assignment, timestep_gate
from switch_moe.ops.timestep_gate import selected_experts
from switch_moe.reference.diffusion_prior import jensen_shannon
from switch_moe.reference.expert_linear import expert_linear as reference_linear
from switch_moe.reference.expert_mlp import expert_mlp as reference_mlp
from switch_moe.reference.timestep_gate import timestep_gate as reference_gate

TIMESTEPS = 1000
WITH_TABLE, EACH_BLOCK = "switch_moe + table", "a call for each block"
OFFICIAL_MATCHING = "official matching"


def random_index(batch: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Different experts for each sample, ``[B, k]`` int32."""
    scores = torch.rand(batch, experts, generator=generator, device=generator.device)
    return scores.argsort(1)[:, :top_k].int().contiguous()


def linear_peers() -> list[Peer]:
    """Those that compute expert_linear."""
    return [EXPERT_LOOP, GROUPED_MM, *(peer for peer in peers()[0] if peer.linear is not None)]


def with_prepared(contender: Contender, prepare: Callable[[Inputs], Any]) -> tuple[Contender, Contender]:
    """A peer's two lines: with the metadata of the routing in the step, and made ahead."""
    return contender, contender._replace(name=f"{contender.name}, prepared", prepare=prepare)


def linear_inputs(
    generator: torch.Generator, dtype: torch.dtype, batch: int, tokens: int, size: int, experts: int
) -> Inputs:
    """Tokens, experts, a linear layer and a gradient, of unit scale."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)

    return {
        "x": normal(batch, tokens, size),
        "weight": normal(experts, size, size) / size**0.5,
        "bias": normal(experts, size),
        "grad": normal(batch, tokens, size),
        "linear_weight": normal(size, size) / size**0.5,
        "linear_bias": normal(size),
    }


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
    compiled: bool = False,
) -> Case:
    """expert_linear: against F.linear and others at one k, with ``compiled`` the compiled reference among
    them; at several, ours at each; note 'compiled': against torch.compile only.
    """
    top_ks = list(top_ks)

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        inputs = linear_inputs(generator, dtype, batch, tokens, size, experts)
        for k in top_ks:
            inputs[f"index{k}"] = random_index(batch, experts, k, generator)
            inputs[f"gate{k}"] = torch.rand(batch, k, generator=generator, device=device)
        return inputs

    exacts: dict[Any, Callable[[Inputs, Outputs], Outputs]] = {}  # one for all that compute the same

    def contender(name: str, function: Callable[..., Tensor], k: int, ours: bool = False, **options: Any):
        def call(function: Callable[..., Tensor], i: Inputs) -> Outputs:
            return (function(i["x"], i["weight"], i["bias"], i[f"index{k}"], i[f"gate{k}"], **options),)

        leaves = ("x", "weight", "bias", f"gate{k}")
        exact = exacts.setdefault((k, *options), lambda i, _: call(reference_linear, i))
        return Contender(name, lambda i: call(function, i), exact, leaves, (f"index{k}",), ours)

    def of_peer(peer: Peer, k: int) -> tuple[Contender, Contender]:
        def metadata(i: Inputs) -> Any:
            return peer.metadata(i[f"index{k}"], experts, tokens)

        def run(i: Inputs, prepared: Any = None) -> Outputs:
            found = metadata(i) if prepared is None else prepared
            return (peer.linear(i["x"], i["weight"], i["bias"], i[f"gate{k}"], found),)

        return with_prepared(
            contender(peer.name, reference_linear, k)._replace(run=run),
            lambda i: peer.ahead(i[f"index{k}"], experts, tokens),
        )

    first = top_ks[0]
    if len(top_ks) > 1:
        contenders = [contender(f"k={k}", expert_linear, k, ours=True) for k in top_ks]
    elif note == COMPILED:
        reference = torch.compile(reference_linear, dynamic=False)
        contenders = [contender(OURS, expert_linear, first, ours=True), contender(COMPILED, reference, first)]
    else:
        run_linear = lambda i: (F.linear(i["x"], i["linear_weight"], i["linear_bias"]),)  # noqa: E731
        leaves = ("x", "linear_weight", "linear_bias")
        contenders = [
            Contender(LINEAR, run_linear, lambda i, _: run_linear(i), leaves, ()),
            contender(OURS, expert_linear, first, ours=True),
            contender(MODULATED, expert_linear, first, ours=True, modulate=True),
            *(c for peer in linear_peers() for c in of_peer(peer, first)),
            *(
                [contender(COMPILED, torch.compile(reference_linear, dynamic=False), first)]
                if compiled
                else []
            ),
        ]
    shape: dict[str, int | str] = {"D": size, "B": batch, "T": tokens, "M": experts}
    shape |= {"k": first} if len(top_ks) == 1 else {}
    flops = 2.0 * batch * tokens * size * size
    seconds = 40.0 if note == COMPILED else 2.0 + len(contenders)
    return Case(
        "expert_linear", shape, dtype, make, contenders, {"out": "grad"}, flops, seconds=seconds, note=note
    )


def stack_case(
    device: str, dtype: torch.dtype, batch: int, tokens: int, size: int, experts: int, top_k: int, depth: int,
    note: str,
) -> Case:  # fmt: skip
    """Layers in a row, each ``x (1 + m(x))``, for growth along an axis; the limit has linear layers for m."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        inputs = {"x": normal(batch, tokens, size), "grad": normal(batch, tokens, size)}
        for layer in layers:
            inputs[f"weight{layer}"] = normal(experts, size, size) * (0.1 / size**0.5)
            inputs[f"bias{layer}"] = normal(experts, size) * 0.1
            inputs[f"linear_weight{layer}"] = normal(size, size) * (0.1 / size**0.5)
            inputs[f"linear_bias{layer}"] = normal(size) * 0.1
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        for layer in layers:
            inputs[f"index{layer}"] = random_index(batch, experts, top_k, generator)
            inputs[f"gate{layer}"] = torch.rand(batch, top_k, generator=generator, device=device)
        return inputs

    layers = range(depth)
    leaves = [f"{name}{layer}" for layer in layers for name in ("weight", "bias", "gate")]
    of_linear = [f"linear_{name}{layer}" for layer in layers for name in ("weight", "bias")]

    def exact(i: Inputs, _: Outputs) -> Outputs:
        return contender("", reference_modulated).run(i)

    def contender(name: str, function: Callable[..., Tensor], ours: bool = False) -> Contender:
        def run(i: Inputs, function: Callable[..., Tensor] = function) -> Outputs:
            r = i["x"]
            for layer in layers:
                r = function(r, *(i[f"{key}{layer}"] for key in ("weight", "bias", "index", "gate")))
            return (r,)

        reads = tuple(f"index{layer}" for layer in layers)
        return Contender(name, run, exact, ("x", *leaves), reads, ours)

    def reference_modulated(*arguments: Tensor) -> Tensor:
        return reference_linear(*arguments, modulate=True)

    def loop(x: Tensor, *arguments: Tensor) -> Tensor:
        return torch.addcmul(x, x, expert_loop(x, *arguments))

    def linear(i: Inputs) -> Outputs:
        r = i["x"]
        for layer in layers:
            r = torch.addcmul(r, r, F.linear(r, i[f"linear_weight{layer}"], i[f"linear_bias{layer}"]))
        return (r,)

    contenders = [
        Contender(LINEAR, linear, lambda i, _: linear(i), ("x", *of_linear), ()),
        contender(OURS, lambda *arguments: expert_linear(*arguments, modulate=True), ours=True),
        contender("expert loop", loop),
    ]
    shape: dict[str, int | str] = {"D": size, "B": batch, "T": tokens, "M": experts, "k": top_k, "L": depth}
    flops = 2.0 * batch * tokens * size * size * depth
    return Case("growth", shape, dtype, make, contenders, {"out": "grad"}, flops, note=note)


def mlp_case(
    device: str,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    size: int,
    experts: int,
    top_k: int,
    gated: bool,
    *,
    bias: bool = True,
) -> Case:
    """expert_mlp with a hidden layer of 4 D against the reference and grouped products.

    SwiGLU without biases has more peers.
    """
    hidden = 4 * size
    width = 2 * hidden if gated else hidden
    of_peers = [GROUPED_MM, *(peer for peer in peers()[0] if peer.mlp is not None)]
    of_peers = [peer for peer in of_peers if not peer.only_swiglu or (gated and not bias)]
    own_layout = [peer for peer in of_peers if peer.only_swiglu]

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
        for peer in own_layout:
            weights = peer.layout(inputs["weight_in"], inputs["weight_out"])
            inputs[f"{peer.name} weight_in"], inputs[f"{peer.name} weight_out"] = weights
        inputs["index"] = random_index(batch, experts, top_k, generator)
        inputs["gate"] = torch.rand(batch, top_k, generator=generator, device=device)
        return inputs

    names = ("weight_in", "bias_in", "weight_out", "bias_out")
    leaves = ("x", *(name for name in names if bias or "bias" not in name), "gate")

    def weights(i: Inputs) -> list[Tensor | None]:
        return [i[name] if name in leaves else None for name in names]

    def contender(name: str, function: Callable[..., Tensor], ours: bool = False) -> Contender:
        def call(function: Callable[..., Tensor], i: Inputs) -> Outputs:
            return (function(i["x"], *weights(i), i["index"], i["gate"], gated),)

        return Contender(name, lambda i: call(function, i), exact, leaves, ("index",), ours)

    def exact(i: Inputs, _: Outputs) -> Outputs:
        return (reference_mlp(i["x"], *weights(i), i["index"], i["gate"], gated),)

    def of_peer(peer: Peer) -> tuple[Contender, Contender]:
        mine = [f"{peer.name} {name}" for name in ("weight_in", "weight_out")] if peer.only_swiglu else []

        def run(i: Inputs, prepared: Any = None) -> Outputs:
            found = peer.metadata(i["index"], experts, tokens) if prepared is None else prepared
            given = [i[mine[0]], None, i[mine[1]], None] if mine else weights(i)
            return (peer.mlp(i["x"], *given, i["gate"], found, gated),)

        def exact(i: Inputs, outputs: Outputs) -> Outputs:
            first, second = (
                peer.restore(i[mine[0]], i[mine[1]]) if mine else (i["weight_in"], i["weight_out"])
            )
            biases = (None, None) if not bias else (i["bias_in"], i["bias_out"])
            return (reference_mlp(i["x"], first, biases[0], second, biases[1], i["index"], i["gate"], gated),)

        line = Contender(peer.name, run, exact, ("x", *mine, "gate") if mine else leaves, ("index",))
        return with_prepared(line, lambda i: peer.ahead(i["index"], experts, tokens))

    contenders = [
        contender(OURS, expert_mlp, ours=True),
        contender("reference", reference_mlp),
        *(c for peer in of_peers for c in of_peer(peer)),
    ]
    shape: dict[str, int | str] = {"D": size, "B": batch, "T": tokens, "M": experts, "k": top_k}
    shape["act"] = ("SwiGLU" if gated else "GELU") + ("" if bias else ", no bias")
    flops = 2.0 * batch * tokens * top_k * size * (width + hidden)
    return Case("expert_mlp", shape, dtype, make, contenders, {"out": "grad"}, flops, seconds=8.0)


def layer_case(
    device: str, dtype: torch.dtype, batch: int, tokens: int, size: int, experts: int = 3, top_k: int = 2
) -> Case:
    """SwitchMoE from the time embedding on: routing and experts, against the layers others make of it.

    The official layer routes all N = 1000 timesteps, which its prior loss needs; "switch_moe + table" does
    that too. Others get their gates from our timestep_gate, which "prepared" ones are given.
    """
    layer = SwitchMoE(size, experts, top_k).to(device)
    stack = Router(1, size, experts, top_k).to(device)

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        inputs = linear_inputs(generator, dtype, batch, tokens, size, experts)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        inputs["time_table"] = normal(TIMESTEPS, size)
        inputs["gate_weight"], inputs["gate_bias"] = normal(experts, size) / size**0.5, normal(experts)
        inputs["t"] = torch.randint(TIMESTEPS, (batch,), generator=generator, device=device)
        _, index, gate = route(inputs)
        return inputs | {"index": index, "gate": gate.detach()}

    def route(i: Inputs, gating: Callable[..., Any] = timestep_gate) -> tuple[Tensor, Tensor, Tensor]:
        found = gating(i["time_table"][i["t"]], i["gate_weight"][None], i["gate_bias"][None], top_k)
        return found[0][0], found[1][0], found[2][0]

    def exact(i: Inputs, _: Outputs) -> Outputs:
        _, index, gate = route(i, reference_gate)
        return (reference_linear(i["x"], i["weight"], i["bias"], index, gate.to(i["time_table"].dtype)),)

    def given_routing(i: Inputs, _: Outputs) -> Outputs:
        return (reference_linear(i["x"], i["weight"], i["bias"], i["index"], i["gate"]),)

    def ours(i: Inputs, with_table: bool) -> Outputs:
        parameters = {
            "router.weight": i["gate_weight"][None], "router.bias": i["gate_bias"][None],
            "weight": i["weight"], "bias": i["bias"],
        }  # fmt: skip
        if with_table:
            routers = {"weight": parameters["router.weight"], "bias": parameters["router.bias"]}
            with torch.no_grad():
                torch.func.functional_call(stack, routers, (i["time_table"],), {"table": True})
        return (torch.func.functional_call(layer, parameters, (i["x"], i["time_table"][i["t"]])),)

    def linear(i: Inputs) -> Outputs:
        return (F.linear(i["x"], i["linear_weight"], i["linear_bias"]),)

    leaves = ("x", "time_table", "gate_weight", "gate_bias", "weight", "bias")
    of_given = ("x", "weight", "bias", "gate")

    def of_peer(peer: Peer) -> tuple[Contender, Contender]:
        def run(i: Inputs) -> Outputs:
            _, index, gate = route(i)
            return (peer.linear(i["x"], i["weight"], i["bias"], gate, peer.metadata(index, experts, tokens)),)

        def run_prepared(i: Inputs, metadata: Any) -> Outputs:
            return (peer.linear(i["x"], i["weight"], i["bias"], i["gate"], metadata),)

        def ahead(i: Inputs) -> Any:
            return peer.ahead(i["index"], experts, tokens)

        routed = Contender(peer.name, run, exact, leaves, ("t",))
        name = f"{peer.name}, prepared"
        return routed, Contender(name, run_prepared, given_routing, of_given, ("index",), prepare=ahead)

    contenders = [
        Contender(LINEAR, linear, lambda i, _: linear(i), ("x", "linear_weight", "linear_bias"), ()),
        Contender(OURS, lambda i: ours(i, False), exact, leaves, ("t",), ours=True),
        Contender(WITH_TABLE, lambda i: ours(i, True), exact, leaves, ("t",), ours=True),
        *(c for peer in linear_peers() for c in of_peer(peer)),
    ]
    if peer_path(OFFICIAL) and dtype == torch.float32:
        official = official_layer(experts, top_k, size)

        def run_official(i: Inputs) -> Outputs:
            return (official(i["x"], *(i[name] for name in ("time_table", "t", *leaves[2:]))),)

        plus_one = lambda i, _: (1 + exact(i, _)[0],)  # noqa: E731
        prepared = of_peer(official_linear())[1]
        contenders += [Contender(OFFICIAL, run_official, plus_one, leaves, ("t",)), prepared]
    shape: dict[str, int | str] = {"D": size, "B": batch, "T": tokens, "M": experts, "k": top_k}
    flops = 2.0 * batch * tokens * size * size
    return Case("layer", shape, dtype, make, contenders, {"out": "grad"}, flops, seconds=10.0)


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

    def each_block(i: Inputs) -> Outputs:
        found = [
            timestep_gate(i["embedding"], i["weight"][j : j + 1], i["bias"][j : j + 1], top_k, selected=True)
            for j in range(depth)
        ]
        probs, index, gate, table = zip(*found, strict=True)
        return torch.cat(probs), torch.cat(gate), torch.cat(index), torch.cat(table, dim=1)

    leaves = ("embedding", "weight", "bias")
    contenders = [
        Contender(OURS, ours, lambda i, _: reference(i), leaves, (), ours=True),
        Contender("reference", reference, lambda i, _: reference(i), leaves, ()),
        Contender(EACH_BLOCK, each_block, lambda i, _: reference(i), leaves, ()),
    ]
    shape: dict[str, int | str] = {"D": size, "L": depth, "N'": rows, "M": experts, "k": top_k}
    outputs = {"probs": "grad_probs", "gate": "grad_gate"}
    flops = 2.0 * rows * size * depth * experts
    return Case("timestep_gate", shape, torch.float32, make, contenders, outputs, flops)


def select_experts(routing: str, depth: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """0/1 ``[1000, depth * experts]``, chosen by routers that are ``fresh`` (the same at all timesteps, as
    untrained ones nearly do), ``smooth`` (the choice moves with the timestep) or ``random``. The time of the
    matching depends on it.
    """
    device = generator.device
    if routing == "smooth":
        frequency = torch.exp(-torch.arange(16, device=device) / 3)
        wave = torch.sin(torch.arange(TIMESTEPS, device=device)[:, None] * frequency)
        logits = (wave @ torch.randn(16, depth * experts, generator=generator, device=device)).view(
            TIMESTEPS, depth, experts
        )
    else:
        rows = 1 if routing == "fresh" else TIMESTEPS
        logits = torch.randn(rows, depth, experts, generator=generator, device=device)
    index = logits.topk(top_k).indices.transpose(0, 1)
    selected = selected_experts(torch.zeros_like(logits).transpose(0, 1), index)
    return selected.expand(TIMESTEPS, -1).contiguous()


def matching_case(
    device: str, depth: int, batch: int, routing: str, *, experts: int = 3, top_k: int = 2, loss: bool = True
) -> Case:
    """Matching of the experts to the prior, and with ``loss`` the prior loss and its gradient.

    The official way builds the ``[N, n, n]`` differences and solves with scipy on the host.
    """
    slots = depth * experts
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

    def outputs(i: Inputs, assignment: Tensor, of: Callable[..., Tensor]) -> Outputs:
        return (of(i, assignment), assignment) if loss else (assignment,)

    def ours(i: Inputs) -> Outputs:
        return outputs(i, prior.match(i["selected"]), lambda i, found: prior.loss(i["probs"], i["t"], found))

    def exact_loss(i: Inputs, assignment: Tensor) -> Tensor:
        target = i["table"][i["t"]][:, assignment] / (depth * top_k)
        return jensen_shannon(i["probs"] / depth, target)

    def exact(i: Inputs, found: Outputs) -> Outputs:
        """NaN unless the assignment has the least cost; of several such ones any is right."""
        best = is_best(official_cost(i["selected"], i["table"]), found[-1])
        assignment = found[-1].clamp(0, slots - 1)
        wrong = torch.full_like(assignment, torch.nan, dtype=torch.float64)
        if loss:
            return (exact_loss(i, assignment) * (1.0 if best else torch.nan),)
        return (assignment if best else wrong,)

    def official(i: Inputs) -> Outputs:
        from scipy.optimize import linear_sum_assignment

        of_model, of_table = (torch.rand(slots).argsort().to(device) for _ in range(2))
        cost = official_cost(i["selected"][:, of_model], i["table"][:, of_table])
        columns = torch.from_numpy(linear_sum_assignment(cost.cpu())[1]).to(device)
        found = torch.empty_like(columns).index_copy_(0, of_model, of_table[columns])
        return outputs(i, found, exact_loss)

    leaves, reads = ("probs",) if loss else (), ("selected", "table", "t")
    contenders = [
        Contender(OURS, ours, exact, leaves, reads, ours=True),
        Contender(OFFICIAL_MATCHING, official, exact, leaves, reads),
    ]
    shape: dict[str, int | str] = {"n": slots, "N": TIMESTEPS, "B": batch} if loss else {"n": slots}
    flops = 2.0 * TIMESTEPS * slots * slots
    name = "matching + prior loss" if loss else "matching"
    compared = {"loss": "grad_loss"} if loss else {"assignment": ""}
    note = f"{routing} routing"
    return Case(
        name, shape, torch.float32, make, contenders, compared, flops, note=note, exact_by_inputs=False
    )


def official_cost(selected: Tensor, table: Tensor) -> Tensor:
    """``sum_t |selected - table|`` of every two columns, added up as the official code does."""
    return (selected[:, :, None] - table[:, None, :]).abs().sum(0)


def is_best(cost: Tensor, column: Tensor) -> bool:
    """Whether ``column`` is a permutation at the least total cost, by scipy."""
    from scipy.optimize import linear_sum_assignment

    cost, column = cost.cpu(), column.cpu()
    rows = torch.arange(len(cost))
    if not torch.equal(column.sort().values, rows):
        return False
    return bool(cost[rows, column].sum() == cost[linear_sum_assignment(cost)].sum())


def assignment_case(device: str, rows: int) -> Case:
    """linear_assignment of random integers up to N against scipy."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        return {"cost": torch.randint(TIMESTEPS, (rows, rows), generator=generator, device=device)}

    def scipy(i: Inputs) -> Outputs:
        from scipy.optimize import linear_sum_assignment

        return (torch.from_numpy(linear_sum_assignment(i["cost"].cpu())[1]).to(device),)

    def exact(i: Inputs, found: Outputs) -> Outputs:
        wrong = torch.full_like(found[0], torch.nan, dtype=torch.float64)
        return (found[0] if is_best(i["cost"], found[0]) else wrong,)

    contenders = [
        Contender(OURS, lambda i: (linear_assignment(i["cost"]),), exact, (), ("cost",), ours=True),
        Contender("scipy", scipy, exact, (), ("cost",)),
    ]
    outputs = {"assignment": ""}
    shape: dict[str, int | str] = {"n": rows}
    return Case(
        "linear_assignment", shape, torch.float32, make, contenders, outputs, 0.0, exact_by_inputs=False
    )


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
