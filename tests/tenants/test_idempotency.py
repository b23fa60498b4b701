"""One suite for both databases: one owner at a time, and a finished answer stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from deployments.tenants import idempotency as module
from deployments.tenants.idempotency import (
    LEASE_S,
    Answer,
    Busy,
    IdempotencyRecords,
    Lease,
    Record,
    judge,
)
from models.errors import Conflict
from state import tables
from state.database import Database
from state.errors import StateUnavailable
from state.places import sqlite_url
from tests.databases import database_url, postgres, postgres_url

__all__ = ["database_url", "postgres", "postgres_url"]

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
TTL_S = 3600.0
A, B = "a" * 64, "b" * 64
"""Fingerprints."""
ANSWER = Answer(status=201, headers=[("content-type", "text/plain"), ("x", "é")], body=b"\x00hi")


class Clock:
    """Unix seconds that stand still until somebody moves them."""

    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with await Database.open(database_url) as opened:
        yield opened


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy is no database that is down."""
    monkeypatch.setattr(module, "PATIENCE_S", 30.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(database: Database, clock: Clock) -> IdempotencyRecords:
    return IdempotencyRecords(database, ttl_s=TTL_S, now=clock)


async def rows(database: Database) -> int:
    async with database.read() as connection:
        count = sa.select(sa.func.count()).select_from(tables.idempotency)
        return int(await connection.scalar(count) or 0)


async def began(records: IdempotencyRecords, key: str = "k", tenant: str = "acme") -> Lease:
    lease = await records.begin(tenant, key, A)
    assert isinstance(lease, Lease)
    return lease


# What is decided


def test_what_nobody_has_may_begin() -> None:
    assert judge(None, "k", A, NOW) is None


def test_what_is_at_work_is_waited_for_until_its_lease_ends() -> None:
    record = Record(fingerprint=A, until=NOW + timedelta(seconds=1))
    assert judge(record, "k", A, NOW) == Busy(record.until)
    assert judge(record, "k", A, record.until) is None


def test_what_is_done_is_told_until_its_time_is_over() -> None:
    record = Record(fingerprint=A, until=NOW + timedelta(1), finished=NOW, answer=ANSWER)
    assert judge(record, "k", A, NOW) is ANSWER
    assert judge(record, "k", A, record.until) is None


@pytest.mark.parametrize("finished", [None, NOW])
def test_a_key_means_one_request(finished: datetime | None) -> None:
    record = Record(fingerprint=A, until=NOW + timedelta(1), finished=finished, answer=ANSWER)
    with pytest.raises(Conflict, match="'k' came with another request") as refusal:
        judge(record, "k", B, NOW)
    assert refusal.value.param == "Idempotency-Key"
    assert judge(record, "k", B, record.until) is None


def test_an_answer_that_was_not_written_down_is_not_given_twice() -> None:
    record = Record(fingerprint=A, until=NOW + timedelta(1), finished=NOW)
    with pytest.raises(Conflict, match="done at 2026-11-24 12:00:00 UTC"):
        judge(record, "k", A, NOW)


# What is kept


async def test_an_answer_comes_back_as_it_was(records: IdempotencyRecords) -> None:
    lease = await began(records)
    assert await records.begin("acme", "k", A) == Busy(NOW + timedelta(seconds=LEASE_S))
    assert await records.finish(lease, ANSWER)
    for found in (await records.begin("acme", "k", A), await records.look("acme", "k", A)):
        assert found == ANSWER
    with pytest.raises(Conflict):
        await records.begin("acme", "k", B)


async def test_that_there_was_an_answer(records: IdempotencyRecords) -> None:
    assert await records.finish(await began(records), None)
    with pytest.raises(Conflict, match="secret"):
        await records.begin("acme", "k", A)


async def test_looking_does_not_begin(records: IdempotencyRecords, database: Database) -> None:
    assert await records.look("acme", "k", A) is None
    assert await rows(database) == 0


async def test_what_is_released_begins_anew_for_any_request(records: IdempotencyRecords) -> None:
    lease = await began(records)
    assert await records.release(lease)
    assert not await records.release(lease)
    assert isinstance(await records.begin("acme", "k", B), Lease)


async def test_tenants_share_nothing(records: IdempotencyRecords) -> None:
    assert await records.finish(await began(records), ANSWER)
    assert await records.look("other", "k", A) is None
    assert isinstance(await records.begin("other", "k", B), Lease)
    assert await records.look("acme", "k", A) == ANSWER


async def test_a_crash_locks_a_key_for_no_longer_than_its_lease(
    records: IdempotencyRecords, clock: Clock
) -> None:
    crashed = await began(records)
    clock.now += LEASE_S - 1
    assert isinstance(await records.begin("acme", "k", A), Busy)
    clock.now += 1
    successor = await began(records)
    assert not await records.renew(crashed)
    assert not await records.finish(crashed, ANSWER)
    assert not await records.release(crashed)
    assert isinstance(await records.look("acme", "k", A), Busy)
    assert await records.finish(successor, ANSWER)


async def test_a_lease_that_is_renewed_goes_on(records: IdempotencyRecords, clock: Clock) -> None:
    lease = await began(records)
    for _ in range(3):
        clock.now += LEASE_S - 1
        assert await records.renew(lease)
        assert isinstance(await records.begin("acme", "k", A), Busy)
    assert await records.finish(lease, ANSWER)
    assert not await records.renew(lease), "or the answer would be gone with the lease"
    assert not await records.release(lease), "nor is a finished answer taken back"
    assert await records.finish(lease, ANSWER), "written again, as its first time was in doubt"
    clock.now += TTL_S - 1
    assert await records.look("acme", "k", A) == ANSWER


async def test_late_but_not_too_late(records: IdempotencyRecords, clock: Clock) -> None:
    lease = await began(records)
    clock.now += 10 * LEASE_S
    assert await records.finish(lease, ANSWER), "nobody else began in the meantime"
    assert await records.look("acme", "k", A) == ANSWER


async def test_what_has_expired_is_forgotten(
    records: IdempotencyRecords, database: Database, clock: Clock
) -> None:
    await records.finish(await began(records, "done"), ANSWER)
    clock.now += TTL_S - LEASE_S
    await began(records, "crashed")
    assert await records.forget_expired() == 0
    clock.now += LEASE_S
    await began(records, "at work")
    assert await records.forget_expired() == 2
    assert await rows(database) == 1
    assert isinstance(await records.look("acme", "at work", A), Busy)


async def test_of_a_crowd_one_begins(database: Database, database_url: str, clock: Clock) -> None:
    async with await Database.open(database_url) as other:
        stores = [IdempotencyRecords(each, ttl_s=TTL_S, now=clock) for each in (database, other)]
        for _ in range(3):
            found = await asyncio.gather(*(each.begin("acme", "k", A) for each in stores * 4))
            leases = [each for each in found if isinstance(each, Lease)]
            assert len(leases) == 1
            assert len([each for each in found if isinstance(each, Busy)]) == 7
            clock.now += LEASE_S


# A database that does not answer


async def test_a_lease_that_comes_too_late_is_given_back(
    tmp_path: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = sqlite_url(tmp_path / "frontier.db")
    async with await Database.open(url) as database, await Database.open(url) as other:
        records = IdempotencyRecords(database, ttl_s=TTL_S, now=clock)
        async with other.write():
            with monkeypatch.context() as patched:
                patched.setattr(module, "PATIENCE_S", 0.05)
                with pytest.raises(StateUnavailable, match="did not answer"):
                    await records.begin("acme", "k", A)
            waiting = asyncio.create_task(records.begin("acme", "cancelled", A))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        while records._tasks:
            await asyncio.wait(set(records._tasks))
        assert await rows(database) == 0


# Any order of calls

KEYS = st.sampled_from(["one", "two"])


class Machine(RuleBasedStateMachine):
    """Beside the store a model of it in a dictionary: owner, fingerprint, end, answer of a key."""

    leases = Bundle("leases")
    """All that were ever given, of those that crashed, too."""
    tenants = 0

    def __init__(self, runner: asyncio.Runner, database: Database) -> None:
        super().__init__()
        self.runner = runner
        self.clock = Clock()
        self.records = IdempotencyRecords(database, ttl_s=TTL_S, now=self.clock)
        Machine.tenants += 1
        self.tenant = f"tenant-{Machine.tenants}"  # a new, empty store for each example
        self.model: dict[str, tuple[Lease, str, float, Answer | None]] = {}
        self.answers = 0

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def alive(self, key: str) -> tuple[Lease, str, float, Answer | None] | None:
        found = self.model.get(key)
        return found if found is not None and self.clock.now < found[2] else None

    @rule(target=leases, key=KEYS, fingerprint=st.sampled_from([A, B]))
    def begin(self, key: str, fingerprint: str) -> Any:
        held = self.alive(key)
        try:
            found = self.run(self.records.begin(self.tenant, key, fingerprint))
        except Conflict:
            assert held is not None
            assert held[1] != fingerprint
            return multiple()
        if not isinstance(found, Lease):
            assert held is not None
            assert held[1] == fingerprint
            assert found == (held[3] or Busy(datetime.fromtimestamp(held[2], UTC)))
            return multiple()
        assert held is None, "two owners at a time, or a finished answer was lost"
        self.model[key] = (found, fingerprint, self.clock.now + LEASE_S, None)
        return found

    def owns(self, lease: Lease) -> bool:
        """Whoever began last does, whether the lease has ended or not."""
        found = self.model.get(lease.key)
        return found is not None and found[0] == lease

    @rule(lease=leases)
    def finish(self, lease: Lease) -> None:
        self.answers += 1
        answer = Answer(status=200, headers=[], body=b"%d" % self.answers)
        assert self.run(self.records.finish(lease, answer)) == self.owns(lease)
        if self.owns(lease):
            fingerprint = self.model[lease.key][1]
            self.model[lease.key] = (lease, fingerprint, self.clock.now + TTL_S, answer)

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        running = self.owns(lease) and self.model[lease.key][3] is None
        assert self.run(self.records.renew(lease)) == running
        if running:
            self.model[lease.key] = (
                lease,
                self.model[lease.key][1],
                self.clock.now + LEASE_S,
                None,
            )

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        running = self.owns(lease) and self.model[lease.key][3] is None
        assert self.run(self.records.release(lease)) == running
        if running:
            del self.model[lease.key]

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S, TTL_S - LEASE_S, TTL_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def forget(self) -> None:
        self.run(self.records.forget_expired())
        self.model = {key: held for key, held in self.model.items() if self.alive(key)}

    @invariant()
    def a_finished_answer_is_there(self) -> None:
        for key in self.model:
            held = self.alive(key)
            if held is not None and held[3] is not None:
                assert self.run(self.records.look(self.tenant, key, held[1])) == held[3]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.mark.parametrize(
    ("examples", "steps"), [(12, 30), pytest.param(150, 60, marks=pytest.mark.slow)]
)
def test_any_order_of_calls(
    runner: asyncio.Runner, database_url: str, examples: int, steps: int
) -> None:
    database = runner.run(Database.open(database_url))
    try:
        run_state_machine_as_test(
            lambda: Machine(runner, database),  # type: ignore[arg-type]  # it takes any maker
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        runner.run(database.close())
