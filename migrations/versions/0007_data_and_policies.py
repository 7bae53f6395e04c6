"""What metrics were measured on, and what makes a checkpoint good enough.

Phase: expand.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_COUNTED = ("adapter_id", "name", "split", "direction")


def _text() -> Any:
    return sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Add the column and the table; the counts of metrics, which have the data in their key, are made anew."""
    # as one statement: SQLite then need not copy the table to have the rule
    kind = 'VARCHAR COLLATE "C"' if op.get_bind().dialect.name == "postgresql" else "VARCHAR"
    op.execute(
        f"ALTER TABLE metrics ADD COLUMN data {kind} DEFAULT '' NOT NULL"
        " CONSTRAINT ck_metrics_data_length CHECK (length(data) <= 400)"
    )
    _count_by((*_COUNTED, "data"))
    op.create_table(
        "policies",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("text", _text(), nullable=False),
        sa.Column("author", _text(), nullable=False),
        sa.Column("set_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(text) <= 20000", name=op.f("ck_policies_text_length")),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_policies_author_length")),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name=op.f("fk_policies_adapter_id_adapters"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter_id", name=op.f("pk_policies")),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table("policies")
    _count_by(_COUNTED)
    op.drop_column("metrics", "data")


def _count_by(key: tuple[str, ...]) -> None:
    op.drop_table("adapter_metrics")
    words = [name for name in key if name != "adapter_id"]
    op.create_table(
        "adapter_metrics",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        *(sa.Column(name, _text(), nullable=False) for name in words),
        sa.Column("checkpoints", sa.Integer(), nullable=False),
        sa.Column("finite", sa.Integer(), nullable=False),
        sa.CheckConstraint("direction IN ('', 'lower', 'higher')", name=op.f("ck_adapter_metrics_direction_known")),
        sa.CheckConstraint("checkpoints >= 0", name=op.f("ck_adapter_metrics_checkpoints_not_negative")),
        sa.CheckConstraint("finite >= 0", name=op.f("ck_adapter_metrics_finite_not_negative")),
        *(
            sa.CheckConstraint(f"length({name}) <= 400", name=op.f(f"ck_adapter_metrics_{name}_length"))
            for name in words
            if name != "direction"
        ),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name=op.f("fk_adapter_metrics_adapter_id_adapters"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint(*key, name=op.f("pk_adapter_metrics")),
    )
    op.create_index(op.f("ix_adapter_metrics_name"), "adapter_metrics", ["name"])
    counted = ", ".join("coalesce(direction, '')" if name == "direction" else name for name in key)
    op.execute(
        f"INSERT INTO adapter_metrics ({', '.join(key)}, checkpoints, finite)"  # noqa: S608 - names from above
        f" SELECT {counted}, count(*),"
        " sum(CASE WHEN abs(value) <= 1.7976931348623157e308 THEN 1 ELSE 0 END)"  # the largest finite number
        f" FROM metrics JOIN checkpoints ON checkpoints.id = checkpoint_id WHERE is_current GROUP BY {counted}"
    )
