"""Every way to fail, in both protocols."""

from __future__ import annotations

import logging

import httpx
import pytest

from deployments.gateway.errors import openai_error
from deployments.gateway.validation import SEARCHED
from models.errors import (
    Forbidden,
    InternalError,
    InvalidInput,
    Overloaded,
    PlatformError,
    RateLimited,
    Timeout,
    Unauthorized,
    Unavailable,
    UpstreamError,
)
from tests.gateway.fakes import World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting
from tests.gateway.test_infer import PATH as INFER
from tests.gateway.test_infer import asking as inferring

JSON = {"content-type": "application/json"}
CODES = {
    ("INVALID_INPUT", 400),
    ("INVALID_INPUT", 405),
    ("INVALID_INPUT", 413),
    ("INVALID_INPUT", 414),
    ("INVALID_INPUT", 415),
    ("UNAUTHORIZED", 401),
    ("FORBIDDEN", 403),
    ("NOT_FOUND", 404),
    ("CONFLICT", 409),
    ("RATE_LIMITED", 429),
    ("OVERLOADED", 429),
    ("INTERNAL_ERROR", 500),
    ("UPSTREAM_ERROR", 502),
    ("UNAVAILABLE", 503),
    ("STATE_UNAVAILABLE", 503),
    ("TIMEOUT", 408),
    ("TIMEOUT", 504),
}
"""What clients tell errors apart by: these are the API, whatever the classes are called."""


def test_codes_and_statuses() -> None:
    found: set[type[PlatformError]] = set()
    ahead: list[type[PlatformError]] = [PlatformError]
    while ahead:
        kind = ahead.pop()
        found.add(kind)
        ahead += kind.__subclasses__()
    assert {(kind.code, kind.status) for kind in found} == CODES


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidInput("m", param="prompt"), 400, "invalid_request_error"),
        (Overloaded("m", retry_after=1.2), 429, "rate_limit_error"),
        (InternalError("m"), 500, "server_error"),
        (UpstreamError("m"), 502, "server_error"),
        (Unavailable("m", retry_after=0), 503, "server_error"),
        (Timeout("m"), 504, "timeout_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_generator_raises_before_its_first_delta(
    client: httpx.AsyncClient,
    world: World,
    error: PlatformError,
    status: int,
    kind: str,
    stream: bool,
) -> None:
    world.generator.error = error
    answer = await client.post(CHAT, json=chatting(stream=stream))
    assert answer.status_code == status
    assert answer.json() == {
        "error": {"message": "m", "type": kind, "param": error.param, "code": error.code}
    }
    answer = await client.post(INFER + "/stream" * stream, json=inferring())
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == error.code
    assert answer.json()["success"] is False


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Unauthorized("m"), "authentication_error"),
        (Forbidden("m"), "permission_error"),
        (RateLimited("m", retry_after=6), "rate_limit_error"),
    ],
)
def test_kinds_of_openai_errors_that_no_route_raises_yet(error: PlatformError, kind: str) -> None:
    body = openai_error(error)["error"]
    assert isinstance(body, dict)
    assert (body["type"], body["code"]) == (kind, error.code)


@pytest.mark.parametrize(
    ("seconds", "header"), [(None, None), (0, "1"), (0.2, "1"), (1, "1"), (1.01, "2")]
)
async def test_retry_after_is_in_whole_seconds_rounded_up(
    client: httpx.AsyncClient, world: World, seconds: float | None, header: str | None
) -> None:
    world.generator.error = Overloaded("full", retry_after=seconds)
    answer = await client.post(INFER, json=inferring())
    assert answer.headers.get("retry-after") == header
    assert answer.json()["error"]["details"].get("retry_after") == seconds


async def test_details_need_not_be_json(client: httpx.AsyncClient, world: World) -> None:
    world.generator.error = InvalidInput("m", details={"given": {1: ValueError("x")}})
    answer = await client.post(INFER, json=inferring())
    assert answer.json()["error"]["details"] == {"given": {"1": "x"}}


