"""An answer that several clients get: whoever comes late hears it from its beginning."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Message, Send

from deployments.tenants.idempotency import Answer


class Recording:
    """Written by one, played to any number, each at the pace of its client.

    It is kept whole while somebody listens, which no answer's length makes dangerous: an
    answer is bounded by what a request may ask for.
    """

    def __init__(self) -> None:
        self.size = 0
        self.over = False
        """It is complete, or will never be."""
        self._start: Message | None = None
        self._pieces: list[bytes] = []
        self._complete = False
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def begin(self, start: Message) -> None:
        self._start = start

    def add(self, body: bytes, *, last: bool) -> None:
        self._pieces.append(body)
        self.size += len(body)
        self._complete = last
        self.over = self.over or last
        self._tell()

    def fail(self, error: Exception) -> None:
        """Whoever listens is raised this, after what was said before; unless all was said."""
        if not self.over:
            self._error, self.over = error, True
            self._tell()

    def replay(self, answer: Answer) -> None:
        """All at once what was said long ago."""
        headers = [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers
        ]
        self.begin({"type": "http.response.start", "status": answer.status, "headers": headers})
        self.add(answer.body, last=True)

    def answer(self, last: bytes, wanted: Callable[[bytes], bool]) -> Answer:
        """What was said, with ``last`` to come, and the headers whose names are ``wanted``."""
        assert self._start is not None
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self._start["headers"]
            if wanted(name)
        ]
        body = b"".join([*self._pieces, last])
        return Answer(status=self._start["status"], headers=headers, body=body)

    async def play(self, send: Send, opening: Callable[[Message], Message]) -> None:
        """From the start, as ``opening`` shows it, to the end; what has gathered is one message.

        Raises:
            Exception: what the work ended with.
        """
        while not self._pieces and not self.over:
            await self._news.wait()
        if self._start is not None and self._pieces:
            await send(opening(self._start))
            # The end of a stream is told apart, or it would be taken for a whole answer.
            whole = any(name == b"content-length" for name, _ in self._start["headers"])
            told = 0
            while told < len(self._pieces) or not self.over:
                if told == len(self._pieces):
                    await self._news.wait()
                    continue
                body, told = b"".join(self._pieces[told:]), len(self._pieces)
                last = self._complete and whole
                await send({"type": "http.response.body", "body": body, "more_body": not last})
            if self._complete and not whole:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        if self._error is not None:
            raise self._error

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
