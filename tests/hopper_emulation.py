"""Builds and runs kernels for Hopper on a CPU: see cuda_on_host/README.md."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests" / "cuda_on_host" / "hopper"
EARLY, LATE, RANDOM = range(3)


class Schedule(NamedTuple):
    """The order in which things happen; the fields are those of hopper::Schedule."""

    loads: int = EARLY
    stores: int = EARLY
    products: int = EARLY
    lagging: int = -1
    reversed: bool = False
    random_warps: bool = False
    seed: int = 1
    lagging_lanes: int = 0

    def as_ints(self) -> ctypes.Array[ctypes.c_int]:
        return (ctypes.c_int * len(self))(*map(int, self))


def schedules(warpgroups: int, seeds: int = 2) -> Iterator[Schedule]:
    """Asynchronous work early, late and mixed; a cluster's warpgroups lag, or their lanes; random orders."""
    yield Schedule(LATE, LATE, LATE)
    yield Schedule()
    yield Schedule(EARLY, LATE, LATE, reversed=True)
    yield Schedule(LATE, EARLY, EARLY, reversed=True)
    for group in range(warpgroups):
        yield Schedule(EARLY, LATE, LATE, lagging=group)
        yield Schedule(LATE, LATE, EARLY, lagging=group)
        yield Schedule(EARLY, EARLY, EARLY, lagging=group, lagging_lanes=2)
    for seed in range(seeds):
        yield Schedule(RANDOM, RANDOM, RANDOM, random_warps=True, seed=seed)


def build(folder: Path, *sources: Path, include: tuple[Path, ...] = ()) -> ctypes.CDLL:
    """A library of kernels and of the emulation, which is compiled once beside ``folder``."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("compiles CUDA sources for the CPU with g++, which is not here; CI has it")
    common = [compiler, "-std=c++20", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror"]
    common += ["-Wno-unknown-pragmas", "-Wno-misleading-indentation"]
    common += [f"-I{path}" for path in (*include, EMULATION, ROOT / "csrc")]
    emulation = folder.parent / "hopper_emulation"
    emulation.mkdir(exist_ok=True)
    # Products run most of the time. The rest is waiting and copying, and takes longer to compile than to run.
    compilations = [
        ([*common, "-O3", "-march=native"], EMULATION / "products.cpp", emulation),
        ([*common, "-O1"], EMULATION / "machine.cpp", emulation),
        ([*common, "-O1"], EMULATION / "copies.cpp", emulation),
        *(([*common, "-O1"], source, folder) for source in sources),
    ]
    objects = [to / f"{source.name}.o" for _, source, to in compilations]
    running = [
        subprocess.Popen([*command, "-x", "c++", "-c", source, "-o", target])
        for (command, source, _), target in zip(compilations, objects, strict=True)
        if not target.exists()
    ]
    failed = [process.args for process in running if process.wait() != 0]
    if failed:
        raise RuntimeError("g++ failed, its messages are above")
    library = folder / "kernels.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    return ctypes.CDLL(str(library))
