"""One suite over all caches: memory, SQLite, a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from state.cache import Bounds, Cache, Lenient, open_cache, redis
from state.cache.contract import ENTRY_BYTES
from state.cache.lenient import REST_S
from state.cache.memory import MemoryCache
from state.cache.redis import RedisCache
from state.cache.sqlite import SqliteCache
from state.errors import StateMisconfigured, StateUnavailable
from tests.servers import RedisServer, free_port, redis_server

__all__ = ["redis_server"]

ROOT = Path(__file__).parents[2]
BOUNDS = Bounds(max_bytes=4 * (ENTRY_BYTES + 100), max_entry_bytes=200)
"""Four entries of 100 bytes."""
names = itertools.count()


class Clock:
    """Unix seconds that stand still until somebody moves them."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not a server that is down."""
    monkeypatch.setattr(redis, "TIMEOUT_S", 20)


Make = Callable[..., Cache]


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def make(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Make]:
    """Opens caches; those of the same name are one."""
    opened: list[Cache] = []
    shared: dict[str, Cache] = {}
    folder = tmp_path_factory.mktemp("caches")
    run = f"test-{next(names)}"

    def opener(clock: Clock, name: str = "it", bounds: Bounds = BOUNDS) -> Cache:
        made: Cache
        match request.param:
            case "memory":
                made = shared.setdefault(name, MemoryCache(bounds, clock))
            case "sqlite":
                made = SqliteCache(folder / f"{name}.db", bounds, clock)
            case _:
                server: RedisServer = request.getfixturevalue("redis_server")
                made = RedisCache(server.url, bounds, prefix=f"{run}-{name}:", clock=clock)
        opened.append(made)
        return made

    yield opener
    for each in opened:
        await each.close()


async def keep(cache: Cache, *keys: str, owner: str = "acme", ttl_s: float = 600) -> None:
    for key in keys:
        await cache.put(owner, {key: key.encode() * 100}, ttl_s=ttl_s)


async def there(cache: Cache, keys: str, owner: str = "acme") -> str:
    values = await cache.get(owner, list(keys))
    return "".join(key for key, value in zip(keys, values, strict=True) if value is not None)


async def test_what_was_put_is_got_as_it_was(make: Make) -> None:
    cache = make(Clock())
    entries = {"a": b"\x00\xff\r\n", "b": b"", "c": "é".encode()}
    await cache.put("acme", entries, ttl_s=60)
    assert await cache.get("acme", ["c", "x", "b", "a", "a"]) == [
        *("é".encode(), None, b"", b"\x00\xff\r\n", b"\x00\xff\r\n")
    ]
    await cache.put("acme", {"a": b"new"}, ttl_s=60)
    assert await cache.get("acme", ["a"]) == [b"new"]
    assert await cache.get("acme", []) == []
    await cache.put("acme", {}, ttl_s=60)


async def test_stores_opened_twice_are_one(make: Make) -> None:
    clock = Clock()
    one, other = make(clock), make(clock)
    await keep(one, "a")
    assert await there(other, "a") == "a"
    assert await other.drop("acme") == 1
    assert await there(one, "a") == ""


async def test_owners_share_nothing(make: Make) -> None:
    cache = make(Clock())
    for owner in ("acme", "acme2", "ac", "übel"):
        await cache.put(owner, {"k": owner.encode()}, ttl_s=60)
    assert await cache.get("nobody", ["k"]) == [None]
    assert await cache.drop("acme") == 1
    assert await cache.get("acme", ["k"]) == [None]
    for owner in ("acme2", "ac", "übel"):
        assert await cache.get(owner, ["k"]) == [owner.encode()]
    assert await cache.drop("acme") == 0


async def test_an_entry_expires(make: Make) -> None:
    clock = Clock()
    cache = make(clock)
    await keep(cache, "a", ttl_s=60)
    clock.now += 59.999
    assert await there(cache, "a") == "a"
    clock.now += 0.001
    assert await there(cache, "a") == ""


