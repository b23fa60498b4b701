"""The cache as clients see it: every route, whole and streamed, through the same entry."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from httpx import Response
from openai import OpenAI
from websockets.asyncio.client import connect

from deployments.caching.cache import ResponseCache, opened
from deployments.config import CacheConfig
from deployments.gateway.app import create_app
from deployments.observability.events import CacheAsked
from deployments.tenants.principal import GRANTS, Principal, Role
from models.contracts import Delta, FinishReason, GenerateRequest
from models.errors import Unauthorized, Unavailable, UpstreamError
from state.cache import Bounds, Lenient
from state.cache.memory import MemoryCache
from state.cache.redis import RedisCache
from state.errors import StateUnavailable
from tests.gateway.asgi import BASE, RawCall
from tests.gateway.contract import chunks, events
from tests.gateway.fakes import FakeGenerator, World
from tests.gateway.server import LiveServer
from tests.gateway.test_infer_socket import PATH as SOCKET
from tests.gateway.test_infer_socket import Socket
from tests.servers import free_port

CHAT, COMPLETIONS, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
BOUNDS = Bounds(max_bytes=1_000_000, max_entry_bytes=100_000)


@dataclass
class Clock:
    seconds: float = 1e9

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def world() -> World:
    made = World()
    store = Lenient(MemoryCache(BOUNDS))
    made.cache = ResponseCache(store=store, ttl_s=60, emit=made.recorder, now=Clock())
    return made


def chatting(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": "smollm2", "messages": messages, "temperature": 0, **fields}


def outcome(answer: Response) -> str | None:
    assert answer.status_code == 200, answer.text
    found: str | None = answer.headers.get("x-cache")
    return found


@dataclass
class HeldGenerator(FakeGenerator):
    """Says nothing before it may."""

    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        await self.go.wait()
        async for delta in super().generate(request):
            yield delta


async def until_asked(world: World, times: int) -> None:
    async with asyncio.timeout(20):
        while len(asked(world)) < times:  # noqa: ASYNC110  # events have nobody to tell
            await asyncio.sleep(0.001)


def asked(world: World) -> list[tuple[str, str, int]]:
    return [
        (event.model, event.outcome, event.times)
        for event in world.recorder.events
        if isinstance(event, CacheAsked)
    ]


async def test_a_whole_answer_again(client: httpx.AsyncClient, world: World) -> None:
    first = await client.post(CHAT, json=chatting())
    second = await client.post(CHAT, json=chatting())
    assert (outcome(first), outcome(second)) == ("miss", "hit")
    assert second.json() == first.json() | {"id": second.json()["id"]}
    assert second.json()["id"] != first.json()["id"]
    usage = second.json()["usage"]
    assert usage["total_tokens"] == 8
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}, "the engine's, as it was"
    assert "server-timing" in first.headers
    assert "server-timing" not in second.headers, "no engine has spent any"
    assert len(world.generator.requests) == 1
    assert asked(world) == [("smollm2", "miss", 1), ("smollm2", "hit", 1)]
    computed, found = world.recorder.finished
    assert found.usage == computed.usage is not None


async def test_one_entry_serves_whole_and_streamed(client: httpx.AsyncClient, world: World) -> None:
    streamed = await client.post(
        CHAT, json=chatting(stream=True, stream_options={"include_usage": True})
    )
    whole = await client.post(CHAT, json=chatting())
    again = await client.post(
        CHAT, json=chatting(stream=True, stream_options={"include_usage": True})
    )
    assert [outcome(a) for a in (streamed, whole, again)] == ["miss", "hit", "hit"]
    assert whole.json()["choices"][0]["message"]["content"] == "Hello!"
    told = chunks(again.text)
    assert "".join(c["delta"].get("content", "") for x in told for c in x["choices"]) == "Hello!"
    assert told[0]["choices"][0]["delta"]["role"] == "assistant"
    assert told[-2]["choices"][0]["finish_reason"] == "stop"
    assert told[-1]["usage"] == chunks(streamed.text)[-1]["usage"] == whole.json()["usage"]
    assert again.text.endswith("data: [DONE]\n\n")
    assert len(world.generator.requests) == 1


async def test_our_own_routes(client: httpx.AsyncClient, world: World) -> None:
    body = {"model": "smollm2", "prompt": "hi", "params": {"temperature": 0}}
    first = await client.post("/v1/infer", json=body)
    second = await client.post("/v1/infer/stream", json=body)
    # One user message is the same conversation, whichever route it takes.
    third = await client.post(CHAT, json=chatting())
    assert [outcome(answer) for answer in (first, second, third)] == ["miss", "hit", "hit"]
    told = events(second.text)
    assert told[0] == ("token", {"text": "Hello!"})
    assert told[-1][1]["usage"] == first.json()["data"]["usage"]
    assert told[-1][1]["timings"] is None
    assert len(world.generator.requests) == 1


async def test_logprobs_and_choices(client: httpx.AsyncClient, world: World) -> None:
    body = chatting(n=2, logprobs=True, top_logprobs=2)
    first = await client.post(CHAT, json=body)
    second = await client.post(CHAT, json=body)
    assert outcome(second) == "hit"
    assert second.json()["choices"] == first.json()["choices"]
    assert outcome(await client.post(CHAT, json=chatting(n=2))) == "miss"


async def test_several_prompts_are_told_by_what_took_most_work(
    client: httpx.AsyncClient, world: World
) -> None:
    def body(*prompts: str) -> dict[str, Any]:
        return {"model": "smollm2", "prompt": list(prompts), "temperature": 0}

    outcomes = [
        outcome(await client.post(COMPLETIONS, json=body(*prompts)))
        for prompts in (("a", "b"), ("a", "c"), ("c", "b"), ("d", "d"))
    ]
    assert outcomes == ["miss", "miss", "hit", "miss"]
    assert [request.prompt for request in world.generator.requests] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("fields", [{"temperature": 0.5}, {"temperature": None}])
async def test_what_is_drawn_is_not_cached(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any]
) -> None:
    for _ in range(2):
        assert outcome(await client.post(CHAT, json=chatting(**fields))) is None
    assert len(world.generator.requests) == 2
    for expected in ("miss", "hit"):
        assert outcome(await client.post(CHAT, json=chatting(seed=1, **fields))) == expected


async def test_a_model_without_an_identity_is_not_cached(
    client: httpx.AsyncClient, world: World
) -> None:
    for _ in range(2):
        assert outcome(await client.post(CHAT, json=chatting(model="org/model:v1"))) is None
    assert len(world.generator.requests) == 2


async def test_without_a_cache_nothing_is_said() -> None:
    world = World()
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        for _ in range(2):
            assert outcome(await client.post(CHAT, json=chatting())) is None
    assert len(world.generator.requests) == 2


@pytest.mark.parametrize("path", ["chat", "stream", "embed"])
async def test_cache_control(client: httpx.AsyncClient, world: World, path: str) -> None:
    async def ask(said: str | None) -> tuple[str | None, int]:
        headers = {} if said is None else {"cache-control": said}
        if path == "embed":
            answer = await client.post(
                EMBED, json={"model": "minilm", "input": "a"}, headers=headers
            )
        else:
            answer = await client.post(
                CHAT, json=chatting(stream=path == "stream"), headers=headers
            )
        return outcome(answer), len(world.embedder.calls) + len(world.generator.requests)

    assert await ask("no-store") == (None, 1)
    assert await ask("max-age=60, No-Store") == (None, 2)
    assert await ask("no-cache") == ("miss", 3)
    assert await ask(None) == ("hit", 3)
    assert await ask("max-age=0") == ("miss", 4)
    assert await ask("max-age=60, no-transform") == ("hit", 4)
    assert await ask("no-store") == (None, 5)

    assert world.cache is not None
    assert isinstance(world.cache.now, Clock)
    world.cache.now.seconds += 10
    assert await ask("max-age=10") == ("hit", 5)
    assert await ask("max-age=9") == ("miss", 6)
    assert await ask("max-age=9") == ("hit", 6)
    assert await ask("max-age=30, max-age=soon") == ("miss", 7)
    assert await ask("max-age=-1") == ("miss", 8)
    assert await ask("max-age=" + "9" * 5000) == ("hit", 8)


async def test_failures_are_not_kept_and_say_nothing(
    client: httpx.AsyncClient, world: World
) -> None:
    world.generator.error = UpstreamError("lost")
    failed = await client.post(CHAT, json=chatting())
    assert failed.status_code == 502
    assert "x-cache" not in failed.headers
    world.generator.error_after = 1
    streamed = await client.post(CHAT, json=chatting(stream=True))
    assert chunks(streamed.text)[-1]["error"]["message"] == "lost"
    world.generator.error, world.generator.finish_reason = None, None
    assert (await client.post(CHAT, json=chatting())).status_code == 502, "it stopped short"
    world.generator.finish_reason = FinishReason.STOP
    assert outcome(await client.post(CHAT, json=chatting())) == "miss"


async def test_a_refused_request_says_nothing(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=chatting(temperature=9))
    assert (answer.status_code, answer.headers.get("x-cache")) == (400, None)


# --- together


async def test_identical_requests_are_computed_once(world: World) -> None:
    world.generator = held = HeldGenerator()
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        calls = asyncio.gather(*(client.post(CHAT, json=chatting()) for _ in range(5)))
        await until_asked(world, 5)
        held.go.set()
        answers = await calls
    assert sorted(str(outcome(answer)) for answer in answers) == ["join"] * 4 + ["miss"]
    assert {a.json()["choices"][0]["message"]["content"] for a in answers} == {"Hello!"}
    assert len({answer.json()["id"] for answer in answers}) == 5
    assert len(world.generator.requests) == 1
    assert world.generator.requests[0].timeout_s is None


async def test_who_hangs_up_disturbs_nobody_and_the_last_one_ends_it(world: World) -> None:
    world.generator = FakeGenerator(pieces=["a"] * 1000, delay_s=0.005)
    app = create_app(world.services())
    first, second = (RawCall(app, CHAT, chatting(stream=True)) for _ in range(2))
    await first.until(3)
    await second.until(3)
    first.hang_up()
    await asyncio.wait_for(first.task, 2)
    told = len(second.sent)
    await second.until(told + 3)
    assert world.generator.running == 1
    second.hang_up()
    await asyncio.wait_for(second.task, 2)
    assert world.generator.running == 0
    assert len(world.generator.cancelled) == 1
    assert dict(second.sent[0]["headers"])[b"x-cache"] == b"join"


# --- tenants and adapters


class Keys:
    """Each key is a tenant's name."""

    async def principal(self, credential: str) -> Principal:
        if credential not in ("acme", "zeta"):
            raise Unauthorized("no such key")
        return Principal(
            tenant=credential,
            subject=f"key:{credential}",
            role=Role.DEVELOPER,
            scopes=GRANTS[Role.DEVELOPER],
        )


