"""The compiled CPU code where memory runs out: an exception inside a parallel task becomes a MemoryError."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from switch_moe import native

ROOT = Path(__file__).parent.parent
STARVED = """
import resource
import torch
from switch_moe.cpu import expert_linear as cpu
from switch_moe.ops import expert_linear

torch.set_num_threads(2)
if {apart}:
    cpu.vector_width = lambda dtype: 0
leaves = [torch.randn(4, 300, 520), torch.randn(6, 520, 520), torch.rand(4, 2)]
index = torch.tensor([[0, 1], [2, 3], [4, 5], [1, 0]], dtype=torch.int32)
small = [leaves[0][:, :90, :64].contiguous(), leaves[1][:, :64, :64].contiguous(), leaves[2]]


def run(x, weight, gate):
    x, weight, gate = (tensor.requires_grad_() for tensor in (x, weight, gate))
    expert_linear(x, weight, None, index, gate).square().sum().backward()


torch.ones(300, 300) @ torch.ones(300, 300)  # torch's threads are there, buffers of tasks are not
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
outcomes = set()
for spare in range(0, 24 << 20, 40 << 10):
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, -1))
    try:
        run(*leaves)
        outcomes.add("done")
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises RuntimeError
        outcomes.add(type(error).__name__)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
run(*small)
print(*sorted(outcomes))
"""


@pytest.mark.parametrize("pool", ["torch's OpenMP", "threads of its own"])
def test_exceptions_leave_parallel_tasks(pool: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("compiles parallel.cpp with g++, which is not here; CI has it")
    program = tmp_path / "program"
    sources = [ROOT / "tests/parallel/main.cpp", ROOT / "csrc/parallel.cpp"]
    libraries = ["-Wl,--no-as-needed", "-lgomp"] if "OpenMP" in pool else []
    command = [compiler, "-std=c++17", "-g", "-pthread", f"-I{ROOT / 'csrc'}", *sources, "-o", program]
    subprocess.run([*command, *libraries, "-ldl"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(native.cpu.reason is not None, reason="needs the compiled CPU code")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("apart", [False, True])
def test_memory_that_runs_out(apart: bool) -> None:
    """Whatever allocation fails: Python sees an error, and the process goes on."""
    command = [sys.executable, "-c", STARVED.format(apart=apart)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"MemoryError", "RuntimeError"} & set(done.stdout.split()), "the limit was never met"
