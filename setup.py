"""Builds the compiled modules with ninja; torch is not needed for it.

``switch_moe._cpu`` needs g++, or the compiler that CXX names; a launcher may stand before it ("ccache g++").
``switch_moe._cuda`` needs nvcc too. CPPFLAGS, CXXFLAGS and LDFLAGS are added to the commands.

    SWITCH_MOE_CPU         1 (default); 0: build nothing and need no compiler, for the plain PyTorch reference
                           and Triton's kernels
    SWITCH_MOE_CUDA        auto (default): build it where that works; 0: do not; 1: fail where it does not
    SWITCH_MOE_CUDA_ARCHS  GPU architectures, default "80 90a 100+PTX"; +PTX lets newer GPUs translate
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = "80 90a 100+PTX"
CPU_SOURCES = [
    "bindings.cpp",
    "expert_linear_fused.cpp",
    "expert_linear_merge.cpp",
    "linear_assignment.cpp",
    "match_columns.cpp",
    "parallel.cpp",
    "routed_mlp.cpp",
]
CUDA_SOURCES = ["expert_linear.cu", "expert_linear_weight.cu", "linear_assignment.cu", "bindings_cuda.cpp"]
CPU = Extension("switch_moe._cpu", [f"csrc/{name}" for name in CPU_SOURCES])
CUDA = Extension("switch_moe._cuda", [f"csrc/{name}" for name in CUDA_SOURCES])


class BuildError(SystemExit):
    """Ends the build with one line instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nswitch_moe: {message}\n")


def find_compiler() -> list[str]:
    """The words of the compiler's command: a program, maybe behind a launcher and with options."""
    wanted = os.environ.get("CXX", "").strip()
    for candidate in [wanted] if wanted else ["g++", "clang++", "c++"]:
        words = [candidate] if shutil.which(candidate) else shlex.split(candidate)  # a path may have spaces
        if all(shutil.which(word) for word in words[:1]) and compiler_of(words):
            return words
    named = f"CXX={wanted} was not found" if wanted else "no C++ compiler was found (g++, clang++)"
    raise BuildError(
        f"{named}. Install one (Debian and Ubuntu: apt-get install g++), set CXX to its path, or set "
        "SWITCH_MOE_CPU=0 to install without compiled code (plain PyTorch and Triton only)."
    )


def compiler_of(words: list[str]) -> str:
    """The compiler itself among the words of a command: the last program, after any launcher."""
    programs = [word for word in words if not word.startswith("-") and shutil.which(word)]
    return programs[-1] if programs else ""


def flags_of(*names: str) -> list[str]:
    """The words of some environment variables."""
    return [word for name in names for word in shlex.split(os.environ.get(name, ""))]


