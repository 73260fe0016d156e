"""What a step does, in numbers that do not depend on the speed of the machine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from switch_moe import native
from switch_moe.cpu.expert_linear import _workspaces
from switch_moe.ops import _checks

Step = Callable[[], Any]

VIEWS = (
    "view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "detach", "alias", "as_strided", "_unsafe_view", "unbind", "reshape",
)  # fmt: skip
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
WAITS = (
    "_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique", "unique_dim", "bincount",
)  # fmt: skip


def saved_bytes(forward: Step, parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that the graph of ``forward()`` keeps for its backward: each storage once, no parameters."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # alive until the count is done: storages must not be used twice
    del outputs
    return sum(kept.values())


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Most that torch held during ``step()`` beyond what it held before: outputs, gradients, workspaces.

    Of what oneDNN takes for itself on a CPU, scratch of bfloat16 products shows, copies of weights do not.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    vars(_workspaces).clear()  # else the workspace kept from earlier calls would not be counted
    gc.collect()  # garbage from before would count as freed by the step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    held = most = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def product_flops(step: Step) -> int:
    """FLOPs of the products that ``step()`` runs on a CPU, inside operators too, but not attention's: torch's
    products and the compiled ones, which count themselves.
    """
    compiled = native.cpu.require().fused_product_flops
    before = compiled()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as run:
        step()
    return sum(event.flops for event in run.events() if event.name in PRODUCTS) + compiled() - before


class _Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


def operators(step: Step) -> list[str]:
    """The operators that ``step()`` calls, forward and backward, views left out; an operator of this package
    is one.
    """
    with _Calls() as calls:
        step()
    return [name for name in calls.names if name.split("::")[-1].split(".")[0] not in VIEWS]


def host_waits(step: Step) -> int:
    """Operators of ``step()`` that would make the host wait for a GPU, as far as their names tell.

    On a CPU ``tolist`` and copies to the host do not show. Checks of values are left out, as on a GPU.
    """
    with mock.patch.object(_checks, "has_values", return_value=False):
        called = operators(step)
    return sum(name.split("::")[-1].split(".")[0] in WAITS for name in called)


def launches(step: Step) -> int:
    """Kernels that ``step()`` starts on the GPU."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in run.events())


class Launch(NamedTuple):
    """One start of a Triton kernel of this package."""

    kernel: str  # module.function
    programs: int
    arguments: dict[str, Any]  # by name

    @property
    def tensors(self) -> list[Tensor]:
        """What it reads and writes, each once."""
        return list({id(a): a for a in self.arguments.values() if isinstance(a, Tensor)}.values())


def triton_launches(call: Step, architecture: int = 90) -> list[Launch]:
    """The launches of ``call()``, a function of switch_moe/kernels on meta tensors: no GPU needed."""
    from switch_moe.kernels import _launch

    with _launch.record(architecture) as recorded:
        call()
    return [
        Launch(
            f"{found.kernel.fn.__module__.rsplit('.', 1)[-1]}.{found.kernel.fn.__name__}", found.programs,
            dict(zip(found.kernel.arg_names, found.args, strict=False)) | found.meta,
        )
        for found in recorded
    ]  # fmt: skip


def graph_breaks(function: Callable[..., Any], *arguments: Any) -> int:
    """Where torch.compile has to leave its graph of ``function(*arguments)``."""
    import torch._dynamo as dynamo  # takes a second, and the benchmarks import this module

    dynamo.reset()
    return int(dynamo.explain(function)(*arguments).graph_break_count)
