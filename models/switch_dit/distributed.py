"""The processes of a run, which torchrun starts, and how a model lies on them.

    torchrun --nproc_per_node=8 models/train_switch_dit.py ...

Every process computes its part of each batch. By default each has the whole model, and their gradients are
averaged (DistributedDataParallel); ``--fsdp`` leaves each a share of the weights (fully_shard).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from switch_dit.devices import resolve_device
from switch_dit.model import SwitchDiT
from switch_moe import CapacityPredictor, SwitchMoE, TokenMoE, TokenRouter
from switch_moe.noise_moe import NoiseRouter

T = TypeVar("T")

IN_FLOAT32 = (TokenRouter, NoiseRouter, CapacityPredictor)
"""Modules of a block whose weights are float32 whatever the type of the products."""


@dataclass(frozen=True)
class World:
    """The processes of a run.

    rank: of this one, from 0. size: how many there are. group: of gloo, for numbers and objects on the CPU.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def apart(self) -> World:
        """The same processes with a group of their own, for another thread. All must call it."""
        return self if self.size == 1 else replace(self, group=dist.new_group(backend="gloo"))

    def on_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on the first process, on all. What it raises there, all raise.

        On the others the error has the attribute ``told``, so that it is printed once.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0, group=self.group)
        if outcome[1] is not None:
            outcome[1].told = not self.first
            raise outcome[1]
        return outcome[0]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of CPU tensors of all processes."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.size


class Vote:
    """Whether any process has asked for something, agreed upon without waiting.

    The answer of :meth:`ask` is that of the votes at the call before: by then they have met, and every
    process gets the same one at the same call. Alone, a process hears its own vote at once.
    """

    def __init__(self, world: World) -> None:
        self.world, self.pending, self.votes = world, None, torch.zeros((), dtype=torch.int32)

    def ask(self, vote: bool) -> bool:
        if self.world.size == 1:
            return vote
        answer = self._answer()
        self.votes = torch.tensor(int(vote), dtype=torch.int32, device="cpu")
        self.pending = dist.all_reduce(self.votes, dist.ReduceOp.MAX, group=self.world.group, async_op=True)
        return answer

    def _answer(self) -> bool:
        if self.pending is None:
            return False
        self.pending.wait()
        return bool(self.votes)


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The processes that torchrun has started, or this one alone.

    ``device`` is the setting of a run; each process takes the GPU of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    of_process = resolve_device(device)
    if of_process.type == "cuda":
        torch.cuda.set_device(of_process)
    dist.init_process_group("cpu:gloo,cuda:nccl" if of_process.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def shard(model: SwitchDiT, world: World, dtype: torch.dtype) -> None:
    """Leaves each process a share of every weight: of each block, then of the rest.

    Weights and their gradients' sums are float32; the blocks gather them in ``dtype``, but for their own
    routers: a choice by rounded weights would be another choice. Embedders and Switch-DiT's router compute in
    float32, so the rest is gathered as it is, by the forward that routes, and stays gathered until the
    backward.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world.size,))
    precision = None if dtype == torch.float32 else dtype
    # The inputs of a block stay as they are: gates are float32, and autocast looks after the others.
    policy = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
    of_experts = {
        parameter
        for module in model.blocks.modules()
        if isinstance(module, (SwitchMoE, TokenMoE))
        for parameter in module.parameters(recurse=False)
        # A share of the first dimension would be empty for some, and only even shares of others are allowed.
        if parameter.dim() > 1 and parameter.shape[0] < world.size and parameter.shape[1] % world.size == 0
    }
    place = lambda parameter: Shard(1) if parameter in of_experts else Shard(0)  # noqa: E731
    for block in model.blocks:
        for module in [part for part in block.modules() if isinstance(part, IN_FLOAT32)]:
            if precision is not None:
                fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
        of_block = MixedPrecisionPolicy(param_dtype=precision, **policy)
        fully_shard(block, mesh=mesh, mp_policy=of_block, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(model: SwitchDiT, create: Callable[[], SwitchDiT]) -> SwitchDiT:
    """The model itself, or a copy with all of its weights where they are shared out. All must call it."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy = create().to(next(iter(state.values())).device)
    copy.load_state_dict(state)
    return copy.requires_grad_(False)


class Spread:
    """A model as the processes of a run compute with it; its gradients become means over all processes.

    Args:
        model: the same on all processes. dtype: of the products. fsdp: whether the weights are shared out.
    """

    def __init__(self, model: SwitchDiT, world: World, dtype: torch.dtype, fsdp: bool) -> None:
        self.world, self.fsdp, self.replicas = world, fsdp, None
        self.forward: Callable[..., Any] = model
        self.model = model
        if fsdp:
            shard(model, world, dtype)
        elif world.size > 1:
            device = next(model.parameters()).device
            self.forward = self.replicas = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    @contextlib.contextmanager
    def adding(self, last: bool) -> Iterator[None]:
        """Around the forward and the backward of a part of a batch: only the last one's ends in a mean."""
        if self.fsdp:
            self.model.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or self.replicas is None else self.replicas.no_sync():
            yield

    def mean_gradient(self, parameter: Tensor) -> None:
        """Averages the gradient of a parameter that is not of the model."""
        if self.world.size > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world.size
