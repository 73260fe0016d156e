"""Which code runs for a call: the one place that decides.

===========  ==========================  =================================================================
backend      code                        runs for
===========  ==========================  =================================================================
reference    ``switch_moe/reference/``   every operation, any device, float64 too: plain PyTorch
native       ``switch_moe/cpu/``         CPU tensors, where the operation has compiled code; on CUDA
             ``csrc/``                   tensors ``linear_assignment`` only
triton       ``switch_moe/kernels/``     CUDA tensors; CPU tensors on request, in Triton's interpreter
cuda         ``csrc/``                   ``expert_linear`` on GPUs of compute capability 9.0, in bfloat16 and
                                         float16; gradients of weights are Triton's where a sample has
                                         more than two experts, or there are more than 32 in all
===========  ==========================  =================================================================

``auto`` takes the last row that can run, but ``cuda`` only for calls of which
:func:`switch_moe.kernels.measured.fastest` knows that it is faster. A backend that is named and cannot run
raises: nothing is silently replaced, with one exception. The kernels have first derivatives only, so under
torch.func (grad, jvp, vmap) and in forward-mode AD the reference computes every operation that has gradients,
whatever the backend; second derivatives come from it too, and so does what torch.onnx exports. Among the
compiled algorithms of ``expert_linear`` on a CPU, :func:`switch_moe.cpu.expert_linear.algorithm` decides.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..kernels.expert_linear_hopper import device_reason as cuda_reason
from ..torch_compat import exporting_onnx, transforming
from ._checks import check_choice, check_dtype

INTERPRETER_HAS_BFLOAT16 = False
"""Whether products of bfloat16 are right in Triton's interpreter. The tests cure it, and say so here."""

BACKENDS = ("auto", "reference", "native", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # looked for, not imported


class Operation(NamedTuple):
    """What an operation has beside its reference."""

    name: str
    native: tuple[str, ...] = ()  # device types with compiled code
    triton: bool = False
    dtypes: tuple[torch.dtype, ...] = ()  # what that code takes for the first tensor; empty: any type
    differentiable: bool = True
    cuda: tuple[torch.dtype, ...] = ()  # what its CUDA kernels beside Triton's take; empty: it has none


OPERATIONS: list[Operation] = []
"""Every operation, in the order of registration."""


def operation(
    name: str, *, native: tuple[str, ...] = (), triton: bool = False, dtypes: tuple[torch.dtype, ...] = (),
    differentiable: bool = True, cuda: tuple[torch.dtype, ...] = (),
) -> Operation:  # fmt: skip
    """Notes what an operation has, for :func:`choose` and for ``python -m switch_moe``."""
    OPERATIONS.append(Operation(name, native, triton, dtypes, differentiable, cuda))
    return OPERATIONS[-1]


def native_reason(device_type: str) -> str | None:
    """Why the compiled code cannot run on a device of this type, or None."""
    if device_type == "cpu":
        return native.cpu.reason
    if device_type == "cuda":
        return native.cuda.reason
    return f"there is no compiled code for {device_type} tensors; use backend='reference'"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None."""
    if not _TRITON_INSTALLED:
        return "Triton is not installed; pip install triton"
    if device.type == "cpu":
        if interpreting():
            return None
        return (
            "a CPU runs Triton kernels in its interpreter only; set TRITON_INTERPRET=1 before the first "
            "of them runs"
        )
    if device.type != "cuda":
        return f"Triton kernels run on CUDA tensors, not on {device.type} tensors; use backend='reference'"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs; use backend='reference'"
    if not torch.cuda.is_available():  # the tensor is fake, and stands for one on a GPU
        return None
    index = device.index or 0
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(index)} has "
            f"{major}.{minor}; use backend='reference'"
        )
    return None


@functools.cache
def _warn(reason: str) -> None:
    """Says once why plain PyTorch runs where compiled code could; SWITCH_MOE_CPU=0 is who wants it so."""
    if os.environ.get("SWITCH_MOE_CPU") != "0":
        warnings.warn(f"switch_moe runs in plain PyTorch on this CPU: {reason}", RuntimeWarning, stacklevel=4)


def choose(op: Operation, backend: str, *tensors: Tensor) -> str:
    """The backend of a call of ``op`` on ``tensors``: 'cuda', 'triton', 'native' or 'reference'.

    'cuda' only where it is named: whether it is faster depends on more than these tensors.
    The first tensor tells the device and the type. The reference takes calls with an empty tensor.

    Raises:
        ValueError: there is no such backend. TypeError: the named backend does not take the type.
        RuntimeError: the named backend cannot run here.
    """
    path = _available(op, backend, tensors[0].device)
    if op.differentiable and (transforming() or exporting_onnx()):
        return "reference"
    dtype = tensors[0].dtype
    dtypes = op.cuda if path == "cuda" else op.dtypes
    if path != "reference" and dtypes and dtype not in dtypes:
        if backend == path:
            check_dtype("x", tensors[0], *dtypes)
        return "reference"
    in_interpreter = path == "triton" and tensors[0].device.type == "cpu"
    if in_interpreter and dtype == torch.bfloat16 and op.dtypes and not INTERPRETER_HAS_BFLOAT16:
        raise RuntimeError(
            f"backend 'triton' of {op.name} cannot run: bfloat16 products are wrong in Triton's interpreter; "
            "use float32 or float16"
        )
    return "reference" if any(tensor.numel() == 0 for tensor in tensors) else path


def runs_triton(backend: str, device: torch.device) -> bool:
    """Whether an operation that has Triton kernels runs them, for this ``backend`` and device.

    Beside the CUDA kernels Triton's sort the samples, and compute some gradients of weights.
    """
    if backend == "native":
        return False
    beside = "auto" if backend == "cuda" else backend
    return _available(Operation("", triton=True), beside, device) == "triton"


def _cuda_reason(op: Operation, device: torch.device) -> str | None:
    """Why the CUDA kernels of ``op`` that stand beside Triton's cannot run on ``device``, or None."""
    if op.cuda:
        return cuda_reason(device) or triton_reason(device)
    if "cuda" in op.native:
        return "its CUDA kernel is backend 'native'; use that or backend='auto'"
    return "it has no CUDA kernel; use backend='auto'"


def _available(op: Operation, backend: str, device: torch.device) -> str:
    """The backend of ``op`` on ``device``, whatever the tensors hold."""
    check_choice("backend", backend, BACKENDS)
    if backend == "reference":
        return "reference"
    if backend == "triton":
        reason = triton_reason(device) if op.triton else "it has no Triton kernel; use backend='auto'"
        if reason is not None:
            raise RuntimeError(f"backend 'triton' of {op.name} cannot run: {reason}")
        return "triton"
    if backend == "cuda":
        if (reason := _cuda_reason(op, device)) is not None:
            raise RuntimeError(f"backend 'cuda' of {op.name} cannot run: {reason}")
        return "cuda"
    if backend == "auto" and op.triton and device.type == "cuda" and triton_reason(device) is None:
        return "triton"
    if device.type not in op.native:
        if backend == "auto":
            return "reference"
        only = f", only for {' and '.join(op.native)} tensors" if op.native else ""
        raise RuntimeError(
            f"{op.name} has no compiled kernel for {device.type} tensors{only}; use backend='auto' or "
            "'reference'"
        )
    reason = native_reason(device.type)
    if reason is None:
        return "native"
    if backend == "auto":
        if device.type == "cpu" and not torch.compiler.is_compiling():
            _warn(reason)
        return "reference"
    raise RuntimeError(f"backend 'native' of {op.name} cannot run: {reason}")
