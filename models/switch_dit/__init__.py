"""Switch-DiT: the model, its diffusion process, training, sampling and metrics."""

from switch_dit.convert import convert_official_state_dict, convert_to_official_state_dict
from switch_dit.diffusion import GaussianDiffusion
from switch_dit.model import PRESETS, SwitchDiT, create_model
from switch_dit.sampling import sample
from switch_dit.upcycle import from_official, upcycle

__all__ = [
    "PRESETS",
    "GaussianDiffusion",
    "SwitchDiT",
    "convert_official_state_dict",
    "convert_to_official_state_dict",
    "create_model",
    "from_official",
    "sample",
    "upcycle",
]
