from __future__ import annotations

from pathlib import Path

import pytest

from models import durable


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    durable.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        durable.write(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert {*tmp_path.iterdir()} == {path, durable.partial(path)}


def test_files_and_folders_are_synced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    durable.sync(tmp_path / "file")
    durable.sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        durable.sync(tmp_path / "gone")
