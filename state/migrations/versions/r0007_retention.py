"""Tenants on their way out, and usage that still says who asked."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0007"
down_revision = "r0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("deleted_as", sa.String(length=128), nullable=True))
    told = sa.text("subject <> ''")
    op.create_index(
        "ix_usage_traceable", "usage", ["day"], postgresql_where=told, sqlite_where=told
    )
