"""``module:name`` in a configuration → the object."""

from __future__ import annotations

import importlib
from typing import Any

from models.errors import ConfigError


def find(dotted: str, key: str) -> Any:
    """Raises ConfigError, naming the configuration's ``key``."""
    module, _, name = dotted.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}: {dotted!r} cannot be imported ({error})") from error
    return found
