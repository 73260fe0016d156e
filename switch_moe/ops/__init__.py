"""The operations: each a public function over backends that compute the same thing.

Legend: B samples, T tokens per sample, D hidden size (Din, Dout where they differ), M experts, k experts
chosen per sample (``top_k``), L blocks, N diffusion timesteps.
"""

from .diffusion_prior import diffusion_prior_loss
from .dispatch import dispatch
from .expert_linear import expert_linear
from .expert_mlp import expert_mlp
from .linear_assignment import linear_assignment
from .match_columns import match_columns
from .merge_experts import merge_experts
from .timestep_gate import timestep_gate

__all__ = [
    "diffusion_prior_loss",
    "dispatch",
    "expert_linear",
    "expert_mlp",
    "linear_assignment",
    "match_columns",
    "merge_experts",
    "timestep_gate",
]
