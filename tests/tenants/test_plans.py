"""Which limits a plan and a tenant's own make, in the numbers of the specification (C2)."""

from __future__ import annotations

import pytest

from deployments.config import PLANS
from deployments.tenants.plans import MICRO, LimitName, limits
from state.counters import Strategy

SPECIFIED = {
    "free": (60, 1_000, 10_000, 50_000, 1_000_000),
    "pro": (600, 50_000, 500_000, 500_000, 10_000_000),
    "enterprise": (6_000, 500_000, 10_000_000, 5_000_000, 100_000_000),
}
"""Requests a minute, hour and day, tokens a minute and day."""
NAMES = (
    LimitName.REQUESTS_PER_MINUTE,
    LimitName.REQUESTS_PER_HOUR,
    LimitName.REQUESTS_PER_DAY,
    LimitName.TOKENS_PER_MINUTE,
    LimitName.TOKENS_PER_DAY,
)


def test_the_plans_are_those_of_the_specification() -> None:
    assert PLANS.keys() == SPECIFIED.keys()
    for name, plan in PLANS.items():
        found = limits(plan.limits, (), Strategy.SLIDING_WINDOW)
        assert found.keys() == set(NAMES), name
        assert tuple(found[each].amount for each in NAMES) == SPECIFIED[name]


@pytest.mark.parametrize(
    "strategy", [Strategy.FIXED_WINDOW, Strategy.SLIDING_WINDOW, Strategy.TOKEN_BUCKET]
)
def test_the_strategy_is_that_of_windows_alone(strategy: Strategy) -> None:
    overrides = (("concurrent_requests", 3.0), ("budget_per_month", 0.25))
    found = limits(PLANS["free"].limits, overrides, strategy)
    assert {found[name].strategy for name in NAMES} == {strategy}
    assert [found[name].window_ms // 60_000 for name in NAMES] == [1, 60, 1440, 1, 1440]
    running, budget = found[LimitName.CONCURRENT_REQUESTS], found[LimitName.BUDGET_PER_MONTH]
    assert (running.strategy, running.amount) == (Strategy.CONCURRENT, 3)
    assert (budget.strategy, budget.window_ms) == (Strategy.FIXED_WINDOW, 0), "a calendar month"
    assert budget.amount == MICRO // 4


def test_what_a_tenant_has_of_its_own_counts() -> None:
    overrides = (("tokens_per_day", 5.0), ("requests_per_hour", None), ("requests_per_day", 0.0))
    found = limits(PLANS["free"].limits, overrides, Strategy.FIXED_WINDOW)
    assert found[LimitName.TOKENS_PER_DAY].amount == 5
    assert LimitName.REQUESTS_PER_HOUR not in found, "null: no limit"
    assert found[LimitName.REQUESTS_PER_DAY].amount == 0, "nothing is not no limit"
    assert found[LimitName.REQUESTS_PER_MINUTE].amount == 60
