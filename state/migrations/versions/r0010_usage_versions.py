"""Which version of a model, and of an adapter, did the work is in the usage ledger."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0010"
down_revision = "r0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("usage", sa.Column("model_version", sa.String(length=256), nullable=True))
    op.add_column("usage", sa.Column("adapter_version", sa.String(length=128), nullable=True))
