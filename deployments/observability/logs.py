"""Logs as one JSON object a line, joined to requests by their id. Nothing is logged for a
request that went well: its trace is in the metrics.

A line may hold what an exception says, and that may be anything, also what somebody has sent. So
personal data is masked in every line, by the rules of the guardrails (spec C10).
"""

from __future__ import annotations

import logging
import sys
import traceback
from contextvars import ContextVar
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from ipaddress import ip_address
from typing import Protocol, TextIO

import orjson
from opentelemetry import trace

from deployments.guardrails.kinds import Action, PiiKind
from deployments.guardrails.pii import RULES
from deployments.guardrails.rules import Rule
from deployments.guardrails.screen import Masker, Screen
from deployments.observability.events import AlertRaised, BatchFailed, Event, RequestFinished


class Asked(Protocol):
    """A request, as far as it is known by now."""

    @property
    def id(self) -> str: ...

    @property
    def tenant(self) -> str: ...

    @property
    def model(self) -> str | None: ...


on_behalf_of: ContextVar[Asked | None] = ContextVar("on_behalf_of", default=None)
"""Set once where a request enters; every line that is logged on its behalf names it. Tasks inherit
it: one that works for whoever comes is begun in a ``Context()`` of its own.
"""

FIELDS = ("request_id", "tenant", "model")
LONGEST = 4_000
"""Characters of a message, and of each part of a traceback, that are written."""

_OURS = ("deployments", "models", "state")

logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """``ts`` (UTC), ``level``, ``logger``, ``message``; then, where known, the ``FIELDS`` from
    ``extra=`` or of whom it is ``on_behalf_of``; ``trace_id``; and ``exception``, the traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": discreet(record.getMessage()),
        }
        asked = on_behalf_of.get()
        known = {} if asked is None else about(asked)
        for field in FIELDS:
            value = getattr(record, field, None) or known.get(field)
            if value is not None:
                line[field] = value
        if (span := trace.get_current_span().get_span_context()).is_valid:
            line["trace_id"] = trace.format_trace_id(span.trace_id)
        if record.exc_info:
            # Not formatException: it prints, and Serve's replacement of print() garbles it.
            parts = traceback.format_exception(*record.exc_info)
            line["exception"] = "".join(map(discreet, parts))
        return orjson.dumps(line, default=str).decode()


def about(request: Asked) -> dict[str, str | None]:
    """The ``extra=`` of a line that names its request where no context does: in other threads."""
    return {"request_id": request.id, "tenant": request.tenant, "model": request.model}


def discreet(text: str) -> str:
    """As much of it as is written, personal data masked."""
    if len(text) <= LONGEST:
        return Masker(_screen()).push(text, last=True)
    # What may go on behind the cut is not shown: half a number would not be known for one.
    shown = Masker(_screen()).push(text[:LONGEST])
    return f"{shown}…\n" if text.endswith("\n") else f"{shown}…"


@cache
def _screen() -> Screen:
    return Screen(
        [
            (_of_strangers(rule) if kind is PiiKind.IP else rule, Action.MASK)
            for kind, rules in RULES.items()
            for rule in rules
        ]
    )


def _of_strangers(rule: Rule) -> Rule:
    """Leaves the addresses of private networks: who looks for a machine has to find it."""

    def fit(text: str) -> int:
        length = rule.fit(text)
        return length if length and ip_address(text[:length]).is_global else 0

    return replace(rule, fit=fit)


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
        case RequestFinished() if event.failed:
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
