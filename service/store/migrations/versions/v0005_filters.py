"""Adds columns and rows to filter by, indexes for retention, and the idempotency key of a rating.

Everything is added, and nothing is required: an older version can use the expanded tables. `service.store.labelling`
fills the new columns of episodes that an older version wrote, in batches while the service runs.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_COLUMNS = (("env", sa.String(256)), ("seed", sa.String(256)), ("label_version", sa.Integer))
_INDEXES = (
    ("ix_episodes_env", ["env", "created_at"], None),
    ("ix_episodes_unlabelled", ["episode_id"], "(label_version IS NULL) = (deleted_at IS NULL)"),
    ("ix_episodes_ended", ["ended_at"], "deleted_at IS NULL AND ended_at IS NOT NULL"),
    ("ix_episodes_deleted", ["deleted_at"], "deleted_at IS NOT NULL"),
)


def upgrade() -> None:
    for name, kind in _COLUMNS:
        op.add_column("episodes", sa.Column(name, kind))
    for name, columns, condition in _INDEXES:
        where = condition and sa.text(condition)
        op.create_index(name, "episodes", columns, sqlite_where=where, postgresql_where=where)
    op.create_table(
        "episode_metadata",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("value", sa.String(256), primary_key=True),
        sa.Column("episode_id", sa.String(200), primary_key=True),
    )
    op.create_index("ix_episode_metadata_episode", "episode_metadata", ["episode_id"])
    op.add_column("feedback", sa.Column("idempotency_key", sa.String(255)))


def downgrade() -> None:
    with op.batch_alter_table("feedback") as feedback:
        feedback.drop_column("idempotency_key")
    op.drop_table("episode_metadata")
    for name, _, _ in reversed(_INDEXES):
        op.drop_index(name, "episodes")
    with op.batch_alter_table("episodes") as episodes:
        for name, _ in reversed(_COLUMNS):
            episodes.drop_column(name)
