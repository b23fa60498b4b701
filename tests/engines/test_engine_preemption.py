"""A vip request takes a low one's slot, and the low answer is what it would have been."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deployments.config import EngineConfig
from deployments.observability.events import Event, RequestPreempted, RequestStarted
from models.contracts import Delta, Priority, Sampling
from tests.engines.clients import Start, answer, greedy, idle, request, stream, tokens, until
from tests.engines.gate import Gate

ONE_SLOT = EngineConfig(slots=1, dtype="float64", threads=1)
SEEDED = Sampling(seed=4, temperature=0.9, max_tokens=12, repetition_penalty=1.3, ignore_eos=True)


@pytest.mark.parametrize("sampling", [greedy(12), SEEDED], ids=["greedy", "seeded"])
async def test_a_vip_request_goes_first_and_changes_no_token(
    llama: Path, start: Start, sampling: Sampling
) -> None:
    events: list[Event] = []
    engine = start(llama, ONE_SLOT, emit=events.append)
    patient = request((5, 6, 7), sampling, stream=True, priority=Priority.LOW)
    alone = await answer(engine, patient)
    events.clear()
    gate = Gate(engine)
    order: list[str] = []
    heard: list[Delta] = []

    async def wait_patiently() -> None:
        async for delta in stream(engine, patient):
            heard.append(delta)  # noqa: PERF401  # as it comes
        order.append("low")

    async def hurry() -> None:
        await answer(engine, request(sampling=greedy(3), priority=Priority.VIP))
        order.append("vip")

    waits = asyncio.create_task(wait_patiently())
    await gate.entered()
    await gate.steps(4)
    hurries = asyncio.create_task(hurry())
    await until(lambda: len(engine._scheduler.queue) == 1)
    gate.open()
    await asyncio.gather(waits, hurries)
    assert order == ["vip", "low"]
    assert tokens(heard) == tokens(alone)
    assert heard[-1].usage == alone[-1].usage
    preempted = [event for event in events if isinstance(event, RequestPreempted)]
    assert preempted == [RequestPreempted(model="tiny", priority=Priority.LOW)]
    assert sum(isinstance(event, RequestStarted) for event in events) == 2
    await idle(engine)


async def test_one_that_made_room_can_leave(llama: Path, start: Start) -> None:
    engine = start(llama, ONE_SLOT)
    gate = Gate(engine)
    leaves = asyncio.create_task(
        answer(engine, request(sampling=greedy(12), priority=Priority.LOW))
    )
    await gate.entered()
    await gate.steps(2)
    vip = asyncio.create_task(answer(engine, request(sampling=greedy(3), priority=Priority.VIP)))
    await until(lambda: len(engine._scheduler.queue) == 1)
    await gate.steps(1)
    leaves.cancel()
    gate.open()
    assert len(tokens(await vip)) == 3
    await asyncio.wait([leaves])
    await idle(engine)
