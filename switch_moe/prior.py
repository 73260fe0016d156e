"""The diffusion prior of Switch-DiT (arXiv 2403.09176): which timesteps should share experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops._checks import (
    check_device,
    check_integers,
    check_positive,
    check_shape,
    check_tensors,
    check_top_k,
)
from .ops.diffusion_prior import diffusion_prior_loss
from .ops.match_columns import MOST_TIMESTEPS, match_columns


def prior_table(
    num_timesteps: int, columns: int, active: int, alpha: float, device: torch.device | None = None
) -> Tensor:
    """0/1 table ``[N, columns]``: row t has ones in columns ``i_t .. i_t + active - 1``.

    ``i_t = round((t / (N - 1)) ** alpha * (columns - active))``: neighbouring timesteps share most of their
    columns, and the columns move fastest at large t. Float32, whatever the default type.
    """
    fraction = torch.arange(num_timesteps, dtype=torch.float64, device=device) / max(num_timesteps - 1, 1)
    first = torch.round(fraction**alpha * (columns - active))[:, None]
    column = torch.arange(columns, device=device)
    return ((column >= first) & (column < first + active)).float()


class DiffusionPrior(nn.Module):
    """Pulls the routers towards a table in which neighbouring timesteps share most of their experts.

    The table fixes how much any two timesteps share, not which expert is which, so each expert of the model
    is first matched to the column of the table that it resembles most.

    Args:
        depth: blocks, L. num_experts: experts per block, M. top_k: chosen per block, k.
        num_timesteps: diffusion timesteps, N.
        alpha: exponent of the table, positive; larger keeps small timesteps together for longer.

    Attributes:
        table: the prior, float32 0/1 ``[N, L*M]`` with ``k*L`` ones in each row; not part of the state_dict.

    Raises ``ValueError`` or ``TypeError`` for a setting that does not fit.
    """

    table: Tensor

    def __init__(
        self, depth: int, num_experts: int, top_k: int, num_timesteps: int = 1000, alpha: float = 4.0
    ) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        check_integers(depth=depth, num_timesteps=num_timesteps)
        check_positive(alpha=alpha)
        if num_timesteps > MOST_TIMESTEPS:
            raise ValueError(
                f"num_timesteps is {num_timesteps}; it must be at most 2^24, what float32 counts"
            )
        self.depth, self.num_experts, self.top_k = depth, num_experts, top_k
        self.num_timesteps, self.alpha = num_timesteps, alpha
        self.register_buffer("table", self._fresh_table(), persistent=False)
        self.register_load_state_dict_post_hook(_fill_table)

    def _fresh_table(self, device: torch.device | None = None) -> Tensor:
        slots, active = self.depth * self.num_experts, self.depth * self.top_k
        return prior_table(self.num_timesteps, slots, active, self.alpha, device)

    def reset_parameters(self) -> None:
        """Fills the table again, as after ``to_empty``; loading a state_dict does it too.

        A table that is still on the meta device stays there: nothing says where it belongs.
        """
        fresh = self._fresh_table(self.table.device)
        self.table = self.table.copy_(fresh) if self.table.dtype == fresh.dtype else fresh

    @torch.no_grad()
    def match(self, selected: Tensor, prices: Tensor | None = None, *, ties: Tensor | None = None) -> Tensor:
        """The column of the table that each expert of the model is matched to.

        Nothing waits for the host, and a CUDA graph can capture it.

        Args:
            selected: 0/1 ``[N, L*M]``, one where an expert is among the top k at a timestep.
            prices: optional, int64 ``[L*M]``, updated in place: begin with zeros and pass it again, and
                tables that change little between calls are matched faster (see ``linear_assignment``). How
                ties break then depends on earlier calls: to repeat a run exactly, save it too.
            ties: optional, ``[2, L*M]`` numbers whose order permutes the two sides, so that how ties break is
                a function of them; by default torch's generator on the device decides.

        Returns:
            int64 ``[L*M]``, a permutation at the least ``sum |selected - table|``. Ties break at random: both
            sides are permuted before the matching.
        """
        check_tensors(selected=selected)
        check_shape("selected", selected, tuple(self.table.shape))
        slots = self.table.shape[1]
        if ties is not None:
            check_tensors(ties=ties)
            check_shape("ties", ties, (2, slots))
            check_device("ties", ties, selected.device)
            of_model, of_table = ties.argsort(stable=True, dim=-1)
        elif selected.device.type == "cpu":
            of_model, of_table = (torch.randperm(slots, device="cpu") for _ in range(2))
        else:  # fewer launches
            of_model, of_table = torch.rand(2, slots, device=selected.device).argsort(-1)
        return match_columns(selected, self.table, of_model, of_table, prices=prices)

    def loss(self, probs: Tensor, t: Tensor, assignment: Tensor) -> Tensor:
        """Jensen-Shannon divergence of the routers' probabilities and the matched prior.

        Args:
            probs: router probabilities ``[B, L*M]``, block after block, each block's M summing to 1.
            t: timesteps, int32 or int64 ``[B]``. assignment: from :meth:`match`.

        Returns:
            A scalar in natural units, mean over the batch, differentiable in ``probs``.
        """
        active = self.top_k * self.depth
        return diffusion_prior_loss(probs, self.table, t, assignment, self.depth, active)

    def extra_repr(self) -> str:
        return (
            f"depth={self.depth}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"num_timesteps={self.num_timesteps}, alpha={self.alpha}"
        )


def _fill_table(prior: DiffusionPrior, _: object) -> None:
    prior.reset_parameters()
