"""Switch-DiT: the model, its diffusion process, training, sampling and metrics."""

from typing import Any

from switch_dit.convert import convert_official_state_dict, convert_to_official_state_dict
from switch_dit.diffusion import GaussianDiffusion
from switch_dit.model import PRESETS, SwitchDiT, create_model
from switch_dit.official import to_official
from switch_dit.official_layers import layer_from_official, layer_to_official
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
    "layer_from_official",
    "layer_to_official",
    "sample",
    "to_official",
    "upcycle",
]

_OF_MMDIT = ("MultiViewJointBlock", "SwitchJointBlock", "SwitchSD3")
__all__ += _OF_MMDIT


def __getattr__(name: str) -> Any:
    """What needs the SD3 of diffusers, whose import takes a second, is imported when it is first used."""
    if name in _OF_MMDIT:
        from switch_dit import mmdit

        return getattr(mmdit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
