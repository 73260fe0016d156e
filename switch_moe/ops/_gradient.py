"""Second derivatives: the kernels have first ones only, so the reference is differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..torch_compat import transforming
from ._operator import without_autocast


def create_graph() -> bool:
    """Whether the gradients of a running backward must be differentiable themselves.

    They must where the caller asked for a graph of them, and where a transform is at work: forward-mode AD
    over a backward differentiates it too. In a compiled program they never are: torch.compile refuses that.
    """
    return (torch.is_grad_enabled() or transforming()) and not torch.compiler.is_compiling()


def differentiable_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``inputs`` through ``function``, in plain PyTorch, with a graph of their own.

    ``torch.func.vjp`` takes each input for a variable of its own, also where one was computed from another,
    and works below other transforms.

    Args:
        function: the reference, on all the inputs.
        inputs: what the operation saved for its backward.
        grads: gradients of the outputs of ``function``; None counts as zero.
        wanted: for each input, whether its gradient is needed; the others get None.
    """
    places = [i for i, want in enumerate(wanted) if want and inputs[i] is not None]

    def of_wanted(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for place, leaf in zip(places, leaves, strict=True):
            given[place] = leaf
        outputs = function(*given)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    with without_autocast(next(tensor.device for tensor in inputs if tensor is not None)):
        # torch types vjp for has_aux too, which returns three things.
        outputs, pull = torch.func.vjp(of_wanted, *(inputs[place] for place in places))  # type: ignore[misc]
        pairs = zip(outputs, grads, strict=True)
        found = pull(tuple(torch.zeros_like(out) if grad is None else grad for out, grad in pairs))
    of_place = dict(zip(places, found, strict=True))
    return [of_place.get(i) for i in range(len(wanted))]
