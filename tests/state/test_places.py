"""Where things are, by the environment alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from state.places import Places


def test_everything_is_in_one_folder_of_the_user() -> None:
    home = Path("~/.local/share/frontier-run").expanduser()
    places = Places.of({})
    assert places.home == home
    assert places.database == f"sqlite+aiosqlite:///{home}/frontier.db"
    assert places.artifacts == str(home / "artifacts")
    assert places.runs == home / "runs"
    assert places.cache == f"sqlite:///{home}/cache.db"


def test_one_variable_moves_everything(tmp_path: Path) -> None:
    places = Places.of({"FRONTIER_HOME": str(tmp_path)})
    assert places.database == f"sqlite+aiosqlite:///{tmp_path}/frontier.db"
    assert (places.artifacts, places.runs) == (str(tmp_path / "artifacts"), tmp_path / "runs")


def test_each_thing_can_be_elsewhere() -> None:
    places = Places.of(
        {
            "FRONTIER_HOME": "/home",
            "FRONTIER_DATABASE": "postgresql://a:b@c/d",
            "FRONTIER_ARTIFACTS": "s3://bucket/artifacts",
            "FRONTIER_RUNS": "/runs",
            "FRONTIER_CACHE_STORE": "redis://:secret@cache/1",
        }
    )
    assert places.database == "postgresql://a:b@c/d"
    assert places.artifacts == "s3://bucket/artifacts"
    assert places.runs == Path("/runs")
    assert places.cache == "redis://:secret@cache/1"


def test_an_empty_variable_is_unset() -> None:
    empty = dict.fromkeys(
        (
            *("FRONTIER_HOME", "FRONTIER_DATABASE", "FRONTIER_ARTIFACTS", "FRONTIER_RUNS"),
            "FRONTIER_CACHE_STORE",
        ),
        "",
    )
    assert Places.of(empty) == Places.of({})


def test_folders_are_absolute_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = Places.of({"FRONTIER_HOME": "h", "FRONTIER_ARTIFACTS": "~/a", "FRONTIER_RUNS": "r"})
    assert places.home == tmp_path / "h"
    assert places.artifacts == str(Path.home() / "a")
    assert places.runs == tmp_path / "r"


def test_a_password_is_not_shown() -> None:
    assert "hidden" not in repr(Places.of({"FRONTIER_DATABASE": "postgresql://a:hidden@c/d"}))
    assert "hidden" not in repr(Places.of({"FRONTIER_CACHE_STORE": "redis://:hidden@c/1"}))
