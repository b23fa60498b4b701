"""Searchers: draws lie in their domain, a grid is the product, and a restart changes nothing."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from train.recipes.branin import RECIPE as BRANIN
from train.recipes.branin import branin
from train.space import Choice, Domain, Float, Int
from tune.search import (
    Grid,
    Kind,
    Outcome,
    Point,
    Proposal,
    Searcher,
    Space,
    grid_values,
    perturb,
    sample,
    searcher,
)


@st.composite
def floats(draw: st.DrawFn) -> Float:
    log = draw(st.booleans())
    low = draw(st.floats(1e-6, 1e3) if log else st.floats(-1e3, 1e3))
    return Float(low=low, high=low + draw(st.floats(1e-3, 1e3)), log=log)


@st.composite
def ints(draw: st.DrawFn) -> Int:
    log = draw(st.booleans())
    low = draw(st.integers(1 if log else -50, 50))
    return Int(low=low, high=low + draw(st.integers(0, 60)), log=log)


choices = st.lists(st.text(max_size=3) | st.integers(), min_size=1, max_size=5, unique=True).map(
    lambda values: Choice(tuple(values))
)
domains: st.SearchStrategy[Domain] = st.one_of(floats(), ints(), choices)
spaces = st.dictionaries(st.sampled_from("abcd"), domains, min_size=1)


def within(domain: Domain, value: object) -> bool:
    if isinstance(domain, Choice):
        return value in domain.values
    kind = int if isinstance(domain, Int) else float
    return type(value) is kind and domain.low <= value <= domain.high


@given(spaces, st.integers(0, 2**40), st.integers(0, 20))
def test_random_draws_lie_in_the_space_and_depend_on_their_number_alone(
    space: Space, seed: int, number: int
) -> None:
    one, other = (searcher("random", space, mode="max", seed=seed) for _ in range(2))
    drawn = [one.ask() for _ in range(number + 1)]
    for skipped in range(number):
        other.replay(skipped, {}, Outcome(value=1.0))
    assert other.ask() == drawn[-1]
    assert all(within(space[key], value) for p in drawn if p for key, value in p.point.items())


@given(domains, st.randoms(use_true_random=False))
def test_a_perturbed_value_stays_in_its_domain(domain: Domain, draw: random.Random) -> None:
    value = sample(domain, draw)
    for _ in range(5):
        value = perturb(domain, value, draw)
        assert within(domain, value)


def test_integers_of_a_logarithmic_range_come_as_often_as_their_share() -> None:
    draw = random.Random(0)
    domain = Int(low=1, high=8, log=True)
    count = Counter(sample(domain, draw) for _ in range(8000))
    assert sorted(count) == list(range(1, 9))
    shares = {n: math.log((n + 0.5) / (n - 0.5)) / math.log(8.5 / 0.5) for n in range(1, 9)}
    for number, share in shares.items():
        assert count[number] == pytest.approx(8000 * share, rel=0.2)


@given(spaces, st.integers(1, 4))
def test_a_grid_is_exactly_the_product(space: Space, points: int) -> None:
    grid = searcher("grid", space, mode="max", points=points)
    assert isinstance(grid, Grid)
    asked = [proposal.point for proposal in iter(grid.ask, None)]
    axes = [grid_values(domain, points) for domain in space.values()]
    assert asked == [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
    assert len(asked) == len(grid)
    assert len({tuple(point.items()) for point in asked}) == len(asked)
    assert all(within(space[key], value) for point in asked for key, value in point.items())


def test_a_grid_has_the_ends_of_a_range_and_what_lies_between() -> None:
    assert grid_values(Float(low=0, high=1), 3) == [0, 0.5, 1]
    assert grid_values(Float(low=1e-4, high=1, log=True), 3) == pytest.approx([1e-4, 1e-2, 1])
    assert grid_values(Int(low=2, high=4), 9) == [2, 3, 4]
    assert grid_values(Int(low=1, high=64, log=True), 4) == [1, 4, 16, 64]


SPACE: Space = {
    "x": Float(low=-1, high=1),
    "n": Int(low=1, high=9),
    "c": Choice(("a", "b")),
}


def bowl(point: Point) -> float:
    extra = 0.3 if point["c"] == "b" else 0.0
    return float(point["x"]) ** 2 + abs(int(point["n"]) - 4) / 5 + extra


def told(proposal: Proposal) -> Outcome:
    """Finished, stopped, diverged and failed, in turn."""
    value = bowl(proposal.point)
    return [
        Outcome(value=value),
        Outcome(value=value),
        Outcome(value=value, stopped_at=3),
        Outcome(value=None, stopped_at=2),
        Outcome(value=None, failed=True),
    ][proposal.number % 5]


def pursue(one: Searcher, trials: int, late: int = 2) -> list[tuple[Proposal, Outcome | None]]:
    """Each is told when ``late`` more have been asked for, as with trials side by side."""
    course: list[tuple[Proposal, Outcome | None]] = []
    for number in range(trials):
        proposal = one.ask()
        assert proposal is not None
        course.append((proposal, None))
        if number >= late:
            earlier = course[number - late][0]
            course[number - late] = (earlier, told(earlier))
            one.tell(earlier.number, told(earlier))
    return course


@pytest.mark.parametrize(
    ("kind", "trials", "cut"), [("random", 9, 4), ("grid", 9, 4), ("tpe", 24, 17)]
)
def test_a_searcher_that_is_restarted_goes_on_as_if_nothing_had_happened(
    kind: Kind, trials: int, cut: int
) -> None:
    undisturbed = pursue(searcher(kind, SPACE, mode="min", seed=3), trials)
    restarted = searcher(kind, SPACE, mode="min", seed=3)
    late = 2
    for proposal, _ in undisturbed[:cut]:
        outcome = told(proposal) if proposal.number < cut - late else None
        restarted.replay(proposal.number, proposal.point, outcome)
    for number in range(cut, trials):
        assert restarted.ask() == undisturbed[number][0]
        earlier = undisturbed[number - late][0]
        restarted.tell(earlier.number, told(earlier))


@pytest.mark.slow
def test_the_gaussian_process_goes_on_after_a_restart_too() -> None:
    test_a_searcher_that_is_restarted_goes_on_as_if_nothing_had_happened("gp", 16, 13)


def test_a_model_finds_what_chance_does_not() -> None:
    space = {"x": Float(low=-1, high=1), "y": Float(low=-1, high=1)}

    def best(kind: Kind, seed: int) -> float:
        return lowest(
            searcher(kind, space, mode="min", seed=seed),
            lambda point: float(point["x"]) ** 2 + float(point["y"]) ** 2,
        )

    wins = sum(best("tpe", seed) < best("random", seed) for seed in range(7))
    assert wins >= 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_gaussian_process_comes_to_the_bottom_of_branin(seed: int) -> None:
    found = lowest(
        searcher("gp", BRANIN.space, mode="min", seed=seed),
        lambda point: branin(float(point["x"]), float(point["y"])),
    )
    assert BRANIN.gates["branin"].holds(found)


def lowest(one: Searcher, objective: Callable[[Point], float], trials: int = 40) -> float:
    """The least value of so many trials, one after the other."""
    values = []
    for _ in range(trials):
        proposal = one.ask()
        assert proposal is not None
        values.append(objective(proposal.point))
        one.tell(proposal.number, Outcome(value=values[-1]))
    return min(values)


def test_misuse_is_refused() -> None:
    one = searcher("random", SPACE, mode="max")
    with pytest.raises(ValueError, match="never proposed"):
        one.tell(0, Outcome(value=1.0))
    with pytest.raises(ValueError, match="trial 0 comes next"):
        one.replay(1, {}, None)
    with pytest.raises(ConfigError, match="space is empty"):
        searcher("random", {}, mode="max")
