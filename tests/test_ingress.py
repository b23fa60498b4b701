"""Serve's own watching for clients that leave is off for HTTP, whatever a client says."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.constants import SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
from ray.serve._private.http_util import parse_disconnect_disabled_header

from deployments.app import gateway
from deployments.config import Replicas
from deployments.ingress import HOOK, UNWATCHED, middlewares

OTHER = (b"accept", b"*/*")


@pytest.mark.parametrize("said", [[], [b"?0"], [b"?1"], [b"?1", b"?0"]])
@pytest.mark.parametrize(("kind", "unwatched"), [("http", True), ("websocket", False)])
async def test_of_http_only(kind: str, unwatched: bool, said: list[bytes]) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["headers"])

    [middleware] = middlewares()
    wrapped = middleware.cls(app, *middleware.args, **middleware.kwargs)
    scope = {"type": kind, "headers": [OTHER, *((UNWATCHED, value) for value in said)]}
    await wrapped(scope, None, None)  # type: ignore[arg-type]
    assert OTHER in seen[0]
    assert parse_disconnect_disabled_header(dict(seen[0])) is unwatched


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
def test_serve_is_told_in_words_that_it_knows() -> None:
    from ray.serve._private import constants
    from ray.serve._private.utils import call_function_from_import_path

    assert SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER.encode() == UNWATCHED
    assert hasattr(constants, HOOK)
    environment = gateway(Replicas()).ray_actor_options["runtime_env"]["env_vars"]
    assert [each.cls for each in call_function_from_import_path(environment[HOOK])] == [
        each.cls for each in middlewares()
    ]
