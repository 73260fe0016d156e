"""The part of benchmarks.compiled about CUDA kernels for Hopper: compiled for sm_90a without a GPU.

nvcc makes PTX of csrc/expert_linear*.cu, each assembler at hand makes machine code of it, and a row says what
the code of one kernel is like. Kernels are those that are found in the code. What they must be like FAMILIES
says for each template, and a new template joins by a line there. It is a fault where a kernel

- spills, or ptxas reports a potential performance loss of it;
- touches registers beyond what setmaxnreg grants, or asks for more than its block is launched with;
- takes the first operand of a product from elsewhere than its family, has another number of products or of
  multicast loads, or no products in a loop where its family has products.

The same must hold under each other assembler, with what is named in AGREED unchanged.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import assembler, sass

Row = dict[str, Any]

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = [CSRC / "expert_linear.cu", CSRC / "expert_linear_weight.cu"]
ARCHITECTURE = "sm_90a"
SHARED_LIMIT = 227 << 10  # bytes that a block can have
REGISTERS = 65536  # of an SM
AGREED = (
    "spilled", "spills_in_loop", "losses", "products", "from_registers", "loop_products", "loads",
    "multicast", "ldmatrix", "stmatrix",
)  # fmt: skip
INTRODUCTION = """## CUDA kernels for Hopper

`python -m benchmarks.compiled --cuda` wrote this part, with nvcc and ptxas {ptxas} for sm_90a.
No GPU took part.

- Registers of a thread: at launch; used of what setmaxnreg grants, in the warpgroups that multiply and in the
  one that loads.
- Spills: bytes of a thread's stack, and instructions for them in loops that multiply.
- HGMMA: products of a warpgroup, and how many take their first operand from registers. UTMALDG: loads by TMA,
  and how many are multicast. LDSM, STSM: the instructions ldmatrix and stmatrix.
- Main loop: the innermost one with products, its instructions and its products.
- Shared memory: bytes that a block is launched with, as the kernel's header computes them.

Every other assembler made machine code of the same PTX. A kernel agrees where all of the above but registers
and the length of the main loop is the same, and nothing is a fault. Code was compared as text: as it is
("same"), or with registers numbered in the order in which they appear ("registers renamed"); "other order" is
the same opcodes, each as often.
"""


class Family(NamedTuple):
    """What the kernels of a template must be like. Callables take the template's arguments by name."""

    header: str  # in csrc
    arguments: tuple[str, ...]  # of the template
    labels: Callable[[dict[str, Any]], dict[str, Any]]  # columns of the table
    shared: str  # C++ for the bytes of shared memory that a block is launched with
    from_registers: bool  # whether the first operand of its products is in registers
    products: Callable[[dict[str, Any]], int]  # how many there are in the code
    multicast: int  # loads that arrive in both blocks of a cluster
    multiplies: bool = True  # else it has no products, and its warpgroups keep their registers


FAMILIES = {
    "merged_product": Family(
        header="expert_linear_hopper.h",
        arguments=("dtype", "groups", "top_k", "gradient", "modulate"),
        labels=lambda of: {
            "type": of["dtype"],
            "tile": f"{64 * of['groups']} x 256",
            "k": of["top_k"],
            "orientation": "dx" if of["gradient"] else "forward",
            "modulate": "yes" if of["modulate"] else "no",
        },
        shared="MergedProductLayout<{groups}, {top_k}, {modulate}>::kBytes",
        from_registers=True,
        # A step has two, one for each half of the tokens. There are four where a stage is unrolled.
        products=lambda of: 4 if of["groups"] == 2 or (of["dtype"] == "bfloat16" and of["top_k"] <= 2) else 2,
        multicast=1,
    ),
    "weight_gradient": Family(
        header="expert_linear_weight_hopper.h",
        arguments=("dtype", "top_k"),
        labels=lambda of: {"type": of["dtype"], "k": of["top_k"]},
        shared="WeightGradientLayout<{top_k}>::kBytes",
        from_registers=False,
        products=lambda of: 4,  # of a stage of 64 tokens
        multicast=2,  # of x where a pair shares that, of dm where it shares that
    ),
    "add_gradient_parts": Family(
        header="expert_linear_weight_sum.h",
        arguments=("dtype",),
        labels=lambda of: {"type": of["dtype"]},
        shared="0",
        from_registers=False,
        products=lambda of: 0,
        multicast=0,
        multiplies=False,
    ),
}


