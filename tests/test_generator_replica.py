"""The engine's shell without a cluster: adapters from the registry, by name and by alias."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments import catalogue, replicas
from deployments.caching.identity import identity, with_adapter
from deployments.catalogue import Catalogue
from deployments.config import GenerateModel
from deployments.observability.events import Event, GenerationFinished, discard
from deployments.replicas import GeneratorReplica
from models import artifact
from models.artifact import Facts
from models.contracts import Delta, GenerateRequest, Sampling, Versions
from models.errors import InternalError, InvalidInput, NotFound, PlatformError, Unavailable
from models.registry import Registry, open_registry
from models.sources.folder import sha256_weights
from models.store import Store
from models.versions import Version
from tests import tiny_models
from tests.engines import adapters
from tests.log_lines import LogLines

REFRESH_S = 0.02


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that change every answer, each its own way."""
    folder = tmp_path_factory.mktemp("adapters")
    recipe: dict[str, Any] = {"target_modules": adapters.LAYERS["llama"], "r": 4, "lora_alpha": 32}
    return [adapters.make(base, folder / str(n), seed=n, **recipe) for n in (1, 2)]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(replicas, "_observers", lambda: discard)
    monkeypatch.setattr(replicas, "_replica", lambda: "r1")
    monkeypatch.setattr(catalogue, "FIRST_BEAT_S", 0.01)


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    async with open_registry() as opened:
        yield opened


@pytest.fixture
async def shell(base: Path) -> AsyncIterator[GeneratorReplica]:
    model = {"task": "generate", "source": str(base), "engine": {"slots": 4, "threads": 1}}
    config = GenerateModel.model_validate(model).model_dump(mode="json")
    shell = GeneratorReplica("tiny", config, {"refresh_s": REFRESH_S, "heartbeat_s": 60})
    yield shell
    await stop(shell)


async def stop(shell: GeneratorReplica) -> None:
    with suppress(Unavailable):
        await shell._catalogue.registry()  # one that is just being opened could not be closed
    for task in shell._tasks:
        task.cancel()
    await asyncio.gather(*shell._tasks, return_exceptions=True)
    await shell._catalogue.close()


async def add(
    registry: Registry, folder: Path, copy: Path, *aliases: str, name: str = "poet"
) -> Version:
    """Seal a copy of an adapter, register it, and point aliases at it."""
    shutil.copytree(folder, copy)
    manifest = artifact.seal(copy, Facts(name=name, kind="causal-lm"))
    version = await registry.register(manifest, Store().publish(copy), by="test")
    for alias in aliases:
        await registry.promote(str(version), alias, expected=None, by="test", approve=True)
    return version


async def ask(shell: GeneratorReplica, adapter: str | None) -> str | PlatformError:
    """The whole answer, or what went wrong."""
    request = GenerateRequest(
        id="r",
        model="tiny",
        prompt="Hello",
        adapter=adapter,
        sampling=Sampling(max_tokens=8, temperature=0, ignore_eos=True),
    )
    text = ""
    for item in await shell.answer(request):
        if isinstance(item, PlatformError):
            return item
        text += item.text
    return text


async def until(shell: GeneratorReplica, adapter: str, answer: object) -> None:
    async with asyncio.timeout(30):
        while (await ask(shell, adapter)) != answer:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)


async def test_adapters_by_name_alias_and_number(
    shell: GeneratorReplica, registry: Registry, made: list[Path], tmp_path: Path
) -> None:
    await add(registry, made[0], tmp_path / "1", "champion")
    await add(registry, made[1], tmp_path / "2", "candidate")
    plain, first, second = [await ask(shell, a) for a in (None, "poet", "poet@candidate")]
    assert len({plain, first, second}) == 3
    assert await ask(shell, "poet@champion") == await ask(shell, "poet@1") == first
    assert await ask(shell, "poet@2") == second
    names = {adapter.name for adapter in shell._engine.adapters()}
    assert names == {"poet@1", "poet@2"}, "however it is called, a version is loaded once"


async def test_it_tells_how_its_engine_reads(shell: GeneratorReplica) -> None:
    read = await shell.tokenize("Hello")
    assert not isinstance(read, PlatformError)
    assert await shell.detokenize(read) == "Hello"
    wrong = await shell.detokenize([10**6])
    assert isinstance(wrong, InvalidInput)
    assert isinstance(await shell.tokenize((10**6,)), InvalidInput)


