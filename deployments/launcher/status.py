"""Is it up, and if not, why: what a person is told instead of a traceback."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""What we ask is on this machine, whatever proxy its people use."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"^\([^)]*pid=[^)]*\) ", re.MULTILINE)  # Ray's "(Controller pid=1) "
_ERROR = re.compile(r"^(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Failed)(?:\(\w+\))?: (?=\S)")
_OURS = re.compile(r"^models\.errors\.\w+: ")  # written for a person; the type adds nothing
_NOT_OF_IT = re.compile(r"^(?:Traceback |[A-Z]+ \d{4}-|\d{4}-\d\d-\d\d[ T]|During handling|$)")


def last_error(text: str, *, lines: int = 12) -> str | None:
    """The message of the last exception in a log or a traceback."""
    found = _PREFIX.sub("", _ANSI.sub("", text)).strip().splitlines()
    for start in range(len(found) - 1, -1, -1):
        if _ERROR.match(found[start]):
            end = start + 1
            while end < len(found) and not _NOT_OF_IT.match(found[end]):
                end += 1
            message = [_OURS.sub("", found[start]), *found[start + 1 : end]]
            return "\n".join(message[:lines])
    return None


def token(env: Mapping[str, str]) -> str | None:
    """Ray's authentication token, from where Ray itself looks for it."""
    if env.get("RAY_AUTH_TOKEN"):
        return env["RAY_AUTH_TOKEN"]
    path = Path(env.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def is_ready(url: str) -> bool:
    """Whether the gateway at ``url`` says that it can answer."""
    try:
        with _OPENER.open(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # refused, timed out, or any status but 2xx
        return False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """What Serve reports of itself, and is told, over Ray's dashboard."""

    url: str
    token: str | None = None

    def applications(self) -> Mapping[str, Any] | None:
        """Each application's status by its name; ``None`` if the dashboard does not answer."""
        try:
            answer: dict[str, Any] = json.loads(self._call("GET"))
        except (OSError, ValueError):
            return None
        found: dict[str, Any] = answer.get("applications", {})
        return found

    def failure(self) -> str | None:
        """Why an application will never come up; ``None`` as long as it may."""
        for name, application in (self.applications() or {}).items():
            if application["status"] == "DEPLOY_FAILED":
                reasons = [
                    f"{deployment}: {last_error(details['message']) or details['message']}"
                    for deployment, details in application["deployments"].items()
                    if details["status"] == "DEPLOY_FAILED"
                ]
                message = application["message"]
                return "\n".join(reasons) or f"{name}: {last_error(message) or message}"
        return None

    def withdraw(self, *, host: str, port: int) -> None:
        """Take every application off the air: no new requests, running ones may finish.

        (`serve shutdown`, which is also what Ctrl-C does to `serve run`, cuts them.)
        """
        try:
            self.deploy({"applications": [], "http_options": {"host": host, "port": port}})
        except OSError:
            return  # it went down just now

    def deploy(self, document: Mapping[str, Any]) -> None:
        """Make what is served what ``document``, a whole ``serve_config.yaml``, says."""
        self._call("PUT", document)

    def _call(self, method: str, body: object = None) -> bytes:
        request = urllib.request.Request(
            f"{self.url}/api/serve/applications/",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        with _OPENER.open(request, timeout=10) as answer:
            payload: bytes = answer.read()
        return payload
