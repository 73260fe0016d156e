"""SwitchDiT as a pipeline of diffusers: class labels in, pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import is_accelerate_available, logging
from torch import Tensor

from switch_dit.checkpoint import load_checkpoint
from switch_dit.model import SwitchDiT
from switch_dit.sampling import SCHEDULERS, Guidance, create_scheduler, sample_walk
from switch_moe.ops._checks import check_choice

OUTPUTS = ("pil", "np", "pt", "latent")


class SwitchDiTPipeline(DiffusionPipeline):
    """Pictures from class labels, with merged experts.

        pipeline = SwitchDiTPipeline.from_pretrained("models/digits")
        pipeline([3, 5], generator=torch.Generator().manual_seed(0)).images[0].save("three.png")

    ``save_pretrained`` writes a folder that ``from_pretrained`` loads without a network, where switch_dit is
    installed. The scheduler may be replaced, by the same kind of its diffusers for any class:
    ``pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)``.

    Args:
        transformer: the model.
        scheduler: DDPM, DDIM, DPM-Solver++ or UniPC, or FlowMatchEuler for a flow, of diffusers; see
            :func:`switch_dit.schedulers.create_scheduler` for one that fits how the model was trained.
        vae: an AutoencoderKL for models of latents; models of pixels have none.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(self, transformer: SwitchDiT, scheduler: Any, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @classmethod
    def from_run(
        cls, folder: Path | str, weights: str = "ema", scheduler: str | None = None, vae: Any = None
    ) -> SwitchDiTPipeline:
        """The model of a run, from the folder that holds its weights, such as ``runs/digits/weights``.

        ``scheduler`` is a name of :data:`switch_dit.schedulers.SCHEDULERS`; ``weights`` as in
        :func:`switch_dit.checkpoint.load_checkpoint`, whose errors it raises.
        """
        model, objective = load_checkpoint(folder, weights)
        name = SCHEDULERS[objective.name][0] if scheduler is None else scheduler
        return cls(model, create_scheduler(name, objective, clip=_is_pixels(model)), vae)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **options: Any) -> SwitchDiTPipeline:
        """As in diffusers. Without accelerate it does not advise to install it."""
        if not is_accelerate_available():
            options.setdefault("low_cpu_mem_usage", False)
        return super().from_pretrained(folder, **options)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | Tensor | None = None,
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        *,
        num_images: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        guide: SwitchDiT | None = None,
        latents: Tensor | None = None,
        batch_size: int = 250,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One picture for each label.

        Args:
            class_labels: a label, a list, or int64 [n]; None for a model without classes.
            guidance_scale: 1 is none.
            generator: on the CPU for any device; a list has one for each picture, which then does not depend
                on the others.
            output_type: ``pil``, a list of PIL images; ``np``, [n, H, W, C] in [0, 1]; ``pt``, [n, C, H, W]
                in [0, 1]; ``latent``, what the model draws, float32 [n, C, H, W].
            num_images: of a model without classes.
            guidance_interval, guidance_channels, guide: see :class:`switch_dit.sampling.Guidance`.
            latents: the noise to begin with, [n, C, H, W], instead of drawing it.
            batch_size: pictures at a time.

        Raises:
            ValueError, TypeError: an argument does not fit. FloatingPointError: a picture is not finite.
        """
        check_choice("output_type", output_type, OUTPUTS)
        model = self.transformer
        pixels = _is_pixels(model)
        if self.vae is None and not pixels and output_type != "latent":
            raise ValueError(
                f"output_type is {output_type!r}; the model draws latents of {model.in_channels} channels "
                "and the pipeline has no vae: give it one, or take output_type='latent'"
            )
        if class_labels is not None and not isinstance(class_labels, Tensor):
            labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
            whole = all(isinstance(label, int) and not isinstance(label, bool) for label in labels)
            if not whole:
                raise TypeError(f"class_labels is {class_labels!r}; it must hold integers")
            class_labels = torch.tensor(labels, dtype=torch.int64, device="cpu")
        drawn = sample_walk(
            model, self.scheduler, class_labels, count=num_images, steps=num_inference_steps,
            guidance=Guidance(guidance_scale, tuple(guidance_interval), guidance_channels, guide),
            generator=generator, start=latents, batch_size=batch_size, clip=pixels and self.vae is None,
            progress=self.progress_bar,
        )  # fmt: skip
        images = drawn if output_type == "latent" else self._as_output(drawn, output_type, batch_size)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _as_output(self, drawn: Tensor, output_type: str, batch_size: int) -> Any:
        if self.vae is not None:
            drawn = torch.cat([self._decode(part) for part in drawn.split(batch_size)])
        images = (drawn.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        return pixels if output_type == "np" else self.numpy_to_pil(pixels)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents as the model draws them to images, by the scale of the autoencoder's config."""
        config = self.vae.config
        scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
        latents = (latents / scale + shift).to(self.vae.device, self.vae.dtype)
        return self.vae.decode(latents).sample


def load_pipeline(
    folder: Path | str, weights: str = "ema", weights_folder: str = "weights"
) -> SwitchDiTPipeline:
    """The pipeline of a run, from its folder, or one that ``save_pretrained`` wrote. It asks no network.

    Of a run, ``weights`` are the moving average (``ema``) or the last ones (``model``), and
    ``weights_folder`` is the folder in it that holds them. ``ValueError`` or ``OSError`` where a file is
    missing or broken, or where a saved pipeline is asked for other weights than it has.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        return SwitchDiTPipeline.from_run(folder / weights_folder, weights)
    if (weights, weights_folder) != ("ema", "weights"):
        raise ValueError(f"run is {folder}, a saved pipeline; it has no other weights to choose")
    logging.disable_progress_bar()
    return SwitchDiTPipeline.from_pretrained(folder, local_files_only=True)


def _is_pixels(model: SwitchDiT) -> bool:
    return model.in_channels in (1, 3)