async def test_an_answer_that_is_whole_is_told_of_once(shell: GeneratorReplica) -> None:
    told: list[Event] = []
    shell._emit = told.append
    assert isinstance(await ask(shell, "absent"), NotFound)
    assert not told
    await ask(shell, None)
    [event] = told
    assert isinstance(event, GenerationFinished)
    assert (event.request_id, event.usage.completion_tokens) == ("r", 8)
    assert 0 < event.timings.ttft_s <= event.timings.total_s


async def test_a_moved_alias_under_load(
    shell: GeneratorReplica, registry: Registry, made: list[Path], tmp_path: Path
) -> None:
    await add(registry, made[0], tmp_path / "1", "champion")
    await add(registry, made[1], tmp_path / "2")
    before, after = await ask(shell, "poet@1"), await ask(shell, "poet@2")
    answers: list[str | PlatformError] = []
    enough = asyncio.Event()

    async def client() -> None:
        while not enough.is_set():
            answers.append(await ask(shell, "poet"))

    clients = [asyncio.create_task(client()) for _ in range(3)]
    await asyncio.sleep(0.1)
    await registry.promote("poet@2", "champion", expected=None, by="test", approve=True)
    async with asyncio.timeout(30):
        while answers[-1:] != [after]:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)
    enough.set()
    await asyncio.gather(*clients)
    assert set(answers) == {before, after}


