"""The model where others put it: other floating types, the meta device, FSDP2, another default device."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, random_model
from switch_dit import SwitchDiT, sample
from switch_dit.data import batches
from switch_dit.objectives import create_objective
from switch_dit.sampling import SCHEDULERS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from switch_moe import DiffusionPrior, Router, Routing, SwitchMoE

ROUTINGS = ("switch", "dtr", "none")
DTYPES = (torch.float16, torch.bfloat16, torch.float64)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return x, torch.tensor([3, 500, 999]), torch.tensor([1, 2, 5])


def tables(model: SwitchDiT) -> dict[str, Tensor]:
    """What no training changes: buffers, and the positions."""
    return {**dict(model.named_buffers()), "pos_embed": model.pos_embed}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN or the largest integer, as garbage would."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_floating_types(dtype: torch.dtype, routing: str) -> None:
    """The output is as exact as the type allows; timesteps and routers are computed in float32 at least."""
    model = random_model(routing=routing).eval()
    exact = copy.deepcopy(model).double()
    x, t, y = inputs()
    right = exact(x.double(), t, y)
    model.to(dtype)
    assert model.t_embedder.rates.dtype == torch.float32
    assert torch.equal(model.t_embedder.rates, exact.t_embedder.rates)
    for given in (x, x.to(dtype)):
        out = model(given, t, y)
        assert out.dtype == dtype
        assert_close("out", out, right, 1e-5 if dtype == torch.float64 else 60 * torch.finfo(dtype).eps)
    out, prior = model.forward_with_prior(x.to(dtype), t, y)
    (out.float().square().mean() + prior).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    images = sample(model, create_objective("eps", learn_sigma=True), y[:2], steps=2)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "mlp", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_in_another_type(dtype: torch.dtype, kind: str) -> None:
    layer = SwitchMoE(16, expert=kind)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, e = torch.randn(2, 9, 16), torch.randn(2, 16)
    right = layer(x, e, modulate=True)
    out = layer.to(dtype)(x.to(dtype), e.to(dtype), modulate=True)
    assert out.dtype == dtype
    assert_close("out", out, right, 0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp", "swiglu"])
@pytest.mark.parametrize("modulate", [False, True])
def test_autocast_decides_the_type_of_all_kinds(kind: str, modulate: bool) -> None:
    layer = SwitchMoE(16, expert=kind)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(2, 9, 16), torch.randn(2, 16), modulate=modulate)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_type(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        model = random_model()
        _, t, y = inputs()
        out, prior = model.forward_with_prior(torch.randn(3, 3, 8, 8), t, y)
        (out.square().mean() + prior).backward()
        assert model.prior.table.dtype == model.t_embedder.rates.dtype == torch.float32
        assert SwitchMoE(16)(torch.randn(2, 9, 16), torch.randn(2, 16)).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("gates", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_gates_of_any_floating_type(gates: torch.dtype, kind: str) -> None:
    layer = SwitchMoE(16, expert=kind)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, routing = torch.randn(2, 9, 16), layer.route(torch.randn(2, 16))
    gate = routing.expert_gate.detach().to(gates).requires_grad_()
    out = layer(x, routing=routing._replace(expert_gate=gate))
    assert_close("out", out, layer(x, routing=routing._replace(expert_gate=gate.detach().float())), 1e-6)
    out.sum().backward()
    assert gate.grad.dtype == gates


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("routing", ROUTINGS)
class TestMeta:
    @staticmethod
    def on_meta(routing: str) -> SwitchDiT:
        with torch.device("meta"):
            return random_model(routing=routing).eval()

    @staticmethod
    def check(model: SwitchDiT, good: SwitchDiT) -> None:
        for name, table in tables(good).items():
            assert torch.equal(tables(model)[name], table), name
        assert torch.equal(model(*inputs()), good(*inputs()))

    def test_to_empty_and_a_state_dict(self, routing: str) -> None:
        good, model = random_model(routing=routing).eval(), self.on_meta(routing).to_empty(device="cpu")
        model.load_state_dict(good.state_dict())
        self.check(model, good)

    def test_assign(self, routing: str) -> None:
        good, model = random_model(routing=routing).eval(), self.on_meta(routing)
        model.load_state_dict(good.state_dict(), assign=True)
        self.check(model, good)

    def test_inside_another_module(self, routing: str) -> None:
        good = torch.nn.Sequential(random_model(routing=routing).eval())
        model = torch.nn.Sequential(self.on_meta(routing))
        model.load_state_dict(good.state_dict(), assign=True)
        self.check(model[0], good[0])

    def test_a_state_dict_without_positions(self, routing: str) -> None:
        good = random_model(routing=routing).eval()
        state = {name: value for name, value in good.state_dict().items() if name != "pos_embed"}
        for assign in (False, True):
            model = self.on_meta(routing)
            if not assign:
                model.to_empty(device="cpu")
            assert model.load_state_dict(state, strict=False, assign=assign).missing_keys == ["pos_embed"]
            self.check(model, good)

    def test_under_another_default_device(self, routing: str) -> None:
        good, model = random_model(routing=routing).eval(), random_model(1, routing=routing).eval()
        with torch.device("meta"):
            model.initialize_weights()
            model.load_state_dict(good.state_dict())
        self.check(model, good)

    def test_initialize_weights_fills_everything(self, routing: str) -> None:
        model = self.on_meta(routing).to_empty(device="cpu")
        model.initialize_weights()
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            assert value.isfinite().all(), name
        fresh = random_model(routing=routing)
        for name, table in tables(fresh).items():
            assert torch.equal(tables(model)[name], table), name
        model(*inputs())

    def test_parameter_by_parameter(self, routing: str) -> None:
        """accelerate dispatches a checkpoint so; reset_buffers() then fills the rest."""
        good, model = random_model(routing=routing).eval(), self.on_meta(routing)
        for name, value in good.state_dict().items():
            owner, _, leaf = name.rpartition(".")
            parameter = torch.nn.Parameter(value, requires_grad=name != "pos_embed")
            setattr(model.get_submodule(owner), leaf, parameter)
        model.reset_buffers()
        self.check(model, good)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_fake_tensors(routing: str) -> None:
    """They have no values to look at."""
    with FakeTensorMode():
        model = random_model(routing=routing)
        labels = torch.zeros(2, dtype=torch.int64)
        out, prior = model.forward_with_prior(torch.randn(2, 3, 8, 8), labels, labels)
        (out.sum() + prior).backward()
    assert out.shape == (2, 6, 8, 8)


def test_a_prior_alone_after_to_empty() -> None:
    with torch.device("meta"):
        prior = DiffusionPrior(2, 3, 2, num_timesteps=50)
    prior.to_empty(device="cpu").reset_parameters()
    assert torch.equal(prior.table, DiffusionPrior(2, 3, 2, num_timesteps=50).table)


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("routing", ROUTINGS)
def test_fsdp2_in_bfloat16(routing: str) -> None:
    """The usual policy on blocks and root, from the meta device, with weights of their own or loaded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    good = random_model(routing=routing).eval()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (1,))
    with torch.device("meta"):
        model = random_model(routing=routing).eval()
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    model.initialize_weights()
    out, prior = model.forward_with_prior(*inputs())
    (out.float().square().mean() + prior).backward()
    assert out.dtype == torch.bfloat16
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, good.state_dict(), options=options)
    assert_close("out", model(*inputs()), good(*inputs()), 0.05)
    assert model.t_embedder.rates.dtype == torch.float32


