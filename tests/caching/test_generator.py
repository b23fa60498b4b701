"""Computed once, told to everybody, kept only if it is whole and from the right version."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.caching.generator import CachingGenerator
from deployments.caching.reuse import Outcome, Wish
from models.contracts import (
    NO_USAGE,
    FinishReason,
    GenerateRequest,
    Priority,
    Sampling,
    Usage,
)
from models.errors import UpstreamError
from state.cache.memory import MemoryCache
from tests.caching.fakes import (
    BOUNDS,
    PIECES,
    TEXT,
    TIMINGS,
    Caller,
    SteppedGenerator,
    asking,
    cache_of,
    settle,
)

HIT, JOIN, MISS = Outcome.HIT, Outcome.JOIN, Outcome.MISS
NO_CACHE, NO_STORE = Wish(max_age_s=0), Wish(max_age_s=0, write=False)


async def ran(caller: Caller, inner: SteppedGenerator) -> Caller:
    """``caller``, once its answer is there."""
    await settle()
    for _ in inner.pieces:
        inner.step()
        await settle()
    assert caller.task.done()
    return caller


async def test_the_second_time_it_is_there() -> None:
    inner, (cache, told) = SteppedGenerator(), cache_of()
    first = await ran(Caller(inner, cache, asking(n=2)), inner)
    second = Caller(inner, cache, asking(n=2, stream=False))
    await settle()
    assert (first.outcome, second.outcome) == (MISS, HIT)
    assert told == [MISS, HIT]
    assert len(inner.requests) == 1
    assert [delta.text for delta in second.deltas] == [TEXT, TEXT]
    assert [delta.finish_reason for delta in second.deltas] == [FinishReason.STOP] * 2
    assert second.deltas[-1].usage == first.deltas[-1].usage is not None
    assert (first.deltas[-1].timings, second.deltas[-1].timings) == (TIMINGS, None)


async def test_who_comes_late_gets_what_there_is_and_then_what_comes() -> None:
    inner, (cache, told) = SteppedGenerator(), cache_of()
    first = Caller(inner, cache)
    await settle()
    inner.step()
    await settle()
    late = Caller(inner, cache)
    await settle()
    assert first.text == late.text == PIECES[0]
    inner.step()
    await settle()
    assert late.text == PIECES[0] + PIECES[1]
    inner.step()
    await settle()
    assert first.text == late.text == TEXT
    assert told == [MISS, JOIN]
    assert late.deltas[-1].usage is not None
    assert late.deltas[-1].timings is None, "that was the first one's time"
    assert len(inner.requests) == 1
    cache.answers.check_integrity()
    assert len(cache.answers) == 0


async def test_who_leaves_disturbs_nobody_and_the_last_one_ends_it() -> None:
    inner, (cache, _) = SteppedGenerator(), cache_of()
    callers = [Caller(inner, cache) for _ in range(3)]
    await settle()
    inner.step()
    await settle()
    await callers[0].leave()
    await callers[2].leave()
    assert inner.running == 1
    await callers[1].leave()
    assert (inner.running, inner.cancelled) == (0, 1), "at once, not some time later"
    assert len(cache.answers) == 0
    again = await ran(Caller(inner, cache), inner)
    assert (again.text, again.outcome) == (TEXT, MISS)


async def test_the_others_get_theirs_after_the_first_has_gone() -> None:
    inner, (cache, _) = SteppedGenerator(), cache_of()
    first, second = Caller(inner, cache), Caller(inner, cache)
    await settle()
    await first.leave()
    await ran(second, inner)
    assert second.text == TEXT
    third = Caller(inner, cache)
    await settle()
    assert third.outcome is HIT


async def test_a_failure_is_everybody_s_and_is_not_kept() -> None:
    inner, (cache, _) = SteppedGenerator(), cache_of()
    callers = [Caller(inner, cache) for _ in range(2)]
    await settle()
    inner.step()
    inner.step(UpstreamError("lost"))
    await settle()
    for caller in callers:
        assert isinstance(caller.error, UpstreamError)
        assert caller.text == PIECES[0], "after what came before"
    again = await ran(Caller(inner, cache), inner)
    assert (again.text, again.outcome) == (TEXT, MISS)


async def test_a_generator_that_is_cancelled_from_within() -> None:
    # As Ray does with a replica's calls when it is being stopped.
    inner, (cache, _) = SteppedGenerator(), cache_of()
    caller = Caller(inner, cache)
    await settle()
    inner.step(asyncio.CancelledError())
    await settle()
    assert caller.task.done()
    assert (caller.text, caller.error) == ("", None)
    assert len(cache.answers) == 0


async def test_each_caller_has_its_own_deadline() -> None:
    inner, (cache, _) = SteppedGenerator(), cache_of()
    await ran(Caller(inner, cache, asking(timeout_s=3)), inner)
    assert inner.requests[0].timeout_s is None


@pytest.mark.parametrize(
    ("first", "second", "joins"),
    [
        (asking(), asking(stream=False), True),
        (asking(stream=False), asking(stream=False), True),
        (asking(stream=False), asking(), False),
        (asking(priority=Priority.VIP), asking(priority=Priority.LOW), True),
        (asking(priority=Priority.LOW), asking(priority=Priority.VIP), False),
        (asking(tenant="other"), asking(), False),
        (asking("other"), asking(), False),
    ],
)
async def test_who_joins_whom(first: GenerateRequest, second: GenerateRequest, joins: bool) -> None:
    inner, (cache, told) = SteppedGenerator(), cache_of()
    one = Caller(inner, cache, first)
    await settle()
    other = await ran(Caller(inner, cache, second), inner)
    assert one.text == other.text == TEXT
    assert told == [MISS, JOIN if joins else MISS]
    assert len(inner.requests) == 2 - joins


async def test_no_store_is_for_nobody_else() -> None:
    inner, (cache, told) = SteppedGenerator(), cache_of()
    await ran(Caller(inner, cache), inner)
    private = Caller(inner, cache, wish=NO_STORE)
    other = Caller(inner, cache, asking("other"), wish=NO_STORE)
    await settle()
    shared = Caller(inner, cache, asking("other"))
    await ran(shared, inner)
    assert private.text == other.text == shared.text == TEXT
    assert private.outcomes == other.outcomes == []
    assert len(inner.requests) == 4
    assert told == [MISS, MISS]


async def test_no_cache_is_computed_anew_and_kept() -> None:
    inner, (cache, told) = SteppedGenerator(), cache_of()
    await ran(Caller(inner, cache), inner)
    inner.pieces = ("new",)
    fresh = Caller(inner, cache, wish=NO_CACHE)
    await settle()
    fresher = Caller(inner, cache, wish=NO_CACHE)
    await settle()
    joined = Caller(inner, cache)
    await ran(joined, inner)
    assert len(inner.requests) == 3
    assert fresh.text == fresher.text == joined.text == "new"
    after = Caller(inner, cache)
    await settle()
    assert after.text == "new"
    assert told == [MISS, MISS, MISS, JOIN, HIT]


async def test_a_fresher_answer_does_not_join_what_may_find_an_older() -> None:
    inner, (cache, told) = SteppedGenerator(), cache_of()
    any_age = Caller(inner, cache)
    await settle()
    young, younger = (Caller(inner, cache, wish=Wish(max_age_s=age)) for age in (20, 10))
    await settle()
    as_young = Caller(inner, cache, wish=Wish(max_age_s=20))
    await ran(as_young, inner)
    assert len(inner.requests) == 3
    assert any_age.text == young.text == younger.text == as_young.text == TEXT
    assert told == [MISS, MISS, MISS, JOIN]


@pytest.mark.parametrize(
    ("request_", "version"),
    [(asking(sampling=Sampling()), "v1"), (asking(), None)],
    ids=["drawn", "of no version"],
)
async def test_what_cannot_be_cached_passes_through(
    request_: GenerateRequest, version: str | None
) -> None:
    inner, (cache, told) = SteppedGenerator(), cache_of()
    for _ in range(2):
        caller = await ran(Caller(inner, cache, request_, version=version), inner)
        assert caller.text == TEXT
        assert caller.outcomes == []
    assert inner.requests == [request_] * 2
    assert told == []


async def test_what_passes_through_is_closed() -> None:
    inner, (cache, _) = SteppedGenerator(), cache_of()
    caller = Caller(inner, cache, asking(sampling=Sampling()))
    await settle()
    await caller.leave()
    assert (inner.running, inner.cancelled) == (0, 1)


@pytest.mark.parametrize("answered_by", [None, "v0", "v2"])
async def test_an_answer_of_another_version_is_told_and_not_kept(answered_by: str | None) -> None:
    # While a new configuration is rolled out, old replicas answer new gateways.
    inner, (cache, told) = SteppedGenerator(answered_by=answered_by), cache_of()
    for _ in range(2):
        assert (await ran(Caller(inner, cache), inner)).text == TEXT
    assert told == [MISS, MISS]


async def test_another_version_is_another_answer() -> None:
    inner, (cache, told) = SteppedGenerator(), cache_of()
    await ran(Caller(inner, cache), inner)
    inner.answered_by, inner.pieces = "v2", ("new",)
    assert (await ran(Caller(inner, cache, version="v2"), inner)).text == "new"
    assert told == [MISS, MISS]


async def test_what_is_damaged_is_computed_again() -> None:
    store = MemoryCache(BOUNDS)
    inner, (cache, told) = SteppedGenerator(), cache_of(store)
    await ran(Caller(inner, cache), inner)
    [(owner, key)] = store._entries
    await store.put(owner, {key: b"rubbish"}, ttl_s=60)
    assert (await ran(Caller(inner, cache), inner)).text == TEXT
    assert told == [MISS, MISS]


@dataclass
class SlowStore:
    """Answers when it is told to."""

    inner: MemoryCache = field(default_factory=lambda: MemoryCache(BOUNDS))
    go: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = False

    async def get(self, owner: str, keys: Sequence[str]) -> list[bytes | None]:
        await self.go.wait()
        return await self.inner.get(owner, keys)

    async def put(self, owner: str, entries: Mapping[str, bytes], *, ttl_s: float) -> None:
        if self.broken:
            raise RuntimeError("a bug")
        await self.go.wait()
        await self.inner.put(owner, entries, ttl_s=ttl_s)

    async def drop(self, owner: str) -> int:
        return await self.inner.drop(owner)

    async def ping(self) -> None: ...

    async def close(self) -> None: ...


async def test_while_the_store_is_asked_others_wait_with_the_first() -> None:
    store = SlowStore()
    inner, (cache, told) = SteppedGenerator(), cache_of(store)
    callers = [Caller(inner, cache) for _ in range(2)]
    await settle()
    await callers[0].leave()
    assert told == []
    store.go.set()
    await ran(callers[1], inner)
    assert callers[1].text == TEXT
    assert callers[0].outcomes == []
    callers = [Caller(inner, cache) for _ in range(2)]
    await settle()
    assert told == [JOIN, HIT, HIT]
    assert [caller.text for caller in callers] == [TEXT, TEXT]


async def test_nobody_waits_until_it_is_kept() -> None:
    store = SlowStore()
    store.go.set()
    inner, (cache, told) = SteppedGenerator(), cache_of(store)
    first = Caller(inner, cache)
    await settle()
    store.go.clear()
    await ran(first, inner)
    late = Caller(inner, cache)
    await settle()
    assert late.text == TEXT
    assert told == [MISS, HIT], "all of it was there"
    store.go.set()
    await settle()
    assert len(cache.answers) == 0


async def test_keeping_that_fails_is_no_caller_s_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = SlowStore(broken=True)
    store.go.set()
    inner, (cache, _) = SteppedGenerator(), cache_of(store)
    caller = await ran(Caller(inner, cache), inner)
    assert (caller.text, caller.error) == (TEXT, None)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_an_abandoned_iterator_frees_what_it_held() -> None:
    inner, (cache, _) = SteppedGenerator(), cache_of()
    caller = Caller(inner, cache)  # keeps the flight alive while the other one begins
    await settle()
    generator = caller._generator
    assert isinstance(generator, CachingGenerator)
    stream = generator.generate(asking())
    inner.step()
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert inner.running == 1
    await caller.leave()
    assert inner.running == 0


# --- any interleaving

STEPS = st.lists(
    st.one_of(
        st.just(("arrive", 0)),
        st.just(("arrive", 0)),
        st.tuples(st.just("leave"), st.integers(0, 5)),
        st.just(("piece", 0)),
        st.just(("piece", 0)),
        st.just(("fail", 0)),
    ),
    max_size=25,
)


@given(STEPS)
@settings(max_examples=150)
async def test_any_order_of_arrivals_departures_and_failures(
    steps: list[tuple[str, int]],
) -> None:
    inner, (cache, _) = SteppedGenerator(), cache_of()
    waiting: list[Caller] = []
    everybody: list[Caller] = []
    said = starts = 0
    kept = False
    for what, which in steps:
        match what:
            case "arrive":
                caller = Caller(inner, cache)
                everybody.append(caller)
                await settle()
                if kept:
                    assert (caller.text, caller.outcome) == (TEXT, HIT)
                    assert caller.task.done()
                else:
                    assert caller.outcome is (JOIN if waiting else MISS)
                    said, starts = (said, starts) if waiting else (0, starts + 1)
                    waiting.append(caller)
            case "leave" if waiting:
                await waiting.pop(which % len(waiting)).leave()
            case "piece" if waiting:
                inner.step()
                await settle()
                said += 1
                if said == len(PIECES):
                    assert all(caller.task.done() for caller in waiting)
                    waiting, kept = [], True
            case "fail" if waiting:
                inner.step(UpstreamError("lost"))
                await settle()
                assert all(isinstance(caller.error, UpstreamError) for caller in waiting)
                waiting = []
        assert inner.running == bool(waiting), "work while somebody waits, and only then"
        assert len(inner.requests) == starts
        assert all(caller.text == "".join(PIECES[:said]) for caller in waiting)
        assert len(cache.answers) == bool(waiting)
        cache.answers.check_integrity()
    for caller in waiting:
        await caller.leave()
    for caller in everybody:
        assert caller.text == TEXT or caller.error or caller.left
    assert inner.running == 0


@given(st.lists(st.tuples(STEPS.map(lambda steps: steps[:3]), st.integers(0, 6)), max_size=12))
@settings(max_examples=150)
async def test_any_interleaving_even_within_a_step(
    bursts: list[tuple[list[tuple[str, int]], int]],
) -> None:
    inner, (cache, _) = SteppedGenerator(), cache_of()
    callers: list[Caller] = []
    failed = False
    for steps, ticks in bursts:
        for what, which in steps:
            match what:
                case "arrive":
                    callers.append(Caller(inner, cache))
                case "leave" if callers:
                    caller = callers[which % len(callers)]
                    caller.left = caller.left or not caller.task.done()
                    caller.task.cancel()
                case "piece":
                    inner.step()
                case "fail":
                    failed = True
                    inner.step(UpstreamError("lost"))
        for _ in range(ticks):
            await asyncio.sleep(0)
    for _ in range(2 * len(PIECES)):
        await settle()
        inner.step()
    await settle()
    for caller in callers:
        assert caller.task.done()
        assert TEXT.startswith(caller.text)
        if caller.error is not None:
            assert failed
        elif not caller.left:
            assert caller.text == TEXT
            assert len(caller.outcomes) == 1
    assert inner.running == len(cache.answers) == 0


# --- who pays


@dataclass
class Accounted(SteppedGenerator):
    """Says what it did of a request that was closed."""

    asked: list[GenerateRequest] = field(default_factory=list)

    async def spent(self, request: GenerateRequest) -> Usage | None:
        self.asked.append(request)
        return Usage(prompt_tokens=4, completion_tokens=1)


async def test_who_stays_pays_for_who_left() -> None:
    inner, (cache, _) = Accounted(), cache_of()
    mine = [replace(asking(), receipt=name) for name in "abc"]
    first, second, third = [Caller(inner, cache, each) for each in mine]
    await settle()
    inner.step()
    await settle()
    assert [caller.outcome for caller in (first, second, third)] == [MISS, JOIN, JOIN]
    await first.leave()
    assert [caller.outcome for caller in (first, second, third)] == [JOIN, MISS, JOIN]
    assert await first.spent(mine[0]) == NO_USAGE
    await second.leave()
    await settle()
    assert [caller.outcome for caller in (first, second, third)] == [JOIN, JOIN, MISS]
    await ran(third, inner)
    assert third.pays
    assert third.text == TEXT
    assert inner.asked == [], "one of them has had the end of it, and knows"


async def test_the_last_to_leave_pays_for_what_was_done() -> None:
    inner, (cache, _) = Accounted(), cache_of()
    mine = [replace(asking(), receipt=name) for name in "ab"]
    first, second = [Caller(inner, cache, each) for each in mine]
    await settle()
    inner.step()
    await settle()
    await first.leave()
    await second.leave()
    assert inner.cancelled == 1
    assert await first.spent(mine[0]) == NO_USAGE
    assert await second.spent(mine[1]) == Usage(prompt_tokens=4, completion_tokens=1)
    assert [request.receipt for request in inner.asked] == ["a"], "under which it was at work"


async def test_of_a_failure_one_is_asked_to_pay() -> None:
    inner, (cache, _) = Accounted(), cache_of()
    mine = [replace(asking(), receipt=name) for name in "ab"]
    callers = [Caller(inner, cache, each) for each in mine]
    await settle()
    inner.step()
    await settle()
    inner.step(UpstreamError("lost"))
    await settle()
    assert all(isinstance(caller.error, UpstreamError) for caller in callers)
    told = [await caller.spent(each) for caller, each in zip(callers, mine, strict=True)]
    assert sorted(told, key=str) == sorted(
        [NO_USAGE, Usage(prompt_tokens=4, completion_tokens=1)], key=str
    )


async def test_what_was_there_has_nobody_to_pay() -> None:
    inner, (cache, _) = SteppedGenerator(), cache_of()
    await ran(Caller(inner, cache), inner)
    callers = [Caller(inner, cache) for _ in range(2)]
    await settle()
    assert [caller.outcome for caller in callers] == [HIT, HIT]
    assert not any(caller.pays for caller in callers)


async def test_what_cannot_be_cached_is_asked_for_as_it_is() -> None:
    inner, (cache, _) = Accounted(), cache_of()
    drawn = replace(asking(sampling=Sampling(temperature=1)), receipt="a")
    caller = Caller(inner, cache, drawn)
    await settle()
    await caller.leave()
    assert await caller.spent(drawn) == Usage(prompt_tokens=4, completion_tokens=1)
    assert await Caller(SteppedGenerator(), cache, drawn).spent(drawn) is None
