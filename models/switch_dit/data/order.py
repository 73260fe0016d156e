"""The order of training images, and the workers that read them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from switch_moe.ops._checks import check_integers

if TYPE_CHECKING:
    from switch_dit.data import Data


def batches(
    count: int, batch_size: int, seed: int, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[Tensor]:
    """Endless shuffled batches of indices below ``count`` from ``start_step`` on, int64 [batch_size / ranks].

    Epoch e has the permutation of (seed, e), cut into global batches of ``batch_size``; what remains is left
    out. A rank takes its slice of each, so that all ranks together see the same batch for any ``world_size``.
    The batch of a step depends on nothing before it. ``ValueError`` where the numbers do not fit.
    """
    check_integers(count=count, batch_size=batch_size, world_size=world_size)
    check_integers(0, 2**62, start_step=start_step, rank=rank)
    check_integers(0, 2**32 - 1, seed=seed)
    if batch_size > count:
        raise ValueError(f"batch_size is {batch_size}; there are {count} images, and it must be at most that")
    if batch_size % world_size:
        raise ValueError(f"batch_size is {batch_size}; it must be a multiple of the {world_size} processes")
    if rank >= world_size:
        raise ValueError(f"rank is {rank}; it must be below world_size, {world_size}")
    own, per_epoch = batch_size // world_size, count // batch_size

    def walk() -> Iterator[Tensor]:
        first = start_step % per_epoch
        for epoch in itertools.count(start_step // per_epoch):
            generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator, device="cpu")
            for place in range(first, per_epoch):
                begin = place * batch_size + rank * own
                yield order[begin : begin + own]
            first = 0

    return walk()


class _Batches(torch.utils.data.Dataset[Any]):
    """Reads whole batches. A worker hands errors over as they are, without its traceback around them."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitem__(self, item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | Exception:
        try:
            return self.data.batch(*item)
        except (ValueError, OSError) as error:
            return error


def _as_it_is(item: Any) -> Any:
    return item


def loaded(
    data: Data, plan: Iterable[tuple[Tensor, Tensor]], workers: int = 0, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """``data.batch(indices, flips)`` for each pair of ``plan``, in order, read ahead by ``workers``.

    These are processes, or threads where a batch is only copied (``data.threads``): handing it over from
    another process takes several times as long as the copy. Workers keep no state and no random numbers, so
    their number changes nothing but the speed.
    """
    check_integers(0, workers=workers)
    if data.threads and workers:
        yield from _threaded(data, plan, workers, pin_memory)
        return
    loader = DataLoader(
        _Batches(data), sampler=plan, batch_size=None, collate_fn=_as_it_is, num_workers=workers,
        pin_memory=pin_memory, generator=torch.Generator("cpu"),
    )  # fmt: skip
    for item in loader:
        if isinstance(item, Exception):
            raise item
        yield item


def _threaded(
    data: Data, plan: Iterable[tuple[Tensor, Tensor]], workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    def read(item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, labels = data.batch(*item)
        return (x.pin_memory(), labels.pin_memory()) if pin_memory else (x, labels)

    pool, ahead = ThreadPoolExecutor(workers), deque[Future[tuple[Tensor, Tensor]]]()
    try:
        for item in plan:
            ahead.append(pool.submit(read, item))
            if len(ahead) > 2 * workers:  # as many as a DataLoader reads ahead
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