async def test_tenants_never_share(world: World) -> None:
    world.generator = held = HeldGenerator()
    held.go.set()
    services = replace(world.services(), authenticator=Keys())
    transport = httpx.ASGITransport(create_app(services))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:

        async def ask(tenant: str) -> tuple[str | None, str | None]:
            headers = {"authorization": f"Bearer {tenant}"}
            body = {"model": "minilm", "input": "secret"}
            chat = await client.post(CHAT, json=chatting(), headers=headers)
            return outcome(chat), outcome(await client.post(EMBED, json=body, headers=headers))

        assert await ask("acme") == ("miss", "miss")
        assert await ask("zeta") == ("miss", "miss")
        assert await ask("acme") == ("hit", "hit")
        assert world.cache is not None
        assert await world.cache.store.drop("acme") == 2
        assert await ask("acme") == ("miss", "miss")
        assert await ask("zeta") == ("hit", "hit")
        before = len(asked(world))
        held.go.clear()
        calls = asyncio.gather(
            *(
                client.post(CHAT, json=chatting(seed=5), headers={"x-api-key": tenant})
                for tenant in ("acme", "zeta", "acme")
            )
        )
        await until_asked(world, before + 3)
        held.go.set()
        answers = await calls
        assert [outcome(answer) for answer in answers] == ["miss", "miss", "join"]


