"""What a system is: one value that training, sweeps, gates, registry and serving understand.

A file in ``train/recipes/`` exports one ``RECIPE``; the folder is scanned, nothing is
enumerated. The recipe says what a person may set, how it runs, what it must reach and how
its artifact predicts. Everything else is generic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from models.contracts import Predictor
from train.space import Domain

In = TypeVar("In")
Out = TypeVar("Out")
C = TypeVar("C", bound="Config")

Metrics = Mapping[str, float]
"""Name → value; what a run ends with."""
Save = Callable[[Path], None]
"""Writes a checkpoint into an empty folder."""


class Config(BaseModel):
    """What a person may set; each recipe has a subclass. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    seed: int = Field(default=0, ge=0)
    """The same seed gives the same metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What a metric must reach, against a real baseline."""

    baseline: str
    """What the bound was taken from: a published figure, or a simpler method's result."""
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a gate has either at_least or at_most")

    @property
    def mode(self) -> str:
        """``max`` when more is better, else ``min``."""
        return "max" if self.at_least is not None else "min"

    def holds(self, value: float) -> bool:
        """False for NaN, too."""
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None
        return value <= self.at_most

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{bound} ({self.baseline})"


class Actors(Protocol):
    """Objects that keep their state; see ``RunContext.actors``."""

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """``objects[number].method(*arguments[number])``, all at a time; answers by number.

        One whose process died is missing from the answers. It is made anew, without what it
        had learned since it was made.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The data-parallel group of a run; torch.distributed is set up when ``size`` > 1."""

    rank: int = 0
    size: int = 1


class RunContext(Protocol):
    """Circumstances of one run, never identity: the same configuration gives the same
    metrics in any of them.
    """

    @property
    def out(self) -> Path:
        """Where to write; nowhere else. Absolute."""
        ...

    @property
    def artifact(self) -> Path:
        """``out / "artifact"``: the files that ``Recipe.load`` reads."""
        ...

    @property
    def inputs(self) -> Mapping[str, Path]:
        """Artifact folders by kind, as ``Recipe.inputs`` asks, and by key of ``Recipe.bases``."""
        ...

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:0``."""
        ...

    @property
    def workers(self) -> Workers: ...

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint of an earlier, interrupted attempt at this very run."""
        ...

    def report(
        self,
        metrics: Metrics,
        *,
        step: int,
        total: int | None = None,
        checkpoint: Save | None = None,
    ) -> None:
        """Progress of a long run. With several workers all call it equally often.

        Args:
            metrics: since the last report; logged, plotted, and seen by a sweep.
            step: how far; increases from report to report and goes on after a resume.
            total: how far it will go, for the progress bar.
            checkpoint: writes all that is needed to go on from here. It is committed whole
                or not at all. Every worker calls it, so that it may gather; what the first
                one writes is kept.
        """
        ...

    def map(self, function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
        """``[function(item) for item in items]``, on many machines where there are some.

        ``function`` and items must pickle.
        """
        ...

    def actors(
        self, make: Callable[[In], Any], items: Sequence[In]
    ) -> AbstractContextManager[Actors]:
        """``[make(item) for item in items]``, on many machines where there are some.

        What one of them knows leaves it only in answers. ``make``, items, arguments and answers
        must pickle.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Generic[C]):
    """A system is a value, not a subclass."""

    name: str
    summary: str
    """One line, for ``--list``."""
    kind: str
    """Of the artifact it makes, as other recipes' ``inputs`` name it."""
    config: type[C]
    run: Callable[[C, RunContext], Metrics]
    """Writes only under ``context.out``; what ``load`` needs goes to ``context.artifact``."""
    gates: Mapping[str, Gate]
    """By metric, of a run with the default configuration; never "loss went down"."""
    smoke: C
    """Seconds on a CPU."""
    smoke_gates: Mapping[str, Gate] = field(default_factory=dict)
    """What even a smoke run reaches, for a test that can fail."""
    load: Callable[[Path], Predictor] | None = None
    """The artifact folder → something that predicts, with nothing of training in it. A
    module-level function or class: the manifest names it."""
    sample: Sequence[Any] = ()
    """Inputs that the predictor understands: documentation, warm-up and tests."""
    inputs: tuple[str, ...] = ()
    """Kinds of artifact it starts from."""
    bases: tuple[str, ...] = ()
    """Configuration keys (dotted) that name a source of weights, as ``models.sources.fetch``
    takes it. Where one names an artifact of ours, ``context.inputs`` has its folder by this key,
    and it is a parent of what the run makes, as an input is. Beside each are ``sha256`` and
    ``licence``, ``None`` by default: where it names weights of others, they are filled in."""
    parallel: bool = False
    """It divides its work over ``context.workers``: the same metrics with any number of them."""
    space: Mapping[str, Domain] = field(default_factory=dict)
    """Its default sweep: configuration key (dotted when nested) → domain."""
    licence: str = "Apache-2.0"
    """Of what it makes, as its data allow (SPDX); those of all that it starts from are added.
    Empty: it makes nothing of its own."""
    data: str = ""
    """Where the data comes from and under which licence, for the data card."""

    @property
    def loader(self) -> str | None:
        """``load`` as a manifest names it."""
        load: Any = self.load
        return None if load is None else f"{load.__module__}:{load.__qualname__}"

    def failed_gates(self, metrics: Metrics) -> list[str]:
        """One line for each gate that ``metrics`` do not pass; a missing metric fails."""
        lines = []
        for name, gate in self.gates.items():
            value = metrics.get(name, math.nan)
            if not gate.holds(value):
                lines.append(f"{name} is {value:g}, expected {gate}")
        return lines
