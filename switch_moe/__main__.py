"""``python -m switch_moe``: versions, devices and backends, and how to turn on what is off."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import __version__, native
from .kernels import measured
from .ops._backend import OPERATIONS, triton_reason


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    cpu = f"CPU with {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        return f"{cpu}; no GPU ({why})"
    gpus = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        gpus.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return f"{cpu}; GPUs: {', '.join(gpus)}"


def _native_operations(device_type: str) -> str:
    return ", ".join(sorted(operation.name for operation in OPERATIONS if device_type in operation.native))


def _cpu_state() -> str:
    return f"off: {native.cpu.reason}" if native.cpu.reason else f"on: {_native_operations('cpu')}"


def _cuda_state() -> str:
    if native.cuda.module is None:
        return f"off: {native.cuda.reason}"
    built = f"built for sm_{native.cuda.module.architectures.replace(' ', ' sm_')}"
    if not torch.cuda.is_available():
        return f"off: {built}, but there is no GPU here; it needs one and a torch with CUDA"
    return f"on: {built} ({_native_operations('cuda')})"


def _triton_state() -> str:
    operations = ", ".join(sorted(operation.name for operation in OPERATIONS if operation.triton))
    reason = triton_reason(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if reason is not None:
        return f"off: {reason}"
    where = "CUDA tensors" if torch.cuda.is_available() else "CPU tensors on request, in the interpreter"
    return f"on: {operations}, for {where}"


def _expert_linear() -> str:
    """What ``backend="auto"`` takes for expert_linear on each kind of device here, and why."""
    on_cpu = f"reference: {native.cpu.reason}" if native.cpu.reason else "native on a CPU"
    if not torch.cuda.is_available():
        return f"{on_cpu}; there is no GPU here"
    found: dict[str, list[str]] = {}
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        reason = triton_reason(device)
        text = measured.summary(device) if reason is None else f"reference: {reason}"
        found.setdefault(text, []).append(str(device))
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"on {' and '.join(devices)} {text}" for text, devices in found.items())


def main() -> None:
    """Prints the report."""
    lines = {
        "switch_moe": f"{__version__} in {__file__.rsplit('/', 2)[0]}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "devices": _devices(),
        "reference": "on: plain PyTorch, every operation, any device",
        "native cpu": _cpu_state(),
        "native cuda": _cuda_state(),
        "triton kernels": _triton_state(),
        "expert_linear": f"auto takes {_expert_linear()}",
    }
    for name, text in lines.items():
        sys.stdout.write(f"{name:15} {text}\n")


if __name__ == "__main__":
    main()
