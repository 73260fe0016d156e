"""Builds the compiled modules with ninja; torch is not needed for it.

``switch_moe._cpu`` needs g++ (or the compiler that CXX names). ``switch_moe._cuda`` is built too where nvcc
is found.

    SWITCH_MOE_CUDA        auto (default): build it where nvcc is found; 0: do not; 1: fail where it cannot be
    built SWITCH_MOE_CUDA_ARCHS  GPU architectures, default "80 90a 100+PTX"; +PTX adds code that newer GPUs
    can translate
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = "80 90a 100+PTX"
CPU = Extension("switch_moe._cpu", ["csrc/bindings.cpp", "csrc/expert_linear.cpp",
"csrc/linear_assignment.cpp",
                                    "csrc/parallel.cpp"])  # fmt: skip
CUDA = Extension("switch_moe._cuda", ["csrc/bindings_cuda.cpp", "csrc/linear_assignment.cu"])


class BuildError(SystemExit):
    """Ends the build with one line instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nswitch_moe: {message}\n")


def find_compiler() -> str:
    wanted = os.environ.get("CXX", "")
    for candidate in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if shutil.which(candidate.split()[0]):
            return candidate
    named = f"CXX={wanted} was not found" if wanted else "no C++ compiler was found (g++, clang++)"
    raise BuildError(f"{named}. Install one (Debian and Ubuntu: apt-get install g++) or set CXX to its path.")


def find_nvcc() -> Path | None:
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    candidates = [folder / "nvcc" for folder in folders] + ([Path(on_path)] if on_path else [])
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((nvcc for nvcc in candidates if nvcc.is_file()), None)


def cuda_choice() -> tuple[Path | None, str]:
    """nvcc, or None and why the CUDA module is not built."""
    choice = os.environ.get("SWITCH_MOE_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise BuildError(f"SWITCH_MOE_CUDA is {choice!r}; it must be auto, 0 or 1")
    if choice == "0":
        return None, "SWITCH_MOE_CUDA=0"
    nvcc = find_nvcc()
    why = "nvcc was not found in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    if nvcc is None and choice == "1":
        raise BuildError(f"SWITCH_MOE_CUDA=1, but {why}")
    return nvcc, "" if nvcc else why


def arch_flags(archs: str) -> list[str]:
    flags = []
    for arch in re.split(r"[\s;,]+", archs.strip()):
        match = re.fullmatch(r"(\d{2,3}[af]?)(\+PTX)?", arch)
        if match is None:
            raise BuildError(
                f"SWITCH_MOE_CUDA_ARCHS holds {arch!r}; write architectures like 80, 90a or 100+PTX"
            )
        number, ptx = match.groups()
        flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        if ptx:
            flags += [f"-gencode=arch=compute_{number},code=compute_{number}"]
    return flags


def escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes one build.ninja for all extensions and runs it."""

    def run(self) -> None:
        started = time.perf_counter()
        nvcc, why_no_cuda = cuda_choice()
        archs = os.environ.get("SWITCH_MOE_CUDA_ARCHS", DEFAULT_ARCHS)
        outputs = self._compile(nvcc, archs)
        names = ", ".join(sorted(path.name for path in outputs))
        cuda = f"no CUDA module: {why_no_cuda}"
        if nvcc:
            cuda = f"CUDA for sm_{archs.replace(' ', ' sm_')} with {nvcc}"
        print(f"switch_moe: built {names} in {time.perf_counter() - started:.0f} s; {cuda}", flush=True)

    def get_outputs(self) -> list[str]:
        return [self.get_ext_fullpath(extension.name) for extension in self._chosen(cuda_choice()[0])]

    def _chosen(self, nvcc: Path | None) -> list[Extension]:
        return [CPU, CUDA] if nvcc else [CPU]

    def _compile(self, nvcc: Path | None, archs: str) -> list[Path]:
        import pybind11

        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        include_flags = " ".join(f"-isystem {escape(path)}" for path in includes)
        define = f'-DSWITCH_MOE_CUDA_ARCHS=\\"{archs}\\"'.replace(" ", r"\ ")
        undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {escape(find_compiler())}",
            f"nvcc = {escape(nvcc or 'nvcc')}",
            f"cflags = -O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra {include_flags}",
            "rule cpp",
            f"  command = $cxx $cflags {define} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "rule cu",
            f"  command = $nvcc -O3 -std=c++17 --threads 0 {' '.join(arch_flags(archs))} -Xcompiler -fPIC "
            "-Xcompiler -fvisibility=hidden -ccbin $cxx -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "rule link_cpp",
            f"  command = $cxx -shared {undefined} $in -o $out -lpthread -ldl",
            "rule link_cu",
            "  command = $nvcc -shared -cudart static -ccbin $cxx $in -o $out",
        ]
        outputs = []
        for extension in self._chosen(nvcc):
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            objects = []
            for source in extension.sources:
                name = escape(folder / f"{Path(source).name}.o")
                rule = "cu" if source.endswith(".cu") else "cpp"
                lines.append(f"build {name}: {rule} {escape(ROOT / source)}")
                objects.append(name)
            link = "link_cu" if extension is CUDA else "link_cpp"
            lines.append(f"build {escape(output)}: {link} {' '.join(objects)}")
            outputs.append(output)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        try:
            subprocess.run([*find_ninja(), "-C", str(folder)], check=True)
        except subprocess.CalledProcessError:
            advice = "; SWITCH_MOE_CUDA=0 leaves the CUDA module out" if nvcc else ""
            raise BuildError(f"the compiler failed, its messages are above{advice}") from None
        return outputs


def find_ninja() -> list[str]:
    try:
        import ninja
    except ImportError:
        if shutil.which("ninja"):
            return ["ninja"]
        raise BuildError("ninja was not found; install it with: pip install ninja") from None
    return [str(Path(ninja.BIN_DIR) / "ninja")]


setup(ext_modules=[CPU, CUDA], cmdclass={"build_ext": NinjaBuild})
