"""What an adapter's work comes to: which adapters there are, what was measured on them, and how it went.

Whatever is asked for here, a million checkpoints are not walked through: counts are kept, the newest of an adapter is its highest version,
and the best are taken from the front of an index.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, final

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from registry.curves import Point
from registry.db.checkpoint_rows import load_each
from registry.db.listing import MAX_PAGE, Scope, finite_metric
from registry.db.lookup import adapter_text, near, newest_of_adapter, unknown_adapter
from registry.db.ranking import foremost, leading
from registry.db.tables import AdapterMetricRow, AdapterRow, CheckpointRow, MetricRow
from registry.errors import InvalidInput, UnknownMetric
from registry.manifest import Checkpoint
from registry.refs import AdapterName
from registry.results import AdapterLine, Leader


@final
class Overview:
    """Adapters at a glance."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def adapters(self, search: str = "", limit: int = 50, namespaces: Sequence[str] = ()) -> list[AdapterLine]:
        """The adapters that were last added to first; see `registry.service.Registry.adapters`."""
        return list(self._lines(search, limit, namespaces).values())

    def leaders(
        self, limit: int, curve: int, namespaces: Sequence[str] = ()
    ) -> list[tuple[AdapterLine, Leader | None]]:
        """The adapters that were last added to first, each with its best checkpoint, None where nobody can say which that is.

        Args:
            limit: so many adapters.
            curve: the values of a curve at most, the last ones.
            namespaces: those that may be seen; none: all.
        """
        lines = self._lines("", limit, namespaces)
        found = leading(self._session, lines)
        bests = load_each(self._session, [best for _, best in found.values()])
        leaders = {
            adapter_id: Leader(
                best=best,
                metric=basis.metric,
                direction=basis.direction,
                curve=tuple(self._values(adapter_id, best.run, basis.metric, curve)),
            )
            for (adapter_id, (basis, _)), best in zip(found.items(), bests, strict=True)
        }
        return [(line, leaders.get(adapter_id)) for adapter_id, line in lines.items()]

    def _lines(self, search: str, limit: int, namespaces: Sequence[str]) -> dict[int, AdapterLine]:
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidInput("limit", limit, f"expected 1 to {MAX_PAGE}")
        newest = newest_of_adapter().label("newest")
        statement = select(AdapterRow.id, AdapterRow.checkpoints, newest).where(
            *Scope(namespaces=namespaces).adapters(), AdapterRow.checkpoints > 0
        )
        if search:
            statement = statement.where(func.lower(adapter_text()).contains(search.lower(), autoescape=True))
        rows = self._session.execute(statement.order_by(newest.desc()).limit(limit)).all()
        names = self._names_of([row.id for row in rows])
        checkpoints = load_each(self._session, [row.newest for row in rows])
        return {
            row.id: AdapterLine(
                name=each.adapter, checkpoints=row.checkpoints, newest=each, metrics=tuple(names[row.id])
            )
            for row, each in zip(rows, checkpoints, strict=True)
        }

    def _names_of(self, adapter_ids: Sequence[int]) -> Mapping[int, Sequence[str]]:
        """The metrics of adapters, by their ids."""
        found = defaultdict[int, list[str]](list)
        statement = _counted(AdapterMetricRow.adapter_id).where(AdapterMetricRow.adapter_id.in_(adapter_ids))
        for adapter_id, name in self._session.execute(statement):
            found[adapter_id].append(name)
        return found

    def metric_names(self, adapter: AdapterName | None = None, namespaces: Sequence[str] = ()) -> list[str]:
        """The metrics that checkpoints have, the most common first; see `registry.service.Registry.metric_names`."""
        statement = _counted()
        if adapter is not None:
            statement = statement.where(AdapterMetricRow.adapter_id == self._adapter_id(adapter, namespaces))
        elif namespaces:
            seen = select(AdapterRow.id).where(*Scope(namespaces=namespaces).adapters())
            statement = statement.where(AdapterMetricRow.adapter_id.in_(seen))
        return [row.name for row in self._session.execute(statement)]

    def series(self, adapter: AdapterName, metric: str) -> list[Point]:
        """The values of a metric over an adapter's steps; see `registry.service.Registry.series`."""
        adapter_id = self._adapter_id(adapter)
        points = _points(adapter, self._session.execute(_measured(adapter_id, metric)).all())
        if not points:
            raise UnknownMetric(metric, near(metric, self.metric_names(adapter)))
        return points

    def values_of_run(self, adapter: AdapterName, run: str, metric: str, limit: int) -> list[float]:
        """The values of a metric in a run, by step: the last so many."""
        return self._values(self._adapter_id(adapter), run, metric, limit)

    def _values(self, adapter_id: int, run: str, metric: str, limit: int) -> list[float]:
        of_run = _measured(adapter_id, metric).where(CheckpointRow.run == run)
        newest = of_run.order_by(None).order_by(CheckpointRow.version.desc()).limit(limit)
        return [row.value for row in _by_place(self._session.execute(newest).all()[::-1])]

    def foremost(self, scope: Scope, metric: str, front: int = 5_000) -> Checkpoint | None:
        """The best by a metric of those that pass a filter; see `registry.db.ranking.foremost`."""
        return foremost(self._session, scope, metric, front)

    def names(self, limit: int, namespaces: Sequence[str] = ()) -> list[str]:
        """The names of the newest adapters, sorted."""
        seen = (*Scope(namespaces=namespaces).adapters(), AdapterRow.checkpoints > 0)
        rows = self._session.scalars(select(adapter_text()).where(*seen).order_by(AdapterRow.id.desc()).limit(limit))
        return sorted(rows)

    def count(self, adapter: AdapterName | None = None, namespaces: Sequence[str] = ()) -> int:
        """How many checkpoints there are, from the counts that are kept."""
        counted = select(func.sum(AdapterRow.checkpoints)).where(*Scope(adapter, namespaces=namespaces).adapters())
        return int(self._session.scalar(counted) or 0)

    def _adapter_id(self, name: AdapterName, namespaces: Sequence[str] = ()) -> int:
        named = Scope(name, namespaces=namespaces).adapters()
        found = self._session.scalar(select(AdapterRow.id).where(*named, AdapterRow.checkpoints > 0))
        if found is None:
            raise unknown_adapter(self._session, name, namespaces)
        return found


