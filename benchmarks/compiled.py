"""Every Triton kernel at every shipped tile, compiled ahead of time for sm_80, sm_90, sm_100 without a GPU.

    python -m benchmarks.compiled                  # the hardest specialisation of each tile
    python -m benchmarks.compiled --all            # every specialisation of many shapes: hours
    python -m benchmarks.compiled --only expert_linear --json compiled.json --markdown compiled.md
    python -m benchmarks.compiled --cuda --json compiled.json --markdown compiled.md

The last is for the CUDA kernels (benchmarks/compiled_cuda.py), which nvcc compiles: it replaces their part of
the JSON file and keeps the rest, as the other commands keep that part.

What is compiled is what the functions of switch_moe/kernels launch on the meta tensors of kernel_calls.py; a
new kernel joins through a call there.

The machine code must spill at most 32 bytes; it must have tensor-core instructions where a product takes
bfloat16, float16 or TF32 (HMMA on sm_80, HGMMA on sm_90, UTC*MMA on sm_100; HMMA for fewer than 64 rows), and
none where all products are true float32; and no more shared memory and registers than the architecture can
launch. The command exits with 1 where one fails.

Below sm_100 the PTX of a kernel is assembled a second time, by the newest other ptxas of this machine: Triton
3.7 itself brings 12.8 for sm_90 and 13.1 for sm_100. Where its instructions differ, a GPU should run the
tests of the kernel under both, because releases 12.8 and 13.0 are known to break some kernels of others
(flash-linear-attention #1262).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import assembler, compiled_cuda, sass
from benchmarks.kernel_calls import calls
from switch_moe.kernels import _launch

Row = dict[str, Any]

ARCHITECTURES = (80, 90, 100)
# Shared memory of a program: sm_80 has 163 KiB, but its code also runs on sm_86 and sm_89.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Each program costs 1 KiB more of it than it asks for.
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS, MAX_THREADS, THREADS_PER_SM, PROGRAMS_PER_SM, TENSOR_COLUMNS = 65536, 1024, 2048, 32, 512
MOST_SPILLED = 32  # bytes of a thread
HEADER = """# Shipped tiles, compiled ahead of time

`python -m benchmarks.compiled --markdown benchmarks/results/compiled.md` wrote this with Triton {triton} and
its assembler, ptxas {ptxas}. No GPU took part, and no tile has been timed.
Each tile is the largest found that compiles without spills for its architecture, because a larger tile reads
less for each FLOP. "Odd" is the hardest of the sizes whose rows are no multiples of 16 bytes.

The last column compares the instructions that ptxas {first} and {second} make of the same PTX for sm_80 and
sm_90. Where they differ, run the tests of the kernel under both on a GPU before anything else: releases 12.8
and 13.0 are known to break some kernels of others. `make gpu` runs them so.
"""
TILE = re.compile("BLOCK|ROWS$|COLS$|INNER$")  # constants that are tile sizes
SIZES = ("D", "D_IN", "D_OUT", "D_LEFT", "D_RIGHT", "H", "N", "K")  # constants that are lengths of rows


class Specialisation(NamedTuple):
    """A recorded launch, as Triton's own launcher specialises it."""

    launch: _launch.Launch
    arch: int
    arguments: dict[str, Any]  # by name
    signature: dict[str, str]
    constexprs: dict[tuple[int], Any]
    attrs: dict[Any, Any]
    options: Any

    @property
    def name(self) -> str:
        return f"{self.launch.kernel.__module__.rsplit('.', 1)[-1]}.{self.launch.kernel.__name__}"

    @property
    def dtype(self) -> str:
        """The narrowest floating type of its arguments."""
        tensors = [argument for argument in self.launch.args if isinstance(argument, Tensor)]
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        name = str(min(floating or tensors, key=Tensor.element_size).dtype).removeprefix("torch.")
        return "tf32" if name == "float32" and "tf32" in self.launch.meta.values() else name

    @property
    def tile(self) -> dict[str, int]:
        return {name: value for name, value in self.launch.meta.items() if TILE.match(name)}

    @property
    def odd(self) -> bool:
        """Whether it reads rows that are no multiples of 16 bytes."""
        size = 2 if self.dtype.endswith("float16") else 4
        lengths = [self.launch.meta[name] for name in SIZES if name in self.launch.meta]
        return self.name.startswith(("expert", "routed")) and any(length * size % 16 for length in lengths)

    @property
    def tiling(self) -> tuple[Any, ...]:
        """The choice that a kernel's tile function made."""
        dtype = self.dtype.replace("bfloat16", "float16")  # alike but for the types of instructions
        return (
            self.name,
            self.arch,
            self.odd,
            dtype,
            *self.tile.items(),
            self.options.num_warps,
            self.options.num_stages,
        )

    @property
    def group(self) -> tuple[Any, ...]:
        """The default compiles one of each: by tile, branches and the number of chosen experts."""
        return (self.tiling, self.launch.meta.get("TOP_K"), *self.branches)

    @property
    def branches(self) -> list[str]:
        """The branches that are compiled in."""
        return [name for name, value in self.launch.meta.items() if value is True]

    @property
    def key(self) -> str:
        """Equal for launches of the same machine code."""
        return repr((self.name, self.arch, self.signature, self.constexprs, self.attrs, vars(self.options)))

    @property
    def size(self) -> int:
        """The largest of a group has the most columns and experts compiled in."""
        return sum(value for value in self.constexprs.values() if isinstance(value, int))


