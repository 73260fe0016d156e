"""Builds the compiled modules with ninja; torch is not needed for it.

``switch_moe._cpu`` needs g++, or the compiler that CXX names. ``switch_moe._cuda`` needs nvcc too.

    SWITCH_MOE_CUDA        auto (default): build it where that works; 0: do not; 1: fail where it does not
    SWITCH_MOE_CUDA_ARCHS  GPU architectures, default "80 90a 100+PTX"; +PTX lets newer GPUs translate
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = "80 90a 100+PTX"
CPU_SOURCES = [
    "bindings.cpp",
    "expert_linear_fused.cpp",
    "expert_linear_merge.cpp",
    "linear_assignment.cpp",
    "match_columns.cpp",
    "parallel.cpp",
]
CUDA_SOURCES = ["bindings_cuda.cpp", "linear_assignment.cu"]
CPU = Extension("switch_moe._cpu", [f"csrc/{name}" for name in CPU_SOURCES])
CUDA = Extension("switch_moe._cuda", [f"csrc/{name}" for name in CUDA_SOURCES])


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


def cuda_archs() -> list[str]:
    """What SWITCH_MOE_CUDA_ARCHS names, separated by spaces, commas or semicolons."""
    archs = re.split(r"[\s;,]+", os.environ.get("SWITCH_MOE_CUDA_ARCHS", DEFAULT_ARCHS).strip())
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise BuildError(
                f"SWITCH_MOE_CUDA_ARCHS holds {arch!r}; write architectures like 80, 90a or 100+PTX"
            )
    return archs


def arch_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaBuild(build_ext):
    """Writes one build.ninja for both modules and runs it."""

    def run(self) -> None:
        started = time.perf_counter()
        nvcc, why_no_cuda = cuda_choice()
        outputs = {extension.name: self._output(extension) for extension in (CPU, CUDA)}
        folder = self._write_ninja_file(nvcc, outputs)
        if not self._ninja(folder, outputs[CPU.name]):
            raise BuildError("compiling the CPU module failed, the compiler's messages are above")
        if nvcc and not self._ninja(folder, outputs[CUDA.name]):
            why_no_cuda = f"{nvcc} failed, its messages are above"
            if os.environ.get("SWITCH_MOE_CUDA") == "1":
                raise BuildError(f"SWITCH_MOE_CUDA=1, but {why_no_cuda}")
            nvcc = None
        if nvcc is None:
            outputs.pop(CUDA.name).unlink(missing_ok=True)  # an older build's
        seconds = time.perf_counter() - started
        cuda = f"CUDA for {' '.join(cuda_archs())} with {nvcc}" if nvcc else f"no CUDA module: {why_no_cuda}"
        print(f"switch_moe: built {' and '.join(outputs)} in {seconds:.0f} s; {cuda}", flush=True)
        self._built = list(outputs.values())

    def get_outputs(self) -> list[str]:
        return [str(output) for output in getattr(self, "_built", [])]

    def _output(self, extension: Extension) -> Path:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        return output

    def _ninja(self, folder: Path, output: Path) -> bool:
        ninja = Path(import_ninja().BIN_DIR) / "ninja"
        return subprocess.run([ninja, "-C", folder, output], check=False).returncode == 0

    def _write_ninja_file(self, nvcc: Path | None, outputs: dict[str, Path]) -> Path:
        import pybind11

        escape = import_ninja().ninja_syntax.escape
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        cxx, archs = find_compiler(), cuda_archs() if nvcc else []
        common = ["-O3", "-std=c++17"]
        host = [*common, "-fopenmp-simd", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        host += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        host += [f'-DSWITCH_MOE_CUDA_ARCHS="{" ".join(archs)}"'] if archs else []
        device = [*common, "--threads=0", *arch_flags(archs)]
        device.append("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
        undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        with (folder / "build.ninja").open("w") as file:
            # Not wrapped: the writer could break a line inside a quoted word.
            writer = import_ninja().ninja_syntax.Writer(file, width=sys.maxsize)
            compile_host = f"{cxx} {escape(shlex.join(host))} -MMD -MF $out.d -c $in -o $out"
            writer.rule("cpp", compile_host, depfile="$out.d")
            writer.rule("link_cpp", f"{cxx} -shared {undefined} $in -o $out -lpthread -ldl")
            if nvcc:
                program = escape(shlex.join([str(nvcc), "-ccbin", cxx.split()[0]]))
                compile_device = f"{program} {escape(shlex.join(device))} -MD -MF $out.d -c $in -o $out"
                writer.rule("cu", compile_device, depfile="$out.d")
                writer.rule("link_cu", f"{program} -shared -cudart static $in -o $out")
            for extension, link in [(CPU, "link_cpp"), *([(CUDA, "link_cu")] if nvcc else [])]:
                objects = []
                for source in map(Path, extension.sources):
                    target = escape(str(folder / f"{source.name}.o"))
                    objects += writer.build(target, source.suffix[1:], escape(str(ROOT / source)))
                writer.build(escape(str(outputs[extension.name])), link, objects)
        return folder


def import_ninja() -> ModuleType:
    """The ninja package: where the program lies, and the writer of its files."""
    try:
        import ninja.ninja_syntax
    except ImportError:
        raise BuildError("the package ninja was not found; install it with: pip install ninja") from None
    return ninja


setup(ext_modules=[CPU, CUDA], cmdclass={"build_ext": NinjaBuild})
