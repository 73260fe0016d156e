"""A few hundred of fuzz_ops.py's calls; `make fuzz` runs 10,000. A fault prints its seed."""

from __future__ import annotations

import fuzz_ops
import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_calls(first: int) -> None:
    faults = {f"python tests/fuzz_ops.py --seed {s}": fuzz_ops.fault(s) for s in range(first, first + 100)}
    assert {command: found for command, found in faults.items() if found} == {}


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fuzz_ops.ops.expert_linear

    def off(x: Tensor, **options: object) -> Tensor:
        return original(x, **options) * (1.0 if x.dtype == torch.float64 else 1.01)

    monkeypatch.setattr(fuzz_ops.ops, "expert_linear", off)
    monkeypatch.setattr(fuzz_ops, "OPERATIONS", (fuzz_ops.expert_linear,))
    monkeypatch.setattr(fuzz_ops, "CHECKS", (fuzz_ops.check_values,))
    monkeypatch.setattr(fuzz_ops, "FLOATS", (torch.float32,))
    assert sum("is off by" in fuzz_ops.fault(seed) for seed in range(30)) > 10  # the others have no numbers


def test_a_bad_call_that_is_taken_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_ops.ops, "diffusion_prior_loss", lambda **options: torch.zeros(()))
    monkeypatch.setattr(fuzz_ops, "expert_linear", fuzz_ops.diffusion_prior_loss)
    monkeypatch.setattr(fuzz_ops, "CHECKS", (fuzz_ops.check_refusal,))
    with pytest.raises(fuzz_ops.Fault, match="not refused"):
        fuzz_ops.call(1)
