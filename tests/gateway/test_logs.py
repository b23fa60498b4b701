"""Whatever is logged on behalf of a request says whose and which it was (spec A11, C9)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from deployments.config import EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from deployments.engines.text import TextStream
from deployments.gateway.app import create_app
from models.contracts import Delta, GenerateRequest
from tests import tiny_models
from tests.attacks.dial import Dial
from tests.engines.clients import until
from tests.engines.gate import Failure, Gate
from tests.gateway.asgi import BASE
from tests.gateway.fakes import FakeGenerator, World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting
from tests.gateway.test_engine_metering import KEY, Metered
from tests.gateway.test_infer import PATH as INFER
from tests.gateway.test_infer import asking as inferring
from tests.gateway.test_quotas import Acme
from tests.log_lines import LogLines

SOCKET = "/v1/infer/ws"


class Talkative(FakeGenerator):
    """Logs as any code might that knows nothing of requests."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        logging.getLogger("deployments.anything").warning("about %s", request.id)
        async for delta in super().generate(request):
            yield delta


@pytest.fixture
def world() -> World:
    return World(authenticator=Acme(), generator=Talkative(delay_s=0.001))


@asynccontextmanager
async def client_of(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=KEY) as client:
        yield client


async def test_a_line_of_a_handler_names_its_request(world: World, log: LogLines) -> None:
    """Of many at a time, in tasks of their own."""
    async with client_of(create_app(world.services())) as client:

        async def ask(number: int) -> None:
            path = (CHAT, INFER, f"{INFER}/stream")[number % 3]
            body = chatting(stream=number % 2 == 0) if path == CHAT else inferring()
            answer = await client.post(path, json=body, headers={"x-request-id": f"r{number}"})
            assert answer.status_code == 200

        await asyncio.gather(*(ask(number) for number in range(30)))
    assert len(log.lines) == 30
    for line in log.lines:
        assert line["message"] == f"about {line['request_id']}"
        assert (line["tenant"], line["model"]) == ("acme", "smollm2")
    assert {line["request_id"] for line in log.lines} == {f"r{number}" for number in range(30)}
    logging.getLogger("deployments").warning("afterwards")
    assert "request_id" not in log.lines[-1]


async def test_requests_on_one_socket_are_told_apart(world: World, log: LogLines) -> None:
    app = create_app(world.services())
    async with Dial(app, SOCKET, {"x-request-id": "conn", **KEY}) as socket:
        for id_ in ("a", "b"):
            await socket.say({"type": "infer", "id": id_, "model": "smollm2", "prompt": "hi"})
        ended = 0
        while ended < 2:
            ended += (await socket.hear())["event"] == "done"
    told = {(line["message"], line["request_id"], line["tenant"]) for line in log.lines}
    assert told == {("about conn.a", "conn.a", "acme"), ("about conn.b", "conn.b", "acme")}


@pytest.mark.parametrize("path", [CHAT, INFER, SOCKET])
async def test_an_error_that_nobody_foresaw_names_the_tenant(
    world: World, log: LogLines, path: str
) -> None:
    world.generator.error = ZeroDivisionError("a bug")
    app, headers = create_app(world.services()), {"x-request-id": "r1", **KEY}
    if path == SOCKET:
        async with Dial(app, SOCKET, headers) as socket:
            await socket.say({"type": "infer", "id": "a", "model": "smollm2", "prompt": "hi"})
            assert (await socket.hear())["event"] == "error"
    else:
        body = chatting() if path == CHAT else inferring()
        async with client_of(app) as client:
            assert (await client.post(path, json=body, headers=headers)).status_code == 500
    [line] = [line for line in log.lines if "exception" in line]
    assert line["logger"] == "deployments.gateway.errors"
    assert line["exception"].endswith("ZeroDivisionError: a bug\n")
    named = {"request_id": "r1.a" if path == SOCKET else "r1", "tenant": "acme", "model": "smollm2"}
    assert line.items() >= named.items()


# --- what the engine's own thread logs ------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine("tiny", folder, EngineConfig(slots=4, threads=1), QueueConfig())
    yield engine
    engine.close()


def completing(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True, **fields}


async def test_a_sequence_that_fails(
    engine: Engine, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TextStream, token: int) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(TextStream, "push", broken)
    async with Metered(engine).client() as client:
        headers = {"x-request-id": "r1"}
        answer = await client.post("/v1/completions", json=completing(), headers=headers)
    assert answer.status_code == 500
    [line] = [line for line in log.lines if "exception" in line]
    assert line["message"] == "sequence of request r1 failed"
    named = {"request_id": "r1", "tenant": "acme", "model": "tiny"}
    assert line.items() >= named.items()


async def test_a_step_that_fails_names_all_its_requests(engine: Engine, log: LogLines) -> None:
    gate, failure = Gate(engine), Failure(engine)
    failure.on = True
    async with Metered(engine).client() as client:

        async def ask(id_: str) -> int:
            headers = {"x-request-id": id_}
            body = completing(prompt=id_)
            return (await client.post("/v1/completions", json=body, headers=headers)).status_code

        first = asyncio.create_task(ask("r0"))
        await gate.entered()
        others = [asyncio.create_task(ask(id_)) for id_ in ("r1", "r2")]
        await until(lambda: len(engine._scheduler.queue) == 2)
        gate.open()
        assert await asyncio.gather(first, *others) == [500] * 3
    told = [line["message"] for line in log.lines if "exception" in line]
    assert told == ["step with 1 requests failed: r0", "step with 2 requests failed: r1, r2"]
