"""What a person may say about a sweep: the file of ``--config``, changed by options.

Unknown keys are errors, and an error names the key, the value and what would be right.
What is left open comes from the recipe: its space, and the metric of its first gate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import Field, model_validator

from models import yaml_file
from models.errors import ConfigError
from train.config import Resources, Section, validated
from train.recipe import Config, Recipe
from train.space import Domain
from tune import search
from tune import space as spaces
from tune.search import Grid, Mode, Searcher

RESOLVED = "sweep.yaml"
"""A sweep with every default filled in, in its folder."""


class Search(Section):
    kind: search.Kind = "tpe"
    """random, grid, tpe (any space, hundreds of trials) or gp (few, costly trials)."""
    points: int = Field(default=5, ge=1)
    """Of a grid: values taken from a range."""


class Watching(Section):
    """A scheduler judges trials by what they report on the way."""

    metric: str | None = None
    """What it looks at in the reports; default: the metric of the sweep."""
    mode: Mode | None = None
    by: Literal["progress", "step"] = "progress"
    """How far a trial is: percent of the total that the recipe announces, or steps."""

    def unit(self) -> str:
        return "%" if self.by == "progress" else " steps"


class NoScheduler(Section):
    kind: Literal["none"] = "none"


class Asha(Watching):
    """Asynchronous successive halving (Li et al. 2020): at each rung the best
    ``1/reduction`` of those that came there go on, the others stop.
    """

    kind: Literal["asha"]
    first: float = Field(default=10, gt=0)
    """The first rung; the next are ``reduction`` times as far each."""
    reduction: float = Field(default=3, gt=1)


class Median(Watching):
    """A trial stops when its best is worse than the median of the others' running means
    (Golovin et al. 2017).
    """

    kind: Literal["median"]
    after: float = Field(default=20, ge=0)
    """No trial is stopped before it is that far."""
    others: int = Field(default=3, ge=1)
    """How many others must have come as far."""


class Pbt(Watching):
    """Population based training (Jaderberg et al. 2017): the worst go on from a checkpoint
    of the best, with its values slightly changed. All trials run side by side, in turns
    where there is not room for all. Takes random starting points.
    """

    kind: Literal["pbt"]
    every: float = Field(default=20, gt=0)
    """How far between two comparisons."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """The share that gives up, and the share that it is replaced from."""


_SCHEDULERS: dict[Any, type[Section]] = {
    "none": NoScheduler,
    "asha": Asha,
    "median": Median,
    "pbt": Pbt,
}
Scheduler: TypeAlias = Annotated[NoScheduler | Asha | Median | Pbt, Field(discriminator="kind")]


class Sweep(Section):
    recipe: str
    inputs: dict[str, str] = {}
    """Kind of artifact → a folder, or ``NAME@ALIAS`` of the registry."""
    config: dict[str, Any] = {}
    """What all trials share, on top of the recipe's defaults."""
    space: dict[str, Any] = {}
    """What varies: ``key: [a, b]`` or ``key: {low, high, log}``. On top of the recipe's
    space; ``key: null`` takes a key out of it."""
    search: Search = Search()
    """``search: gp`` is short for ``{kind: gp}``; so it is for schedulers."""
    scheduler: Scheduler = NoScheduler()
    metric: str
    """What is searched for; default: the metric of the recipe's first gate."""
    mode: Mode
    """Default: the direction of that gate."""
    trials: int | None = Field(default=None, ge=1)
    """Default: 20, or all points of a grid."""
    time_budget_s: float | None = Field(default=None, gt=0)
    """No trial runs on after that; counted over all sessions of the sweep."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Default: as many as the cluster has room for."""
    seed: int = Field(default=0, ge=0)
    """Of the search; trials have the seed of their configuration."""
    resources: Resources = Resources()
    """Of one trial, or of each of its workers. Trials wait for room: no number of them is too
    many."""
    workers: int = Field(default=0, ge=0)
    """0: each trial runs in one process. 2 or more: in a data-parallel group of its own."""
    retries: int = Field(default=2, ge=0)
    """How often a trial is started again whose process died. What a recipe raises would only
    be raised again."""

    @model_validator(mode="after")
    def _pbt_copies_from_one_process(self) -> Sweep:
        # A group goes on while it is told of, and so is ahead of the checkpoint that is wanted.
        if isinstance(self.scheduler, Pbt) and self.workers > 1:
            raise ValueError("scheduler pbt takes trials of one process; leave out workers")
        return self


