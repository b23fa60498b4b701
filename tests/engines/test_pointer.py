"""References that requests read at once, and a registry that moves, lies down and comes back."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engines import pointer
from deployments.engines.pointer import KEEP_S, RETRY_S, Pointers, Version
from models.errors import NotFound, Unavailable


def version(number: int) -> Version:
    return Version(name=f"m@{number}", content_sha256=str(number))


class World:
    """A registry, and an engine that gets versions ready."""

    def __init__(self) -> None:
        self.names: dict[str, Version] = {"m": version(1)}
        self.down: Exception | None = None
        self.broken: set[str | None] = set()
        self.looks = 0
        self.made_ready: list[str | None] = []
        self.now = 0.0
        self.pointers = Pointers(self.look_up, self.ready, refresh_s=2, clock=lambda: self.now)

    async def look_up(self, reference: str) -> Version:
        self.looks += 1
        await asyncio.sleep(0)
        if self.down:
            raise self.down
        try:
            return self.names[reference]
        except KeyError:
            raise NotFound(f"no {reference}", param="model") from None

    async def ready(self, wanted: Version) -> None:
        await asyncio.sleep(0)
        if wanted.content_sha256 in self.broken:
            raise RuntimeError(f"{wanted.name} does not fit")
        self.made_ready.append(wanted.name)


async def test_only_the_first_request_waits_for_the_registry() -> None:
    world = World()
    found = await asyncio.gather(*(world.pointers.get("m") for _ in range(5)))
    assert found == [version(1)] * 5
    assert world.looks == 1
    world.down = Unavailable("down")
    assert await world.pointers.get("m") == version(1)
    with pytest.raises(Unavailable):
        await world.pointers.get("other")


async def test_a_move_is_seen_after_a_refresh_and_only_when_ready() -> None:
    world = World()
    await world.pointers.get("m")
    assert world.made_ready == [], "the engine loads it with the request itself"
    world.names["m"] = version(2)
    assert await world.pointers.get("m") == version(1)
    await world.pointers.refresh()
    assert await world.pointers.get("m") == version(2)
    assert world.made_ready == ["m@2"]


async def test_what_does_not_get_ready_is_left_alone_for_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    await world.pointers.get("m")
    world.names["m"] = version(2)
    world.broken = {"2"}
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            await world.pointers.refresh()
    assert len(caplog.records) == 1
    assert await world.pointers.get("m") == version(1)
    world.broken.clear()
    await world.pointers.refresh()
    assert await world.pointers.get("m") == version(1)
    world.now = RETRY_S
    await world.pointers.get("m")
    await world.pointers.refresh()
    assert await world.pointers.get("m") == version(2)


async def test_a_name_that_was_taken_away_is_not_found() -> None:
    world = World()
    await world.pointers.get("m")
    del world.names["m"]
    await world.pointers.refresh()
    with pytest.raises(NotFound):
        await world.pointers.get("m")
    assert world.pointers.versions() == []


async def test_unknown_names_do_not_wear_the_registry_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointer, "UNKNOWN", 3)
    world = World()
    for _ in range(5):
        with pytest.raises(NotFound, match="no x"):
            await world.pointers.get("x")
    assert world.looks == 1
    world.names["x"] = version(7)
    world.now = 2
    assert await world.pointers.get("x") == version(7)
    for number in range(10):
        with pytest.raises(NotFound):
            await world.pointers.get(f"y{number}")
    assert len(world.pointers._unknown) == 3


async def test_what_nobody_asks_for_is_forgotten() -> None:
    world = World()
    await world.pointers.get("m")
    world.now = KEEP_S + 1
    await world.pointers.refresh()
    assert (world.looks, world.pointers.versions()) == (1, [])
    assert await world.pointers.get("m") == version(1)


async def test_a_client_that_leaves_takes_nobody_with_it() -> None:
    world = World()
    first = asyncio.create_task(world.pointers.get("m"))
    await asyncio.sleep(0)
    second = asyncio.create_task(world.pointers.get("m"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == version(1)
    assert world.looks == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["name", "remove", "break", "down", "up", "get", "refresh", "later"]),
        st.sampled_from("ab"),
        st.integers(1, 3),
    ),
    max_size=30,
)


@given(STEPS)
@settings(max_examples=80)
def test_whatever_happens(steps: list[tuple[str, str, int]]) -> None:
    asyncio.run(_whatever_happens(steps))


async def _whatever_happens(steps: list[tuple[str, str, int]]) -> None:
    world = World()
    told: dict[str, set[Version]] = {"a": set(), "b": set()}
    """What each name has ever meant."""
    for step, name, number in steps:
        match step:
            case "name":
                world.names[name] = version(number)
                told[name].add(version(number))
            case "remove":
                world.names.pop(name, None)
            case "break":
                world.broken ^= {str(number)}
            case "down":
                world.down = Unavailable("down")
            case "up":
                world.down = None
            case "later":
                world.now += RETRY_S
            case "refresh":
                await world.pointers.refresh()
                if world.down is None and not world.broken:
                    world.now += RETRY_S
                    await world.pointers.refresh()  # also what was broken before
                    for known in world.pointers._known:
                        assert await world.pointers.get(known) == world.names[known]
            case "get":
                known = name in world.pointers._known
                try:
                    assert await world.pointers.get(name) in told[name]
                except NotFound:
                    assert not known
                except Unavailable:
                    assert not known
                    assert world.down
        assert not world.pointers._looking
        assert world.pointers._used.keys() == world.pointers._known.keys()
