"""Paths that two readers could read differently are refused before anybody reads them.

A front that guards ``/admin/`` by its prefix does not see it in ``/v1/..%2fadmin/v1``, and the
router, which gets the path decoded, would. So what has no business in a path is an error:
encoded separators, dot segments, control characters, what is not UTF-8 or is encoded twice. In
the one place where names may have slashes (``/v1/models/org%2Fname``) clients encode them.

What the configuration denies is answered as if it were not there, keys or no keys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote, unquote_to_bytes

from starlette.convertors import PathConvertor
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from deployments.config import PathsConfig
from deployments.gateway.operation import Operation
from deployments.gateway.policies.authentication import POLICY_VIOLATION
from models.errors import InvalidInput, NotFound, PlatformError, UriTooLong

MALFORMED = re.compile(rb"%(?![0-9A-Fa-f]{2})")
SEPARATOR = re.compile(rb"%(2f|5c)", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
ENCODED_TWICE = re.compile(r"%[0-9A-Fa-f]{2}")
"""Of a decoded path: another decoder behind us would read it differently."""


def decoded(raw: bytes, query: bytes, limits: PathsConfig, names_below: Sequence[bytes]) -> str:
    """What a path says, if it says one thing only.

    Args:
        raw: as the client sent it.
        names_below: what comes behind these is a name that may have slashes.

    Raises:
        UriTooLong: the path or the query.
        InvalidInput: naming what does not belong into a path.
    """
    if len(raw) > limits.max_bytes:
        raise UriTooLong(f"The path has {len(raw)} bytes; {limits.max_bytes} are allowed.")
    if len(query) > limits.max_query_bytes:
        raise UriTooLong(
            f"The query string has {len(query)} bytes; {limits.max_query_bytes} are allowed."
        )
    if MALFORMED.search(raw):
        raise InvalidInput("The path has a % without two hexadecimal digits; encode it as %25.")
    try:
        path = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("The path is not URL-encoded UTF-8.") from None
    if CONTROL.search(path):
        raise InvalidInput("The path has a control character.")
    if "\\" in path:
        raise InvalidInput("The path has a backslash; separate its parts by /.")
    if any(segment.partition(";")[0] in (".", "..") for segment in path.split("/")):
        raise InvalidInput("The path has a segment . or ..; write out where it leads.")
    if ENCODED_TWICE.search(path):
        raise InvalidInput("The path is URL-encoded twice; encode it once.")
    if SEPARATOR.search(raw) and not raw.startswith(tuple(names_below)):
        raise InvalidInput("The path has an encoded slash, which only a model's name may have.")
    return path


def is_answered(path: str, paths: PathsConfig) -> bool:
    """Whether the configuration lets anything be at ``path``."""
    if _is_below(path, paths.deny):
        return False
    return not paths.allow or _is_below(path, paths.allow)


def may_be_answered(template: str, paths: PathsConfig) -> bool:
    """The same of a route: whether it is at any path that is answered."""
    fixed, variable, _ = template.partition("{")
    deeper = variable and any(prefix.startswith(fixed) for prefix in paths.allow)
    if deeper and not _is_below(template, paths.deny):
        return True
    return is_answered(template, paths)


def _is_below(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def name_prefixes(operations: Sequence[Operation]) -> tuple[bytes, ...]:
    """Where a route takes the rest of the path as one name."""
    found = (
        operation.path_format.partition("{")[0].encode("ascii")
        for operation in operations
        if any(isinstance(each, PathConvertor) for each in operation.param_convertors.values())
    )
    return tuple(dict.fromkeys(found))


class PathFilter:
    """Inside the failures, which turn what it raises into an answer; outside all else that reads
    paths or asks the database who somebody is.
    """

    def __init__(self, app: ASGIApp, paths: PathsConfig, names_below: Sequence[bytes]) -> None:
        self.app = app
        self.paths = paths
        self.names_below = tuple(names_below)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            try:
                self._check(scope)
            except PlatformError:
                if scope["type"] != "websocket":
                    raise
                await WebSocketClose(POLICY_VIOLATION)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises UriTooLong, InvalidInput, NotFound."""
        raw = scope.get("raw_path") or quote(scope["path"]).encode("ascii")
        below = raw.removeprefix(scope.get("root_path", "").encode("utf-8"))
        path = decoded(below, scope["query_string"], self.paths, self.names_below)
        if not is_answered(path, self.paths):
            raise NotFound(f"There is nothing at {scope['path']!r:.300}; see /openapi.json.")
