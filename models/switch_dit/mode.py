"""The block of MoDE: a transformer block whose experts the noise level chooses.

MoDE: Reuss et al., "Efficient diffusion transformer policies with mixture of expert denoisers", arXiv
2412.12953.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from switch_moe import MergedExperts, NoiseMoE
from switch_moe.ops._operator import without_autocast


class ClampedRMSNorm(nn.Module):
    """``weight x / max(|x| / sqrt(D), eps)``: eps is a bound, where torch's RMSNorm adds it."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with without_autocast(x.device):
            wide = x.to(dtype)
            size = wide.norm(dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
            return (wide / size.clamp(min=self.eps) * self.weight.to(dtype)).to(x.dtype)


class NormedAttention(nn.Module):
    """Multi-head self-attention on [B, T, D] with a norm of each head's queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = ClampedRMSNorm(hidden_size // num_heads)
        self.k_norm = ClampedRMSNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal weights, as those of :class:`switch_moe.NoiseMoE`."""
        for layer in (self.qkv, self.proj):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.qkv.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=self.causal)
        return self.proj(rearrange(attended, "b h t d -> b t (h d)"))


class ModeBlock(nn.Module):
    """``x = x + Attention(RMS(x) + c)``, ``h = RMS(x)``, ``out = h + experts(h)``.

    The residual of the experts is the normalised stream, as in the code of MoDE.

    Args:
        hidden_size: D. num_heads: attention heads.
        moe: the experts, of :class:`switch_moe.NoiseMoE`.
        weights: of the losses that it returns, by name; others count nothing.
        causal: whether a token attends only to those before it, as the actions of MoDE do; the patches of an
            image do not.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        moe: NoiseMoE,
        weights: dict[str, float] | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = ClampedRMSNorm(hidden_size)
        self.attn = NormedAttention(hidden_size, num_heads, causal)
        self.norm2 = ClampedRMSNorm(hidden_size)
        self.moe, self.weights = moe, weights or {}

    @property
    def draws(self) -> bool:
        """Whether a forward draws random numbers."""
        return self.moe.draws

    def normed(self, x: Tensor, c: Tensor) -> Tensor:
        """What the experts see: the normalised stream after the attention, [B, T, D]."""
        return self.norm2(x + self.attn(self.norm1(x) + c[:, None]))

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        chosen_by: Tensor | MergedExperts | None = None,
        noise: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, T, D] to the same, and the weighted losses of balance, a float32 scalar.

        Args:
            c: condition [B, D], or [1, D] for all samples, added before the attention.
            chosen_by: the time embedding [B, D] or [1, D], all that the router sees; or the experts of one
                noise level, merged, which have no losses, so that x is returned alone.
            noise: Gumbel noise [B, T, M] of the draws of a training, see :class:`switch_moe.NoiseMoE`.
        """
        h = self.normed(x, c)
        if chosen_by is None:
            return h + self.moe(h)  # experts that need no choice, of switch_dit.merged.DenseStep
        if isinstance(chosen_by, MergedExperts):
            return h + chosen_by(h)
        out, losses = self.moe(h, chosen_by, noise=noise, with_losses=True)
        loss = sum((self.weights[name] * losses[name] for name in self.weights), h.new_zeros(()).float())
        return h + out, loss
