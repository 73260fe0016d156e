"""NoiseMoE: experts in the place of a feed-forward layer, drawn for each token by the noise level alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gumbel import check_noise, gumbel_like
from .merged import MergedExperts, merge_mlp
from .ops._checks import (
    check_device,
    check_dtype,
    check_flags,
    check_integers,
    check_range,
    check_shape,
    check_tensors,
)
from .ops._operator import without_autocast
from .ops.expert_mlp import expert_mlp
from .router import Routing
from .routes import Routes
from .token_moe import TokenMoE

SMALLEST = 1e-9  # of a probability, so that every expert can be drawn
TINY = 1e-6  # in the logarithm of the z loss


class NoiseRouter(nn.Module):
    """Two layers with GELU (erf) from the time embedding to the experts, in float32 always.

    Parameters: ``first.*``, D to ``router_hidden_size``, and ``second.*``, to M.
    """

    def __init__(self, time_size: int, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(time_size, hidden_size), nn.Linear(hidden_size, num_experts)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier's first layer and a small second one, so that fresh gates are nearly even."""
        nn.init.xavier_uniform_(self.first.weight)
        nn.init.normal_(self.second.weight, std=0.02)
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.bias)

    def forward(self, time_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and logits ``[B, M]`` of time embeddings ``[B, D]``. The largest logit is 0."""
        dtype = torch.float64 if self.first.weight.dtype == torch.float64 else torch.float32
        with without_autocast(time_embedding.device):
            hidden = time_embedding.to(dtype)
            for layer in (self.first, self.second):
                hidden = hidden if layer is self.first else F.gelu(hidden)
                hidden = F.linear(hidden, layer.weight.to(dtype), layer.bias.to(dtype))
            logits = hidden - hidden.amax(-1, keepdim=True)
            return logits.softmax(-1).clamp(min=SMALLEST), logits


class NoiseMoE(TokenMoE):
    """``sum_j gate_j expert_j(x)`` by the noise level, as in MoDE (arXiv 2412.12953).

    The router sees the time embedding alone. In evaluation all tokens of a sample have its k likeliest
    experts. In training, unless ``sample`` is False, every token draws k experts without replacement, by
    those probabilities. For one noise level the experts of an evaluation are one
    wider MLP, see :meth:`merge_each`.

    Args:
        hidden_size: D. num_experts: M. top_k: k.
        sample: whether training draws; otherwise it takes the likeliest too.
        expert_hidden_size: H, 4 D by default. router_hidden_size: 2 ``time_size`` by default.
        time_size: of the time embedding, D by default.
        backend: of :func:`switch_moe.ops.routed_mlp`, which trains, and of
            :func:`switch_moe.ops.expert_mlp`, which evaluates samples of several noise levels.

    Parameters: ``router.*``, see :class:`NoiseRouter`; ``weight_in [M, D, 2H]``, ``bias_in [M, 2H]`` and
    ``weight_out [M, H, D]`` of SwiGLU experts, ``(SiLU(a) * b) weight_out`` of the halves ``[a, b]``.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        sample: bool = True,
        expert_hidden_size: int | None = None,
        router_hidden_size: int | None = None,
        time_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            hidden_size, num_experts, top_k, bias=True, expert_hidden_size=expert_hidden_size, backend=backend
        )
        self.bias_out = None
        self.time_size = hidden_size if time_size is None else time_size
        of_router = 2 * self.time_size if router_hidden_size is None else router_hidden_size
        check_integers(time_size=self.time_size, router_hidden_size=of_router)
        check_flags(sample=sample)
        self.sample = sample
        self.router: Any = NoiseRouter(self.time_size, of_router, num_experts)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Small normal experts: beside a normalised stream, which does not grow, larger ones learn slower."""
        self.router.reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    @property
    def draws(self) -> bool:
        """Whether a forward draws random numbers."""
        return self.training and self.sample

    def choose(self, probs: Tensor, expert_index: Tensor) -> Routing:
        """The gates of chosen experts ``[B, k]`` or ``[B, T, k]`` by the probabilities ``[B, M]``: those of
        the chosen ones over their sum.
        """
        index = expert_index.long()
        of_all = probs if index.dim() == 2 else probs[:, None].expand(-1, index.shape[1], -1)
        gate = of_all.gather(-1, index)
        return Routing(probs, index.to(torch.int32), gate / gate.sum(-1, keepdim=True))

    def likeliest(self, probs: Tensor) -> Routing:
        """The k likeliest experts of each sample. The lowest index wins a tie."""
        order = torch.sort(probs.detach(), dim=-1, descending=True, stable=True).indices
        return self.choose(probs, order[:, : self.top_k])

    def route(self, time_embedding: Tensor) -> Routing:  # type: ignore[override]
        """The routing of an evaluation at noise levels ``[R, time_size]``, without a block dimension."""
        check_tensors(time_embedding=time_embedding)
        check_shape("time_embedding", time_embedding, ("R", self.time_size))
        return self.likeliest(self.router(time_embedding)[0])

    def draw(self, probs: Tensor, noise: Tensor) -> Routing:
        """k experts for each token, without replacement, by Gumbel noise ``[B, T, M]``."""
        perturbed = probs.detach().log()[:, None] + noise
        return self.choose(probs, perturbed.topk(self.top_k, dim=-1).indices)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        time_embedding: Tensor,
        *,
        noise: Tensor | None = None,
        expert_index: Tensor | None = None,
        with_losses: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Tokens x ``[B, T, D]`` to ``[B, T, D]``.

        Args:
            time_embedding: ``[B, time_size]``, or ``[1, time_size]`` for a batch of one noise level, whose
                experts are one MLP then, unless they are drawn.
            noise: Gumbel noise ``[B, T, M]`` to draw with; None takes torch's generator. Unused in
                evaluation.
            expert_index: int32 or int64 ``[B, T, k]``, experts that were drawn already, in the place of a
                draw.
            with_losses: whether to return the losses of balance beside the output, scalars by name, see
                :meth:`losses`.

        Raises ``ValueError`` or ``TypeError`` for an argument that does not fit.
        """
        check_tensors(x=x, time_embedding=time_embedding)
        check_shape("x", x, ("B", "T", self.hidden_size))
        batch, tokens = x.shape[:2]
        rows = "B or 1" if time_embedding.shape[:1] == (1,) else batch
        check_shape("time_embedding", time_embedding, (rows, self.time_size))
        probs, logits = self.router(time_embedding)
        if expert_index is not None or self.draws:
            of_all = probs.expand(batch, -1)
            if expert_index is not None:
                check_tensors(expert_index=expert_index)
                check_shape("expert_index", expert_index, (batch, tokens, self.top_k))
                check_dtype("expert_index", expert_index, torch.int32, torch.int64)
                check_device("expert_index", expert_index, x.device)
                check_range("expert_index", expert_index, self.num_experts, "the experts")
                found = self.choose(of_all, expert_index)
            else:
                if noise is None:
                    noise = gumbel_like(of_all.detach()[:, None].expand(-1, tokens, -1))
                check_noise(noise, x, self.num_experts)
                found = self.draw(of_all, noise)
            out = self._by_token(x, found)
        else:
            found = self.likeliest(probs)
            out = self._by_sample(x, found)
        return (out, self.losses(found, logits)) if with_losses else out

    def _by_token(self, x: Tensor, found: Routing) -> Tensor:
        """The experts of each token."""
        index, gate = found.expert_index.flatten(0, 1), found.expert_gate.flatten(0, 1)
        return self.mix(x, Routes.of_rows(index, gate, self.num_experts))

    def _by_sample(self, x: Tensor, found: Routing) -> Tensor:
        """The experts of each sample on all of its tokens."""
        if len(found.expert_index) == 1:
            return self._merged(*found[1:3])(x)
        out: Tensor = expert_mlp(
            x, self.weight_in, self.bias_in, self.weight_out, None, *found[1:3], True, backend=self.backend
        )
        return out

    def _merged(self, index: Tensor, gate: Tensor) -> MergedExperts:
        return merge_mlp(self.weight_in, self.bias_in, self.weight_out, None, index, gate, True)

    def merge_each(self, routing: Routing) -> list[MergedExperts]:
        """The experts of each noise level of :meth:`route` as one MLP of width k H.

        ``layer.merge_each(layer.route(embedding))[0](x)`` is, up to rounding, what the layer returns in
        evaluation for samples of that noise level. The weights are copies: training does not change them.
        """
        index, gate = routing.expert_index, routing.expert_gate
        check_tensors(expert_index=index, expert_gate=gate)
        check_shape("routing.expert_index", index, ("R", "k"))
        check_shape("routing.expert_gate", gate, tuple(index.shape))
        check_range("routing.expert_index", index, self.num_experts, "the experts")
        return [self._merged(*route) for route in zip(index.split(1), gate.split(1), strict=True)]

    def losses(self, found: Routing, logits: Tensor) -> dict[str, Tensor]:
        """``load_balance``: ``M sum_e mean(g_e) mean(chosen_e)``, at least k; no gradient through the choice.

        ``z``: the mean of ``log(sum exp z + 1e-6)^2``. As the largest logit is 0 already, it keeps them near
        each other, not small.
        """
        index, gate = (part.flatten(0, -2) for part in found[1:3])  # [R, k]
        rows, experts = max(1, len(index)), torch.arange(self.num_experts, device=index.device)
        chosen = index[..., None] == experts  # [R, k, M]
        share = chosen.sum((0, 1)) / rows
        importance = (gate[..., None] * chosen).sum((0, 1)) / rows
        z = (logits.exp().sum(-1) + TINY).log().square().mean()
        return {"load_balance": self.num_experts * (share * importance).sum(), "z": z}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sample={self.sample}"
