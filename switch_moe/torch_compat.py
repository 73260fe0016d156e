"""Everything this package asks of torch that torch does not promise to keep, in one file.

Each function has an answer where a later torch has no such question any more.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad


def cpu_has(feature: str) -> bool:
    """Whether torch finds ``feature`` (``amx_tile``, ``avx512_bf16``, ...) on this processor."""
    ask = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return ask is not None and bool(ask())


def softmax_backward(grad: Tensor, probs: Tensor) -> Tensor:
    """The gradient of the logits of a softmax over the last dimension: ``p (g - <g, p>)``."""
    gradient: Tensor = torch.ops.aten._softmax_backward_data(grad, probs, -1, probs.dtype)
    return gradient


def silu(x: Tensor) -> Tensor:
    """``x sigmoid(x)``; under a transform of two operations, since torch has no forward-mode derivative of
    the gradient of its own.
    """
    return x * torch.sigmoid(x) if transforming() else torch.nn.functional.silu(x)


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of ``SiLU(x)``."""
    gradient: Tensor = torch.ops.aten.silu_backward(grad, x)
    return gradient


def transforming() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, ...) or forward-mode AD is at work."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def tracing() -> bool:
    """Whether make_fx records the operations, as for torch.func.linearize: then values are not to be read."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def exporting_onnx() -> bool:
    """Whether torch.onnx.export traces this call; asked without importing torch.onnx, which is heavy."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())


def values(tensor: Tensor) -> Tensor:
    """The tensor below the wrappers of torch.func, whose values can be read."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def tf32_allowed() -> bool:
    """Whether the user lets matrix products of float32 on a GPU round their operands to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
