"""routed_mlp as a layer of DiT-MoE, whose tokens choose experts, and of EC-DIT, whose experts choose."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import routed_baselines
from benchmarks.case import SWITCH_MOE, Case, Contender, Inputs, Outputs
from switch_moe import Routes
from switch_moe.ops import routed_mlp

SHARED = ("shared weight_in", "shared weight_out")
WEIGHTS = ("weight_in", "bias_in", "weight_out", "bias_out")
# M, k and H of LingBot-Video, whose two products, forward alone, take 531 and 283 us on an H100 in SGLang's
# fused experts (sgl-project/sglang pull request 36543), for 5,034 tokens of 2,048 channels in bfloat16.
BAR = 128, 8, 768


def cases(device: str, quick: bool) -> Iterator[Case]:
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    samples = 2 if quick else 128 if device == "cuda" else 16
    for dtype in dtypes[:1] if quick else dtypes:
        for experts_choose in (False,) if quick else (False, True):
            yield routed_case(device, dtype, samples, 256, 384, experts_choose=experts_choose)
    if device == "cuda" and not quick:
        yield routed_case(device, torch.bfloat16, 1, 5034, 2048, *BAR, experts_choose=False, shared=False)


def test_routed_mlp(bench, case, which) -> None:
    bench.measure(case, which)


def routed_case(
    device: str, dtype: torch.dtype, samples: int, tokens: int, size: int, experts: int = 8, top_k: int = 2,
    hidden: int = 0, *, experts_choose: bool, shared: bool = True,
) -> Case:  # fmt: skip
    """One layer: SwiGLU and a shared expert of half the width (DiT-MoE), or GELU and biases (EC-DIT)."""
    rows, hidden, gated = samples * tokens, hidden or 4 * size, not experts_choose
    shared = shared and gated
    width, chosen = 2 * hidden if gated else hidden, tokens * top_k // experts
    names = WEIGHTS if experts_choose else ("weight_in", "weight_out", *(SHARED if shared else ()))

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {
            "x": (rows, size), "weight_in": (experts, size, width), "bias_in": (experts, width),
            "weight_out": (experts, hidden, size), "bias_out": (experts, size), "grad": (rows, size),
            SHARED[0]: (1, size, 4 * size), SHARED[1]: (1, 2 * size, size),
        }  # fmt: skip
        inputs = {n: torch.randn(s, generator=generator, device=device) for n, s in shapes.items()}
        inputs |= {n: t / t.shape[1] ** 0.5 for n, t in inputs.items() if "weight" in n}
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        scores = torch.randn(rows, experts, generator=generator, device=device).softmax(-1)
        if experts_choose:
            gate, index = scores.view(samples, tokens, experts).topk(chosen, dim=1)  # [samples, chosen, M]
            index = index + tokens * torch.arange(samples, device=device)[:, None, None]
            gate, index = (t.permute(2, 0, 1).flatten(1).contiguous() for t in (gate, index))  # [M, C]
        else:
            gate, index = scores.topk(top_k)
        own = {name: tensor for e in range(experts) for name, tensor in official(inputs, e).items()}
        return {**inputs, **own, "gate": gate, "index": index}

    def official(i: Inputs, e: int) -> Inputs:
        """The weights of one expert as the layers of the official code hold them."""
        of_in, of_out = i["weight_in"][e].t(), i["weight_out"][e].t()
        if experts_choose:
            found = {
                "weight in": of_in,
                "bias in": i["bias_in"][e],
                "weight out": of_out,
                "bias out": i["bias_out"][e],
            }
        else:
            first, second = of_in.chunk(2)
            found = {"weight first": first, "weight second": second, "weight down": of_out}
        return {
            f"{name} {e}": tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in found.items()
        }

    def shared_weights(i: Inputs) -> list[Tensor]:
        """Those of the shared expert as nn.Linear has them."""
        of_in, of_out = (i[name][0].t() for name in SHARED)
        return [*of_in.chunk(2), of_out]

    def run(i: Inputs, **options: str) -> Outputs:
        x, base = i["x"], None
        if experts_choose:
            routes = Routes.of_experts(i["index"], i["gate"], rows)
        else:
            routes = Routes.of_rows(i["index"], i["gate"], experts)
            if shared:
                weight_in, weight_out = (i[name] for name in SHARED)
                base = routed_mlp(x, weight_in, None, weight_out, None, Routes.to_one(x), "swiglu", **options)
        weights = [i[name] if name in names else None for name in WEIGHTS]
        return (routed_mlp(x, *weights, routes, "swiglu" if gated else "gelu", base=base, **options),)

    def run_official(i: Inputs) -> Outputs:
        own = [[i[name] for name in given] for given in own_names]
        if experts_choose:
            return (routed_baselines.ec_dit(i["x"], own, i["index"], i["gate"]),)
        out = routed_baselines.dit_moe(i["x"], own, i["index"], i["gate"])
        return (out + routed_baselines.swiglu(i["x"], *shared_weights(i)) if shared else out,)

    def run_grouped(i: Inputs) -> Outputs:
        if experts_choose:
            row, gate = i["index"].flatten(), i["gate"].flatten()
            expert = torch.arange(experts, device=device).repeat_interleave(i["index"].shape[1])
        else:
            expert, pair = i["index"].flatten().sort(stable=True)
            row, gate = pair // top_k, i["gate"].flatten()[pair]
        ends = torch.searchsorted(expert, torch.arange(experts, device=device), right=True, out_int32=True)
        weights = [i[name] if name in names else None for name in WEIGHTS]
        out = routed_baselines.grouped(i["x"], *weights, row, expert, ends, gate)
        if shared:
            out = out + routed_baselines.swiglu(i["x"], *shared_weights(i))
        return (out,)

    def exact(i: Inputs, _: Outputs) -> Outputs:
        return run(i, backend="reference")

    def exact_of_own(i: Inputs, _: Outputs) -> Outputs:
        own = [[i[name] for name in given] for given in own_names]
        if experts_choose:
            of_in, b_in, of_out, b_out = (torch.stack(same) for same in zip(*own, strict=True))
            return run(
                {**i, "weight_in": of_in.mT, "bias_in": b_in, "weight_out": of_out.mT, "bias_out": b_out},
                backend="reference",
            )
        first, second, down = (torch.stack(same) for same in zip(*own, strict=True))
        return run(
            {**i, "weight_in": torch.cat([first, second], 1).mT, "weight_out": down.mT}, backend="reference"
        )

    kinds = (
        ("weight in", "bias in", "weight out", "bias out")
        if experts_choose
        else ("weight first", "weight second", "weight down")
    )
    own_names = [[f"{kind} {e}" for kind in kinds] for e in range(experts)]
    official_leaves = (
        "x",
        *(name for given in own_names for name in given),
        *names[2 if gated else 4 :],
        "gate",
    )
    leaves = ("x", *names, "gate")
    contenders = [
        Contender(SWITCH_MOE, run, exact, leaves, ("index",), True),
        Contender("official structure", run_official, exact_of_own, official_leaves, ("index",)),
        Contender("grouped_mm", run_grouped, exact, leaves, ("index",)),
    ]
    shape: dict[str, int | str] = {
        "D": size,
        "B": samples,
        "T": tokens,
        "M": experts,
        "k": top_k,
        "H": hidden,
    }
    shape["layer"] = "EC-DIT" if experts_choose else "DiT-MoE"
    return Case("routed_mlp", shape, dtype, make, contenders, {"out": "grad"})
