from __future__ import annotations

from typing import Any

import httpx
import pytest

from deployments.config import GatewayConfig, GuardrailsConfig
from deployments.gateway.app import create_app
from models.contracts import Prompt, Sampling
from models.errors import Overloaded
from tests.gateway.asgi import BASE
from tests.gateway.contract import chunks, data_lines
from tests.gateway.fakes import World
from tests.gateway.test_guardrails import a_client

PATH = "/v1/completions"


def asking(prompt: Any = "Once", **fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "prompt": prompt, **fields}


async def test_an_answer_is_openai_s(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking(), headers={"x-request-id": "abc"})
    body = answer.json()
    assert (body["id"], body["object"]) == ("cmpl-abc", "text_completion")
    assert body["choices"] == [
        {"index": 0, "text": "Hello!", "logprobs": None, "finish_reason": "stop"}
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
async def test_the_forms_of_a_prompt(
    client: httpx.AsyncClient, world: World, prompt: Any, prompts: list[Prompt]
) -> None:
    answer = await client.post(PATH, json=asking(prompt))
    assert [request.prompt for request in world.generator.requests] == prompts
    assert [choice["index"] for choice in answer.json()["choices"]] == [*range(len(prompts))]


async def test_a_batch_is_numbered_through_and_added_up(
    client: httpx.AsyncClient, world: World
) -> None:
    answer = await client.post(
        PATH, json=asking(["a", "b"], n=2), headers={"x-request-id": "batch"}
    )
    body = answer.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [request.id for request in world.generator.requests] == ["batch-0", "batch-1"]
    assert body["usage"]["prompt_tokens"] == 10
    assert body["usage"]["completion_tokens"] == 12


async def test_a_batch_streams_side_by_side(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        PATH, json=asking(["a", "b"], n=2, stream=True, stream_options={"include_usage": True})
    )
    *told, last = chunks(answer.text)
    for index in range(4):
        choices = [c["choices"][0] for c in told if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in choices) == "Hello!"
        assert choices[-1]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == 12
    assert data_lines(answer.text)[-1] == "[DONE]"


async def test_a_prompt_that_fails_ends_its_batch(client: httpx.AsyncClient, world: World) -> None:
    world.generator.error = Overloaded("full", retry_after=1)
    answer = await client.post(PATH, json=asking(["a", "b"]))
    assert answer.status_code == 429
    assert world.generator.running == 0


async def test_the_length_is_16_unless_told(client: httpx.AsyncClient, world: World) -> None:
    await client.post(PATH, json=asking())
    await client.post(PATH, json=asking(max_tokens=3))
    assert [r.sampling.max_tokens for r in world.generator.requests] == [16, 3]


async def test_what_a_request_leaves_open_is_as_the_model_has_it(world: World) -> None:
    world.sampling = Sampling(temperature=0.2, top_p=0.9, max_tokens=5)
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        await client.post(PATH, json=asking())
        await client.post(PATH, json=asking(temperature=0.7, max_tokens=3))
        await client.post("/v1/infer", json={"model": "smollm2", "prompt": "Hi"})
    samplings = [request.sampling for request in world.generator.requests]
    drawn = [(s.temperature, s.top_p, s.max_tokens) for s in samplings]
    assert drawn == [(0.2, 0.9, 5), (0.7, 0.9, 3), (0.2, 0.9, 5)]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_say_where_their_tokens_begin(
    client: httpx.AsyncClient, world: World, stream: bool
) -> None:
    answer = await client.post(PATH, json=asking(logprobs=2, stream=stream))
    told = chunks(answer.text) if stream else [answer.json()]
    logprobs = [c["choices"][0]["logprobs"] for c in told if c["choices"][0]["logprobs"]]
    offsets = [offset for entry in logprobs for offset in entry["text_offset"]]
    assert offsets == ([0, 3, 5] if stream else [0])
    assert logprobs[0]["top_logprobs"] == [{"t0": -0.5, "t1": -9999.0}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "a string, a list of strings"),
        ({"prompt": []}, "prompt", "and not empty"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": ["a", 1]}, "prompt[1]", "valid string"),
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        ({"prompt": [[1], [-1]]}, "prompt[1][0]", "greater than or equal to 0"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1 item"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128 items"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "more than the 128 choices"),
        ({"echo": 1}, "echo", "valid boolean"),
        ({"best_of": 129}, "best_of", "less than or equal to 128"),
        ({"best_of": 2, "n": 3}, "best_of", "at least n, which is 3"),
        ({"best_of": 2, "stream": True}, "best_of", "leave out either it or stream"),
        ({"prompt": ["a"] * 65, "best_of": 2}, "best_of", "more than the 128 choices"),
        ({"suffix": "x"}, "suffix", "is not supported"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"mesages": []}, "mesages", "Unknown field"),
    ],
)
async def test_a_field_at_fault_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = await client.post(PATH, json=asking(**{"prompt": "a", **fields}))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