def runtime_library(compiler: str) -> list[str]:
    """What a C compiler (gcc, clang) must be told to link C++."""
    is_c = re.fullmatch(r"(.*-)?(gcc|clang|cc)(-[\d.]+)?", Path(compiler).name)
    return ["-lc++" if sys.platform == "darwin" else "-lstdc++"] if is_c else []


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
        choice = os.environ.get("SWITCH_MOE_CPU", "1")
        if choice not in ("0", "1"):
            raise BuildError(f"SWITCH_MOE_CPU is {choice!r}; it must be 0 or 1")
        if choice == "0":
            for extension in (CPU, CUDA):  # an older build's
                self._output(extension).unlink(missing_ok=True)
            print("switch_moe: built nothing: SWITCH_MOE_CPU=0", flush=True)
            return
        nvcc, why_no_cuda = cuda_choice()
        outputs = {extension.name: self._output(extension) for extension in (CPU, CUDA)}
        folder = self._write_ninja_file(nvcc, outputs)
        if nvcc:  # both at once take half of the time; who fails is asked below, where each is built alone
            self._ninja(folder, *outputs.values(), keep_going=True)
        if not self._ninja(folder, outputs[CPU.name]):
            raise BuildError("compiling the CPU module failed, the compiler's messages are above")
        if fault := load_fault(outputs[CPU.name]):
            raise BuildError(f"the CPU module was compiled but does not load: {fault}")
        if nvcc and not self._ninja(folder, outputs[CUDA.name]):
            why_no_cuda = f"{nvcc} failed, its messages are above"
        elif nvcc and (fault := load_fault(outputs[CUDA.name])):
            why_no_cuda = f"it was compiled but does not load: {fault}"
        if nvcc and why_no_cuda:
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

    def get_output_mapping(self) -> dict[str, str]:
        """Only what was built: strict editable installs link every file that is named here."""
        built = {str(Path(output)) for output in self.get_outputs()}
        mapping = super().get_output_mapping()
        return {
            new: old
            for new, old in mapping.items()
            if {str(Path(new).resolve()), str(Path(old).resolve())} & built
        }

    def _output(self, extension: Extension) -> Path:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        return output

    def _ninja(self, folder: Path, *outputs: Path, keep_going: bool = False) -> bool:
        ninja = Path(import_ninja().BIN_DIR) / "ninja"
        options = ["-k", "0"] if keep_going else []
        return subprocess.run([ninja, "-C", folder, *options, *outputs], check=False).returncode == 0

    def _write_ninja_file(self, nvcc: Path | None, outputs: dict[str, Path]) -> Path:
        try:
            import pybind11
        except ImportError:
            raise BuildError(
                "the package pybind11 was not found; install it with: pip install pybind11"
            ) from None

        escape = import_ninja().ninja_syntax.escape
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        cxx, archs = find_compiler(), cuda_archs() if nvcc else []
        common = ["-O3", "-std=c++17"]
        host = [*common, "-fopenmp-simd", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        host += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        host += [f'-DSWITCH_MOE_CUDA_ARCHS="{" ".join(archs)}"'] if archs else []
        host += flags_of("CPPFLAGS", "CXXFLAGS")
        device = [*common, "--threads=0", *arch_flags(archs)]
        device.append("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
        device += [word for flag in flags_of("CPPFLAGS") for word in ("-Xcompiler", flag)]
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        libraries = ["-lpthread", "-ldl", *runtime_library(compiler_of(cxx)), *flags_of("LDFLAGS")]
        compiler = escape(shlex.join(cxx))
        with (folder / "build.ninja").open("w") as file:
            # Not wrapped: the writer could break a line inside a quoted word.
            writer = import_ninja().ninja_syntax.Writer(file, width=sys.maxsize)
            compile_host = f"{compiler} {escape(shlex.join(host))} $sources -MMD -MF $out.d -c $in -o $out"
            writer.rule("cpp", compile_host, depfile="$out.d")
            ends = escape(shlex.join(libraries))
            writer.rule("link_cpp", f"{compiler} -shared {shlex.join(link)} $in -o $out {ends}")
            if nvcc:
                program = escape(shlex.join([str(nvcc), "-ccbin", compiler_of(cxx)]))
                compile_device = f"{program} {escape(shlex.join(device))} -MD -MF $out.d -c $in -o $out"
                # So begin the messages (C7508 to C7520) of kernels that run wgmma one after another, or with
                # setmaxnreg ignored.
                refuse = "if grep -q 'Potential Performance Loss' $out.log; then rm -f $out; exit 1; fi"
                logged = (
                    f"{compile_device} > $out.log 2>&1; status=$$?; cat $out.log; {refuse}; exit $$status"
                )
                writer.rule("cu", logged, depfile="$out.d")
                writer.rule("link_cu", f"{program} -shared -cudart static $in -o $out")
            # What takes longest comes first: ninja starts with it.
            for extension, link in [*([(CUDA, "link_cu")] if nvcc else []), (CPU, "link_cpp")]:
                objects = []
                for source in map(Path, extension.sources):
                    target = escape(str(folder / f"{source.name}.o"))
                    number = f"-DSWITCH_MOE_SOURCES={checksum()}u" if "bindings" in source.name else ""
                    source_file, variables = escape(str(ROOT / source)), {"sources": number}
                    objects += writer.build(target, source.suffix[1:], source_file, variables=variables)
                writer.build(escape(str(outputs[extension.name])), link, objects)
        return folder


def load_fault(module: Path) -> str:
    """What Python says when it loads a compiled module in a process of its own; empty where it loads."""
    name = module.name.split(".")[0]
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location(*sys.argv[1:])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, name, str(module)], capture_output=True, text=True, check=False
    )
    return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1] if done.returncode else ""


def checksum() -> int:
    """The number of these sources, from the function that compares it when the module is loaded."""
    return runpy.run_path(str(ROOT / "switch_moe" / "sources.py"))["checksum"](ROOT / "csrc")


class EditableWheel(editable_wheel):
    """Editable installs of the kind "compat" put one folder on the path; switch_dit is in another."""

    def _select_strategy(self, *arguments: Any, **options: Any) -> Any:
        strategy = super()._select_strategy(*arguments, **options)
        if hasattr(strategy, "path_entries"):
            strategy.path_entries.append(ROOT / "models")
        return strategy


def import_ninja() -> ModuleType:
    """The ninja package: where the program lies, and the writer of its files."""
    try:
        import ninja.ninja_syntax
    except ImportError:
        raise BuildError("the package ninja was not found; install it with: pip install ninja") from None
    return ninja


setup(ext_modules=[CPU, CUDA], cmdclass={"build_ext": NinjaBuild, "editable_wheel": EditableWheel})
