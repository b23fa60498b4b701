"""One HTTP operation: a route that validates its input, and documents itself, by one schema."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Generic, TypeAlias, TypeVar

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.body import read_json_body
from deployments.gateway.errors import in_words
from deployments.gateway.exchange import Exchange, exchange_of
from deployments.gateway.schemas.base import Nothing, Strict
from deployments.gateway.validation import parse_json, parse_query
from deployments.tenants.principal import Scope as Right
from models.errors import (
    BodyTimeout,
    Forbidden,
    InternalError,
    InvalidInput,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PlatformError,
    StateUnreachable,
    Timeout,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    UpstreamError,
    UriTooLong,
)

Input = TypeVar("Input", bound=Strict)

ANY_ERRORS = (InvalidInput, UriTooLong, MethodNotAllowed, InternalError, Timeout)
ACCESS_ERRORS = (Unauthorized, Forbidden, StateUnreachable)
"""Of routes that are not for everybody."""
BODY_ERRORS = (BodyTimeout, PayloadTooLarge, UnsupportedMediaType)
MODEL_ERRORS = (NotFound, Overloaded, UpstreamError, Unavailable)


@dataclass(frozen=True, slots=True)
class Call(Generic[Input]):
    """A validated request."""

    exchange: Exchange
    input: Input
    """What a POST, PUT or PATCH carries in its body and a GET in its query."""
    headers: Headers
    path: Mapping[str, str]
    verified: Any = None
    """What the operation's ``verify`` has found."""


Verify: TypeAlias = Callable[[Headers, bytes], object]
"""Takes the headers and the body as it came, before anything reads a meaning into it; raises what
the client is told, or returns what the endpoint shall know."""
Endpoint: TypeAlias = Callable[[Call[Any]], Awaitable[ASGIApp]]
"""Takes a call, returns the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a route may answer, for the OpenAPI document."""

    schema: Any
    """Of the 200 body; ``None``: it is not JSON."""
    media_type: str = "application/json"
    streams: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    """Other media types of a 200, with the schema of one event."""
    other: tuple[str, ...] = ()
    """Further media types of a 200 that are plain text."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names and meanings of headers of a 200."""
    errors: tuple[type[PlatformError], ...] = ()
    """Beside those that every route, and every route with a body, may answer."""


class Repeat(Enum):
    """What becomes of a POST that comes again with its ``Idempotency-Key``."""

    REPLAYED = auto()
    """It gets the first one's answer."""
    REFUSED = auto()
    """The answer has a secret in it, which is not written down: 409."""
    LEFT_TO_ROUTE = auto()
    """The route knows what it has seen; or who asks is known to nobody but the route."""


class Operation(Route):
    """A method on a path. An endpoint never sees input that its schema does not allow."""

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Endpoint,
        *,
        takes: type[Strict] = Nothing,
        answers: Answers,
        summary: str,
        needs: Right | None = Right.INFERENCE,
        repeat: Repeat = Repeat.REPLAYED,
        verify: Verify | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        # A `$` would let a line break stand behind the path.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")
        self.method = method
        self.takes = takes
        self.answers = answers
        self.summary = summary
        self.has_body = method in ("POST", "PUT", "PATCH")
        self.needs = needs
        """What whoever asks must be allowed; ``None``: nothing."""
        self.repeat = repeat
        self.verify = verify
        """Of a route whose body is signed: its authentication, in place of a key."""
        self.headers = dict(headers or {})
        """Names and meanings of request headers, for the OpenAPI document."""
        self.allowed = frozenset(self.methods or ())
        self.on_path = self.allowed
        """Methods of all operations on this path."""
        self.deprecated = False
        self.deprecated_fields: frozenset[str] = frozenset()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        exchange.route = self.path_format
        if scope["method"] not in self.allowed:
            allow = ", ".join(sorted(self.on_path))
            raise MethodNotAllowed(
                f"{self.path_format} does not answer {scope['method']}; it answers {allow}.",
                details={"allow": allow},
            )
        exchange.require(self.needs)
        headers = Headers(scope=scope)
        verified: object = None
        if self.has_body:
            parse_query(Nothing, scope["query_string"])
            raw = await read_json_body(headers, receive)
            if self.verify is not None:
                verified = self.verify(headers, raw)
            value = parse_json(self.takes, raw)
        else:
            value = parse_query(self.takes, scope["query_string"])
        exchange.fields = value.model_fields_set
        call = Call(exchange, value, headers, scope["path_params"], verified)
        try:
            response = await self.endpoint(call)
            await response(scope, receive, send)
        except PlatformError as error:
            if (told := in_words(error, value.other_names)) is error:
                raise
            raise told from error
