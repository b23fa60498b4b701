"""Writing that a crash cannot leave half done."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Whole or not at all; its name is on the disk once the folder is ``sync``ed, too."""
    staged = partial(path)
    with staged.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def partial(path: Path) -> Path:
    """Where ``write`` gathers; a crash may leave it."""
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
