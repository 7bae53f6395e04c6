"""Checkpoints in pages, without loading more of them than are shown.

A page goes on from the last row of the one before, by that row's place in the order: whatever is added meanwhile, nothing comes twice.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, final

from sqlalchemy import BigInteger, ColumnElement, exists, func, literal, select, tuple_
from sqlalchemy.orm import Session

from registry.codec import plain
from registry.db.checkpoint_rows import load_each
from registry.db.filtering import passes, served_by_indexes
from registry.db.lookup import adapter_text, is_adapter, unknown_adapter
from registry.db.tables import AdapterRow, CheckpointRow, MetricRow
from registry.errors import InvalidInput
from registry.filters import Filter
from registry.manifest import Checkpoint
from registry.refs import AdapterName
from registry.selection import sort_key
from registry.teamwork import Page

MAX_PAGE = 1000
_FEW = 5000
_LARGEST_ID = 2**63 - 1
LARGEST = 1.7976931348623157e308  # the largest finite double
Condition = ColumnElement[bool]


@final
@dataclass(frozen=True, slots=True)
class Scope:
    """Which checkpoints: of an adapter, those that pass a filter, those in some namespaces (none: all)."""

    adapter: AdapterName | None = None
    where: Filter | None = None
    namespaces: Sequence[str] = ()

    def adapters(self) -> list[Condition]:
        """Conditions on an adapter's row."""
        named = [] if self.adapter is None else [is_adapter(self.adapter)]
        return [*named, AdapterRow.namespace.in_(self.namespaces)] if self.namespaces else named

    def has_few(self, session: Session) -> bool:
        """Whether these are so few that it is best to look at each of them."""
        if self.adapter is None:
            return False
        return (session.scalar(select(AdapterRow.checkpoints).where(*self.adapters())) or 0) <= _FEW

    def conditions(self, session: Session) -> list[Condition]:
        """Conditions on a checkpoint's row.

        Raises:
            UnknownAdapter: the adapter has no checkpoint, or is in another namespace.
        """
        conditions = [] if self.where is None else [passes(self.where), *narrowed(session, self.where)]
        if self.adapter is not None:
            found = session.scalar(select(AdapterRow.id).where(*self.adapters(), AdapterRow.checkpoints > 0))
            if found is None:
                raise unknown_adapter(session, self.adapter, self.namespaces)
            return [CheckpointRow.adapter_id == found, *conditions]
        if self.namespaces:
            seen = select(AdapterRow.id).where(*self.adapters()).correlate(None)
            return [CheckpointRow.adapter_id.in_(seen), *conditions]
        return conditions


def narrowed(session: Session, where: Filter) -> list[Condition]:
    """What a filter implies, where few pass a part of it: start from those instead of looking at one checkpoint after the other.

    SQLite never does so by itself, and PostgreSQL only where its statistics happen to say that they are few.
    """
    few: list[Condition] = []
    for found in served_by_indexes(where):
        sample = found.limit(_FEW + 1).subquery()
        if (session.scalar(select(func.count()).select_from(sample)) or 0) <= _FEW:
            few.append(CheckpointRow.id.in_(found))
    return few


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """How a list is sorted: by a column, then by id. Rows for which `missing` holds have no value there, and come last."""

    column: ColumnElement[Any]
    kind: type
    descending: bool
    id: ColumnElement[int] = CheckpointRow.id.expression
    table: Any = None  # joined with the checkpoints for the column's sake
    present: tuple[Condition, ...] = ()
    missing: Condition | None = None

    def columns(self) -> tuple[ColumnElement[Any], ...]:
        """What to sort by."""
        return (self.id,) if self.column is self.id else (self.column, self.id)

    def directed(self, *columns: ColumnElement[Any]) -> list[ColumnElement[Any]]:
        """The same, with their direction."""
        return [column.desc() if self.descending else column.asc() for column in columns]

    def after(self, *values: Any) -> Condition:
        """What comes after a row with these values of the last columns of the order."""
        columns = self.columns()[-len(values) :]
        # SQLAlchemy would take the type of the column, which may be a smaller one
        values = tuple(literal(each, BigInteger) if isinstance(each, int) else each for each in values)
        here, there = (tuple_(*columns), tuple_(*values)) if len(values) > 1 else (columns[0], values[0])
        return here < there if self.descending else here > there


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """The last row of a page: its value, None where it has none, and its id."""

    value: Any
    id: int


