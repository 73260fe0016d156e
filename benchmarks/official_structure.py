"""Switch-DiT in the structure of the official code, with the parameters of switch_dit's SwitchDiT."""

from __future__ import annotations

import torch
from einops import rearrange
from switch_dit.layers import Block, modulate
from switch_dit.model import SwitchDiT
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import expert_loop
from switch_moe.reference.diffusion_prior import jensen_shannon


class OfficialStructure(SwitchDiT):
    """A SwitchDiT with the same parameters and results that merges, cancels and fuses nothing.

    Every step embeds all N timesteps. Each block routes all N, picks the rows of the batch, gathers k copies
    of every sample and loops over the experts (``expert_loop``), forms ``1 + m``, runs on ``x (1 + m)`` and
    adds the skip ``(1 - (1 + m)) x``. The matching of the prior builds the differences of all pairs of
    columns, ``[N, L*M, L*M]``, and scipy solves it on the host.
    """

    @classmethod
    def of(cls, model: SwitchDiT) -> OfficialStructure:
        """A copy of ``model`` in this structure."""
        twin = cls(**model.settings)
        twin.load_state_dict(model.state_dict())
        return twin.to(model.pos_embed.device)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        with_prior: bool = False,
        match: bool = True,
        drop: Tensor | None = None,
        ties: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As :meth:`switch_dit.SwitchDiT.forward`."""
        embeddings = self.embed_timesteps()  # [N, D]
        c = embeddings[t]  # [B, D]
        if self.y_embedder is not None:
            c = c + self.y_embedder(y, drop)
        h = self.x_embedder(x) + self.pos_embed  # [B, T, D]
        probs, chosen = [], []
        for i, block in enumerate(self.blocks):
            mask, probs_i, chosen_i = self.mixture(i, h, embeddings, t)
            probs.append(probs_i)
            chosen.append(chosen_i)
            h = on_routed(block, h, c, mask)
        grid, p = self.input_size // self.patch_size, self.patch_size
        patches = self.final_layer(h, c)  # [B, T, p*p*C_out]
        out = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=p, q=p)
        if not with_prior:
            return out
        if match:
            self.match(torch.cat(chosen, dim=1), ties)
        return out, self.prior_loss(torch.cat(probs, dim=1), t)

    def embed_timesteps(self) -> Tensor:
        """Embeddings of all timesteps, ``[N, D]``."""
        return self.t_embedder(torch.arange(self.num_timesteps, device=self.pos_embed.device))

    def mixture(self, i: int, x: Tensor, embeddings: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Block i: ``1 + m(x) [B, T, D]``, probabilities ``[B, M]``, chosen experts of all timesteps
        ``[N, M]``, 0/1.
        """
        moe = self.blocks[i].moe
        logits = F.linear(F.silu(embeddings), self.router.weight[i], self.router.bias[i])  # [N, M]
        probs = torch.softmax(logits, dim=1)
        gate, index = probs.topk(moe.top_k, dim=1)  # [N, k]
        chosen = torch.zeros_like(probs).scatter(1, index, 1.0)
        weight, bias = moe.weight, moe.bias
        if torch.is_autocast_enabled(x.device.type):  # a custom function casts nothing by itself
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return 1 + expert_loop(x, weight, bias, index[t], gate[t]), probs[t], chosen

    @torch.no_grad()
    def match(self, chosen: Tensor, ties: Tensor | None = None) -> None:
        """Matches the experts, chosen where ``[N, L*M]`` is 1, to the prior's columns; ties at random, or by
        the order of ``ties [2, L*M]``.
        """
        from scipy.optimize import linear_sum_assignment

        if ties is None:
            ties = torch.rand(2, chosen.shape[1])
        of_model, of_table = ties.cpu().argsort(dim=1)
        differences = chosen[:, of_model][:, :, None] - self.prior.table[:, of_table][:, None]
        _, column = linear_sum_assignment(differences.abs().sum(0).cpu())
        self.assignment[of_model] = of_table[torch.as_tensor(column)].to(self.assignment.device)

    def prior_loss(self, probs: Tensor, t: Tensor) -> Tensor:
        """The diffusion prior loss of probabilities ``[B, L*M]`` at the last assignment."""
        active = self.prior.table[t]
        wanted = active[:, self.assignment] / active.sum(1, keepdim=True)
        return jensen_shannon(probs.float() / len(self.blocks), wanted)


def on_routed(block: Block, x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
    """The block on ``x * mask``, and the skip past it; x and mask ``[B, T, D]``, condition c ``[B, D]``."""
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, dim=1)
    routed = x * mask
    routed = routed + gate_msa[:, None] * block.attn(modulate(block.norm1(routed), shift_msa, scale_msa))
    routed = routed + gate_mlp[:, None] * block.mlp(modulate(block.norm2(routed), shift_mlp, scale_mlp))
    return routed + (1 - mask) * x
