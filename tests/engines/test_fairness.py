"""Fair shares of tokens, against their two theorems."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.engines.fairness import MOST_IDLE, UNIT, FairLine
from deployments.engines.queue import Ticket
from models.contracts import Priority
from tests.engines.spread import Spread

WEIGHTS = {"ada": 1, "bob": 1, "cyd": 2, "dee": 3}
MOST_WAIT = 6
"""Tenants at a time."""
HEAVIEST = max(WEIGHTS.values())
MOST_COST = 9
numbers = itertools.count(1)


def ticket(tenant: str, *, weight: int = 1, cost: int = 1) -> Ticket[None]:
    return Ticket(None, tenant, Priority.LOW, 0.0, 1.0, next(numbers), weight, cost, cost)


def take(line: FairLine[None]) -> str:
    return line.take(line.head().cost).tenant


class FairMachine(RuleBasedStateMachine):
    """Arbitrary arrivals, turns, late charges and leaving."""

    def __init__(self) -> None:
        super().__init__()
        self.line: FairLine[None] = FairLine()
        self.lines: dict[str, list[Ticket[None]]] = {}
        self.taken: list[Ticket[None]] = []
        self.strangers = 0
        self.since_turn: Counter[str] = Counter()
        self.most_a_turn: Counter[str] = Counter()
        """``X`` of the theorem, in tokens."""
        self.had_turn: dict[tuple[str, str], set[str]] = {}
        self.spread: dict[tuple[str, str], Spread] = {}
        self.patience: dict[str, Fraction] = {}
        """Tokens that may go to others before the tenant has its turn."""

    def tag(self, tenant: str) -> Fraction:
        return Fraction(self.line._waiting[tenant].tag, UNIT)

    def _weight(self, tenant: str) -> int:
        return WEIGHTS.get(tenant, 1)

    def _arrive(self, tenant: str, cost: int) -> None:
        new = ticket(tenant, weight=self._weight(tenant), cost=cost)
        fresh = tenant not in self.lines
        self.line.add(new)
        self.lines.setdefault(tenant, []).append(new)
        if fresh:
            self.patience[tenant] = self._bound(tenant)
            for other in self.lines:
                if other != tenant:
                    self.had_turn[self._pair(tenant, other)] = set()

    def _bound(self, tenant: str) -> Fraction:
        tag, clock = self.tag(tenant), Fraction(self.line._clock, UNIT)
        least = min(clock, *map(self.tag, self.lines))
        until_passed = max(tag - clock, Fraction(0)) * MOST_WAIT * HEAVIEST + MOST_COST
        return until_passed + MOST_WAIT * ((tag - least) * HEAVIEST + MOST_COST)

    @staticmethod
    def _pair(one: str, other: str) -> tuple[str, str]:
        return (one, other) if one < other else (other, one)

    def _charged(self, tenant: str, tokens: int) -> None:
        self.since_turn[tenant] += tokens
        self.most_a_turn[tenant] = max(self.most_a_turn[tenant], self.since_turn[tenant])
        for pair, had_turn in self.had_turn.items():
            if tenant not in pair or len(had_turn) < 2:
                continue
            step = Fraction(tokens, self._weight(tenant)) * (1 if pair[0] == tenant else -1)
            bound = sum(Fraction(self.most_a_turn[each], self._weight(each)) for each in pair)
            spread = self.spread.setdefault(pair, Spread()).add(step)
            assert spread <= bound + Fraction(1, 1000), f"{pair}: one was favoured"

    def _left(self, tenant: str) -> None:
        if self.lines[tenant]:
            return
        del self.lines[tenant]
        self.patience.pop(tenant)
        for pairs in (self.had_turn, self.spread):
            for pair in [pair for pair in pairs if tenant in pair]:
                del pairs[pair]

    @rule(tenant=st.sampled_from(sorted(WEIGHTS)), cost=st.integers(1, MOST_COST))
    def arrive(self, tenant: str, cost: int) -> None:
        if tenant in self.lines or len(self.lines) < MOST_WAIT:
            self._arrive(tenant, cost)

    @precondition(lambda self: len(self.lines) < MOST_WAIT)
    @rule(cost=st.integers(1, MOST_COST))
    def a_stranger_arrives(self, cost: int) -> None:
        self.strangers += 1
        self._arrive(f"stranger {self.strangers}", cost)

    @precondition(lambda self: self.lines)
    @rule(count=st.integers(1, 8))
    def turns(self, count: int) -> None:
        for _ in range(min(count, self.line.size)):
            head = self.line.head()
            chosen = self.line.take(head.cost)
            assert chosen is head
            tenant = chosen.tenant
            assert self.lines[tenant].pop(0) is chosen, "not first in, first out"
            self.taken.append(chosen)
            for other in self.lines:
                if other == tenant:
                    continue
                self.patience[other] -= chosen.cost
                assert self.patience[other] >= -Fraction(1, 1000), f"{other} starved"
                self.had_turn[self._pair(tenant, other)].add(tenant)
            self.since_turn[tenant] = 0
            self._charged(tenant, chosen.cost)
            if self.lines[tenant]:
                self.patience[tenant] = self._bound(tenant)
            self._left(tenant)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), tokens=st.integers(1, 20))
    def charge(self, data: st.DataObject, tokens: int) -> None:
        chosen = data.draw(st.sampled_from(self.taken[-8:]))
        self.line.charge(chosen, tokens)
        tenant = chosen.tenant
        if not self.lines:
            return
        self._charged(tenant, tokens)
        if tenant in self.lines:
            more = Fraction(tokens, self._weight(tenant))
            self.patience[tenant] += more * MOST_WAIT * HEAVIEST * 2

    @precondition(lambda self: self.lines)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        tenant = data.draw(st.sampled_from(sorted(self.lines)))
        gone = data.draw(st.sampled_from(self.lines[tenant]))
        self.lines[tenant].remove(gone)
        self.line.drop(gone)
        self._left(tenant)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.line.check_integrity()
        assert self.line.size == sum(map(len, self.lines.values()))
        assert sorted(t.number for t in self.line) == sorted(
            t.number for each in self.lines.values() for t in each
        )

    def teardown(self) -> None:
        told = list(self.line.turns())
        assert [self.line.take(each.cost) for each in told] == told
        assert not self.line.size


FairMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestFairness = FairMachine.TestCase


class LongFairMachine(FairMachine):
    pass


LongFairMachine.TestCase.settings = settings(max_examples=3000, stateful_step_count=100)
TestFairnessLong = pytest.mark.slow(pytest.mark.timeout(1800)(LongFairMachine.TestCase))


def served(line: FairLine[None], tokens: int) -> Counter[str]:
    """Tokens by tenant, of the next ``tokens`` or a few more."""
    result: Counter[str] = Counter()
    while result.total() < tokens:
        cost = line.head().cost
        result[line.take(cost).tenant] += cost
    return result


def test_tokens_are_shared_and_not_requests() -> None:
    line: FairLine[None] = FairLine()
    for _ in range(200):
        line.add(ticket("long", cost=900))
        line.add(ticket("short", cost=30))
    shares = served(line, 10_000)
    assert shares["long"] == pytest.approx(shares["short"], abs=900 + 30)


def test_what_is_charged_later_counts_as_much() -> None:
    line: FairLine[None] = FairLine()
    for _ in range(400):
        line.add(ticket("talker"))
        line.add(ticket("taciturn"))
    turns: Counter[str] = Counter()
    for _ in range(220):
        tenant = line.take(1)
        turns[tenant.tenant] += 1
        if tenant.tenant == "talker":
            line.charge(tenant, 9)
    assert turns["taciturn"] == pytest.approx(10 * turns["talker"], abs=10)


def test_weights_divide_the_tokens() -> None:
    line: FairLine[None] = FairLine()
    for _ in range(500):
        for tenant, weight in WEIGHTS.items():
            line.add(ticket(tenant, weight=weight, cost=7))
    shares = served(line, 7 * 700)
    assert shares == {"ada": 700, "bob": 700, "cyd": 1400, "dee": 2100}


def test_newcomers_without_end_do_not_keep_out_one_who_has_used_much() -> None:
    line: FairLine[None] = FairLine()
    line.add(ticket("owes", cost=50))
    line.add(ticket("first"))
    line.add(ticket("owes"))
    assert take(line) == "owes"

    def turns() -> Iterator[str]:
        for number in range(1000):
            line.add(ticket(f"newcomer {number}"))
            yield take(line)

    waited = [*turns()].index("owes")
    assert waited <= 50 * 3, "(t - v) · W tokens: W is three tenants of weight 1"


def test_a_newcomer_has_no_credit_for_what_it_did_not_use() -> None:
    line: FairLine[None] = FairLine()
    for _ in range(100):
        line.add(ticket("ada"))
        line.add(ticket("bob"))
    for _ in range(20):
        line.charge(line.take(1), 99)
    for _ in range(20):
        line.add(ticket("newcomer", cost=100))
    turns: Counter[str] = Counter()
    for _ in range(12):
        chosen = line.take(line.head().cost)
        turns[chosen.tenant] += 1
        line.charge(chosen, 100 - chosen.cost)
    assert turns["newcomer"] == pytest.approx(4, abs=1)


def test_all_are_even_once_nobody_waits() -> None:
    """Whoever had the machine for itself is not punished for it."""
    line: FairLine[None] = FairLine()
    line.add(ticket("night"))
    alone = line.take(1)
    line.charge(alone, 1_000_000)  # nobody waits
    line.add(ticket("other"))
    line.charge(alone, 1_000_000)  # somebody does
    assert take(line) == "other"
    line.add(ticket("night"))
    line.add(ticket("day"))
    assert [take(line), take(line)] == ["night", "day"]


def test_no_more_tenants_are_remembered_than_is_sensible() -> None:
    line: FairLine[None] = FairLine()
    line.add(ticket("waits", cost=1))
    for number in range(3 * MOST_IDLE):
        line.charge(ticket(f"tenant {number}"), 1000)
        assert len(line._idle) <= MOST_IDLE
    line.check_integrity()