def identify(name: str) -> tuple[str, dict[str, Any]]:
    """The template and its arguments by name, from the mangled name of a kernel of switch_moe."""
    length, rest = re.fullmatch(r"_ZN10switch_moe(\d+)(\w+)", name).groups()
    template, rest = rest[: int(length)], rest[int(length) :]
    if template not in FAMILIES:
        raise ValueError(
            f"the kernel {template} is not in FAMILIES of benchmarks/compiled_cuda.py, it must be"
        )
    # What follows the name: I, the arguments, E; here types of csrc/hopper.h, int and bool.
    found = re.match(r"I((?:N6hopper\d+\w+?E|Li\d+E|Lb[01]E)+)E", rest)
    values: list[Any] = [
        dtype.lower() or (bool(int(flag)) if flag else int(number))
        for dtype, number, flag in re.findall(
            r"N6hopper\d+(\w+?)E(?=L|N|$)|Li(\d+)E|Lb([01])E", found[1] if found else ""
        )
    ]
    return template, dict(zip(FAMILIES[template].arguments, values, strict=True))


def nvcc() -> str:
    """The compiler's path; ``RuntimeError`` where there is none."""
    found = assembler.cuda_tool("nvcc")
    if found is None:
        raise RuntimeError(
            "nvcc was not found in CUDA_HOME, /usr/local/cuda or PATH; it makes PTX of the kernels"
        )
    return found


def translate(source: Path) -> str:
    """The PTX of a source, as a version that every assembler here takes; all that is used exists since."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels.ptx")
        flags = ["-O3", "-std=c++17", f"-arch={ARCHITECTURE}", f"-I{CSRC}", "-ptx"]
        subprocess.run([nvcc(), *flags, source, "-o", target], check=True)
        return re.sub(r"^\.version .*", ".version 8.0", target.read_text(), flags=re.MULTILINE)


def shared_memory(kernels: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """The bytes that each kernel is launched with, as its header computes them."""
    headers = {FAMILIES[template].header for template, _ in kernels}
    lines = [*(f'#include "{header}"' for header in sorted(headers)), "namespace switch_moe {"]
    for number, (template, arguments) in enumerate(kernels):
        values = {name: str(value).lower() for name, value in arguments.items()}
        lines.append(f"__device__ unsigned shared_{number} = {FAMILIES[template].shared.format(**values)};")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "shared.cu")
        source.write_text("\n".join([*lines, "}"]))
        found = dict(re.findall(r"\d+shared_(\d+)E = (\d+);", translate(source)))
    return [int(found.get(str(number), 0)) for number in range(len(kernels))]  # PTX leaves out a 0


class Assembled(NamedTuple):
    """What an assembler made of PTX: by a kernel's name its code, and what the assembler said of it."""

    kernels: dict[str, sass.Kernel]
    said: dict[str, str]
    losses: list[str]


