"""setup.py: its choices and its errors, without compiling anything; and what nvcc says about the kernels."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("SWITCH_MOE_CUDA", "SWITCH_MOE_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("switch_moe_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(folder: Path) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    return nvcc


def test_every_source_is_compiled(build: ModuleType) -> None:
    sources = {
        str(path.relative_to(ROOT)) for kind in ("*.cpp", "*.cu") for path in (ROOT / "csrc").glob(kind)
    }
    assert {*build.CPU.sources, *build.CUDA.sources} == sources


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_by_variable(
    build: ModuleType, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_nvcc(tmp_path)
    monkeypatch.setenv(variable, str(tmp_path))
    assert build.cuda_choice() == (nvcc, "")
    monkeypatch.setenv("SWITCH_MOE_CUDA", "0")
    assert build.cuda_choice() == (None, "SWITCH_MOE_CUDA=0")


def test_no_nvcc(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    nvcc, why = build.cuda_choice()
    assert nvcc is None
    assert "nvcc was not found in CUDA_HOME" in why
    monkeypatch.setenv("SWITCH_MOE_CUDA", "1")
    with pytest.raises(SystemExit, match="SWITCH_MOE_CUDA=1, but nvcc was not found in CUDA_HOME"):
        build.cuda_choice()


def test_wrong_choice(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCH_MOE_CUDA", "yes")
    with pytest.raises(SystemExit, match="SWITCH_MOE_CUDA is 'yes'; it must be auto, 0 or 1"):
        build.cuda_choice()


@pytest.mark.parametrize("archs", ["80 90a 100+PTX", "80;90a;100+PTX", " 80, 90a,100+PTX "])
def test_architectures(build: ModuleType, monkeypatch: pytest.MonkeyPatch, archs: str) -> None:
    monkeypatch.setenv("SWITCH_MOE_CUDA_ARCHS", archs)
    assert build.arch_flags(build.cuda_archs()) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_wrong_architectures(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCH_MOE_CUDA_ARCHS", "sm_80")
    with pytest.raises(SystemExit, match="SWITCH_MOE_CUDA_ARCHS holds 'sm_80'; write architectures like 80"):
        build.cuda_archs()


def test_names_with_spaces_and_dollars_survive_ninja_and_the_shell(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\n: > "$last"\n')  # makes an empty output
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    command = build.NinjaBuild(setuptools.Distribution())
    command.build_temp = str(tmp_path / "my code $x:y")
    output = tmp_path / "my code $x:y" / "out"
    folder = command._write_ninja_file(None, {build.CPU.name: output})
    assert command._ninja(folder, folder / "bindings.cpp.o")
    assert (folder / "bindings.cpp.o").is_file()


def make_program(path: Path, text: str = "exit 0") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_compilers_behind_launchers_and_in_paths_with_spaces(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, compiler = make_program(tmp_path / "ccache"), make_program(tmp_path / "g++")
    spaced = make_program(tmp_path / "my tools" / "g++")
    for wanted, words, chosen in (
        (f"{launcher} {compiler}", [launcher, compiler], compiler),
        (f"{compiler} -m64", [compiler, "-m64"], compiler),
        (spaced, [spaced], spaced),
        (f"{launcher} '{spaced}'", [launcher, spaced], spaced),
    ):
        monkeypatch.setenv("CXX", wanted)
        assert build.find_compiler() == words
        assert build.compiler_of(words) == chosen


@pytest.mark.parametrize(
    ("compiler", "is_c"),
    [("gcc", True), ("/usr/bin/gcc-12", True), ("x86_64-linux-gnu-gcc", True), ("clang-18", True),
     ("cc", True),
     ("g++", False), ("/usr/bin/g++-12", False), ("clang++", False), ("c++", False)],
)  # fmt: skip
def test_a_c_compiler_links_the_library_of_cpp(build: ModuleType, compiler: str, is_c: bool) -> None:
    assert bool(build.runtime_library(compiler)) == is_c


def test_flags_reach_the_commands(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    monkeypatch.setenv("CXX", make_program(tmp_path / "g++"))
    monkeypatch.setenv("CXXFLAGS", "-O1 -march=native")
    monkeypatch.setenv("CPPFLAGS", "'-DNAME=a b'")
    monkeypatch.setenv("LDFLAGS", "-Wl,-z,now")
    command = build.NinjaBuild(setuptools.Distribution())
    command.build_temp = str(tmp_path / "build")
    text = (command._write_ninja_file(None, {build.CPU.name: tmp_path / "out"}) / "build.ninja").read_text()
    compiling, linking = (line for line in text.splitlines() if line.startswith("  command"))
    assert "-O1 -march=native" in compiling
    assert "'-DNAME=a b'" in compiling
    assert linking.endswith("-Wl,-z,now")
    assert f"-DSWITCH_MOE_SOURCES={build.checksum()}u" in text


def built_objects(build: ModuleType, folder: Path, sources: dict[str, str]) -> set[str]:
    """The stems of the CUDA sources, given as texts, of which the build keeps an object."""
    names = {stem: folder / f"{stem}.cu" for stem in sources}
    for stem, path in names.items():
        path.write_text(sources[stem])
    build.CUDA.sources[:] = map(str, names.values())
    command = build.NinjaBuild(setuptools.Distribution())
    command.build_temp = str(folder / "build")
    outputs = {build.CPU.name: folder / "_cpu.so", build.CUDA.name: folder / "_cuda.so"}
    written = command._write_ninja_file(build.find_nvcc(), outputs)
    objects = {stem: written / f"{stem}.cu.o" for stem in names}
    succeeded = command._ninja(written, *objects.values(), keep_going=True)
    assert succeeded == all(path.exists() for path in objects.values())
    return {stem for stem, path in objects.items() if path.exists()}


# What ptxas 12.8 to 13.5 report as a potential performance loss of kernels with wgmma.
SERIALIZED = "wgmma.mma_async instructions are serialized due to"
LOSSES = [
    "'setmaxnreg' ignored to allow debugging.",
    "'setmaxnreg' ignored to maintain compatibility across compilation units.",
    "'setmaxnreg' ignored; unable to determine register count at entry.",
    "'setmaxnreg' ignored to maintain compatibility into 'extern' call.",
    "'setmaxnreg' ignored to maintain minimum register requirements.",
    f"{SERIALIZED} the presence of Extern calls in the function 'f'",
    f"{SERIALIZED} wgmma pipeline crossing function boundary at a function call in the function 'f'",
    f"{SERIALIZED} insufficient register resources for the wgmma pipeline in the function 'f'",
    f"{SERIALIZED} insufficient register resources for the function 'f'",
    f"{SERIALIZED} non wgmma instructions defining input registers of a wgmma between start and end of the "
    "pipeline stage in the function 'f'",
    f"{SERIALIZED} non wgmma instructions reading accumulator registers of  a wgmma between start and end of "
    "the pipeline stage in the function 'f'",
    f"{SERIALIZED} non wgmma instructions defining accumulator registers of a wgmma between start and end of "
    "the pipeline stage in the function 'f'",
    f"{SERIALIZED} ill formed pipeline stage in the function 'f'",
    f"{SERIALIZED} program dependence on compiler-inserted WG.DP in divergent path in the function 'f'",
    f"{SERIALIZED} program dependence on compiler-inserted WG.AR in divergent path in the function 'f'",
]


def test_every_loss_that_ptxas_reports_ends_the_build(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program in the place of nvcc that prints its source, and makes an object."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    printing = 'while [ "$1" != -c ]; do shift; done; cat "$2"; : > "$4"'
    make_program(tmp_path / "bin" / "nvcc", printing)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    said = {
        f"loss{i}": f"ptxas info    : Potential Performance Loss: {loss}\n" for i, loss in enumerate(LOSSES)
    }
    said["sound"] = "ptxas info    : 0 bytes gmem\n"
    assert built_objects(build, tmp_path, said) == {"sound"}


SLOW_PRODUCTS = """
#include "{csrc}/hopper.h"
using namespace hopper;

