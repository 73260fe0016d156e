"""Timestep-routed mixtures of experts for diffusion transformers."""

from switch_moe import ops
from switch_moe.layer import SwitchMoE
from switch_moe.prior import DiffusionPrior
from switch_moe.router import Router, Routing

__version__ = "0.1.0"

__all__ = ["DiffusionPrior", "Router", "Routing", "SwitchMoE", "ops"]
