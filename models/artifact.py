"""An artifact: a folder of files that is sealed by a manifest, and never unpickled.

    ARTIFACT/…              weights, tokenizer, configuration: what the loader reads
    ARTIFACT/manifest.json  every file's hash and every fact about it; written last
    ARTIFACT/manifest.sig   signatures of the manifest, if we have a key
    ARTIFACT/model_card.md  the manifest for people, in a store; nothing reads it

``content_sha256`` covers the whole manifest, and the manifest covers every byte of every
file: one hash, kept in the registry, vouches for weights and facts alike.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from models import durable, pickles
from models.contracts import Predictor
from models.encryption import SUFFIX
from models.errors import ConfigError
from models.signing import Keys
from models.sources.folder import sha256_file

FORMAT = 1

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
CARD = "model_card.md"
RESERVED = {MANIFEST, SIGNATURE, CARD, "source.json"}
"""Names that say what a folder is, here and in the cache of fetched folders."""

LOADERS = "models.predictors"
"""The only package that loaders are imported from."""

_LOADER = re.compile(rf"{re.escape(LOADERS)}(\.[a-z]\w*)+:[A-Za-z]\w*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class File:
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """What a metric had to reach in training, and what it reached."""

    metric: str
    value: float | None
    """``None``: the run had none, or it was not finite."""
    expected: str
    """As :class:`train.recipe.Gate` says it: bound and baseline."""
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where an artifact came from: enough to make it again."""

    id: str
    recipe: str
    seed: int
    code_revision: str
    """A commit, with ``+changes`` if the tree was not clean."""
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What an artifact learned from."""

    sha256: str = ""
    description: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What only the maker of an artifact knows."""

    name: str
    """Of the model, as the registry will know it: ``family-name``."""
    kind: str
    """As recipes' ``inputs`` name it: ``classifier``, ``lora-adapter`` …"""
    loader: str | None = None
    """``models.predictors.FILE:FUNCTION``; ``None``: nothing predicts with it alone."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    gates: tuple[GateResult, ...] = ()
    """Passed and failed."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """As resolved, every default filled in."""
    run: Run | None = None
    data: Data = Data()
    licence: str = ""
    """SPDX, as data and starting weights allow."""
    parents: tuple[str, ...] = ()
    """Content hashes of the artifacts it was made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Facts):
    """An artifact's facts, its files, and the hash of both."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    format: int
    created: str
    """ISO 8601, UTC."""
    files: Mapping[str, File]
    """By path relative to the folder, with ``/``."""
    content_sha256: str

    @property
    def passed(self) -> bool:
        """Every gate of its training."""
        return all(gate.passed for gate in self.gates)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def encode(self) -> bytes:
        plain = _MANIFEST.dump_python(self, mode="json")
        return json.dumps(plain, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"

    @classmethod
    def decode(cls, text: bytes | str, called: str) -> Manifest:
        """Raises ConfigError: not a manifest, or changed since it was sealed."""
        try:
            manifest = _MANIFEST.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise ConfigError(
                f"{called}: {MANIFEST} is not one of ours ({where}: {first['msg']})"
            ) from None
        if manifest.format != FORMAT:
            raise ConfigError(
                f"{called}: {MANIFEST} has format {manifest.format}; expected {FORMAT}"
            )
        for path in manifest.files:
            _check_path(path, called)
        if manifest.content_sha256 != _content_sha256(manifest):
            raise ConfigError(
                f"{called}: {MANIFEST} was changed after it was sealed; do not use this artifact"
            )
        return manifest


_MANIFEST = TypeAdapter(Manifest)


def seal(folder: Path, facts: Facts, *, keys: Keys | None = None) -> Manifest:
    """Describe every file of ``folder`` and bring all of it to the disk, the manifest last.

    A folder that was sealed before is sealed anew. Signed if ``keys`` (default: those of the
    environment) can sign.

    Raises:
        ConfigError: no files, pickles, symbolic links, or a loader outside ``LOADERS``.
    """
    keys = Keys.of() if keys is None else keys
    if facts.loader is not None:
        check_loader(facts.loader, str(folder))
    for name in (MANIFEST, SIGNATURE):
        (folder / name).unlink(missing_ok=True)
        durable.partial(folder / name).unlink(missing_ok=True)
    files = {}
    for path, file in _files(folder):
        _check_path(path, str(folder))
        if pickles.found_in(file):
            raise _pickle(path, str(folder))
        file.chmod(0o644)  # safetensors writes 0600; other users of the node may read
        files[path] = File(size=file.stat().st_size, sha256=sha256_file(file))
        durable.sync(file)
    if not files:
        raise ConfigError(f"{folder} has no files; expected what the loader of an artifact reads")
    given = {f.name: getattr(facts, f.name) for f in fields(Facts)} | {
        "metrics": {name: _finite(value) for name, value in facts.metrics.items()},
        "gates": tuple(replace(gate, value=_finite(gate.value)) for gate in facts.gates),
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        # There and back, so that the hash is of what a reader will see.
        manifest = _MANIFEST.validate_json(
            Manifest(
                **given, format=FORMAT, created=created, files=files, content_sha256=""
            ).encode()
        )
        manifest = replace(manifest, content_sha256=_content_sha256(manifest))
    except (TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{folder}: its facts cannot be written as JSON ({told})") from None
    text = manifest.encode()
    if signature := keys.sign(text):
        durable.write(folder / SIGNATURE, signature)
    durable.write(folder / MANIFEST, text)
    for directory in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        durable.sync(directory)
    return manifest


def read(folder: Path, *, keys: Keys | None = None) -> Manifest:
    """The manifest of ``folder``, checked in itself and for its signature; no other file is read.

    Raises:
        ConfigError: none, damaged, changed, or not signed as ``keys`` want.
    """
    keys = Keys.of() if keys is None else keys
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{folder} has no readable {MANIFEST} ({error.strerror}); expected a sealed artifact"
        ) from None
    manifest = Manifest.decode(text, str(folder))
    try:
        signature = (folder / SIGNATURE).read_bytes()
    except FileNotFoundError:
        signature = None
    keys.check(text, signature, str(folder))
    return manifest


def verify(folder: Path, *, keys: Keys | None = None) -> Manifest:
    """The manifest of ``folder``, after comparing every byte of every file with it.

    Raises:
        ConfigError: naming the first file that is missing, damaged or not in the manifest.
    """
    manifest = read(folder, keys=keys)
    found = dict(_files(folder))
    for path in sorted(found.keys() | manifest.files.keys()):
        if path not in found:
            hint = "; it is encrypted, read it through its store" if path + SUFFIX in found else ""
            raise ConfigError(f"{folder} lacks {path}, which its manifest names{hint}")
        if path not in manifest.files:
            raise ConfigError(f"{folder}: {path} is not in its manifest; somebody added it")
        size, wanted = found[path].stat().st_size, manifest.files[path]
        if size != wanted.size:
            raise ConfigError(f"{folder}: {path} has {size} bytes, expected {wanted.size}")
        if sha256_file(found[path]) != wanted.sha256:
            raise ConfigError(f"{folder}: {path} is damaged or was changed; its hash differs")
        if pickles.found_in(found[path]):  # whoever has sealed it
            raise _pickle(path, str(folder))
    return manifest


def load(folder: Path, *, keys: Keys | None = None) -> Predictor:
    """What predicts with the artifact in ``folder``, after verifying all of it.

    Raises:
        ConfigError: it does not verify, names no loader, or one that is not there.
    """
    manifest = verify(folder, keys=keys)
    if manifest.loader is None:
        raise ConfigError(
            f"{folder}: {manifest.name} ({manifest.kind}) names no loader; nothing predicts with it"
        )
    predictor: Predictor = _loader(manifest.loader, str(folder))(folder)
    return predictor


def _loader(name: str, called: str) -> Any:
    check_loader(name, called)
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise ConfigError(
                f"{called}: its loader {name} needs the package {error.name!r}, which is not here"
            ) from error
    except AttributeError:
        pass
    raise ConfigError(f"{called}: this version has no loader {name}; update, or train it anew")


def check_loader(name: str, called: str) -> None:
    """Raises ConfigError: it is not in ``LOADERS``."""
    if _LOADER.fullmatch(name) is None:
        raise ConfigError(
            f"{called}: its loader is {name!r}; expected {LOADERS}.FILE:FUNCTION, "
            "since code is loaded from nowhere else"
        )


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All that an artifact's manifest has to name, in order."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; expected one with an artifact's files")
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            raise ConfigError(f"{folder}: {path} is a link or no file; artifacts hold plain files")
        if file.is_file() and path not in RESERVED:
            yield path, file


def _check_path(path: str, called: str) -> None:
    """Also of manifests from outside, which name where fetched files are written."""
    pure = PurePosixPath(path)
    if (
        str(pure) != path
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in path
        or "\0" in path
        or path in RESERVED | {"."}
    ):
        raise ConfigError(f"{called}: {path!r} cannot be the name of an artifact's file")
    if pickles.named(pure):
        raise _pickle(path, called)


def _pickle(path: str, called: str) -> ConfigError:
    return ConfigError(
        f"{called}: {path} is a pickle, which runs code when loaded; "
        "write safetensors, JSON, npz or ONNX"
    )


def _content_sha256(manifest: Manifest) -> str:
    """Of the manifest without this hash: sorted keys, no blanks, UTF-8."""
    facts = _MANIFEST.dump_python(manifest, mode="json")
    del facts["content_sha256"]
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def is_hash(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
