"""Artifacts that a run starts from: ``--input classifier=digits-cnn@champion``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models import artifact
from models.errors import ConfigError
from train.discover import unknown
from train.recipe import Recipe

FromRegistry = Callable[[str], Path]
"""``NAME@VERSION`` or ``NAME@ALIAS`` → a folder with that artifact."""


def resolve(
    recipe: Recipe[Any], given: Mapping[str, str], from_registry: FromRegistry
) -> dict[str, Path]:
    """Folders of artifacts by kind. A run's folder stands for the artifact in it.

    Raises:
        ConfigError: an input that the recipe has no use for, one that is missing, or one of
            another kind.
    """
    for kind in given:
        if kind not in recipe.inputs:
            raise ConfigError(f"{recipe.name}: {unknown('input', kind, recipe.inputs)}")
    found = {}
    for kind in recipe.inputs:
        if kind not in given:
            raise ConfigError(
                f"{recipe.name} starts from an artifact of kind {kind!r}: "
                f"give --input {kind}=RUN_DIR or --input {kind}=NAME@ALIAS of the registry"
            )
        path = _folder(given[kind], from_registry)
        manifest = artifact.read(path)
        if manifest.kind != kind:
            raise ConfigError(
                f"{recipe.name}: {given[kind]} is of kind {manifest.kind!r}, expected {kind!r}"
            )
        found[kind] = path
    return found


def _folder(reference: str, from_registry: FromRegistry) -> Path:
    path = Path(reference).expanduser()
    if path.is_dir():
        inside = path / "artifact"
        return (inside if (inside / artifact.MANIFEST).is_file() else path).absolute()
    if "@" in reference and not reference.startswith((".", "/", "~")):
        return from_registry(reference)
    raise ConfigError(
        f"--input {reference}: there is no such folder; expected a run, an artifact, "
        "or NAME@VERSION or NAME@ALIAS of the registry"
    )
