"""What will go away says so on every answer, and in the OpenAPI document (spec A12).

One table, ``gateway.deprecations``, for routes, for fields of a request, and for models.
``Deprecation`` is RFC 9745, ``Sunset`` RFC 8594, the ``Link`` to a successor RFC 5829;
``Warning`` has left HTTP's standard (RFC 9111), but it is the one that a person reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from email.utils import format_datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.config import Deprecation, DeprecationsConfig
from deployments.gateway.exchange import Exchange, exchange_of
from deployments.gateway.operation import Operation
from models.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    what: str
    entry: Deprecation
    link: str | None = None
    """Where its successor is."""


def check_table(table: DeprecationsConfig, operations: Sequence[Operation]) -> None:
    """Raises ConfigError: the table names a route or a field that there is not."""
    fields: dict[str, set[str]] = {}
    for operation in operations:
        fields.setdefault(operation.path_format, set()).update(operation.takes.model_fields)
    where = "gateway.deprecations"
    for path in (*table.routes, *table.fields):
        if path not in fields:
            raise ConfigError(
                f"{where}: there is no route {path!r}; expected one of {', '.join(sorted(fields))}"
            )
    for path, entries in table.fields.items():
        if strangers := sorted(entries.keys() - fields[path]):
            raise ConfigError(
                f"{where}.fields: {path} takes no {strangers[0]!r}; expected one of"
                f" {', '.join(sorted(fields[path]))}"
            )


def mark_deprecated(table: DeprecationsConfig, operation: Operation) -> None:
    """So that the document says it."""
    operation.deprecated = operation.path_format in table.routes
    listed = table.fields.get(operation.path_format, {}).keys()
    operation.deprecated_fields = frozenset(listed & operation.takes.model_fields.keys())


def notices(table: DeprecationsConfig, exchange: Exchange) -> Iterator[Notice]:
    """What of a request is deprecated, as far as it is known by now."""
    if entry := table.routes.get(exchange.route):
        link = entry.successor
        yield Notice(what=exchange.route, entry=entry, link=None if link and "{" in link else link)
    fields = table.fields.get(exchange.route, {})
    for name in sorted(fields.keys() & exchange.fields):
        yield Notice(what=f"the field {name}", entry=fields[name])
    if exchange.model is not None and (entry := table.models.get(exchange.model)):
        link = None if entry.successor is None else f"/v1/models/{entry.successor}"
        yield Notice(what=f"the model {exchange.model}", entry=entry, link=link)


def headers(found: Sequence[Notice]) -> Iterator[tuple[str, str]]:
    """Of several notices the earliest dates, and the words of each."""
    if not found:
        return
    yield "deprecation", f"@{int(_midnight(min(each.entry.since for each in found)).timestamp())}"
    if sunsets := [each.entry.sunset for each in found if each.entry.sunset is not None]:
        yield "sunset", format_datetime(_midnight(min(sunsets)), usegmt=True)
    for each in found:
        yield "warning", f'299 - "{words(each)}"'
        if each.link is not None:
            yield "link", f'<{each.link}>; rel="successor-version"'


def words(notice: Notice) -> str:
    entry = notice.entry
    said = f"{notice.what} is deprecated as of {entry.since}"
    if entry.sunset is not None:
        said += f" and goes away on {entry.sunset}"
    return said if entry.successor is None else f"{said}; use {entry.successor}"


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


class Deprecations:
    """Outside the failures: an error of a deprecated route says it, too."""

    def __init__(self, app: ASGIApp, table: DeprecationsConfig) -> None:
        self.app = app
        self.table = table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = exchange_of(scope)

        async def send_with_notices(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = headers(list(notices(self.table, exchange.work or exchange)))
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), value.encode()) for name, value in told),
                ]
            await send(message)

        await self.app(scope, receive, send_with_notices)
