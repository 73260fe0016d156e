"""The model of the official Switch-DiT code, imported from a clone, with the parameters of a SwitchDiT.

Its ``models/DiT/models.py`` has DiT, its ``models/MoE.py`` TaskMoE. This file holds none of its code.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from switch_dit import SwitchDiT, convert_official_state_dict, convert_to_official_state_dict
from switch_dit.model import Attention, Mlp, PatchEmbed
from torch import Tensor, nn

from benchmarks.peers import official_imports

STANDS_IN = "timm's three layers replaced by switch_dit's"


class OfficialModel(nn.Module):
    """The official model behind the methods of SwitchDiT that training and sampling call.

    Args:
        model: whose settings and parameters it takes.

    Raises what the import of the clone (``--peer-path official=DIR``) raises.
    """

    def __init__(self, model: SwitchDiT) -> None:
        super().__init__()
        code, mixture, self.note = load()
        settings = dict(model.settings)
        top_k, experts = settings.pop("top_k"), settings.pop("num_experts")
        settings |= {"router": mixture, "routing_config": SimpleNamespace(
            name="DMoE", taskcount=settings.pop("num_timesteps"), w_JSD=1.0,
            param=_Param(num_experts=experts, k=top_k),
        )}  # fmt: skip
        del settings["routing"]
        self.model = code(**settings)
        weights = convert_to_official_state_dict(model.state_dict(), "switch", top_k, model.num_timesteps)
        self.model.load_state_dict(weights)
        self.to(model.pos_embed.device)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        """The output, and in training mode the weighted prior loss after it."""
        return self.model(x, t, y)

    def forward_with_prior(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, match: bool = True
    ) -> tuple[Tensor, Tensor]:
        """In training mode only; it matches in every step."""
        return self.model(x, t, y)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """As :meth:`switch_dit.SwitchDiT.forward_with_cfg`."""
        return self.model.forward_with_cfg(x, t, y, cfg_scale)


def switch_dit_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters or gradients of an OfficialModel by the names that SwitchDiT has for them."""
    return convert_official_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})


class _Param(dict):
    """Settings as the official code reads them: by attribute and as keyword arguments."""

    __getattr__ = dict.__getitem__


def load() -> tuple[type[nn.Module], type[nn.Module], str]:
    """The official classes of the model and of its mixture, and what was put in the place of timm."""
    with official_imports(), _timm() as note:
        code = importlib.import_module("models.DiT.models").DiT
        return code, importlib.import_module("models.MoE").TaskMoE, note


@contextlib.contextmanager
def _timm() -> Iterator[str]:
    """Inside, the layers of timm that the official code takes can be imported: timm's, or stand-ins with the
    same parameters. Yields a note for the latter.
    """
    if importlib.util.find_spec("timm") is not None:
        yield ""
        return
    layers = ModuleType("timm.models.vision_transformer")
    layers.PatchEmbed, layers.Attention, layers.Mlp = _PatchEmbed, _Attention, _mlp
    modules = {name: ModuleType(name) for name in ("timm", "timm.models")} | {layers.__name__: layers}
    sys.modules.update(modules)
    try:
        yield STANDS_IN
    finally:
        for name in modules:
            del sys.modules[name]


class _PatchEmbed(PatchEmbed):
    def __init__(
        self, image_size: int, patch_size: int, channels: int, hidden_size: int, bias: bool = True
    ) -> None:
        super().__init__(patch_size, channels, hidden_size)
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (image_size // patch_size) ** 2


class _Attention(Attention):
    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__(hidden_size, num_heads)


def _mlp(in_features: int, hidden_features: int, act_layer: Any, drop: float) -> Mlp:
    return Mlp(in_features, hidden_features)
