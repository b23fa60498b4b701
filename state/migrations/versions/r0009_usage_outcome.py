"""What the cache did for a request is in the usage ledger."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0009"
down_revision = "r0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "usage",
        sa.Column("outcome", sa.String(length=16), nullable=False, server_default="computed"),
    )
    op.add_column(
        "usage",
        sa.Column("remembered_tokens", sa.BigInteger(), nullable=False, server_default="0"),
    )
