"""The bytes of a JSON body: is it declared as JSON, is it all there."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Receive

from models.errors import UnsupportedMediaType

JSON_TYPES = frozenset({"application/json", "application/json;charset=utf-8"})


async def read_json_body(headers: Headers, receive: Receive) -> bytes:
    """All of the body.

    Raises:
        UnsupportedMediaType: it is declared to be something else than plain JSON in UTF-8.
    """
    declared = headers.get("content-type", "")
    if declared != "application/json" and _normal(declared) not in JSON_TYPES:
        raise UnsupportedMediaType(
            f"The body's content-type is {declared!r:.80}; send application/json."
        )
    encoding = headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedMediaType(
            f"The body's content-encoding is {encoding!r:.80}; send it uncompressed."
        )
    return await read_body(receive)


async def read_body(receive: Receive) -> bytes:
    """All of it, whatever it is declared to be."""
    message = await receive()
    if not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        return body
    chunks = [message.get("body", b"")]
    while message.get("more_body", False):
        message = await receive()
        chunks.append(message.get("body", b""))
    return b"".join(chunks)


def _normal(media_type: str) -> str:
    return media_type.lower().replace(" ", "").replace('"', "")