def test_another_default_device() -> None:
    """Everything that is made inside is made where its inputs are."""
    model, objective = random_model().eval(), create_objective("eps", learn_sigma=True)
    plain, flow = random_model(learn_sigma=False).eval(), create_objective("flow")
    x, t, y = inputs()
    layer, router = SwitchMoE(16), Router(2, 16)
    tokens, e = torch.randn(5, 20, 16), torch.randn(5, 16)
    same = e[:1].expand(5, -1)  # one timestep for all, as in sampling
    torch.set_default_device("meta")
    try:
        out, prior = model.forward_with_prior(x, t, y)
        (out.sum() + prior).backward()
        for scheduler in SCHEDULERS["eps"]:
            assert sample(model, objective, y[:2], steps=2, scheduler=scheduler).device.type == "cpu"
        for scheduler in SCHEDULERS["flow"]:
            assert sample(plain, flow, y[:2], steps=2, scheduler=scheduler).device.type == "cpu"
        objective.losses(out, x, x, t, x)
        for embedding in (e, same):
            layer(tokens, embedding).sum().backward()
        router(e).probs.sum().backward()
        assert next(batches(100, 10, 0)).device.type == "cpu"
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_blocks(routing: str, reentrant: bool) -> None:
    gradients = []
    for wrap in (False, True):
        model = random_model(routing=routing, class_dropout_prob=0.0)
        for block in model.blocks if wrap else ():
            block.forward = lambda *a, f=block.forward: checkpoint(f, *a, use_reentrant=reentrant)
        x, t, _ = inputs()
        out, prior = model.forward_with_prior(x, t, torch.tensor([1, 2, 0]), match=False)
        (out.square().mean() + prior).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert_close(name, gradients[1][name], gradient, 1e-6)


def test_a_routing_through_a_file() -> None:
    routing = Router(2, 16)(torch.randn(3, 16), selected=True)
    file = io.BytesIO()
    torch.save(routing, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, Routing)
    for a, b in zip(loaded[:3], routing[:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(loaded.selected(), routing.selected())
