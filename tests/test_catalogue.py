"""The registry as replicas see it: a real one, that also goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deployments import catalogue
from deployments.catalogue import Catalogue, keep_telling, located
from deployments.config import PredictModel
from deployments.engines.pointer import Version
from models import artifact
from models.artifact import Facts
from models.errors import ConfigError, NotFound, Unavailable
from models.registry import Registry, open_registry
from models.versions import State
from tests.models.test_registry_source import notes, register


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(catalogue, "FIRST_BEAT_S", 0.001)
    return tmp_path / "home"


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    async with open_registry() as opened:
        yield opened


@pytest.fixture
async def opened() -> AsyncIterator[Catalogue]:
    opened = Catalogue()
    yield opened
    await opened.close()


async def registered(folder: Path, name: str, *aliases: str) -> Version:
    return catalogue.as_version(await asyncio.to_thread(register, folder, name, *aliases))


async def test_a_reference_is_looked_up(opened: Catalogue, tmp_path: Path) -> None:
    version = await registered(notes(tmp_path / "1", "one"), "m", "champion")
    assert version.name == "m@1"
    for reference in ("m", "m@champion", "m@1"):
        assert await opened.look_up(reference) == version


@pytest.mark.parametrize("reference", ["ghost", "m@2", "m@candidate", "m@Upper", "a b"])
async def test_what_a_client_may_not_learn(
    opened: Catalogue, tmp_path: Path, reference: str
) -> None:
    await registered(notes(tmp_path / "1", "one"), "m", "champion")
    await registered(notes(tmp_path / "2", "two"), "secret", "champion")
    with pytest.raises(NotFound) as refusal:
        await opened.look_up(reference)
    assert "secret" not in refusal.value.message
    assert refusal.value.param == "model"


async def test_an_adapter_is_answered_with_as_long_as_it_is_published(
    opened: Catalogue, registry: Registry, tmp_path: Path
) -> None:
    for number in (1, 2):
        folder = notes(tmp_path / str(number), f"{number}")
        (folder / catalogue.ADAPTER_FILE).write_text("{}")
        await registered(folder, "poet", *(["champion"] if number == 1 else []))
    for reference in ("poet", "poet@1", "poet@2", "poet@champion"):
        assert (await opened.published_adapter(reference)).name in ("poet@1", "poet@2")
    await registry.remove("poet", "champion", expected=None, by="test")
    for reference in ("poet", "poet@1", "poet@2"):
        with pytest.raises(NotFound):
            await opened.published_adapter(reference)
    assert (await opened.look_up("poet@2")).name == "poet@2", "who tries one before it is published"


async def test_what_is_no_adapter_is_not_fetched_to_see(opened: Catalogue, tmp_path: Path) -> None:
    await registered(notes(tmp_path / "1", "one"), "llm", "champion")
    for reference in ("llm", "llm@1"):
        with pytest.raises(NotFound):
            await opened.published_adapter(reference)


async def test_what_is_archived_is_not_found(
    opened: Catalogue, registry: Registry, tmp_path: Path
) -> None:
    await registered(notes(tmp_path / "1", "one"), "m")
    await registry.transition("m@1", State.ARCHIVED, by="test")
    with pytest.raises(NotFound, match="out of use"):
        await opened.look_up("m@1")


async def test_a_registry_that_comes_back(
    opened: Catalogue, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONTIER_DATABASE", f"sqlite:///{tmp_path / 'file' / 'x' / 'db'}")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((Unavailable, ConfigError)):
        await opened.look_up("m")
    (tmp_path / "file").unlink()
    version = await registered(notes(tmp_path / "1", "one"), "m", "champion")
    assert await opened.look_up("m") == version


def test_where_a_predictor_comes_from(tmp_path: Path) -> None:
    version = register(notes(tmp_path / "1", "one"), "m", "champion")
    named = PredictModel(task="predict", source="registry:m@champion")
    found, folder = located(named)
    assert (found.name, found.content_sha256) == ("m@1", version.artifact)
    assert (folder / "notes.txt").read_text() == "one"

    manifest = artifact.seal(notes(tmp_path / "2", "two"), Facts(name="n", kind="test"))
    local = PredictModel(task="predict", source=str(tmp_path / "2"))
    assert located(local) == (Version(content_sha256=None), tmp_path / "2")
    pinned = local.model_copy(update={"sha256": manifest.content_sha256})
    assert located(pinned)[1] == tmp_path / "2"
    for model in (named, local):
        with pytest.raises(ConfigError, match="expected 0000"):
            located(model.model_copy(update={"sha256": "0" * 64}))


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110  # the registry knows no events
            await asyncio.sleep(0.005)


async def test_what_a_replica_serves_is_written_down(
    opened: Catalogue, registry: Registry, tmp_path: Path
) -> None:
    first = await registered(notes(tmp_path / "1", "one"), "m", "champion")
    second = await registered(notes(tmp_path / "2", "two"), "m")
    serving = [("digits", first), ("plain", Version(content_sha256=None))]
    telling = asyncio.create_task(keep_telling(opened, lambda: serving, replica="r1", every_s=60))

    async def told(reference: str) -> bool:
        uses = (await registry.lineage(reference)).uses
        return [(use.name, use.replica) for use in uses] == [("digits", "r1")]

    await until(lambda: told("m@1"))
    serving[0] = ("digits", second)  # an exchange is told at once, not after every_s
    await until(lambda: told("m@2"))
    telling.cancel()


async def test_nobody_minds_a_registry_that_is_down(
    opened: Catalogue,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = 0

    async def down(self: Catalogue) -> Registry:
        nonlocal calls
        calls += 1
        raise Unavailable("no database")

    monkeypatch.setattr(Catalogue, "registry", down)
    version = Version(name="m@1", content_sha256="a" * 64)
    with caplog.at_level(logging.WARNING):
        telling = asyncio.create_task(
            keep_telling(opened, lambda: [("m", version)], replica="r", every_s=0.002)
        )
        async with asyncio.timeout(30):
            while calls < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    assert not telling.done()
    telling.cancel()
    assert len(caplog.records) == 1
