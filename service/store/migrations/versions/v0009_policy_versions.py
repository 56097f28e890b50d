"""Adds the versions of adapters, the history of their aliases, the default policy, and the version of each episode.

Everything is added, and nothing is required: an older replica goes on to use the table `policies`, which now contains
the aliases. `service.store.policies` adds the rows that an older replica leaves out.

Revision ID: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "policy_versions",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("loaded_at", sa.Float(53), nullable=False),
        sa.Column("parent", sa.String(160)),
        sa.Column("round", sa.Integer),
        sa.Column("evaluation", sa.Text),
    )
    op.create_table(
        "policy_moves",
        sa.Column("move_id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("moved_at", sa.Float(53), nullable=False),
    )
    op.create_index("ix_policy_moves_name", "policy_moves", ["name", "move_id"])
    op.create_table(
        "policy_default",
        sa.Column("key", sa.Integer, primary_key=True),
        sa.Column("policy", sa.String(160), nullable=False),
    )
    op.add_column("episodes", sa.Column("policy_digest", sa.String(64)))


def downgrade() -> None:
    lost = sa.text(
        "SELECT name, digest FROM policy_versions v WHERE parent IS NOT NULL OR round IS NOT NULL "
        "OR evaluation IS NOT NULL OR NOT EXISTS "
        "(SELECT 1 FROM policies p WHERE p.name = v.name AND p.digest = v.digest) LIMIT 1"
    )
    if found := op.get_bind().execute(lost).first():
        raise ValueError(
            f"the version {found.name}@{found.digest[:12]} or its lineage would be lost. If you do not need them, "
            f"delete the policy {found.name!r} (DELETE /policy/{found.name}), run `episodic purge`, and migrate again"
        )
    with op.batch_alter_table("episodes") as episodes:
        episodes.drop_column("policy_digest")
    for table in ("policy_default", "policy_moves", "policy_versions"):
        op.drop_table(table)
