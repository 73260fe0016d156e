"""Switch-DiT's mixture of experts in MM-DiT: the blocks of Stable Diffusion 3, and blocks of several views.

MM-DiT: Esser et al. (arXiv 2403.03206). Switch-DiT: Park et al. (arXiv 2403.09176), which has no text; the
composition is ours. A block of MM-DiT takes image and text tokens x and c. With experts it computes::

    r      = x (1 + m(x))                  the router sees the timestep embedding, never the text
    c', r' = block(r, c, temb)
    x'     = r' + (1 - (1 + m(x))) x

Experts that are zero change no bit of what the block computes.

Legend: B samples, V views, T image tokens, S text tokens, D hidden size, L blocks, M experts, N timesteps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import Tensor, nn

from switch_dit.layers import linear_in_float32
from switch_dit.router_losses import matched_prior_loss
from switch_dit.tables import table_row
from switch_moe import DiffusionPrior, Router, Routing, SwitchMoE, set_top_k
from switch_moe.ops._checks import (
    FLOATS,
    check_dtype,
    check_flags,
    check_integers,
    check_range,
    check_shape,
    check_tensors,
)
from switch_moe.ops._operator import without_autocast
from switch_moe.router import backend_beside
from switch_moe.streams import SideStream


def switch_block(
    block: nn.Module, moe: SwitchMoE, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    *arguments: Any, time_embedding: Tensor | None = None, routing: Routing | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """A joint block with the experts ``moe`` on its image stream: what it returns, text then image tokens.

    Args:
        block: called as ``block(hidden_states, encoder_hidden_states, temb, *arguments)``.
        hidden_states: image tokens ``[B, T, D]``. encoder_hidden_states: text tokens ``[B, S, D]``.
        temb: the condition ``[B, D]``, of timestep and text.
        time_embedding, routing: what ``moe`` routes by, exactly one of the two.
    """
    # The mixture is not fused with the product: under autocast the stream keeps its float32 this way.
    mixture = moe(hidden_states, time_embedding, routing=routing)  # [B, T, D]
    routed = torch.addcmul(hidden_states, hidden_states, mixture)
    context, out = block(routed, encoder_hidden_states, temb, *arguments)
    return context, torch.addcmul(out, hidden_states, mixture, value=-1)


class SwitchJointBlock(nn.Module):
    """Any joint block of MM-DiT with experts on its image stream, see :func:`switch_block`.

    Args:
        block: called as ``block(hidden_states, encoder_hidden_states, temb)``, to text and image tokens.
        hidden_size: D. num_experts: M. top_k: experts per row.
        router: whether the block has its own router, see :class:`switch_moe.SwitchMoE`.
        backend: see :class:`switch_moe.SwitchMoE`.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden_size: int,
        num_experts: int = 3,
        top_k: int = 2,
        *,
        router: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(block, nn.Module):
            raise TypeError(f"block is a {type(block).__name__}; it must be a module")
        self.block = block
        self.moe = SwitchMoE(hidden_size, num_experts, top_k, router=router, backend=backend)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *arguments: Any,
        time_embedding: Tensor | None = None, routing: Routing | None = None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """Text tokens (None after a last block) and image tokens; see :func:`switch_block`."""
        tokens = hidden_states, encoder_hidden_states
        return switch_block(
            self.block, self.moe, *tokens, temb, *arguments, time_embedding=time_embedding, routing=routing
        )


class JoinedViews:
    """An attention processor of diffusers for rows that are views: the V views of a sample see each other.

    Rows are (sample, view). All image tokens of a sample come first, then all of its text tokens.
    """

    def __init__(self, num_views: int) -> None:
        self.num_views, self.inner = num_views, JointAttnProcessor2_0()

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *arguments: Any,
        **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        both = hidden_states, encoder_hidden_states  # [B V, T, D], [B V, S, D]
        # Projections are of each token, so joining the rows joins the attention and nothing else.
        joined = (rearrange(rows, "(b v) t d -> b (v t) d", v=self.num_views) for rows in both)
        outputs = self.inner(attn, *joined, *arguments, **options)
        return tuple(rearrange(rows, "b (v t) d -> (b v) t d", v=self.num_views) for rows in outputs)


