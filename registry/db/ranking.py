"""The best checkpoints by a metric, from counts and indexes: the same as `registry.selection.best` of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, case, func, select
from sqlalchemy.orm import Session

from registry.db.checkpoint_rows import load_each
from registry.db.listing import LARGEST, Scope, finite_metric
from registry.db.lookup import adapter_text
from registry.db.tables import AdapterMetricRow, AdapterRow, CheckpointRow, MetricRow
from registry.manifest import Checkpoint, Direction
from registry.selection import Group, Grouping, Ranking, Tally, choose, group_key


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
    statement = _ranked(conditions, basis.metric, basis.direction)
    ids = _first(statement, top) if per is None else _first_of_each(statement, per, top)
    found = load_each(session, list(session.scalars(ids)))
    return Ranking(
        metric=basis.metric,
        direction=basis.direction,
        groups=_groups(found, per),
        candidates=candidates,
        without=basis.without,
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
        Tally(name, split, direction or None, int(checkpoints), int(finite))
        for name, split, direction, checkpoints, finite in session.execute(statement)
    ]


def _kept_tallies(scope: Scope, metric: str | None) -> Select[*tuple[Any, ...]]:
    """The counts that are kept of every adapter, added up."""
    key = (AdapterMetricRow.name, AdapterMetricRow.split, AdapterMetricRow.direction)
    present, finite = func.sum(AdapterMetricRow.checkpoints), func.sum(AdapterMetricRow.finite)
    statement = select(*key, present, finite).group_by(*key).having(present > 0)
    if scope.adapter is not None or scope.namespaces:
        adapters = select(AdapterRow.id).where(*scope.adapters())
        statement = statement.where(AdapterMetricRow.adapter_id.in_(adapters))
    return statement if metric is None else statement.where(AdapterMetricRow.name == metric)


def _counted_tallies(conditions: Sequence[ColumnElement[bool]], metric: str | None) -> Select[*tuple[Any, ...]]:
    """The counts of the metrics of those checkpoints that pass a filter."""
    finite = func.sum(case((MetricRow.value.between(-LARGEST, LARGEST), 1), else_=0))
    statement = (
        select(MetricRow.name, MetricRow.split, MetricRow.direction, func.count(), finite)
        .join_from(CheckpointRow, MetricRow)
        .where(MetricRow.is_current, *conditions)
        .group_by(MetricRow.name, MetricRow.split, MetricRow.direction)
    )
    return statement if metric is None else statement.where(MetricRow.name == metric)


def _ranked(
    conditions: Sequence[ColumnElement[bool]], metric: str, direction: Direction
) -> tuple[Select[int], list[ColumnElement[Any]]]:
    """The ids of those that can be ranked, and the order of `registry.selection.best`."""
    statement = (
        select(CheckpointRow.id)
        .join_from(MetricRow, CheckpointRow)
        .join(AdapterRow)
        .where(*finite_metric(metric), *conditions)
    )
    value: Any = MetricRow.value
    return statement, [
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
