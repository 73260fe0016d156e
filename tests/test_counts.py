"""What a step costs whatever the machine: FLOPs, bytes, operators, launches, host waits, graph breaks.

A slower design fails here without a GPU and without a clock. Numbers are exact where torch leaves no choice
and bounds where an improvement is welcome. Registers and spills are in test_compiled_kernels.py.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import count_merges
from switch_dit import GaussianDiffusion, SwitchDiT
from test_no_host_wait import as_on_a_gpu  # noqa: F401  a fixture
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counts, kernel_calls
from benchmarks.baselines import expert_loop, grouped_linear
from switch_moe import Routing, SwitchMoE, native, ops
from switch_moe.cpu import expert_linear as cpu
from switch_moe.experts import schedule_size

B, T, D = 4, 64, 128
UNIT = 2 * B * T * D * D  # FLOPs of nn.Linear
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(3, 1), (3, 2), (3, 3), (8, 1), (8, 2), (8, 3)]  # M, k
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

Inputs = tuple[SwitchMoE, Tensor, Tensor, Tensor]


def make(
    experts: int, top_k: int, dtype: torch.dtype = torch.float32, batch: int = B, tokens: int = T
) -> Inputs:
    """A layer with experts in ``dtype``, tokens, time embeddings and the gradient of the output."""
    torch.manual_seed(0)
    layer = SwitchMoE(D, experts, top_k)
    layer.weight.data, layer.bias.data = torch.randn(experts, D, D).to(dtype), layer.bias.data.to(dtype)
    x = torch.randn(batch, tokens, D).to(dtype).requires_grad_()
    return layer, x, torch.randn(batch, D, requires_grad=True), torch.randn(batch, tokens, D).to(dtype)


def train(inputs: Inputs, modulate: bool = False) -> Callable[[], Any]:
    """Forward and backward with respect to everything."""
    layer, x, e, grad = inputs
    leaves = [x, e, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x, e, modulate=modulate), leaves, grad)


def small_dit(routing: str, depth: int) -> SwitchDiT:
    torch.manual_seed(0)
    return SwitchDiT(8, 2, 1, hidden_size=32, depth=depth, num_heads=2, num_classes=3, routing=routing)


def train_dit(model: SwitchDiT, device: str = "cpu") -> Callable[[], None]:
    """Noising, forward, losses and backward of a training step of 4 samples, 16 tokens each."""
    diffusion = GaussianDiffusion("linear")
    x, noise = (torch.randn(4, 1, 8, 8, device=device) for _ in range(2))
    t, y = torch.randint(1000, (4,), device=device), torch.randint(3, (4,), device=device)

    def step() -> None:
        x_t = diffusion.q_sample(x, t, noise)
        out, prior = model.forward_with_prior(x_t, t, y)
        losses = diffusion.training_losses(out, x, x_t, t, noise)
        (losses["mse"].mean() + losses["vb"].mean() + prior).backward()
        model.zero_grad()

    step()  # tables move to the device once
    return step


def of_a_block(count: Callable[[SwitchDiT], int], routing: str) -> int:
    """What one more block adds to a model."""
    return count(small_dit(routing, 4)) - count(small_dit(routing, 3))


def over_dense(count: Callable[[SwitchDiT], int]) -> int:
    """What the mixture adds to a block."""
    return of_a_block(count, "switch") - of_a_block(count, "none")


def once_over_dense(count: Callable[[SwitchDiT], int]) -> int:
    """What the mixtures add to a model apart from its blocks."""
    switch, dense = (count(small_dit(routing, 4)) for routing in ("switch", "none"))
    return switch - dense - 4 * over_dense(count)


def operators_of(model: SwitchDiT, device: str = "cpu") -> int:
    """How many operators a training step calls."""
    return len(counts.operators(train_dit(model.to(device), device)))


class TestFlops:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("experts", "top_k"), SHAPES)
    def test_of_the_layer(self, experts: int, top_k: int, dtype: torch.dtype) -> None:
        inputs = make(experts, top_k, dtype)
        layer, x, e, _ = inputs
        routing = layer.route(e)
        assert counts.product_flops(lambda: layer(x, routing=routing)) == UNIT  # whatever k and M
        # The router is three products of 2 B M D, the gradient of the gates through the bias is one.
        small = 4 * 2 * B * experts * D
        for modulate in (False, True):
            assert counts.product_flops(train(inputs, modulate)) == 3 * UNIT + small

    @pytest.mark.parametrize(("experts", "top_k"), SHAPES)
    def test_of_the_loop_are_k_times_as_many(self, experts: int, top_k: int) -> None:
        """The premise of the comparison with it."""
        layer, x, e, grad = make(experts, top_k)
        routing = layer.route(e)
        index, gate = routing.expert_index, routing.expert_gate.detach()
        leaves = [x, layer.weight, layer.bias]
        loop = counts.product_flops(
            lambda: torch.autograd.grad(expert_loop(*leaves, index, gate), leaves, grad)
        )
        assert loop == 3 * top_k * UNIT

    @torch.no_grad()
    @pytest.mark.parametrize("routes", [1, 2, B])
    def test_samples_of_a_timestep_share_a_merged_weight(
        self, routes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer, x, e, _ = make(3, 2)
        merged = count_merges(monkeypatch)
        routing = layer.route(e[:routes].repeat_interleave(B // routes, 0))
        assert counts.product_flops(lambda: layer(x, routing=routing)) == UNIT
        merged.clear()
        layer(x, routing=routing)
        assert merged == [routes]

    def test_of_a_block_over_dense(self) -> None:
        """Three units, the gates' gradient through the bias, routers of the batch and of all timesteps."""
        added = over_dense(lambda model: counts.product_flops(train_dit(model)))
        batch, tokens, size, experts = 4, 16, 32, 3
        small = 4 * 2 * batch * experts * size + 2 * 1000 * experts * size
        assert added == 3 * 2 * batch * tokens * size * size + small

    @pytest.mark.parametrize("tokens", [T, 2])
    @pytest.mark.parametrize(("experts", "top_k"), SHAPES)
    def test_torch_counts_the_same(self, experts: int, top_k: int, tokens: int) -> None:
        """FlopCounterMode, by the formulas of the operators; few tokens are grouped by expert."""
        layer, x, e, grad = make(experts, top_k, tokens=tokens)
        for step in (
            lambda: layer(x, e),
            lambda: layer(x, e).backward(grad),
            lambda: layer(x, e, modulate=True).backward(grad),
            lambda: layer(x.detach(), e).backward(grad),
        ):
            with FlopCounterMode(display=False) as counter:
                step()
            assert counter.get_total_flops() == counts.product_flops(step) > 0

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 17])
    @pytest.mark.parametrize("routes", [1, 8])
    def test_torch_counts_the_algorithm_that_runs(self, routes: int, tokens: int, dtype: torch.dtype) -> None:
        """Samples of one timestep share a merged weight, and float16 is computed in float32."""
        layer, x, e, _ = make(3, 2, dtype, batch=32, tokens=tokens)
        routing = layer.route(e[:routes].repeat_interleave(32 // routes, 0))
        with FlopCounterMode(display=False) as counter:
            layer(x, routing=routing)
        assert counter.get_total_flops() == counts.product_flops(lambda: layer(x, routing=routing))

    @pytest.mark.parametrize("experts", [3, 8])
    def test_of_the_kernels_by_the_formulas(self, experts: int) -> None:
        """One unit each for out, dx and dW, or for dW of many experts one for each pair."""
        layer, x, e, grad = make(experts, 2, batch=1, tokens=16)
        routing = layer.route(e.detach())
        unit = 2 * 16 * D * D
        with FlopCounterMode(display=False) as counter:
            out = ops.expert_linear(
                x, layer.weight, layer.bias, routing.expert_index, routing.expert_gate, backend="triton"
            )
            torch.autograd.grad(out, [x, layer.weight], grad)
        assert counter.get_total_flops() == unit * (3 if experts <= 4 else 4)
        weights = torch.randn(3, D, 24), None, torch.randn(3, 24, D), None
        leaves = [x, weights[0].requires_grad_(), weights[2].requires_grad_()]
        with FlopCounterMode(display=False) as counter:
            out = ops.expert_mlp(x, *weights, routing.expert_index % 3, routing.expert_gate, backend="triton")
            torch.autograd.grad(out, leaves, grad)
        assert counter.get_total_flops() == 3 * 2 * 2 * (2 * 16 * D * 24)  # two layers, two experts

    def test_a_layer_of_k_products_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "merging_pays", lambda *_: False)
        layer, x, e, _ = make(3, 2)
        routing = layer.route(e)
        assert counts.product_flops(lambda: layer(x, routing=routing)) >= 2 * UNIT


class TestSavedBytes:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("experts", "top_k"), SHAPES)
    def test_of_the_layer_and_of_others(self, experts: int, top_k: int, dtype: torch.dtype) -> None:
        layer, x, e, _ = make(experts, top_k, dtype)
        routing = layer.route(e)
        arguments = x, layer.weight, layer.bias, routing.expert_index, routing.expert_gate
        parameters = list(layer.parameters())

        def saved(step: Callable[[], Any]) -> int:
            return counts.saved_bytes(step, parameters)

        index_and_gate = 8 * B * top_k
        router = 4 * B * (D + experts)  # the embedding and the probabilities
        assert saved(lambda: layer(x, routing=routing)) == x.nbytes + index_and_gate
        assert saved(lambda: layer(x, e)) == x.nbytes + index_and_gate + router
        assert saved(lambda: layer(x, routing=routing, modulate=True)) == 2 * x.nbytes + index_and_gate
        # Rows and outputs of k experts, then with the loop those times their gates; and where they belong.
        entry = x.element_size() + 8  # gate and sample
        loop, grouped = saved(lambda: expert_loop(*arguments)), saved(lambda: grouped_linear(*arguments))
        assert loop == 3 * top_k * x.nbytes + (entry + 8) * B * top_k
        assert grouped == 2 * top_k * x.nbytes + (entry + 16) * B * top_k + 4 * experts
        assert x.nbytes + index_and_gate < grouped < loop

    def test_of_a_block_over_dense(self) -> None:
        x, t, y = torch.randn(4, 1, 8, 8), torch.randint(1000, (4,)), torch.randint(3, (4,))

        def saved(model: SwitchDiT) -> int:
            return counts.saved_bytes(lambda: model.forward_with_prior(x, t, y), model.parameters())

        batch, tokens, size, experts, top_k = 4, 16, 32, 3, 2
        # x and m; index and gate; probabilities, and what the prior loss in plain PyTorch keeps of them.
        routing = batch * (8 * top_k + 4 * experts * (1 + 5))
        assert over_dense(saved) <= 2 * 4 * batch * tokens * size + routing

    def test_a_copy_for_each_expert_is_seen(self) -> None:
        layer, x, *_ = make(3, 2)
        kept = counts.saved_bytes(lambda: x.repeat(3, 1, 1) @ layer.weight[0], layer.parameters())
        assert kept == 3 * x.nbytes


