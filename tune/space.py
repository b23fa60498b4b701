"""The space of a sweep, held against the configuration of the recipe that it varies."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from models.errors import ConfigError
from train.config import sections, validated
from train.discover import unknown
from train.recipe import Config
from train.space import Choice, Domain, Float, Int
from tune.search import Point, Space, Value


def leaves(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and annotation of everything a person may set, depth first."""
    for name, field in config.model_fields.items():
        inner = sections(field.annotation)
        for section in inner:
            yield from leaves(section, f"{prefix}{name}.")
        if not inner:
            yield prefix + name, field.annotation


def parse(name: str, config: type[Config], given: Mapping[str, Any]) -> dict[str, Domain]:
    """What a person wrote about each key, as domains that fit the recipe's configuration.

    ``[a, b]`` or ``{values: [a, b]}`` are choices, ``{low, high, log}`` is a range: of
    integers where the configuration wants one.

    Raises:
        ConfigError: an unknown key, or something that is no domain.
    """
    annotations: dict[str, set[Any]] = {}
    for key, annotation in leaves(config):
        annotations.setdefault(key, set()).update(_parts(annotation))
    space = {}
    for key, spec in given.items():
        if key not in annotations:
            raise ConfigError(f"space of {name}: " + unknown("key", key, annotations))
        space[key] = _domain(f"space.{key}", spec, annotations[key])
    return space


def dump(space: Space) -> dict[str, Any]:
    """Plain values that ``parse`` reads."""
    return {key: _dump(domain) for key, domain in space.items()}


def configured(config: type[Config], base: Mapping[str, Any], point: Point) -> Config:
    """The configuration of a trial: ``base`` with the values of ``point``.

    Raises:
        ConfigError: all mistakes, with key, value and what was expected.
    """
    document = dict(base)
    for key, value in point.items():
        put(document, key, value)
    return validated(config, document, called="config")


def check(config: type[Config], base: Mapping[str, Any], space: Space) -> None:
    """Try the ends of every range and every choice, so that no trial finds out alone.

    Raises:
        ConfigError: naming key and value.
    """
    for key, domain in space.items():
        ends: Iterable[Value]
        ends = domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
        for value in ends:
            configured(config, base, {key: value})


def put(document: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; sections on the way are copied, or made where there are none."""
    *sections, last = key.split(".")
    for section in sections:
        below = document.get(section)
        document[section] = dict(below) if isinstance(below, Mapping) else {}
        document = document[section]
    document[last] = value


def _domain(where: str, spec: Any, parts: set[Any]) -> Domain:
    if isinstance(spec, list | tuple):
        spec = {"values": spec}
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{where}: {_EXPECTED} (given: {spec!r}).")
    if spec.keys() == {"values"}:
        values = spec["values"]
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"{where}: values is a list with one value at least.")
        if wrong := [value for value in values if not isinstance(value, bool | int | float | str)]:
            raise ConfigError(f"{where}: {wrong[0]!r} is neither number, text nor truth value.")
        return Choice(tuple(values))
    if not {"low", "high"} <= spec.keys() <= {"low", "high", "log"}:
        raise ConfigError(f"{where}: {_EXPECTED} (given: {dict(spec)!r}).")
    low, high, log = spec["low"], spec["high"], spec.get("log", False)
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, int | float):
            raise ConfigError(f"{where}: {end!r} is not a number.")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: log is true or false (given: {log!r}).")
    if low > high:
        raise ConfigError(f"{where}: low ({low}) is above high ({high}).")
    if log and low <= 0:
        raise ConfigError(f"{where}: a logarithmic range starts above 0 (given: {low}).")
    if float in parts:
        return Float(low=float(low), high=float(high), log=log)
    if int in parts:
        if low != int(low) or high != int(high):
            raise ConfigError(f"{where}: this key takes integers (given: {low} to {high}).")
        return Int(low=int(low), high=int(high), log=log)
    raise ConfigError(f"{where}: this key takes no numbers; list its values instead.")


_EXPECTED = "expected a list of values, or {low, high} with an optional log: true"


def _dump(domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return {"values": list(domain.values)}
    return {"low": domain.low, "high": domain.high, "log": domain.log}


def _parts(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type: ``Section | None`` is ``Section`` and ``None``."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    elif origin is Annotated:
        yield from _parts(get_args(annotation)[0])
    else:
        yield annotation