@pytest.mark.parametrize("path", [CHAT, INFER])
async def test_what_nobody_foresaw_is_logged_and_not_shown(
    client: httpx.AsyncClient, world: World, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    world.generator.error = ZeroDivisionError("secret")
    body = chatting() if path == CHAT else inferring()
    answer = await client.post(path, json=body, headers={"x-request-id": "abc"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Quote request abc" in answer.text
    [record] = caplog.records
    assert (record.levelno, record.exc_info is not None) == (logging.ERROR, True)
    assert record.getMessage() == f"unhandled error in POST {path}, request abc"
    assert vars(record)["request_id"] == "abc"


async def test_an_answer_that_ends_too_soon(client: httpx.AsyncClient, world: World) -> None:
    world.generator.finish_reason = None
    answer = await client.post(CHAT, json=chatting())
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "UPSTREAM_ERROR")


@pytest.mark.parametrize(
    ("path", "openai"),
    [("/nope", False), ("/", False), ("/v1/infer/", False), ("/v1/nope", True), ("/v1", False)],
)
async def test_no_such_path(client: httpx.AsyncClient, path: str, openai: bool) -> None:
    answer = await client.get(path)
    assert answer.status_code == 404
    assert ("success" not in answer.json()) is openai


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("PUT", INFER, "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("OPTIONS", "/healthz", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
    ],
)
async def test_no_such_method(
    client: httpx.AsyncClient, method: str, path: str, allow: str
) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert answer.json()["error"]["code"] == "INVALID_INPUT"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "EOF while parsing a value at line 1 column 0"),
        (b'{"model": "smollm2",\n "prompt": }', "expected value at line 2 column 12"),
        (b'{"prompt": "\xff" "', "invalid unicode code point at line 1 column 13"),
        (b'{"a":"' + b"a" * SEARCHED + b'\xff"}', f"code point at line 1 column {SEARCHED + 7}"),
        (b"[" * 5000, "recursion limit"),
        (b"[]", "The body should be an object"),
        (b'{"params": {"temperature": NaN}}', "finite number"),
    ],
)
async def test_a_body_that_is_no_json_object(
    client: httpx.AsyncClient, body: bytes, words: str
) -> None:
    answer = await client.post(INFER, content=body, headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert words in error["message"] + str(error["details"])


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (INFER, b'{"prompt": "\xff"}', "prompt", "invalid unicode code point at line 1 column 13"),
        (INFER, b'{"prompt": "\\ud800"}', "prompt", "hex escape at line 1"),
        (INFER, b'{"params":\n {"stop": ["a", "\xc3"]}}', "params.stop[1]", "line 2 column 18"),
        (INFER, b'{"params": {"\xe2\x82": 1}}', "params", "invalid unicode"),
        (INFER, b'{"\xff": 1}', None, "The body is no valid text"),
        (INFER, b'"\xff"', None, "The body is no valid text"),
        (CHAT, b'{"messages": [{"content": "\xf0\x9f"}]}', "messages[0].content", "line 1 column"),
    ],
)
async def test_a_text_that_is_no_text_is_named(
    client: httpx.AsyncClient, path: str, body: bytes, param: str | None, words: str
) -> None:
    answer = await client.post(path, content=body, headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error.get("details", error).get("param") == param
    assert words in error["message"]
    assert error["message"].startswith(f"{param or 'The body'} is no valid text: ")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": ""},
        {**JSON, "content-encoding": "gzip"},
    ],
)
async def test_a_body_that_is_declared_as_something_else(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    answer = await client.post(INFER, content=b"{}", headers=headers)
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=UTF-8", 'Application/JSON;charset="utf-8"']
)
async def test_json_may_say_its_charset(client: httpx.AsyncClient, content_type: str) -> None:
    answer = await client.post(
        INFER,
        content=b'{"model":"smollm2","prompt":"a"}',
        headers={"content-type": content_type},
    )
    assert answer.status_code == 200


async def test_a_query_where_there_is_none(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.post(INFER, params={"model": "x"}, json=inferring()),
        await client.get("/healthz", params={"verbose": "1"}),
    ):
        assert answer.status_code == 400
        assert "Unknown field" in answer.json()["error"]["message"]
