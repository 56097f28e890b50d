"""Adds labels for filters, forks, expiry, dropped thoughts, feedback, and adapters.

Revision ID: 0002
"""

import orjson
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in (
        sa.Column("policy", sa.Text),
        sa.Column("profile", sa.String(128)),
        sa.Column("episode_group", sa.String(128)),
        sa.Column("parent_id", sa.String(128)),
        sa.Column("parent_step", sa.Integer),
        sa.Column("expires_at", sa.Float(53)),
    ):
        op.add_column("episodes", column)
    op.create_index("ix_episodes_group", "episodes", ["episode_group", "created_at"])
    op.create_index("ix_episodes_expires", "episodes", ["expires_at"])
    for name in ("dropped_from", "dropped_to"):
        op.add_column("steps", sa.Column(name, sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "episode_tags",
        sa.Column("tag", sa.String(128), primary_key=True),
        sa.Column("episode_id", sa.String(128), primary_key=True),
    )
    op.create_index("ix_episode_tags_episode", "episode_tags", ["episode_id"])
    op.create_table(
        "ancestors",
        sa.Column("episode_id", sa.String(128), primary_key=True),
        sa.Column("ancestor_id", sa.String(128), primary_key=True),
        sa.Column("num_steps", sa.Integer, nullable=False),
    )
    op.create_index("ix_ancestors_ancestor", "ancestors", ["ancestor_id"])
    op.create_table(
        "feedback",
        sa.Column("feedback_id", sa.Integer, primary_key=True),
        sa.Column("episode_id", sa.String(128), nullable=False),
        sa.Column("step", sa.Integer),
        sa.Column("rating", sa.Integer, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("rater", sa.String(128)),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    op.create_index("ix_feedback_episode", "feedback", ["episode_id"])
    op.create_table(
        "policies",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("loaded_at", sa.Float(53), nullable=False),
    )
    _label()


def downgrade() -> None:
    if fork := op.get_bind().execute(sa.text("SELECT episode_id FROM ancestors LIMIT 1")).scalar():
        raise ValueError(f"the fork {fork!r} would lose steps that it shares with its parent; delete the forks first")
    for table in ("policies", "feedback", "ancestors", "episode_tags"):
        op.drop_table(table)
    op.drop_index("ix_episodes_expires", "episodes")
    op.drop_index("ix_episodes_group", "episodes")
    with op.batch_alter_table("steps") as steps:
        steps.drop_column("dropped_to")
        steps.drop_column("dropped_from")
    with op.batch_alter_table("episodes") as episodes:
        for name in ("expires_at", "parent_step", "parent_id", "episode_group", "profile", "policy"):
            episodes.drop_column(name)


def _label() -> None:
    """Fills the label columns and tags of existing episodes from their requests."""
    columns = [sa.column(name, sa.Text) for name in ("episode_id", "request", "policy", "episode_group")]
    episodes, tags = sa.table("episodes", *columns), sa.table("episode_tags", sa.column("tag"), sa.column("episode_id"))
    connection = op.get_bind()
    for episode_id, request in connection.execute(sa.select(episodes.c.episode_id, episodes.c.request)).all():
        body = orjson.loads(request)
        labels = {"policy": body.get("policy"), "episode_group": body.get("group")}
        connection.execute(sa.update(episodes).where(episodes.c.episode_id == episode_id).values(**labels))
        for tag in dict.fromkeys(body.get("tags", ())):
            connection.execute(sa.insert(tags).values(tag=tag, episode_id=episode_id))
