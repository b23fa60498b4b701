"""What was used, written once and summed, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.caching.reuse import Outcome
from deployments.gateway.exchange import Exchange
from deployments.observability.events import RequestFinished, RequestShed
from deployments.observability.logs import on_behalf_of
from deployments.tenants import ledger as module
from deployments.tenants.directory import Directory
from deployments.tenants.ledger import By, Ledger, place, report, row
from models.contracts import Priority, Timings, Usage, Versions
from state import tables
from state.database import Database
from state.errors import StateUnavailable
from tests.log_lines import LogLines

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
TIMINGS = Timings(queue_s=0.01, prefill_s=0.02, ttft_s=0.03, decode_s=0.5, total_s=0.53)


def event(tenant: str = "acme", model: str | None = "m", tokens: int = 10) -> RequestFinished:
    return RequestFinished(
        request_id="r",
        route="/v1/chat/completions",
        method="POST",
        status=200,
        code=None,
        duration_s=1,
        model=model,
        tenant=tenant,
        subject="key:1",
        usage=Usage(prompt_tokens=tokens, completion_tokens=2 * tokens, cached_tokens=1),
        timings=TIMINGS,
        cost=7 * tokens,
    )


class Time:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def ledger(directory: Directory, time: Time, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setattr(module, "FLUSH_S", 0.01)
    return Ledger(directory.database, now=time, clock=time)


async def written(ledger: Ledger) -> None:
    while ledger._writing is not None and not ledger._writing.done():
        await asyncio.wait([ledger._writing])


async def rows(database: Database) -> list[dict[str, object]]:
    async with database.read() as c:
        return [dict(each._mapping) for each in await c.execute(sa.select(tables.usage))]


async def test_a_request_is_one_row(ledger: Ledger) -> None:
    ledger(replace(event(), versions=Versions(model="m@3", adapter="poet@2")))
    await written(ledger)
    [found] = await rows(ledger.database)  # type: ignore[arg-type]
    assert (found["model_version"], found["adapter_version"]) == ("m@3", "poet@2")
    assert found["day"] == "2026-11-25"
    assert found["at"] == datetime.fromtimestamp(NOON, UTC)
    assert (found["tenant"], found["subject"], found["model"]) == ("acme", "key:1", "m")
    assert (found["prompt_tokens"], found["completion_tokens"], found["cost"]) == (10, 20, 70)
    assert (found["queue_ms"], found["prefill_ms"], found["decode_ms"]) == (10, 20, 500)


async def test_lines_next_to_a_line(ledger: Ledger) -> None:
    for version in (None, "m@1", "m@2", "m@3"):
        ledger(replace(event(), versions=Versions(model=version)))
    await written(ledger)
    by = [By.MODEL_VERSION, By.TENANT]

    async def versions(**where: Any) -> list[object]:
        found = await report(ledger.database, by=by, limit=2, **where)
        return [line["model_version"] for line in found]

    places = [place(line, by) for line in await report(ledger.database, by=by)]
    assert await versions() == [None, "m@1"]
    assert await versions(after=places[0]) == ["m@1", "m@2"]
    assert await versions(before=places[3]) == ["m@1", "m@2"]
    assert await versions(before=places[1]) == [None]
    assert await versions(after=places[3]) == []


async def test_what_was_no_work_is_no_row(ledger: Ledger) -> None:
    ledger(RequestShed(model="m", priority=Priority.LOW, reason="full"))
    ledger(event(model=None))
    ledger(replace(event(), usage=None, cost=0))
    await written(ledger)
    assert await rows(ledger.database) == []  # type: ignore[arg-type]
    ledger(replace(event(), usage=None, code="TIMEOUT"))
    await written(ledger)
    assert len(await rows(ledger.database)) == 1  # type: ignore[arg-type]


async def test_what_was_remembered_is_a_row_that_costs_nothing(ledger: Ledger) -> None:
    usage = Usage(prompt_tokens=10, completion_tokens=20, cached_tokens=1)
    ledger(replace(event(), outcome=Outcome.HIT, worked=False, remembered=usage, cost=0))
    some = Usage(prompt_tokens=4, completion_tokens=8)
    ledger(replace(event(), outcome=Outcome.MISS, remembered=some))
    await written(ledger)
    hit, part = sorted(await rows(ledger.database), key=lambda row: str(row["outcome"]))[::-1]  # type: ignore[arg-type]
    assert (hit["outcome"], hit["cost"], hit["remembered_tokens"]) == ("hit", 0, 30)
    assert (hit["prompt_tokens"], hit["completion_tokens"], hit["cached_tokens"]) == (0, 0, 0)
    assert (part["outcome"], part["cost"], part["remembered_tokens"]) == ("computed", 70, 12)
    assert (part["prompt_tokens"], part["completion_tokens"]) == (6, 12)
    [line] = await report(ledger.database, by=[By.TENANT])
    assert (line["requests"], line["remembered_requests"], line["remembered_tokens"]) == (2, 1, 42)
    assert (line["prompt_tokens"], line["completion_tokens"], line["cost"]) == (6, 12, 70)


async def test_a_row_that_cannot_be_written_keeps_no_other_waiting(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        ledger(replace(event(), request_id=f"r{number}"))
    ledger._waiting[2]["status"] = None  # which no row may have
    await written(ledger)
    found = {row["request_id"] for row in await rows(ledger.database)}  # type: ignore[arg-type]
    assert found == {"r0", "r1", "r3", "r4"}
    assert ledger._waiting == []
    ledger.check()
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert "r2" in record.getMessage()


@given(
    st.text(max_size=300),
    st.text(st.characters(), max_size=20).map(lambda text: text + "\0\ud800"),
    st.text(max_size=2000),
)
@settings(max_examples=50)
def test_whatever_a_client_writes_fits_into_its_columns(
    adapter: str, request_id: str, subject: str
) -> None:
    told = replace(event(), adapter=adapter, request_id=request_id, subject=subject)
    for name, value in row(told, NOON).items():
        column = tables.usage.c[name]
        if isinstance(value, str):
            value.encode()
            assert "\0" not in value
            assert len(value) <= (getattr(column.type, "length", None) or 1000)


async def test_a_model_s_name_of_any_length_is_written(ledger: Ledger) -> None:
    ledger(replace(event(), adapter="a" * 300 + "\0", request_id="\ud800"))
    await written(ledger)
    [found] = await rows(ledger.database)  # type: ignore[arg-type]
    assert found["adapter"] == "a" * 128


async def test_a_writer_survives_whatever_goes_wrong(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    good = ledger.database

    class Broken:
        def write(self) -> object:
            raise OSError("the line was cut")

    ledger.database = Broken()  # type: ignore[assignment]
    ledger(event())
    await asyncio.sleep(0.1)
    assert ledger._writing is not None
    assert not ledger._writing.done(), "nobody else would write it"
    assert len(caplog.records) == 1, "said once, not at every attempt"
    ledger.database = good
    await written(ledger)
    assert len(await rows(good)) == 1  # type: ignore[arg-type]


async def test_what_it_says_of_all_is_said_in_nobody_s_name(ledger: Ledger, log: LogLines) -> None:
    """The request that happens to begin the writing has no part in what comes of it."""

    class Broken:
        def write(self) -> object:
            raise OSError("the line was cut")

    good, ledger.database = ledger.database, Broken()  # type: ignore[assignment]
    entered = on_behalf_of.set(Exchange(id="r1", method="POST", arrived=0.0))
    ledger(event())
    on_behalf_of.reset(entered)
    while not log.lines:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    [line] = log.lines
    assert line["message"] == "1 rows of usage wait: OSError: the line was cut"
    assert "request_id" not in line
    ledger.database = good
    await written(ledger)


async def test_a_batch_that_hangs_is_written_once(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_S", 0.05)
    insert, hangs = Ledger._insert, asyncio.Event()

    async def slow(self: Ledger, batch: Sequence[Mapping[str, Any]]) -> None:
        if not hangs.is_set():
            hangs.set()
            await insert(self, batch)  # and nobody hears that it was done
            await asyncio.sleep(0.2)
            return
        await insert(self, batch)

    monkeypatch.setattr(Ledger, "_insert", slow)
    for _ in range(3):
        ledger(event())
    await written(ledger)
    assert len(await rows(ledger.database)) == 3  # type: ignore[arg-type]
    await asyncio.sleep(0.2)


async def test_what_waits_is_written_when_the_gateway_stops(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 60)
    ledger(event())
    await ledger.close()
    assert len(await rows(ledger.database)) == 1  # type: ignore[arg-type]
    assert caplog.records == []

    class Down:
        def write(self) -> object:
            raise StateUnavailable("gone")

    good, ledger.database = ledger.database, Down()  # type: ignore[assignment]
    ledger(replace(event(), request_id="lost"))
    await ledger.close()
    assert "lost" in caplog.text, "an operator can still enter it by hand"
    ledger.database = good


async def test_a_report_sums_by_whatever_is_asked(ledger: Ledger, time: Time) -> None:
    for tenant, model, tokens in (("a", "m", 1), ("a", "n", 2), ("b", "m", 3)):
        ledger(event(tenant, model, tokens))
    time.now += 86_400
    ledger(event("a", "m", 4))
    await written(ledger)
    database = ledger.database

    async def told(*by: By, **facts: str) -> list[tuple[object, ...]]:
        lines = await report(database, by=by, **facts)  # type: ignore[arg-type]
        wanted = (*by, "requests", "prompt_tokens", "cost")
        return [tuple(line[each] for each in wanted) for line in lines]

    assert await told(By.TENANT) == [("a", 3, 7, 49), ("b", 1, 3, 21)]
    assert await told(By.DAY, By.MODEL) == [
        ("2026-11-25", "m", 2, 4, 28),
        ("2026-11-25", "n", 1, 2, 14),
        ("2026-11-26", "m", 1, 4, 28),
    ]
    assert await told(By.MODEL, tenant="a", since="2026-11-26") == [("m", 1, 4, 28)]
    assert await told(By.DAY, until="2026-11-25", tenant="b") == [("2026-11-25", 1, 3, 21)]
    assert await told(By.DAY, tenant="nobody") == []


async def test_rows_wait_for_the_database_and_are_written_once(
    ledger: Ledger, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 4)
    good = ledger.database

    class Down:
        """Gone for a while."""

        def write(self) -> object:
            raise StateUnavailable("gone")

    ledger.database = Down()  # type: ignore[assignment]
    for _ in range(10):
        ledger(event())
    batch = [dict(each) for each in ledger._waiting[:4]]
    async with good.write() as c:  # as if the answer to this had been lost
        await c.execute(tables.usage.insert(), batch)
    await asyncio.sleep(0.05)
    assert len(ledger._waiting) == 10
    ledger.check()
    time.now += module.LONGEST_WAIT_S + 1
    with pytest.raises(StateUnavailable, match="10 requests is not written"):
        ledger.check()
    ledger.database = good
    await written(ledger)
    ledger.check()
    assert len(await rows(good)) == 10  # type: ignore[arg-type]


async def test_too_many_rows_that_wait(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    for _ in range(2):
        ledger(event())
    ledger.check()
    ledger(event())
    with pytest.raises(StateUnavailable):
        ledger.check()
    await written(ledger)
