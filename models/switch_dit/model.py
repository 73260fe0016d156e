"""SwitchDiT: DiT with a timestep-routed mixture of experts at the start of every block.

Switch-DiT: Park et al., ECCV 2024 (arXiv 2403.09176). DiT: Peebles and Xie (arXiv 2212.09748). DTR: Park et
al. (arXiv 2310.07138).

Legend: B samples, C channels, H, W image size, p patch size, T = (H/p)(W/p) tokens, D hidden size, L blocks,
M experts, k experts per sample, N diffusion timesteps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from switch_dit.layers import Block, ChannelMask, FinalLayer, LabelEmbedder, PatchEmbed, TimestepEmbedder
from switch_dit.mode import ClampedRMSNorm, NormedAttention
from switch_dit.router_losses import balance_losses, matched_prior_loss
from switch_dit.systems import SYSTEMS, Shape, options_of
from switch_dit.tables import dtr_mask, sincos_positions, table_row
from switch_moe import DiffusionPrior, Router, Routing, SwitchMoE, TokenMoE, set_top_k
from switch_moe.ops._backend import BACKENDS
from switch_moe.ops._checks import (
    FLOATS,
    check_choice,
    check_device,
    check_dtype,
    check_flags,
    check_integers,
    check_numbers,
    check_positive,
    check_range,
    check_shape,
    check_tensors,
)
from switch_moe.router import backend_beside
from switch_moe.streams import SideStream

ROUTINGS = ("switch", "dtr", "none", *SYSTEMS)


class Prepared(NamedTuple):
    """What a forward needs of a timestep that all samples share."""

    embedding: Tensor  # [1, D]
    routings: list[tuple[Any, ...]]  # what each block takes beside tokens and condition


class Preset(NamedTuple):
    """The shape of a model with a name."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int


