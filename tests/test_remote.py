"""What a lost replica costs, decided without a cluster: stand-ins raise Ray's own errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments import remote
from deployments.gateway.services import EmbedResult
from deployments.remote import RemoteEmbedder, RemoteGenerator, readiness, translate
from models.contracts import NO_USAGE, Delta, GenerateRequest, Place, Standing, Usage
from models.errors import (
    InternalError,
    InvalidInput,
    Overloaded,
    PlatformError,
    Unavailable,
    UpstreamError,
)
from state.errors import StateUnavailable
from state.patience import SERVER_S

Item = Delta | PlatformError | Exception
REQUEST = GenerateRequest(id="r", model="m", prompt=(1,), stream=True)
WHOLE = replace(REQUEST, stream=False)


class Stream:
    """What ``handle.generate.remote`` returns; an exception among its items is raised."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self._items:
            if isinstance(item, Exception) and not isinstance(item, PlatformError):
                raise item
            yield item

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self._whole().__await__()

    async def _whole(self) -> list[Any]:
        return [item async for item in self]

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """One script a call, in order."""

    def __init__(self, *scripts: Any) -> None:
        self.calls = 0
        self._scripts = scripts
        self.streams: list[Stream] = []
        self.generate = SimpleNamespace(remote=self._generate)
        self.answer = SimpleNamespace(remote=self._generate)
        self.embed = SimpleNamespace(remote=self._embed)
        self.tokenize = self.detokenize = self.embed

    def options(self, *, stream: bool) -> Replicas:
        assert stream
        return self

    def _generate(self, request: GenerateRequest) -> Stream:
        self.streams.append(Stream(self._scripts[self.calls]))
        self.calls += 1
        return self.streams[-1]

    async def _embed(self, *_: object) -> Any:
        script = self._scripts[self.calls]
        self.calls += 1
        if isinstance(script, Exception) and not isinstance(script, PlatformError):
            raise script
        return script

    @property
    def handle(self) -> DeploymentHandle:
        return cast("DeploymentHandle", self)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_DELAY_S", 0.0)


