"""``registry:`` as a source: what an alias names now, verified, from a local or a remote store."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from models import artifact
from models.artifact import Facts
from models.errors import ConfigError, NotFound
from models.registry import Registry, open_registry
from models.sources import fetch
from models.sources.registry import folder_of, resolve
from models.store import Store
from models.versions import State, Version


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FRONTIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


def register(folder: Path, name: str, *aliases: str) -> Version:
    """Seal, publish, register and point aliases at a folder."""
    manifest = artifact.seal(folder, Facts(name=name, kind="test"))
    uri = Store().publish(folder)

    async def add() -> Version:
        async with open_registry() as registry:
            version = await registry.register(manifest, uri, by="test")
            for alias in aliases:
                await registry.promote(str(version), alias, expected=None, by="test", approve=True)
            return version

    return asyncio.run(add())


def notes(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "notes.txt").write_text(text)
    return folder


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def test_a_model_by_alias_and_by_number(model: Path) -> None:
    version = register(model, "chat", "champion")
    for reference in ("chat@champion", "chat@1", "chat", version.full_name):
        folder = fetch(f"registry:{reference}")
        assert artifact.verify(folder).content_sha256 == version.artifact
    assert fetch("registry:chat", sha256=version.artifact.upper()) == folder
    with pytest.raises(ConfigError, match=f"registry:chat@1 has content sha256 {version.artifact}"):
        fetch("registry:chat", sha256="0" * 64)


def test_an_alias_that_moves(tmp_path: Path) -> None:
    first = register(notes(tmp_path / "1", "one"), "m", "champion")
    assert resolve("m").artifact == first.artifact
    second = register(notes(tmp_path / "2", "two"), "m", "champion")
    assert resolve("m").artifact == second.artifact
    assert resolve("m@1").artifact == first.artifact


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model nobody"):
        fetch("registry:nobody@champion")
    register(notes(tmp_path / "1", "one"), "m")
    with pytest.raises(NotFound, match="no alias champion"):
        fetch("registry:m")


def test_a_sealed_folder_is_used_where_it_is(tmp_path: Path) -> None:
    folder = notes(tmp_path / "1", "one")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        fetch(str(folder))
    manifest = artifact.seal(folder, Facts(name="m", kind="test"))
    assert fetch(str(folder), sha256=manifest.content_sha256) == folder
    with pytest.raises(ConfigError, match="expected 0000"):
        fetch(str(folder), sha256="0" * 64)
    (folder / "notes.txt").write_text("two")
    with pytest.raises(ConfigError, match="damaged or was changed"):
        fetch(str(folder))


def test_what_is_archived_is_not_served(tmp_path: Path) -> None:
    version = register(notes(tmp_path / "1", "one"), "m")

    async def archive(registry: Registry) -> None:
        await registry.transition(str(version), State.ARCHIVED, by="test")

    async def run() -> None:
        async with open_registry() as registry:
            await archive(registry)

    asyncio.run(run())
    with pytest.raises(NotFound, match="archived"):
        resolve("m@1")


def test_a_damaged_artifact_is_refused(tmp_path: Path) -> None:
    version = register(notes(tmp_path / "1", "one"), "m")
    Path(Store().uri(version.artifact).removeprefix("file://"), "notes.txt").write_text("two")
    with pytest.raises(ConfigError, match=r"notes\.txt is damaged or was changed"):
        folder_of(version)


def test_from_a_store_elsewhere_it_is_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONTIER_ARTIFACTS", "memory://predict-tests")
    version = register(notes(tmp_path / "1", "one"), "m")
    folder = folder_of(version)
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder / "notes.txt").read_text() == "one"
    Store().delete(version.artifact)
    assert folder_of(version) == folder


async def test_it_works_beside_a_running_loop(tmp_path: Path) -> None:
    version = await asyncio.to_thread(register, notes(tmp_path / "1", "one"), "m", "candidate")
    assert resolve("m@candidate").artifact == version.artifact
