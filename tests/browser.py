"""Chromium without a window, told what to do through a pipe: what goes wrong on a page, and what it shows."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe",
)  # fmt: skip
_STATE = """({
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.alt),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    background: getComputedStyle(document.body).backgroundColor,
})"""


def executable() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a page, whose process and profile are gone afterwards."""
    there, ours = os.pipe(), os.pipe()  # what it reads, what it writes
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (there[0], ours[1])]

    def place() -> None:
        for number, end in zip((3, 4), ends, strict=True):
            os.dup2(end, number)

    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen(
            [executable(), *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(3, 4), preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (*ends, there[0], ours[1]):
            os.close(end)
        try:
            yield Browser(there[1], ours[0])
        finally:
            process.kill()
            process.wait()
            for end in (there[1], ours[0]):
                os.close(end)
            time.sleep(0.1)  # its children are writing into the profile still


class Browser:
    """One page, of which all events are kept."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._number = write, read, b"", 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        (target,) = [t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def problems(self, page: Path, width: int = 1100, *, dark: bool = False) -> list[str]:
        """What is wrong with a page: script errors, requests, failed loads, broken images, overflow."""
        state = self.opened(page, width, dark=dark)
        found = [f"broken image: {alt}" for alt in state["broken"]]
        if state["overflow"] > 0:
            found.append(f"overflow: {state['overflow']} pixels")
        for event in self.events:
            told = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(
                    f"script error: {told['exceptionDetails'].get('exception', {}).get('description')}"
                )
            elif event["method"] == "Log.entryAdded":
                found.append(f"log: {told['entry']['text']}")
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(f"console: {told['type']}")
            elif event["method"] == "Network.loadingFailed":
                found.append(f"failed load: {told['errorText']}")
            elif event["method"] == "Network.requestWillBeSent":
                url = told["request"]["url"]
                if not url.startswith("data:") and url != page.resolve().as_uri():
                    found.append(f"request: {url}")
        return found

    def opened(self, page: Path, width: int = 1100, *, dark: bool = False) -> dict[str, Any]:
        """Opens a page, waits until it is loaded, unfolds it and returns what it shows."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                   mobile=width < 600)  # fmt: skip
        self.events.clear()
        self._call("Page.navigate", url=page.resolve().as_uri())
        self._until(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events))
        unfold = "document.querySelectorAll('details').forEach(details => details.open = true)"
        self._call("Runtime.evaluate", expression=unfold)
        return self._call("Runtime.evaluate", expression=_STATE, returnByValue=True)["result"]["value"]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []
        self._until(lambda: bool(answers), answers)
        if "error" in answers[0]:
            raise RuntimeError(f"{method}: {answers[0]['error']}")
        return answers[0]["result"]

    def _until(self, done: Any, answers: list[dict[str, Any]] | None = None, seconds: float = 30) -> None:
        """Reads messages until ``done``; ``TimeoutError`` where that takes longer than ``seconds``."""
        deadline = time.monotonic() + seconds
        while not done():
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser was silent for {seconds:g} s")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise EOFError("the browser has ended")
            *messages, self._rest = (self._rest + data).split(b"\0")
            for message in map(json.loads, messages):
                if message.get("id") == self._number and answers is not None:
                    answers.append(message)
                elif "method" in message:
                    self.events.append(message)
