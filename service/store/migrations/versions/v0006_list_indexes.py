"""Adds an index for each label that lists are filtered by, sorted as the lists are, and drops those that it replaces.

A page of episodes with a rare label then reads only episodes that have it. Older versions can use the tables as before:
no statement names an index.

Revision ID: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_ACTIVE = sa.text("status = 'active'")
_LABELS = {"env": "env", "group": "episode_group", "policy": "policy", "profile": "profile"}


def upgrade() -> None:
    for name in ("ix_episodes_group", "ix_episodes_env", "ix_episodes_active"):
        op.drop_index(name, "episodes")
    for label, column in _LABELS.items():
        op.create_index(f"ix_episodes_tenant_{label}", "episodes", ["tenant", column, "created_at", "episode_id"])
    _create_active("ix_episodes_tenant_active", ["tenant", "created_at", "episode_id"])


def downgrade() -> None:
    for name in (*_LABELS, "active"):
        op.drop_index(f"ix_episodes_tenant_{name}", "episodes")
    op.create_index("ix_episodes_group", "episodes", ["episode_group", "created_at"])
    op.create_index("ix_episodes_env", "episodes", ["env", "created_at"])
    _create_active("ix_episodes_active", ["tenant"])


def _create_active(name: str, columns: list[str]) -> None:
    op.create_index(name, "episodes", columns, sqlite_where=_ACTIVE, postgresql_where=_ACTIVE)
