"""Bring into memory what the replicas are about to map, while Ray starts.

After a reboot replicas fault torch and the weights in page by page, both at once, while for
its first ten seconds the platform leaves the disk idle.
"""

from __future__ import annotations

import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

from deployments.config import PlatformConfig
from models.errors import PlatformError
from models.sources import fetch


def start(platform: PlatformConfig) -> None:
    """Read in the background; nothing waits for it and nothing depends on it."""
    threading.Thread(target=_read_all, args=(platform,), daemon=True).start()


def files(platform: PlatformConfig, site_packages: Path) -> Iterator[Path]:
    """In the order in which they are needed."""
    yield from sorted((site_packages / "torch" / "lib").glob("libtorch_[cp]*.so"))
    for model in platform.models.values():
        if model.source.startswith("registry:"):  # only the database knows what it names now
            continue
        try:
            folder = fetch(model.source)
        except PlatformError:  # its replica will say so
            continue
        yield from sorted(folder.glob("*.safetensors"))


def read(path: Path, block_bytes: int = 8 << 20) -> None:
    """Through a small buffer, so that only the kernel keeps it."""
    buffer = bytearray(block_bytes)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _read_all(platform: PlatformConfig) -> None:
    for path in files(platform, Path(sysconfig.get_path("purelib"))):
        try:
            read(path)
        except OSError:
            continue