# Hidden size, depth and heads: "tiny" is the default run's, the others are the published ones.
_SIZES = {
    "tiny": (128, 6, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
PRESETS = {f"{size}/{patch}": Preset(*shape, patch) for size, shape in _SIZES.items() for patch in (2, 4, 8)}


class SwitchDiT(ModelMixin, ConfigMixin):
    """Switch-DiT (``routing="switch"``), its baselines DTR (``"dtr"``) and DiT (``"none"``), and the family.

    The family are DiTs with other mixtures, see :mod:`switch_dit.systems`, by the name of ``routing``.

    Args:
        input_size: height and width of an image, or of a latent.
        patch_size: p, which divides input_size.
        in_channels: C.
        hidden_size: D, a multiple of 4 and of num_heads.
        depth: L.
        num_heads: attention heads.
        mlp_ratio: inner size of a block's MLP, in units of D.
        num_classes: classes of the labels; 0 makes an unconditional model.
        class_dropout_prob: share of labels that training replaces by the null label.
        learn_sigma: predict 2C channels, the noise and the interpolation of its log variance.
        routing: the kind of model, see above.
        num_experts: M, in every block.
        top_k: k.
        mixture: options of the other systems of the family by name, see :data:`switch_dit.systems.SYSTEMS`;
            those that are not given have their defaults.
        num_timesteps: N.
        frequency_shift, time_scale, time_offset: how timesteps are embedded, see
            :class:`switch_dit.layers.TimestepEmbedder`. The defaults are DiT's; weights of other codes need
            others (:mod:`switch_dit.upcycle`).
        backend: of the experts and, but for ``native`` and ``cuda``, of the router: see
            :func:`switch_moe.ops.expert_linear`.

    The type of the weights may be any floating one; timesteps and routers are computed in float32 at least.

    As a model of diffusers it has ``save_pretrained`` and ``from_pretrained``, ``config``,
    ``enable_gradient_checkpointing``, ``enable_layerwise_casting`` and ``compile_repeated_blocks``.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    ignore_for_config = ("backend",)  # it belongs to the machine
    _supports_gradient_checkpointing = True
    _repeated_blocks = ("Block", "ModeBlock")
    _no_split_modules = ("Block", "ModeBlock")
    # In 8 bits timesteps would choose other experts; the first and the last layer are small.
    _skip_layerwise_casting_patterns = ("_embed", "router", "moe", "norm", "final_layer")

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        routing: str = "switch",
        num_experts: int = 3,
        top_k: int = 2,
        mixture: dict[str, Any] | None = None,
        num_timesteps: int = 1000,
        frequency_shift: int = 0,
        time_scale: float = 1.0,
        time_offset: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_integers(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size,
            depth=depth, num_heads=num_heads, num_timesteps=num_timesteps,
        )  # fmt: skip
        check_integers(0, num_classes=num_classes)
        check_positive(mlp_ratio=mlp_ratio)
        check_numbers(0, 1, "between 0 and 1", class_dropout_prob=class_dropout_prob)
        check_flags(learn_sigma=learn_sigma)
        check_integers(0, 1, frequency_shift=frequency_shift)
        check_numbers(time_scale=time_scale, time_offset=time_offset)
        check_choice("routing", routing, ROUTINGS)
        check_choice("backend", backend, BACKENDS)
        if input_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}; it must divide input_size, {input_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size is {hidden_size}; it must be a multiple of 4 and of num_heads, {num_heads}"
            )
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes, self.learn_sigma, self.routing = num_classes, learn_sigma, routing
        self.num_timesteps, self.gradient_checkpointing = num_timesteps, False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(
            hidden_size, frequency_shift=frequency_shift, time_scale=time_scale, time_offset=time_offset
        )
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
        tokens = (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, hidden_size), requires_grad=False)
        make_moe = {
            "switch": lambda: SwitchMoE(hidden_size, num_experts, top_k, router=False, backend=backend),
            "dtr": ChannelMask,
            "none": lambda: None,
        }
        self.options = options = options_of(routing, mixture)

        def make_block(index: int) -> nn.Module:
            if routing in SYSTEMS:
                shape = Shape(hidden_size, num_heads, mlp_ratio, num_experts, top_k, backend, index, depth)
                return SYSTEMS[routing].make_block(shape, options)
            return Block(hidden_size, num_heads, mlp_ratio, make_moe[routing]())

        self.blocks = nn.ModuleList(make_block(index) for index in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        if routing == "switch":
            of_router = backend_beside(backend)
            self.router = Router(depth, hidden_size, num_experts, top_k, backend=of_router)
            self.prior = DiffusionPrior(depth, num_experts, top_k, num_timesteps)
            slots = torch.empty(depth * num_experts, dtype=torch.int64)
            self.register_buffer("assignment", slots, persistent=False)
        if routing == "dtr":
            mask = torch.empty(num_timesteps, hidden_size, dtype=torch.float32)
            self.register_buffer("dtr_mask", mask, persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)
        self.initialize_weights()

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of this class that make such a model, as a checkpoint keeps them."""
        return {name: value for name, value in self.config.items() if not name.startswith("_")}

    def active_parameters(self) -> int:
        """Parameters that a token meets, on average where experts choose: all, less the experts left out."""
        left_out = 0.0
        for module in self.modules():
            if isinstance(module, (SwitchMoE, TokenMoE)):
                count = module.num_experts
                active = min(count, getattr(module, "capacity", None) or module.top_k)
                own = dict(module.named_parameters(recurse=False))
                of_experts = [p for name, p in own.items() if name.startswith(("weight", "bias"))]
                left_out += sum(p.numel() for p in of_experts) * (1 - active / count)
        return round(sum(p.numel() for p in self.parameters()) - left_out)

    def at_step(self, number: int, steps: int) -> bool:
        """Tells mixtures that change while they train the number of the step, from 0, of how many.

        Returns whether one has changed in another way than the values of its tensors, so that what was
        captured of a forward does not fit any more.
        """
        changes = [
            m.at_step(number, steps) for m in self.modules() if m is not self and hasattr(m, "at_step")
        ]
        return any(changes)

    @property
    def pool(self) -> int:
        """Batches must be of a multiple of so many images, among whose tokens an expert chooses together."""
        return self.options.get("pool", 1) or 1  # 0 is the whole batch, of any size

    @property
    def draws(self) -> bool:
        """Whether the mixtures of a forward draw random numbers, see ``expert_noise`` there."""
        return any(getattr(block, "draws", False) for block in self.blocks)

    def _real_device(self) -> torch.device:
        """The device of the parameters that are not on the meta device any more, if there are any."""
        return next((p.device for p in self.parameters() if not p.is_meta), self.pos_embed.device)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Fills what the state_dict does not hold: frequencies, the prior's table and assignment, DTR's mask.

        They go to the device of the parameters. Loading a state_dict calls this, so a model that was built on
        the meta device is complete after ``load_state_dict(..., assign=True)``, or ``to_empty`` and
        ``load_state_dict``.
        """
        device = self._real_device()
        self.t_embedder.reset_rates(device)
        if self.routing == "switch":
            self.prior.table = _on(device, self.prior.table)
            self.prior.reset_parameters()
            self.assignment = _on(device, self.assignment)
            self.assignment.copy_(torch.arange(len(self.assignment), device=device))
        if self.routing == "dtr":
            self.dtr_mask = _on(device, self.dtr_mask)
            self.dtr_mask.copy_(dtr_mask(*self.dtr_mask.shape, device))

    @torch.no_grad()
    def reset_positions(self) -> None:
        """Fills the table of positions, which is a parameter because the official state_dict has it."""
        device = self._real_device()
        if self.pos_embed.device != device:
            empty = torch.empty_like(self.pos_embed, device=device)
            self.pos_embed = nn.Parameter(empty, requires_grad=False)
        grid = self.input_size // self.patch_size
        table = sincos_positions(self.pos_embed.shape[-1], grid, device)[None]
        if hasattr(self.pos_embed, "device_mesh"):  # FSDP has it in shards
            from torch.distributed.tensor import distribute_tensor

            table = distribute_tensor(table, self.pos_embed.device_mesh, self.pos_embed.placements)
        self.pos_embed.copy_(table)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fills all parameters and buffers, also after ``to_empty``.

        As in DiT: Xavier for linear layers, zeros where a fresh block must be the identity; the positions are
        a fixed table.
        """
        self.reset_buffers()
        self.reset_positions()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for adaptive in [*self.blocks, self.final_layer]:
            if hasattr(adaptive, "adaLN_modulation"):
                nn.init.zeros_(adaptive.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        for module in self.modules():
            if isinstance(module, (SwitchMoE, Router, TokenMoE, ClampedRMSNorm, NormedAttention)):
                module.reset_parameters()

    def block_routings(
        self, routing: Routing | None, t: Tensor, time_embedding: Tensor, noise: Tensor | None = None
    ) -> list[tuple[Tensor | None, ...]]:
        """What each block routes by: the tensors of its Routing, DTR's masks [B, D] at t, or, in the other
        systems, the time embedding [B, D] and, if given, the block's noise of [B, L, T, M].
        """
        if routing is not None:
            blocks = routing.scheduled(self.router.backend).blocks()
            return [(*block[:3], block.schedule) for block in blocks]
        if self.routing in SYSTEMS:
            if noise is None:
                return [(time_embedding,)] * len(self.blocks)
            return [(time_embedding, of_block) for of_block in noise.unbind(1)]
        return [(self.dtr_mask[table_row(t)],) if self.routing == "dtr" else ()] * len(self.blocks)

    def set_top_k(self, top_k: int) -> None:
        """Chooses k experts from now on, see :func:`switch_moe.set_top_k`.

        The config keeps the k that the model was trained with: ``set_top_k(model.config.top_k)`` takes it
        back.
        """
        set_top_k(self, top_k)

    def route(self, time_embedding: Tensor) -> Routing:
        """The routing of all blocks for time embeddings [B, D]; only with ``switch`` and ``mode``.

        That of ``mode`` is the routing of an evaluation.
        """
        if self.routing == "mode":
            of_blocks = [block.moe.route(time_embedding)[:3] for block in self.blocks]
            return Routing(*(torch.stack(parts) for parts in zip(*of_blocks, strict=True)))
        self._check_switch()
        return self.router(time_embedding)

    @torch.no_grad()
    def route_all_timesteps(self) -> Routing:
        """The current routing of all N timesteps; only with ``routing="switch"``."""
        self._check_switch()
        timesteps = torch.arange(self.num_timesteps, device=self.pos_embed.device)
        return self.router(self.t_embedder(timesteps), selected=True)

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
        expert_noise: Tensor | None = None,
        prepared: Prepared | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Images [B, C, H, W], t [B] in [0, N), labels [B] to noise, then variance: [B, C or 2C, H, W].

        t may be of a floating type, for a process in continuous time: it is embedded as it is, the router
        sees that embedding, and the prior and DTR's masks take the row floor(t) of their tables.

        t may be [1], one timestep for the whole batch: then it is embedded and routed once, and a block
        merges its experts once. H and W are ``input_size``, labels are int64, num_classes standing for none;
        an unconditional model takes none. ``with_prior`` adds the diffusion prior loss: a scalar, zero
        without experts. Without ``match`` it takes the assignment of the last call that matched. In the
        systems of :mod:`switch_dit.systems` it adds their losses of balance, each by its weight.

        Training is random in these places, unless it is told the outcome: ``drop``, bool [B], says whose
        labels are left out, ``ties``, [2, L*M], how the matching breaks ties (see DiffusionPrior.match), and
        ``expert_noise``, Gumbel noise [B, L, T, M], which experts are drawn, in the systems that draw them.

        ``prepared`` is what :class:`switch_dit.merged.MergedSwitchDiT` has computed of t beforehand.

        Raises ``ValueError`` or ``TypeError`` for an argument that does not fit; timesteps and labels are
        looked at on a CPU only.
        """
        check_flags(with_prior=with_prior, match=match)
        self._check_inputs(x, t, y)
        if drop is not None:
            check_tensors(drop=drop)
            check_dtype("drop", drop, torch.bool)
            check_shape("drop", drop, (x.shape[0],))
            if y is None or self.y_embedder.dropout == 0:
                raise ValueError("drop is given; the model has no null label to put in the place of a label")
        if expert_noise is not None:
            self._check_noise(expert_noise, x)
        if prepared is not None:
            e, routing = prepared.embedding, None
            if with_prior:
                raise ValueError("prepared is given; the prior loss needs the routing, which is not in it")
        else:
            e = self.t_embedder(t)  # [B, D]
            # By the timestep, never by the label.
            routing = self.route(e) if self.routing == "switch" else None
        c = e if y is None else e + self.y_embedder(y, drop)  # [B, D]
        c = c.to(self.final_layer.linear.weight.dtype)
        if with_prior:
            # The prior needs the routing only, and little of a GPU. SideStream's two conditions hold: the
            # routing lives until join below, and embedder and router run outside autocast.
            with SideStream(x.device) as side:
                prior_loss = self.diffusion_prior_loss(routing, t, match, ties)
        balance: list[Tensor] = []
        if with_prior and routing is not None:
            balance += balance_losses(routing, self.router, e, self.options)
        routings = prepared.routings if prepared else self.block_routings(routing, t, e, expert_noise)
        out = self.denoise(x, c, routings, balance)
        if not with_prior:
            return out
        side.join()
        return out, sum(balance, prior_loss)

    def denoise(
        self,
        x: Tensor,
        c: Tensor,
        routings: Iterable[tuple[Any, ...]],
        balance: list[Tensor] | None = None,
    ) -> Tensor:
        """Images [B, C, H, W] through the blocks, to [B, C or 2C, H, W].

        c is the condition [B, D], or [1, D] for all samples; ``routings`` has what each block takes after it.
        ``balance`` gets the weighted losses of blocks that are mixtures.
        """
        h = self.x_embedder(x) + self.pos_embed  # [B, T, D]
        for block, of_block in zip(self.blocks, routings, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h, c, *of_block)
            else:
                h = block(h, c, *of_block)
            if isinstance(h, tuple):
                h, loss, *observed = h
                if balance is not None:
                    balance.append(loss)
                if observed:
                    block.learn(*observed)
        return self.unpatchify(self.final_layer(h, c))

    def export_merged(self, timestep: int | float) -> nn.Module:
        """The model at one timestep as torch's own layers, with one dense layer for the experts of a block.

        See :class:`switch_dit.merged.DenseStep`. ``ValueError`` for a timestep outside [0, N).
        """
        from switch_dit.merged import DenseStep

        return DenseStep(self, timestep)

    def _check_switch(self) -> None:
        if self.routing != "switch":
            raise ValueError(f"routing is {self.routing!r}; only a model with 'switch' has a router")

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        check_tensors(x=x, t=t)
        check_shape("x", x, ("B", self.in_channels, self.input_size, self.input_size))
        check_dtype("x", x, *FLOATS)
        check_device("x", x, self.pos_embed.device)
        check_device("t", t, x.device)
        check_shape("t", t, ("B or 1" if t.shape == (1,) else x.shape[0],))
        check_dtype("t", t, *FLOATS, torch.int64, torch.int32)
        check_range("t", t, self.num_timesteps, "the timesteps")
        if (y is None) != (self.y_embedder is None):
            found, wanted = ("None", "labels [B]") if y is None else ("given", "None")
            raise ValueError(f"y is {found}; a model with {self.num_classes} classes takes {wanted}")
        if y is not None:
            check_tensors(y=y)
            check_device("y", y, x.device)
            check_shape("y", y, (x.shape[0],))
            check_dtype("y", y, torch.int64, torch.int32)
            labels = self.y_embedder.embedding_table.num_embeddings
            check_range("y", y, labels, "the classes and, if trained with dropout, the null label")

    def _check_noise(self, noise: Tensor, x: Tensor) -> None:
        if not self.draws:
            raise ValueError("expert_noise is given; the model draws no experts")
        check_tensors(expert_noise=noise)
        check_shape("expert_noise", noise, self.noise_shape(x.shape[0]))
        check_device("expert_noise", noise, x.device)

    def noise_shape(self, batch: int) -> tuple[int, int, int, int]:
        """The shape of ``expert_noise``: B, L, T, M."""
        return batch, len(self.blocks), self.pos_embed.shape[1], self.config.num_experts

    def diffusion_prior_loss(
        self, routing: Routing | None, t: Tensor, match: bool, ties: Tensor | None = None
    ) -> Tensor:
        """The diffusion prior loss, a scalar, of the routing at t; with ``match``, of a new assignment."""
        if routing is None:
            return torch.zeros((), device=t.device)
        return matched_prior_loss(self, routing, table_row(t), match, ties)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Patches [B, T, p*p*C_out] to images [B, C_out, H, W]."""
        grid, p = self.input_size // self.patch_size, self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=p, q=p)

    def forward_with_prior(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        match: bool = True,
        drop: Tensor | None = None,
        ties: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``forward`` with ``with_prior``. It calls the module, so that hooks (FSDP's) run."""
        return self(x, t, y, with_prior=True, match=match, drop=drop, ties=ties)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598) on all channels of the noise.

        The first half of the batch has the labels, the second half the null label, and both see the x of the
        first half. ``cfg_scale`` must be a finite number.
        """
        check_numbers(cfg_scale=cfg_scale)
        check_tensors(x=x)
        check_shape("x", x, ("2B", "C", "H", "W"))
        if x.shape[0] % 2:
            raise ValueError(f"x has {x.shape[0]} rows; their number must be even: with labels, then without")
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        noise, rest = out.split([self.in_channels, self.out_channels - self.in_channels], dim=1)
        with_label, without = noise.chunk(2)
        guided = without + cfg_scale * (with_label - without)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def _on(device: torch.device, buffer: Tensor) -> Tensor:
    """The buffer, or an uninitialised one like it on ``device`` where it is elsewhere."""
    return buffer if buffer.device == device else torch.empty_like(buffer, device=device)


def _after_loading(model: SwitchDiT, incompatible: Any) -> None:
    if any(key.split(".")[-1] == "pos_embed" for key in incompatible.missing_keys):
        model.reset_positions()
    model.reset_buffers()


def create_model(preset: str, **settings: object) -> SwitchDiT:
    """A SwitchDiT of a named size, for example ``create_model("XL/2", num_classes=1000)``."""
    check_choice("preset", preset, PRESETS)
    return SwitchDiT(**{**PRESETS[preset]._asdict(), **settings})
