"""Origins: what a checkpoint was made of.

Phase: expand.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the tables; checkpoints from before were all trained, and have no origin."""
    op.create_table(
        "origins",
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.CheckConstraint("length(action) <= 96", name=op.f("ck_origins_action_length")),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_origins_checkpoint_id_checkpoints"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", name=op.f("pk_origins")),
    )
    op.create_table(
        "parents",
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=False),
        sa.CheckConstraint("position >= 0", name=op.f("ck_parents_position_not_negative")),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_parents_checkpoint_id_checkpoints"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["checkpoints.id"], name=op.f("fk_parents_parent_id_checkpoints"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "position", name=op.f("pk_parents")),
    )
    op.create_index(op.f("ix_parents_parent_id"), "parents", ["parent_id"], unique=False)


def downgrade() -> None:
    """Drop them; what was made of others counts as trained again."""
    op.drop_table("parents")
    op.drop_table("origins")