def assemble(ptx: str, ptxas: str) -> Assembled:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        source.write_text(ptx)
        command = [ptxas, "-O3", f"-arch={ARCHITECTURE}", "-v", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{ptxas} failed: {done.stderr}")
        code = sass.kernels(sass.disassemble(target))
    log = done.stderr
    parts = log.split("Compiling entry function '")[1:]
    said = {part.split("'", 1)[0]: part for part in parts}
    return Assembled(code, said, re.findall(r"(?:\(C\d+\) )?Potential Performance Loss.*", log))


def inspect(name: str, made: Assembled) -> Row:
    """The properties of a kernel that its machine code decides."""
    kernel, said = made.kernels[name], made.said[name]
    code, loop = kernel.code, kernel.innermost("HGMMA")
    products = [one for one in code if one.opcode.startswith("HGMMA")]
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "budgets": kernel.budgets(),
        "spilled": int(re.search(r"(\d+) bytes stack frame", said)[1]),
        "spills_in_loop": max(
            (sass.count(one, "LDL", "STL") for one in kernel.loops_with("HGMMA")), default=0
        ),
        # Those about setmaxnreg name no kernel, so they count for each.
        "losses": [loss for loss in made.losses if name in loss or "in the function" not in loss],
        "products": len(products),
        "from_registers": sum(bool(re.match(r"R\d+", one.operands[1])) for one in products),
        "loop": len(loop),
        "loop_products": sass.count(loop, "HGMMA"),
        "loads": sass.count(code, "UTMALDG"),
        "multicast": sum("MULTICAST" in one.opcode for one in code),
        "ldmatrix": sass.count(code, "LDSM"),
        "stmatrix": sass.count(code, "STSM"),
    }


def faults(row: Row) -> dict[str, str]:
    """What is wrong with a kernel, by property."""
    family, found = FAMILIES[row["kernel"]], {}
    if row["losses"]:
        found["losses"] = "; ".join(row["losses"])
    if row["spilled"] or row["spills_in_loop"]:
        found["spills"] = f"{row['spilled']} bytes of stack, {row['spills_in_loop']} instructions in loops"
    over = [f"{used} of {granted}" for granted, used in row["budgets"] if used > granted]
    if over or bool(row["budgets"]) != family.multiplies:
        found["registers"] = f"{', '.join(over) or 'none'} that setmaxnreg grants"
    elif row["loop_products"]:  # one warpgroup loads, all others multiply
        groups, (most, least) = row["threads"] // 128, (row["budgets"][0][0], row["budgets"][-1][0])
        asked, launched = 128 * (most * (groups - 1) + least), row["threads"] * row["registers"]
        if asked > launched or launched > REGISTERS:
            found["pool"] = f"warpgroups ask for {asked} registers of {launched}, an SM has {REGISTERS}"
    if row["products"] != family.products(row["arguments"]):
        found["products"] = f"{row['products']} HGMMA, expected {family.products(row['arguments'])}"
    if row["from_registers"] != (row["products"] if family.from_registers else 0):
        found["first operand"] = f"in registers for {row['from_registers']} of {row['products']} HGMMA"
    if family.multiplies and not row["loop_products"]:
        found["main loop"] = "no loop has HGMMA"
    if row["multicast"] != family.multicast:
        found["multicast"] = f"{row['multicast']} multicast loads, expected {family.multicast}"
    if row["shared"] > SHARED_LIMIT:
        found["shared memory"] = f"{row['shared']} bytes are above {SHARED_LIMIT}"
    return found


def compare(name: str, row: Row, first: Assembled, other: Assembled) -> Row:
    """A kernel under another assembler: its code beside the first one's, and each property that changed."""
    again = inspect(name, other)
    kernels = [made.kernels[name] for made in (first, other)]
    changed = {key: value for key, value in again.items() if value != row[key]}
    return {
        "code": sass.compare(*(kernel.code for kernel in kernels)),
        "loop": sass.compare(*(kernel.innermost("HGMMA") for kernel in kernels)),
        "changed": changed,
        "agrees": not set(changed) & set(AGREED) and not faults(row | again),
        "faults": faults(row | again),
    }


def assemblers(more: list[str]) -> list[assembler.Assembler]:
    """The toolkit's ptxas and then one of each other version, oldest first."""
    own = assembler.assembler(assembler.cuda_tool("ptxas") or "", ARCHITECTURE)
    if own is None:
        raise RuntimeError("ptxas was not found in CUDA_HOME, /usr/local/cuda or PATH")
    found = [assembler.assembler(path, ARCHITECTURE) for path in [*assembler.candidates(), *more]]
    others = {one.version: one for one in found if one is not None and one.version != own.version}
    return [own, *(others[version] for version in sorted(others))]


