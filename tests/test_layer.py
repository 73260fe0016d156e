"""SwitchMoE and route."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, assert_error_rule

from switch_moe import Router, SwitchMoE
from switch_moe.ops import expert_linear, expert_mlp

KINDS = [
    {"expert": "linear"},
    {"expert": "mlp", "expert_hidden_size": 24},
    {"expert": "swiglu", "bias": False},
]


def make(**settings) -> SwitchMoE:
    torch.manual_seed(0)
    layer = SwitchMoE(16, **settings)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("settings", KINDS)
def test_fresh_layer_is_the_identity_in_its_block(settings: dict) -> None:
    layer, x, e = SwitchMoE(16, **settings), torch.randn(2, 5, 16), torch.randn(2, 16)
    assert layer(x, e).count_nonzero() == 0
    assert torch.equal(layer(x, e, modulate=True), x)
    layer(x, e).sum().backward()  # yet the experts can start to learn
    output_weight = layer.weight if settings["expert"] == "linear" else layer.weight_out
    assert output_weight.grad.count_nonzero() > 0


def test_all_tokens_of_a_sample_take_the_same_experts() -> None:
    layer, e = make(num_experts=4, top_k=2), torch.randn(2, 16)
    x = torch.randn(2, 5, 16)
    changed = x.clone()
    changed[:, 2] *= -3
    out, out_changed = layer(x, e), layer(changed, e)
    others = [0, 1, 3, 4]
    assert_close("other tokens", out_changed[:, others], out[:, others], 1e-6)
    bias = layer(torch.zeros_like(x), e)[:, 2]  # with the same experts and gates the layer is affine
    assert_close("changed token", out_changed[:, 2] - bias, -3 * (out[:, 2] - bias), 1e-5)


@pytest.mark.parametrize("settings", KINDS)
def test_each_sample_by_hand(settings: dict) -> None:
    layer, x, e = make(num_experts=4, top_k=2, **settings), torch.randn(3, 5, 16), torch.randn(3, 16)
    probs = torch.softmax(torch.nn.functional.silu(e) @ layer.router.weight[0].t() + layer.router.bias, -1)
    expected = torch.zeros_like(x)
    for b in range(3):
        for expert in probs[b].topk(2).indices.tolist():
            if layer.expert == "linear":
                y = x[b] @ layer.weight[expert] + layer.bias[expert]
            else:
                h = x[b] @ layer.weight_in[expert]
                if layer.expert == "mlp":
                    h = torch.nn.functional.gelu(h + layer.bias_in[expert], approximate="tanh")
                else:
                    h = torch.nn.functional.silu(h[:, :64]) * h[:, 64:]
                y = h @ layer.weight_out[expert]
                y = y if layer.bias_out is None else y + layer.bias_out[expert]
            expected[b] += probs[b, expert] * y
    assert_close("m(x)", layer(x, e), expected, 1e-5)
    assert_close("x (1 + m(x))", layer(x, e, modulate=True), x * (1 + expected), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", KINDS)
def test_kernels_in_bfloat16(settings: dict, device: str) -> None:
    """Output and every gradient under autocast, with Triton's kernels, on a GPU where there is one."""
    torch.manual_seed(0)
    x, e, grad = (torch.randn(size).to(device) for size in ((16, 40, 16), (16, 16), (16, 40, 16)))

    def run(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        layer = make(num_experts=4, top_k=2, backend=backend, **settings).to(device, dtype)
        leaves = {"x": x.to(dtype), "e": e.to(dtype), **dict(layer.named_parameters())}
        with torch.autocast(device, torch.bfloat16, enabled=dtype != torch.float64):
            out = layer(leaves["x"].requires_grad_(), leaves["e"].requires_grad_())
        grads = torch.autograd.grad(out, leaves.values(), grad.to(out.dtype))
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    actual, same_type = (run(backend, torch.float32) for backend in ("triton", "reference"))
    assert actual["out"].dtype == torch.bfloat16
    for name, exact in run("reference", torch.float64).items():
        if name == "router.bias":
            continue  # the errors of four numbers may be small by chance
        assert_error_rule(name, actual[name], exact, same_type[name], torch.bfloat16)


def test_one_router_for_all_layers() -> None:
    """Router holds what the layers would hold, and routes as they would."""
    layers = [make(num_experts=4) for _ in range(3)]
    router = Router(depth=3, hidden_size=16, num_experts=4, top_k=2)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            torch.nn.init.normal_(layer.router.weight)
            router.weight[i], router.bias[i] = layer.router.weight[0], layer.router.bias[0]
    e, x = torch.randn(5, 16, requires_grad=True), torch.randn(5, 3, 16)
    routing = router(e)
    assert routing.probs.shape == (3, 5, 4)
    assert routing.selected().shape == (5, 12)
    assert (routing.selected().sum(1) == 6).all()
    with torch.no_grad():
        asked = router(e, selected=True)
        assert torch.equal(asked.kept[0], routing.selected())
        other = asked._replace(expert_index=(asked.expert_index + 1) % 4)  # what was kept is not of these
        assert torch.equal(other.selected(), routing._replace(expert_index=other.expert_index).selected())
    for i, layer in enumerate(layers):
        bare = SwitchMoE(16, 4, router=False)
        assert {name for name, _ in bare.named_parameters()} == {"weight", "bias"}
        bare.load_state_dict(layer.state_dict(), strict=False)
        assert_close(f"block {i}", bare(x, routing=routing.block(i)), layer(x, e), 1e-6)
    with pytest.raises(ValueError, match=r"the layer has no router \(router=False\); pass routing"):
        bare(x, e)


@pytest.mark.parametrize("settings", [*KINDS, {"expert": "linear", "backend": "reference"}])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph_trains(settings: dict, autocast: bool) -> None:
    layer = make(**settings)
    twin = copy.deepcopy(layer)
    x, e = torch.randn(4, 40, 16), torch.randn(4, 16)

    def loss(module, compiled: bool):
        def forward(x, e):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return module(x, e, modulate=True)

        return (
            (torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward)(x, e)
            .float()
            .square()
            .mean()
        )

    loss(layer, True).backward()
    loss(twin, False).backward()
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert_close(name, a.grad, b.grad, 2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("settings", [*KINDS, {"expert": "linear", "backend": "reference"}])
def test_gradients_repeat_bit_for_bit(settings: dict) -> None:
    """On two threads, where sums of a gradient could meet in any order."""
    torch.manual_seed(0)
    layer = SwitchMoE(64, num_experts=3, **settings)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, e, threads = torch.randn(32, 48, 64, requires_grad=True), torch.randn(32, 64), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [torch.autograd.grad(layer(x, e).square().sum(), [x, *layer.parameters()]) for _ in range(8)]
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_training_with_the_kernels_equals_training_with_the_reference() -> None:
    """Forty AdamW steps on a regression target, native against reference: the same losses."""
    losses = {}
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        layer = SwitchMoE(32, num_experts=4, top_k=2, backend=backend)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        x, e, target = torch.randn(8, 40, 32), torch.randn(8, 32), torch.randn(8, 40, 32)
        losses[backend] = []
        for _ in range(40):
            loss = (layer(x, e, modulate=True) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.detach())
    assert_close("losses", torch.stack(losses["native"]), torch.stack(losses["reference"]), 1e-5)
    assert losses["native"][-1] < 0.8 * losses["native"][0]


def test_mlp_reference_with_one_linear_layer_folded_in() -> None:
    """With an identity input layer kept in GELU's linear range, the MLP experts are linear experts."""
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    index, gate = torch.tensor([[0], [1]]), torch.rand(2, 1, dtype=torch.float64)
    shift = torch.full((2, 4), 50.0, dtype=torch.float64)  # gelu(x + 50) = x + 50
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    out = torch.randn(2, 4, 4, dtype=torch.float64)
    undo = -(shift[:, None] @ out)[:, 0]
    actual = expert_mlp(x, eye, shift, out, undo, index, gate, gated=False)
    assert_close("linear", actual, expert_linear(x, out, None, index, gate), 1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 4}, "top_k is 4; it must be between 1 and the number of experts, 3"),
        ({"expert": "conv"}, "expert is 'conv'; it must be one of linear, mlp, swiglu"),
        ({"expert_hidden_size": 8}, "expert_hidden_size is 8; linear experts have no hidden layer"),
        ({"expert": "mlp", "expert_hidden_size": -1}, "expert_hidden_size is -1"),
        ({"backend": "magic"}, "backend is 'magic'"),
        ({"expert": "mlp", "backend": "native"}, "mlp experts have no compiled CPU kernels"),
    ],
)
def test_settings_errors(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwitchMoE(**{"hidden_size": 16, **settings})


def test_forward_errors() -> None:
    layer, x, e = SwitchMoE(16), torch.zeros(2, 3, 16), torch.zeros(2, 16)
    with pytest.raises(ValueError, match="neither given"):
        layer(x)
    with pytest.raises(ValueError, match="both given"):
        layer(x, e, routing=layer.route(e))
    with pytest.raises(ValueError, match=r"time_embedding has shape \(3, 16\); it must be \[2, 16\]"):
        layer(x, torch.zeros(3, 16))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 8\); it must be \[B, T, 16\]"):
        layer(torch.zeros(2, 3, 8), e)
    with pytest.raises(ValueError, match="depth is 0; it must be at least 1"):
        Router(0, 16)
    with pytest.raises(ValueError, match="top_k is 4; it must be between 1 and the number of experts, 3"):
        Router(2, 16, 3, 4)
    with pytest.raises(ValueError, match="backend is 'cudnn'; it must be one of auto, reference"):
        Router(2, 16, backend="cudnn")
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3, 16\); it must be \[L, M, 8\]"):
        Router(2, 16)(torch.zeros(2, 8))
