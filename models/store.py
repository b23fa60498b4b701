"""Where sealed artifacts lie: ``STORE/CONTENT_SHA256/``, on any fsspec path.

Files go first and the manifest last, whole; a folder without a manifest is a publication
that is under way or was killed, and counts for nothing. Since the name is the hash of the
contents, publishing twice, or in two places at once, does no harm.

With a key (``encryption.py``) files are encrypted on their way in, and decrypted on their way to
a node's cache; the manifest is not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from models import artifact, durable
from models.artifact import CARD, MANIFEST, SIGNATURE, Manifest
from models.cards import model_card
from models.encryption import HEADER_BYTES, SUFFIX, Keyring, Subject, key_named_in
from models.errors import ConfigError, NotFound, PlatformError, Unavailable
from models.signing import Keys
from models.sources import default_cache
from models.sources.cache import Cache, Provenance, Workspace
from state.places import Places

STAGING = ".staging"
"""In a local store: files that are being written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One folder of a store."""

    sha256: str
    complete: bool
    """It has a manifest."""
    modified: datetime


class Store:
    """Args:
    url: a folder, or an fsspec URL (``s3://bucket/prefix``); default: that of
        ``state.places``.
    """

    def __init__(self, url: str | Path | None = None) -> None:
        self.url = str(Places.of().artifacts if url is None else url).rstrip("/")
        if "://" not in self.url:
            self.url = f"file://{Path(self.url).expanduser().absolute()}"
        self.called = _without_secrets(self.url)
        with self._explained("open"):
            from fsspec.core import url_to_fs

            self._fs, self._root = url_to_fs(self.url)
        self._local = self.url.startswith("file://")

    def uri(self, sha256: str) -> str:
        return f"{self.url}/{sha256}"

    def publish(
        self, folder: Path, *, keys: Keys | None = None, ring: Keyring | None = None
    ) -> str:
        """Copy a sealed artifact here, unless it is here already, and return its URI.

        Encrypted if ``ring`` (default: that of the environment) has keys; copies that are not,
        or not under the newest, are then replaced.

        Raises:
            ConfigError: the folder does not verify, or the store cannot be written to.
            Unavailable: the store cannot be reached or is full.
        """
        keys = Keys.of() if keys is None else keys
        ring = Keyring.of() if ring is None else ring
        manifest = artifact.verify(folder, keys=keys)
        text = (folder / MANIFEST).read_bytes()
        place = f"{self._root}/{manifest.content_sha256}"
        if ring.keys and (taken := sorted(p for p in manifest.files if p.endswith(SUFFIX))):
            raise ConfigError(
                f"{folder}: {taken[0]} is named like an encrypted file; rename it, or publish"
                " without a key"
            )
        with self._explained("publish to"):
            held = self._held(manifest.content_sha256)
            for subject in _subjects(manifest):
                self._put_subject(folder, subject, held, ring)
            if (folder / SIGNATURE).exists():
                self._put(folder / SIGNATURE, f"{place}/{SIGNATURE}")
            elif signature := keys.sign(text):
                self._write(signature, f"{place}/{SIGNATURE}")
            card = model_card(manifest).encode()
            if self._read(f"{place}/{CARD}") != card:
                self._write(card, f"{place}/{CARD}")
            if self._read(f"{place}/{MANIFEST}") != text:
                self._write(text, f"{place}/{MANIFEST}")
            if ring.keys:  # only now: until here a fetch found one or the other
                for path in held.keys() & manifest.files.keys():
                    self._fs.rm_file(f"{place}/{path}")
        return self.uri(manifest.content_sha256)

    @classmethod
    def of(cls, uri: str, sha256: str) -> Self:
        """The store that ``uri`` lies in. Raises ConfigError: it is not of that artifact."""
        url, _, last = uri.rstrip("/").rpartition("/")
        if last != sha256 or not url:
            raise ConfigError(f"{_without_secrets(uri)} does not end in {sha256}, its content hash")
        return cls(url)

    def has(self, manifest: Manifest) -> bool:
        """Whether all of an artifact is here, by the sizes of its files."""
        with self._explained("read"):
            held = self._held(manifest.content_sha256)
        return held.get(MANIFEST) == len(manifest.encode()) and all(
            held.get(subject.path + SUFFIX) == subject.stored_size
            or held.get(subject.path) == subject.size
            for subject in _subjects(manifest)
        )

    def encrypted_under(self, sha256: str) -> set[str | None]:
        """The ids of the keys under which an artifact's files are encrypted; ``None`` among them:
        some are not.

        Raises: as :meth:`manifest`.
        """
        manifest = self.manifest(sha256)
        place = f"{self._root}/{sha256}"
        with self._explained("read"):
            held = self._held(sha256)
            keys = {self._key_of(f"{place}/{path}{SUFFIX}") for path in _encrypted(manifest, held)}
        return keys | ({None} if held.keys() & manifest.files.keys() else set())

    def encrypt(
        self, sha256: str, *, keys: Keys | None = None, ring: Keyring | None = None
    ) -> None:
        """Encrypt what is here under the newest key, whatever it is under now.

        Raises: as :meth:`fetch` and :meth:`publish`.
        """
        ring = Keyring.of() if ring is None else ring
        kept = default_cache()
        with self._explained("encrypt in"):
            kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept, prefix=".encrypt-") as scratch:
            folder = self.fetch(sha256, cache=Path(scratch), keys=keys, ring=ring)
            self.publish(folder, keys=keys, ring=ring)

    def manifest(self, sha256: str, *, keys: Keys | None = None) -> Manifest:
        """Of a published artifact.

        Raises:
            NotFound: it is not here, or not completely.
            ConfigError: it is not what its name says, or not signed as ``keys`` want.
        """
        return self._manifest(sha256, Keys.of() if keys is None else keys)[0]

    def fetch(
        self,
        sha256: str,
        *,
        cache: Path | None = None,
        keys: Keys | None = None,
        ring: Keyring | None = None,
    ) -> Path:
        """A local folder with the artifact, decrypted, its bytes verified; one in a local store
        itself, if it is not encrypted there.

        Args:
            cache: where folders from elsewhere are kept; default ``default_cache()``.

        Raises:
            NotFound: it is not in this store.
            ConfigError: it does not verify, or does not decrypt.
            Unavailable: the store cannot be reached, or the local disk is full.
        """
        keys = Keys.of() if keys is None else keys
        ring = Keyring.of() if ring is None else ring
        called = self.uri(sha256)
        if self._local:
            manifest = self._manifest(sha256, keys)[0]
            with self._explained("read"):
                encrypted = _encrypted(manifest, self._held(sha256))
            if not encrypted:
                folder = Path(self._root, sha256)
                artifact.verify(folder, keys=keys)
                return folder
        kept = Cache(
            root=cache or default_cache(),
            report=lambda _: None,
            check=lambda *_: None,  # _fill verifies; not every artifact is a Hugging Face folder
        )
        folder, _ = kept.get(f"artifact:{sha256}", partial(self._fill, sha256, keys, ring))
        found = artifact.verify(folder, keys=keys)
        if found.content_sha256 != sha256:
            raise ConfigError(f"{folder} does not hold {_without_secrets(called)}; delete it")
        return folder

    def delete(self, sha256: str) -> None:
        """The manifest first, so that what is left of a killed deletion counts for nothing."""
        place = f"{self._root}/{_checked(sha256)}"
        with self._explained("delete from"):
            self._fs.invalidate_cache()
            if self._fs.exists(f"{place}/{MANIFEST}"):
                self._fs.rm_file(f"{place}/{MANIFEST}")
            if self._fs.exists(place):
                self._fs.rm(place, recursive=True)

    def list(self) -> Iterator[Stored]:
        """Everything here, finished or not, in order."""
        with self._explained("list"):
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True) if self._fs.exists(self._root) else {}
        prefix = self._fs._strip_protocol(self._root).rstrip("/") + "/"
        newest: dict[str, datetime] = {}
        complete = set()
        for path, facts in found.items():
            sha256, _, rest = path.removeprefix(prefix).partition("/")
            if not artifact.is_hash(sha256) or not rest:
                continue  # not ours
            newest[sha256] = max(newest.get(sha256, _EPOCH), _modified(facts))
            if rest == MANIFEST:
                complete.add(sha256)
        for sha256 in sorted(newest):
            yield Stored(sha256=sha256, complete=sha256 in complete, modified=newest[sha256])

    def sweep(self, before: datetime) -> None:
        """Remove files that killed publications were writing when they last did, long ago."""
        if not self._local:
            return
        with self._explained("sweep"):
            for file in Path(self._root, STAGING).glob("*"):
                with suppress(FileNotFoundError):
                    if datetime.fromtimestamp(file.stat().st_mtime, UTC) < before:
                        file.unlink()

    def _fill(self, sha256: str, keys: Keys, ring: Keyring, work: Workspace) -> Provenance:
        manifest, text, signature = self._manifest(sha256, keys)
        work.need(manifest.size)
        place, called = f"{self._root}/{sha256}", f"{self.called}/{sha256}"
        with self._explained("fetch from"):
            encrypted = _encrypted(manifest, self._held(sha256))
            for subject in _subjects(manifest):
                path = subject.path
                target = work.out / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if path not in encrypted:
                    self._fs.get_file(f"{place}/{path}", str(target))
                    continue
                with (
                    self._fs.open(f"{place}/{path}{SUFFIX}", "rb") as source,
                    target.open("wb") as plain,
                ):
                    ring.decrypt(source, plain, subject, called)
        (work.out / MANIFEST).write_bytes(text)
        if signature is not None:
            (work.out / SIGNATURE).write_bytes(signature)
        artifact.verify(work.out, keys=keys)
        return Provenance(revision=sha256, weights_sha256=sha256)

    def _manifest(self, sha256: str, keys: Keys) -> tuple[Manifest, bytes, bytes | None]:
        place = f"{self._root}/{_checked(sha256)}"
        with self._explained("read"):
            text = self._read(f"{place}/{MANIFEST}")
            signature = None if text is None else self._read(f"{place}/{SIGNATURE}")
        called = f"{self.called}/{sha256}"
        if text is None:
            raise NotFound(f"there is no artifact {called}")
        manifest = Manifest.decode(text, called)
        if manifest.content_sha256 != sha256:
            raise ConfigError(f"{called} holds artifact {manifest.content_sha256}; do not use it")
        keys.check(text, signature, called)
        return manifest, text, signature

    def _read(self, path: str) -> bytes | None:
        self._fs.invalidate_cache()
        try:
            content: bytes = self._fs.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def _held(self, sha256: str) -> dict[str, int]:
        """Files of an artifact that are here, by path, with their sizes."""
        place = f"{self._root}/{_checked(sha256)}"
        self._fs.invalidate_cache()
        found = self._fs.find(place, detail=True) if self._fs.exists(place) else {}
        prefix = self._fs._strip_protocol(place).rstrip("/") + "/"
        return {path.removeprefix(prefix): facts["size"] for path, facts in found.items()}

    def _key_of(self, path: str) -> str | None:
        return key_named_in(self._fs.cat_file(path, start=0, end=HEADER_BYTES))

    def _put_subject(
        self, folder: Path, subject: Subject, held: dict[str, int], ring: Keyring
    ) -> None:
        """Unless it is here already, as it should be."""
        place = f"{self._root}/{subject.artifact}/{subject.path}"
        encrypted = held.get(subject.path + SUFFIX) == subject.stored_size
        if not ring.keys:
            if not encrypted and held.get(subject.path) != subject.size:
                self._put(folder / subject.path, place)
        elif not encrypted or self._key_of(place + SUFFIX) != ring.newest:
            self._put_encrypted(folder / subject.path, place + SUFFIX, subject, ring)

    def _put_encrypted(self, file: Path, path: str, subject: Subject, ring: Keyring) -> None:
        with file.open("rb") as source:
            if self._local:
                with self._replacing(Path(path)) as target:
                    ring.encrypt(source, target, subject)
                return
            # A remote file that is written piece by piece could be left with half of them.
            with tempfile.NamedTemporaryFile() as whole:
                ring.encrypt(source, whole, subject)
                whole.flush()
                self._fs.put_file(whole.name, path)

    def _put(self, file: Path, path: str) -> None:
        """Whole or not at all: object stores do that; on a local disk a rename does."""
        if not self._local:
            self._fs.put_file(str(file), path)
            return
        with file.open("rb") as source, self._replacing(Path(path)) as target:
            while block := source.read(1 << 20):
                target.write(block)

    def _write(self, content: bytes, path: str) -> None:
        if not self._local:
            self._fs.pipe_file(path, content)
            return
        with self._replacing(Path(path)) as target:
            target.write(content)

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Any]:
        """A file that takes ``path``'s place when it is finished and on the disk."""
        staging = Path(self._root, STAGING)
        for folder in (staging, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=staging)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            raise
        durable.sync(path.parent)

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Errors of some store's library → ours, without what its URL may hide."""
        try:
            yield
        except PlatformError:
            raise
        except ImportError as error:
            if self.url.startswith(("s3://", "s3a://")):
                needs = "pip install 'frontier-run[s3]'"
            else:  # fsspec names the package
                needs = "a package that is not here"
            raise ConfigError(f"{self.called}: needs {needs} ({error})") from None
        except ValueError as error:  # fsspec: unknown protocol
            raise ConfigError(f"{self.called}: is no place for artifacts ({error})") from None
        except (PermissionError, NotADirectoryError) as error:
            told = error.strerror or type(error).__name__
            raise ConfigError(f"{self.called}: cannot {doing} it ({told})") from None
        except OSError as error:
            told = error.strerror or type(error).__name__
            raise Unavailable(f"{self.called}: cannot {doing} it ({told})") from None


def publish(folder: Path, store: Store | str | Path | None = None) -> str:
    """Copy a sealed artifact to a store; see :meth:`Store.publish`."""
    return (store if isinstance(store, Store) else Store(store)).publish(folder)


def _subjects(manifest: Manifest) -> Iterator[Subject]:
    for path, file in manifest.files.items():
        yield Subject(artifact=manifest.content_sha256, path=path, size=file.size)


def _encrypted(manifest: Manifest, held: Collection[str]) -> set[str]:
    """Those of an artifact's files that lie encrypted among ``held``."""
    names = {path + SUFFIX for path in manifest.files} - manifest.files.keys()
    return {name.removesuffix(SUFFIX) for name in names & set(held)}


def fetch(artifact: str, cache: Path | None = None, *, keys: Keys | None = None) -> Path:
    """A verified local folder of an artifact, by URI, or by hash from the default store.

    Raises: as :meth:`Store.fetch`.
    """
    url, slash, sha256 = artifact.rstrip("/").rpartition("/")
    _checked(sha256)
    return Store(url if slash else None).fetch(sha256, cache=cache, keys=keys)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _checked(sha256: str) -> str:
    if not artifact.is_hash(sha256):
        raise ConfigError(
            f"{sha256!r} is not the content hash of an artifact; expected 64 hexadecimal digits"
        )
    return sha256


def _modified(facts: dict[str, Any]) -> datetime:
    """Stores call it differently; unknown is taken for now, which nobody collects."""
    found = next(
        (facts[key] for key in ("mtime", "LastModified", "last_modified", "updated", "created")
         if facts.get(key) is not None),
        None,
    )  # fmt: skip
    if isinstance(found, int | float):
        return datetime.fromtimestamp(found, UTC)
    if isinstance(found, str):
        with suppress(ValueError):
            found = datetime.fromisoformat(found)
    if isinstance(found, datetime):
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return datetime.now(UTC)


def _without_secrets(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"
