"""Indexes of everybody's checkpoints by step, rank and size, and of what somebody has a lease on.

Phase: expand.
"""

from alembic import op

revision = "0008"
down_revision = "0007"

_INDEXES = (
    ("checkpoints", ("step", "id")),
    ("checkpoints", ("rank", "id")),
    ("checkpoints", ("size_bytes", "id")),
    ("leases", ("holder",)),
)


def upgrade() -> None:
    """Make them."""
    for table, columns in _INDEXES:
        op.create_index(_name(table, columns), table, list(columns))


def downgrade() -> None:
    """Drop them."""
    for table, columns in _INDEXES:
        op.drop_index(_name(table, columns), table_name=table)


def _name(table: str, columns: tuple[str, ...]) -> str:
    return op.f(f"ix_{table}_{'_'.join(columns)}")