async def test_putting_again_begins_a_new_life(make: Make) -> None:
    clock = Clock()
    cache = make(clock)
    await keep(cache, "a", ttl_s=60)
    clock.now += 50
    await keep(cache, "a", ttl_s=60)
    clock.now += 50
    await keep(cache, "b")
    assert await there(cache, "ab") == "ab"


async def test_those_unused_for_longest_make_room(make: Make) -> None:
    clock = Clock()
    cache = make(clock)
    for key in "abcd":
        await keep(cache, key)
        clock.now += 2
    assert await there(cache, "a") == "a"
    clock.now += 2
    await keep(cache, "e")
    clock.now += 2
    assert await there(cache, "abcde") == "acde"
    await cache.put("other", {"big": b"x" * 200}, ttl_s=60)
    assert await there(cache, "acde") == "de", "a long entry takes the place of two"


async def test_at_one_moment_the_order_of_putting_counts(make: Make) -> None:
    cache = make(Clock())
    await cache.put("acme", dict.fromkeys("zyxwvu", b"x" * 100), ttl_s=60)
    assert await there(cache, "zyxwvu") == "xwvu"


async def test_what_has_expired_makes_room_first(make: Make) -> None:
    clock = Clock()
    cache = make(clock)
    await keep(cache, "a", "b")
    clock.now += 2
    await keep(cache, "c", "d", ttl_s=60)
    clock.now += 60
    await keep(cache, "e", "f")
    assert await there(cache, "abcdef") == "abef"


async def test_what_is_too_long_is_not_kept_nor_what_was_there_before(make: Make) -> None:
    cache = make(Clock())
    await keep(cache, "a", "b")
    await cache.put("acme", {"a": b"x" * 201, "c": b"x" * 200}, ttl_s=60)
    assert await there(cache, "abc") == "bc"
    small = make(Clock(), "small", Bounds(max_bytes=ENTRY_BYTES + 9, max_entry_bytes=1000))
    await small.put("acme", {"a": b"x" * 10, "b": b"x" * 9}, ttl_s=60)
    assert await there(small, "ab") == "b"


async def test_a_crowd(make: Make) -> None:
    clock = Clock()
    caches = [make(clock) for _ in range(4)]

    async def one(number: int) -> None:
        key = str(number % 3)
        await caches[number % 4].put("acme", {key: key.encode()}, ttl_s=60)
        assert await caches[(number + 1) % 4].get("acme", [key]) == [key.encode()]

    await asyncio.gather(*(one(number) for number in range(40)))
    await caches[0].ping()


# --- against a model


@dataclass
class Model:
    """The contract, as slow and plain as can be."""

    entries: dict[tuple[str, str], tuple[bytes, float, int]] = field(default_factory=dict)
    uses: int = 0

    def used(self) -> int:
        self.uses += 1
        return self.uses

    def get(self, owner: str, key: str, now: float) -> bytes | None:
        value, expires, _ = self.entries.get((owner, key), (b"", 0.0, 0))
        if expires <= now:
            return None
        self.entries[owner, key] = value, expires, self.used()
        return value

    def put(self, owner: str, entries: dict[str, bytes], expires: float, now: float) -> None:
        self.entries = {place: e for place, e in self.entries.items() if e[1] > now}
        for key, value in entries.items():
            self.entries.pop((owner, key), None)
            if len(value) > BOUNDS.max_entry_bytes:
                continue
            self.entries[owner, key] = value, expires, self.used()
            while self.bytes > BOUNDS.max_bytes:
                del self.entries[min(self.entries, key=lambda place: self.entries[place][2])]

    def drop(self, owner: str) -> int:
        gone = [place for place in self.entries if place[0] == owner]
        for place in gone:
            del self.entries[place]
        return len(gone)

    @property
    def bytes(self) -> int:
        return sum(len(value) + ENTRY_BYTES for value, _, _ in self.entries.values())


