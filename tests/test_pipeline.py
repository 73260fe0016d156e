"""SwitchDiT as a model and a pipeline of diffusers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from helpers import assert_close, random_model
from switch_dit import SwitchDiT, sample
from switch_dit.checkpoint import save_checkpoint
from switch_dit.objectives import create_objective
from switch_dit.pipeline import SwitchDiTPipeline
from switch_dit.sampling import SCHEDULERS, create_scheduler

PAIRS = [(name, scheduler) for name, fitting in SCHEDULERS.items() for scheduler in fitting]
LABELS = [0, 3, 1]


def make_pipeline(name: str = "eps", scheduler: str | None = None, **settings) -> SwitchDiTPipeline:
    model = random_model(learn_sigma=name == "eps", **settings).eval()
    objective = create_objective(name, learn_sigma=name == "eps")
    clip = model.in_channels in (1, 3)
    pipeline = SwitchDiTPipeline(model, create_scheduler(scheduler or SCHEDULERS[name][0], objective, clip))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **options):
    options = {"num_inference_steps": 3, "output_type": "pt", **options}
    generator = torch.Generator().manual_seed(0)
    return pipeline(LABELS, generator=generator, **options).images


def tiny_vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        scaling_factor=0.5,
    ).eval()  # fmt: skip


# -- the model


def test_a_saved_model_loads(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(routing="switch", num_experts=4, top_k=1).to(dtype)
        model.save_pretrained(tmp_path / str(dtype))
        loaded = SwitchDiT.from_pretrained(tmp_path / str(dtype), torch_dtype=dtype)
        assert loaded.settings == model.settings
        assert "backend" not in loaded.config
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(loaded.prior.table, model.prior.table)
        assert torch.equal(loaded.t_embedder.rates, model.t_embedder.rates)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for enabled in (False, True):
        model = random_model().train()
        if enabled:
            model.enable_gradient_checkpointing()
        out = model(
            torch.ones(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 1]), drop=torch.zeros(2).bool()
        )
        out.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_layerwise_casting_leaves_the_router_alone() -> None:
    model = random_model().eval()
    x, t, y = torch.ones(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = model(x, t, y)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert model.blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn
        assert model.router.weight.dtype == model.t_embedder.mlp[0].weight.dtype == torch.float32
        out = model(x, t, y)
    assert_close("output", out, expected, 0.2)
    assert not torch.equal(out, expected)


def test_repeated_blocks_compile() -> None:
    model = random_model().eval()
    x, t, y = torch.ones(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = model(x, t, y)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert_close("output", model(x, t, y), expected, 1e-5)


def test_the_layers_do_not_import_diffusers() -> None:
    code = "import sys, switch_moe; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the pipeline


@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
def test_a_saved_pipeline_draws_the_same(tmp_path: Path, name: str, scheduler: str) -> None:
    """Bitwise, and as sample() draws."""
    pipeline = make_pipeline(name, scheduler)
    pipeline.save_pretrained(tmp_path)
    images = draw(pipeline)
    loaded = SwitchDiTPipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), images)
    objective = create_objective(name, learn_sigma=name == "eps")
    drawn = sample(
        pipeline.transformer, objective, torch.tensor(LABELS), steps=3,
        scheduler=scheduler, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal((drawn / 2 + 0.5).clamp(0, 1), images)


def test_schedulers_of_diffusers_take_each_others_place() -> None:
    pipeline = make_pipeline(in_channels=4)
    config = pipeline.scheduler.config
    found = [draw(pipeline, output_type="latent")]
    for kind in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        pipeline.scheduler = kind.from_config(config)
        found.append(draw(pipeline, output_type="latent"))
        assert found[-1].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert not any(torch.equal(found[0], other) for other in found[2:])
    plain = DDIMScheduler(clip_sample=False)  # its own linear betas, in float32, are the official ones
    pipeline.scheduler = plain
    assert_close("plain", draw(pipeline, output_type="latent"), found[0], 1e-4)


def test_a_flow_may_be_shifted() -> None:
    pipeline = make_pipeline("flow", in_channels=4)
    even = draw(pipeline, output_type="latent")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert not torch.equal(draw(pipeline, output_type="latent"), even)


def test_outputs() -> None:
    pipeline = make_pipeline()
    pt, as_np, pil = (draw(pipeline, output_type=kind) for kind in ("pt", "np", "pil"))
    assert pt.shape == (3, 3, 8, 8)
    assert np.array_equal(as_np, pt.permute(0, 2, 3, 1).numpy())
    assert [image.size for image in pil] == [(8, 8)] * 3
    assert np.array_equal(np.asarray(pil[1]), (as_np[1] * 255).round().astype(np.uint8))
    assert torch.equal(draw(pipeline, return_dict=True), pt)
    latents = draw(pipeline, output_type="latent")
    assert torch.equal((latents / 2 + 0.5).clamp(0, 1), pt)
    grey = make_pipeline(in_channels=1)
    assert [image.mode for image in draw(grey, output_type="pil")] == ["L"] * 3


def test_a_model_without_classes() -> None:
    pipeline = make_pipeline(num_classes=0)
    images = pipeline(num_images=2, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)


def test_latents_are_decoded(tmp_path: Path) -> None:
    pipeline = make_pipeline(in_channels=4)
    pipeline.register_modules(vae=tiny_vae())
    images, latents = draw(pipeline), draw(pipeline, output_type="latent")
    assert images.shape == (3, 3, 16, 16)
    with torch.no_grad():
        expected = pipeline.vae.decode(latents / 0.5).sample
    assert_close("decoded", images, (expected / 2 + 0.5).clamp(0, 1), 1e-5)
    pipeline.save_pretrained(tmp_path)
    loaded = SwitchDiTPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert_close("loaded", draw(loaded), images, 1e-6)


def test_from_a_run(tmp_path: Path) -> None:
    model = random_model()
    settings = {"model": model.settings, "objective": {"schedule": "cosine", "learn_sigma": True}}
    save_checkpoint(tmp_path / "weights", model, model, settings)
    pipeline = SwitchDiTPipeline.from_run(tmp_path / "weights", scheduler="ddpm")
    assert pipeline.scheduler.config.variance_type == "learned_range"
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["transformer"] == ["switch_dit.model", "SwitchDiT"]
    assert index["_class_name"] == "SwitchDiTPipeline"
    drawn = draw(pipeline)
    assert torch.equal(draw(SwitchDiTPipeline.from_pretrained(tmp_path / "pipeline")), drawn)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_labels": [5]}, ValueError, r"labels holds \[5\]; each must be in \[0, 5\)"),
        ({"class_labels": -1}, ValueError, r"labels holds \[-1\]"),
        ({"class_labels": None}, ValueError, "labels is None; the model has 5 classes"),
        ({"class_labels": [0.5]}, TypeError, r"class_labels is \[0.5\]; it must hold integers"),
        ({"output_type": "jpg"}, ValueError, "output_type is 'jpg'"),
        ({"num_inference_steps": 0}, ValueError, "steps is 0"),
        ({"guidance_interval": (1, 0)}, ValueError, "guidance_interval is"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, ValueError, "start has shape"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_pipeline()(**{"class_labels": [1], **options})


def test_latents_without_an_autoencoder() -> None:
    with pytest.raises(ValueError, match="has no vae: give it one, or take output_type='latent'"):
        make_pipeline(in_channels=4)([1])