__global__ void {bounds} products(float* out, const uint32_t* in, int count) {{
#if HOPPER_CODE
    float sums[2][64] = {{}};
    uint32_t a[4] = {{in[0], in[1], in[2], in[3]}};
    const uint64_t b = operand<Swizzle::k64>(shared_memory(), 512);
    {before}
    for (int i = 0; i < count; ++i) {{
        product_fence();
        product<BFloat16, 128>(sums[0], a, b, true);
        {between}
        product<BFloat16, 128>(sums[1], a, b, true);
        product_commit();
        product_wait<0>(sums[0], sums[1]);
    }}
    for (int i = 0; i < 64; ++i) out[threadIdx.x + 128 * i] = sums[0][i] + sums[1][i];
#endif
}}
"""


@pytest.mark.slow
def test_kernels_that_ptxas_makes_slow_end_the_build(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each kernel brings one of the messages; without what brings it, the kernel is built."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    if build.find_nvcc() is None:
        pytest.skip("needs nvcc; CI has it")
    monkeypatch.setenv("SWITCH_MOE_CUDA_ARCHS", "90a")
    bounds = "__launch_bounds__(128)"
    sources = {
        "sound": (bounds, "", ""),
        "C7508": ("", "take_registers<232>();", ""),  # the number of threads is not known
        "C7511": ("__launch_bounds__(512)", "", ""),  # 128 registers for 128 sums
        "C7514": (bounds, "", "out[i] = sums[0][0];"),
        "C7520": (bounds, "", "if (threadIdx.x == in[i]) product_wait<0>();"),
    }
    texts = {
        name: SLOW_PRODUCTS.format(csrc=ROOT / "csrc", bounds=bound, before=before, between=between)
        for name, (bound, before, between) in sources.items()
    }
    assert built_objects(build, tmp_path, texts) == {"sound"}
    said = capfd.readouterr().out
    assert all(f"({name}) Potential Performance Loss" in said for name in sources if name != "sound"), said


def test_a_module_that_does_not_load_is_a_fault(build: ModuleType, tmp_path: Path) -> None:
    from switch_moe import native

    broken = tmp_path / "_cpu.cpython-311-x86_64-linux-gnu.so"
    broken.write_bytes(b"no module")
    assert "ImportError" in build.load_fault(broken)
    if native.cpu.module is not None:
        assert build.load_fault(Path(native.cpu.module.__file__)) == ""


def test_only_what_was_built_is_announced(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = build.NinjaBuild(setuptools.Distribution())
    built, missing = tmp_path / "_cpu.so", tmp_path / "_cuda.so"
    command._built = [built]
    mapping = {"lib/_cpu.so": str(built), "lib/_cuda.so": str(missing)}
    monkeypatch.setattr(build.build_ext, "get_output_mapping", lambda self: mapping)
    assert command.get_output_mapping() == {"lib/_cpu.so": str(built)}


def test_without_compiled_code(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    command = build.NinjaBuild(setuptools.Distribution())
    monkeypatch.setattr(command, "_output", lambda extension: Path("/nowhere/none.so"))
    monkeypatch.setenv("SWITCH_MOE_CPU", "0")
    command.run()
    assert "built nothing: SWITCH_MOE_CPU=0" in capsys.readouterr().out
    monkeypatch.setenv("SWITCH_MOE_CPU", "no")
    with pytest.raises(SystemExit, match="SWITCH_MOE_CPU is 'no'; it must be 0 or 1"):
        command.run()


def test_no_pybind11(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pybind11", None)
    command = build.NinjaBuild(setuptools.Distribution())
    with pytest.raises(SystemExit, match="pybind11 was not found; install it with: pip install pybind11"):
        command._write_ninja_file(None, {build.CPU.name: tmp_path / "out"})


def test_no_ninja(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja.ninja_syntax", None)
    with pytest.raises(SystemExit, match="ninja was not found; install it with: pip install ninja"):
        build.import_ninja()


def test_no_compiler(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        SystemExit, match=r"no C\+\+ compiler was found .*apt-get install g\+\+.*SWITCH_MOE_CPU=0"
    ):
        build.find_compiler()
    monkeypatch.setenv("CXX", "/opt/none/g++")
    with pytest.raises(SystemExit, match=r"CXX=/opt/none/g\+\+ was not found"):
        build.find_compiler()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc").glob("*.cu")))
def test_kernels_compile_without_warnings_and_spills(
    build: ModuleType, tmp_path: Path, source: str, arch: str
) -> None:
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc; CI has it")
    flags = ["-O3", "-std=c++17", *build.arch_flags([arch]), "-Xptxas=-v", "-Werror=all-warnings"]
    flags.append("-Xcompiler=-Wall,-Wextra,-Werror")
    command = [nvcc, *flags, "-c", ROOT / "csrc" / source, "-o", tmp_path / "kernels.o"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Potential Performance Loss" not in result.stderr
    kernels = result.stderr.split("Compiling entry function ")[1:]
    assert kernels
    for report in kernels:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
        shared = re.search(r"(\d+) bytes smem", report)
        assert shared is None or int(shared[1]) <= 48 * 1024, report  # what a kernel may have unasked