class TestPeakBytes:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("modulate", [False, True])
    @pytest.mark.parametrize(("experts", "top_k"), SHAPES)
    def test_of_the_layer(self, experts: int, top_k: int, modulate: bool, dtype: torch.dtype) -> None:
        arguments = experts, top_k, modulate, dtype, 8
        assert self.peak(*arguments) <= self.bound(*arguments)

    @pytest.mark.parametrize("rounds_of", [2, 3])
    @pytest.mark.parametrize("fused", [False, True])
    def test_in_rounds(self, fused: bool, rounds_of: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A large layer works on a few samples at a time; it then carries dW in float32."""
        assert cpu.WORKSPACE_BYTES <= 48 << 20
        width = cpu.vector_width(torch.bfloat16) if fused else 0
        if fused and not width:
            pytest.skip("this processor merges bfloat16 experts apart from the product")
        monkeypatch.setattr(cpu, "vector_width", lambda dtype: width)
        monkeypatch.setattr(cpu, "WORKSPACE_BYTES", rounds_of * self.workspace(256, 3, torch.bfloat16, width))
        arguments = 3, 2, True, torch.bfloat16, rounds_of
        assert self.peak(*arguments) <= self.bound(*arguments)

    @staticmethod
    def peak(experts: int, top_k: int, modulate: bool, dtype: torch.dtype, _: int) -> int:
        layer, x, e, grad = make(experts, top_k, dtype, batch=8, tokens=256)
        found = layer.route(e.detach())
        gate = found.expert_gate.detach().requires_grad_()
        routing = Routing(found.probs.detach(), found.expert_index, gate)
        leaves = [x, layer.weight, layer.bias, gate]
        return counts.peak_bytes(
            lambda: torch.autograd.grad(layer(x, routing=routing, modulate=modulate), leaves, grad)
        )

    @staticmethod
    def workspace(tokens: int, experts: int, dtype: torch.dtype, width: int) -> int:
        """For each sample: x and dm in the order of the product's tiles, whose edges are padded; or where
        experts merge apart, their sum.
        """
        if not width:
            return D * D * dtype.itemsize
        size: int = native.cpu.require().fused_product_workspace(
            tokens, experts, D, D, cpu.DTYPE_CODE[dtype], width
        )
        return size

    @staticmethod
    def bound(experts: int, top_k: int, modulate: bool, dtype: torch.dtype, rounds_of: int) -> int:
        batch, tokens, size = 8, 256, dtype.itemsize
        x, weight = batch * tokens * D * size, D * D * size
        held = 2 * x + experts * weight  # m, dx, dW
        held += min(batch, rounds_of) * TestPeakBytes.workspace(
            tokens, experts, dtype, cpu.vector_width(dtype)
        )
        held += 2 * x if modulate else 0  # x (1 + m) beside m; dm
        held += 4 * batch * top_k  # gradients of the gates
        carry = experts * D * D * 4 if rounds_of < batch else 0
        # The sum of dm over tokens, in float32 from copies of a few samples; that times each gate; db, in
        # float32 first.
        copies = 4 * batch * D + min(cpu._SUM_BYTES, 4 * batch * tokens * D)
        sums = 4 * batch * D + (copies if dtype != torch.float32 else 0)
        sums += 4 * batch * top_k * D + experts * D * (4 + (size if size < 4 else 0))
        sums += 4 * batch * experts + 12 * batch * top_k  # the gates' gradient, of all experts first
        return held + max(carry, sums)

    def test_one_more_copy_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "backward", self.with_a_copy(cpu.backward))
        arguments = 3, 2, False, torch.float32, 8
        assert self.peak(*arguments) > self.bound(*arguments)

    @staticmethod
    def with_a_copy(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(grad: Tensor, x: Tensor, *rest: Any) -> Any:
            return function(grad.clone(), x.clone(), *rest)

        return call

    def test_what_is_freed_again_is_seen(self) -> None:
        x = torch.ones(1000)
        assert counts.peak_bytes(lambda: x.exp()) == 4000
        assert counts.peak_bytes(lambda: x.exp().exp()) == 8000
        assert counts.peak_bytes(lambda: x.exp().exp().exp().exp()) == 8000


class TestOperators:
    def test_of_the_layer(self) -> None:
        inputs = make(3, 2)
        layer, x, e, _ = inputs
        routing = layer.route(e)
        forward = ["switch_moe::timestep_gate", "switch_moe::expert_linear"]
        for modulate in (False, True):
            assert counts.operators(lambda m=modulate: layer(x, routing=routing, modulate=m)) == forward[1:]
            assert counts.operators(lambda m=modulate: layer(x, e, modulate=m)) == forward
            # select_backward: of the block's gates among those of all
            backward = ["switch_moe::expert_linear_backward", "aten::select_backward"]
            backward.append("switch_moe::timestep_gate_backward")
            assert counts.operators(train(inputs, modulate)) == forward + backward

    def test_of_a_block_over_dense(self) -> None:
        """The two of the experts."""
        assert over_dense(operators_of) == 2

    def test_of_a_training_step_over_dense(self) -> None:
        """Routing, matching and prior loss, whatever the number of blocks."""
        assert once_over_dense(operators_of) <= 64  # six look at timesteps, columns and table

    def test_one_more_is_seen(self) -> None:
        layer, x, e, _ = make(3, 2)
        before = counts.operators(lambda: layer(x, e))
        assert counts.operators(lambda: layer(x, e) + 0) == [*before, "aten::add.Tensor"]


@pytest.mark.usefixtures("as_on_a_gpu")
class TestOnMeta:
    """The choices that CUDA tensors get."""

    def test_nothing_waits_for_the_host(self) -> None:
        for routing in ("switch", "none"):
            assert counts.host_waits(train_dit(small_dit(routing, 2).to("meta"), "meta")) == 0

    def test_operators_over_dense(self) -> None:
        def count(model: SwitchDiT) -> int:
            return operators_of(model, "meta")

        assert over_dense(count) <= 3  # a schedule of its own where none is given
        assert once_over_dense(count) <= 31


def test_waits_are_seen() -> None:
    layer, x, e, _ = make(3, 2)
    routing = layer.route(e)
    arguments = x, layer.weight, layer.bias, routing.expert_index, routing.expert_gate
    assert (
        counts.host_waits(lambda: expert_loop(*arguments)) == 1
    )  # it must know how many rows each expert has
    assert counts.host_waits(lambda: grouped_linear(*arguments)) == 0
    assert counts.host_waits(lambda: (x > 0).nonzero() + int(e.sum())) == 2


@needs_triton
class TestLaunches:
    """What the Triton kernels start and touch, on sm_90 in bfloat16."""

    @staticmethod
    def of(operation: str, *shape: Any) -> list[counts.Launch]:
        call = getattr(kernel_calls, operation)
        return counts.triton_launches(lambda: call(torch.bfloat16, *shape))

    @classmethod
    def names(cls, operation: str, *shape: Any) -> list[str]:
        return [
            launch.kernel.split(".")[1].strip("_").removesuffix("_kernel")
            for launch in cls.of(operation, *shape)
        ]

    @pytest.mark.parametrize("experts", [3, 4, 8, 16])
    @pytest.mark.parametrize("size", [384, 768, 1024, 1152])
    def test_expert_linear(self, size: int, experts: int) -> None:
        backward = ["grad_x", "grad_weights" if experts <= 4 else "grad_each_weight", "sum"]
        for top_k, modulate in itertools.product(range(1, min(4, experts) + 1), (False, True)):
            shape = 128, 256, size, experts, top_k, modulate
            assert self.names("expert_linear", *shape, False) == ["dispatch", "forward"]
            assert self.names("expert_linear", *shape, True) == ["dispatch", "forward", *backward]

    @pytest.mark.parametrize("top_k", [1, 2, 3, 4])
    @pytest.mark.parametrize("gated", [False, True])
    def test_expert_mlp(self, gated: bool, top_k: int) -> None:
        forward = ["dispatch", "hidden", "mixture"]
        backward = ["hidden_grad", "mixture", *["weight_grad"] * 2, *["bias_grad"] * 2]
        assert self.names("expert_mlp", 128, 256, 384, 8, top_k, gated) == [*forward, *backward, "sum"]

    @pytest.mark.parametrize("activation", ["relu", "swiglu"])
    def test_routed_mlp(self, activation: str) -> None:
        product = ["product", "combine"]
        backward = ["hidden_grad", *product, *["weight_grad"] * 2, *["bias_grad"] * 2, "sum"]
        shape = 5034, *kernel_calls.ROUTED, activation
        assert self.names("routed_mlp", *shape) == ["hidden", *product, *backward]
        programs = self.of("routed_mlp", *shape)[0].programs  # tiles of 128 pairs, one more for each expert
        assert programs == (5034 * 8 // 128 + 128) * (768 // 128)

    @pytest.mark.parametrize("top_k", [1, 2, 3, 4])
    @pytest.mark.parametrize("experts", [4, 8])
    def test_routing_and_prior(self, experts: int, top_k: int) -> None:
        """One launch serves all blocks."""
        forward, backward = ["forward"], ["grad_weight", "grad_embedding"]
        assert self.names("timestep_gate", 1128, 384, experts, top_k, False) == forward
        assert self.names("timestep_gate", 1128, 384, experts, top_k, True) == forward + backward
        assert self.names("diffusion_prior", 128, 12, experts, top_k) == ["divergence"]

    @pytest.mark.parametrize("experts", [3, 4, 8])
    @pytest.mark.parametrize("size", [384, 768, 1024, 1152])
    def test_memory_of_expert_linear(self, size: int, experts: int) -> None:
        """Nothing of the size of k outputs or of merged weights is in memory."""
        batch, tokens = 128, 256
        for top_k in range(1, min(4, experts) + 1):
            found = self.of("expert_linear", batch, tokens, size, experts, top_k, True, True)
            _, _, _, grad_weight, _ = found
            token_tensors = [sum(t.numel() == batch * tokens * size for t in run.tensors) for run in found]
            assert token_tensors == [0, 3, 4, 2, 0]  # x, m, out; dout, x, m, dx; dout, x
            routing = 3 * 4 * batch * top_k + 2 * 4 * schedule_size(batch, top_k, experts)
            read = 2 * (3 * batch * tokens * size + experts * size * (size + 1)) + routing
            assert sum(t.nbytes for launch in found[:2] for t in launch.tensors) == read
            splits = grad_weight.arguments["splits"]
            largest = max(batch * tokens * size, splits * experts * size * size)
            assert all(t.numel() <= largest for launch in found for t in launch.tensors)

    def test_one_more_is_seen(self) -> None:
        def twice() -> None:
            for _ in range(2):
                kernel_calls.diffusion_prior(torch.float32, 128, 12, 3, 2)

        assert [launch.kernel for launch in counts.triton_launches(twice)] == [
            "diffusion_prior._divergence_kernel"
        ] * 2


class TestGraphBreaks:
    def test_of_the_model(self) -> None:
        x, t, y = torch.randn(4, 1, 8, 8), torch.randint(1000, (4,)), torch.randint(3, (4,))
        assert counts.graph_breaks(small_dit("switch", 2).forward_with_prior, x, t, y) == 0

    def test_one_is_seen(self) -> None:
        def broken(x: Tensor) -> Tensor:
            x = F.relu(x)
            torch._dynamo.graph_break()
            return x + 1

        assert counts.graph_breaks(broken, torch.randn(3)) == 1
