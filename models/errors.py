"""The exceptions every layer raises, and what each one means to a client.

An error says what was given, what was expected and what to do next. Nothing outside
the gateway knows HTTP; the status lives here because it is part of an error's meaning
(spec A5) and because both protocols, ours and OpenAI's, derive from this one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class PlatformError(Exception):
    """Base of all errors with a meaning for the caller.

    Args:
        message: one sentence for a person: what was given, expected, and what to do.
        param: the field of the request at fault, as the client wrote it (``"temperature"``).
        details: further facts, JSON-serialisable.
        retry_after: seconds after which a retry is worth while; ``None`` if unknown.
    """

    code: ClassVar[str] = "INTERNAL_ERROR"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        details: Mapping[str, object] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = dict(details or {})
        self.retry_after = retry_after


class InternalError(PlatformError):
    """Our fault: a failing step, a broken invariant."""


class InvalidInput(PlatformError):
    """The request can never succeed as it is written."""

    code = "INVALID_INPUT"
    status = 400


class PayloadTooLarge(InvalidInput):
    status = 413


class UriTooLong(InvalidInput):
    status = 414


class UnsupportedMediaType(InvalidInput):
    status = 415


class MethodNotAllowed(InvalidInput):
    status = 405


class Unauthorized(PlatformError):
    code = "UNAUTHORIZED"
    status = 401


class Forbidden(PlatformError):
    code = "FORBIDDEN"
    status = 403


class NotFound(PlatformError):
    code = "NOT_FOUND"
    status = 404


class Conflict(PlatformError):
    """Somebody else was faster: look again, then decide again."""

    code = "CONFLICT"
    status = 409


class RateLimited(PlatformError):
    """A quota of the caller is used up."""

    code = "RATE_LIMITED"
    status = 429


class Overloaded(PlatformError):
    """The platform sheds load: a queue is full. Not the caller's quota."""

    code = "OVERLOADED"
    status = 429


class Underestimated(PlatformError):
    """A prompt has more tokens than were reserved for it, and nothing of it was begun.

    Between an engine and a gateway: ``details["prompt_tokens"]`` is what to reserve before
    asking again.
    """


class Timeout(PlatformError):
    """A deadline passed, in the queue or while working."""

    code = "TIMEOUT"
    status = 504


class BodyTimeout(Timeout):
    """The client took too long to send its request; nothing was begun."""

    status = 408


class UpstreamError(PlatformError):
    """An engine replica or an external provider failed or vanished."""

    code = "UPSTREAM_ERROR"
    status = 502


class Unavailable(PlatformError):
    """Not ready: no replica, or state out of reach."""

    code = "UNAVAILABLE"
    status = 503


class StateUnreachable(Unavailable):
    """The database or the counters are out of reach: nothing is let through unmetered."""

    code = "STATE_UNAVAILABLE"


class ConfigError(PlatformError):
    """An operator's mistake, found at start; never reaches a client."""
