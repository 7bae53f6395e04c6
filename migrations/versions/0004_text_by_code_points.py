"""Text is compared and sorted by its code points, whatever the language of the database. SQLite does so by itself.

Phase: expand.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_COLUMNS = sa.text(
    "SELECT table_name, column_name, character_maximum_length FROM information_schema.columns"
    " WHERE table_schema = current_schema() AND data_type = 'character varying' AND table_name <> 'alembic_version'"
    " ORDER BY table_name, ordinal_position"
)


def upgrade() -> None:
    """Change every column of text; rows are not written anew, only indexes."""
    _collate("C")


def downgrade() -> None:
    """Back to the database's own order."""
    _collate("default")


def _collate(collation: str) -> None:
    connection = op.get_bind()
    if connection.dialect.name != "postgresql":
        return
    changes: dict[str, list[str]] = {}
    for table, column, length in connection.execute(_COLUMNS):
        kind = f"varchar({length})" if length else "varchar"
        changes.setdefault(table, []).append(f'ALTER COLUMN "{column}" TYPE {kind} COLLATE "{collation}"')
    for table, alterations in changes.items():
        op.execute(f'ALTER TABLE "{table}" {", ".join(alterations)}')
