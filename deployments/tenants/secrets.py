"""Secrets out of the environment or a file, newest first; two are valid while one is replaced.

A configuration says where they are, never what they are:

=====================  ====================================================================
``${NAME}``            the environment variable NAME, with commas between the secrets
``file:/PATH``         a file, one secret a line; read again whenever it changes
=====================  ====================================================================

To rotate, put the new one in front, and take the old one away once nobody uses it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from models.errors import ConfigError

logger = logging.getLogger(__name__)

LEAST_BYTES = 16
REFERENCE = re.compile(r"\$\{(?P<variable>[A-Za-z_][A-Za-z0-9_]*)\}|file:(?P<file>/.+)")
EXPECTED = "${NAME} of an environment variable, or file:/ABSOLUTE/PATH"

Secrets: TypeAlias = tuple[bytes, ...]
"""At least one, the newest first."""
Current: TypeAlias = Callable[[], Secrets]
"""Those that are valid now."""


def of_variable(name: str, environ: Mapping[str, str] = os.environ) -> Secrets | None:
    """``None``: it is unset or empty. Raises ConfigError: too short."""
    given = environ.get(name)
    return parsed(given.split(","), name) if given else None


def of_file(path: Path) -> Secrets:
    """Raises ConfigError: too short; OSError: it cannot be read."""
    return parsed(path.read_text().splitlines(), str(path))


def parsed(given: Sequence[str], where: str) -> Secrets:
    """Raises ConfigError, which names ``where`` and never a secret."""
    found = tuple(each.strip().encode() for each in given if each.strip())
    if not found or min(map(len, found)) < LEAST_BYTES:
        raise ConfigError(
            f"{where}: expected secrets of {LEAST_BYTES} characters or more, newest first"
        )
    return found


def referred(reference: str, environ: Mapping[str, str] = os.environ) -> Current:
    """What a reference in the configuration leads to.

    Raises:
        ConfigError: nothing is there, or it is too short. What is wrong with the reference
            is said without it, since it may be a secret that somebody wrote there.
    """
    found = REFERENCE.fullmatch(reference)
    if found is None:
        raise ConfigError(f"a reference to secrets is not one; expected {EXPECTED}")
    if (file := found["file"]) is not None:
        return SecretFile(Path(file))
    secrets = of_variable(found["variable"], environ)
    if secrets is None:
        raise ConfigError(f"{found['variable']} is not set; expected secrets, newest first")
    return lambda: secrets


class SecretFile:
    """The secrets in a file as it is now: rotating needs no restart.

    A change for the worse (gone, empty, too short) is logged, and what was valid stays so.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError: it cannot be read, or has no secrets."""
        self._path = path
        try:
            self._stamp: object = _stamp(path)
            self._secrets = of_file(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(_unreadable(path, error)) from None

    def __call__(self) -> Secrets:
        try:
            stamp: object = _stamp(self._path)
        except OSError as error:
            stamp = error.errno
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._secrets = of_file(self._path)
            except (ConfigError, OSError, UnicodeDecodeError) as error:
                said = error if isinstance(error, ConfigError) else _unreadable(self._path, error)
                logger.error("secrets stay as they were: %s", said)
        return self._secrets


def _stamp(path: Path) -> tuple[int, int, int]:
    """Differs once somebody has written or replaced the file."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> str:
    """Without what is in the file, which a decoding error would show."""
    return f"{path}: {error.strerror if isinstance(error, OSError) else 'not UTF-8 text'}"
