"""Server-sent events and NDJSON: how one event becomes bytes."""

from __future__ import annotations

import re

from models.contracts import Place

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
SSE_COMMENT = b": keep-alive\n\n"
SSE_DONE = b"data: [DONE]\n\n"


UNICODE_LINE_BREAK = re.compile(rb"\xc2\x85|\xe2\x80[\xa8\xa9]")
ESCAPES = {b"\xc2\x85": b"\\u0085", b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029"}


def one_line(json: bytes) -> bytes:
    """The same JSON without what Unicode calls a line break.

    JSON escapes the ASCII ones. Many clients split a stream where Python's ``splitlines``
    does, which is more often than the specification of server-sent events says.
    """
    if json.isascii():
        return json
    return UNICODE_LINE_BREAK.sub(lambda found: ESCAPES[found.group()], json)


def sse_place(place: Place) -> bytes:
    """A comment, which a client that knows nothing of it does not see."""
    wait = "" if place.wait_s is None else f" wait={place.wait_s:.1f}s"
    return f": queue position={place.position} of={place.waiting}{wait}\n\n".encode()


def sse_event(data: bytes, event: bytes | None = None) -> bytes:
    """One event. ``data`` is JSON."""
    name = b"" if event is None else b"event: " + event + b"\n"
    return name + b"data: " + one_line(data) + b"\n\n"


def ndjson_line(data: bytes, event: bytes) -> bytes:
    """The same event as one JSON object on a line."""
    return b'{"event":"' + event + b'","data":' + one_line(data) + b"}\n"
