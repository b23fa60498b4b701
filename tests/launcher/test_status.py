"""What is said when the platform does not come up, and how it is taken off the air."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.launcher.status import Dashboard, is_ready, last_error, token

REMOTE = """\
\x1b[36m(ServeController pid=31)\x1b[0m Traceback (most recent call last):
\x1b[36m(ServeController pid=31)\x1b[0m   File "x.py", line 3, in build
\x1b[36m(ServeController pid=31)\x1b[0m models.errors.ConfigError: serve_config.yaml, args:
\x1b[36m(ServeController pid=31)\x1b[0m   models.x.source: missing (given: None)
INFO 2026-01-01 00:00:00 serve 1 -- goodbye
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (REMOTE, "serve_config.yaml, args:\n  models.x.source: missing (given: None)"),
        ("Traceback (most\n  File\nValueError: no\n\nlater", "ValueError: no"),
        ("KeyError: first\nx.y.RemoteError(OSError): two", "x.y.RemoteError(OSError): two"),
        ("all is well\nreally", None),
        ("", None),
    ],
)
def test_the_message_is_found_in_a_traceback(text: str, said: str | None) -> None:
    assert last_error(text) == said


def test_the_token_is_where_ray_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("from home\n")
    (tmp_path / "elsewhere").write_text("from path")
    assert token({}) == "from home"
    assert token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "elsewhere")}) == "from path"
    assert token({"RAY_AUTH_TOKEN": "from env"}) == "from env"


@dataclass
class FakeRay:
    """Answers as Ray's dashboard and as a gateway, over HTTP."""

    url: str = ""
    ready: bool = False
    applications: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[str, str | None, Any]] = field(default_factory=list)


@pytest.fixture
def fake() -> Iterator[FakeRay]:
    state = FakeRay()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/readyz":
                return self._answer(200 if state.ready else 503)
            state.calls.append(("GET", self.headers["Authorization"], None))
            return self._answer(200, {"applications": state.applications})

        def do_PUT(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.calls.append(("PUT", self.headers["Authorization"], body))
            self._answer(200)

        def _answer(self, code: int, body: object = None) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_port}"
        yield state
        server.shutdown()
        thread.join()


def test_ready_is_200_and_nothing_else(fake: FakeRay) -> None:
    assert not is_ready(fake.url)
    fake.ready = True
    assert is_ready(fake.url)
    assert not is_ready("http://127.0.0.1:9")


def test_a_proxy_is_for_other_machines(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # one that has not read it yet
    fake.ready = True
    assert is_ready(fake.url)
    assert Dashboard(fake.url).applications() is not None


def test_what_may_still_come_up_is_no_failure(fake: FakeRay) -> None:
    fake.applications = {"a": {"status": "DEPLOYING", "message": "", "deployments": {}}}
    assert Dashboard(fake.url).failure() is None
    assert Dashboard("http://127.0.0.1:9").failure() is None


def test_a_builder_that_fails_is_said_in_its_words(fake: FakeRay) -> None:
    fake.applications = {"a": {"status": "DEPLOY_FAILED", "message": REMOTE, "deployments": {}}}
    failure = Dashboard(fake.url).failure()
    assert failure is not None
    assert failure.startswith("a: serve_config.yaml, args:\n")


def test_a_replica_that_fails_is_said_in_its_words(fake: FakeRay) -> None:
    deployments = {
        "engine": {"status": "DEPLOY_FAILED", "message": "x\nOSError: weights are gone"},
        "gateway": {"status": "HEALTHY", "message": ""},
    }
    fake.applications = {
        "a": {"status": "DEPLOY_FAILED", "message": "engine failed", "deployments": deployments}
    }
    assert Dashboard(fake.url).failure() == "engine: OSError: weights are gone"


def test_withdrawing_takes_all_applications_off_and_shows_the_token(fake: FakeRay) -> None:
    Dashboard(fake.url, token="secret").withdraw(host="127.0.0.1", port=8000)
    assert fake.calls == [
        (
            "PUT",
            "Bearer secret",
            {"applications": [], "http_options": {"host": "127.0.0.1", "port": 8000}},
        )
    ]
    Dashboard("http://127.0.0.1:9").withdraw(host="127.0.0.1", port=8000)  # gone already
