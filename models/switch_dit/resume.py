"""Checkpoints from which a run goes on, to the bit, whenever it was interrupted.

    runs/<name>/checkpoint/step-300/    *.safetensors   every tensor of the run, by name, from each process
                                        state.json      the step and the settings
                                        checksums.json  of the files above
    runs/<name>/lock                    held while a process trains

A checkpoint is written as ``step-300.incomplete`` and renamed when all of it is on the disk, so a folder
without that ending is whole, or its checksums say that it has been damaged since. Tensors go through
torch.distributed.checkpoint in its safetensors form: its default form is a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from switch_dit.distributed import World, local
from switch_dit.files import checksum, to_disk

_CHECKSUMS = "checksums.json"
_STATE = "state.json"


class Checkpoints:
    """The checkpoints of one run, in ``folder``; the last ``keep`` are kept, 2 or more.

    Args:
        world: the processes of the run, which see one file system. Each writes its share of the tensors, and
            all call each method together.
        background: whether :meth:`save` copies the tensors and returns, and a thread writes them.
    """

    def __init__(
        self, folder: Path, keep: int = 2, world: World | None = None, background: bool = False
    ) -> None:
        if keep < 2:
            raise ValueError(f"keep is {keep}; it must be at least 2, for the last one may be damaged")
        self.folder, self.keep = folder, keep
        world = world or World()
        self.world = world.apart()  # the thread must not meet what the training sends
        self.background = background
        self.writing: Future[None] | None = None
        self.mesh = init_device_mesh("cpu", (world.size,)) if background and world.size > 1 else None

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, rising."""
        names = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes the checkpoint of a step, then removes what is older than the last ``keep``.

        In the background it returns when the tensors are copied, and waits first for the one before it.

        ``OSError`` where it cannot be written, a full disk among the reasons: the draft is removed, and
        earlier checkpoints stay as they are. In the background the next :meth:`wait` raises it.
        """
        self.wait()
        if not self.background:
            self._write(step, tensors, state)
            return
        copies = self._copies(tensors)
        pool = ThreadPoolExecutor(1)
        self.writing = pool.submit(self._write, step, copies, state)
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, if there is one; raises what stopped it."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on the CPU, as they are now."""
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        copies = {}
        for name, tensor in tensors.items():
            part = local(tensor.detach())
            # From a GPU into pinned memory, so that the copies run at once; then they are waited for.
            copy = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
            copies[name] = copy.copy_(part, non_blocking=part.is_cuda)
        if on_gpu:
            torch.cuda.synchronize()
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                shape = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
                copies[name] = DTensor.from_local(copies[name], self.mesh, tensor.placements, **shape)
        return copies

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        world = self.world
        target = self.folder / f"step-{step}"
        draft = self.folder / f"step-{step}.incomplete"
        try:
            world.on_first(lambda: self._begin(draft, sum(t.nbytes for t in tensors.values())))
            with _quiet():
                writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
                alone = world.size == 1
                dcp.save(tensors, storage_writer=writer, no_dist=alone, process_group=world.group)
            world.on_first(lambda: self._complete(draft, target, {"step": step, **state}))
        except BaseException as error:
            if world.first:
                shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, CheckpointException):  # no Exception; it holds what failed on each rank
                cause = next(iter(error.failures.values()))[0]
                raise OSError(getattr(cause, "errno", None) or errno.EIO, str(cause), str(target)) from None
            raise

    def _begin(self, draft: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.incomplete"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir()
        free = shutil.disk_usage(draft).free
        if free < 1.01 * needed:
            text = f"{needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free"
            raise OSError(errno.ENOSPC, text, str(draft))

    def _complete(self, draft: Path, target: Path, state: dict[str, Any]) -> None:
        """Gives a draft whose tensors are written its state, its checksums and its name."""
        (draft / _STATE).write_text(json.dumps(state, indent=1) + "\n")
        sums = {path.name: checksum(path) for path in sorted(draft.iterdir())}
        (draft / _CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
        for path in draft.iterdir():
            to_disk(path)
        to_disk(draft)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        to_disk(self.folder)
        for old in self.steps()[: -self.keep]:  # renamed first: a half-removed one must not look whole
            with contextlib.suppress(OSError):
                leftover = self.folder / f"step-{old}.incomplete"
                (self.folder / f"step-{old}").rename(leftover)
                shutil.rmtree(leftover)

    def latest(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint that is whole, or None; damaged ones are named on stderr."""
        return self.world.on_first(self._latest)

    def _latest(self) -> dict[str, Any] | None:
        for step in reversed(self.steps()):
            fault = self.fault(step)
            if fault is None:
                found: dict[str, Any] = json.loads((self.folder / f"step-{step}" / _STATE).read_text())
                return found
            print(f"{self.folder / f'step-{step}'} is damaged ({fault}); it is not used", file=sys.stderr)
        return None

    def fault(self, step: int) -> str | None:
        """What is wrong with the checkpoint of a step, or None."""
        folder = self.folder / f"step-{step}"
        try:
            sums = json.loads((folder / _CHECKSUMS).read_text())
            names = {path.name for path in folder.iterdir()} - {_CHECKSUMS}
            if not isinstance(sums, dict) or names != sums.keys() or _STATE not in names:
                return "files are missing, or others lie there"
            wrong = [name for name, written in sums.items() if checksum(folder / name) != written]
        except (OSError, ValueError) as error:
            return f"{_CHECKSUMS}: {type(error).__name__}"
        return f"{wrong[0]} is not what was written" if wrong else None

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Fills ``tensors`` in place from the checkpoint of a step, which must hold them all.

        Each process reads its share, whatever number of processes wrote them.
        """
        with _quiet():
            reader = HuggingFaceStorageReader(str(self.folder / f"step-{step}"))
            dcp.load(tensors, storage_reader=reader, no_dist=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder; ``ValueError`` where another process trains there."""
    with open(folder / "lock", "a") as file:
        _lock(file, folder)
        yield


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{folder} is in use: another process trains there") from None


class StopRequest:
    """Whether SIGTERM or SIGINT has asked the run to stop; the second SIGINT stops it at once."""

    name: str | None = None

    def _handle(self, number: int, _: object) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, the two signals are noted; afterwards they do again what they did."""
    request = StopRequest()
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, request._handle)
    except ValueError:  # not in the main thread, where no signal arrives
        pass
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
