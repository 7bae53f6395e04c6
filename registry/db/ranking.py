"""The best checkpoints by a metric, from counts and indexes: the same as `registry.selection.best` of all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Select, case, func, select
from sqlalchemy.orm import Session

from registry.db.checkpoint_rows import load_each
from registry.db.listing import LARGEST, Scope, finite_metric, narrowed
from registry.db.lookup import adapter_text
from registry.db.tables import AdapterMetricRow, AdapterRow, CheckpointRow, MetricRow
from registry.errors import DirectionUnknown, MixedData, UnknownMetric
from registry.manifest import Checkpoint, Direction
from registry.results import AdapterLine
from registry.selection import Basis, Group, Grouping, Ranking, Tally, choose, group_key, known_direction, most_telling

_FEW = 5000
_TRIED = 3


def rank(
    session: Session,
    scope: Scope,
    *,
    metric: str | None,
    direction: Direction | None,
    per: Grouping | None,
    top: int,
) -> Ranking:
    """The best of some checkpoints; see `registry.service.Registry.rank`."""
    conditions = scope.conditions(session)
    candidates = _count(session, scope, conditions)
    counted = _tallies(session, scope, conditions, metric)
    if not any(tally.finite for tally in counted):  # then others are suggested
        counted = _tallies(session, scope, conditions, None)
    basis = choose(counted, candidates, metric=metric, direction=direction, top=top)
    ranked = sum(tally.finite for tally in counted if tally.name == basis.metric)
    of_few = scope.adapter is not None and ranked <= _FEW
    statement = _ranked(conditions, basis.metric, basis.direction, of_few=of_few)
    ids = _first(statement, top) if per is None else _first_of_each(statement, per, top)
    found = load_each(session, list(session.scalars(ids)))
    return Ranking(
        metric=basis.metric,
        direction=basis.direction,
        groups=_groups(found, per),
        candidates=candidates,
        without=basis.without,
    )


def foremost(session: Session, scope: Scope, metric: str, front: int) -> Checkpoint | None:
    """The best by a metric, found without counting what passes the filter.

    None where there is none, where nobody says which way is better, where it was measured on different data, and where a filter that many
    pass lets none of the best through, `front` of them.
    """
    counted = [each for each in _tallies(session, replace(scope, where=None), (), metric) if each.finite]
    direction = known_direction(metric, counted)
    if direction is None or len({tally.data for tally in counted}) != 1:
        return None
    conditions, candidates = scope.conditions(session), sum(tally.finite for tally in counted)
    if scope.where is not None and scope.adapter is None and candidates > front and not narrowed(session, scope.where):
        statement = _first_of_front(conditions, metric, direction, front)
    else:
        of_few = scope.where is not None or (scope.adapter is not None and candidates <= _FEW)
        statement = _first(_ranked(conditions, metric, direction, of_few=of_few), 1)
    found = list(session.scalars(statement))
    return load_each(session, found)[0] if found else None


def leading(session: Session, lines: Mapping[int, AdapterLine]) -> Mapping[int, tuple[Basis, int]]:
    """What adapters are ranked by, and the ids of their best checkpoints; by the adapters' ids.

    That is the metric that all of an adapter's checkpoints share, or else the first that tells. Those that nobody can rank are left out.
    """
    row = AdapterMetricRow
    kept: Select[*tuple[Any, ...]] = select(
        row.adapter_id, row.name, row.split, row.direction, row.data, row.checkpoints, row.finite
    ).where(row.adapter_id.in_(list(lines)), row.checkpoints > 0)
    counted = defaultdict[int, list[Tally]](list)
    for adapter_id, name, split, direction, data, checkpoints, finite in session.execute(kept):
        counted[adapter_id].append(Tally(name, split, direction or None, data, checkpoints, finite))
    found = {}
    for adapter_id, line in lines.items():
        if basis := _telling(counted[adapter_id], line):
            best = _best_of(adapter_id, basis, of_few=line.checkpoints <= _FEW)
            found[adapter_id] = basis, session.scalars(best).one()
    return found


def _telling(counted: Sequence[Tally], line: AdapterLine) -> Basis | None:
    for metric in (None, *most_telling(line.metrics)[:_TRIED]):
        with suppress(UnknownMetric, DirectionUnknown, MixedData):
            return choose(counted, line.checkpoints, metric=metric, direction=None, top=1)
    return None


def _best_of(adapter_id: int, basis: Basis, *, of_few: bool) -> Select[int]:
    in_adapter = [CheckpointRow.adapter_id == adapter_id]
    return _first(_ranked(in_adapter, basis.metric, basis.direction, of_few=of_few), 1)


def _first_of_front(
    conditions: Sequence[ColumnElement[bool]], metric: str, direction: Direction, front: int
) -> Select[int]:
    """The id of the best of those that pass, from among the best `front` of all. They are a table of their own: otherwise SQLite goes on
    through all the others."""
    value = MetricRow.value.asc() if direction == "lower" else MetricRow.value.desc()
    statement = select(MetricRow.checkpoint_id, MetricRow.value).where(*finite_metric(metric))
    found = statement.order_by(value).limit(front).subquery()
    return (
        select(CheckpointRow.id)
        .join_from(CheckpointRow, found, found.c.checkpoint_id == CheckpointRow.id)
        .join(AdapterRow)
        .where(*conditions)
        .order_by(*_best_first(found.c.value, direction))
        .limit(1)
    )


def _groups(found: Sequence[Checkpoint], per: Grouping | None) -> tuple[Group, ...]:
    groups: dict[str, list[Checkpoint]] = {}
    for checkpoint in found:
        groups.setdefault(group_key(checkpoint, per), []).append(checkpoint)
    return tuple(Group(key=key, checkpoints=tuple(members)) for key, members in sorted(groups.items()))


def _count(session: Session, scope: Scope, conditions: Sequence[ColumnElement[bool]]) -> int:
    if scope.where is None:
        statement = select(func.sum(AdapterRow.checkpoints)).where(*scope.adapters())
    else:
        statement = select(func.count()).select_from(CheckpointRow).where(*conditions)
    return int(session.scalar(statement) or 0)


def _tallies(
    session: Session, scope: Scope, conditions: Sequence[ColumnElement[bool]], metric: str | None
) -> list[Tally]:
    """The counts of all metrics, or of one."""
    statement = _kept_tallies(scope, metric) if scope.where is None else _counted_tallies(conditions, metric)
    return [
        Tally(name, split, direction or None, data, int(checkpoints), int(finite))
        for name, split, direction, data, checkpoints, finite in session.execute(statement)
    ]


def _kept_tallies(scope: Scope, metric: str | None) -> Select[*tuple[Any, ...]]:
    """The counts that are kept of every adapter, added up."""
    key = (AdapterMetricRow.name, AdapterMetricRow.split, AdapterMetricRow.direction, AdapterMetricRow.data)
    present, finite = func.sum(AdapterMetricRow.checkpoints), func.sum(AdapterMetricRow.finite)
    statement = select(*key, present, finite).group_by(*key).having(present > 0)
    if scope.adapter is not None or scope.namespaces:
        adapters = select(AdapterRow.id).where(*scope.adapters())
        statement = statement.where(AdapterMetricRow.adapter_id.in_(adapters))
    return statement if metric is None else statement.where(AdapterMetricRow.name == metric)


def _counted_tallies(conditions: Sequence[ColumnElement[bool]], metric: str | None) -> Select[*tuple[Any, ...]]:
    """The counts of the metrics of those checkpoints that pass a filter."""
    finite = func.sum(case((MetricRow.value.between(-LARGEST, LARGEST), 1), else_=0))
    key = (MetricRow.name, MetricRow.split, MetricRow.direction, MetricRow.data)
    statement = (
        select(*key, func.count(), finite)
        .join_from(CheckpointRow, MetricRow)
        .where(MetricRow.is_current, *conditions)
        .group_by(*key)
    )
    return statement if metric is None else statement.where(MetricRow.name == metric)


def _ranked(
    conditions: Sequence[ColumnElement[bool]], metric: str, direction: Direction, *, of_few: bool
) -> tuple[Select[int], list[ColumnElement[Any]]]:
    """The ids of those that can be ranked, and the order of `registry.selection.best`.

    `of_few`: the conditions leave few.
    """
    statement = (
        select(CheckpointRow.id)
        .join_from(MetricRow, CheckpointRow)
        .join(AdapterRow)
        .where(*finite_metric(metric, of_few=of_few), *conditions)
    )
    return statement, _best_first(MetricRow.value, direction)


def _best_first(value: Any, direction: Direction) -> list[ColumnElement[Any]]:
    return [
        value.asc() if direction == "lower" else value.desc(),
        CheckpointRow.step.asc().nulls_last(),
        CheckpointRow.version.asc(),
        adapter_text().asc(),
        CheckpointRow.digest.asc(),
    ]


def _first(ranked: tuple[Select[int], list[ColumnElement[Any]]], top: int) -> Select[int]:
    statement, order = ranked
    return statement.order_by(*order).limit(top)


def _first_of_each(ranked: tuple[Select[int], list[ColumnElement[Any]]], per: Grouping, top: int) -> Select[int]:
    statement, order = ranked
    group: dict[Grouping, tuple[Any, ...]] = {
        "adapter": (CheckpointRow.adapter_id,),
        "run": (CheckpointRow.adapter_id, CheckpointRow.run),
        "base": (CheckpointRow.base_id,),
    }
    place = func.row_number().over(partition_by=group[per], order_by=order).label("place")
    placed = statement.add_columns(place).subquery()
    return select(placed.c.id).where(placed.c.place <= top).order_by(placed.c.place)
