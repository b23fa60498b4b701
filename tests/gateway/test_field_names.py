"""What a real engine refuses is told in the words of whoever asked: by the field as it was sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deployments.config import EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from tests import tiny_models
from tests.attacks.dial import Dial
from tests.gateway.test_engine_metering import KEY, Metered
from tests.tiny_models import CONTEXT, VOCABULARY

CHAT, COMPLETIONS, INFER = "/v1/chat/completions", "/v1/completions", "/v1/infer"
LONG = "x" * CONTEXT
NO_SCHEMA = {"name": "a", "schema": {"type": "of no kind"}}
STRANGE = {"response_format": {"type": "json_schema", "json_schema": NO_SCHEMA}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Metered]:
    folder = tiny_models.make("llama", tmp_path_factory.mktemp("llama"))
    engine = Engine("tiny", folder, EngineConfig(slots=4, threads=1), QueueConfig())
    yield Metered(engine)
    engine.close()


def chatting(content: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


def completing(prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, **fields}


def inferring(prompt: str = "hi", **params: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "params": params}


INFERENCES = [
    (inferring(LONG), "prompt"),
    (inferring(LONG, raw=True), "prompt"),
    (inferring(max_tokens=CONTEXT), "params.max_tokens"),
    (inferring(logit_bias={str(VOCABULARY): 1}), "params.logit_bias"),
    (inferring(stop_token_ids=[VOCABULARY]), "params.stop_token_ids"),
    (inferring(repetition_penalty=0.001), "params.repetition_penalty"),
    (inferring(**STRANGE), "params.response_format"),
    (inferring(structured_outputs={"regex": "("}), "params.structured_outputs"),
    (inferring(**STRANGE, structured_outputs={"regex": "a"}), "params.structured_outputs"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chatting(LONG), "messages"),
        (CHAT, chatting(max_tokens=CONTEXT), "max_tokens"),
        (CHAT, chatting(max_completion_tokens=CONTEXT), "max_completion_tokens"),
        (CHAT, chatting(max_completion_tokens=CONTEXT, stream=True), "max_completion_tokens"),
        (CHAT, chatting(n=17, max_tokens=1), "n"),
        (CHAT, chatting(logit_bias={str(VOCABULARY): 1}), "logit_bias"),
        (COMPLETIONS, completing(LONG), "prompt"),
        (COMPLETIONS, completing([VOCABULARY]), "prompt"),
        (COMPLETIONS, completing(max_tokens=CONTEXT), "max_tokens"),
        ("/detokenize", {"model": "tiny", "tokens": [VOCABULARY]}, "tokens"),
        *((INFER, body, param) for body, param in INFERENCES),
        *((f"{INFER}/stream", body, param) for body, param in INFERENCES),
    ],
)
async def test_an_error_names_the_field_as_it_was_sent(
    gateway: Metered, path: str, body: dict[str, Any], param: str
) -> None:
    async with gateway.client() as client:
        answer = await client.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error.get("details", error)["param"] == param
    check_message(error["message"], param)


@pytest.mark.parametrize(("body", "param"), INFERENCES)
async def test_an_error_on_a_socket(gateway: Metered, body: dict[str, Any], param: str) -> None:
    async with Dial(gateway.app, "/v1/infer/ws", KEY) as socket:
        await socket.say({"type": "infer", "id": "a", **body})
        told = await socket.hear()
    assert told["event"] == "error"
    error = told["data"]["error"]
    assert (error["code"], error["details"]["param"]) == ("INVALID_INPUT", param)
    check_message(error["message"], param)


def check_message(message: str, param: str) -> None:
    """If it begins with a field, it is the same one."""
    first = message.partition(" ")[0]
    assert first == param or first[0].isupper() or "structured_outputs" in message, message
