"""Dense models as DiT-MoE, and checkpoints of mixtures as runs that train and sample."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
import tyro
import upcycle as upcycle_script
from helpers import assert_close, case, random_model
from safetensors.torch import save_file
from sample_switch_dit import SampleConfig, load_pipeline
from switch_dit import SwitchDiT, create_model, to_official, upcycle
from switch_dit.checkpoint import load_checkpoint, save_weights
from switch_dit.data import load_data
from switch_dit.official import FLOWS, NAMES
from switch_dit.settings import TrainConfig
from switch_dit.trainer import Trainer
from upcycle import UpcycleConfig


def inputs(model: SwitchDiT) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, model.in_channels, 8, 8, generator=generator)
    return x.to(model.pos_embed.dtype), torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 5])


@pytest.mark.parametrize(("experts", "k", "every"), [(8, 2, 1), (4, 1, 1), (3, 3, 2)])
def test_a_dense_model_as_dit_moe_computes_the_same(experts: int, k: int, every: int) -> None:
    """Whatever its router says, to rounding: gates that sum to one weigh copies of the MLP."""
    dense = random_model(routing="none").eval()
    model = upcycle(
        dense, routing="dit_moe", num_experts=experts, top_k=k, mixture={"every": every, "load_balance": 0.02}
    )
    assert [hasattr(block.mlp, "moe") for block in model.blocks] == [every == 1, True]
    moe = model.blocks[1].mlp.moe
    assert (moe.num_experts, moe.top_k, moe.shared_in) == (experts, k, None)
    assert 0.01 < moe.router.weight.std() < 0.03
    with torch.no_grad():
        given = inputs(dense)
        assert_close("out", model(*given), dense(*given), 1e-6)
        moe.router.weight.normal_(std=3.0)
        assert_close("out by another router", model(*given), dense(*given), 1e-6)
    exact = upcycle(dense.double(), routing="dit_moe", num_experts=experts, top_k=k)
    with torch.no_grad():
        assert_close("out in float64", exact(*inputs(exact)), dense(*inputs(exact)), 1e-7)
    out, balance = model.train()(*given, with_prior=True)
    (out.square().sum() + balance).backward()
    for name in ("router.weight", "weight_in", "bias_in", "weight_out", "bias_out"):
        assert moe.get_parameter(name).grad.any(), name


def test_what_does_not_fit() -> None:
    dense = random_model(routing="none")
    with pytest.raises(ValueError, match="mixture's normalise is False; an upcycled model has True"):
        upcycle(dense, routing="dit_moe", mixture={"normalise": False})
    with pytest.raises(
        ValueError, match="mixture holds 'every'; the options of 'switch' are load_balance, z_loss"
    ):
        upcycle(dense, mixture={"every": 2})
    with pytest.raises(ValueError, match="routing is 'ec_dit'; it must be one of switch, dit_moe"):
        upcycle(dense, routing="ec_dit")
    with pytest.raises(ValueError, match="system is 'diffmoe', which is a mixture; it must be a dense one"):
        upcycle(case("diffmoe", "model.state_dict.")[1], num_heads=2)


def first_losses(command: str, folder: Path) -> list[float]:
    """The errors of a run's first steps, by the command that the program has printed."""
    start = command.partition("--start-from ")
    arguments = ["--output", str(folder), "--batch-size", "16", "--steps", "3", "--device", "cpu"]
    config = tyro.cli(TrainConfig, args=[*"".join(start[1:]).split(), *arguments])
    config.validate()
    trainer = Trainer(config, load_data("digits"))
    return [float(trainer.step(n, *batch)["mse"]) for n, batch in enumerate(islice(trainer.batches(0), 3))]


def test_the_program_makes_dit_moe_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dense = create_model(
        "tiny/4", input_size=8, in_channels=1, num_classes=10, learn_sigma=False, routing="none"
    )
    settings = {"model": dense.settings, "objective": {"name": "eps", "learn_sigma": False}}
    save_weights(tmp_path / "dense" / "weights", {"ema": dense.state_dict()}, settings)
    config = UpcycleConfig(tmp_path / "dense", tmp_path / "run", routing="dit_moe", num_experts=8)
    model, _ = load_checkpoint(upcycle_script.run(config))
    assert (model.routing, model.settings["num_experts"]) == ("dit_moe", 8)
    command = capsys.readouterr().out.splitlines()[-1]
    losses = first_losses(command, tmp_path / "trained")
    assert all(0 < loss < 3 for loss in losses)


@pytest.mark.parametrize("system", NAMES)
def test_the_program_makes_a_run_of_a_mixture(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As in its own code, rectified flow; the system is told by the names."""
    model = create_model(
        "tiny/4", input_size=8, in_channels=1, num_classes=10, learn_sigma=False, routing=system,
        num_experts=4, **FLOWS[system].time(1000),
    )  # fmt: skip
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    save_file(to_official(model), tmp_path / "official.safetensors")
    config = UpcycleConfig(
        tmp_path / "official.safetensors", tmp_path / "run", num_heads=model.settings["num_heads"]
    )
    found, objective = load_checkpoint(upcycle_script.run(config))
    assert (found.settings | {"mixture": 0}, objective.name) == (model.settings | {"mixture": 0}, "flow")
    assert found.options == model.options
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    command = capsys.readouterr().out.splitlines()[-1]
    losses = first_losses(command, tmp_path / "trained")
    assert all(0 < loss < 9 for loss in losses)
    pipeline = load_pipeline(SampleConfig(run=tmp_path / "run"))
    assert pipeline([0, 5], num_inference_steps=2, output_type="latent").images.isfinite().all()


def test_a_dit_moe_that_predicts_the_noise(tmp_path: Path) -> None:
    tensors, state, metadata = case("dit_moe", "model.state_dict.")
    save_file(state, tmp_path / "official.safetensors")
    config = UpcycleConfig(
        tmp_path / "official.safetensors", tmp_path / "run", system="dit_moe", process="eps",
        num_heads=metadata["model"]["num_heads"], top_k=metadata["model"]["top_k"],
    )  # fmt: skip
    model, objective = load_checkpoint(upcycle_script.run(config))
    assert (objective.name, objective.learn_sigma) == ("eps", metadata["model"]["learn_sigma"])
    with torch.no_grad():
        out = model(tensors["model.x"], tensors["model.t"], tensors["model.y"])
    assert_close("out", out, tensors["model.out_eval"], 1e-6)