class MultiViewJointBlock(JointTransformerBlock):
    """A joint block of several views, as in SplatFlow (arXiv 2411.16443): rows are (sample, view).

    Parameters and names are those of diffusers' JointTransformerBlock.

    Args:
        dim: D. num_attention_heads, attention_head_dim: of the attention.
        num_views: V.
        context_pre_only: whether it is the last block, which drops the text. qk_norm: see diffusers.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        num_views: int,
        context_pre_only: bool = False,
        qk_norm: str | None = None,
    ) -> None:
        check_integers(num_views=num_views)
        super().__init__(dim, num_attention_heads, attention_head_dim, context_pre_only, qk_norm)
        self.num_views = num_views
        self.attn.set_processor(JoinedViews(num_views))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *arguments: Any
    ) -> tuple[Tensor | None, Tensor]:
        """Image tokens ``[B V, T, D]``, text tokens ``[B V, S, D]``, temb ``[B V, D]``: text, then image."""
        if hidden_states.shape[0] % self.num_views:
            raise ValueError(
                f"hidden_states has {hidden_states.shape[0]} rows; their number must be a multiple of "
                f"num_views, {self.num_views}"
            )
        return super().forward(hidden_states, encoder_hidden_states, temb, *arguments)


class SwitchSD3(nn.Module):
    """An SD3 transformer of diffusers with a timestep-routed mixture of experts in every block.

    The transformer stays what it is: loaded and saved by diffusers, under its own names. Fresh experts are
    zero, so the output is that of the transformer to the bit until they are trained.

    Args:
        transformer: the model, in any floating type and on any device; it is wrapped, not copied.
        num_experts: M. top_k: experts per sample.
        num_timesteps: N; timesteps are in [0, N].
        backend: see :class:`switch_moe.SwitchMoE`.

    The state_dict has the transformer's as ``transformer.*``, ``router.*`` and, of block i,
    ``experts.i.*``. Routers and what they see are computed in float32 at least; the experts take the
    type of the transformer. ``transformer.enable_gradient_checkpointing()`` is for blocks with their experts.
    Hooks of the transformer as a whole do not run, those of its parts do: its blocks are driven from here.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        num_experts: int = 3,
        top_k: int = 2,
        *,
        num_timesteps: int = 1000,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(transformer, SD3Transformer2DModel):
            raise TypeError(
                f"transformer is a {type(transformer).__name__}; it must be diffusers' SD3Transformer2DModel"
            )
        self.transformer = transformer
        depth, hidden_size = len(transformer.transformer_blocks), transformer.inner_dim
        like = transformer.proj_out.weight
        self.experts = nn.ModuleList(
            SwitchMoE(hidden_size, num_experts, top_k, router=False, backend=backend) for _ in range(depth)
        ).to(like.device, like.dtype)
        of_router = backend_beside(backend)
        self.router = Router(depth, hidden_size, num_experts, top_k, backend=of_router).to(like.device)
        self.prior = DiffusionPrior(depth, num_experts, top_k, num_timesteps)
        self.num_timesteps = num_timesteps
        self.register_buffer("assignment", torch.empty(depth * num_experts).long(), persistent=False)
        self.reset_buffers()
        self.register_load_state_dict_post_hook(lambda model, _: model.reset_buffers())

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Fills what the state_dict does not hold, the prior's table and assignment, where the router is."""
        device = self.router.weight.device
        self.prior.table = torch.empty_like(self.prior.table, device=device)
        self.prior.reset_parameters()
        self.assignment = torch.arange(len(self.assignment), device=device)

    @property
    def config(self) -> Any:
        """The transformer's."""
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        """The type of the transformer."""
        return self.transformer.dtype

    def set_top_k(self, top_k: int) -> None:
        """See :func:`switch_moe.set_top_k`; ``set_top_k(model.prior.top_k)`` takes it back."""
        set_top_k(self, top_k)

    def time_embedding(self, timestep: Tensor) -> Tensor:
        """What the router sees: the transformer's embedding of timesteps [B], without text, [B, D]."""
        embed = self.transformer.time_text_embed
        layers = embed.timestep_embedder
        with without_autocast(timestep.device):
            hidden = layers.act(linear_in_float32(layers.linear_1, embed.time_proj(timestep)))
            return linear_in_float32(layers.linear_2, hidden)

    def route(self, timestep: Tensor) -> Routing:
        """The routing of all blocks at timesteps [B]."""
        return self.router(self.time_embedding(timestep))

    @torch.no_grad()
    def route_all_timesteps(self) -> Routing:
        """The current routing of the timesteps 0 to N - 1."""
        timesteps = torch.arange(self.num_timesteps, device=self.router.weight.device)
        return self.router(self.time_embedding(timesteps), selected=True)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        block_controlnet_hidden_states: list[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
        *,
        with_prior: bool = False,
        match: bool = True,
        ties: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor, ...]:
        """Latents [B, C, H, W] at timesteps [B] in [0, N], with text: the prediction [B, C_out, H, W].

        The arguments are those of ``SD3Transformer2DModel.forward``. timestep may be [1], one for the whole
        batch: a block then merges its experts once.

        With ``with_prior`` it returns the prediction and the diffusion prior loss, a scalar, whatever
        ``return_dict`` says. ``match`` and ``ties`` are as in :meth:`switch_dit.SwitchDiT.forward`, and a
        timestep of a floating type takes the row floor(t) of the prior, N the last one.

        Raises ``ValueError`` or ``TypeError`` for an argument that does not fit; timesteps are looked at on a
        CPU only.
        """
        check_flags(with_prior=with_prior, match=match, return_dict=return_dict)
        model, extra = self.transformer, joint_attention_kwargs
        self._check_inputs(hidden_states, encoder_hidden_states, pooled_projections, timestep, extra)
        routing = self.route(timestep)
        if with_prior:
            # SideStream's two conditions hold: the routing lives until join below, and what embeds and routes
            # timesteps runs outside autocast.
            with SideStream(hidden_states.device) as side:
                row = table_row(timestep).clamp(max=self.num_timesteps - 1)
                prior_loss = matched_prior_loss(self, routing, row, match, ties)
        grid = [size // model.config.patch_size for size in hidden_states.shape[-2:]]
        hidden = model.pos_embed(hidden_states).contiguous()  # [B, T, D]
        temb = model.time_text_embed(timestep, pooled_projections)  # [B, D]
        context = model.context_embedder(encoder_hidden_states)  # [B, S, D]
        of_blocks = routing.scheduled(self.router.backend).blocks()
        blocks = zip(model.transformer_blocks, self.experts, of_blocks, strict=True)
        for number, (block, moe, of_block) in enumerate(blocks):
            if number not in (skip_layers or ()):
                step = partial(switch_block, block, moe, routing=of_block)
                if model.gradient_checkpointing and torch.is_grad_enabled():
                    step = partial(model._gradient_checkpointing_func, step)
                context, hidden = step(hidden, context, temb, extra)
            if block_controlnet_hidden_states is not None and not block.context_pre_only:
                # Each residual is for as many blocks in a row.
                share = len(model.transformer_blocks) / len(block_controlnet_hidden_states)
                hidden = hidden + block_controlnet_hidden_states[int(number / share)]
        patches = model.proj_out(model.norm_out(hidden, temb))  # [B, T, p*p*C_out]
        p = model.config.patch_size
        out = rearrange(
            patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p
        ).contiguous()
        if with_prior:
            side.join()
            return out, prior_loss
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _check_inputs(
        self, hidden_states: Any, encoder_hidden_states: Any, pooled_projections: Any, timestep: Any,
        joint_attention_kwargs: Any,
    ) -> None:  # fmt: skip
        config, tensors = self.config, {"hidden_states": hidden_states, "timestep": timestep}
        text = {
            "encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections
        }  # fmt: skip
        check_tensors(**tensors, **text)
        check_shape("hidden_states", hidden_states, ("B", config.in_channels, "H", "W"))
        rows = hidden_states.shape[0]
        check_shape("encoder_hidden_states", encoder_hidden_states, (rows, "S", config.joint_attention_dim))
        check_shape("pooled_projections", pooled_projections, (rows, config.pooled_projection_dim))
        check_shape("timestep", timestep, ("B or 1" if timestep.shape == (1,) else rows,))
        check_dtype("timestep", timestep, *FLOATS, torch.int64, torch.int32)
        check_range("timestep", timestep, self.num_timesteps + 1, "0 to num_timesteps")
        unknown = {"scale", "ip_adapter_image_embeds"} & set(joint_attention_kwargs or ())
        if unknown:
            raise ValueError(
                f"joint_attention_kwargs has {min(unknown)!r}; a scale of LoRA and images of an IP-Adapter "
                "are not supported"
            )
