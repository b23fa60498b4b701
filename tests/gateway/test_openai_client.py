"""The official client, unchanged, against a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from models.errors import InternalError, Overloaded, UpstreamError
from tests.gateway.fakes import World
from tests.gateway.server import LiveServer, wait_until

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: LiveServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: OpenAI, world: World) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=HI,
        max_completion_tokens=10,
        logprobs=True,
        top_logprobs=1,
        stop=["\n"],
        seed=3,
        extra_body={"top_k": 5, "priority": "vip"},
    )
    assert answer.choices[0].message.content == "Hello!"
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.total_tokens == 8
    assert answer._request_id == world.generator.requests[0].id
    assert world.generator.requests[0].sampling.top_k == 5


def test_an_answer_can_be_sent_back(client: OpenAI) -> None:
    said = client.chat.completions.create(model="smollm2", messages=HI).choices[0].message
    again = client.chat.completions.create(
        model="smollm2",
        messages=[*HI, said, {"role": "user", "content": "and?"}],  # type: ignore[list-item]
    )
    assert again.choices[0].finish_reason == "stop"


def test_a_chat_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2", messages=HI, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts = ["", ""]
    usage = None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = usage or chunk.usage
    assert texts == ["Hello!", "Hello!"]
    assert usage is not None
    assert usage.completion_tokens == 6


def test_the_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="smollm2", messages=HI) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "Hello!"


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="smollm2", prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in answer.choices] == ["Hello!", "Hello!"]
    stream = client.completions.create(model="smollm2", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello!"


def test_embeddings(client: OpenAI) -> None:
    # Without a format the client asks for base64 and decodes it.
    answer = client.embeddings.create(model="minilm", input=["one two", "b"])
    assert [entry.embedding for entry in answer.data] == [[7.0, 111.0, 0.5], [1.0, 98.0, 0.5]]
    plain = client.embeddings.create(model="minilm", input="b", encoding_format="float")
    assert plain.data[0].embedding == [1.0, 98.0, 0.5]


def test_models(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["digits", "minilm", "org/model:v1", "smollm2"]
    assert client.models.retrieve("org/model:v1").created == 1_700_000_001


def test_errors_are_the_client_s_own(client: OpenAI, world: World) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="smollm2", messages=HI, temperature=9)
    assert (bad.value.param, bad.value.code) == ("temperature", "INVALID_INPUT")
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    world.generator.error = Overloaded("full", retry_after=1.5)
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model="smollm2", messages=HI)
    assert full.value.code == "OVERLOADED"
    assert full.value.response.headers["retry-after"] == "2"
    world.generator.error = InternalError("broken")
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="smollm2", messages=HI)


def test_a_failure_in_mid_stream_is_raised(client: OpenAI, world: World) -> None:
    world.generator.error, world.generator.error_after = UpstreamError("lost"), 1
    stream = client.chat.completions.create(model="smollm2", messages=HI, stream=True)
    assert next(stream).choices[0].delta.content == "Hel"
    with pytest.raises(openai.APIError, match="lost"):
        next(stream)


def test_leaving_a_stream_frees_its_slot(client: OpenAI, world: World) -> None:
    world.generator.pieces, world.generator.delay_s = ["a"] * 1000, 0.01
    stream = client.chat.completions.create(model="smollm2", messages=HI, stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: world.generator.running == 0)
    assert len(world.generator.cancelled) == 1


async def test_the_async_client(async_client: AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(async_client.chat.completions.create(model="smollm2", messages=HI) for _ in range(8))
    )
    assert {answer.choices[0].message.content for answer in answers} == {"Hello!"}
    stream = await async_client.chat.completions.create(model="smollm2", messages=HI, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello!"
    embedded = await async_client.embeddings.create(model="minilm", input="b")
    assert embedded.usage.prompt_tokens == 1
    assert len([model async for model in async_client.models.list()]) == 4


async def test_a_cancelled_call_frees_its_slot(async_client: AsyncOpenAI, world: World) -> None:
    world.generator.delay_s = 60
    call = asyncio.create_task(async_client.chat.completions.create(model="smollm2", messages=HI))
    while world.generator.running == 0:  # noqa: ASYNC110  # the server runs in another thread
        await asyncio.sleep(0.005)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(wait_until, lambda: world.generator.running == 0)
