"""The store of adapters: who stays, who goes, who waits, and who is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.engines.adapters import Adapter, AdapterStore, Lease
from deployments.observability.events import (
    AdapterEvicted,
    AdapterFailed,
    AdapterLoaded,
    AdaptersResident,
    Event,
)
from models.errors import InternalError, InvalidInput, NotFound, Overloaded, Timeout, Unavailable
from tests.engines.clients import kinds, until

ROOM = 100


class Shelf:
    """Adapters on a disk that is not there: a folder's name is ``NAME-SIZE``."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.errors: dict[str, Exception] = {}
        """Raised when the folder is read."""
        self.held = threading.Event()
        """Reading waits for it."""
        self.held.set()

    def open(self, name: str, folder: Path) -> File:
        if folder.name.endswith("-bad"):
            raise InvalidInput("The adapter is bad.")
        return File(self, name, folder)


class File:
    def __init__(self, shelf: Shelf, name: str, folder: Path) -> None:
        self._shelf = shelf
        self._name = name
        self._folder = folder
        self.bytes = int(folder.name.rpartition("-")[2])

    def read(self) -> Adapter:
        self._shelf.reads.append(self._folder.name)
        assert self._shelf.held.wait(30)
        if self._folder.name in self._shelf.errors:
            raise self._shelf.errors[self._folder.name]
        return Adapter(name=self._name, rank=1, bytes=self.bytes, weights={})


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    shelf = Shelf()
    yield shelf
    shelf.held.set()


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def store(shelf: Shelf, events: list[Event]) -> Iterator[AdapterStore]:
    """Of 100 bytes, that finds any adapter ``NAME`` as 40 bytes, but none called ``no…``."""

    def resolve(name: str) -> Path:
        if name.startswith("no"):
            raise NotFound(f"no adapter {name}")
        return Path(f"/{name}-40")

    store = AdapterStore(
        "tiny", shelf.open, max_bytes=ROOM, resolve=resolve, emit=events.append, clock=lambda: 0.0
    )
    yield store
    store.close()
    store.check_integrity()


def resident(store: AdapterStore) -> set[str]:
    return {info.name for info in store.list() if info.resident}


async def test_loads_once_for_all_who_wait(store: AdapterStore, shelf: Shelf) -> None:
    shelf.held.clear()
    waiting = [asyncio.create_task(store.lease("a")) for _ in range(5)]
    await until(lambda: shelf.reads == ["a-40"])
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    shelf.held.set()
    leases = await asyncio.gather(*waiting[1:])
    assert shelf.reads == ["a-40"]
    assert len({lease.adapter for lease in leases}) == 1
    assert store.list()[0].in_use == 4
    for lease in (*leases, *leases):  # releasing twice is releasing once
        lease.release()
    assert store.list()[0].in_use == 0
    assert (await store.lease("a")).adapter is leases[0].adapter


async def test_the_longest_unused_makes_room_but_never_one_in_use(
    store: AdapterStore, events: list[Event]
) -> None:
    a = await store.lease("a")
    (await store.lease("b")).release()
    a.release()  # used later than b
    c = await store.lease("c")
    assert resident(store) == {"a", "c"}
    a = await store.lease("a")
    with pytest.raises(Overloaded, match="in use") as refusal:
        await store.lease("d")
    assert refusal.value.retry_after
    c.release()
    await store.lease("d")
    assert resident(store) == {"a", "d"}
    assert len(kinds(events, AdapterLoaded)) == 4
    assert len(kinds(events, AdapterEvicted)) == 2
    assert events[-1] == AdaptersResident(model="tiny", adapters=2, bytes=80)