class Pending:
    """A call that is answered when somebody sets its future."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self.answer.__await__()

    def cancel(self) -> None:
        self.cancelled = True


async def test_what_nobody_waits_for_any_more_is_cancelled_in_the_replica() -> None:
    calls: list[Pending] = []

    def remote_call(*_: object) -> Pending:
        calls.append(Pending())
        return calls[-1]

    replicas = Replicas()
    replicas.embed = SimpleNamespace(remote=remote_call)
    embedder = RemoteEmbedder("m", replicas.handle, retries=1)
    inputs = ["x"] * (2 * remote.EMBED_CALL_INPUTS)
    leaving = asyncio.create_task(embedder.embed(inputs, Standing()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert [call.cancelled for call in calls] == [True, True]

    failing = asyncio.create_task(embedder.embed(inputs, Standing()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    calls[2].answer.set_result(InvalidInput("bad"))
    with pytest.raises(InvalidInput, match="bad"):
        await failing
    await asyncio.sleep(0)
    assert [call.cancelled for call in calls[2:]] == [False, True]


def generate(
    replicas: Replicas, *, retries: int = 1, request: GenerateRequest = REQUEST
) -> list[Delta]:
    async def collect() -> list[Delta]:
        generator = RemoteGenerator("m", replicas.handle, retries=retries)
        return [delta async for delta in generator.generate(request)]

    return asyncio.run(collect())


def embed(replicas: Replicas, *, retries: int = 1, inputs: int = 1) -> Any:
    embedder = RemoteEmbedder("m", replicas.handle, retries=retries)
    call = embedder.embed(["x"] * inputs, Standing())
    return asyncio.run(call)


def embedded(
    vectors: NDArray[np.float32], tokens: int, answered_by: str | None = None
) -> EmbedResult:
    first, rest = tokens - len(vectors) + 1, len(vectors) - 1
    return EmbedResult(vectors=list(vectors), tokens=[first, *[1] * rest], answered_by=answered_by)


def delta(token: int) -> Delta:
    return Delta(index=0, text=str(token), token_ids=(token,))


def test_a_stream_that_had_not_begun_goes_to_another_replica() -> None:
    replicas = Replicas([ActorDiedError()], [delta(1), delta(2)])
    assert generate(replicas) == [delta(1), delta(2)]


def test_a_stream_that_had_begun_is_not_repeated() -> None:
    replicas = Replicas([delta(1), ActorDiedError()], [delta(1)])
    with pytest.raises(UpstreamError, match="replica of m"):
        generate(replicas, retries=5)
    assert replicas.calls == 1


def test_what_is_not_streamed_has_not_begun_before_it_is_there() -> None:
    replicas = Replicas([delta(1), ActorDiedError()], [delta(1), delta(2)])
    assert generate(replicas, request=WHOLE) == [delta(1), delta(2)]
    assert replicas.calls == 2


def test_what_is_not_streamed_may_end_in_an_error() -> None:
    refusal = InvalidInput("no", param="prompt")
    got: list[Delta] = []

    async def collect() -> None:
        replicas = Replicas([delta(1), refusal])
        async for each in RemoteGenerator("m", replicas.handle, retries=3).generate(WHOLE):
            got.append(each)  # noqa: PERF401  # what came before the error counts

    with pytest.raises(InvalidInput) as caught:
        asyncio.run(collect())
    assert caught.value is refusal
    assert got == [delta(1)]


def test_attempts_are_bounded() -> None:
    replicas = Replicas(*[[ActorDiedError()]] * 9)
    with pytest.raises(UpstreamError):
        generate(replicas, retries=2)
    assert replicas.calls == 3


def test_an_error_that_a_replica_sends_is_raised_as_it_is() -> None:
    refusal = InvalidInput("no", param="prompt")
    replicas = Replicas([refusal])
    with pytest.raises(InvalidInput) as caught:
        generate(replicas, retries=3)
    assert caught.value is refusal
    assert replicas.calls == 1


def test_how_a_model_reads_is_asked_of_any_replica() -> None:
    replicas = Replicas(ActorDiedError(), (1, 2), "Hi", InvalidInput("no", param="tokens"))
    generator = RemoteGenerator("m", replicas.handle, retries=1)
    assert asyncio.run(generator.tokenize("Hi")) == (1, 2)
    assert asyncio.run(generator.detokenize([1, 2])) == "Hi"
    with pytest.raises(InvalidInput, match="no"):
        asyncio.run(generator.detokenize([9]))


def test_a_client_that_leaves_cancels_the_replica() -> None:
    replicas = Replicas([delta(1), delta(2)])

    async def leave() -> None:
        stream = RemoteGenerator("m", replicas.handle, retries=1).generate(REQUEST)
        async for _ in stream:
            break
        await cast("Any", stream).aclose()

    asyncio.run(leave())
    assert replicas.streams[0].cancelled


@pytest.mark.parametrize("request_", [REQUEST, WHOLE], ids=["streamed", "whole"])
def test_a_client_that_does_not_wait_any_longer_cancels_the_replica(
    request_: GenerateRequest,
) -> None:
    class Busy(Stream):
        async def __aiter__(self) -> AsyncIterator[Any]:
            await asyncio.sleep(60)
            yield delta(1)

    async def leave() -> None:
        busy = Busy([])
        replicas = Replicas()
        replicas.generate.remote = replicas.answer.remote = lambda _: busy
        generator = RemoteGenerator("m", replicas.handle, retries=1)
        waiting = asyncio.ensure_future(anext(generator.generate(request_)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert busy.cancelled

    asyncio.run(leave())


def test_a_place_is_no_output() -> None:
    waiting = Delta(place=Place(position=1, waiting=1, wait_s=None))
    replicas = Replicas([waiting, ActorDiedError()], [waiting, delta(1)])
    assert generate(replicas) == [waiting, waiting, delta(1)]


class Telling(Replicas):
    """Each answers a broadcast with what is scripted for it."""

    def __init__(self, *told: Any) -> None:
        super().__init__()
        self._told = told
        self.asked: list[list[str]] = []

    def broadcast(self, method: str, receipts: list[str]) -> Any:
        assert method == "spent"
        self.asked.append(receipts)
        answers = [
            each if isinstance(each, Exception) else [each.get(name) for name in receipts]
            for each in self._told
        ]

        async def results_async(*, timeout_s: float, return_exceptions: bool) -> list[Any]:
            assert return_exceptions
            if any(isinstance(each, TimeoutError) for each in answers):
                raise TimeoutError
            return answers

        return SimpleNamespace(results_async=results_async)


def spent(replicas: Telling, *receipts: str | None) -> list[Usage | None]:
    async def ask() -> list[Usage | None]:
        generator = RemoteGenerator("m", replicas.handle, retries=1)
        asked = [replace(REQUEST, receipt=receipt) for receipt in receipts]
        return await asyncio.gather(*map(generator.spent, asked))

    return asyncio.run(ask())


ONE = Usage(prompt_tokens=1, completion_tokens=2)


def test_all_replicas_are_asked_at_once_for_all_who_leave() -> None:
    replicas = Telling({"a": ONE}, {"b": NO_USAGE}, ActorDiedError())
    assert spent(replicas, "a", "b", "c", None, "a") == [ONE, NO_USAGE, None, None, ONE]
    assert replicas.asked == [["a", "b", "c"]]


def test_what_several_replicas_did_adds_up() -> None:
    replicas = Telling({"a": ONE}, {"a": ONE})
    assert spent(replicas, "a") == [Usage(prompt_tokens=2, completion_tokens=4)]


def test_replicas_that_do_not_answer_tell_nothing() -> None:
    assert spent(Telling(TimeoutError()), "a") == [None]
    assert spent(Telling(ActorDiedError()), "a") == [None]


class Pinged:
    """A handle whose replica answers a ping so."""

    def __init__(self, answer: Callable[[], Awaitable[None]]) -> None:
        self.ping = SimpleNamespace(remote=answer)

    @property
    def handle(self) -> DeploymentHandle:
        return cast("DeploymentHandle", self)


async def test_a_model_that_does_not_answer_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READY_TIMEOUT_S", 0.2)

    async def loads() -> None:
        await asyncio.sleep(60)

    async def fails() -> None:
        raise ActorDiedError

    async def answers() -> None:
        return

    handles = {
        name: Pinged(answer).handle
        for name, answer in {"a": loads, "b": fails, "c": answers}.items()
    }
    assert await readiness(handles, {}) == {
        "a": "it may still be loading: no replica answered within 0 s",
        "b": "its replica failed: ActorDiedError",
        "c": True,
    }


async def test_state_is_red_within_its_time() -> None:
    async def hangs() -> None:
        await asyncio.sleep(60)

    async def fails() -> None:
        raise StateUnavailable("gone")

    async def answers() -> None:
        return

    began = asyncio.get_running_loop().time()
    told = await readiness({}, {"a": hangs, "b": fails, "c": answers})
    assert asyncio.get_running_loop().time() - began < 5
    assert told == {
        "a": f"out of reach: a did not answer within {SERVER_S:g} s",
        "b": "out of reach: gone",
        "c": True,
    }


def test_embedding_goes_to_another_replica() -> None:
    vectors = np.ones((1, 3), np.float32)
    replicas = Replicas(ActorUnavailableError("gone", None), embedded(vectors, 4))
    result = embed(replicas)
    assert np.array_equal(result.vectors, vectors)
    assert result.prompt_tokens == 4


def test_embedding_stops_trying_when_there_is_no_point() -> None:
    replicas = Replicas(RuntimeError("bug"), None)
    with pytest.raises(InternalError):
        embed(replicas, retries=5)
    assert replicas.calls == 1


def test_a_refused_embedding_is_raised() -> None:
    with pytest.raises(InvalidInput):
        embed(Replicas(InvalidInput("no", param="input")))


def test_a_long_list_is_embedded_in_parts_and_keeps_its_order() -> None:
    sizes = (remote.EMBED_CALL_INPUTS, 1)
    parts = [embedded(np.full((size, 2), i, np.float32), size) for i, size in enumerate(sizes)]
    result = embed(Replicas(*parts), inputs=sum(sizes))
    assert [vector[0] for vector in result.vectors] == [0.0] * sizes[0] + [1.0]
    assert result.prompt_tokens == sum(sizes)


def test_what_embedded_is_told_if_all_parts_agree() -> None:
    def ask(*versions: str) -> str | None:
        parts = [embedded(np.ones((1, 2), np.float32), 1, version) for version in versions]
        inputs = 1 + remote.EMBED_CALL_INPUTS * (len(versions) - 1)
        told: EmbedResult = embed(Replicas(*parts), inputs=inputs)
        return told.answered_by

    assert ask("v1") == ask("v1", "v1") == "v1"
    assert ask("v1", "v2") is None, "while versions change"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BackPressureError(num_queued_requests=3, max_queued_requests=2), Overloaded),
        (DeploymentUnavailableError(cast("Any", "m")), Unavailable),
        (ActorDiedError(), UpstreamError),
        (RayTaskError("f", "trace", ActorDiedError()), UpstreamError),
        (RayTaskError("f", "trace", ValueError()), InternalError),
        (ValueError(), InternalError),
    ],
)
def test_errors_of_ray_in_our_own_terms(error: Exception, expected: type[PlatformError]) -> None:
    assert type(translate("m", error)) is expected