OWNERS, KEYS = st.sampled_from(["a", "b", "ab"]), st.sampled_from("pqrst")
VALUES = st.builds(lambda n, c: bytes([c]) * n, st.integers(0, 210), st.integers(0, 255))
STEPS = st.one_of(
    st.tuples(
        st.just("put"),
        OWNERS,
        st.dictionaries(KEYS, VALUES, max_size=3),
        st.sampled_from([60.0, 900.0]),
    ),
    st.tuples(st.just("get"), OWNERS, KEYS),
    st.tuples(st.just("get"), OWNERS, KEYS),
    st.tuples(st.just("drop"), OWNERS),
    st.tuples(st.just("wait"), st.sampled_from([30.0, 300.0])),
)


@example(
    steps=[("put", "a", {"p": b""}, 60.0), ("wait", 300.0), ("put", "a", {}, 60.0), ("drop", "a")]
)
@example(
    steps=[
        ("put", "a", {"p": b""}, 60.0),
        ("wait", 300.0),
        ("put", "a", {"q": b"x" * 210}, 60.0),
        ("drop", "a"),
    ]
)
@given(steps=st.lists(STEPS, max_size=30))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_history_is_the_model_s(make: Make, steps: list[tuple[object, ...]]) -> None:
    clock, model = Clock(), Model()
    cache = make(clock, f"history-{next(names)}")
    for step in steps:
        clock.now += 2  # by more than recency is noted to
        match step:
            case ("put", str(owner), dict(entries), float(ttl_s)):
                await cache.put(owner, entries, ttl_s=ttl_s)
                model.put(owner, entries, clock.now + ttl_s, clock.now)
            case ("get", str(owner), str(key)):
                assert await cache.get(owner, [key]) == [model.get(owner, key, clock.now)]
            case ("drop", str(owner)):
                assert await cache.drop(owner) == model.drop(owner)
            case ("wait", float(seconds)):
                clock.now += seconds
    clock.now += 2
    for owner, key in itertools.product(["a", "b", "ab"], "pqrst"):
        assert await cache.get(owner, [key]) == [model.get(owner, key, clock.now)]


# --- each store's own


def test_memory_forgets_the_dates_of_what_is_gone() -> None:
    cache = MemoryCache(BOUNDS)

    async def churn() -> None:
        for number in range(5000):
            await cache.put("acme", {str(number): b""}, ttl_s=60)

    asyncio.run(churn())
    assert len(cache._dates) < 1100


async def test_the_file_is_its_owner_s_alone(tmp_path: Path) -> None:
    cache = open_cache(f"sqlite:///{tmp_path}/new/cache.db", BOUNDS)
    await keep(cache, "a")
    for file in (tmp_path / "new").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    await cache.close()


OPEN_AND_WRITE = """
import asyncio, sys
from pathlib import Path
from state.cache import Bounds, sqlite
from state.cache.sqlite import SqliteCache

sqlite.PATIENCE_S = 50  # who fills the file is not in a hurry, and the machine may be busy

async def main(file, owner):
    cache = SqliteCache(Path(file), Bounds(max_bytes=10_000_000, max_entry_bytes=1000))
    for number in range(100):
        await cache.put(owner, {str(number): owner.encode()}, ttl_s=60)
    values = await cache.get(owner, [str(number) for number in range(100)])
    assert values == [owner.encode()] * 100
    await cache.close()

asyncio.run(main(*sys.argv[1:]))
"""


