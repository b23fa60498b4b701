"""Logs as one JSON object a line, joined to requests by their id. Nothing is logged for a
request that went well: its trace is in the metrics.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TextIO

import orjson

from deployments.observability.events import AlertRaised, BatchFailed, Event, RequestFinished

FIELDS = ("request_id", "tenant", "model")

request_fields: ContextVar[Mapping[str, str]] = ContextVar(
    "request_fields", default=MappingProxyType({})
)
"""Set once where a request enters; every line that is logged on its behalf carries them."""

_OURS = ("deployments", "models", "state")

logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """``ts`` (UTC), ``level``, ``logger``, ``message``; then, where known, the ``FIELDS`` from
    ``extra=`` or from ``request_fields``; and ``exception``, the traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = request_fields.get()
        for field in FIELDS:
            value = getattr(record, field, None) or context.get(field)
            if value is not None:
                line[field] = value
        if record.exc_info:
            # Not formatException: it prints, and Serve's replacement of print() garbles it.
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return orjson.dumps(line, default=str).decode()


def configure(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send this process's logs to ``stream``: our own from ``level`` on, everybody else's
    warnings. The default is the process's real stderr, which Ray keeps in the worker's file;
    in a replica ``sys.stderr`` is Serve's logger, which holds back up to 1 000 lines.
    """
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


def log_failures(event: Event) -> None:
    """A subscriber: one line for a request that failed by our fault, for a failed batch, and for
    an alert.
    """
    match event:
        case RequestFinished() if event.status >= 500 or (event.code and event.status < 400):
            logger.error(
                "%s %s failed: %s after %.3f s",
                event.method,
                event.route,
                event.code or event.status,
                event.duration_s,
                extra={
                    "request_id": event.request_id,
                    "tenant": event.tenant,
                    "model": event.model,
                },
            )
        case BatchFailed():
            logger.error(
                "a batch of %d failed: %s", event.rows, event.error, extra={"model": event.model}
            )
        case AlertRaised():
            logger.warning(
                "alert %d: the %s of %s has reached %d %%",
                event.id,
                event.kind,
                event.period,
                event.threshold,
                extra={"tenant": event.tenant},
            )
