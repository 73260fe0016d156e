"""The machine, the versions and the commit that a measurement is of.

python -m benchmarks.environment     # the name of this machine's result file
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
ISA = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")  # from the best


def git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu() -> dict[str, Any]:
    """Name, cores that this process may use, memory and vector instructions of the CPU."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": f"family {fields.get('cpu family')}, model {fields.get('model')}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": pages,
        "isa": next((name for name in ISA if name in flags), "unknown"),
        "threads": torch.get_num_threads(),
    }


def describe(commit: str | None = None) -> dict[str, Any]:
    """Machine, versions, commit and date, as the result files hold them."""
    packages = ("triton", "numpy", "scipy", "switch_moe")
    return {
        "machine": cpu() | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA": torch.version.cuda or "none",
            **{name: version(name) for name in packages},
        },
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def slug() -> str:
    """A file name for this machine."""
    found = cpu()
    name = f"{found['cpu']} {found['isa']} {found['cores']} cores"
    if torch.cuda.is_available():
        name += f" {torch.cuda.get_device_name()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    print(slug())