def specialise(launch: _launch.Launch, arch: int) -> Specialisation:
    backend, bind = _binder(launch.kernel, arch)
    bound, specialization, _ = bind(*launch.args, **launch.meta)
    options, *rest = launch.kernel._pack_args(backend, dict(launch.meta), bound, specialization, None)
    return Specialisation(launch, arch, bound, *rest, options)


@functools.cache
def _binder(kernel: Any, arch: int) -> tuple[Any, Callable[..., Any]]:
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def record(wanted: list[Callable[[], None]], arch: int) -> list[Specialisation]:
    """What the calls launch on an architecture."""
    with _launch.record(arch) as launches:
        for call in wanted:
            call()
    return [specialise(launch, arch) for launch in launches]


def select(found: list[Specialisation], everything: bool) -> list[Specialisation]:
    """Those of different machine code, or the largest of each group."""
    found = sorted(found, key=lambda spec: spec.size)
    kept = {spec.key if everything else spec.group: spec for spec in found}.values()
    return sorted(kept, key=lambda spec: (spec.name, spec.arch, spec.dtype, str(spec.group)))


_PRODUCT = re.compile(r"tt\.dot (.*?) : tensor<(?:\d+x)*?(\d+)x\d+x(\w+)> \*")
_TENSOR = re.compile(r"\b(HGMMA|HMMA|UTC[A-Z]*MMA)\b")


def inspect(spec: Specialisation, second: str | None) -> Row:
    """Compiles and reads the machine code, and below sm_100 that of the second assembler."""
    row: Row = {
        "kernel": spec.name, "arch": spec.arch, "dtype": spec.dtype, "tile": spec.tile, "odd": spec.odd,
        "top_k": spec.launch.meta.get("TOP_K"), "branches": spec.branches,
        "warps": spec.options.num_warps, "stages": spec.options.num_stages,
    }  # fmt: skip
    source = ASTSource(spec.launch.kernel, spec.signature, spec.constexprs, spec.attrs)
    try:
        target = GPUTarget("cuda", spec.arch, 32)
        kernel = triton.compile(source, target=target, options=vars(spec.options))
    except Exception as error:  # whatever the compiler raises is this kernel's fault, and a row of the report
        return row | {"faults": {"compiles": f"{type(error).__name__}: {error}"}}
    products = [
        (int(rows), "tf32" if "tf32" in arguments else kind)
        for arguments, rows, kind in _PRODUCT.findall(kernel.asm["ttir"])
    ]
    compared = second is not None and spec.arch < 100
    # Without one in PTX there is none in machine code; disassembly takes a third of the time.
    code = _disassemble(kernel.asm["cubin"], compared or "mma" in kernel.asm["ptx"])
    registers, *stack = (int(re.search(rf"{name}:(\d+)", code)[1]) for name in ("REG", "STACK", "LOCAL"))
    tensor = _TENSOR.findall(code)
    row |= {
        "threads": int(re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])[1]), "registers": registers,
        "spilled": sum(stack), "shared": kernel.metadata.shared,
        "tensor_columns": getattr(kernel.metadata, "tmem_size", None) or 0, "products": products,
        "tensor": {name: tensor.count(name) for name in sorted(set(tensor))},
    }  # fmt: skip
    if compared:
        again = _assemble(kernel.asm["ptx"], second)
        same = again and sass.instructions(code) == sass.instructions(_disassemble(again, True))
        row["same_under_both"] = same  # None where there is no second code
    return row | {"resident": resident(row), "faults": faults(row)}


def assemblers(arch: int) -> tuple[assembler.Assembler, assembler.Assembler | None]:
    """The ptxas that Triton takes for an architecture, and the newest other one of this machine."""
    own, second, _ = assembler.pair(divmod(arch, 10))
    return own, second


