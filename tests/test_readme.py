"""The front page: every example, command and path of README.md is real."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if not language and line.startswith(("python ", "make ", "pytest", "pip "))
]
SCRIPTS = [command for command in COMMANDS if command.startswith("python models/train")]

# What the diff is applied to: the lines of facebookresearch/DiT that it touches, around parts cut short.
DIT = """
import torch
import torch.nn as nn
from switch_moe import DiffusionPrior, Router, SwitchMoE
def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
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
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
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
"""


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


@pytest.mark.parametrize("command", SCRIPTS)
def test_training_command_runs(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    if "--data" in words:
        import numpy as np

        images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / "my_images.npz", images=images, labels=np.arange(16) % 2)
        words += ["--model", "tiny/4", "--batch-size", "4"]
    if not torch.cuda.is_available():
        words = [word for word in words if word != "--cuda-graph"]
    if "--help" not in words:
        words += ["--steps", "4", "--warmup", "1", "--generated", "0"]
    run = [sys.executable, str(ROOT / words[0]), *words[1:]]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_other_commands_exist() -> None:
    for command in (word for word in COMMANDS if word.startswith("python models/sample")):
        usage = subprocess.run(
            [sys.executable, str(ROOT / "models/sample_switch_dit.py"), "--help"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert all(option in usage for option in re.findall(r"--[\w-]+", command)), command
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
    made_by_make = {"benchmarks/results/hero.png"}  # by make bench-report
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    named = re.findall(r"`((?:csrc|switch_moe|tests|benchmarks|models)/[\w./-]*)`", README)
    for path in set(links + named) - made_by_make:
        assert (ROOT / path).exists(), path
    assert len(README.splitlines()) <= 175
