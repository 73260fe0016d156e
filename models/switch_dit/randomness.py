"""Random numbers as a function of where they are used: no generator, no state.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in tensor operations:
the same bits on every device, whatever the batch is split over, and inside a CUDA graph, where the step is a
tensor that each replay reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from switch_moe.ops._checks import check_integers

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what a round adds to the key
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, ...]:
    """Four words of 32 random bits for four words of a counter, which broadcast; all int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product of two 32-bit words wraps in int64, which changes no bit: the masks cut the sign away.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK,
        )  # fmt: skip
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


class Stream:
    """The random numbers of one purpose in a run: a function of seed, step and position in the batch.

    Args:
        seed: of the run, in [0, 2^64).
        purpose: tells streams of the same seed apart, in [0, 2^32).
    """

    def __init__(self, seed: int, purpose: int) -> None:
        check_integers(0, 2**64 - 1, seed=seed)
        check_integers(0, 2**32 - 1, purpose=purpose)
        self.key, self.purpose = (seed & _MASK, seed >> 32), purpose

    def bits(self, step: Tensor | int, position: Tensor, count: int) -> Tensor:
        """``count`` words of 32 random bits for each position of a step, int64 ``[B, count]`` in [0, 2^32).

        Args:
            step: of the run, in [0, 2^32); a number or an int64 scalar.
            position: of the samples in the global batch, int64 ``[B]`` in [0, 2^32).
        """
        blocks = torch.arange(-(-count // 4), device=position.device)
        words = philox((blocks, position[:, None], step, self.purpose), self.key)
        return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]

    def uniform(self, step: Tensor | int, position: Tensor, count: int) -> Tensor:
        """Numbers in (0, 1), float32 ``[B, count]``: odd multiples of 2^-24, which float32 holds exactly."""
        return ((self.bits(step, position, count) >> 9).float() + 0.5) * 2.0**-23


def normal(uniform: Tensor) -> Tensor:
    """Normal numbers from uniform ones in (0, 1), float32 ``[B, 2n]`` both, by Box and Muller.

    From :meth:`Stream.uniform` they are at most 5.8 in size.
    """
    first, second = uniform.chunk(2, dim=1)
    radius = (-2 * first.log()).sqrt_()
    angle = second * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
