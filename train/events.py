"""What happens to a run, as facts. Whoever keeps, shows or forwards it subscribes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A driver begins a run, or goes on with one that was interrupted."""

    run: str
    """The run's id, also the name of its folder."""
    recipe: str
    out: Path
    config: Mapping[str, Any]
    """As resolved."""
    resumed_from: int = 0
    """The step of the checkpoint it goes on from; 0: the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """``context.report`` was called by the first worker."""

    step: int
    metrics: Mapping[str, float]
    time: float
    """Seconds since the epoch."""
    total: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """Nothing follows. ``status``: ``passed``, ``gates failed`` or ``failed``."""

    status: str
    metrics: Mapping[str, float]
    """What the run ended with; empty if it failed."""
    seconds: float
    """Of this driver."""


Event: TypeAlias = RunStarted | Reported | RunEnded
Subscriber: TypeAlias = Callable[[Event], None]