def test_processes_that_make_and_fill_a_file_at_once(tmp_path: Path) -> None:
    words = [sys.executable, "-c", OPEN_AND_WRITE, str(tmp_path / "cache.db")]
    writing = [
        subprocess.Popen([*words, owner], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for owner in ("a", "b", "c")
    ]
    said = [process.communicate(timeout=60)[1] for process in writing]
    assert [process.returncode for process in writing] == [0] * 3, said
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.db")) as connection:
        [sums] = connection.execute(
            "SELECT (SELECT bytes FROM total), sum(size), count(*) FROM entries"
        )
    assert sums[0] == sums[1]
    assert sums[2] == 300


async def test_a_file_keeps_its_sum_over_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    for keys in ("ab", "cd", "ef"):
        cache = SqliteCache(tmp_path / "c.db", BOUNDS, clock)
        await keep(cache, *keys)
        await cache.close()
        clock.now += 2
    cache = SqliteCache(tmp_path / "c.db", BOUNDS, clock)
    assert await there(cache, "abcdef") == "cdef"
    await cache.close()


@pytest.mark.parametrize("lost", range(4))
async def test_redis_that_lost_a_key_begins_anew(redis_server: RedisServer, lost: int) -> None:
    cache = RedisCache(redis_server.url, BOUNDS, prefix=f"lossy-{next(names)}:", clock=Clock())
    try:
        await keep(cache, *"abcd")
        await cache._script._redis.delete(
            cache._keys[lost]
        )  # as eviction under Redis' own limit does
        await keep(cache, *"efgh")
        assert await there(cache, "abcdefgh") == "efgh"
        await keep(cache, "i")
        assert await there(cache, "efghi") == "fghi"
    finally:
        await cache.close()


async def test_nothing_stays_in_redis_for_ever(redis_server: RedisServer) -> None:
    cache = RedisCache(redis_server.url, BOUNDS, prefix=f"mortal-{next(names)}:")
    await keep(cache, "a", ttl_s=600)
    await keep(cache, "b", ttl_s=60)
    for key in cache._keys:
        assert 590 < await cache._script._redis.ttl(key) <= 600
    await cache.close()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mysql://x:secret@host/1", "mysql:.*not supported"),
        ("sqlite://relative.db", "no absolute file"),
        ("redis://host:notaport/0", "URL of the cache"),
    ],
)
def test_what_cannot_be_opened_says_why(url: str, why: str) -> None:
    with pytest.raises(StateMisconfigured, match=why) as told:
        open_cache(url, BOUNDS)
    assert "secret" not in str(told.value)


async def test_each_url_opens_its_own(tmp_path: Path, redis_server: RedisServer) -> None:
    for url, kind in (
        ("memory:", MemoryCache),
        (f"sqlite:///{tmp_path}/c.db", SqliteCache),
        (redis_server.url, RedisCache),
    ):
        cache = open_cache(url, BOUNDS)
        assert isinstance(cache, kind)
        await cache.ping()
        await cache.close()


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database, but long enough to look like one" * 40)
    with pytest.raises(StateMisconfigured, match="not a database"):
        open_cache(f"sqlite:///{tmp_path}/file", BOUNDS)


# --- a cache that is down is a miss


async def test_a_redis_that_goes_and_comes_back(
    tmp_path: Path, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    # ``redis_server`` only says whether there is one at all.
    server, clock = RedisServer(tmp_path, free_port()), Clock()
    inner = RedisCache(server.url, BOUNDS)
    cache = Lenient(inner, clock)
    server.start()
    await keep(cache, "a")
    server.stop()
    caplog.set_level(logging.INFO)
    assert await cache.get("acme", ["a", "b"]) == [None, None]
    await keep(cache, "c")
    clock.now += REST_S
    await keep(cache, "c")
    assert await cache.get("acme", ["a"]) == [None]
    assert len(caplog.records) == 1, "once, not for each request"
    assert server.url in caplog.records[0].message
    for call in (inner.get("acme", ["a"]), cache.ping(), cache.drop("acme")):
        with pytest.raises(StateUnavailable):
            await call
    server.start()
    await keep(cache, "d")
    assert await there(inner, "d") == "", "it is left alone for a while"
    clock.now += REST_S
    await keep(cache, "e")
    assert await there(cache, "e") == "e"
    assert "back" in caplog.records[1].message
    await cache.close()
    server.stop()


async def test_a_file_that_another_process_holds(tmp_path: Path) -> None:
    holder = SqliteCache(tmp_path / "c.db", BOUNDS)
    inner = SqliteCache(tmp_path / "c.db", BOUNDS)
    cache = Lenient(inner)
    await keep(cache, "a")
    holder._file.execute("BEGIN IMMEDIATE")
    assert await there(cache, "a") == "a", "readers do not wait"
    await keep(cache, "b")
    holder._file.execute("ROLLBACK")
    assert await there(holder, "ab") == "a"
    await cache.close()
    assert await cache.get("acme", ["a"]) == [None]
    await holder.close()
