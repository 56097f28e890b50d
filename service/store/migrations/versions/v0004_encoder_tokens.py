"""Adds the token ids that the encoder of an encoder-decoder model received.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("encoder_token_ids", sa.LargeBinary))


def downgrade() -> None:
    filled = sa.text("SELECT episode_id FROM steps WHERE encoder_token_ids IS NOT NULL LIMIT 1")
    if episode := op.get_bind().execute(filled).scalar():
        raise ValueError(f"the episode {episode!r} would lose the tokens that its encoder received")
    with op.batch_alter_table("steps") as steps:
        steps.drop_column("encoder_token_ids")
