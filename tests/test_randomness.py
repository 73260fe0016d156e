"""Random numbers as a function of seed, step and position."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from switch_dit.randomness import Stream, normal, philox

# Counter, key and result: the known answers that Random123 publishes for Philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    found = philox(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in found) == expected


def test_a_part_of_a_batch_gets_what_the_whole_would() -> None:
    """Any split over ranks, any order, and the step as a number or as a tensor."""
    stream, every = Stream(7, 3), torch.arange(24)
    whole = stream.uniform(5, every, 13)
    for parts in (2, 3, 4):
        assert torch.equal(torch.cat([stream.uniform(5, part, 13) for part in every.chunk(parts)]), whole)
    assert torch.equal(stream.uniform(torch.tensor(5), every.flip(0), 13), whole.flip(0))
    assert torch.equal(stream.uniform(5, every, 7), whole[:, :7])


@pytest.mark.parametrize("other", [Stream(8, 3), Stream(7, 4), Stream(7 + 2**32, 3)])
def test_seed_purpose_and_step_tell_numbers_apart(other: Stream) -> None:
    mine, every = Stream(7, 3), torch.arange(64)
    first = mine.bits(5, every, 16)
    for bits in (other.bits(5, every, 16), mine.bits(6, every, 16), mine.bits(5, every + 64, 16)):
        assert (bits == first).float().mean() < 0.01
    assert len(first.unique()) == first.numel()


def test_distributions() -> None:
    """Kolmogorov and Smirnov do not tell them from uniform and normal; nothing reaches 0, 1 or infinity."""
    uniform = Stream(0, 0).uniform(1, torch.arange(2000), 64)
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    found = normal(uniform)
    assert stats.kstest(found.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack([found[:, :32].flatten(), found[:, 32:].flatten()]))[0, 1]) < 0.02
    extreme = normal(torch.tensor([[2.0**-24, 0.5], [1 - 2.0**-24, 0.5]]))
    assert extreme.isfinite().all()
    assert extreme.abs().max() < math.sqrt(2 * 24 * math.log(2)) + 1e-4


@pytest.mark.parametrize(
    ("seed", "purpose", "error", "words"),
    [(-1, 0, ValueError, "seed is -1"), (2**64, 0, ValueError, "seed is 184"),
     (0, 2**32, ValueError, "purpose is"), (1.5, 0, TypeError, "seed is 1.5")],
)  # fmt: skip
def test_bad_input(seed: int, purpose: int, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Stream(seed, purpose)