async def test_a_failing_load_is_told_to_its_requests_and_may_be_tried_again(
    store: AdapterStore, shelf: Shelf, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    other = await store.lease("b")
    shelf.held.clear()
    shelf.errors["a-40"] = OSError("disk on fire")
    waiting = [asyncio.create_task(store.lease("a")) for _ in range(3)]
    await until(lambda: "a-40" in shelf.reads)
    shelf.held.set()
    for task in waiting:
        with pytest.raises(InternalError, match="'a' failed: disk on fire"):
            await task
    assert [event.adapter for event in kinds(events, AdapterFailed)] == ["a"]
    assert resident(store) == {"b"}
    other.release()
    shelf.errors.clear()
    assert (await store.lease("a")).adapter.name == "a"


async def test_what_nobody_knows(shelf: Shelf, store: AdapterStore, events: list[Event]) -> None:
    with pytest.raises(NotFound, match="no adapter nope"):
        await store.lease("nope")
    assert events == []
    alone = AdapterStore("tiny", shelf.open, max_bytes=ROOM)
    alone.load("mine", Path("/mine-10"))
    for attempt in (lambda: asyncio.run(alone.lease("yours")), lambda: alone.unload("yours")):
        with pytest.raises(NotFound, match=r"'yours'; it has: mine\."):
            await asyncio.to_thread(attempt)
    alone.close()


async def test_what_does_not_fit(store: AdapterStore) -> None:
    with pytest.raises(InvalidInput, match="bad"):
        store.load("a", Path("/a-bad"))
    with pytest.raises(InvalidInput, match=r"0\.0 MB"):
        store.load("a", Path("/a-101"))
    store.load("b", Path("/b-100"))
    assert resident(store) == {"b"}


async def test_a_deadline_while_loading(store: AdapterStore, shelf: Shelf) -> None:
    shelf.held.clear()
    with pytest.raises(Timeout, match="being loaded"):
        await store.lease("a", timeout_s=0.01)
    shelf.held.set()
    await until(lambda: resident(store) == {"a"})  # for the next one
    assert store.list()[0].in_use == 0


async def test_a_newer_version_takes_the_name_and_the_older_ends_with_its_requests(
    store: AdapterStore,
) -> None:
    store.load("a", Path("/old-60"))
    old = await store.lease("a")
    with pytest.raises(Overloaded):
        store.load("a", Path("/new-41"))
    info = store.load("a", Path("/new-40"))
    new = await store.lease("a")
    assert new.adapter is not old.adapter
    assert [(i.folder, i.bytes, i.in_use) for i in store.list()] == [(info.folder, 40, 1)]
    with pytest.raises(Overloaded):  # the older one's memory is not free yet
        store.load("b", Path("/b-1"))
    old.release()
    store.load("b", Path("/b-60"))


async def test_unloading(store: AdapterStore, shelf: Shelf) -> None:
    store.load("a", Path("/a-50"))
    lease = await store.lease("a")
    store.unload("a")
    assert store.list() == ()
    lease.release()
    shelf.held.clear()
    waiting = asyncio.create_task(store.lease("b"))
    await until(lambda: "b-40" in shelf.reads)
    store.unload("b")  # while it is being read
    shelf.held.set()
    assert (await waiting).adapter.name == "b", "it was asked for before"
    assert store.list() == ()


async def test_loaded_by_hand_it_comes_back_after_an_eviction(
    store: AdapterStore, shelf: Shelf
) -> None:
    store.load("a", Path("/hand-70"))
    store.load("b", Path("/b-80"))
    assert [(i.name, i.resident) for i in store.list()] == [("a", False), ("b", True)]
    assert (await store.lease("a")).adapter.bytes == 70
    assert shelf.reads == ["hand-70", "b-80", "hand-70"]


async def test_a_version_loaded_by_hand_wins_over_one_that_is_being_resolved(
    store: AdapterStore, shelf: Shelf
) -> None:
    shelf.held.clear()
    early = asyncio.create_task(store.lease("a"))
    await until(lambda: shelf.reads == ["a-40"])
    by_hand = asyncio.create_task(asyncio.to_thread(store.load, "a", Path("/hand-20")))
    await until(lambda: len(shelf.reads) == 2)
    shelf.held.set()
    await by_hand
    await early
    assert (await store.lease("a")).adapter.bytes == 20


async def test_closing_tells_who_waits(store: AdapterStore, shelf: Shelf) -> None:
    shelf.held.clear()
    waiting = [asyncio.create_task(store.lease(name)) for name in "abcd"]  # two threads load
    await until(lambda: len(shelf.reads) == 2)
    store.close()
    for task in waiting[2:]:
        with pytest.raises(Unavailable):
            await task
    with pytest.raises(Unavailable):
        await store.lease("e")
    shelf.held.set()
    await asyncio.gather(*waiting[:2])


names = st.sampled_from("abcde")
sizes = st.integers(1, 60)


class StoreMachine(RuleBasedStateMachine):
    """Loads, leases and evictions in any order; what is promised is checked at each."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = dict.fromkeys("abcde", 30)
        self.store = AdapterStore(
            "tiny", Shelf().open, max_bytes=ROOM, resolve=self.resolve, clock=lambda: 0.0
        )
        self.leases: list[Lease] = []
        self.used: dict[str, int] = {}
        self.now = 0

    def resolve(self, name: str) -> Path:
        return Path(f"/{name}-{self.sizes[name]}")

    def use(self, name: str) -> None:
        self.now += 1
        self.used[name] = self.now

    @rule(name=names, size=sizes)
    def publish(self, name: str, size: int) -> None:
        self.sizes[name] = size

    @rule(name=names, size=sizes)
    def load(self, name: str, size: int) -> None:
        self.attempt(name, size, lambda: self.store.load(name, Path(f"/{name}-{size}")))

    @rule(name=names)
    def lease(self, name: str) -> None:
        if name in resident(self.store):
            self.leases.append(asyncio.run(self.store.lease(name)))
            self.use(name)
            return
        known = {info.name: info.bytes for info in self.store.list()}
        size = known.get(name, self.sizes[name])
        self.attempt(name, size, lambda: self.leases.append(asyncio.run(self.store.lease(name))))

    def attempt(self, name: str, size: int, work: Callable[[], object]) -> None:
        before = {info.name: info for info in self.store.list() if info.resident}
        pinned = sum({lease.adapter: lease.adapter.bytes for lease in self.leases}.values())
        try:
            work()
        except Overloaded:
            assert pinned + size > ROOM
            assert resident(self.store) == before.keys(), "nobody goes for nothing"
            return
        assert pinned + size <= ROOM
        self.use(name)
        after = resident(self.store)
        assert name in after
        gone = before.keys() - after
        for victim in gone:
            assert not before[victim].in_use
            assert all(
                self.used[victim] < self.used[other]
                for other in after - {name}
                if not before[other].in_use
            )
        idle = sum(before[victim].bytes for victim in before if not before[victim].in_use)
        if pinned + idle + size <= ROOM:
            assert not gone

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        entry = self.store._table.get(lease.adapter.name)
        if entry is not None and entry.adapter is lease.adapter:
            self.use(lease.adapter.name)

    @rule(name=names)
    def unload(self, name: str) -> None:
        known = {info.name for info in self.store.list()}
        if name in known:
            self.store.unload(name)
            assert name not in {info.name for info in self.store.list()}
        else:
            with pytest.raises(NotFound):
                self.store.unload(name)

    @invariant()
    def sound(self) -> None:
        self.store.check_integrity()
        in_use = sum(info.in_use for info in self.store.list())
        assert in_use <= len(self.leases)

    def teardown(self) -> None:
        for lease in self.leases:
            lease.release()
        self.store.check_integrity()
        self.store.close()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=30)
