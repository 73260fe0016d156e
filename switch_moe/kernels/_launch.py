"""How kernels start: on the device of their tensors, or into a recording that compiles them without a GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_compat import tf32_allowed


class Launch(NamedTuple):
    """One recorded start of a kernel: enough to compile it ahead of time."""

    kernel: Any  # the triton.jit function
    programs: int  # size of the one-dimensional grid
    args: tuple[Any, ...]  # positional: tensors, numbers
    meta: dict[str, Any]  # constexpr arguments by name, and num_warps, num_stages


class Recording(NamedTuple):
    """What :func:`record` yields."""

    architecture: int
    launches: list[Launch]


_recording: Recording | None = None


@contextlib.contextmanager
def record(architecture: int) -> Iterator[list[Launch]]:
    """Collects launches instead of starting them, with the tiles of ``architecture`` (80, 90, 100, ...).

    Call the functions of this package on tensors of ``device="meta"`` inside.
    """
    global _recording
    if _recording is not None:
        raise RuntimeError("a recording is running; one cannot start inside another")
    _recording = Recording(architecture, [])
    try:
        yield _recording.launches
    finally:
        _recording = None


PRECISIONS = {"half": "ieee", "tf32": "tf32", "ieee": "ieee"}
"""What ``tl.dot`` is told, by the precision of a Kind."""


class Kind(NamedTuple):
    """What decides about tiles beside shapes."""

    precision: str  # of products: 'half', 'tf32' or 'ieee', which is true float32
    architecture: int  # compute capability as one number: 80, 89, 90, 100
    multiprocessors: int


# Multiprocessors of an A100, an H100 or H200, and a B200, where there is no device to ask.
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def kind(x: Tensor) -> Kind:
    """The kind of products that kernels on ``x`` take. The interpreter takes the tiles of 80."""
    precision = "half" if x.dtype != torch.float32 else dot_precision(x)
    if _recording is None and x.device.type == "cuda":
        return Kind(precision, *_gpu(x.device))
    architecture = 80 if _recording is None else _recording.architecture
    return Kind(precision, architecture, _MULTIPROCESSORS[architecture])


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Starts ``programs`` copies of a kernel on the current stream of the first argument's device."""
    if programs == 0:
        return
    meta["enable_fp_fusion"] = True  # Triton 3.10 will stop fusing multiply and add by default
    if _recording is not None:
        _recording.launches.append(Launch(kernel, programs, args, meta))
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **meta)
    else:
        kernel[(programs,)](*args, **meta)


def dot_precision(tensor: Tensor) -> str:
    """How ``tl.dot`` multiplies: float32 as true float32, unless the user allows TF32 for matrix products."""
    return "tf32" if tensor.dtype == torch.float32 and tf32_allowed() else "ieee"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