async def test_an_adapter_is_cached_by_the_version_it_names_now(
    client: httpx.AsyncClient, world: World
) -> None:
    def ask(name: str) -> Any:
        return client.post(CHAT, json=chatting(model=f"smollm2:{name}"))

    assert outcome(await ask("poet")) is None, "nothing of that name is published"
    world.adapters.add("smollm2", "poet")
    names = ("poet", "poet@champion", "poet@1")
    assert [outcome(await ask(name)) for name in names] == ["miss", "hit", "hit"]
    assert outcome(await client.post(CHAT, json=chatting())) == "miss", "the model without it"

    # The alias moves; replicas follow, some a moment later.
    moved = world.adapters.add("smollm2", "poet")
    world.adapters.found[moved.id] = replace(moved, content_sha256="b" * 64, version="poet@2")
    late = [outcome(await ask("poet")) for _ in range(2)]
    assert late == ["miss", "miss"], "an answer of the old one is not kept as the new one's"
    world.generator.adapter_sha256 = "b" * 64
    assert [outcome(await ask("poet")) for _ in range(2)] == ["miss", "hit"]
    assert outcome(await ask("poet@1")) is None, "out of use"

    await world.adapters.withdraw("smollm2", "poet", by="me")
    assert outcome(await ask("poet")) is None
    for error in (Unavailable("the registry is down"), StateUnavailable("the database, too")):
        world.adapters.error = error
        assert outcome(await ask("poet")) is None


