"""The shells without a cluster: a predictor from the registry, exchanged while it is asked."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from ray import serve

from deployments import catalogue, replicas
from deployments.caching.identity import identity
from deployments.config import EmbedModel, PredictModel
from deployments.engines.pointer import Version as Located
from deployments.gateway.services import EmbedResult
from deployments.observability.events import BatchFailed, Event, discard, fan_out
from deployments.observability.logs import log_failures
from deployments.replicas import PredictorReplica
from models import artifact
from models.artifact import Facts, Manifest
from models.contracts import Json, Standing
from models.errors import InternalError, InvalidInput, NotFound, PlatformError
from models.registry import open_registry
from models.store import Store
from models.versions import Version
from tests.log_lines import LogLines

LOADER = "models.predictors.made_up:load"
RHYTHM = {"refresh_s": 0.02, "heartbeat_s": 60}


class Scale:
    """Multiplies; refuses what is no number."""

    def __init__(self, folder: Path) -> None:
        self.factor = int((folder / "factor.txt").read_text())

    def predict_batch(self, inputs: Sequence[Json]) -> Sequence[Json]:
        self.threads = torch.get_num_threads()
        for index, value in enumerate(inputs):
            if value == "ann@example.org":
                raise ZeroDivisionError(f"a bug met by {value}")
            if not isinstance(value, int):
                raise InvalidInput("it is no number.", details={"index": index})
        return [self.factor * cast("int", value) for value in inputs]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home, a loader where loaders live, and no Ray around the shell."""
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    module = ModuleType("models.predictors.made_up")
    module.load = Scale  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(replicas, "_observers", lambda: discard)
    monkeypatch.setattr(replicas, "_replica", lambda: "r1")
    monkeypatch.setattr(catalogue, "FIRST_BEAT_S", 0.01)


def sealed(folder: Path, factor: int) -> Manifest:
    folder.mkdir()
    (folder / "factor.txt").write_text(str(factor))
    return artifact.seal(folder, Facts(name="scale", kind="scale", loader=LOADER))


async def add(folder: Path, factor: int, *aliases: str) -> Version:
    """A version of ``scale``, and aliases that point at it."""
    manifest = sealed(folder, factor)
    async with open_registry() as registry:
        version = await registry.register(manifest, Store().publish(folder), by="test")
        for alias in aliases:
            await registry.promote(str(version), alias, expected=None, by="t", approve=True)
    return version


def replica(**fields: Any) -> PredictorReplica:
    model = {"task": "predict", "source": "registry:scale@champion", **fields}
    config = PredictModel.model_validate(model).model_dump(mode="json")
    return PredictorReplica("scale", config, RHYTHM)


async def ask(replica: PredictorReplica, *inputs: Json) -> Any:
    return await replica.predict(list(inputs), Standing(timeout_s=5.0))


async def stop(replica: PredictorReplica) -> None:
    for task in replica._tasks:
        task.cancel()
    await asyncio.gather(*replica._tasks, return_exceptions=True)
    await replica._catalogue.close()


async def test_predictions_in_order_with_their_version(tmp_path: Path) -> None:
    await add(tmp_path / "2", 2, "champion")
    shell = replica()
    shell.reconfigure({"max_batch_size": 3, "max_wait_s": 0.0})
    assert await ask(shell, *range(10)) == ([2 * i for i in range(10)], "scale@1")
    await stop(shell)


async def test_the_input_at_fault_is_named(tmp_path: Path) -> None:
    await add(tmp_path / "2", 2, "champion")
    shell = replica(batcher={"max_batch_size": 2})
    refusal = await ask(shell, 1, 2, 3, "four", 5)
    assert isinstance(refusal, InvalidInput)
    assert refusal.message == "input 3: it is no number."
    assert (refusal.param, refusal.details) == ("inputs[3]", {"index": 3})
    assert (await ask(shell, 1))[0] == [2]
    await stop(shell)


async def test_a_folder_has_no_versions(tmp_path: Path) -> None:
    await add(tmp_path / "2", 2)
    shell = replica(source=str(tmp_path / "2"))
    assert await ask(shell, 1) == ([2], None)
    assert shell._tasks == []


