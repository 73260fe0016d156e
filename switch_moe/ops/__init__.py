"""The operations: each a public function over backends that compute the same thing.

Legend: B samples, T tokens per sample, D hidden size (Din, Dout where they differ), M experts, k experts
chosen per sample (``top_k``), L blocks, N diffusion timesteps.
"""

from switch_moe.ops.diffusion_prior import diffusion_prior_loss
from switch_moe.ops.expert_linear import expert_linear
from switch_moe.ops.expert_mlp import expert_mlp
from switch_moe.ops.linear_assignment import linear_assignment
from switch_moe.ops.match_columns import match_columns
from switch_moe.ops.timestep_gate import timestep_gate

__all__ = [
    "diffusion_prior_loss",
    "expert_linear",
    "expert_mlp",
    "linear_assignment",
    "match_columns",
    "timestep_gate",
]