def report(more: list[str]) -> dict[str, Any]:
    """The rows of all kernels, under the toolkit's assembler and each other one here or in ``more``."""
    sources, used = [translate(source) for source in SOURCES], assemblers(more)
    reports = [inspect_all(ptx, used) for ptx in sources]
    return reports[0] | {"rows": [row for one in reports for row in one["rows"]]}


def inspect_all(ptx: str, used: list[assembler.Assembler]) -> dict[str, Any]:
    """A row for each kernel of PTX, under the first assembler and beside the others."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        first, *others = pool.map(functools.partial(assemble, ptx), [one.path for one in used])
    names = sorted(first.kernels)
    kernels = [identify(name) for name in names]
    threads = dict(re.findall(r"\.entry (\w+)\([^{]*?\.(?:max|req)ntid (\d+)", ptx))
    rows = []
    for name, (template, arguments), shared in zip(names, kernels, shared_memory(kernels), strict=True):
        row = {"kernel": template, "arguments": arguments, "threads": int(threads[name]), "shared": shared}
        row |= inspect(name, first)
        row["faults"] = faults(row)
        row["others"] = {
            str(one): compare(name, row, first, made) for one, made in zip(used[1:], others, strict=True)
        }
        rows.append(row)
    return {"ptxas": str(used[0]), "others": [str(one) for one in used[1:]], "rows": rows}


def all_faults(row: Row) -> Iterator[str]:
    """A line for each fault of a kernel, and for each that it has under another assembler."""
    kernel = f"{row['kernel']} {row['arguments']}"
    yield from (f"{kernel}: {name}: {fault}" for name, fault in row["faults"].items())
    for version, other in row["others"].items():
        yield from (f"{kernel}: ptxas {version}: {name}: {fault}" for name, fault in other["faults"].items())
        if not other["agrees"]:
            yield f"{kernel}: ptxas {version} changes {other['changed']}"


def describe(row: Row) -> dict[str, Any]:
    """The cells of a kernel's line, by column."""
    used = [f"{used} of {granted}" for granted, used in row["budgets"]]
    lengths = {other["changed"].get("loop", row["loop"]) for other in row["others"].values()} - {row["loop"]}
    agree = [version for version, other in row["others"].items() if not other["agrees"]]
    return FAMILIES[row["kernel"]].labels(row["arguments"]) | {
        "registers": "; ".join([str(row["registers"]), *([", ".join(used)] if used else [])]),
        "spills": f"{row['spilled']}, {row['spills_in_loop']}",
        "HGMMA (from registers)": f"{row['products']} ({row['from_registers']})",
        "UTMALDG (multicast)": f"{row['loads']} ({row['multicast']})",
        "LDSM": row["ldmatrix"],
        "STSM": row["stmatrix"],
        "main loop: instructions, HGMMA": f"{row['loop']}, {row['loop_products']}",
        "shared memory": row["shared"],
        "agrees": f"**not {', '.join(agree)}**" if agree else "all",
        "main loop elsewhere": ", ".join(map(str, sorted(lengths))) or "as long",
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The part of the page: a line for each other assembler, then one for each kernel."""
    rows = report["rows"]
    yield INTRODUCTION.format(ptxas=report["ptxas"])
    yield "| ptxas | kernels that agree | code | main loop |"
    yield "|---|---|---|---|"
    for version in report["others"]:
        others = [row["others"][version] for row in rows]
        counts = [Counter(other[what] for other in others).most_common() for what in ("code", "loop")]
        said = [", ".join(f"{count} {name}" for name, count in count_of) for count_of in counts]
        yield f"| {version} | {sum(one['agrees'] for one in others)} of {len(rows)} | {' | '.join(said)} |"
    for template in sorted({row["kernel"] for row in rows}):
        cells = [describe(row) for row in rows if row["kernel"] == template]
        yield f"\n### {template}\n"
        yield f"| {' | '.join(cells[0])} |"
        yield "|---" * len(cells[0]) + "|"
        yield from (f"| {' | '.join(map(str, one.values()))} |" for one in cells)
