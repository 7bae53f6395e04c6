"""All rows of one database into another one, whichever kind they are: ids, versions and the chain of events stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from sqlalchemy import JSON, Select, Table, func, insert, select, tuple_, update
from sqlalchemy.orm import Session

from registry.codec import plain
from registry.db.audit import Events
from registry.db.tables import (
    BaseRow,
    CondemnedRow,
    DeliveryRow,
    EventRow,
    JobLineRow,
    JobRow,
    LeaseRow,
    ReplyRow,
    ShardRow,
    ShipmentRow,
    SignInRow,
)
from registry.db.tables import Table as Root
from registry.errors import Changed, Conflict

_BATCH = 1000
# What is only of passing use: work under way, who holds what, what has been answered or sent.
_PASSING = (LeaseRow, CondemnedRow, ReplyRow, ShardRow, JobLineRow, JobRow, DeliveryRow, SignInRow)
_KEPT: tuple[Table, ...] = tuple(
    table for table in Root.metadata.sorted_tables if table not in [each.__table__ for each in _PASSING]
)


def check_target(source: Session, target: Session) -> None:
    """See that a database is empty, or an earlier copy of the source that nobody has changed since.

    Raises:
        Conflict: it is neither.
    """
    last = _last_event(target)
    if last is None:
        if used := next((table.name for table in _KEPT if target.execute(select(table).limit(1)).first()), ""):
            raise Conflict("the database to copy to", f"it is in use: there are {used}")
        return
    if source.scalar(select(EventRow.hash).where(EventRow.number == last[0])) != last[1]:
        raise Conflict("the database to copy to", "it holds another registry, or was changed since it was copied")


def copy_rows(source: Session, target: Session, tell: Callable[[str, int], None]) -> Mapping[str, int]:
    """Put every row into a target that `check_target` has passed, instead of those that it has.

    Args:
        source: one state of the database to copy.
        target: a writing transaction.
        tell: told each table's name and how many rows of it were written since it was told last.

    Returns:
        How many rows each table has now.

    Raises:
        Changed: not every row arrived, or the chain of events is broken.
    """
    target.execute(update(ShipmentRow).values(restores=None))  # or none could go before another
    for table in reversed(_KEPT):
        target.execute(table.delete())
    counts = {table.name: _copy_table(source, target, table, tell) for table in _KEPT}
    for table in _KEPT:
        if (found := _count(target, table)) != counts[table.name]:
            raise Changed(f"the copy of {table.name}", f"{counts[table.name]} rows", f"{found} rows")
    _go_on_counting(target)
    last, chain = _last_event(source), Events(target).verify()
    if last is not None and last != (chain.count, chain.hash):
        raise Changed(
            "the copy of the history", f"{last[0]} events up to {last[1]}", f"{chain.count} up to {chain.hash}"
        )
    return counts


def _last_event(session: Session) -> tuple[int, str] | None:
    found = session.execute(select(EventRow.number, EventRow.hash).order_by(EventRow.number.desc()).limit(1)).first()
    return found and (found.number, found.hash)


def row_count(session: Session) -> int:
    """How many rows there are to copy."""
    return sum(_count(session, table) for table in _KEPT)


def bases_elsewhere(session: Session) -> list[tuple[str, str]]:
    """Name and place of the base models that are not in the store, by name."""
    rows = session.execute(select(BaseRow.name, BaseRow.url).where(~BaseRow.in_store))
    return sorted((row.name, row.url) for row in rows)


def _count(session: Session, table: Table) -> int:
    return session.scalar(select(func.count()).select_from(table)) or 0


def _copy_table(source: Session, target: Session, table: Table, tell: Callable[[str, int], None]) -> int:
    count = 0
    for rows in _batches(source, table):
        target.execute(insert(table), rows)
        count += len(rows)
        tell(table.name, len(rows))
    return count


def _batches(session: Session, table: Table) -> Iterator[list[dict[str, Any]]]:
    """The rows in the order of their keys, which is the one that they may refer to each other in."""
    keys = list(table.primary_key.columns)
    statement: Select[Any] = cast("Select[Any]", select(table).order_by(*keys).limit(_BATCH))
    # older documents have numbers that JSON lacks, which PostgreSQL does not take
    documents = [column.name for column in table.columns if isinstance(column.type, JSON)]
    rows = session.execute(statement).mappings().all()
    while rows:
        yield [{**row, **{name: plain(row[name]) for name in documents}} for row in rows]
        last = [rows[-1][key.name] for key in keys]
        after = tuple_(*keys) > tuple_(*last) if len(keys) > 1 else keys[0] > last[0]
        rows = session.execute(statement.where(after)).mappings().all()


def _go_on_counting(target: Session) -> None:
    """PostgreSQL counts ids by itself and does not notice those that are given."""
    if target.get_bind().dialect.name != "postgresql":
        return
    for table in _KEPT:
        sequence = target.scalar(select(func.pg_get_serial_sequence(table.name, "id"))) if "id" in table.c else None
        if sequence is not None:
            highest = select(func.coalesce(func.max(table.c.id), 0) + 1).scalar_subquery()
            target.execute(select(func.setval(sequence, highest, False)))
