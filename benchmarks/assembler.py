"""The programs that turn PTX into machine code: the one that Triton takes, and another to test under.

Some versions of ptxas made wrong kernels from right PTX with wgmma, so the kernels whose machine code depends
on the version are tested under two.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

MISCOMPILES = (13, 0)  # 13.0.88 gave kernels with wgmma a shared-memory store out of range


class Assembler(NamedTuple):
    """A ptxas and its version, such as (12, 8, 93)."""

    path: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def cuda_tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit in CUDA_HOME or PATH, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name, path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")


def assembler(path: str, architecture: str = "") -> Assembler | None:
    """The ptxas at a path; None where it does not run or does not know the architecture."""
    try:
        said, known = (
            subprocess.run([path, option], capture_output=True, text=True, check=False).stdout
            for option in ("--version", "--help")
        )
    except OSError:
        return None
    version = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", said)
    if version is None or (architecture and f"'{architecture}'" not in known):
        return None
    return Assembler(path, tuple(map(int, version.groups())))


def of_triton(capability: int) -> tuple[Assembler, str]:
    """The assembler that Triton takes for a compute capability, and the variable that names another."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(capability)
    variable = "TRITON_PTXAS_PATH" if tool == knobs.nvidia.ptxas else "TRITON_PTXAS_BLACKWELL_PATH"
    found = assembler(tool.path)
    assert found is not None, tool.path
    return found, variable


def candidates() -> list[str]:
    """The paths of every ptxas on this machine: Triton's two, the toolkit's, and an installed wheel's."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    paths = [str(folder / "ptxas"), str(folder / "ptxas-blackwell"), cuda_tool("ptxas") or ""]
    for wheel in ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12"):
        try:
            files = importlib.metadata.files(wheel) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        paths += [str(file.locate()) for file in files if file.name == "ptxas"]
    return [path for path in paths if path]


def another(own: Assembler, paths: list[str], architecture: str) -> Assembler | None:
    """The newest assembler of another version than Triton's own that is not known to miscompile."""
    found = [one for path in paths if (one := assembler(path, architecture)) is not None]
    fit = [one for one in found if one.version != own.version and one.version[:2] != MISCOMPILES]
    return max(fit, key=lambda one: one.version, default=None)


def architecture(capability: tuple[int, int]) -> str:
    """The name of a GPU's architecture, with the instructions that only it has where there are any."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def pair(capability: tuple[int, int]) -> tuple[Assembler, Assembler | None, str]:
    """Triton's assembler for a GPU, another or None, and the variable that makes Triton take it."""
    own, variable = of_triton(10 * capability[0] + capability[1])
    return own, another(own, candidates(), architecture(capability)), variable


def describe(capability: tuple[int, int]) -> dict[str, Any]:
    """The versions as result files hold them; the CUDA module is assembled by nvcc's."""
    own, second, _ = pair(capability)
    toolkit = assembler(cuda_tool("ptxas") or "")
    return {"triton": str(own), "second": second and str(second), "toolkit": toolkit and str(toolkit)}
