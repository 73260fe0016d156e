"""What is imported, the report and the rules of the tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_torch_and_nothing_heavier() -> None:
    modules = "print(*sorted(sys.modules)); "
    before, after = python(f"import sys, torch; {modules} import switch_moe; {modules}").splitlines()
    added = {name.split(".")[0] for name in set(after.split()) - set(before.split())}
    assert added <= {"switch_moe"} | set(sys.stdlib_module_names) | {"torch"}, added
    heavy = [name for name in after.split() if name.startswith(("torch._dynamo", "torch._inductor"))]
    assert set(heavy) <= set(before.split())


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from switch_moe import __main__, native

    __main__.main()
    report = capsys.readouterr().out
    for name in (
        "switch_moe",
        "python",
        "torch",
        "triton",
        "devices",
        "reference",
        "native cpu",
        "native cuda",
        "triton kernels",
    ):
        assert re.search(rf"^{name} ", report, re.MULTILINE), name
    assert "native cpu      on: expert_linear" in report
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        __main__.main()
        assert "triton kernels  off: a CPU runs Triton kernels in its interpreter" in capsys.readouterr().out
    monkeypatch.setattr(
        native, "cpu", native.NativeModule("switch_moe._absent", "build it with: make install")
    )
    __main__.main()
    assert (
        "native cpu      off: switch_moe._absent is not built; build it with: make install"
        in capsys.readouterr().out
    )


def test_a_module_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from switch_moe.native import NativeModule

    (tmp_path / "broken_module.py").write_text("raise ImportError('libcudart.so.13 not found')")
    monkeypatch.syspath_prepend(tmp_path)
    broken = NativeModule("broken_module", "build it again")
    assert (
        broken.reason
        == "broken_module was built but does not load (libcudart.so.13 not found); build it again"
    )
    with pytest.raises(RuntimeError, match="does not load"):
        broken.require()


def test_core_never_imports_models() -> None:
    for path in (ROOT / "switch_moe").rglob("*.py"):
        assert "switch_dit" not in re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL), path


def test_versions_agree() -> None:
    import switch_moe

    assert f'version = "{switch_moe.__version__}"' in (ROOT / "pyproject.toml").read_text()
