"""The circumstances of one run, as a recipe sees them. Knows neither Ray nor files of a run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from train.events import Reported
from train.recipe import Actors, In, Metrics, Out, Save, Workers

OnReport = Callable[[Reported, Save | None], None]


class FanOut(Protocol):
    def __call__(self, function: Callable[[In], Out], items: Sequence[In], /) -> list[Out]: ...


class Enlist(Protocol):
    def __call__(
        self, make: Callable[[In], Any], items: Sequence[In], /
    ) -> AbstractContextManager[Actors]: ...


def serially(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    return [function(item) for item in items]


@dataclass(frozen=True, slots=True)
class Here:
    """Actors that are objects of this process."""

    objects: Sequence[Any]

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """See :class:`train.recipe.Actors`."""
        return {n: getattr(self.objects[n], method)(*given) for n, given in arguments.items()}


@contextmanager
def kept_here(make: Callable[[In], Any], items: Sequence[In]) -> Iterator[Actors]:
    yield Here([make(item) for item in items])


def rehearse(report: Reported, save: Save | None) -> None:
    """Save as every worker must, so that it may gather, and keep nothing of it."""
    if save is not None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))


ALONE = Workers()


@dataclass(frozen=True, kw_only=True)
class Context:
    """A :class:`train.recipe.RunContext`. ``Context(out=folder)`` is all that a test needs."""

    out: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    device: str = "cpu"
    workers: Workers = ALONE
    checkpoint: Path | None = None
    on_report: OnReport = rehearse
    fan_out: FanOut = serially
    enlist: Enlist = kept_here
    _last: list[int] = field(default_factory=lambda: [-1], repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out.absolute())
        self.artifact.mkdir(parents=True, exist_ok=True)

    @property
    def artifact(self) -> Path:
        return self.out / "artifact"

    def report(
        self,
        metrics: Metrics,
        *,
        step: int,
        total: int | None = None,
        checkpoint: Save | None = None,
    ) -> None:
        """See :class:`train.recipe.RunContext`."""
        if step <= self._last[0]:
            raise ValueError(f"report: step is {step}, expected more than {self._last[0]}")
        self._last[0] = step
        now = round(time.time(), 3)
        numbers = {name: float(value) for name, value in metrics.items()}
        self.on_report(Reported(step=step, metrics=numbers, time=now, total=total), checkpoint)

    def map(self, function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
        """See :class:`train.recipe.RunContext`."""
        return self.fan_out(function, items)

    def actors(
        self, make: Callable[[In], Any], items: Sequence[In]
    ) -> AbstractContextManager[Actors]:
        """See :class:`train.recipe.RunContext`."""
        return self.enlist(make, items)


def local_device() -> str:
    """``cuda:0`` if this process has a GPU. Machines without a driver need no torch to know."""
    if not Path("/proc/driver/nvidia").exists():
        return "cpu"
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"
