"""Writing that a crash or a full disk cannot leave half done."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models import durable
from models.errors import PlatformError, Unavailable


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk when this returns."""
    durable.write(path, text.encode())
    durable.sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def sync_tree(folder: Path) -> None:
    """Bring all files and folders under ``folder``, and itself, to the disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            durable.sync(path)
    durable.sync(folder)


@contextmanager
def explain_full(folder: Path, what: str, advice: str = "") -> Iterator[None]:
    """Turn a full disk, however a library words it, into one clear error.

    Raises:
        Unavailable: instead of an error that says there is no room.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PlatformError) or not is_full(error):
            raise
        free = shutil.disk_usage(folder).free
        raise Unavailable(
            f"{what} could not be written: the disk of {folder} is full "
            f"({free / 1e6:.0f} MB free). {advice}".rstrip()
        ) from error


def is_full(error: BaseException) -> bool:
    """Also behind libraries that have errors of their own (safetensors, torch)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        if "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
