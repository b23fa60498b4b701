"""What is asked for over HTTP is what a real engine does, token for token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from deployments.config import EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from models.contracts import GenerateRequest, Sampling
from tests import tiny_models
from tests.engines.clients import LONG
from tests.engines.reference import Answer, Reference, with_many_eos
from tests.gateway.test_engine_metering import COMPLETIONS, Metered

EXACT = EngineConfig(slots=4, step_tokens=16, dtype="float64", threads=1)
MOST = 40
NINTHS = list(range(0, 250, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_models.make("llama", tmp_path_factory.mktemp("llama"))
    return with_many_eos(made, tmp_path_factory.mktemp("eos"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Metered]:
    engine = Engine("tiny", folder, EXACT, QueueConfig())
    yield Metered(engine)
    engine.close()


def expected(reference: Reference, fields: dict[str, Any]) -> list[Answer]:
    """Of each choice."""
    known = {name: value for name, value in fields.items() if name not in {"n", "logit_bias"}}
    for name in ("stop", "stop_token_ids"):
        known[name] = tuple(fields.get(name, ()))
    bias = {int(token): value for token, value in fields.get("logit_bias", {}).items()}
    sampling = Sampling(**{"max_tokens": MOST, **known}, logit_bias=bias)
    request = GenerateRequest(id="r", model="tiny", prompt=LONG, sampling=sampling)
    return [reference.answer(request, choice) for choice in range(fields.get("n", 1))]


async def choices(answer: httpx.Response, count: int) -> list[tuple[str, str]]:
    """Text and finish reason of each."""
    if answer.headers["content-type"].startswith("application/json"):
        return [(each["text"], each["finish_reason"]) for each in answer.json()["choices"]]
    texts, reasons = [""] * count, [""] * count
    *lines, end = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert end == "[DONE]"
    for each in (choice for line in lines for choice in json.loads(line)["choices"]):
        texts[each["index"]] += each["text"]
        reasons[each["index"]] = each["finish_reason"] or reasons[each["index"]]
    return list(zip(texts, reasons, strict=True))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1.7, "seed": 1, "ignore_eos": True},
        {"temperature": 0, "ignore_eos": True, "max_tokens": 7},
        {"temperature": 1.7, "seed": 1},
        {"temperature": 1, "seed": 2, "n": 3},
        {"temperature": 2, "seed": 3, "top_p": 0.7},
        {"temperature": 2, "seed": 4, "top_k": 4},
        {"temperature": 2, "seed": 5, "min_p": 0.4},
        {"temperature": 1, "seed": 6, "repetition_penalty": 1.6},
        {"temperature": 1, "seed": 7, "presence_penalty": 1.5},
        {"temperature": 1, "seed": 8, "frequency_penalty": 1.5},
        {"temperature": 1, "seed": 9, "logit_bias": {"65": 3.0, "66": -100}},
        {
            "temperature": 1,
            "seed": 10,
            "ignore_eos": True,
            "stop_token_ids": NINTHS,
        },
        {"temperature": 1, "seed": 11, "ignore_eos": True, "stop": ["e", "o"]},
    ],
    ids=lambda fields: ",".join(fields),
)
async def test_each_parameter_does_what_it_says(
    gateway: Metered, reference: Reference, fields: dict[str, Any], stream: bool
) -> None:
    answers = expected(reference, fields)
    plain = {"temperature": fields["temperature"], "seed": fields.get("seed")}
    if fields.keys() - plain.keys():
        assert expected(reference, plain)[: len(answers)] != answers, "it changes nothing here"
    body = {"model": "tiny", "prompt": list(LONG), "max_tokens": MOST, "stream": stream, **fields}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with gateway.client() as client:
        answer = await client.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    told = await choices(answer, len(answers))
    assert told == [(each.text, str(each.finish_reason)) for each in answers]
    used = {"prompt_tokens": len(LONG), "completion_tokens": sum(len(a.tokens) for a in answers)}
    usage = answer.json() if not stream else json.loads(answer.text.rsplit("data: ", 2)[1])
    assert usage["usage"].items() >= used.items()


async def test_the_likeliest_are_the_models_own(gateway: Metered, reference: Reference) -> None:
    fields = {"temperature": 0, "ignore_eos": True, "max_tokens": 9}
    body = {"model": "tiny", "prompt": list(LONG), "logprobs": 2, **fields}
    async with gateway.client() as client:
        answer = await client.post(COMPLETIONS, json=body)
    told = answer.json()["choices"][0]["logprobs"]
    [own] = expected(reference, fields)
    assert len(told["tokens"]) == len(own.tokens) == 9
    with torch.inference_mode():
        logits = reference.model(torch.tensor([[*LONG, *own.tokens]])).logits[0]
    likely = torch.log_softmax(logits, -1)[len(LONG) - 1 : -1]
    wanted = [float(row[token]) for row, token in zip(likely, own.tokens, strict=True)]
    assert told["token_logprobs"] == pytest.approx(wanted, abs=1e-9)
