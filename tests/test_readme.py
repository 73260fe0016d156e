"""The front page: every example, command and path of README.md is real."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if not language and line.startswith(("python ", "make ", "pytest", "pip "))
]

# What the diff is applied to: the lines of facebookresearch/DiT that it touches, around parts cut short.
DIT = """
import torch
import torch.nn as nn
def modulate(x, a, b):
    return x + x * b[:, None] + a[:, None]
class TimestepEmbedder(nn.Embedding):
    def __init__(self, hidden_size):
        super(TimestepEmbedder, self).__init__(1000, hidden_size)
class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, **block_kwargs):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa)) + x
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x
class DiT(nn.Module):
    def __init__(self, hidden_size=32, depth=2):
        super(DiT, self).__init__()
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, 2) for _ in range(depth)])
    def forward(self, x, t):
        t = self.t_embedder(t)                   # (N, D)
        c = t
        for block in self.blocks:
            x = block(x, c)                      # (N, T, D)
        return x
def train(model, x, t):
        if True:
            loss_dict = {"loss": model.module(x, t).square()}
            loss = loss_dict["loss"].mean()
            return loss
"""  # noqa: E501


def test_diff_turns_dit_into_switch_dit() -> None:
    source = DIT
    diff = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1]
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    dense, switch = {}, {}
    exec(DIT, dense)
    exec(source, switch)
    torch.manual_seed(0)
    old, model = dense["DiT"](), switch["DiT"]()
    model.load_state_dict(old.state_dict(), strict=False)
    x, t = torch.randn(4, 16, 32), torch.randint(1000, (4,))
    torch.testing.assert_close(model(x, t), old(x, t))  # the experts start at zero
    switch["train"](torch.nn.ModuleDict({"module": model}).train(), x, t).backward()
    assert model.prior_loss > 0
    assert model.router.weight.grad.norm() > 0
    assert model.blocks[0].moe.weight.grad.norm() > 0


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_example_runs(block: str) -> None:
    exec(block, {})


@pytest.mark.slow
def test_scripts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, so that their imports are paid once."""
    monkeypatch.chdir(tmp_path)
    for number, pixels in enumerate(
        np.random.default_rng(0).integers(0, 256, (16, 40, 48, 3), dtype=np.uint8)
    ):
        place = tmp_path / "photos" / f"class {number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    tensors, sizes = golden("dit")
    weights = {key.removeprefix("state_dict."): v for key, v in tensors.items() if "state_dict." in key}
    torch.save(weights, tmp_path / "DiT-XL-2-256x256.pt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scripts = [command for command in COMMANDS if command.startswith("python models/")]
    assert len(scripts) >= 6
    for command in scripts:
        words = shlex.split(command)[1:]
        if "--cuda-graph" in words and not torch.cuda.is_available():
            words.remove("--cuda-graph")
        if "train" in words[0]:
            words += ["--model", "tiny/4", "--batch-size", "8", "--steps", "4", "--warmup", "1"]
            words += ["--generated", "0"]
        elif "sample" in words[0]:
            words += ["--steps", "2"]
        elif "upcycle" in words[0]:
            words += ["--num-heads", str(sizes["num_heads"])]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def test_report_and_make_targets_exist() -> None:
    assert "python -m switch_moe" in COMMANDS
    subprocess.run([sys.executable, "-m", "switch_moe"], cwd=ROOT, capture_output=True, check=True)
    if shutil.which("make"):
        for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
            subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


def test_tools_find_their_commands() -> None:
    pattern = re.search(r"grep -E '(.*)' README.md", (ROOT / ".ci" / "run").read_text())[1]
    assert re.findall(pattern, README, re.MULTILINE) == ['pip install -e ".[test]" && pytest']
    assert "pip install -e . && python models/train_switch_dit.py" in COMMANDS


def test_paths_and_length() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    named = re.findall(r"`((?:csrc|switch_moe|tests|benchmarks|models)/[\w./-]*)`", README)
    for path in set(links + named):
        assert (ROOT / path).exists(), path
    assert len(README.splitlines()) <= 160