# --- embeddings


async def test_only_inputs_that_are_missing_are_embedded(
    client: httpx.AsyncClient, world: World
) -> None:
    def ask(*inputs: str, **fields: Any) -> Any:
        return client.post(EMBED, json={"model": "minilm", "input": list(inputs), **fields})

    assert outcome(await ask("one two", "b")) == "miss"
    part = await ask("b", "c", "one two")
    assert outcome(part) == "miss"
    assert [text for text, *_ in world.embedder.calls] == ["one two", "b", "c"]
    assert [entry["embedding"][0] for entry in part.json()["data"]] == [1.0, 1.0, 7.0]
    assert part.json()["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    again = await ask("c", "b", encoding_format="base64")
    assert outcome(again) == "hit"
    vectors = [base64.b64decode(entry["embedding"]) for entry in again.json()["data"]]
    assert [struct.unpack("<3f", vector)[1] for vector in vectors] == [99.0, 98.0]
    assert len(world.embedder.calls) == 3
    counts = [("minilm", "miss", 2), ("minilm", "hit", 2), ("minilm", "miss", 1)]
    assert sorted(asked(world)) == sorted([*counts, ("minilm", "hit", 2)])


# --- the whole way


def test_the_official_client(server: LiveServer, world: World) -> None:
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        ask = client.chat.completions.with_raw_response.create
        for expected in ("miss", "hit"):
            raw = ask(model="smollm2", messages=[{"role": "user", "content": "hi"}], temperature=0)
            assert raw.headers["x-cache"] == expected
            assert raw.parse().choices[0].message.content == "Hello!"
        stream = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "hi"}],
            temperature=0,
            stream=True,
        )
        assert "".join(c.choices[0].delta.content or "" for c in stream) == "Hello!"
        for _ in range(2):
            vectors = client.embeddings.create(model="minilm", input=["one two", "b"]).data
            assert vectors[1].embedding == [1.0, 98.0, 0.5]
    assert len(world.generator.requests) == 1
    assert len(world.embedder.calls) == 2


@pytest.mark.parametrize(("said", "computed"), [("max-age=60", 1), ("no-store", 3)])
async def test_a_socket_s_requests_wish_what_its_opening_said(
    server: LiveServer, world: World, said: str, computed: int
) -> None:
    url = server.url.replace("http", "ws") + SOCKET
    async with connect(url, additional_headers={"cache-control": said}) as connection:
        socket = Socket(connection)
        for id_ in "abc":
            await socket.ask(id_, params={"temperature": 0})
            *tokens, (event, data) = await socket.hear_all(id_)
            assert "".join(data["text"] for _, data in tokens) == "Hello!"
            assert (event, data["usage"]["completion_tokens"]) == ("done", 3)
    assert len(world.generator.requests) == computed


async def test_a_cache_that_is_down_is_a_miss(world: World) -> None:
    store = RedisCache(f"redis://127.0.0.1:{free_port()}/0", BOUNDS)
    world.cache = ResponseCache(store=Lenient(store), ttl_s=60, emit=world.recorder)
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        for _ in range(2):
            assert outcome(await client.post(CHAT, json=chatting())) == "miss"
    await store.close()


async def test_it_is_opened_as_configured(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/cache.db"
    assert opened(CacheConfig(), lambda event: None, url) is None, "off, unless wanted"
    config = CacheConfig(enabled=True, ttl_s=5, max_bytes=300, max_entry_bytes=10)
    cache = opened(config, lambda event: None, url)
    assert cache is not None
    await cache.store.put("acme", {"a": b"x" * 11, "b": b"x" * 10}, ttl_s=cache.ttl_s)
    assert await cache.store.get("acme", ["a", "b"]) == [None, b"x" * 10]
    await cache.store.put("acme", {"c": b"x" * 10}, ttl_s=cache.ttl_s)
    assert await cache.store.get("acme", ["b", "c"]) == [None, b"x" * 10]
    await cache.store.close()
