"""Timestep-routed mixtures of experts for diffusion transformers."""

from . import ops
from .dense_to_sparse import DenseToSparseMoE
from .diffmoe import CapacityPredictor, DiffMoE
from .falling_capacity import FallingCapacityMoE
from .layer import SwitchMoE
from .merged import MergedExperts
from .noise_moe import NoiseMoE
from .prior import DiffusionPrior
from .router import Router, Routing, set_top_k
from .routes import Routes
from .token_moe import TokenMoE, TokenRouter
from .warm_up import warm_up

__version__ = "0.1.0"

__all__ = [
    "CapacityPredictor",
    "DenseToSparseMoE",
    "DiffMoE",
    "DiffusionPrior",
    "FallingCapacityMoE",
    "MergedExperts",
    "NoiseMoE",
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
