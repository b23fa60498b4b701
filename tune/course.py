"""The course of a sweep: which trial is next, and what follows from what trials tell.

Plain Python: Ray Tune calls it, and a test does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.folder import RunFolder
from train.recipe import Recipe
from tune.config import Sweep, make_searcher
from tune.journal import Journal, Report, Status, Trial
from tune.search import Point

FINAL, ERROR, REPORT = "final", "error", "report"
"""Keys of what a trial tells: how it ended, why it broke, or how far it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a trial is to do."""

    number: int
    point: Point
    turn: int = 0
    """0, or which replacement of population based training made the point."""

    def config(self) -> dict[str, Any]:
        """In the form that Ray Tune carries."""
        return {"number": self.number, "point": dict(self.point), "turn": self.turn}

    def folder(self, sweep: Path) -> RunFolder:
        """Where it runs: other values are another run."""
        name = f"{self.number:04d}" + (f"-{self.turn}" if self.turn else "")
        return RunFolder(sweep / "trials" / name)


class Course:
    """A sweep under way. Goes on with what ``journal`` holds.

    Args:
        watch: called after everything that happens.
    """

    def __init__(
        self,
        recipe: Recipe[Any],
        sweep: Sweep,
        journal: Journal,
        watch: Callable[[Course], None] = lambda course: None,
    ) -> None:
        assert sweep.trials is not None
        self.sweep = sweep
        self.journal = journal
        self.goal = sweep.trials
        """How many trials there will be; a grid may end before."""
        self._watch = watch
        self._searcher = make_searcher(recipe, sweep)
        for trial in journal.trials:
            outcome = trial.outcome(sweep.metric) if trial.status.over else None
            self._searcher.replay(trial.number, trial.first_point, outcome)
        self._interrupted = deque(trial.number for trial in journal.interrupted)
        self._out: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """Ray Tune pickles all that it is given, for snapshots that nobody reads."""
        return str, ("a sweep under way",)

    @property
    def trials(self) -> list[Trial]:
        return self.journal.trials

    @property
    def all_assigned(self) -> bool:
        return not self._interrupted and len(self.trials) >= self.goal

    @property
    def out_of_time(self) -> bool:
        budget = self.sweep.time_budget_s
        return budget is not None and self.journal.now() >= budget

    def assign(self, *, limit: int | None) -> Assignment | None:
        """The next trial; first those that an earlier session has begun.

        Args:
            limit: how many may be under way at a time.

        Returns:
            ``None`` when nothing is to be begun now: see ``all_assigned``.
        """
        if limit is not None and len(self._out) >= limit:
            return None
        if self._interrupted:
            trial = self.trials[self._interrupted.popleft()]
            self._out.add(trial.number)
            return Assignment(number=trial.number, point=trial.point, turn=trial.turn)
        if self.all_assigned:
            return None
        proposal = self._searcher.ask()
        if proposal is None:  # a grid that is at its end
            self.goal = len(self.trials)
            return None
        self.journal.proposed(proposal.number, proposal.point)
        self._out.add(proposal.number)
        return Assignment(number=proposal.number, point=proposal.point)

    def started(self, number: int) -> None:
        self.journal.started(number)
        self._watch(self)

    def told(self, assignment: Assignment, result: Mapping[str, Any]) -> None:
        """A trial told something about itself."""
        number = assignment.number
        if assignment.turn != self.trials[number].turn:
            self.journal.changed(number, assignment.point, assignment.turn)
        if (error := result.get(ERROR)) is not None:
            self._end(number, Status.FAILED, error=error)
        elif (final := result.get(FINAL)) is not None:
            self._end(number, Status.FINISHED, final=final)
        elif (report := result.get(REPORT)) is not None:
            self.journal.reported(number, Report(**report))
        self._watch(self)

    def completed(self, number: int) -> None:
        """Nothing more comes from a trial; it was stopped, unless it had told its end."""
        if not self.trials[number].status.over:
            self._end(number, Status.STOPPED)
            self._watch(self)

    def lost(self, number: int, error: str | None) -> None:
        """A trial's process died.

        Args:
            error: why it is given up; ``None``: it is started again.
        """
        if self.trials[number].status.over:
            return
        if error is None:
            self.journal.interrupt(number)
        else:
            self._end(number, Status.FAILED, error=error)
        self._watch(self)

    def suspend(self) -> None:
        """Nothing runs any more; what has not ended can be gone on with."""
        for trial in self.trials:
            if trial.status is Status.RUNNING:
                self.journal.interrupt(trial.number)

    def check_integrity(self) -> None:
        """Assert every invariant; for tests and post-mortems."""
        self.journal.check_integrity()
        assert all(not self.trials[number].status.over for number in self._out)
        assert not self._out & set(self._interrupted)
        waiting = {trial.number for trial in self.trials if not trial.status.over}
        assert waiting == self._out | set(self._interrupted), "a trial is with nobody"

    def _end(
        self,
        number: int,
        status: Status,
        *,
        final: Mapping[str, float] | None = None,
        error: str = "",
    ) -> None:
        self.journal.ended(number, status, final=final, error=error)
        self._out.discard(number)
        self._searcher.tell(number, self.trials[number].outcome(self.sweep.metric))
