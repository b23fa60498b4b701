"""One JSON object a line, with the request it belongs to."""

import builtins
import io
import json
import logging
import sys

import pytest

from deployments.gateway.exchange import Exchange
from deployments.observability import logs
from deployments.observability.events import AlertRaised, BatchFailed, BatchRan, RequestFinished
from tests.log_lines import LogLines


def test_a_line(log: LogLines) -> None:
    logging.getLogger("deployments.gateway").info("ready in %d s\n%s", 3, "two lines")
    logging.getLogger("urllib3").info("chatter of others")
    (line,) = log.lines
    assert line.pop("ts").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "deployments.gateway",
        "message": "ready in 3 s\ntwo lines",
    }


def test_a_line_carries_its_request(log: LogLines) -> None:
    asked = Exchange(id="r1", method="POST", arrived=0.0, tenant="acme")
    token = logs.on_behalf_of.set(asked)
    try:
        logging.getLogger("urllib3").warning("slow")
        asked.model = "smollm2"
        logging.getLogger("urllib3").warning("slow", extra={"tenant": "other"})
    finally:
        logs.on_behalf_of.reset(token)
    logging.getLogger("urllib3").warning("slow")
    first, second, third = [{field: line.get(field) for field in logs.FIELDS} for line in log.lines]
    assert first == {"request_id": "r1", "tenant": "acme", "model": None}, "as far as it is known"
    assert second == {"request_id": "r1", "tenant": "other", "model": "smollm2"}
    assert set(third.values()) == {None}


def test_an_exception(log: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a replica, Serve's print() turns what it is given into a tuple's repr.
    monkeypatch.setattr(builtins, "print", lambda *objects, file, **_: file.write(str(objects)))
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("deployments").exception("it failed")
    (line,) = log.lines
    assert line["message"] == "it failed"
    assert line["exception"].startswith("Traceback (most recent call last):\n  File ")
    assert line["exception"].endswith("ValueError: bad\n")


SENT = "ann@example.org, 4111 1111 1111 1111, +49 30 901820"
MASKED = "[EMAIL], [CARD], [PHONE]"


def test_personal_data_is_masked_in_whatever_is_logged(log: LogLines) -> None:
    try:
        try:
            raise KeyError(SENT)
        except KeyError as error:
            raise ValueError(f"no\nline of {SENT}") from error
    except ValueError as error:
        error.add_note(f"from {SENT}")
        logging.getLogger("deployments").exception("%s: %r", SENT, error)
    logs.log_failures(BatchFailed(model="m", rows=2, error=f"ValueError: {SENT}"))
    first, second = log.lines
    assert first["message"] == f"{MASKED}: ValueError('no\\nline of {MASKED}')"
    assert second["message"].endswith(f"ValueError: {MASKED}")
    told = first["exception"]
    assert f"KeyError: '{MASKED}'" in told
    assert told.endswith(f"ValueError: no\nline of {MASKED}\nfrom {MASKED}\n")
    assert "raise KeyError(SENT)" in told, "where it was raised is there to be read"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("no metrics from node 10.1.2.3, 127.0.0.1 or fd00::1:2:3", None),
        (
            "a client from 93.184.216.34 or 2600:1406:bc00:53::b81e:94ce",
            "a client from [IP] or [IP]",
        ),
        ("." * logs.LONGEST, None),
        ("." * logs.LONGEST + "!\n", "." * logs.LONGEST + "…\n"),
        ("." * (logs.LONGEST - 6) + " ann@example.org", "." * (logs.LONGEST - 6) + " …"),
    ],
)
def test_what_is_shown_of_a_text(said: str, shown: str | None, log: LogLines) -> None:
    logging.getLogger("deployments").warning("%s", said)
    (line,) = log.lines
    assert line["message"] == (said if shown is None else shown)


def test_half_of_a_character_is_shown_as_what_it_is_not() -> None:
    record = logging.makeLogRecord({"msg": "\ud800 is half", "levelname": "INFO"})
    assert json.loads(logs.JsonFormatter().format(record))["message"] == "? is half"


def test_configuring_twice_logs_once(log: LogLines) -> None:
    logs.configure(stream=log)
    logging.getLogger("deployments").warning("once")
    assert len(log.lines) == 1


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
    log: LogLines, status: int, code: str | None, logged: bool
) -> None:
    logs.log_failures(finished(status, code))
    assert [line["request_id"] for line in log.lines] == (["r1"] if logged else [])


def test_a_failed_batch_is_logged(log: LogLines) -> None:
    logs.log_failures(BatchRan(model="m", rows=1, duration_s=0.1))
    logs.log_failures(BatchFailed(model="m", rows=2, error="RuntimeError: boom"))
    (line,) = log.lines
    assert line["message"] == "a batch of 2 failed: RuntimeError: boom"
    assert line["model"] == "m"


def test_an_alert_is_logged(log: LogLines) -> None:
    logs.log_failures(
        AlertRaised(id=7, tenant="acme", kind="budget", period="2026-11", threshold=80)
    )
    (line,) = log.lines
    assert line["message"] == "alert 7: the budget of 2026-11 has reached 80 %"
    assert (line["level"], line["tenant"]) == ("WARNING", "acme")


def test_the_default_stream_is_the_real_stderr(
    log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", real)
    logs.configure()
    logging.getLogger("deployments").warning("hello")
    assert json.loads(real.getvalue())["message"] == "hello"
