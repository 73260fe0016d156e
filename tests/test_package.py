"""What is imported, the report and the rules of the tree."""

from __future__ import annotations

import os
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


MINIMAL = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"einops", "pytest_benchmark", "diffusers", "safetensors", "tyro", "tqdm",
                                  "matplotlib", "PIL", "sklearn", "scipy", "pytest", "pybind11", "ninja"}:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())
import torch
from switch_moe import DiffusionPrior, Router, SwitchMoE

for kind in ("linear", "mlp", "swiglu"):
    SwitchMoE(16, expert=kind)(torch.randn(2, 40, 16), torch.randn(2, 16), modulate=True).sum().backward()
router, prior = Router(2, 16), DiffusionPrior(2, 3, 2)
selected = router(torch.randn(1000, 16), selected=True).selected()
probs = router(torch.randn(4, 16)).probs.transpose(0, 1).flatten(1)
prior.loss(probs, torch.tensor([0, 1, 500, 999]), prior.match(selected)).backward()
print("works")
"""


def test_the_layer_needs_torch_numpy_and_triton_only() -> None:
    assert python(MINIMAL).strip() == "works"


@pytest.mark.slow
def test_plain_pytorch_in_place_of_compiled_code_is_said_once() -> None:
    code = (
        "import torch, warnings; from switch_moe import SwitchMoE, native; from unittest import mock; "
        "layer, x, e = SwitchMoE(16), torch.randn(2, 3, 16), torch.randn(2, 16); "
        "layer(x, e); warnings.simplefilter('always'); "
        "patch = mock.patch.object(native, 'cpu', native.NativeModule('switch_moe._absent', 'the remedy')); "
        "patch.start(); layer(x, e); layer(x, e)"
    )
    for environment, times in (({}, 1), ({"SWITCH_MOE_CPU": "0"}, 0)):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, check=True, env=os.environ | environment
        )
        assert done.stderr.count("RuntimeWarning: switch_moe runs in plain PyTorch on this CPU") == times
        assert done.stderr.count("switch_moe._absent is not built; the remedy") == times


def test_a_module_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from switch_moe import native

    assert native.NativeModule("switch_moe._cpu", "the remedy").reason is None
    monkeypatch.setattr(native, "checksum", lambda: 1)
    reason = native.NativeModule("switch_moe._cpu", "the remedy").reason
    assert reason == "switch_moe._cpu was built from other sources than those here; the remedy"
    monkeypatch.setattr(native, "checksum", lambda: None)  # installed, without the sources
    assert native.NativeModule("switch_moe._cpu", "the remedy").reason is None


def test_the_checksum_sees_every_change(tmp_path: Path) -> None:
    from switch_moe.sources import checksum

    assert checksum(tmp_path) is None
    (tmp_path / "a.cpp").write_text("int a;")
    found = [checksum(tmp_path)]
    (tmp_path / "b.h").write_text("")
    found.append(checksum(tmp_path))
    (tmp_path / "a.cpp").write_text("int b;")
    found.append(checksum(tmp_path))
    assert len({*found, checksum(tmp_path)}) == 3


def test_an_installed_copy_that_a_folder_hides_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from switch_moe import native

    installed = tmp_path / "switch_moe"
    installed.mkdir()
    (installed / "_elsewhere.so").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = native.NativeModule("switch_moe._elsewhere", "the remedy").reason
    assert reason is not None
    assert f"which hides the installed {installed}; the remedy" in reason


def test_addresses_are_given_for_what_fits_only() -> None:
    from switch_moe.native import address

    x = torch.zeros(4, 6)
    assert address(x, torch.float32, 24) == x.data_ptr()
    assert address(None, torch.float32, 24) == 0
    crooked = torch.frombuffer(bytearray(9), dtype=torch.uint8)[1:].view(torch.uint8)
    for tensor, dtype in (
        (x.t(), torch.float32), (x[:, ::2], torch.float32), (x[:3], torch.float32), (crooked, torch.uint8),
        (x[:1].expand(4, 6), torch.float32), (x.to("meta"), torch.float32),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="24 numbers side by side on a cpu device"):
            address(tensor, dtype, 24)
    with pytest.raises(TypeError, match=r"given torch\.float32; it takes torch\.int32"):
        address(x, torch.int32, 24)


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
        "expert_linear",
    ):
        assert re.search(rf"^{name} ", report, re.MULTILINE), name
    assert "native cpu      on: expert_linear" in report
    assert "expert_linear   auto takes " in report
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


def test_data_files_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the package reads beside its modules is in the wheel."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    patterns = distribution.package_data["switch_moe"]
    files = {path for pattern in patterns for path in (ROOT / "switch_moe").glob(pattern)}
    there = set((ROOT / "switch_moe").rglob("*.json"))
    assert there
    assert there <= files


def test_versions_agree() -> None:
    import switch_moe

    assert f'version = "{switch_moe.__version__}"' in (ROOT / "pyproject.toml").read_text()
