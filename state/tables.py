"""Every table of the platform. Change one, then ``python -m state revise "why"``.

Rows are written and read by the layer that owns the subject (``models/registry.py`` …);
this file only says what they look like. Both databases get the same tables.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect

metadata = MetaData(
    naming_convention={  # so that a migration can name what it drops, on either database
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Moment(TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite by itself would forget the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


Facts = JSON().with_variant(postgresql.JSONB(), "postgresql")
Serial = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself only in a column of type INTEGER."""
Name = String(128)
Hash = String(64)


# The registry (models/registry.py)

artifacts = Table(
    "artifacts",
    metadata,
    Column("content_sha256", Hash, primary_key=True),
    Column("uri", Text, nullable=False),
    Column("kind", Name, nullable=False),
    Column("manifest", Text, nullable=False),  # as it was sealed, byte for byte
    Column("size", BigInteger, nullable=False),
    Column("registered", Moment, nullable=False),
    Column("collected", Moment),  # its files are gone, or on their way
)

parents = Table(
    "parents",
    metadata,
    Column("artifact", ForeignKey("artifacts.content_sha256"), primary_key=True),
    Column("parent", Hash, primary_key=True, index=True),  # registered or not
)

versions = Table(
    "versions",
    metadata,
    Column("name", Name, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("artifact", ForeignKey("artifacts.content_sha256"), nullable=False, index=True),
    Column("state", String(16), nullable=False),
    Column("created", Moment, nullable=False),
    Column("created_by", Name, nullable=False),
    UniqueConstraint("name", "artifact"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("name", Name, primary_key=True),
    Column("alias", Name, primary_key=True),
    Column("number", Integer),  # none: taken away; the row stays, so that revisions never recur
    Column("revision", Integer, nullable=False),
    Column("since", Moment, nullable=False),
    Column("by", Name, nullable=False),
    ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
)

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("name", Name, primary_key=True),
    Column("alias", Name, primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("action", String(16), nullable=False),
    Column("number", Integer),
    Column("previous", Integer),
    Column("at", Moment, nullable=False),
    Column("by", Name, nullable=False),
    Column("reason", Text, nullable=False),
)

measurements = Table(
    "measurements",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("artifact", ForeignKey("artifacts.content_sha256"), nullable=False, index=True),
    Column("recorded", Moment, nullable=False),
    Column("facts", Facts, nullable=False),
)

uses = Table(
    "uses",
    metadata,
    Column("kind", String(16), primary_key=True),
    Column("name", Name, primary_key=True),
    Column("replica", Name, primary_key=True),
    Column("artifact", Hash, nullable=False, index=True),
    Column("since", Moment, nullable=False),
    Column("seen", Moment, nullable=False),
)


# Tenants (deployments/tenants/directory.py)

tenants = Table(
    "tenants",
    metadata,
    Column("name", Name, primary_key=True),
    Column("plan", Name, nullable=False),
    Column("overrides", Facts, nullable=False),  # of the plan's limits, by name
    Column("created", Moment, nullable=False),
    Column("suspended", Moment),
    Column("deleted_as", Name),  # its deletion has begun: what is kept of it is called so
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),  # the part of a key that may be shown
    Column("tenant", ForeignKey("tenants.name"), nullable=False, index=True),
    Column("digest", Hash, nullable=False),  # keyed, of the whole key
    Column("label", Text, nullable=False),
    Column("role", String(16), nullable=False),
    Column("scopes", Facts),  # none: all that the role may
    Column("created", Moment, nullable=False),
    Column("expires", Moment),
    Column("revoked", Moment),
)

# Who may see a model (deployments/tenants/visibility.py); one without a row: everybody

model_visibility = Table(
    "model_visibility",
    metadata,
    Column("model", String(256), primary_key=True),  # MODEL or MODEL:ADAPTER
    Column("tenants", Facts, nullable=False),  # a list; an empty one is nobody
    Column("changed", Moment, nullable=False),
)


# What was used (deployments/tenants/ledger.py)

usage = Table(
    "usage",
    metadata,
    Column("entry", String(32), primary_key=True),  # made by the gateway: written once
    Column("at", Moment, nullable=False),
    Column("day", String(10), nullable=False),  # of ``at``, in UTC; the same text in any database
    Column("tenant", Name, nullable=False),
    Column("subject", Text, nullable=False),
    Column("request_id", Name, nullable=False),
    Column("route", Name, nullable=False),
    Column("model", Name, nullable=False),
    Column("adapter", Name),
    Column("model_version", String(256)),  # NAME@VERSION, or a source that never changes
    Column("adapter_version", Name),  # NAME@VERSION
    Column("status", Integer, nullable=False),
    Column("code", Name),
    Column("outcome", String(16), nullable=False, server_default="computed"),  # or hit, join
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("remembered_tokens", BigInteger, nullable=False, server_default="0"),  # not paid for
    Column("queue_ms", Integer, nullable=False),
    Column("prefill_ms", Integer, nullable=False),
    Column("decode_ms", Integer, nullable=False),
    Column("cost", BigInteger, nullable=False),  # millionths of the currency
    Index("ix_usage_tenant", "tenant", "day"),
    Index("ix_usage_day", "day"),
    Index(
        "ix_usage_traceable",  # what still says who asked, for the retention
        "day",
        postgresql_where=text("subject <> ''"),
        sqlite_where=text("subject <> ''"),
    ),
)

# What somebody was told of (deployments/tenants/alerts.py)

alerts = Table(
    "alerts",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("at", Moment, nullable=False),
    Column("tenant", Name, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("period", String(10), nullable=False),  # the month, in UTC
    Column("threshold", Integer, nullable=False),  # percent
    Column("entry", String(32), nullable=False, index=True),  # made by the gateway that tells
    UniqueConstraint("tenant", "kind", "period", "threshold"),
    sqlite_autoincrement=True,
)

# Idempotency keys (deployments/tenants/idempotency.py)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", Name, primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("owner", String(32), nullable=False),  # whose lease it is, or was
    Column("fingerprint", Hash, nullable=False),  # of the request
    Column("until", Moment, nullable=False),  # the end of the lease, later of the answer
    Column("finished", Moment),  # none: at work
    Column("status", Integer),  # none of a finished one: an answer that is not written down
    Column("headers", Facts),
    Column("body", LargeBinary),
    Index("ix_idempotency_until", "until"),
)


# Webhooks that came in (deployments/webhooks/inbox.py)

webhook_events = Table(
    "webhook_events",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("tenant", Name, nullable=False),
    Column("source", Name, nullable=False),
    Column("key", String(255), nullable=False),  # by which a delivery is known
    Column("event_id", Name, nullable=False),
    Column("type", Name, nullable=False),
    Column("payload", Text, nullable=False),  # JSON, as text: JSONB would refuse U+0000
    Column("body_sha256", Hash, nullable=False, index=True),
    Column("signed", Moment, nullable=False),
    Column("received", Moment, nullable=False, index=True),
    UniqueConstraint("tenant", "source", "key"),
    sqlite_autoincrement=True,  # an id that is free again is not given again: readers go by it
)


# For everyone

audit = Table(
    "audit",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("at", Moment, nullable=False),
    Column("who", Name, nullable=False),
    Column("what", Name, nullable=False),
    Column("subject", Text, nullable=False),
    Column("details", Facts, nullable=False),
    Index("ix_audit_at", "at"),
)
