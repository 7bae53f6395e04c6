"""Filters as conditions in SQL, which pass the same checkpoints as `Filter.matches` on both databases.

No condition is ever NULL, so that `not` may turn any of them round. Whole numbers are compared with whole numbers: a double cannot hold
them all, and an index of theirs does not serve it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, cast, final

from sqlalchemy import BigInteger, ColumnElement, Select, and_, exists, false, literal, not_, or_, select, true
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from registry.db.lookup import adapter_text, is_adapter
from registry.db.tables import (
    BEGINNING_LENGTH,
    AdapterRow,
    AliasRow,
    BaseRow,
    CheckpointRow,
    MetricRow,
    TagRow,
)
from registry.filters import And, Comparison, Exists, Field, Filter, Node, Not, Or, Value
from registry.refs import AdapterName

_FIRST = datetime(1, 1, 1, tzinfo=UTC)
_LAST = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
Condition = ColumnElement[bool]
_Test = Callable[[Any, Any], Condition]


@final
class _Unindexed(FunctionElement[int]):
    """A column for which SQLite looks into no index. It knows nothing of how many share a value, and would start from a rank's many instead of
    an adapter's few."""

    inherit_cache = True
    type = BigInteger()


@compiles(_Unindexed)
def _column(element: _Unindexed, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(element.clauses, **options)


@compiles(_Unindexed, "sqlite")
def _signed_column(element: _Unindexed, compiler: SQLCompiler, **options: Any) -> str:
    return f"+{compiler.process(element.clauses, **options)}"


_LARGEST_WHOLE = 2**63 - 1
_WHOLE: Mapping[str, ColumnElement[Any]] = {
    "step": CheckpointRow.step.expression,
    "version": CheckpointRow.version.expression,
    "rank": _Unindexed(CheckpointRow.rank.expression),
    "parameters": CheckpointRow.parameters.expression,
    "size": CheckpointRow.size_bytes.expression,
}
_TEXT: Mapping[str, ColumnElement[Any]] = {
    "run": CheckpointRow.run.expression,
    "method": CheckpointRow.method.expression,
    "format": CheckpointRow.format.expression,
    "dtype": CheckpointRow.dtype.expression,
    "author": CheckpointRow.author.expression,
    "arch_version": CheckpointRow.arch_version.expression,
}


def passes(where: Filter) -> Condition:
    """What the row of a checkpoint must be like to pass a filter."""
    return _node(where.root)


def served_by_indexes(where: Filter) -> list[Select[int]]:
    """For each part of a filter that all must pass and that an index finds by itself: the ids of the checkpoints that pass it."""
    parts = where.root.parts if isinstance(where.root, And) else (where.root,)
    return [_found(part) for part in parts if isinstance(part, Comparison) and _is_served(part)]


def _is_served(node: Comparison) -> bool:
    is_number = isinstance(node.values[0], float)
    served = ("=", "in", "<", "<=", ">", ">=") if is_number else ("=", "in")
    return node.field.name in ("metric", "tag") and node.operator in served


def _found(node: Comparison) -> Select[int]:
    if node.field.name == "metric":
        is_current = (MetricRow.name == node.field.key, MetricRow.is_current)
        return select(MetricRow.checkpoint_id).where(*is_current, _any(MetricRow.value, node)).correlate(None)
    holds = or_(*(_tag_holds(node.operator, value) for value in node.values))
    return select(TagRow.checkpoint_id).where(TagRow.key == node.field.key, holds).correlate(None)


def _node(node: Node) -> Condition:
    match node:
        case And():
            return and_(*map(_node, node.parts))
        case Or():
            return or_(*map(_node, node.parts))
        case Not():
            return not_(_node(node.part))
        case Exists():
            return _present(node.field)
        case Comparison():
            return _comparison(node)


def _present(field: Field) -> Condition:
    """That there is a value."""
    match field.name:
        case "metric":
            return _metric(field, MetricRow.value.is_not(None))
        case "tag":
            return _tag(field)
        case "alias":
            return _alias()
        case "base":
            return _base(BaseRow.name != "")
        case "alpha":
            return CheckpointRow.alpha.is_not(None)
        case name if name in _WHOLE:
            return _WHOLE[name].is_not(None)
        case name if name in _TEXT:
            return _TEXT[name] != ""
    return true()


def _comparison(node: Comparison) -> Condition:
    values = node.values
    match node.field.name:
        case "metric":
            return _metric(node.field, _any(MetricRow.value, node))
        case "tag":
            return _tag(node.field, or_(*(_tag_holds(node.operator, value) for value in values)))
        case "alias":
            if node.operator == "!=":
                return and_(_alias(), not_(_alias(AliasRow.name == values[0])))
            return _alias(_any(AliasRow.name, node))
        case "adapter":
            return _adapter(node)
        case "base":
            return _base(BaseRow.name != "", _any(BaseRow.name, node))
    return and_(_present(node.field), _attribute(node))


def _attribute(node: Comparison) -> Condition:
    """The comparison of a column of the checkpoint's own row."""
    name, sign = node.field.name, node.operator
    if name == "created":
        return or_(*(_test(sign)(CheckpointRow.created_at, _in_utc(value)) for value in node.values))
    if name in _WHOLE:
        return or_(*(_compare_whole(_WHOLE[name], sign, cast("float", value)) for value in node.values))
    return _any(CheckpointRow.alpha if name == "alpha" else _TEXT[name], node)


def _any(column: Any, node: Comparison) -> Condition:
    return or_(*(_test(node.operator)(column, value) for value in node.values))


def _test(sign: str) -> _Test:
    tests: dict[str, _Test] = {
        "=": operator.eq,
        "in": operator.eq,
        "!=": operator.ne,
        "<": operator.lt,
        "<=": operator.le,
        ">": operator.gt,
        ">=": operator.ge,
        "like": _like,
    }
    return tests[sign]


def _like(column: Any, pattern: str) -> Condition:
    """Letters of ASCII match in either case: so ILIKE does with text by code points, and SQLite's lower()."""
    condition: Condition = column.ilike(pattern.replace("\\", "\\\\"), escape="\\")
    return condition


def _compare_whole(column: ColumnElement[Any], sign: str, value: float) -> Condition:
    """A comparison of a whole number that is there, with any number."""
    if sign in ("=", "in", "!="):
        has_it = (
            column == literal(int(value), BigInteger)
            if value.is_integer() and abs(value) <= _LARGEST_WHOLE
            else false()
        )
        return not_(has_it) if sign == "!=" else has_it
    # x < 2.5 is x < 3, x <= 2.5 is x <= 2
    bound = math.ceil(value) if sign in ("<", ">=") else math.floor(value)
    if abs(bound) > _LARGEST_WHOLE:
        return true() if (bound > 0) == sign.startswith("<") else false()
    return _test(sign)(column, literal(bound, BigInteger))


def _in_utc(value: Value) -> datetime:
    time = cast("datetime", value)
    try:
        return time.astimezone(UTC)
    except OverflowError:  # within a day of the first or the last moment there is
        return _FIRST if time.year == 1 else _LAST


def _metric(field: Field, *conditions: Condition) -> Condition:
    return _has(MetricRow, MetricRow.name == field.key, MetricRow.is_current.expression, *conditions)


def _tag(field: Field, *conditions: Condition) -> Condition:
    return _has(TagRow, TagRow.key == field.key, *conditions)


def _has(part: Any, *conditions: Condition) -> Condition:
    """That a checkpoint has such a part. Only its own row is that of the query around, whatever else is joined there."""
    return exists().where(part.checkpoint_id == CheckpointRow.id, *conditions).correlate(CheckpointRow)


def _tag_holds(sign: str, value: Value) -> Condition:
    if isinstance(value, float):
        return and_(TagRow.number.is_not(None), _test(sign)(TagRow.number, value))
    if sign in ("=", "in"):
        text = cast("str", value)
        begins = TagRow.beginning == text[:BEGINNING_LENGTH]
        # One that is all there is needs no other: PostgreSQL would take the two for independent, and expect a few of the many that pass.
        return begins if len(text) < BEGINNING_LENGTH else and_(begins, TagRow.value == text)
    return _test(sign)(TagRow.value, value)


def _alias(*conditions: Condition) -> Condition:
    return _has(AliasRow, *conditions)


def _adapter(node: Comparison) -> Condition:
    is_exact = node.operator in ("=", "in")
    holds = or_(*(_is_named(str(value)) for value in node.values)) if is_exact else _any(adapter_text(), node)
    return CheckpointRow.adapter_id.in_(select(AdapterRow.id).where(holds).correlate(None))


def _is_named(text: str) -> Condition:
    namespace, slash, name = text.rpartition("/")
    return is_adapter(AdapterName(namespace, name)) if bool(slash) == bool(namespace) else false()


def _base(*conditions: Condition) -> Condition:
    return CheckpointRow.base_id.in_(select(BaseRow.id).where(*conditions).correlate(None))