def page(session: Session, scope: Scope, *, sort: str, cursor: str, limit: int) -> Page[Checkpoint]:
    """A part of a list; see `registry.service.Registry.page`."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidInput("limit", limit, f"expected 1 to {MAX_PAGE}")
    order = _order(sort, of_few=scope.has_few(session))
    place = _read_cursor(cursor, sort, order.kind) if cursor else None
    conditions = scope.conditions(session)
    found: list[_Place] = []
    if place is None or place.value is not None:
        found = _with_value(session, conditions, order, place, limit + 1)
    if order.missing is not None and len(found) <= limit:
        last = place if place and place.value is None else None
        found += _without_value(session, conditions, order, last, limit + 1 - len(found))
    shown = found[:limit]
    following = _cursor(shown[-1], sort) if len(found) > limit else ""
    return Page(items=tuple(load_each(session, [each.id for each in shown])), cursor=following)


def _with_value(
    session: Session, conditions: Sequence[Condition], order: _Order, place: _Place | None, limit: int
) -> list[_Place]:
    statement = select(order.column, order.id).where(*order.present, *conditions)
    if order.table is not None:
        statement = statement.join_from(CheckpointRow, order.table)
    if place is not None:
        values = (place.id,) if order.column is order.id else (place.value, place.id)
        statement = statement.where(order.after(*values))
    rows = session.execute(statement.order_by(*order.directed(*order.columns())).limit(limit))
    return [_Place(value, row_id) for value, row_id in rows]


def _without_value(
    session: Session, conditions: Sequence[Condition], order: _Order, place: _Place | None, limit: int
) -> list[_Place]:
    key = CheckpointRow.id.expression
    statement = select(key).where(*conditions, *([] if order.missing is None else [order.missing]))
    if place is not None:
        last = literal(place.id, BigInteger)
        statement = statement.where(key < last if order.descending else key > last)
    return [_Place(None, row_id) for row_id in session.scalars(statement.order_by(*order.directed(key)).limit(limit))]


def _order(sort: str, *, of_few: bool) -> _Order:
    if not sort:
        return _Order(column=CheckpointRow.id.expression, kind=int, descending=True)
    descending = sort.startswith("-")
    name, metric = sort_key(sort)
    if metric:
        return _by_metric(metric, descending, of_few=of_few)
    if name == "adapter":
        return _Order(column=adapter_text(), kind=str, descending=descending, table=AdapterRow)
    column, kind, missing = {
        "step": (CheckpointRow.step, int, CheckpointRow.step.is_(None)),
        "created": (CheckpointRow.created_at, datetime, None),
        "version": (CheckpointRow.version, int, None),
        "run": (CheckpointRow.run, str, CheckpointRow.run == ""),
        "rank": (CheckpointRow.rank, int, CheckpointRow.rank.is_(None)),
        "size": (CheckpointRow.size_bytes, int, None),
        "parameters": (CheckpointRow.parameters, int, None),
    }[name]
    present = () if missing is None else (~missing,)
    return _Order(column=column.expression, kind=kind, descending=descending, present=present, missing=missing)


def _by_metric(name: str, descending: bool, *, of_few: bool) -> _Order:
    present = finite_metric(name, of_few=of_few)
    return _Order(
        column=MetricRow.value.expression,
        kind=float,
        descending=descending,
        id=MetricRow.checkpoint_id.expression,
        table=MetricRow,
        present=present,
        missing=~exists().where(MetricRow.checkpoint_id == CheckpointRow.id, *present).correlate(CheckpointRow),
    )


def finite_metric(name: str, *, of_few: bool = False) -> tuple[Condition, ...]:
    """That a metric's row is the current one of its name, and neither NaN nor infinite.

    `of_few`: said so that no index leads from the name to the row. Where few checkpoints are looked at, SQLite, which knows nothing of how many
    values there are, would go through everybody's instead.
    """
    value, named = MetricRow.value, MetricRow.name + "" if of_few else MetricRow.name
    return named == name, MetricRow.is_current.expression, value >= -LARGEST, value <= LARGEST


def _cursor(place: _Place, sort: str) -> str:
    text = json.dumps([sort, plain(place.value), place.id], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read_cursor(cursor: str, sort: str, kind: type) -> _Place:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        found_sort, value, row_id = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if kind is datetime and value is not None:
            value = datetime.fromisoformat(value)
        is_ours = found_sort == sort and isinstance(value, (kind, type(None)))
        is_ours = is_ours and all(type(each) is not int or abs(each) <= _LARGEST_ID for each in (value, row_id))
        is_ours = is_ours and type(row_id) is int and type(value) is not bool
    except (ValueError, TypeError, RecursionError):
        is_ours = False
    if not is_ours or (isinstance(value, datetime) and value.tzinfo is None):
        raise InvalidInput("cursor", cursor[:80], "not one of this list: ask for its first page without one")
    return _Place(value, row_id)
