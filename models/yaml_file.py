"""A YAML file that a person wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from models.errors import ConfigError


def read(path: Path, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """What is in it; ``None`` if nothing is.

    Args:
        load: text → plain values; raises YAMLError.

    Raises:
        ConfigError: no such file, or not YAML.
    """
    try:
        return load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
