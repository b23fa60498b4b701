"""Those that wait in the engine hear where they stand, if they asked."""

from __future__ import annotations

import asyncio
from pathlib import Path

from deployments.config import EngineConfig
from deployments.engines.engine import PLACE_S
from models.contracts import Delta, Place
from tests.engines.clients import Start, answer, greedy, idle, request, stream, tokens, until
from tests.engines.gate import Gate

ONE_SLOT = EngineConfig(slots=1, dtype="float64", threads=1)


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def places(deltas: list[Delta]) -> list[Place]:
    return [delta.place for delta in deltas if delta.place is not None]


async def test_a_place_is_told_when_it_changes_and_at_most_once_a_second(
    llama: Path, start: Start
) -> None:
    time = Time()
    engine = start(llama, ONE_SLOT, clock=time)
    gate = Gate(engine)
    first = asyncio.create_task(answer(engine, request(sampling=greedy(4))))
    await gate.entered()
    second = asyncio.create_task(answer(engine, request(sampling=greedy(4))))
    await until(lambda: len(engine._scheduler.queue) == 1)
    heard: list[Delta] = []

    async def listen() -> None:
        what = request((5, 6), greedy(3), stream=True, tell_place=True)
        async for delta in stream(engine, what):
            heard.append(delta)  # noqa: PERF401  # as it comes

    listening = asyncio.create_task(listen())
    await until(lambda: len(engine._scheduler.queue) == 2)
    await gate.steps()
    await until(lambda: len(heard) == 1)
    assert heard[0] == Delta(place=Place(position=2, waiting=2, wait_s=None))
    third = asyncio.create_task(answer(engine, request(sampling=greedy(2))))
    await until(lambda: len(engine._scheduler.queue) == 3)
    time.now += PLACE_S / 2
    await gate.steps()
    assert len(heard) == 1, "too soon"
    time.now += PLACE_S / 2
    await gate.steps()
    await until(lambda: len(heard) == 2)
    assert heard[1].place is not None
    assert (heard[1].place.position, heard[1].place.waiting) == (2, 3)
    time.now += PLACE_S
    await gate.steps()  # the first is answered with this one, and the second takes its slot
    await until(lambda: len(heard) == 3)
    assert heard[2].place is not None
    assert (heard[2].place.position, heard[2].place.waiting) == (1, 2)
    gate.open()
    await asyncio.gather(first, second, listening, third)
    assert len(tokens(heard)) == 3
    begun = [delta.place is None for delta in heard]
    assert begun == sorted(begun), "no place after the first output"
    await idle(engine)


async def test_who_did_not_ask_hears_nothing(llama: Path, start: Start) -> None:
    engine = start(llama, ONE_SLOT)
    gate = Gate(engine)
    running = asyncio.create_task(answer(engine, request(sampling=greedy(4))))
    await gate.entered()
    waiting = [
        asyncio.create_task(answer(engine, request(sampling=greedy(2), **options)))
        for options in ({"stream": True}, {"stream": False, "tell_place": True})
    ]
    await until(lambda: len(engine._scheduler.queue) == 2)
    assert not engine._hopeful
    await gate.steps(2)
    gate.open()
    await running
    for each in waiting:
        assert places(await each) == []


async def test_who_leaves_is_not_told_any_more(llama: Path, start: Start) -> None:
    engine = start(llama, ONE_SLOT)
    gate = Gate(engine)
    running = asyncio.create_task(answer(engine, request(sampling=greedy(4))))
    await gate.entered()
    what = request(sampling=greedy(2), stream=True, tell_place=True)
    waiting = asyncio.create_task(answer(engine, what))
    await until(lambda: len(engine._hopeful) == 1)
    waiting.cancel()
    await asyncio.wait([waiting])
    gate.open()
    await running
    await idle(engine)
