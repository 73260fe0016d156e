"""Second derivatives: the kernels have first ones only, so the reference is differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._operator import without_autocast


def create_graph() -> bool:
    """Whether the gradients of a running backward must be differentiable themselves.

    In a compiled program they never are: torch.compile refuses to differentiate its backward.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``inputs`` through ``function``, in plain PyTorch, with a graph of their own.

    Args:
        function: the reference, on all the inputs.
        inputs: what the operation saved for its backward.
        grads: gradients of the outputs of ``function``; None counts as zero.
        wanted: for each input, whether its gradient is needed; the others get None.
    """
    with torch.enable_grad(), without_autocast(next(t.device for t in inputs if t is not None)):
        # Views stand for the inputs: one input may have been computed from another, and then the gradient of
        # the other must not go through it.
        leaves = [
            tensor.view_as(tensor) if tensor is not None and want else tensor
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        through, weights = zip(*pairs, strict=True)
        asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if leaf is not None and want]
        found = torch.autograd.grad(through, asked, weights, create_graph=True, allow_unused=True)
    rest = iter(found)
    return [next(rest) if want else None for want in wanted]
