from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from deployments.config import GatewayConfig
from deployments.gateway.app import create_app
from models.contracts import Priority
from models.errors import InvalidInput, Overloaded
from tests.gateway.asgi import RawCall
from tests.gateway.fakes import NOW, FakePredictor, World

PATH = "/v1/models/digits/predict"


async def test_an_answer_is_our_envelope(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        PATH, json={"inputs": [1, {"a": [2.5]}]}, headers={"x-request-id": "r"}
    )
    assert answer.headers["x-request-id"] == "r"
    assert answer.json() == {
        "success": True,
        "data": {
            "predictions": [{"saw": 1}, {"saw": {"a": [2.5]}}],
            "model": "digits",
            "version": "digits@3",
        },
        "error": None,
        "timestamp": "2023-11-14T22:13:20.250+00:00",
        "request_id": "r",
    }
    assert NOW == 1_700_000_000.25


async def test_what_the_predictor_is_told(client: httpx.AsyncClient, world: World) -> None:
    body = {"inputs": [{"x": 1}, {"x": 2, "h": 9}], "params": {"h": 3}, "priority": "low"}
    await client.post(PATH, json=body)
    [(inputs, standing)] = world.predictor.calls
    assert inputs == [{"h": 3, "x": 1}, {"h": 9, "x": 2}]
    assert (standing.priority, standing.tenant) == (Priority.LOW, "public")
    assert standing.timeout_s == pytest.approx(world.config.predict_timeout_s, abs=1)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        (PATH, "{}", 400, "inputs", "required"),
        (PATH, '{"inputs": []}', 400, "inputs", "at least 1 item"),
        (PATH, '{"inputs": [1, 2, 3, 4, 5]}', 400, "inputs", "has 5 entries; 'digits' takes 4"),
        (PATH, '{"inputs": [1, [NaN]]}', 400, "inputs[1]", "finite"),
        (PATH, '{"inputs": [[1, {"a": 1e999}]]}', 400, "inputs[0]", "finite"),
        (PATH, '{"inputs": [' + "9" * 40 + "]}", 400, "inputs[0]", "64 bits"),
        (PATH, '{"inputs": [1], "params": {"h": 1}}', 400, "params", "input 0 is no object"),
        (PATH, '{"inputs": [1], "parms": {}}', 400, "parms", "did you mean 'params'"),
        (PATH, '{"inputs": ["", "' + "x" * 99 + '"]}', 413, "inputs[1]", "has 101 bytes"),
        ("/v1/models/nope/predict", '{"inputs": [1]}', 404, "model", "digits"),
        ("/v1/models/smollm2/predict", '{"inputs": [1]}', 400, "model", "it does not predict"),
    ],
)
async def test_a_request_at_fault(
    client: httpx.AsyncClient, path: str, body: str, status: int, param: str, words: str
) -> None:
    answer = await client.post(path, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["details"]["param"]) == (status, param)
    assert words in error["message"]


async def test_an_endless_nest_is_refused(client: httpx.AsyncClient) -> None:
    body = '{"inputs": [' + "[" * 5000 + "]" * 5000 + "]}"
    answer = await client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


async def test_other_tasks_point_to_this_route(client: httpx.AsyncClient) -> None:
    body = {"model": "digits", "messages": [{"role": "user", "content": "?"}]}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "Use /v1/models/digits/predict." in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidInput("input 1: has 3 numbers; 64 are expected.", param="inputs[1]"), 400),
        (Overloaded("full", retry_after=2.5), 429),
    ],
)
async def test_what_the_predictor_raises(
    client: httpx.AsyncClient, world: World, error: Any, status: int
) -> None:
    world.predictor.error = error
    answer = await client.post(PATH, json={"inputs": [1, 2]})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == error.code
    assert answer.json()["error"]["message"] == error.message


async def test_a_limit_of_its_own() -> None:
    world = World(predictor=FakePredictor(delay_s=60), config=GatewayConfig(predict_timeout_s=0.05))
    call = RawCall(create_app(world.services()), PATH, {"inputs": [1]})
    await call.task
    assert call.status == 504
    assert orjson.loads(call.bodies[0])["error"]["code"] == "TIMEOUT"
    assert world.predictor.cancelled == 1


async def test_a_client_that_leaves_cancels_its_request() -> None:
    world = World(predictor=FakePredictor(delay_s=60))
    call = RawCall(create_app(world.services()), PATH, {"inputs": [1]})
    await world.predictor.called.wait()
    call.hang_up()
    await call.task
    assert world.predictor.cancelled == 1
    [event] = world.recorder.finished
    assert (event.status, event.model) == (499, "digits")
    assert event.route == "/v1/models/{model}/predict"
