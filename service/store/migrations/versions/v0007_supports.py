"""Adds to each step what its tokens were drawn among, the temperature, and how long the act took.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_COLUMNS = (("support", sa.LargeBinary), ("temperature", sa.Float(53)), ("seconds", sa.Float(53)))


def upgrade() -> None:
    for name, kind in _COLUMNS:
        op.add_column("steps", sa.Column(name, kind))


def downgrade() -> None:
    filled = sa.text("SELECT episode_id FROM steps WHERE support IS NOT NULL LIMIT 1")
    if episode := op.get_bind().execute(filled).scalar():
        raise ValueError(
            f"the steps of the episode {episode!r} and of others would lose the supports of their tokens, which "
            "training needs. To accept this, set the column `support` of the table `steps` to NULL in all rows"
        )
    with op.batch_alter_table("steps") as steps:
        for name, _ in reversed(_COLUMNS):
            steps.drop_column(name)
