"""What a person may hang into the loop: three moments, each told as a frozen event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.recipes.llm.names import find


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd:
    step: int
    """Steps done."""
    total: int
    loss: float
    """Mean over the targets of the step's batch, of all workers."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    """Of the step's batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochEnd:
    epoch: int
    """Whole epochs done."""
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalEnd:
    step: int
    metrics: Mapping[str, float]
    best: bool
    """Better than every evaluation before."""


class Callback:
    """Called on every worker. Raising ends the run."""

    def on_step(self, event: StepEnd) -> None:
        """After each step of the optimiser."""

    def on_epoch_end(self, event: EpochEnd) -> None:
        """After the step in which the last row of an epoch was seen."""

    def on_eval_end(self, event: EvalEnd) -> None:
        """After each evaluation, that before the first step included."""


def load(names: Sequence[str]) -> list[Callback]:
    """Objects or classes by dotted name; classes are called without arguments."""
    callbacks: list[Callback] = []
    for name in names:
        found: type[Callback] | Callback = find(name, "training.callbacks")
        callbacks.append(found() if isinstance(found, type) else found)
    return callbacks
