"""Server-sent events and NDJSON: how one event becomes bytes."""

from __future__ import annotations

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
SSE_COMMENT = b": keep-alive\n\n"
SSE_DONE = b"data: [DONE]\n\n"


def sse_event(data: bytes, event: bytes | None = None) -> bytes:
    """One event. ``data`` is JSON, so it holds no line break."""
    if event is None:
        return b"data: " + data + b"\n\n"
    return b"event: " + event + b"\ndata: " + data + b"\n\n"


def ndjson_line(data: bytes, event: bytes) -> bytes:
    """The same event as one JSON object on a line."""
    return b'{"event":"' + event + b'","data":' + data + b"}\n"
