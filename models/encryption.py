"""Artifacts at rest: AES-256-GCM, with two or more valid keys during a rotation.

===============================  ===================================================
``FRONTIER_ARTIFACT_KEYS``       keys of 64 hexadecimal digits, the newest first, with
                                 commas between them
``FRONTIER_ARTIFACT_KEYS_FILE``  a file with the same, one a line
===============================  ===================================================

``openssl rand -hex 32`` makes a key. The newest encrypts what is published; each decrypts what
it encrypted. To rotate, put the new key in front, everywhere; ``python -m models encrypt --yes``;
then take the old one away. A key that is lost takes with it what it encrypted.

A store then holds, in place of FILE, ``FILE.aes``::

    magic 8 | id of the key 8 | salt 32 | chunk | tag 16 | chunk | tag 16 | …

A chunk is 1 MiB, the last one what is left, so files of any size need little memory. A file has
its own key: HKDF-SHA256 of the artifact key and the salt, which is random. A chunk's nonce is its
number (11 bytes) and whether it is the last (1 byte); this is STREAM (Hoang, Reyhanitabar,
Rogaway, Vizár 2015), as age has it. Authenticated with each chunk are the header, the artifact's
content hash, the file's path and its size. So nothing can be changed, left out, cut off, put in
another order, or in another file's place.

Hashes and signatures are of what was encrypted, not of what it became: an artifact keeps its name
and its signature, whether encrypted or not and under whichever key, and after decrypting it is
compared with its manifest as always. The manifest stays readable: facts about an artifact, and
its files' names and sizes, are not hidden.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from models.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VARIABLE = "FRONTIER_ARTIFACT_KEYS"
VARIABLE_FILE = "FRONTIER_ARTIFACT_KEYS_FILE"
SUFFIX = ".aes"

MAGIC = b"FRNTAES1"
ID_BYTES = 8
SALT_BYTES = 32
HEADER_BYTES = len(MAGIC) + ID_BYTES + SALT_BYTES
CHUNK_BYTES = 1 << 20
TAG_BYTES = 16
PURPOSE = b"frontier-run artifact file"

_KEY = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is encrypted: one file of one artifact."""

    artifact: str
    """Its content hash."""
    path: str
    size: int
    """Bytes, as its manifest says."""

    @property
    def stored_size(self) -> int:
        """Bytes, once it is encrypted."""
        return HEADER_BYTES + self.size + TAG_BYTES * self._count

    @property
    def _count(self) -> int:
        """An empty file has an empty chunk, or its end could be cut off."""
        return max(1, -(-self.size // CHUNK_BYTES))

    def _chunks(self) -> Iterator[tuple[bytes, int]]:
        """Nonce and size of each."""
        for number in range(self._count):
            last = number == self._count - 1
            size = self.size - number * CHUNK_BYTES if last else CHUNK_BYTES
            yield number.to_bytes(11, "big") + bytes([last]), size

    def _bound(self, header: bytes) -> bytes:
        """What each chunk is authenticated with. No part has a NUL, so none can run into another
        but the header, whose length is fixed.
        """
        return header + f"{self.artifact}\0{self.path}\0{self.size}".encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyring:
    """The artifact keys, the newest first; none: nothing is encrypted."""

    keys: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Raises ConfigError naming the variable and the file, never their contents."""
        given, file = environ.get(VARIABLE), environ.get(VARIABLE_FILE)
        if given and file:
            raise ConfigError(f"{VARIABLE} and {VARIABLE_FILE} are both set; expected one of them")
        if file:
            try:
                lines = Path(file).expanduser().read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                told = error.strerror if isinstance(error, OSError) else "not text"
                raise ConfigError(f"{VARIABLE_FILE}: {file} cannot be read ({told})") from None
            return cls(keys=_parsed(lines, f"{VARIABLE_FILE}: {file}"))
        return cls(keys=_parsed(given.split(","), VARIABLE) if given else ())

    @property
    def newest(self) -> str | None:
        """The id of the key that encrypts; ``None``: there is none."""
        return key_id(self.keys[0]).hex() if self.keys else None

    def encrypt(self, source: IO[bytes], target: IO[bytes], subject: Subject) -> None:
        """Raises ConfigError: there is no key, or the file has another size."""
        if not self.keys:
            raise ConfigError(f"nothing to encrypt {subject.path} with; set {VARIABLE_FILE}")
        salt = os.urandom(SALT_BYTES)
        header = MAGIC + key_id(self.keys[0]) + salt
        cipher, bound = _cipher(self.keys[0], salt), subject._bound(header)
        target.write(header)
        for nonce, size in subject._chunks():
            plain = _read(source, size)
            if len(plain) < size:
                raise ConfigError(f"{subject.path} was cut short while it was encrypted")
            target.write(cipher.encrypt(nonce, plain, bound))

    def decrypt(self, source: IO[bytes], target: IO[bytes], subject: Subject, called: str) -> None:
        """Write what was encrypted; each chunk only once it is known to be right.

        Args:
            called: the artifact, in errors.

        Raises:
            ConfigError: the key is not here; or the file is damaged, cut short, or another one.
        """
        from cryptography.exceptions import InvalidTag

        name = f"{called}: {subject.path}{SUFFIX}"
        header = _read(source, HEADER_BYTES)
        key, salt = self._named(key_named_in(header), name), header[-SALT_BYTES:]
        cipher, bound = _cipher(key, salt), subject._bound(header)
        for number, (nonce, size) in enumerate(subject._chunks()):
            sealed = _read(source, size + TAG_BYTES)
            if len(sealed) < size + TAG_BYTES:
                raise ConfigError(f"{name} is cut short in chunk {number}; publish it again")
            try:
                target.write(cipher.decrypt(nonce, sealed, bound))
            except InvalidTag:
                raise ConfigError(
                    f"{name} does not decrypt (chunk {number}): it is damaged, was changed, or is"
                    " another file than its name says; do not use it"
                ) from None
        if source.read(1):
            raise ConfigError(f"{name} goes on after its end; do not use it")

    def _named(self, wanted: str | None, name: str) -> bytes:
        if wanted is None:
            raise ConfigError(f"{name} is no encrypted file, or of a newer version; do not use it")
        known = {key_id(key).hex(): key for key in self.keys}
        if wanted not in known:
            given = f"known here: {', '.join(known)}" if known else "there is none here"
            raise ConfigError(
                f"{name} is encrypted under the key {wanted}; {given}. Add it to the keys of"
                f" {VARIABLE} or {VARIABLE_FILE}"
            )
        return known[wanted]


def key_id(key: bytes) -> bytes:
    """A short name of a key, which tells nothing of it."""
    return hashlib.sha256(PURPOSE + b" key id\0" + key).digest()[:ID_BYTES]


def key_named_in(header: bytes) -> str | None:
    """The id of the key that an encrypted file begins with; ``None``: it is not one."""
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        return None
    return header[len(MAGIC) : len(MAGIC) + ID_BYTES].hex()


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return AESGCM(HKDF(algorithm=SHA256(), length=32, salt=salt, info=PURPOSE).derive(key))


def _parsed(given: list[str], where: str) -> tuple[bytes, ...]:
    found = [each.strip() for each in given if each.strip() and not each.startswith("#")]
    if not found or not all(map(_KEY.fullmatch, found)):
        raise ConfigError(
            f"{where}: expected keys of 64 hexadecimal digits, the newest first; make one with"
            " openssl rand -hex 32"
        )
    return tuple(bytes.fromhex(each) for each in found)


def _read(source: IO[bytes], size: int) -> bytes:
    """``size`` bytes, or less at the end; a remote file may hand them out in pieces."""
    pieces = []
    while size and (piece := source.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
