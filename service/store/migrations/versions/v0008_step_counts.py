"""Adds to each episode how many of its steps are no action, and how many somebody else chose.

The columns are null for episodes that an older version opened. Nothing fills them: their steps would have to be read.

Revision ID: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_COLUMNS = ("num_parse_failures", "num_recorded")


def upgrade() -> None:
    for name in _COLUMNS:
        op.add_column("episodes", sa.Column(name, sa.Integer))


def downgrade() -> None:
    with op.batch_alter_table("episodes") as episodes:
        for name in reversed(_COLUMNS):
            episodes.drop_column(name)
