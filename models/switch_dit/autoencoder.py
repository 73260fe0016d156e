"""Autoencoders of diffusers, for models of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_autoencoder(name: str, channels: int | None = None, latents: int | None = None) -> Any:
    """The AutoencoderKL ``name``, for evaluation.

    ``ValueError`` where it is none, or its images or latents have another number of channels than given.
    """
    from diffusers import AutoencoderKL

    inner = (Path(name) / "vae" / "config.json").is_file()
    try:
        try:
            vae = AutoencoderKL.from_pretrained(name, **({"subfolder": "vae"} if inner else {}))
        except OSError:
            if inner or Path(name).exists():
                raise
            vae = AutoencoderKL.from_pretrained(name, subfolder="vae")  # a pipeline on the hub
    except Exception as error:  # the hub, the network and broken files make diffusers raise almost anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"vae is {name!r}; diffusers cannot load it ({reason}); it must be an AutoencoderKL on the "
            "Hugging Face hub, or the folder that save_pretrained wrote"
        ) from None
    if latents not in (None, vae.config.latent_channels):
        raise ValueError(
            f"vae is {name!r}; its latents have {vae.config.latent_channels} channels, the model's {latents}"
        )
    if channels not in (None, vae.config.in_channels):
        raise ValueError(
            f"vae is {name!r}; it takes {vae.config.in_channels} channels and the images have {channels}"
        )
    return vae.eval().requires_grad_(False)