def resolve(recipe: Recipe[Any], documents: Sequence[Mapping[str, Any]]) -> Sweep:
    """Defaults of the recipe, changed by each document in turn, checked in every part.

    Raises:
        ConfigError: one line per mistake, with the path of the key, the value found and
            what was expected.
    """
    merged: dict[str, Any] = {"space": spaces.dump(recipe.space)}
    for document in documents:
        merged = _merge(merged, _in_full(document))
    if isinstance(merged["space"], Mapping):
        merged["space"] = {k: spec for k, spec in merged["space"].items() if spec is not None}
    if isinstance(merged.get("scheduler"), Mapping) and merged["scheduler"].get("kind") == "pbt":
        merged.setdefault("search", {"kind": "random"})
    if merged.setdefault("recipe", recipe.name) != recipe.name:
        raise ConfigError(f"This sweep is for {merged['recipe']!r}, not for {recipe.name!r}.")
    if "metric" not in merged and recipe.gates:
        merged["metric"] = next(iter(recipe.gates))
    gate = recipe.gates.get(merged.get("metric", ""))
    if "mode" not in merged and gate is not None:
        merged["mode"] = gate.mode
    for key in ("metric", "mode"):
        if merged.get(key) is None:
            gates = ", ".join(recipe.gates) or "none"
            raise ConfigError(f"{recipe.name}: its gates ({gates}) do not tell the {key}; give it.")
    called = f"sweep of {recipe.name}"
    if isinstance(given := merged.get("scheduler"), Mapping) and given.get("kind") in _SCHEDULERS:
        # By itself, so that an unknown key is answered with those of this kind.
        validated(_SCHEDULERS[given["kind"]], given, called=f"{called}, scheduler")
    sweep = validated(Sweep, merged, called=called)
    if isinstance(sweep.scheduler, Pbt) and sweep.search.kind != "random":
        raise ConfigError(f"scheduler pbt searches itself; leave out search {sweep.search.kind!r}.")
    space = domains(recipe, sweep)
    base = dict(sweep.config)
    spaces.configured(recipe.config, base, {})
    spaces.check(recipe.config, base, space)
    return sweep.model_copy(update={"space": spaces.dump(space), "trials": _trials(sweep, space)})


def domains(recipe: Recipe[Any], sweep: Sweep) -> dict[str, Domain]:
    """What the sweep varies.

    Raises:
        ConfigError: an unknown key, something that is no domain, or nothing at all.
    """
    space = spaces.parse(recipe.name, recipe.config, sweep.space)
    if not space:
        known = ", ".join(dict.fromkeys(key for key, _ in spaces.leaves(recipe.config)))
        raise ConfigError(
            f"{recipe.name} has no space of its own: say under space what may vary ({known})."
        )
    return space


def make_searcher(recipe: Recipe[Any], sweep: Sweep) -> Searcher:
    return search.searcher(
        sweep.search.kind,
        domains(recipe, sweep),
        mode=sweep.mode,
        seed=sweep.seed,
        points=sweep.search.points,
    )


def trial_config(recipe: Recipe[Any], sweep: Sweep, point: search.Point) -> Config:
    return spaces.configured(recipe.config, sweep.config, point)


def watched(sweep: Sweep) -> tuple[str, Mode]:
    """Metric and direction by which the scheduler judges; the sweep's where it has none."""
    scheduler = sweep.scheduler
    if isinstance(scheduler, Watching) and scheduler.metric is not None:
        return scheduler.metric, scheduler.mode or sweep.mode
    return sweep.metric, sweep.mode


def read(path: Path) -> dict[str, Any]:
    """A sweep file, as plain values.

    Raises:
        ConfigError: there is none, or it is not YAML with keys.
    """
    document = yaml_file.read(path, load_yaml)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(document).__name__}.")
    return document


def read_resolved(folder: Path) -> Sweep | None:
    """The sweep of a folder; ``None`` if there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return Sweep.model_validate(yaml.safe_load((folder / RESOLVED).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder / RESOLVED} cannot be read: {error}") from None


def load_yaml(text: str) -> Any:
    """YAML in which ``1e-4`` is a number, as a person expects; YAML 1.1 wants ``1.0e-4``."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(  # copies the inherited table first
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d[\d_]*(?:\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` wins, section by section; a domain of another form replaces the old one."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and "values" not in value:
            # A new kind of scheduler starts from its own defaults; a list becomes a range.
            fresh = "values" in old or old.get("kind", value.get("kind")) != value.get(
                "kind", old.get("kind")
            )
            merged[key] = dict(value) if fresh else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _in_full(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {"kind": value} if key in ("search", "scheduler") and isinstance(value, str) else value
        for key, value in document.items()
    }


def _trials(sweep: Sweep, space: Mapping[str, Domain]) -> int:
    if sweep.search.kind != "grid":
        return sweep.trials or 20
    size = len(Grid(space, mode=sweep.mode, seed=sweep.seed, points=sweep.search.points))
    if sweep.trials not in (None, size):
        raise ConfigError(f"The grid has {size} points; leave trials out (given: {sweep.trials}).")
    return size
