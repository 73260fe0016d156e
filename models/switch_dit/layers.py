"""The layers of SwitchDiT: embedders, attention, and the block with experts at its start.

Legend: B samples, C channels, H, W image size, p patch size, T = (H/p)(W/p) tokens, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from switch_moe import MergedExperts, Routing, SwitchMoE
from switch_moe.ops._operator import without_autocast


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [B, T, D], shift and scale [B, D]."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through a two-layer MLP: t [B] to [B, D].

    Frequency i of n is ``10000^(-i / (n - frequency_shift))``, and the angles are those of
    ``time_scale t + time_offset``. Computed in float32, or in float64 with weights of that type: in a half
    type the angles of large timesteps would be wrong by a radian.
    """

    def __init__(
        self,
        hidden_size: int,
        frequencies: int = 256,
        frequency_shift: int = 0,
        time_scale: float = 1.0,
        time_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.frequency_shift, self.time_scale, self.time_offset = frequency_shift, time_scale, time_offset
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        rates = torch.empty(frequencies // 2, dtype=torch.float32)
        self.register_buffer("rates", rates, persistent=False)
        self.reset_rates()

    def reset_rates(self, device: torch.device | None = None) -> None:
        """Fills the table of frequencies, on ``device`` or where it is."""
        half = self.rates.shape[0]
        steps = torch.arange(half, dtype=torch.float32, device=device or self.rates.device)
        self.rates = torch.exp(-math.log(10000) * steps / (half - self.frequency_shift))

    def _apply(self, *arguments: Any, **options: Any) -> TimestepEmbedder:
        """``to``, ``half``, ``to_empty`` and their like end here. The frequencies stay float32 and whole."""
        super()._apply(*arguments, **options)
        self.reset_rates()
        return self

    def forward(self, t: Tensor) -> Tensor:
        with without_autocast(t.device):
            time = t.float()
            if (self.time_scale, self.time_offset) != (1.0, 0.0):  # DiT's own needs no operation
                time = self.time_scale * time + self.time_offset
            angle = time[:, None] * self.rates
            hidden = torch.cat([angle.cos(), angle.sin()], dim=-1)
            first, activation, last = self.mlp
            return linear_in_float32(last, activation(linear_in_float32(first, hidden)))


def linear_in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` in float32 at least, whatever the type of the weights."""
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


class LabelEmbedder(nn.Module):
    """Class labels [B] to [B, D]; index num_classes is the null label, for guidance without a class."""

    def __init__(self, num_classes: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Where ``drop``, bool [B], the label is left out; without it training leaves out a random share."""
        if drop is None and self.training and self.dropout > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to tokens [B, T, D]."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x.to(self.proj.weight.dtype)), "b d h w -> b (h w) d")


class Attention(nn.Module):
    """Multi-head self-attention on [B, T, D]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class Mlp(nn.Module):
    """Two layers with GELU (tanh)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ChannelMask(nn.Module):
    """DTR's part of a block, in the place of SwitchMoE: masks [B, D] of the channels of x [B, T, D]."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask[:, None].to(x.dtype)


class Block(nn.Module):
    """A DiT block with adaLN-Zero whose branches read a routed copy ``r`` of the tokens.

    The papers write ``r`` (``x (1 + m(x))`` for Switch-DiT, ``x * mask`` for DTR), the block on ``r``, and a
    skip ``x - r`` past it. The skip cancels: ``out = x + gate_msa Attention(..) + gate_mlp MLP(..)``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        moe: SwitchMoE | ChannelMask | None,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.moe = moe
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio)) if mlp is None else mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    @property
    def draws(self) -> bool:
        """Whether a forward draws random numbers."""
        return bool(getattr(self.mlp, "draws", False))

    def forward(
        self, x: Tensor, c: Tensor, *routing: Tensor | MergedExperts | None
    ) -> Tensor | tuple[Tensor, ...]:
        """x [B, T, D], condition c [B, D], and what ``moe`` routes by: tensors of a Routing, a mask, or
        the experts themselves, merged. Where the feed-forward is a mixture (:mod:`switch_dit.systems`) it is
        the time embedding and, maybe, noise to draw with, and what the mixture returns beside its tokens is
        returned beside x.

        A condition or a routing of one row is for all samples alike. The tensors come one by one because
        checkpointing with ``use_reentrant=True`` sees no tensors in a tuple.
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        r = x
        if routing and isinstance(routing[0], MergedExperts):
            r = routing[0](x, modulate=True)
        elif self.moe is not None and not isinstance(self.moe, SwitchMoE):
            r = self.moe(x, *routing)
        elif self.moe is not None:
            schedule = routing[3] if len(routing) > 3 else None
            order = None if schedule is None else (schedule, routing[1])
            r = self.moe(x, routing=Routing(*routing[:3], order=order), modulate=True)
        attention = gate_msa[:, None] * self.attn(modulate(self.norm1(r), shift_msa, scale_msa))  # [B, T, D]
        stream = r + attention
        normed = self.norm2(stream)
        z = modulate(normed, shift_mlp, scale_mlp)
        if isinstance(self.mlp, Mlp):
            return x + attention + gate_mlp[:, None] * self.mlp(z)
        inner, *beside = self.mlp(z, normed, stream, *routing)
        return x + attention + gate_mlp[:, None] * inner, *beside

    def learn(self, observed: Tensor) -> None:
        """Gives the mixture what it returned to learn from, see :mod:`switch_dit.systems`."""
        self.mlp.learn(observed)


class FinalLayer(nn.Module):
    """Tokens [B, T, D] to patches [B, T, p*p*C]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