async def test_an_alias_moves_under_load_and_no_request_fails(tmp_path: Path) -> None:
    await add(tmp_path / "2", 2, "champion")
    shell = replica()
    answers: list[Any] = []
    enough = asyncio.Event()

    async def client() -> None:
        while not enough.is_set():
            answers.append(await ask(shell, 1, 1, 1))
            await asyncio.sleep(0)

    clients = [asyncio.create_task(client()) for _ in range(4)]
    await asyncio.sleep(0.05)
    await add(tmp_path / "3", 3, "champion")
    async with asyncio.timeout(30):
        while not answers or answers[-1][1] != "scale@2":  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)
    enough.set()
    await asyncio.gather(*clients)
    assert not [answer for answer in answers if isinstance(answer, PlatformError)]
    assert {(tuple(outputs), version) for outputs, version in answers} == {
        ((2, 2, 2), "scale@1"),
        ((3, 3, 3), "scale@2"),
    }
    await stop(shell)


async def test_a_pinned_hash_does_not_follow(tmp_path: Path) -> None:
    first = await add(tmp_path / "2", 2, "champion")
    shell = replica(sha256=first.artifact)
    await add(tmp_path / "3", 3, "champion")
    await asyncio.sleep(0.1)
    assert await ask(shell, 1) == ([2], "scale@1")
    await stop(shell)


async def test_it_is_written_down_who_serves(tmp_path: Path) -> None:
    await add(tmp_path / "2", 2, "champion")
    shell = replica()
    async with asyncio.timeout(30), open_registry() as registry:
        while not (uses := (await registry.lineage("scale@1")).uses):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert [(use.name, use.replica) for use in uses] == [("scale", "r1")]
    await stop(shell)


async def test_what_is_not_there_stops_the_start() -> None:
    with pytest.raises(NotFound, match="no model scale"):
        replica()


class Lengths:
    """Embeds a text as its length."""

    def predict_batch(self, inputs: Sequence[Json]) -> Sequence[Json]:
        embedded = [
            {"embedding": np.array([len(str(text)), 1], np.float32), "tokens": len(str(text))}
            for text in inputs
        ]
        return cast("list[Json]", embedded)


@pytest.mark.parametrize("sha256", [None, "ab" * 32])
async def test_vectors_say_exactly_what_they_are_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sha256: str | None
) -> None:
    monkeypatch.setattr(replicas, "located", lambda model: (Located(content_sha256=None), tmp_path))
    monkeypatch.setattr(replicas, "_predictor", lambda model, folder: Lengths())
    model = EmbedModel(task="embed", source=str(tmp_path), sha256=sha256)
    shell = PredictorReplica("lengths", model.model_dump(mode="json"), RHYTHM)
    result = await shell.embed(["a", "bcd"], Standing(timeout_s=5.0))
    assert isinstance(result, EmbedResult)
    assert np.array_equal(np.asarray(result.vectors), [[1, 1], [3, 1]])
    assert (result.tokens, result.prompt_tokens) == ([1, 3], 4)
    assert result.answered_by == identity(model), "the gateway reckons the same"
    assert (result.answered_by is None) == (sha256 is None)
    await stop(shell)


@pytest.mark.parametrize("kind", ["queue", "serve"])
async def test_a_bug_is_told_as_a_value(
    kind: str, tmp_path: Path, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised, it would be logged by Serve, with all that it says."""
    events: list[Event] = []
    room = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=100))
    monkeypatch.setattr(serve, "get_replica_context", lambda: room)
    monkeypatch.setattr(replicas, "_observers", lambda: fan_out(events.append, log_failures))
    await add(tmp_path / "2", 2, "champion")
    shell = replica(batcher={"kind": kind, "max_batch_size": 4, "max_wait_s": 0.01})
    shell.reconfigure({"max_batch_size": 4, "max_wait_s": 0.01})
    told = await ask(shell, 1, "ann@example.org")
    assert isinstance(told, InternalError)
    assert "failed on the batch" in told.message
    assert await ask(shell, 1) == ([2], "scale@1")
    [failed] = [event for event in events if isinstance(event, BatchFailed)]
    assert (failed.rows, failed.model) == (2, "scale")
    [line] = log.lines
    assert line["message"] == "a batch of 2 failed: ZeroDivisionError: a bug met by [EMAIL]"
    await stop(shell)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize(
    ("fields", "threads"),
    [
        ({"replicas": {"cpus": 2.5}}, 2),
        ({"replicas": {"cpus": 0}}, 1),
        ({}, 1),
        ({"threads": 3, "replicas": {"cpus": 1}}, 3),
    ],
)
async def test_torch_has_as_many_threads_as_the_replica_has_processors(
    tmp_path: Path, fields: dict[str, Any], threads: int
) -> None:
    torch.set_num_threads(5)
    await add(tmp_path / "2", 2, "champion")
    shell = replica(**fields)
    assert await ask(shell, 1) == ([2], "scale@1")
    scale = shell._following._pointer.value.batching._predictor  # type: ignore[attr-defined]
    assert scale.threads == threads, "where it computes"
    await stop(shell)