def _assemble(ptx: str, ptxas: str) -> bytes | None:
    """The machine code of PTX; None from an assembler that is too old for this version of PTX."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        name = re.search(r"\.target (\w+)", ptx)[1]
        command = [ptxas, f"--gpu-name={name}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Unsupported .version" in done.stderr:
            return None
        done.check_returncode()
        return target.read_bytes()


def _disassemble(cubin: bytes, code: bool) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return sass.disassemble(file.name, code)


def _allocated_registers(row: Row) -> int:
    """Registers of a program; a warp gets them in units of 256."""
    return -(-row["registers"] * 32 // 256) * 256 * (row["threads"] // 32)


def resident(row: Row) -> int:
    """Programs that an SM holds at once."""
    return min(
        REGISTERS // _allocated_registers(row),
        SHARED_PER_SM[row["arch"]] // (row["shared"] + 1024),
        THREADS_PER_SM // row["threads"],
        PROGRAMS_PER_SM,
        *([TENSOR_COLUMNS // row["tensor_columns"]] if row["tensor_columns"] else []),
    )


def faults(row: Row) -> dict[str, str]:
    """What is wrong with a kernel, by property."""
    found = {}
    if row["spilled"] > MOST_SPILLED:
        found["spills"] = f"{row['spilled']} bytes of stack are above {MOST_SPILLED}"
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found["shared memory"] = f"{row['shared']} bytes are above {SHARED_LIMIT[row['arch']]}"
    if _allocated_registers(row) > REGISTERS or row["threads"] > MAX_THREADS:
        found["registers"] = f"{row['registers']} for each of {row['threads']} threads"
    for rows, kind in row["products"]:
        group = rows >= 64 and row["warps"] >= 4  # the least that instructions of a warp group multiply
        wanted = {80: "HMMA", 90: "HGMMA", 100: "UTC"}[row["arch"] if group else 80]
        if kind != "f32" and not any(name.startswith(wanted) for name in row["tensor"]):
            found["tensor cores"] = f"a product of {rows} rows in {kind} has no {wanted}, but {row['tensor']}"
    if {kind for _, kind in row["products"]} == {"f32"} and row["tensor"]:
        found["float32"] = f"true float32 products take {row['tensor']}"
    return found


def describe(row: Row) -> str:
    """What a kernel's machine code takes, in a cell."""
    if "registers" not in row:
        return "does not compile"
    parts = [
        f"{row['registers']} registers",
        f"{-(-row['shared'] // 1024)} KiB",
        f"{row['resident']} resident",
    ]
    parts += [f"{count} {name}" for name, count in row["tensor"].items()]
    parts += [f"{row['spilled']} bytes spilled"] if row["spilled"] else []
    return ", ".join(parts)


def lines(rows: list[Row]) -> Iterator[str]:
    """A table in Markdown: a line for each kernel, type and tile, a column for each architecture."""
    found: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        tile = " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in row["tile"].items())
        tile += f" k={row['top_k']}" if row["top_k"] else ""
        tile += f", {row['warps']} warps, {row['stages']} stages{', odd' if row['odd'] else ''}"
        key = (row["kernel"].split(".")[1].strip("_").removesuffix("_kernel"), row["dtype"], tile)
        found.setdefault(key, {})[row["arch"]] = row
    names = [*(f"sm_{arch}" for arch in ARCHITECTURES), "same under both"]
    yield f"| kernel | type | tile | {' | '.join(names)} |"
    yield "|---" * (3 + len(names)) + "|"
    for key, cells in found.items():
        columns = [describe(cells[arch]) if arch in cells else "" for arch in ARCHITECTURES]
        differ = [f"sm_{arch}" for arch, row in cells.items() if row.get("same_under_both") is False]
        same = f"**{' and '.join(differ)}: compare first on a GPU**" if differ else "yes"
        compared = any(row.get("same_under_both") is not None for row in cells.values())
        yield f"| {' | '.join([*key, *columns, same if compared else ''])} |"


def page(report: dict[str, Any]) -> str:
    """The report in Markdown: a table for each operation, the hardest specialisation of each tile.

    Of the assemblers it says that two differ where they do for any specialisation.
    """
    rows = report["rows"]
    hardest: dict[tuple[Any, ...], Row] = {}
    different: set[tuple[Any, ...]] = set()
    for row in rows:
        sizes = (*row["tile"].items(), row["warps"], row["stages"], row["odd"])
        key = (row["kernel"], row["arch"], row["dtype"], *sizes)
        if key not in hardest or row.get("registers", 0) > hardest[key].get("registers", 0):
            hardest[key] = row
        if row.get("same_under_both") is False:
            different.add(key)
    for key in different:
        hardest[key] = hardest[key] | {"same_under_both": False}
    versions = [f"{version} for {', '.join(archs)}" for version, archs in report["ptxas"].items()]
    first, second = next(iter(report["ptxas"])), report["second_ptxas"]
    parts = [HEADER.format(triton=report["triton"], ptxas=" and ".join(versions), first=first, second=second)]
    for operation in sorted({row["kernel"].split(".")[0] for row in rows}):
        of_operation = [row for row in hardest.values() if row["kernel"].split(".")[0] == operation]
        parts += [f"## {operation}\n", "\n".join(lines(of_operation)) + "\n"]
    parts += ["\n".join(compiled_cuda.lines(report["cuda"])) + "\n"] if "cuda" in report else []
    return "\n".join(parts)


