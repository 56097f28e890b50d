"""Creates the tables of episodes and steps.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "episodes",
        sa.Column("episode_id", sa.String(128), primary_key=True),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary(16), nullable=False),
        sa.Column("policy_version", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("status", sa.String(8), nullable=False),
        sa.Column("stop_reason", sa.String(32)),
        sa.Column("success", sa.Integer),
        sa.Column("episode_return", sa.Float(53), nullable=False),
        sa.Column("num_tokens", sa.Integer, nullable=False),
        sa.Column("updated_at", sa.Float(53), nullable=False),
        sa.Column("ended_at", sa.Float(53)),
        sa.Column("deleted_at", sa.Float(53)),
    )
    op.create_index("ix_episodes_created", "episodes", ["created_at", "episode_id"])
    op.create_table(
        "steps",
        sa.Column("episode_id", sa.String(128), primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("closing", sa.Integer, nullable=False),
        sa.Column("token_ids", sa.LargeBinary, nullable=False),
        sa.Column("loss_mask", sa.LargeBinary, nullable=False),
        sa.Column("logprobs", sa.LargeBinary, nullable=False),
        sa.Column("window_start", sa.Integer, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary(16), nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("steps")
    op.drop_table("episodes")
