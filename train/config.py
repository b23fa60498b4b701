"""What a person types: the file of an experiment, ``--set``, and errors that help.

::

    recipe: vision          # or on the command line
    run_name: first-try
    workers: 2              # everything up to `config` has a default; see Launch
    tracking: {mlflow: {uri: sqlite:///mlflow.db}}
    config:                 # the recipe's own: python -m train --show vision
      epochs: 8

What stands under ``config`` may as well stand beside it: ``seed``, ``model``, ``training`` …
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from models import yaml_file
from models.errors import ConfigError
from train.discover import unknown

M = TypeVar("M", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Resources(Section):
    """Of each worker on a cluster."""

    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)


class KeepCheckpoints(Section):
    last: int = Field(default=2, ge=1)
    """How many of the newest are kept."""
    best: str | None = None
    """The metric of the one that is kept however old it is; default: the recipe's first gate."""
    mode: Literal["min", "max"] = "min"
    """Of ``best``."""


class Wandb(Section):
    project: str = "frontier-run"
    mode: Literal["offline", "online"] = "offline"


class Mlflow(Section):
    uri: str | None = None
    """A tracking server or database; default: a database in the run's folder."""
    experiment: str = "frontier-run"


class Tracking(Section):
    """History (JSONL) and TensorBoard are always written; these beside them."""

    wandb: Wandb | None = None
    mlflow: Mlflow | None = None


Count = Annotated[int, Field(ge=1)]


class Launch(Section):
    """Where and how a run is carried out. None of it changes the metrics."""

    workers: Annotated[int, Field(ge=0)] | tuple[Count, Count] | None = None
    """0: in this process. 1: on one worker of the cluster. More: a data-parallel group; two
    numbers: as many in between as there is room for. Default: 1 where ``RAY_ADDRESS`` names a
    cluster, else 0."""
    resources: Resources = Resources()
    fan_out: bool | None = None
    """Work through ``context.map`` as Ray tasks. Default: where there is a cluster."""
    retries: int = Field(default=3, ge=0)
    """How often a lost worker is replaced."""
    resize_every_s: float = Field(default=60, gt=0)
    """How often an elastic group looks for more room."""
    checkpoints: KeepCheckpoints = KeepCheckpoints()
    tracking: Tracking = Tracking()
    plots: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> Launch:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers: {self.workers[0]} is more than {self.workers[1]}")
        return self


class Experiment(Launch):
    """The whole file."""

    recipe: str | None = None
    run_name: str | None = Field(default=None, min_length=1)
    inputs: dict[str, str] = Field(default_factory=dict)
    """Kind of artifact → a folder, or ``NAME@ALIAS`` of the registry."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The recipe's configuration."""

    def launch(self) -> Launch:
        return Launch.model_validate({key: getattr(self, key) for key in Launch.model_fields})


def read(path: Path) -> dict[str, Any]:
    """Keys and values of an experiment's file. Raises ConfigError: no such file, or not YAML."""
    tree = yaml_file.read(path)
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: is {type(tree).__name__}, expected keys and values")
    return tree or {}


def experiment(tree: Mapping[str, Any], config: type[BaseModel], *, called: str) -> Experiment:
    """The experiment that ``tree`` describes, with the recipe's keys under ``config``, wherever
    they stand. A name that both have is the experiment's own at the top.

    Raises:
        ConfigError: unknown or wrong keys, or one that stands in both places.
    """
    ours, theirs = Experiment.model_fields, config.model_fields
    own: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in ours and key not in theirs:
            raise ConfigError(
                f"{called}: {unknown('key', str(key), dict.fromkeys([*ours, *theirs]))}"
            )
        (own if key in ours else rest)[key] = value
    if rest:
        below = own.get("config", {})
        for key in rest:
            if isinstance(below, Mapping) and key in below:
                raise ConfigError(f"{called}: {key} stands both under config and beside it")
        own["config"] = {**below, **rest} if isinstance(below, Mapping) else below
    return validated(Experiment, own, called=called)


def with_settings(config: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """``config`` with each ``key=value``; dots in a key go down, a value is YAML.

    Raises:
        ConfigError: a setting without ``=``, or one that goes down into a value.
    """
    result: dict[str, Any] = _copied(config)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting}: expected key=value")
        *path, last = key.strip().split(".")
        inner = result
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {setting}: {part} is {inner!r} and has no keys")
        try:
            inner[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            inner[last] = text
    return result


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with what ``over`` says, key by key all the way down."""
    result = _copied(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping):
            value = merged(below, value)
        result[key] = value
    return result


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def validated(model: type[M], tree: Mapping[str, Any], *, called: str) -> M:
    """Raises ConfigError: one line for all mistakes, each with key, value and what was expected."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        mistakes = "; ".join(_said(model, each) for each in error.errors(include_url=False))
        raise ConfigError(f"{called}: {mistakes}") from None


def _said(model: type[BaseModel], issue: Any) -> str:
    loc = tuple(issue["loc"])
    if issue["type"] == "extra_forbidden":
        above = [str(part) for part in loc[:-1]]
        inner = _model_at(model, above)
        given = ".".join([*above, str(loc[-1])])
        if inner is None:
            return f"unknown key {given!r}"
        return unknown("key", str(loc[-1]), inner.model_fields) + (
            f" (in {'.'.join(above)})" if above else ""
        )
    message = issue["msg"].removeprefix("Value error, ")
    if not loc:
        return str(message)
    return f"{'.'.join(map(str, loc))}: {message} (given: {issue['input']!r:.80})"


def _model_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The section at ``path``, for the list of its keys; tags of unions in it are passed over."""
    found = [model]
    for part in path:
        deeper = [
            inner
            for each in found
            if part in each.model_fields
            for inner in sections(each.model_fields[part].annotation)
        ]
        found = deeper or [each for each in found if part not in each.model_fields]
    return found[0] if len(found) == 1 else None


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation has room for."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections(part)]


class Key(typing.NamedTuple):
    """One line of ``--show``."""

    name: str
    type: str
    default: str
    doc: str


def keys(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Iterator[Key]:
    """Every key a person may set, nested ones with dots; ``values`` are the defaults."""
    for name, info in model.model_fields.items():
        inner = sections(info.annotation)
        value = values.get(name, PydanticUndefined)
        if len(inner) == 1 and isinstance(value, Mapping):
            yield from keys(inner[0], value, f"{prefix}{name}.")
            continue
        default = "(required)" if value is PydanticUndefined else _shown(value)
        doc = " ".join((info.description or "").replace("``", "`").split())
        yield Key(prefix + name, _type_name(info.annotation, info.metadata), default, doc)


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9)
    return text.removesuffix("\n...\n").strip()


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """``int >= 0``, ``float | null``, ``adam | sgd`` …"""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _type_name(inner, more)
    if annotation is None or annotation is types.NoneType:
        return "null"
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in get_args(annotation))
    if origin is not None:
        inside = ", ".join(_type_name(a) for a in get_args(annotation) if a is not Ellipsis)
        name = getattr(origin, "__name__", str(origin))
        return f"{'list' if name in ('tuple', 'Sequence') else name.lower()}[{inside}]"
    name = getattr(annotation, "__name__", str(annotation))
    bounds = [
        f"{sign} {getattr(each, attribute):g}"
        for each in metadata
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(each, attribute, None) is not None
    ]
    return " ".join([{"str": "text", "bool": "true | false"}.get(name, name), *bounds])
