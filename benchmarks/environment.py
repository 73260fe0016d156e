"""The machine, the versions and the commit that a measurement is of.

python -m benchmarks.environment     # the name of this machine's result file
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import assembler
from switch_moe.kernels.expert_linear_hopper import device_reason

ROOT = Path(__file__).parent.parent
ISA = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")  # from the best
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def git(*arguments: str) -> str:
    """What git prints; nothing where it fails or is missing."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def measures_cuda_kernels() -> bool:
    """Whether the CUDA kernels of expert_linear run on this GPU and are to be measured beside Triton's.

    `make gpu` sets SWITCH_MOE_MEASURE_CUDA=0 where their tests failed.
    """
    wanted = os.environ.get("SWITCH_MOE_MEASURE_CUDA", "1") != "0"
    return wanted and device_reason(torch.device("cuda")) is None


def describe(device: str = DEVICE) -> dict[str, Any]:
    """The machine as the result files hold it; ``cores`` are those that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": f"family {fields.get('cpu family')}, model {fields.get('model')}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": next((name for name in ISA if name in flags), "unknown"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        **(of_gpu(torch.cuda.get_device_capability()) if device == "cuda" else {}),
    }


def of_gpu(capability: tuple[int, int]) -> dict[str, Any]:
    """What decides about the machine code of kernels."""
    return {
        "architecture": f"sm_{capability[0]}{capability[1]}",
        "assemblers": assembler.describe(capability),
    }


def slug(machine: dict[str, Any]) -> str:
    """A file name for a machine."""
    family = machine.get("cpu_family", "").partition(",")[0]
    name = machine["gpu"] or f"{machine['cpu']} {family} {machine['isa']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    print(slug(describe()))
