"""Adds the tenant of an episode and API keys. Widens the ids, which now start with the tenant's name.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_IDS = [
    ("episodes", "episode_id"),
    ("episodes", "parent_id"),
    ("episode_tags", "episode_id"),
    ("ancestors", "episode_id"),
    ("ancestors", "ancestor_id"),
    ("feedback", "episode_id"),
    ("steps", "episode_id"),
]


def upgrade() -> None:
    _resize_ids(200)
    op.add_column("episodes", sa.Column("tenant", sa.String(64), nullable=False, server_default="default"))
    op.create_index("ix_episodes_tenant", "episodes", ["tenant", "created_at", "episode_id"])
    active = sa.text("status = 'active'")
    op.create_index("ix_episodes_active", "episodes", ["tenant"], sqlite_where=active, postgresql_where=active)
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("revoked_at", sa.Float(53)),
    )


def downgrade() -> None:
    others = sa.text("SELECT tenant FROM episodes WHERE tenant <> 'default' AND deleted_at IS NULL LIMIT 1")
    if tenant := op.get_bind().execute(others).scalar():
        raise ValueError(f"after the downgrade all callers could read the episodes of the tenant {tenant!r}")
    op.execute("DELETE FROM episodes WHERE tenant <> 'default'")  # only tombstones; no caller could name them any more
    op.drop_table("api_keys")
    op.drop_index("ix_episodes_active", "episodes")
    op.drop_index("ix_episodes_tenant", "episodes")
    with op.batch_alter_table("episodes") as episodes:
        episodes.drop_column("tenant")
    _resize_ids(128)


def _resize_ids(length: int) -> None:
    if op.get_bind().dialect.name == "postgresql":  # SQLite does not enforce lengths
        for table, column in _IDS:
            op.alter_column(table, column, type_=sa.String(length))
