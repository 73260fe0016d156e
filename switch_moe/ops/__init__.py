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
from .route_pairs import route_pairs
from .routed_mlp import routed_mlp
from .timestep_gate import timestep_gate
from .token_gate import TokenGate, token_gate

__all__ = [
    "TokenGate",
    "diffusion_prior_loss",
    "dispatch",
    "expert_linear",
    "expert_mlp",
    "linear_assignment",
    "match_columns",
    "merge_experts",
    "route_pairs",
    "routed_mlp",
    "timestep_gate",
    "token_gate",
]
