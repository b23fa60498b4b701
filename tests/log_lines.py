"""What a process writes into its log, as a test reads it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.observability import logs


class LogLines(io.StringIO):
    """The stream of a process whose logs are configured as a replica's are."""

    @property
    def lines(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@contextmanager
def written() -> Iterator[LogLines]:
    root, ours = logging.getLogger(), logging.getLogger("deployments")
    before = (root.handlers[:], root.level, ours.level)
    root.handlers = []
    stream = LogLines()
    logs.configure(stream=stream)
    try:
        yield stream
    finally:
        root.handlers, root.level, ours.level = before[0], before[1], before[2]
