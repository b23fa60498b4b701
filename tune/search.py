"""Which point of a space to try next: ask, run it, tell. No Ray, no clock, no files.

A searcher is a function of its seed and of what it was told: what it proposes after n
trials is the same in a process that has run them all and in one that was given them with
``replay``. So a sweep that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from models.errors import ConfigError
from train.space import Choice, Domain, Float, Int

if TYPE_CHECKING:
    import optuna

Value: TypeAlias = bool | int | float | str
Point: TypeAlias = Mapping[str, Value]
"""Configuration key (dotted when nested) → value."""
Space: TypeAlias = Mapping[str, Domain]
Mode: TypeAlias = Literal["min", "max"]
Kind: TypeAlias = Literal["random", "grid", "tpe", "gp"]


@dataclass(frozen=True, slots=True)
class Proposal:
    number: int
    """Counts them from 0."""
    point: Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a trial."""

    value: float | None
    """The last that was measured; ``None``: nothing, or nothing finite."""
    stopped_at: int | None = None
    """The step at which a scheduler gave up on it; ``None``: it ran to its end."""
    failed: bool = False
    """It broke for a reason that may not lie in the point."""


class Searcher(ABC):
    """Proposes points and learns from their outcomes; one thread at a time.

    Args:
        mode: whether large or small values are good.
    """

    def __init__(self, space: Space, *, mode: Mode, seed: int) -> None:
        if not space:
            raise ConfigError("There is nothing to search: the space is empty.")
        self.space = dict(space)
        self.mode = mode
        self.seed = seed
        self._asked = 0

    def ask(self) -> Proposal | None:
        """The next one to try; ``None`` when the space is exhausted."""
        point = self._propose(self._asked)
        if point is None:
            return None
        self._asked += 1
        return Proposal(self._asked - 1, point)

    def tell(self, number: int, outcome: Outcome) -> None:
        """What became of trial ``number``; once each, in any order."""
        if not 0 <= number < self._asked:
            raise ValueError(f"trial {number} was never proposed")
        self._learn(number, outcome)

    def replay(self, number: int, point: Point, outcome: Outcome | None) -> None:
        """Take over a trial of an earlier process, in the order in which they were proposed.

        Args:
            outcome: ``None`` while it runs.
        """
        if number != self._asked:
            raise ValueError(f"trial {self._asked} comes next, not {number}")
        self._remember(point)
        self._asked += 1
        if outcome is not None:
            self._learn(number, outcome)

    @abstractmethod
    def _propose(self, number: int) -> Point | None: ...

    def _remember(self, point: Point) -> None:  # noqa: B027 (most have no memory)
        """``point`` was proposed by an earlier process."""

    def _learn(self, number: int, outcome: Outcome) -> None:  # noqa: B027 (most learn nothing)
        """By default nothing: each proposal is independent of all others."""


class Random(Searcher):
    """Independent draws; the n-th is a function of seed and n (Bergstra & Bengio 2012)."""

    def _propose(self, number: int) -> Point:
        draw = random.Random(f"{self.seed}/{number}")
        return {key: sample(domain, draw) for key, domain in self.space.items()}


class Grid(Searcher):
    """Every combination once, in a fixed order; the last key changes fastest.

    Args:
        points: values taken from a range: ends included, evenly spaced (in the logarithm
            where the range says so). A range of fewer integers gives them all.
    """

    def __init__(self, space: Space, *, mode: Mode, seed: int, points: int) -> None:
        super().__init__(space, mode=mode, seed=seed)
        self._axes = {key: grid_values(domain, points) for key, domain in self.space.items()}

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self._axes.values())

    def _propose(self, number: int) -> Point | None:
        if number >= len(self):
            return None
        values: list[Value] = []
        for axis in reversed(self._axes.values()):
            number, place = divmod(number, len(axis))
            values.append(axis[place])
        return dict(zip(self._axes, reversed(values), strict=True))


class Model(Searcher):
    """Optuna proposes, from a model of what it was told.

    Each proposal has a generator of its own, seeded by ``seed`` and the number of the
    trial, since Optuna's samplers would begin again with their first draws after a restart.

    Args:
        sampler: makes Optuna's sampler from a seed.
        learns_from_stopped: whether that sampler understands trials that were stopped
            early; else they are told as if they had ended with their last value.
    """

    def __init__(
        self,
        space: Space,
        *,
        mode: Mode,
        seed: int,
        sampler: Callable[[int], optuna.samplers.BaseSampler],
        learns_from_stopped: bool,
    ) -> None:
        super().__init__(space, mode=mode, seed=seed)
        optuna = import_optuna()
        self._sampler = sampler
        self._learns_from_stopped = learns_from_stopped
        self._distributions = {key: distribution(domain) for key, domain in space.items()}
        self._blind = optuna.samplers.RandomSampler(seed=0)
        direction = "maximize" if mode == "max" else "minimize"
        self._study = optuna.create_study(direction=direction, sampler=self._blind)
        self._trials: dict[int, Any] = {}
        self._worst: float | None = None

    def _propose(self, number: int) -> Point:
        self._study.sampler = self._sampler(random.Random(f"{self.seed}/{number}").getrandbits(32))
        return self._next_of_study()

    def _remember(self, point: Point) -> None:
        self._study.sampler = self._blind  # the point is known: nothing is to be modelled
        self._study.enqueue_trial(dict(point))
        self._next_of_study()

    def _next_of_study(self) -> Point:
        trial = self._study.ask(self._distributions)
        assert trial.number == self._asked
        self._trials[trial.number] = trial
        return dict(trial.params)

    def _learn(self, number: int, outcome: Outcome) -> None:
        states = import_optuna().trial.TrialState
        trial = self._trials.pop(number)
        value = outcome.value
        if outcome.failed:
            self._study.tell(trial, state=states.FAIL)
            return
        if value is not None and (outcome.stopped_at is None or not self._learns_from_stopped):
            self._study.tell(trial, value)
        elif self._learns_from_stopped:
            # Without a value it ranks behind all that have one.
            if value is not None and outcome.stopped_at is not None:
                trial.report(value, outcome.stopped_at)
            self._study.tell(trial, state=states.PRUNED)
        elif self._worst is not None:
            self._study.tell(trial, self._worst)
        else:
            self._study.tell(trial, state=states.FAIL)
        if value is not None:
            worse = min if self.mode == "max" else max
            self._worst = value if self._worst is None else worse(self._worst, value)


