"""One table of errors, two ways to write them: our envelope (spec A5) and OpenAI's object."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from copy import copy
from datetime import UTC, datetime
from http import HTTPStatus

import orjson
from starlette.responses import Response

from deployments.gateway.exchange import Exchange
from deployments.observability.logs import about
from models.errors import InternalError, PlatformError, StateUnreachable
from state.errors import StateUnavailable

logger = logging.getLogger(__name__)

OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


TOKENS = frozenset({"/tokenize", "/detokenize"})
"""vLLM's routes, beside OpenAI's."""


def speaks_openai(path: str) -> bool:
    """Whether errors under this path are OpenAI's: ``/v1`` but our own routes; vLLM's."""
    ours = path.startswith("/v1/infer") or path.endswith("/predict")
    return path in TOKENS or (path.startswith("/v1/") and not ours)


def openai_error(error: PlatformError) -> dict[str, object]:
    kind = OPENAI_TYPES.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error"
    )
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def envelope(request_id: str, now: float, data: object) -> dict[str, object]:
    return {
        "success": True,
        "data": data,
        "error": None,
        "timestamp": _timestamp(now),
        "request_id": request_id,
    }


def error_envelope(request_id: str, now: float, error: PlatformError) -> dict[str, object]:
    details = dict(error.details)
    if error.param is not None:
        details["param"] = error.param
    if error.retry_after is not None:
        details["retry_after"] = error.retry_after
    return {
        "success": False,
        "data": None,
        "error": {"code": error.code, "message": error.message, "details": details},
        "timestamp": _timestamp(now),
        "request_id": request_id,
    }


def error_response(error: PlatformError, path: str, request_id: str, now: float) -> Response:
    body = openai_error(error) if speaks_openai(path) else error_envelope(request_id, now, error)
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["allow"] = str(error.details["allow"])
    if error.status == HTTPStatus.REQUEST_TIMEOUT:
        headers["connection"] = "close"  # the rest of the body is not waited for, either
    return Response(error_json(body), error.status, headers, "application/json")


def in_words(error: PlatformError, names: Mapping[str, str]) -> PlatformError:
    """The error as one who calls fields by other ``names`` reads it. A copy: several requests may
    have come to the same one.
    """
    if error.param is None or (name := names.get(error.param)) is None:
        return error
    told = copy(error)
    if error.message.startswith(f"{error.param} "):
        told.message = name + error.message.removeprefix(error.param)
    told.param = name
    return told


def as_platform_error(error: Exception, exchange: Exchange) -> PlatformError:
    """The error as a client may see it; one that nobody foresaw is logged here, once."""
    if isinstance(error, PlatformError):
        return error
    if isinstance(error, StateUnavailable):
        logger.warning("request %s: %s", exchange.id, error, extra=about(exchange))
        return StateUnreachable(
            "The platform's state is out of reach; nothing was done. Try again.", retry_after=1
        )
    logger.error(
        "unhandled error in %s %s, request %s",
        exchange.method,
        exchange.route,
        exchange.id,
        exc_info=error,
        extra=about(exchange),
    )
    return InternalError(
        f"The server failed; it is not the request's fault. Quote request {exchange.id}."
    )


def error_json(body: object) -> bytes:
    """Facts in an error's details may be of any type: what JSON lacks is written as text."""
    return orjson.dumps(body, default=str, option=orjson.OPT_NON_STR_KEYS)


def _timestamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
