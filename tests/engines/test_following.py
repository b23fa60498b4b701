"""A predictor whose source moves: who answers, who is let go, and when."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import BatchLimits
from deployments.engines.following import Batching, Following
from deployments.engines.pointer import RETRY_S, Version
from models.contracts import Json, Standing
from models.errors import ConfigError, Unavailable
from tests.gateway.server import wait_until


class FakeBatching:
    def __init__(self, content: str | None) -> None:
        self.content = content
        self.limits: BatchLimits | None = None
        self.closed = 0

    def configure(self, limits: BatchLimits) -> None:
        self.limits = limits

    async def submit(self, input: Json, standing: Standing) -> Json:
        assert not self.closed
        await asyncio.sleep(0)
        return [self.content, input]

    async def close(self) -> None:
        self.closed += 1


class World:
    """A registry with one alias, and a loader that may fail."""

    def __init__(self) -> None:
        self.named = Version(name="m@1", content_sha256="1")
        self.down: Exception | None = None
        self.broken: set[str | None] = set()
        self.loaded: list[FakeBatching] = []
        self.loads = 0
        self.now = 0.0
        first = FakeBatching("1")
        self.loaded.append(first)
        self.following = Following(
            self.named,
            first,
            BatchLimits(max_batch_size=3),
            look_up=self.look_up,
            load=self.load,
            clock=lambda: self.now,
        )

    async def look_up(self) -> Version:
        if self.down:
            raise self.down
        return self.named

    def load(self, version: Version) -> FakeBatching:
        self.loads += 1
        if version.content_sha256 in self.broken:
            raise ConfigError(f"{version.name} is damaged")
        self.loaded.append(FakeBatching(version.content_sha256))
        return self.loaded[-1]

    def move(self, number: int) -> None:
        self.named = Version(name=f"m@{number}", content_sha256=str(number))


async def ask(working: tuple[Version, Batching]) -> Json:
    return await working[1].submit(0, Standing())


async def test_a_request_keeps_the_version_it_began_with() -> None:
    world = World()
    with world.following.pinned() as old:
        world.move(2)
        await world.following.refresh()
        with world.following.pinned() as new:
            assert await ask(old) == ["1", 0]
            assert await ask(new) == ["2", 0]
        await asyncio.sleep(0)
        assert [batching.closed for batching in world.loaded] == [0, 0]
    await asyncio.sleep(0)
    assert [batching.closed for batching in world.loaded] == [1, 0]


async def test_limits_hold_for_versions_to_come() -> None:
    world = World()
    world.following.configure(BatchLimits(max_batch_size=7))
    world.move(2)
    await world.following.refresh()
    assert [b.limits and b.limits.max_batch_size for b in world.loaded] == [7, 7]


async def test_the_same_content_under_another_name_is_not_loaded_again() -> None:
    world = World()
    world.named = Version(name="m@5", content_sha256="1")
    await world.following.refresh()
    assert (world.loads, world.following.version.name) == (0, "m@5")


async def test_a_registry_that_is_down_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.down = Unavailable("no database")
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            await world.following.refresh()
    assert len(caplog.records) == 1
    with world.following.pinned() as working:
        assert await ask(working) == ["1", 0]
    world.down = None
    world.move(2)
    await world.following.refresh()
    assert world.following.version.name == "m@2"


async def test_what_cannot_be_loaded_is_left_alone_for_a_while() -> None:
    world = World()
    world.move(2)
    world.broken = {"2"}
    for _ in range(5):
        await world.following.refresh()
    assert (world.loads, world.following.version.name) == (1, "m@1")
    world.broken.clear()
    world.now = RETRY_S
    await world.following.refresh()
    assert (world.loads, world.following.version.name) == (2, "m@2")


async def test_following_goes_on_until_it_is_cancelled() -> None:
    world = World()
    task = asyncio.create_task(world.following.follow(0.001))
    world.down = RuntimeError("anything")
    await asyncio.sleep(0.01)
    world.down = None
    world.move(2)
    await asyncio.to_thread(wait_until, lambda: world.following.version.name == "m@2")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("move"), st.integers(1, 4)),
        st.tuples(st.just("break"), st.integers(1, 4)),
        st.tuples(st.sampled_from(["down", "up", "refresh", "begin", "end", "later"]), st.just(0)),
    ),
    max_size=25,
)


@given(STEPS)
@settings(max_examples=60)
def test_whatever_happens(steps: list[tuple[str, int]]) -> None:
    asyncio.run(_whatever_happens(steps))


async def _whatever_happens(steps: list[tuple[str, int]]) -> None:
    world = World()
    ever_broken: set[str | None] = set()
    requests: list[tuple[ExitStack, tuple[Version, Batching], Json]] = []
    for step, number in steps:
        match step:
            case "move":
                world.move(number)
            case "break":
                world.broken ^= {str(number)}
                ever_broken.add(str(number))
            case "down":
                world.down = Unavailable("no database")
            case "up":
                world.down = None
            case "later":
                world.now += RETRY_S
            case "refresh":
                before = world.following.version
                await world.following.refresh()
                after = world.following.version
                assert after in (before, world.named)
                if world.down is None and world.named.content_sha256 not in ever_broken:
                    assert after == world.named
            case "begin":
                stack = ExitStack()
                working = stack.enter_context(world.following.pinned())
                requests.append((stack, working, await ask(working)))
            case "end" if requests:
                stack, working, answer = requests.pop(0)
                assert await ask(working) == answer
                stack.close()
        await asyncio.sleep(0)
        at_work = [b for b in world.loaded if not b.closed]
        needed = {id(working[1]) for _, working, _ in requests}
        with world.following.pinned() as working:
            needed.add(id(working[1]))
        assert {id(b) for b in at_work} == needed
        assert all(b.closed <= 1 for b in world.loaded)
