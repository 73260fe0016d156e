"""One rank of the distributed tests: ``python distributed_worker.py CASE RANK FOLDER``.

The ranks meet through a file in FOLDER, and each leaves its results there as ``rank<RANK>.pt``. The model,
the batch and the loss are here too, for the single process that the ranks are compared with.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import random_model, top_k_of
from switch_dit import GaussianDiffusion, SwitchDiT
from switch_dit.distributed import IN_FLOAT32, World, shard
from switch_dit.systems import SYSTEMS
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from switch_moe import DiffMoE, TokenMoE

WORLD_SIZE = 2
COLLECTIVE_TIMEOUT = timedelta(seconds=30)  # a rank whose partner died fails, it does not wait for ever


def build_model(seed: int = 0) -> SwitchDiT:
    """The same small Switch-DiT in every process."""
    return random_model(seed, hidden_size=32, num_heads=2, class_dropout_prob=0.0, num_experts=6)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_batch() -> tuple[Tensor, ...]:
    """x_start and noise [8, 3, 8, 8], t and y [8]: the same in every process."""
    generator = torch.Generator().manual_seed(1)
    x_start, noise = torch.randn(2, 8, 3, 8, 8, generator=generator)
    t = torch.tensor([0, 150, 300, 450, 600, 750, 900, 999])
    return x_start, noise, t, torch.randint(5, (8,), generator=generator)


class TrainingLoss(nn.Module):
    """mse + vb + prior, as in the training loop; a module, because DDP wraps modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.diffusion = model, GaussianDiffusion()

    def forward(self, x_start: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x_t = self.diffusion.q_sample(x_start, t, noise)
        out, prior = self.model.forward_with_prior(x_t, t, y)
        losses = self.diffusion.training_losses(out, x_start, x_t, t, noise)
        return losses["mse"].mean() + losses["vb"].mean() + prior


def loss_and_backward(loss: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """One step up to the gradients. The prior's matching breaks ties at random, so every process seeds it."""
    torch.manual_seed(2)
    value: Tensor = loss(*batch)
    value.backward()
    return value.detach()


def checkpoint_forward(module: nn.Module) -> None:
    """The backward of ``module`` runs its forward again."""
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def guided_noise(model: nn.Module) -> Tensor:
    """The noise that a sampling step with guidance sees, on the whole batch."""
    x, _, t, y = make_batch()
    with torch.no_grad():
        return model.forward_with_cfg(x, t, y, 1.5)


def mean_over_ranks(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value / WORLD_SIZE


def ddp(half: tuple[Tensor, ...]) -> dict[str, Any]:
    """DistributedDataParallel around the loss. A parameter without a gradient would stop its second step."""
    model = build_model()
    loss = DistributedDataParallel(TrainingLoss(model), find_unused_parameters=False)
    for _ in range(2):
        model.zero_grad()
        value = loss_and_backward(loss, half)
    grads = {name: p.grad for name, p in trained(model).items()}
    return {"loss": mean_over_ranks(value), "grads": grads}


def sharded(seed: int = 0, *, reshard_after_forward: bool = True, recompute: bool = False) -> SwitchDiT:
    """FSDP2 as its documentation has it: every block, then the root."""
    model = build_model(seed)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for block in model.blocks:
        if recompute:
            checkpoint_forward(block)
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
    return model


def fsdp(half: tuple[Tensor, ...]) -> dict[str, Any]:
    """FSDP2 three ways.

    Sampling comes first: with ``reshard_after_forward=False`` it leaves the blocks' parameters gathered, and
    the gradients of the next step must reach them all the same.
    """
    ways = {
        "plain": sharded(),
        "gathered": sharded(reshard_after_forward=False),
        "recomputed": sharded(recompute=True),
    }
    found = {}
    for way, model in ways.items():
        guided = guided_noise(model)
        value = mean_over_ranks(loss_and_backward(TrainingLoss(model), half))
        grads = {
            name: p.grad if p.grad is None else p.grad.full_tensor() for name, p in trained(model).items()
        }
        shards = {name: p.to_local().numel() for name, p in model.named_parameters()}
        found[way] = {"loss": value, "grads": grads, "guided": guided, "shards": shards}
    return found


def fsdp_state(half: tuple[Tensor, ...]) -> dict[str, Any]:
    """The weights of one sharded model, gathered, then loaded into another."""
    whole = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(sharded(), options=whole)
    other = sharded(seed=3)
    set_model_state_dict(other, dict(state), options=whole)  # it shards the entries of the dict it is given
    again = {name: value.full_tensor() for name, value in other.state_dict().items()}
    return {"state": state, "again": again, "guided": guided_noise(other)}


def mixture(routing: str) -> SwitchDiT:
    """The same small mixture of tokens in every process."""
    settings = {"hidden_size": 32, "num_heads": 2, "class_dropout_prob": 0.0}
    settings |= {"num_experts": 4, "top_k": top_k_of(routing)}
    return random_model(routing=routing, **settings).train()


def mixtures(half: tuple[Tensor, ...]) -> dict[str, Any]:
    """Mixtures of tokens whose blocks compute in bfloat16: what their routers see, and what they learn."""
    found: dict[str, Any] = {}
    for routing in SYSTEMS:
        model = mixture(routing)
        shard(model, World(dist.get_rank(), WORLD_SIZE), torch.bfloat16)
        seen = watched(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss_and_backward(TrainingLoss(model), half)
        grads = {name: p.grad.full_tensor() for name, p in trained(model).items() if p.grad is not None}
        found[routing] = {"grads": grads, "seen": seen}
    return found


def watched(model: SwitchDiT) -> dict[str, Tensor]:
    """Filled by a forward with the weights of routers, predictors and experts as they are used."""
    seen: dict[str, Tensor] = {}
    for name, module in model.blocks.named_modules():

        def keep(module: nn.Module, _: Any, name: str = name) -> None:
            own = module.named_parameters(recurse=isinstance(module, IN_FLOAT32))
            seen.update({f"{name}.{key}": p.detach().clone() for key, p in own if not isinstance(p, DTensor)})

        if isinstance(module, (TokenMoE, *IN_FLOAT32)):
            module.register_forward_pre_hook(keep)
    return seen


def thresholds(half: tuple[Tensor, ...]) -> dict[str, Any]:
    """What a layer sees of its process's half of a batch, and what it learns."""
    torch.manual_seed(0)
    layer, x = DiffMoE(64, 4), half[0].flatten(2)  # [B, 3, 64]
    observed = layer(x, with_losses=True, observe=True)[2]
    assert not layer.predictor.threshold.any()
    layer(x)
    return {"observed": observed, "threshold": layer.predictor.threshold}


CASES: dict[str, Callable[[tuple[Tensor, ...]], dict[str, Any]]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "fsdp_state": fsdp_state,
    "mixtures": mixtures,
    "thresholds": thresholds,
}


def main(case: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=COLLECTIVE_TIMEOUT,
    )
    half = tuple(tensor.chunk(WORLD_SIZE)[rank] for tensor in make_batch())
    torch.save(CASES[case](half), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
