"""Artifacts that a run starts from: ``--input classifier=digits-cnn@champion``, and weights that
its configuration names: ``model.source: registry:chat@champion``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from models import artifact
from models.artifact import Manifest
from models.errors import ConfigError
from models.sources import weights
from train.discover import unknown
from train.recipe import Config, Recipe

FromRegistry = Callable[[str], Path]
"""``NAME@VERSION`` or ``NAME@ALIAS`` → a folder with that artifact."""

REGISTRY = "registry:"
SHA256, LICENCE = "sha256", "licence"
"""Keys beside one that names a source of weights."""
NOT_STATED = "not stated"


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


def pins(recipe: Recipe[Any], config: Config, version_of: Callable[[str], str]) -> list[str]:
    """Settings (``key=value``) that say exactly which weights ``config`` starts from: others may be
    there before the run goes on, or before the next trial of a sweep begins.

    A version where it names an alias. Of what is no artifact, hash and licence, as far as they are
    not given.

    Raises:
        ConfigError: there are no such weights.
        Unavailable: they cannot be fetched.
    """
    settings = []
    for key, source in _sources(recipe, config):
        if source.startswith(REGISTRY):
            settings.append(f"{key}={REGISTRY}{version_of(source.removeprefix(REGISTRY))}")
        elif _is_of_others(source):
            found = weights(source)
            told = {SHA256: found.sha256, LICENCE: found.licence}
            settings += [
                f"{beside(key, name)}={json.dumps(value)}"
                for name, value in told.items()
                if value is not None and _value(config, beside(key, name)) is None
            ]
    return settings


def licence(recipe: Recipe[Any], config: Config, parents: Iterable[Manifest]) -> str:
    """Of what the run makes (SPDX): that of the recipe's own part, and those of all that it starts
    from.
    """
    found = [recipe.licence, *(parent.licence or NOT_STATED for parent in parents)]
    for key, source in _sources(recipe, config):
        if _is_of_others(source):
            found.append(_value(config, beside(key, LICENCE)) or NOT_STATED)
    return " AND ".join(sorted(filter(None, set(found))))


def beside(key: str, name: str) -> str:
    """``model.source`` → ``model.sha256``."""
    return ".".join([*key.split(".")[:-1], name])


def bases(
    recipe: Recipe[Any], config: Config, earlier: Mapping[str, str], from_registry: FromRegistry
) -> dict[str, Path]:
    """Folders of the artifacts among the weights that ``config`` starts from, by its keys.

    Args:
        earlier: where an interrupted attempt had them. It goes on with a version that was
            archived since, which nobody may begin with.
    """
    found = {}
    for key, source in _sources(recipe, config):
        if key in earlier and Path(earlier[key]).is_dir():
            found[key] = Path(earlier[key])
        elif source.startswith(REGISTRY):
            found[key] = from_registry(source.removeprefix(REGISTRY))
        elif (path := _local(source) / artifact.MANIFEST).is_file():
            found[key] = path.parent
    return found


def _sources(recipe: Recipe[Any], config: Config) -> Iterator[tuple[str, str]]:
    for key in recipe.bases:
        yield key, _value(config, key)


def _value(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _is_of_others(source: str) -> bool:
    """A source of weights, but no artifact of ours."""
    if source.startswith(REGISTRY) or (_local(source) / artifact.MANIFEST).is_file():
        return False
    return ":" in source or source.startswith(("/", "./", "../", "~"))


def _local(source: str) -> Path:
    """The folder that ``source`` would be, if it is one."""
    return Path(source.removeprefix("path:")).expanduser().absolute()


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
