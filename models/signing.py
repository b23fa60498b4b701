"""Signatures under manifests: Ed25519, with two or more valid keys during a rotation.

================================  ====================================================
``FRONTIER_SIGNING_KEY_FILE``     a private key (PEM): what this process seals, it signs
``FRONTIER_TRUSTED_KEYS_FILE``    public keys (PEM, one after the other): whom it believes
``FRONTIER_REQUIRE_SIGNATURE``    ``1``: what nobody trusted has signed is not loaded
================================  ====================================================

``openssl genpkey -algorithm ed25519 -out key.pem`` makes a key, and ``openssl pkey -in
key.pem -pubout >> trusted.pem`` trusts it. To rotate: trust the new key everywhere, sign
with it, and take the old one out once all that is served has been signed anew.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from models.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

_PUBLIC = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Whom we sign as, and whom we believe."""

    signing: Ed25519PrivateKey | None = None
    trusted: Sequence[Ed25519PublicKey] = ()
    required: bool = False
    """Refuse what is not signed."""

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Raises ConfigError naming the variable and the file, never their contents."""
        signing = _private(environ.get("FRONTIER_SIGNING_KEY_FILE"))
        trusted = _publics(environ.get("FRONTIER_TRUSTED_KEYS_FILE"))
        if signing is not None:
            trusted = [signing.public_key(), *trusted]
        match environ.get("FRONTIER_REQUIRE_SIGNATURE", "").lower():
            case "" | "0" | "false" | "no":
                required = False
            case "1" | "true" | "yes":
                required = True
            case given:
                raise ConfigError(f"FRONTIER_REQUIRE_SIGNATURE is {given!r}; expected 1 or 0")
        if required and not trusted:
            raise ConfigError(
                "FRONTIER_REQUIRE_SIGNATURE is set and nobody is trusted; "
                "name a file of public keys in FRONTIER_TRUSTED_KEYS_FILE"
            )
        return cls(signing=signing, trusted=tuple(trusted), required=required)

    def sign(self, message: bytes) -> bytes:
        """The contents of a signature file; empty without a signing key."""
        if self.signing is None:
            return b""
        name = fingerprint(self.signing.public_key())
        signature = base64.b64encode(self.signing.sign(message)).decode()
        return f"ed25519 {name} {signature}\n".encode()

    def check(self, message: bytes, signatures: bytes | None, called: str) -> None:
        """``signatures``: a signature file's contents, ``None`` if there is none.

        Raises:
            ConfigError: a signature is forged or not one, or one is required and none is
                of a trusted key.
        """
        from cryptography.exceptions import InvalidSignature

        known = {fingerprint(key): key for key in self.trusted}
        signers = []
        for line in (signatures or b"").splitlines():
            try:
                algorithm, name, text = line.decode("ascii").split(" ")
                signature = base64.b64decode(text, validate=True)
                if algorithm != "ed25519":
                    raise ValueError(algorithm)
            except (ValueError, UnicodeError, binascii.Error):
                raise ConfigError(
                    f"{called}: the signature file is damaged; expected lines of "
                    "'ed25519 KEY SIGNATURE'"
                ) from None
            if name in known:
                try:
                    known[name].verify(signature, message)
                except InvalidSignature:
                    raise ConfigError(
                        f"{called}: the signature of key {name} does not fit the manifest; "
                        "it was changed after signing, do not use it"
                    ) from None
            signers.append(name)
        if self.required and not known.keys() & set(signers):
            found = f"signed by {', '.join(signers)}" if signers else "not signed"
            raise ConfigError(
                f"{called} is {found}; expected a signature of {' or '.join(sorted(known))} "
                "(FRONTIER_REQUIRE_SIGNATURE is set)"
            )


def fingerprint(key: Ed25519PublicKey) -> str:
    """A short name of a key: the first 16 hexadecimal digits of the SHA-256 of its bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def _read(variable: str, file: str) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{variable}: {file} cannot be read ({error.strerror})") from None


def _private(file: str | None) -> Ed25519PrivateKey | None:
    if not file:
        return None
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _read("FRONTIER_SIGNING_KEY_FILE", file)
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"FRONTIER_SIGNING_KEY_FILE: {file} is no unencrypted Ed25519 private key in PEM; "
            "make one with openssl genpkey -algorithm ed25519"
        )
    return key


def _publics(file: str | None) -> list[Ed25519PublicKey]:
    if not file:
        return []
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found = []
    for pem in _PUBLIC.findall(_read("FRONTIER_TRUSTED_KEYS_FILE", file)):
        try:
            key = load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"FRONTIER_TRUSTED_KEYS_FILE: {file} holds a key that is not Ed25519")
        found.append(key)
    if not found:
        raise ConfigError(f"FRONTIER_TRUSTED_KEYS_FILE: {file} holds no public key in PEM")
    return found
