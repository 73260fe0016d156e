"""Where a run computes, and in which precision."""

from __future__ import annotations

import os

import torch

from switch_moe.ops._checks import check_choice
from switch_moe.torch_compat import cpu_has


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is a GPU. A process of torchrun takes the GPU of its local rank."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{int(os.environ['LOCAL_RANK'])}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {device!r}; torch cannot use it here ({str(error).splitlines()[0]})"
        ) from None
    return torch.device(device)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products; ``auto`` takes bfloat16 where the hardware has matrix units for it."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has("amx_tile")
        precision = "bfloat16" if fast else "float32"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    check_choice("precision", precision, dtypes)
    return dtypes[precision]
