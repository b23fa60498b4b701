"""The model is asked only for what nobody has asked for yet."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.caching.cache import ResponseCache
from deployments.caching.embedder import CachingEmbedder
from deployments.caching.reuse import Outcome, Wish
from deployments.gateway.services import EmbedResult
from models.contracts import Priority, Standing
from models.errors import InvalidInput, Overloaded
from tests.caching.fakes import VERSION, SteppedEmbedder, cache_of, settle

HIT, JOIN, MISS = Outcome.HIT, Outcome.JOIN, Outcome.MISS


class Caller:
    def __init__(
        self,
        inner: SteppedEmbedder,
        cache: ResponseCache,
        inputs: Sequence[str],
        *,
        wish: Wish | None = None,
        tenant: str = "acme",
        priority: Priority = Priority.STANDARD,
    ) -> None:
        self.inputs = inputs
        self.outcomes: list[Outcome] = []
        embedder = CachingEmbedder(
            inner=inner,
            cache=cache,
            wish=Wish() if wish is None else wish,
            model="m",
            version=VERSION,
            told=self.outcomes.append,
        )
        self.task = asyncio.create_task(
            embedder.embed(inputs, Standing(tenant=tenant, priority=priority, timeout_s=3))
        )

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])

    @property
    def right(self) -> bool:
        """Whether it has exactly what it would have alone."""
        result: EmbedResult = self.task.result()
        expected = [[float(len(text)), float(ord(text[0]))] for text in self.inputs]
        return (
            [list(map(float, vector)) for vector in result.vectors] == expected
            and list(result.tokens) == [len(text) for text in self.inputs]
            and result.prompt_tokens == sum(map(len, self.inputs))
        )


async def ran(caller: Caller, inner: SteppedEmbedder) -> Caller:
    await settle()
    inner.step()
    await settle()
    assert caller.right
    return caller


async def test_only_what_is_missing_is_computed() -> None:
    inner, (cache, told) = SteppedEmbedder(), cache_of()
    first = await ran(Caller(inner, cache, ["a", "bb", "a"]), inner)
    part = await ran(Caller(inner, cache, ["ccc", "bb", "a", "d"]), inner)
    all_ = Caller(inner, cache, ["d", "a"])
    await settle()
    assert all_.right, "nobody had to be asked"
    assert inner.calls == [["a", "bb"], ["ccc", "d"]]
    assert [caller.outcomes for caller in (first, part, all_)] == [[MISS], [MISS], [HIT]]
    assert Counter(told) == {MISS: 4, HIT: 4}
    assert inner.timeouts == [None, None]


async def test_what_is_being_computed_is_waited_for() -> None:
    inner, (cache, told) = SteppedEmbedder(), cache_of()
    first = Caller(inner, cache, ["a", "bb"])
    await settle()
    second = Caller(inner, cache, ["bb", "ccc"])
    third = Caller(inner, cache, ["a"])
    await ran(first, inner)
    assert second.right
    assert third.right
    assert inner.calls == [["a", "bb"], ["ccc"]]
    assert [caller.outcomes for caller in (first, second, third)] == [[MISS], [MISS], [JOIN]]
    assert Counter(told) == {MISS: 3, JOIN: 2}
    assert len(cache.embeddings) == 0


async def test_who_leaves_disturbs_nobody_and_the_last_one_ends_it() -> None:
    inner, (cache, _) = SteppedEmbedder(), cache_of()
    first, second = Caller(inner, cache, ["a", "b"]), Caller(inner, cache, ["b"])
    await settle()
    await first.leave()
    assert inner.cancelled == 0
    await second.leave()
    assert inner.cancelled == 1
    assert len(cache.embeddings) == 0
    await ran(Caller(inner, cache, ["a", "b"]), inner)
    assert len(inner.calls) == 2


async def test_float32_stays_as_it_is() -> None:
    inner, (cache, _) = SteppedEmbedder(), cache_of()
    vector = np.array([0.1, -2.5e-8], np.float32)

    class Exact(SteppedEmbedder):
        async def embed(self, inputs: Sequence[str], standing: Standing) -> EmbedResult:
            self.calls.append(list(inputs))
            return EmbedResult(vectors=[vector], tokens=[1], answered_by=VERSION)

    inner = Exact()
    for _ in range(2):
        result = await Caller(inner, cache, ["a"]).task
        assert np.array_equal(result.vectors[0], vector)
        assert np.asarray(result.vectors[0]).dtype == np.float32
    assert len(inner.calls) == 1


async def test_tenants_and_wishes() -> None:
    inner, (cache, told) = SteppedEmbedder(), cache_of()
    await ran(Caller(inner, cache, ["a"]), inner)
    await ran(Caller(inner, cache, ["a"], tenant="other"), inner)
    await ran(Caller(inner, cache, ["a"], wish=Wish(max_age_s=0)), inner)
    private = await ran(Caller(inner, cache, ["a"], wish=Wish(max_age_s=0, write=False)), inner)
    assert inner.calls == [["a"]] * 4
    assert told == [MISS] * 3
    assert private.outcomes == []


async def test_the_better_queue_does_not_wait_for_the_worse() -> None:
    inner, (cache, told) = SteppedEmbedder(), cache_of()
    low = Caller(inner, cache, ["a"], priority=Priority.LOW)
    await settle()
    vip = Caller(inner, cache, ["a"], priority=Priority.VIP)
    await settle()
    standard = Caller(inner, cache, ["a"])
    await ran(low, inner)
    assert vip.right
    assert standard.right
    assert told == [MISS, MISS, JOIN]


@pytest.mark.parametrize("answered_by", [None, "v0"])
async def test_another_version_is_told_and_not_kept(answered_by: str | None) -> None:
    inner, (cache, told) = SteppedEmbedder(answered_by=answered_by), cache_of()
    for _ in range(2):
        await ran(Caller(inner, cache, ["a"]), inner)
    assert told == [MISS, MISS]


async def test_the_input_at_fault_is_named_as_the_caller_counts() -> None:
    inner, (cache, _) = SteppedEmbedder(bad={"bad"}), cache_of()
    await ran(Caller(inner, cache, ["a", "b"]), inner)
    caller = Caller(inner, cache, ["a", "b", "c", "bad"])
    await settle()
    inner.step()
    await settle()
    inner.step()
    await settle()
    with pytest.raises(InvalidInput, match="input 3: bad"):
        caller.task.result()
    assert inner.calls[1:] == [["c", "bad"], ["a", "b", "c", "bad"]]
    whole = Caller(inner, cache, ["c", "bad"])
    await settle()
    inner.step()
    await settle()
    with pytest.raises(InvalidInput, match="input 1: bad"):
        whole.task.result()
    assert inner.calls[3:] == [["c", "bad"]], "there was no other way to count"


async def test_another_caller_s_bad_input_is_nobody_else_s() -> None:
    inner, (cache, _) = SteppedEmbedder(bad={"bad"}), cache_of()
    guilty = Caller(inner, cache, ["bad", "a"])
    await settle()
    innocent = Caller(inner, cache, ["a"])
    await settle()
    inner.step()
    await settle()
    with pytest.raises(InvalidInput, match="input 0: bad"):
        guilty.task.result()
    inner.step()
    await settle()
    assert innocent.right
    assert innocent.outcomes == [JOIN, MISS], "it was computed for it after all, and is paid for"


async def test_other_failures_are_shared_and_not_kept() -> None:
    inner, (cache, _) = SteppedEmbedder(), cache_of()
    callers = [Caller(inner, cache, ["a", "b"]), Caller(inner, cache, ["b"])]
    await settle()
    inner.step(Overloaded("full"))
    await settle()
    for caller in callers:
        with pytest.raises(Overloaded):
            caller.task.result()
    assert len(inner.calls) == 1
    await ran(Caller(inner, cache, ["b"]), inner)


INPUTS = st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "bad"]), min_size=1, max_size=4)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), INPUTS),
        st.tuples(st.just("arrive"), INPUTS),
        st.tuples(st.just("leave"), st.integers(0, 5)),
        st.just(("step", 0)),
    ),
    max_size=15,
)


@given(STEPS, st.integers(0, 50))
@settings(max_examples=150)
async def test_any_interleaving_gives_everybody_what_it_would_have_alone(
    steps: list[tuple[str, Any]], ticks: int
) -> None:
    inner, (cache, _) = SteppedEmbedder(bad={"bad"}), cache_of()
    callers: list[Caller] = []
    left = set()
    for what, which in steps:
        match what:
            case "arrive":
                callers.append(Caller(inner, cache, which))
            case "leave" if callers:
                caller = callers[which % len(callers)]
                if caller.task.cancel():
                    left.add(caller)
            case "step":
                inner.step()
        for _ in range(ticks % 7):
            await asyncio.sleep(0)
    for _ in range(4):
        await settle()
        inner.step()
    await settle()
    for caller in set(callers) - left:
        if "bad" in caller.inputs:
            with pytest.raises(InvalidInput, match=f"input {caller.inputs.index('bad')}: bad"):
                caller.task.result()
        else:
            assert caller.right
    assert len(cache.embeddings) == 0
    cache.embeddings.check_integrity()
