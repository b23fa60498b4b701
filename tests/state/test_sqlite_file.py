"""Several writers, one file: what is asked for in one turn is done together, or alone."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from state import sqlite_file
from state.errors import StateMisconfigured, StateUnavailable
from state.sqlite_file import SqliteFile

SCHEMA = "CREATE TABLE IF NOT EXISTS words (word TEXT PRIMARY KEY)"
LONG = 20.0


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SqliteFile]:
    made = SqliteFile("words", tmp_path / "deep" / "w.db", SCHEMA)
    yield made
    made.close()


def words(file: SqliteFile) -> list[str]:
    return [word for (word,) in file.execute("SELECT word FROM words ORDER BY word")]


async def add(file: SqliteFile, word: str, *, within_s: float = LONG, patient: bool = False) -> int:
    def act() -> int:
        file.execute("INSERT INTO words VALUES (?)", (word,))
        [number] = file.execute("SELECT count(*) FROM words").fetchone()
        assert isinstance(number, int)
        return number

    return await file.write(act, within_s=within_s, patient=patient)


def commits(file: SqliteFile) -> list[str]:
    """What is committed from now on; grows."""
    seen: list[str] = []
    file._connection.set_trace_callback(
        lambda said: seen.append(said) if said == "COMMIT" else None
    )
    return seen


async def test_one_turn_is_one_transaction(file: SqliteFile) -> None:
    seen = commits(file)
    assert await asyncio.gather(*(add(file, word) for word in "abc")) == [1, 2, 3]
    assert len(seen) == 1
    assert await add(file, "d") == 4
    assert len(seen) == 2


async def test_patient_work_is_gathered_and_not_forgotten(
    file: SqliteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = commits(file)
    monkeypatch.setattr(sqlite_file, "GATHER_S", 0.05)
    first = asyncio.create_task(add(file, "a", patient=True))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(add(file, "b", patient=True))
    assert await asyncio.gather(first, second) == [1, 2]
    assert len(seen) == 1


async def test_patient_work_is_done_before_what_is_asked_after_it(
    file: SqliteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = commits(file)
    monkeypatch.setattr(sqlite_file, "GATHER_S", 3600)
    patient = asyncio.create_task(add(file, "a", patient=True))
    await asyncio.sleep(0)
    assert await add(file, "b") == 2
    assert await patient == 1
    assert len(seen) == 1
    assert await asyncio.gather(add(file, "c"), add(file, "d", patient=True)) == [3, 4]


async def test_who_fails_fails_alone(file: SqliteFile) -> None:
    def stumble() -> None:
        file.execute("INSERT INTO words VALUES ('never')")
        raise ValueError("of its own")

    told = await asyncio.gather(
        add(file, "a"),
        file.write(stumble, within_s=LONG),
        add(file, "a"),  # again: SQLite refuses it
        add(file, "b"),
        return_exceptions=True,
    )
    assert told[0] == 1
    assert isinstance(told[1], ValueError)
    assert isinstance(told[2], StateUnavailable)
    assert "UNIQUE" in str(told[2])
    assert told[3] == 2
    assert words(file) == ["a", "b"]


async def test_who_has_left_asks_for_nothing(file: SqliteFile) -> None:
    leaving = asyncio.create_task(add(file, "a"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await add(file, "b") == 1
    assert words(file) == ["b"]
    assert leaving.cancelled()


async def test_where_all_have_left_nothing_is_done(tmp_path: Path) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    file = SqliteFile("words", tmp_path / "w.db", SCHEMA)
    seen = commits(file)
    leaving = asyncio.create_task(add(file, "a"))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    await asyncio.sleep(0.01)
    assert seen == []
    leaving = asyncio.create_task(add(file, "b"))
    await asyncio.sleep(0)
    leaving.cancel()
    file.close()
    await asyncio.wait([leaving])
    await asyncio.sleep(0.01)
    assert complaints == []


async def test_others_are_waited_for_and_not_for_ever(file: SqliteFile, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "deep" / "w.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    patient = asyncio.create_task(add(file, "a"))
    with pytest.raises(StateUnavailable, match=r"words in .*w\.db.*locked"):
        await add(file, "b", within_s=0.02)
    assert not patient.done()
    late = asyncio.create_task(add(file, "c"))
    await asyncio.sleep(0.01)
    other.execute("COMMIT")
    await asyncio.gather(patient, late)
    assert words(file) == ["a", "c"]
    other.close()


def test_a_loop_that_has_ended_leaves_nothing_behind(file: SqliteFile) -> None:
    async def leave() -> None:
        task = asyncio.create_task(add(file, "a"))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    assert asyncio.run(add(file, "b")) == 1


async def test_a_closed_file_is_out_of_reach(tmp_path: Path) -> None:
    file = SqliteFile("words", tmp_path / "w.db", SCHEMA)
    file.close()
    with pytest.raises(StateUnavailable, match="closed"):
        await add(file, "a")
    with pytest.raises(StateUnavailable, match="closed"):
        await file.read(lambda: words(file), within_s=LONG)


def test_something_else_is_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "w.db").write_text("a letter, and not a short one" * 100)
    with pytest.raises(StateMisconfigured, match=r"words in .*w\.db"):
        SqliteFile("words", tmp_path / "w.db", SCHEMA)
