"""API keys: ``fr_ID_SECRET``. The id finds the key, a keyed hash of the whole proves it. Pure.

A key's secret has 160 random bits, so a fast hash is enough; the hash is keyed (HMAC-SHA256)
so that a copy of the database alone is of no use to anybody.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from deployments.tenants.secrets import Secrets, of_file, of_variable
from models import durable
from models.errors import ConfigError
from state.places import Places

_KEY = re.compile(r"fr_([0-9a-f]{12})_[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Minted:
    """A new key. The text is shown to a person once and kept nowhere."""

    id: str
    text: str = field(repr=False)


def mint() -> Minted:
    id_ = secrets.token_hex(6)
    return Minted(id=id_, text=f"fr_{id_}_{secrets.token_hex(20)}")


def looks_like_key(text: str) -> bool:
    """Whether it is meant as one, right or wrong."""
    return text.startswith("fr_")


def id_of(text: str) -> str | None:
    """``None``: it is no key of ours, whatever the directory says."""
    found = _KEY.fullmatch(text)
    return found[1] if found else None


@dataclass(frozen=True, slots=True)
class Peppers:
    """The secrets that key the hashes: the first for new keys, each for keys that exist.

    =========================  ==============================================================
    ``FRONTIER_KEY_SECRETS``   secrets of 16 characters or more, newest first, with commas
    ``HOME/key_secrets``       the same, a line each; made at the first start without the variable
    =========================  ==============================================================

    To rotate, put a new one in front, and take the old one away once its keys are replaced.
    Several machines need the variable, or one shared file.
    """

    _all: Secrets = field(repr=False)

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Raises ConfigError: too short, or a file that cannot be read or made."""
        if (given := of_variable("FRONTIER_KEY_SECRETS", environ)) is not None:
            return cls(given)
        path = Places.of(environ).home / "key_secrets"
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _make(path)
            return cls(of_file(path))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; set FRONTIER_KEY_SECRETS") from None

    def digest(self, text: str) -> str:
        """Of a new key; 64 hexadecimal digits."""
        return _digest(text, self._all[0])

    def fits(self, text: str, digest: str) -> bool:
        """Whether ``digest`` is of this very key. Takes the same time whatever is wrong."""
        fits = [hmac.compare_digest(_digest(text, each), digest) for each in self._all]
        return any(fits)


def _digest(text: str, pepper: bytes) -> str:
    return hmac.digest(pepper, text.encode(), "sha256").hex()


def _make(path: Path) -> None:
    """Whole, private, and the first one wins where several processes start at once."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        durable.sync(partial)
        os.link(partial, path)
    except FileExistsError:
        return
    finally:
        partial.unlink()
