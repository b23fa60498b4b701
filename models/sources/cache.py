"""Folders made once and shared by the processes of a node.

::

    ROOT/NAME/              a finished folder; source.json, written last, describes it
    ROOT/.locks/NAME.lock   held by whoever makes NAME
    ROOT/.staging/NAME.*/   being made; moved into place by one rename

A reader of a finished folder takes no lock and writes nothing. Lock files stay: deleting
one would let two processes hold "it" at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from models import durable
from models.errors import ConfigError, PlatformError, Unavailable
from models.sources import folder

FORMAT = 1
"""Raise it when what a conversion writes changes: older folders are then made anew."""

MANIFEST = "source.json"

Report = Callable[[str], None]
FreeBytes = Callable[[Path], int]


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a folder's weights came from."""

    revision: str
    """The version or commit that was delivered, whatever was asked for."""
    weights_sha256: str
    """Of the weights as delivered, before any conversion."""
    converted_from: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    format: int
    source: str
    revision: str
    weights_sha256: str
    converted_from: str | None
    created: str
    files: dict[str, dict[str, int | str]]
    """Relative path → ``size`` in bytes and ``sha256``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """What a scheme gets to fill a folder: room to work, and ways to speak."""

    source: str
    cache: Path
    scratch: Path
    out: Path
    report: Report
    free: FreeBytes

    def need(self, size: int) -> None:
        """Raises Unavailable unless ``size`` bytes fit on the disk."""
        free = self.free(self.scratch)
        if free < size:
            raise Unavailable(
                f"{self.source}: {megabytes(free)} free in {self.cache}, about {megabytes(size)} "
                "needed; free some space or point FRONTIER_CACHE at a larger disk"
            )


Fill = Callable[[Workspace], Provenance]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    root: Path
    report: Report
    free: FreeBytes = free_bytes
    check: Callable[[Path, str], None] = folder.check
    """Raises ConfigError for a filled folder (and its name in errors) that may not be kept."""

    def get(self, source: str, fill: Fill) -> tuple[Path, Manifest]:
        """The folder of ``source``, made by ``fill`` if it is not there yet.

        Raises:
            Unavailable: the disk is full or failing; or whatever ``fill`` raises.
            ConfigError: the cache cannot be written to.
        """
        name = _name(source)
        final = self.root / name
        if (manifest := intact(final, source)) is not None:
            return final, manifest
        try:
            with self._lock(name):
                if (manifest := intact(final, source)) is None:
                    self._sweep(name)
                    manifest = self._make(source, final, fill)
                return final, manifest
        except OSError as error:
            raise self._explained(source, error) from error

    def _make(self, source: str, final: Path, fill: Fill) -> Manifest:
        staging = Path(tempfile.mkdtemp(prefix=f"{final.name}.", dir=self.root / ".staging"))
        try:
            if final.exists():
                self.report(f"{final} is damaged or of an older format: fetching it again")
            workspace = Workspace(
                source=source,
                cache=self.root,
                scratch=staging / "scratch",
                out=staging / "out",
                report=self.report,
                free=self.free,
            )
            workspace.scratch.mkdir()
            workspace.out.mkdir()
            provenance = fill(workspace)
            self.check(workspace.out, source)
            manifest = _seal(workspace.out, source, provenance)
            if final.exists():  # only now: processes that still read the old one keep its files
                final.rename(staging / "old")
            workspace.out.rename(final)
            durable.sync(self.root)
            return manifest
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        (self.root / ".staging").mkdir(parents=True, exist_ok=True)
        (self.root / ".locks").mkdir(exist_ok=True)
        lock = FileLock(self.root / ".locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.report(f"waiting for another process, which is fetching {name}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _sweep(self, mine: str) -> None:
        """Remove what killed processes left: staging whose lock nobody holds."""
        for stale in (self.root / ".staging").iterdir():
            name = stale.name.rpartition(".")[0]
            if name == mine:
                shutil.rmtree(stale, ignore_errors=True)
                continue
            lock = FileLock(self.root / ".locks" / f"{name}.lock")
            with suppress(Timeout), lock.acquire(timeout=0):
                shutil.rmtree(stale, ignore_errors=True)

    def _explained(self, source: str, error: OSError) -> PlatformError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Unavailable(
                f"{source}: the disk of {self.root} is full ({error.strerror}); "
                "free some space or point FRONTIER_CACHE at a larger disk"
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            return ConfigError(
                f"{source}: the cache {self.root} cannot be written to ({error}); "
                "point FRONTIER_CACHE at a folder of yours"
            )
        return Unavailable(f"{source}: {error}")


def described(folder: Path) -> Manifest:
    """What a finished folder says of itself. Raises OSError, ValueError, TypeError."""
    return Manifest(**json.loads((folder / MANIFEST).read_bytes()))


def intact(final: Path, source: str) -> Manifest | None:
    """The manifest of a finished folder whose files have the sizes it names; else ``None``.

    Hashes were checked when it was fetched, and are not again: every replica of every start would
    read all of its weights for that. Who doubts a disk has them in the manifest.
    """
    try:
        manifest = described(final)
        if (manifest.format, manifest.source) != (FORMAT, source):
            return None
        for name, facts in manifest.files.items():
            if (final / name).stat().st_size != facts["size"]:
                return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return manifest


def _seal(out: Path, source: str, provenance: Provenance) -> Manifest:
    """Describe every file, the description last, and bring all of it to the disk."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    for file in files:
        file.chmod(0o644)  # safetensors writes 0600; other users of the node may read
    manifest = Manifest(
        format=FORMAT,
        source=source,
        revision=provenance.revision,
        weights_sha256=provenance.weights_sha256,
        converted_from=provenance.converted_from,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={
            file.relative_to(out).as_posix(): {
                "size": file.stat().st_size,
                "sha256": folder.sha256_file(file),
            }
            for file in files
        },
    )
    (out / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    for path in (*out.rglob("*"), out):
        durable.sync(path)
    return manifest


def _name(source: str) -> str:
    """A folder name that a person recognises and no other source shares."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", source)[:80].strip("-.")
    return f"{readable}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
