"""Work on a second CUDA stream, beside what comes after it."""

from __future__ import annotations

from typing import ClassVar

import torch


class SideStream:
    """What runs inside the ``with`` overlaps what follows on a GPU, until :meth:`join`::

        with SideStream(x.device) as side:
            loss = small(x)  # keeps one multiprocessor busy
        y = large(x)
        side.join()  # before anything reads loss

    Two conditions keep memory from being given to others too early, so that no tensor needs record_stream:
    what the work reads was made before it and is kept until ``join``, which comes before every return; and
    the work does not fill autocast's cache of weights, for the main stream would then read what the side
    stream owns.

    Each device has one side stream, shared by all. Elsewhere the work runs in line: the CPU has no streams,
    and a compiled graph orders its own kernels.
    """

    streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and torch.cuda.is_available() and not torch.compiler.is_compiling():
            if device not in self.streams:
                self.streams[device] = torch.cuda.Stream(device)
            self.stream = self.streams[device]

    def __enter__(self) -> SideStream:
        if self.stream is not None:
            self.main = torch.cuda.current_stream(self.stream.device)
            self.stream.wait_stream(self.main)
            self.context = torch.cuda.stream(self.stream)
            self.context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            self.context.__exit__(*error)

    def join(self) -> None:
        """The stream that entered waits for what ran aside."""
        if self.stream is not None:
            self.main.wait_stream(self.stream)
