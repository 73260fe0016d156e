"""What files that must be whole need: drafts, checksums, permissions, and waiting for the disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def checksum(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; one of that name is replaced. ``OSError`` where it cannot be."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says, which may be nothing."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_permissions(path: Path) -> None:
    """Those that the user's umask gives; safetensors may leave a file that only its owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