_selected: list[Specialisation] = []  # for the forked workers: kernels cannot be pickled


def _inspect_numbered(number: int, second: str | None) -> tuple[int, Row]:
    return number, inspect(_selected[number], second)


def inspect_all(selected: list[Specialisation], jobs: int, second: str | None) -> list[Row]:
    """Rows in the order of ``selected``."""
    _selected[:] = selected
    rows: list[Row] = [{}] * len(selected)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        inspected = pool.imap_unordered(
            functools.partial(_inspect_numbered, second=second), range(len(selected))
        )
        for done, (number, row) in enumerate(inspected, 1):
            rows[number] = row
            state = ", ".join(f"{name}: {fault}" for name, fault in row["faults"].items()) or "fine"
            name = f"{row['kernel']} sm_{row['arch']} {row['dtype']} {row['tile']}"
            print(f"{done}/{len(selected)} {name}: {describe(row)}: {state}", file=sys.stderr, flush=True)
    return rows


def calls_of(path: str) -> Callable[[bool], Iterator[Callable[[], None]]]:
    """The function ``calls`` of a Python file."""
    spec = importlib.util.spec_from_file_location("calls", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.calls


def dump(report: dict[str, Any]) -> str:
    """A report in JSON, with a line for each row."""
    parts = []
    for name, value in report.items():
        if name == "rows":
            text = "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in value) + "\n]"
        else:
            text = dump(value) if name == "cuda" else json.dumps(value)
        parts.append(f'"{name}": {text}')
    return f"{{{', '.join(parts)}}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every specialisation, not one of each tile")
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels whose module.name contains it")
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables there in Markdown")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--calls", metavar="FILE", help="compile what calls() of this Python file launches")
    parser.add_argument(
        "--ptxas", metavar="FILE", type=Path, nargs="+", default=[],
        help="the second assembler; with --cuda more than those of this machine",
    )  # fmt: skip
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels, into an existing JSON file")
    arguments = parser.parse_args()
    before = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for path in arguments.ptxas:
        if assembler.assembler(str(path)) is None:
            sys.exit(f"--ptxas is {path}; it must be a ptxas that runs")
    if arguments.cuda:
        if "rows" not in before:
            sys.exit(
                f"--json is {arguments.json}; with --cuda it must be a file that a run without --cuda wrote"
            )
        try:
            report = before | {"cuda": compiled_cuda.report([str(path) for path in arguments.ptxas])}
        except RuntimeError as missing:
            sys.exit(f"--cuda: {missing}")
        wrong = [fault for row in report["cuda"]["rows"] for fault in compiled_cuda.all_faults(row)]
        print("\n".join(wrong) or "no faults", file=sys.stderr)
    else:
        report = triton_report(arguments) | ({"cuda": before["cuda"]} if "cuda" in before else {})
        wrong = [row for row in report["rows"] if row["faults"]]
    if arguments.markdown:
        arguments.markdown.write_text(page(report))
    if arguments.json:
        arguments.json.write_text(dump(report) + "\n")
    if wrong:
        sys.exit(1)


def triton_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report without the part about CUDA kernels."""
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, so kernels are interpreted and not compiled; unset it")
    wanted = list((calls_of(arguments.calls) if arguments.calls else calls)(arguments.all))
    found = [spec for arch in arguments.arch for spec in record(wanted, arch) if arguments.only in spec.name]
    selected = select(found, arguments.all)
    second = assembler.assembler(str(arguments.ptxas[0])) if arguments.ptxas else assemblers(90)[1]
    rows = inspect_all(selected, arguments.jobs, second and second.path)
    versions: dict[str, list[str]] = {}
    for arch in arguments.arch:
        versions.setdefault(str(assemblers(arch)[0]), []).append(f"sm_{arch}")
    return {
        "triton": triton.__version__, "ptxas": versions, "second_ptxas": second and str(second), "rows": rows,
    }  # fmt: skip


if __name__ == "__main__":
    main()
