"""The Triton kernels under every Triton that a supported torch brings, each laid over this environment.

    python tests/tritons.py                # all; `make tritons`
    python tests/tritons.py 3.6.0          # this one
    python tests/tritons.py 3.7.1 --only compiled_kernels

The tests of the kernels run in the interpreter, and all tests of the machine code. A Triton lies in a folder
of its own in build/tritons, before everything else on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRITONS = {
    "3.6.0": ["triton==3.6.0", "numpy<2.4"],  # of torch 2.11; its interpreter does not run with numpy 2.4
    "3.7.1": ["triton==3.7.1"],  # of torch 2.13
    "newest": ["triton"],
}
STEMS = (
    "alignment", "compiled_kernels", "diffusion_prior", "dispatch", "expert_linear_kernels", "expert_mlp",
    "interpreter_bfloat16", "merge_experts", "route_pairs", "routed_mlp_kernels", "timestep_gate",
    "token_gate", "warm_up",
)  # fmt: skip


def run(*command: str | Path, **variables: str) -> None:
    """Runs a command in the repository; ``CalledProcessError`` where it fails."""
    print("+", *command, flush=True)
    subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True)


def test(name: str, stems: Sequence[str]) -> None:
    """Installs a Triton, or brings it up to date, and runs the tests of some stems with it."""
    folder = ROOT / "build" / "tritons" / name
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--target"]
    run(*pip, folder, *TRITONS[name])
    path = os.pathsep.join([str(folder), str(ROOT)])
    code = f"import triton; assert triton.__file__.startswith({str(folder)!r}); print(triton.__version__)"
    run(sys.executable, "-c", code, PYTHONPATH=path)
    files = [f"tests/test_{stem}.py" for stem in stems]
    run(sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", *files, PYTHONPATH=path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "tritons", nargs="*", metavar="TRITON", help=f"of {', '.join(TRITONS)}; all by default"
    )
    parser.add_argument(
        "--only", nargs="+", choices=STEMS, default=STEMS, help="tests of these stems; all by default"
    )
    parser.add_argument("--skip", nargs="+", choices=STEMS, default=(), help="no tests of these stems")
    arguments = parser.parse_args()
    names = arguments.tritons or list(TRITONS)
    unknown = [name for name in names if name not in TRITONS]
    if unknown:
        parser.error(f"TRITON is {unknown[0]}; it must be one of {', '.join(TRITONS)}")
    try:
        for name in names:
            test(name, [stem for stem in arguments.only if stem not in arguments.skip])
    except subprocess.CalledProcessError as failed:
        return failed.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
