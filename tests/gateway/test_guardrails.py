"""The guardrails on every route: what goes in, what comes out, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from deployments.config import GatewayConfig, GuardrailsConfig, PlanConfig
from deployments.gateway.app import create_app
from deployments.gateway.exchange import Exchange
from deployments.gateway.generation import Generation, collect
from deployments.tenants.principal import GRANTS, Principal, Role
from models.contracts import ChatMessage, Conversation, Priority, Sampling
from models.errors import InvalidInput
from tests.gateway.asgi import BASE
from tests.gateway.contract import chunks, data_lines, events
from tests.gateway.fakes import World
from tests.gateway.server import LiveServer
from tests.gateway.test_infer_socket import Socket

SECRET = "4111 1111 1111 1111"
GUARDRAILS: dict[str, Any] = {
    "max_prompt_chars": 60,
    "categories": {"plans": {"words": ["red flag"]}},
    "pii": {
        "email": {"input": "mask", "output": "mask"},
        "card": {"input": "refuse", "output": "refuse"},
    },
}
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
INFER, STREAM, PREDICT = "/v1/infer", "/v1/infer/stream", "/v1/models/digits/predict"


def body(path: str, text: str, **fields: Any) -> dict[str, Any]:
    match path:
        case "/v1/chat/completions":
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        case "/v1/embeddings":
            return {"model": "minilm", "input": [text], **fields}
        case "/v1/models/digits/predict":
            return {"inputs": [{"text": text}], **fields}
        case _:
            asked = {"prompt": text}
    return {"model": "smollm2", **asked, **fields}


def seen(world: World) -> list[Any]:
    """What the workers were asked."""
    return [
        *(
            prompt.messages[0].content if isinstance(prompt, Conversation) else prompt
            for prompt in (request.prompt for request in world.generator.requests)
            if not isinstance(prompt, tuple)
        ),
        *(text for text, *_ in world.embedder.calls),
        *(inputs[0]["text"] for inputs, *_ in world.predictor.calls),  # type: ignore[call-overload, index]
    ]


@pytest.fixture
def world() -> World:
    return World(config=GatewayConfig(guardrails=GuardrailsConfig.model_validate(GUARDRAILS)))


@asynccontextmanager
async def a_client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(world.services()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        yield client


EVERYWHERE = pytest.mark.parametrize(
    "path", [CHAT, COMPLETIONS, INFER, STREAM, EMBEDDINGS, PREDICT]
)


@EVERYWHERE
async def test_input_is_masked(client: httpx.AsyncClient, world: World, path: str) -> None:
    answer = await client.post(path, json=body(path, "Write to a@b.co now"))
    assert answer.status_code == 200
    assert seen(world) == ["Write to [EMAIL] now"]


@EVERYWHERE
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"My card is {SECRET}.", "'pii' found the category 'card'"),
        ("Raise a RED  FLAG", "'blocked' found the category 'plans'"),
        ("x" * 61, "has 61 characters; 60 are allowed"),
    ],
)
async def test_input_is_refused(
    client: httpx.AsyncClient,
    world: World,
    path: str,
    text: str,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = await client.post(path, json=body(path, text))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "INVALID_INPUT")
    assert words in error["message"]
    assert seen(world) == []
    assert SECRET not in answer.text + caplog.text
    assert world.recorder.finished[0].code == "INVALID_INPUT"


@pytest.mark.parametrize("path", [INFER, STREAM])
async def test_a_refusal_says_which_guardrail_in_its_details(
    client: httpx.AsyncClient, path: str
) -> None:
    answer = await client.post(path, json=body(path, f"My card is {SECRET}."))
    named = {"guardrail": "pii", "category": "card", "param": "prompt"}
    assert answer.json()["error"]["details"] == named


async def test_the_input_at_fault_is_named(client: httpx.AsyncClient) -> None:
    rows = [{"text": "fine"}, {"text": SECRET}]
    answer = await client.post(PREDICT, json={"inputs": rows})
    assert answer.json()["error"]["details"]["param"] == "inputs[1]"
    answer = await client.post(EMBEDDINGS, json={"model": "minilm", "input": SECRET})
    assert answer.json()["error"]["param"] == "input"


async def test_token_ids_are_refused(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post(COMPLETIONS, json={"model": "smollm2", "prompt": [1, 2]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert world.generator.requests == []


async def test_one_prompt_of_a_batch_refuses_it(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post(
        COMPLETIONS, json={"model": "smollm2", "prompt": ["fine", f"card {SECRET}"]}
    )
    assert answer.status_code == 400
    assert world.generator.requests == []


PIECES = ("Ask ja", "ne@exam", "ple", ".org, not j", "oe@x.org")
SHOWN = "Ask [EMAIL], not [EMAIL]"


@pytest.mark.parametrize(
    ("path", "text_of"),
    [
        (CHAT, lambda answer: answer["choices"][0]["message"]["content"]),
        (COMPLETIONS, lambda answer: answer["choices"][0]["text"]),
        (INFER, lambda answer: answer["data"]["output"]),
    ],
)
async def test_a_whole_answer_is_masked(
    client: httpx.AsyncClient, world: World, path: str, text_of: Any
) -> None:
    world.generator.pieces = PIECES
    answer = await client.post(path, json=body(path, "?"))
    assert text_of(answer.json()) == SHOWN


@pytest.mark.parametrize(
    ("path", "text_of"),
    [
        (CHAT, lambda choice: choice["delta"].get("content") or ""),
        (COMPLETIONS, lambda choice: choice["text"]),
    ],
)
async def test_a_stream_is_masked_across_its_chunks(
    client: httpx.AsyncClient, world: World, path: str, text_of: Any
) -> None:
    world.generator.pieces, world.generator.delay_s = PIECES, 0.001
    answer = await client.post(path, json=body(path, "?", stream=True, n=2))
    for index in (0, 1):
        told = [chunk["choices"][0] for chunk in chunks(answer.text)]
        mine = [choice for choice in told if choice["index"] == index]
        assert "".join(map(text_of, mine)) == SHOWN
        assert [choice["finish_reason"] for choice in mine][-1] == "stop"
        assert len(mine) > 2  # it did flow
    assert data_lines(answer.text)[-1] == "[DONE]"


async def test_our_own_stream_is_masked(client: httpx.AsyncClient, world: World) -> None:
    world.generator.pieces = PIECES
    answer = await client.post(STREAM, json=body(STREAM, "?"))
    *tokens, (last, done) = events(answer.text)
    assert "".join(data["text"] for _, data in tokens) == SHOWN
    assert (last, done["finish_reason"]) == ("done", "stop")
    assert done["usage"]["completion_tokens"] == len(PIECES)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, INFER])
async def test_a_whole_answer_is_refused(
    client: httpx.AsyncClient, world: World, path: str
) -> None:
    world.generator.pieces = ("Pay with 4111 1111", " 1111 1111", ", please")
    answer = await client.post(path, json=body(path, "?"))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "INVALID_INPUT")
    assert "The answer was ended" in error["message"]
    assert "1111" not in answer.text
    assert world.generator.running == 0


async def test_a_stream_ends_with_the_refusal(client: httpx.AsyncClient, world: World) -> None:
    world.generator.pieces, world.generator.delay_s = (
        ("Pay ", "with 4111 11", "11 1111 1111", ", please", " do"),
        0.001,
    )
    answer = await client.post(STREAM, json=body(STREAM, "?"))
    *tokens, (last, failure) = events(answer.text)
    assert "".join(data["text"] for _, data in tokens) == "Pay with "
    assert last == "error"
    assert failure["error"]["details"] == {"guardrail": "pii", "category": "card"}
    assert "1111" not in answer.text
    assert world.generator.running == 0
    assert len(world.generator.cancelled) == 1
    [finished] = world.recorder.finished
    assert (finished.status, finished.code) == (200, "INVALID_INPUT")
    answer = await client.post(CHAT, json=body(CHAT, "?", stream=True))
    last_line = data_lines(answer.text)[-1]
    assert last_line.startswith('{"error"')
    assert "'card'" in last_line


async def test_an_answer_that_is_all_secret_is_a_real_400(
    client: httpx.AsyncClient, world: World
) -> None:
    world.generator.pieces = ("4111", "1111", "1111", "1111")
    answer = await client.post(CHAT, json=body(CHAT, "?", stream=True))
    assert answer.status_code == 400


async def test_the_socket(world: World) -> None:
    world.generator.pieces = PIECES
    with LiveServer(create_app(world.services())) as server:
        async with connect(server.url.replace("http", "ws") + "/v1/infer/ws") as connection:
            socket = Socket(connection)
            await socket.ask("a", prompt="From a@b.co")
            *tokens, (last, _) = await socket.hear_all("a")
            assert "".join(data["text"] for _, data in tokens) == SHOWN
            assert last == "done"
            await socket.ask("b", prompt=f"card {SECRET}")
            [(event, data)] = await socket.hear_all("b")
            assert event == "error"
            named = {"guardrail": "pii", "category": "card", "param": "prompt"}
            assert data["error"]["details"] == named
    assert seen(world) == ["From [EMAIL]"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_logprobs_of_what_may_be_masked_are_refused(
    client: httpx.AsyncClient, world: World, path: str
) -> None:
    logprobs = True if path == CHAT else 1
    answer = await client.post(path, json=body(path, "?", logprobs=logprobs))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")
    assert world.generator.requests == []


def on_plan(world: World, plan: str | None) -> Exchange:
    exchange = Exchange(id="r", method="POST", arrived=0.0)
    exchange.belongs_to(
        Principal(
            tenant="t",
            subject="key:k",
            role=Role.DEVELOPER,
            scopes=GRANTS[Role.DEVELOPER],
            plan=plan,
        )
    )
    return exchange


async def ask(world: World, plan: str | None, sampling: Sampling) -> None:
    generation = Generation(
        world.services(),
        on_plan(world, plan),
        model="smollm2",
        prompts=[Conversation((ChatMessage(role="user", content="a@b.co"),))],
        sampling=sampling,
        stream=False,
        priority=Priority.STANDARD,
    )
    await collect(generation)


async def test_a_plan_caps_what_its_tenants_ask_for() -> None:
    plans = {
        "small": PlanConfig(max_new_tokens=8, max_temperature=0.5),
        "private": PlanConfig(
            guardrails=GuardrailsConfig.model_validate({"pii": {"email": {"input": "refuse"}}})
        ),
    }
    world = World(config=GatewayConfig(plans=plans))
    await ask(world, "small", Sampling(max_tokens=8, temperature=0.5))
    await ask(world, "small", Sampling())
    await ask(world, None, Sampling(max_tokens=9, temperature=2))
    drawn = [request.sampling for request in world.generator.requests]
    assert [(s.max_tokens, s.token_cap, s.temperature) for s in drawn] == [
        (8, None, 0.5),
        (None, 8, 0.5),
        (9, None, 2),
    ]
    with pytest.raises(InvalidInput, match="the plan 'small' allows 8"):
        await ask(world, "small", Sampling(max_tokens=9))
    with pytest.raises(InvalidInput, match="'email'"):
        await ask(world, "private", Sampling())
    assert len(world.generator.requests) == 3