async def test_what_is_withdrawn_is_no_longer_answered(
    shell: GeneratorReplica, registry: Registry, made: list[Path], tmp_path: Path
) -> None:
    await add(registry, made[0], tmp_path / "1", "champion")
    assert isinstance(await ask(shell, "poet"), str)
    await registry.remove("poet", "champion", expected=None, by="test")
    async with asyncio.timeout(30):
        while not isinstance(await ask(shell, "poet"), NotFound):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while shell._engine.adapters():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_registry_that_goes_away_is_not_missed(
    shell: GeneratorReplica,
    registry: Registry,
    made: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await add(registry, made[0], tmp_path / "1", "champion")
    answer = await ask(shell, "poet")

    async def down(self: Catalogue) -> Registry:
        raise Unavailable("no database")

    monkeypatch.setattr(Catalogue, "registry", down)
    await asyncio.sleep(5 * REFRESH_S)
    assert await ask(shell, "poet") == answer
    assert isinstance(await ask(shell, "bard"), Unavailable)
    assert isinstance(await ask(shell, None), str)


async def test_what_is_no_adapter(
    shell: GeneratorReplica, registry: Registry, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    await asyncio.to_thread(notes.mkdir)
    await asyncio.to_thread((notes / "notes.txt").write_text, "no adapter")
    await add(registry, notes, tmp_path / "1", "champion", name="digits")
    assert isinstance(await ask(shell, "digits"), NotFound), "and nobody fetches it to see"
    assert isinstance(await shell.try_adapter("digits@1"), InvalidInput)
    assert isinstance(await shell.try_adapter("ghost@1"), NotFound)
    assert isinstance(await ask(shell, "ghost"), NotFound)


async def test_what_was_tried_on_does_not_stay(
    shell: GeneratorReplica, registry: Registry, made: list[Path], tmp_path: Path
) -> None:
    await add(registry, made[0], tmp_path / "1")
    assert await shell.try_adapter("poet@1") is None
    async with asyncio.timeout(30):
        while shell._engine.adapters():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_it_is_written_down_who_serves(
    shell: GeneratorReplica, registry: Registry, made: list[Path], tmp_path: Path
) -> None:
    await add(registry, made[0], tmp_path / "1", "champion")
    await ask(shell, "poet")
    async with asyncio.timeout(30):
        while not (uses := (await registry.lineage("poet")).uses):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert [(use.name, use.replica) for use in uses] == [("tiny:poet@1", "r1")]


async def versions(shell: GeneratorReplica, adapter: str | None) -> list[Versions | None]:
    """What each delta of a streamed answer says of it, and then of a whole one."""
    sampling = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
    request = GenerateRequest(
        id="r", model="tiny", prompt="Hello", adapter=adapter, sampling=sampling, stream=True
    )
    items = [item async for item in shell.generate(request)]
    items += await shell.answer(replace(request, id="s", stream=False))
    return [item.versions for item in items if isinstance(item, Delta)]


async def test_an_answer_begins_with_the_versions_that_give_it(
    shell: GeneratorReplica, registry: Registry, made: list[Path], tmp_path: Path
) -> None:
    await add(registry, made[0], tmp_path / "1")
    await add(registry, made[1], tmp_path / "2", "champion")
    for adapter, called in ((None, None), ("poet", "poet@2"), ("poet@1", "poet@1")):
        first, *others, whole = await versions(shell, adapter)
        assert first == whole == Versions(model=None, adapter=called), "a folder has no version"
        assert set(others) <= {None}
    shell._called = "chat@7"
    assert (await versions(shell, None))[0] == Versions(model="chat@7")


async def answered_by(shell: GeneratorReplica, adapter: str | None) -> list[str | None]:
    """What each delta of an answer says of it."""
    sampling = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
    request = GenerateRequest(
        id="r", model="tiny", prompt="Hello", adapter=adapter, sampling=sampling, stream=True
    )
    return [item.answered_by async for item in shell.generate(request) if isinstance(item, Delta)]


async def test_an_answer_says_exactly_what_it_is_from(
    base: Path, registry: Registry, made: list[Path], tmp_path: Path
) -> None:
    sha256 = sha256_weights(sorted(base.glob("*.safetensors")))  # noqa: ASYNC240
    model = GenerateModel.model_validate(
        {"task": "generate", "source": str(base), "sha256": sha256, "engine": {"threads": 1}}
    )
    rhythm = {"refresh_s": REFRESH_S, "heartbeat_s": 60}
    pinned = GeneratorReplica("tiny", model.model_dump(mode="json"), rhythm)
    version = await add(registry, made[0], tmp_path / "1", "champion")
    plain, poet = [await answered_by(pinned, adapter) for adapter in (None, "poet")]
    mine = identity(model)
    assert mine is not None
    assert plain == [None] * (len(plain) - 1) + [mine], "the gateway reckons the same"
    assert poet[-1] == with_adapter(mine, version.artifact)
    await stop(pinned)


async def test_an_answer_of_what_may_change_unnoticed_says_nothing(
    shell: GeneratorReplica, registry: Registry, made: list[Path], tmp_path: Path
) -> None:
    await add(registry, made[0], tmp_path / "1", "champion")
    assert set(await answered_by(shell, None)) == {None}
    assert set(await answered_by(shell, "poet")) == {None}


async def test_a_bug_is_told_as_a_value_and_logged_for_its_request(
    shell: GeneratorReplica, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised, it would be logged by Serve as well, with all that it says."""

    async def broken(self: Catalogue, reference: str) -> Version:
        raise ZeroDivisionError("a bug met by ann@example.org")

    monkeypatch.setattr(Catalogue, "look_up", broken)
    told = await ask(shell, "poet")
    assert isinstance(told, InternalError)
    assert "ann" not in told.message
    assert isinstance(await shell.try_adapter("poet@1"), InternalError)
    [first, _] = [line for line in log.lines if "exception" in line]
    assert first["exception"].endswith("ZeroDivisionError: a bug met by [EMAIL]\n")
    assert (first["request_id"], first["tenant"], first["model"]) == ("r", "public", "tiny")


@pytest.mark.parametrize(
    ("engine", "cpus", "threads"),
    [({}, 2.5, 2), ({}, 1, 1), ({}, 0.5, 1), ({"threads": 3}, 1, 3)],
)
async def test_torch_has_as_many_threads_as_the_replica_has_processors(
    base: Path, engine: dict[str, int], cpus: float, threads: int
) -> None:
    model = {
        "task": "generate",
        "source": str(base),
        "engine": {"slots": 4, **engine},
        "replicas": {"cpus": cpus},
    }
    config = GenerateModel.model_validate(model).model_dump(mode="json")
    shell = GeneratorReplica("tiny", config, {"refresh_s": REFRESH_S, "heartbeat_s": 60})
    found: list[int] = []
    shell._engine._runner.model.get_input_embeddings().register_forward_pre_hook(
        lambda *_: found.append(torch.get_num_threads())
    )
    assert isinstance(await ask(shell, None), str)
    assert set(found) == {threads}, "where it computes"
    await stop(shell)