# --- echo and best_of -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Once", ["Once"]),
        (["a", "b"], ["a", "b"]),
        ([79, 107], ["Ok"]),
        ([[79], [107, 107]], ["O", "kk"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_prompt_comes_before_its_answers(
    client: httpx.AsyncClient, prompt: Any, texts: list[str], stream: bool
) -> None:
    answer = await client.post(PATH, json=asking(prompt, echo=True, n=2, stream=stream))
    said = dict.fromkeys(range(2 * len(texts)), "")
    for part in chunks(answer.text) if stream else [answer.json()]:
        for choice in part["choices"]:
            said[choice["index"]] += choice["text"]
    assert list(said.values()) == [f"{text}Hello!" for text in texts for _ in range(2)]


@pytest.mark.parametrize("stream", [False, True])
async def test_how_likely_an_echo_was(
    client: httpx.AsyncClient, world: World, stream: bool
) -> None:
    answer = await client.post(PATH, json=asking(echo=True, logprobs=1, n=2, stream=stream))
    for index in range(2):
        told = [
            choice["logprobs"]
            for part in (chunks(answer.text) if stream else [answer.json()])
            for choice in part["choices"]
            if choice["index"] == index and choice["logprobs"]
        ]
        tokens, logprobs, offsets = (
            [each for part in told for each in part[name]]
            for name in ("tokens", "token_logprobs", "text_offset")
        )
        answered = ["Hel", "lo", "!"] if stream else ["Hello!"]
        assert tokens == ["O", "n", "c", "e", *answered]
        assert logprobs == [None, -1.0, -1.0, -1.0, *[-0.25] * len(answered)]
        assert offsets == [0, 1, 2, 3, *([4, 7, 9] if stream else [4])]
    assert told[0]["top_logprobs"][0] is None
    assert world.generator.requests[0].sampling.prompt_logprobs


async def test_without_an_echo_the_prompt_is_not_judged(
    client: httpx.AsyncClient, world: World
) -> None:
    await client.post(PATH, json=asking(logprobs=1))
    await client.post(PATH, json=asking(echo=True))
    assert [r.sampling.prompt_logprobs for r in world.generator.requests] == [False, False]


async def test_the_likeliest_are_answered(client: httpx.AsyncClient, world: World) -> None:
    world.generator.likelihoods = (-3.0, -1.0, -4.0, -2.0)
    answer = await client.post(PATH, json=asking(["a", "b"], n=2, best_of=4, logprobs=0))
    body = answer.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    likelihoods = [choice["logprobs"]["token_logprobs"][0] for choice in body["choices"]]
    assert likelihoods == [-1.0, -2.0, -1.0, -2.0]
    assert {request.n for request in world.generator.requests} == {4}
    assert body["usage"]["completion_tokens"] == 24, "all that were drawn"


async def test_who_does_not_ask_for_logprobs_gets_none(
    client: httpx.AsyncClient, world: World
) -> None:
    answer = await client.post(PATH, json=asking(best_of=3))
    assert [choice["logprobs"] for choice in answer.json()["choices"]] == [None]
    assert world.generator.requests[0].sampling.logprobs == 0


async def test_guardrails_that_hide_logprobs_do_not_hinder_the_choice() -> None:
    config = GuardrailsConfig.model_validate({"pii": {"email": {"output": "mask"}}})
    world = World(config=GatewayConfig(guardrails=config))
    world.generator.likelihoods = (-3.0, -1.0, -4.0, -2.0)
    async with a_client(world) as client:
        answer = await client.post(PATH, json=asking(best_of=4))
    [choice] = answer.json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("Hello!", None)
