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


# Floating-point operations a second of the tensor cores in bfloat16 and float16, without sparsity, from the
# data sheets. A name that is part of another comes after it.
_PEAKS = {
    "B200": 2250e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
    "A100": 312e12, "L40S": 362e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a device can do in a second in a half type; None for other types, and where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products; ``auto`` takes bfloat16 where the hardware has matrix units for it."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has("amx_tile")
        precision = "bfloat16" if fast else "float32"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    check_choice("precision", precision, dtypes)
    return dtypes[precision]