def _counted(*keys: Any) -> Select[*tuple[Any, ...]]:
    """The names of metrics (within some keys) that checkpoints have, the most common first."""
    count = func.sum(AdapterMetricRow.checkpoints)
    return (
        select(*keys, AdapterMetricRow.name)
        .group_by(*keys, AdapterMetricRow.name)
        .having(count > 0)
        .order_by(count.desc(), AdapterMetricRow.name)
    )


def _measured(adapter_id: int, metric: str) -> Select[*tuple[Any, ...]]:
    """The finite values of a metric of an adapter's checkpoints, by version."""
    return (
        select(CheckpointRow.version, CheckpointRow.step, CheckpointRow.run, MetricRow.value)
        .join_from(CheckpointRow, MetricRow, MetricRow.checkpoint_id == CheckpointRow.id)
        .where(CheckpointRow.adapter_id == adapter_id, *finite_metric(metric, of_few=True))
        .order_by(CheckpointRow.version)
    )


def _points(adapter: AdapterName, rows: Sequence[Any]) -> list[Point]:
    """Rows by version as points; on the axis the version where any has no step."""
    has_steps = _have_steps(rows)
    return [
        Point(
            x=row.step if has_steps else row.version,
            value=row.value,
            ref=f"{adapter}@v{row.version}",
            run=row.run or str(adapter),
        )
        for row in _by_place(rows)
    ]


def _by_place(rows: Sequence[Any]) -> list[Any]:
    """Rows by version in the order of a curve: by run, the first first, and then by step; by version where any has no step."""
    has_steps = _have_steps(rows)
    runs = {run: number for number, run in enumerate(dict.fromkeys(row.run for row in rows))}
    return sorted(rows, key=lambda row: (runs[row.run], row.step if has_steps else row.version, row.version))


def _have_steps(rows: Sequence[Any]) -> bool:
    return all(row.step is not None for row in rows)
