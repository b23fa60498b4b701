"""A beginning that was computed before is not computed again, and nobody can tell by the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.config import EngineConfig, PrefixCache
from models.contracts import Delta
from tests.engines.clients import Start, answer, greedy, idle, request, tokens

BEGINNING = tuple(range(3, 53))
"""Three blocks and two tokens."""
FIRST, SECOND = (*BEGINNING, 60), (*BEGINNING, 61, 62)


def config(**cache: Any) -> EngineConfig:
    prefix_cache = PrefixCache(**{"tokens": 160, **cache})
    return EngineConfig(slots=2, dtype="float64", threads=1, prefix_cache=prefix_cache)


def cached(deltas: list[Delta]) -> int:
    usage = deltas[-1].usage
    assert usage is not None
    return usage.cached_tokens


async def test_the_second_copies_what_the_first_computed(llama: Path, start: Start) -> None:
    without = start(llama, config(tokens=0))
    engine = start(llama, config())
    for prompt, known in ((FIRST, 0), (SECOND, 48), (FIRST, 48)):
        alone = await answer(without, request(prompt, greedy(8)))
        told = await answer(engine, request(prompt, greedy(8)))
        assert tokens(told) == tokens(alone)
        assert (cached(told), cached(alone)) == (known, 0)
    await idle(engine)


async def test_a_conversation_goes_on_where_it_ended(llama: Path, start: Start) -> None:
    engine = start(llama, config())
    first = await answer(engine, request(FIRST, greedy(20)))
    longer = (*FIRST, *tokens(first), 7, 8)
    second = await answer(engine, request(longer, greedy(5)))
    assert cached(second) == 64, "51 of the prompt and 19 of the answer: four whole blocks"
    alone = await answer(start(llama, config(tokens=0)), request(longer, greedy(5)))
    assert tokens(second) == tokens(alone)


@pytest.mark.parametrize(("shared", "known"), [(False, 0), (True, 48)])
async def test_tenants_share_only_where_that_is_wanted(
    llama: Path, start: Start, shared: bool, known: int
) -> None:
    engine = start(llama, config(shared=shared))
    await answer(engine, request(FIRST, tenant="ada"))
    told = await answer(engine, request(SECOND, tenant="bob"))
    assert cached(told) == known


async def test_of_a_full_memory_the_oldest_goes(llama: Path, start: Start) -> None:
    engine = start(llama, config(tokens=64))
    await answer(engine, request(FIRST, greedy(2)))
    await answer(engine, request((*range(60, 10, -1), 5), greedy(2)))
    told = await answer(engine, request(SECOND, greedy(2)))
    assert cached(told) == 16, "three of the four blocks are the other's"


async def test_what_cannot_be_saved_is_not_found(
    llama: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(llama, config())

    def full(saves: object) -> None:
        raise MemoryError

    alone = await answer(engine, request(FIRST, greedy(4)))
    with monkeypatch.context() as broken:
        broken.setattr(engine._runner, "save", full)
        await answer(engine, request((9, *BEGINNING), greedy(4)))
    again = await answer(engine, request(FIRST, greedy(4)))
    assert (tokens(again), cached(again)) == (tokens(alone), 0)
