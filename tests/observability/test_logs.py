"""One JSON object a line, with the request it belongs to."""

import builtins
import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from deployments.observability import logs
from deployments.observability.events import AlertRaised, BatchFailed, BatchRan, RequestFinished


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root, ours = logging.getLogger(), logging.getLogger("deployments")
    before = (root.handlers[:], root.level, ours.level)
    root.handlers = []
    stream = io.StringIO()
    logs.configure(stream=stream)
    yield stream
    root.handlers, root.level, ours.level = before[0], before[1], before[2]


def lines(stream: io.StringIO) -> list[dict[str, str]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line(stream: io.StringIO) -> None:
    logging.getLogger("deployments.gateway").info("ready in %d s\n%s", 3, "two lines")
    logging.getLogger("urllib3").info("chatter of others")
    (line,) = lines(stream)
    assert line.pop("ts").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "deployments.gateway",
        "message": "ready in 3 s\ntwo lines",
    }


def test_a_line_carries_its_request(stream: io.StringIO) -> None:
    token = logs.request_fields.set({"request_id": "r1", "tenant": "acme", "other": "no"})
    try:
        logging.getLogger("urllib3").warning("slow", extra={"model": "smollm2"})
    finally:
        logs.request_fields.reset(token)
    (line,) = lines(stream)
    assert (line["request_id"], line["tenant"], line["model"]) == ("r1", "acme", "smollm2")
    assert "other" not in line


def test_an_exception(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a replica, Serve's print() turns what it is given into a tuple's repr.
    monkeypatch.setattr(builtins, "print", lambda *objects, file, **_: file.write(str(objects)))
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("deployments").exception("it failed")
    (line,) = lines(stream)
    assert line["message"] == "it failed"
    assert line["exception"].startswith("Traceback (most recent call last):\n  File ")
    assert line["exception"].endswith("ValueError: bad\n")


def test_configuring_twice_logs_once(stream: io.StringIO) -> None:
    logs.configure(stream=stream)
    logging.getLogger("deployments").warning("once")
    assert len(lines(stream)) == 1


def finished(status: int, code: str | None) -> RequestFinished:
    return RequestFinished(
        request_id="r1",
        route="/v1/infer",
        method="POST",
        status=status,
        code=code,
        duration_s=0.5,
        model="smollm2",
        tenant="acme",
    )


@pytest.mark.parametrize(
    ("status", "code", "logged"),
    [
        (200, None, False),
        (404, "NOT_FOUND", False),
        (429, "OVERLOADED", False),
        (499, None, False),
        (500, "INTERNAL_ERROR", True),
        (200, "UPSTREAM_ERROR", True),
    ],
)
def test_only_our_failures_are_logged(
    stream: io.StringIO, status: int, code: str | None, logged: bool
) -> None:
    logs.log_failures(finished(status, code))
    assert [line["request_id"] for line in lines(stream)] == (["r1"] if logged else [])


def test_a_failed_batch_is_logged(stream: io.StringIO) -> None:
    logs.log_failures(BatchRan(model="m", rows=1, duration_s=0.1))
    logs.log_failures(BatchFailed(model="m", rows=2, error="RuntimeError: boom"))
    (line,) = lines(stream)
    assert line["message"] == "a batch of 2 failed: RuntimeError: boom"
    assert line["model"] == "m"


def test_an_alert_is_logged(stream: io.StringIO) -> None:
    logs.log_failures(
        AlertRaised(id=7, tenant="acme", kind="budget", period="2026-11", threshold=80)
    )
    (line,) = lines(stream)
    assert line["message"] == "alert 7: the budget of 2026-11 has reached 80 %"
    assert (line["level"], line["tenant"]) == ("WARNING", "acme")


def test_the_default_stream_is_the_real_stderr(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", real)
    logs.configure()
    logging.getLogger("deployments").warning("hello")
    assert json.loads(real.getvalue())["message"] == "hello"
