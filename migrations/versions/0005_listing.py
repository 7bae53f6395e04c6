"""What lists are read from: columns and indexes that repeat what documents and other tables say.

Phase: expand.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_BATCH = 1000
_NUMBER = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_CURRENT: Any = {"sqlite_where": sa.text("is_current = 1"), "postgresql_where": sa.text("is_current")}
_INDEXES: tuple[tuple[str, Sequence[str], dict[str, Any]], ...] = (
    ("checkpoints", ("adapter_id", "run", "version"), {}),
    ("checkpoints", ("run",), {}),
    ("checkpoints", ("created_at",), {}),
    ("metrics", ("checkpoint_id", "name"), {"unique": True, **_CURRENT}),
    ("metrics", ("name", "value", "checkpoint_id"), _CURRENT),
    ("tags", ("key", "beginning", "checkpoint_id"), {}),
    ("tags", ("key", "number", "checkpoint_id"), {}),
    ("shipments", ("environment", "adapter_id", "id"), {}),
    ("events", ("about", "number"), {}),
)


def _text() -> Any:
    return sa.String().with_variant(sa.String(collation="C"), "postgresql")


def _columns() -> dict[str, list[sa.Column[Any]]]:
    """The new columns. They have defaults because the rows are there before what they are filled with."""
    return {
        "adapters": [sa.Column("checkpoints", sa.Integer(), nullable=False, server_default="0")],
        "checkpoints": [
            sa.Column("method", _text(), nullable=False, server_default=""),
            sa.Column("format", _text(), nullable=False, server_default=""),
            sa.Column("dtype", _text(), nullable=False, server_default=""),
            sa.Column("rank", sa.BigInteger(), nullable=True),
            sa.Column("alpha", sa.Double(), nullable=True),
            sa.Column("parameters", sa.BigInteger(), nullable=False, server_default="0"),
            sa.Column("size_bytes", sa.BigInteger(), nullable=False, server_default="0"),
        ],
        "metrics": [sa.Column("is_current", sa.Boolean(), nullable=False, server_default=sa.true())],
        "tags": [
            sa.Column("beginning", _text(), nullable=False, server_default=""),
            sa.Column("number", sa.Double(), nullable=True),
        ],
        "shipments": [sa.Column("adapter_id", sa.Integer(), nullable=False, server_default="0")],
        "events": [sa.Column("about", _text(), nullable=False, server_default="")],
    }


def upgrade() -> None:
    """Add and fill the columns, count the metrics of each adapter, and make the indexes last."""
    for table, columns in _columns().items():
        for column in columns:
            op.add_column(table, column)
    op.create_table(
        "adapter_metrics",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("name", _text(), nullable=False),
        sa.Column("split", _text(), nullable=False),
        sa.Column("direction", _text(), nullable=False),
        sa.Column("checkpoints", sa.Integer(), nullable=False),
        sa.Column("finite", sa.Integer(), nullable=False),
        sa.CheckConstraint("direction IN ('', 'lower', 'higher')", name=op.f("ck_adapter_metrics_direction_known")),
        sa.CheckConstraint("checkpoints >= 0", name=op.f("ck_adapter_metrics_checkpoints_not_negative")),
        sa.CheckConstraint("finite >= 0", name=op.f("ck_adapter_metrics_finite_not_negative")),
        sa.CheckConstraint("length(name) <= 400", name=op.f("ck_adapter_metrics_name_length")),
        sa.CheckConstraint("length(split) <= 400", name=op.f("ck_adapter_metrics_split_length")),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name=op.f("fk_adapter_metrics_adapter_id_adapters"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter_id", "name", "split", "direction", name=op.f("pk_adapter_metrics")),
    )
    op.create_index(op.f("ix_adapter_metrics_name"), "adapter_metrics", ["name"])
    _fill()
    for table, names, options in _INDEXES:
        op.create_index(op.f(f"ix_{table}_{'_'.join(names)}"), table, list(names), **options)


def downgrade() -> None:
    """Drop them."""
    for table, names, _ in _INDEXES:
        op.drop_index(op.f(f"ix_{table}_{'_'.join(names)}"), table)
    op.drop_table("adapter_metrics")
    for table, columns in _columns().items():
        for column in columns:
            op.drop_column(table, column.name)


def _fill() -> None:
    _fill_rows("checkpoints", "id", ["manifest"], _from_manifest)
    _fill_rows("tags", "id", ["value"], _from_value)
    _fill_rows("events", "number", ["subject"], lambda subject: {"about": subject.partition("@")[0][:400]})
    op.execute(
        "UPDATE metrics SET is_current = false WHERE id NOT IN (SELECT max(id) FROM metrics GROUP BY checkpoint_id, name)"
    )
    op.execute(
        "UPDATE shipments SET adapter_id ="
        " (SELECT adapter_id FROM checkpoints WHERE checkpoints.id = shipments.checkpoint_id)"
    )
    op.execute(
        "UPDATE adapters SET checkpoints = (SELECT count(*) FROM checkpoints WHERE checkpoints.adapter_id = adapters.id)"
    )
    op.execute(
        "INSERT INTO adapter_metrics (adapter_id, name, split, direction, checkpoints, finite)"
        " SELECT adapter_id, name, split, coalesce(direction, ''), count(*),"
        " sum(CASE WHEN abs(value) <= 1.7976931348623157e308 THEN 1 ELSE 0 END)"  # the largest finite number
        " FROM metrics JOIN checkpoints ON checkpoints.id = checkpoint_id WHERE is_current"
        " GROUP BY adapter_id, name, split, coalesce(direction, '')"
    )


def _fill_rows(name: str, key: str, sources: Sequence[str], made_of: Callable[..., dict[str, Any]]) -> None:
    """Fill columns of a table from others of the same row, a batch at a time."""
    connection = op.get_bind()
    table = sa.Table(name, sa.MetaData(), autoload_with=connection)
    done = 0
    while rows := connection.execute(
        sa.select(table.c[key], *(table.c[each] for each in sources))
        .where(table.c[key] > done)
        .order_by(table.c[key])
        .limit(_BATCH)
    ).all():
        done = rows[-1][0]
        values = [{"row_key": row[0], **made_of(*row[1:])} for row in rows]
        names = [each for each in values[0] if each != "row_key"]
        change = table.update().where(table.c[key] == sa.bindparam("row_key"))
        connection.execute(change.values({each: sa.bindparam(each) for each in names}), values)


def _from_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    kept = {each: manifest[each] for each in ("method", "format", "dtype", "rank", "alpha", "parameters")}
    return {**kept, "size_bytes": sum(entry["size_bytes"] for entry in manifest["files"])}


def _from_value(value: str) -> dict[str, Any]:
    return {"beginning": value[:96], "number": float(value) if _NUMBER.fullmatch(value) else None}