def searcher(kind: Kind, space: Space, *, mode: Mode, seed: int = 0, points: int = 5) -> Searcher:
    """A searcher by name.

    Args:
        kind: ``random``; ``grid``; ``tpe``, Optuna's tree-structured Parzen estimator: any
            space, hundreds of trials; ``gp``, its Gaussian process with logEI: few, costly
            trials.
        points: of a grid, values taken from a range.

    Raises:
        ConfigError: Optuna is needed and missing, or the space is empty.
    """
    match kind:
        case "random":
            return Random(space, mode=mode, seed=seed)
        case "grid":
            return Grid(space, mode=mode, seed=seed, points=points)
        case "tpe" | "gp":
            samplers = import_optuna().samplers
            sampler = samplers.TPESampler if kind == "tpe" else samplers.GPSampler
            return Model(
                space,
                mode=mode,
                seed=seed,
                sampler=lambda seed: sampler(seed=seed),
                learns_from_stopped=kind == "tpe",
            )


def better(value: float, than: float, mode: Mode) -> bool:
    return value > than if mode == "max" else value < than


def sample(domain: Domain, draw: random.Random) -> Value:
    """One value, uniform in the domain or in its logarithm."""
    match domain:
        case Choice(values):
            return draw.choice(list(values))
        case Int(low=low, high=high, log=False):
            return draw.randint(low, high)
        case Int(low=low, high=high):
            # Each integer has the share of the logarithm between its neighbours' midpoints.
            exponent = draw.uniform(math.log(low - 0.5), math.log(high + 0.5))
            return min(max(round(math.exp(exponent)), low), high)
        case Float(low=low, high=high, log=True):
            return min(max(math.exp(draw.uniform(math.log(low), math.log(high))), low), high)
        case Float(low=low, high=high):
            return min(max(draw.uniform(low, high), low), high)


def perturb(domain: Domain, value: Value, draw: random.Random) -> Value:
    """A neighbour of ``value`` that is still in the domain: an eighth of the range away at
    most, or the next choice. One draw in four is a fresh sample (Jaderberg et al. 2017).
    """
    if draw.random() < 0.25:
        return sample(domain, draw)
    if isinstance(domain, Choice):
        values = list(domain.values)
        place = values.index(value) + draw.choice((-1, 1))
        return values[min(max(place, 0), len(values) - 1)]
    assert isinstance(value, int | float)
    low, high = float(domain.low), float(domain.high)
    if domain.log:
        width = math.log(high / low) / 8
        moved = value * math.exp(draw.uniform(-width, width))
    else:
        width = (high - low) / 8
        moved = value + draw.uniform(-width, width)
    moved = min(max(moved, low), high)
    return round(moved) if isinstance(domain, Int) else moved


def grid_values(domain: Domain, points: int) -> list[Value]:
    """What a grid takes from a domain, without repetition, in order."""
    if isinstance(domain, Choice):
        return list(dict.fromkeys(domain.values))
    low, high = domain.low, domain.high
    if isinstance(domain, Int) and high - low < points:
        return list(range(int(low), int(high) + 1))
    if points == 1 or low == high:
        return [low]
    shares = [step / (points - 1) for step in range(points)]
    if domain.log:
        between = [low * (high / low) ** share for share in shares[1:-1]]
    else:
        between = [low + (high - low) * share for share in shares[1:-1]]
    values: Sequence[float] = [low, *between, high]
    return list(dict.fromkeys(round(v) if isinstance(domain, Int) else v for v in values))


def distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    """A domain in Optuna's words."""
    distributions = import_optuna().distributions
    found: optuna.distributions.BaseDistribution
    match domain:
        case Float(low=low, high=high, log=log):
            found = distributions.FloatDistribution(low, high, log=log)
        case Int(low=low, high=high, log=log):
            found = distributions.IntDistribution(low, high, log=log)
        case Choice(values):
            found = distributions.CategoricalDistribution(list(values))
    return found


def import_optuna() -> Any:
    """The module, with its announcements of every trial switched off.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "Searching with a model needs Optuna: pip install 'frontier-run[tune]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
