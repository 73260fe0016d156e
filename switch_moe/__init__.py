"""Timestep-routed mixtures of experts for diffusion transformers."""

from . import ops
from .diffmoe import CapacityPredictor, DiffMoE
from .layer import SwitchMoE
from .merged import MergedExperts
from .prior import DiffusionPrior
from .router import Router, Routing, set_top_k
from .routes import Routes
from .token_moe import TokenMoE, TokenRouter
from .warm_up import warm_up

__version__ = "0.1.0"

__all__ = [
    "CapacityPredictor",
    "DiffMoE",
    "DiffusionPrior",
    "MergedExperts",
    "Router",
    "Routes",
    "Routing",
    "SwitchMoE",
    "TokenMoE",
    "TokenRouter",
    "ops",
    "set_top_k",
    "warm_up",
]
