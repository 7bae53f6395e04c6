"""How many checkpoints of an adapter have which metrics: kept up with each change, so that nobody has to count a million rows.

Of metrics with one name only the last one of a checkpoint counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from registry.db.tables import AdapterMetricRow, MetricRow
from registry.manifest import Metric


class _Key(NamedTuple):
    adapter_id: int
    name: str
    split: str
    direction: str
    data: str


def count_metrics(session: Session, measured: Iterable[tuple[int, Sequence[Metric]]]) -> None:
    """Count the metrics of checkpoints that are new, or that had none of these names; each with the id of its adapter."""
    present, finite = Counter[_Key](), Counter[_Key]()
    for adapter_id, metrics in measured:
        for metric in {each.name: each for each in metrics}.values():
            key = _Key(adapter_id, metric.name, metric.split, metric.direction or "", metric.data)
            present[key] += 1
            finite[key] += math.isfinite(metric.value)
    rows = [{**key._asdict(), "checkpoints": present[key], "finite": finite[key]} for key in present]
    if not rows:
        return
    is_postgres = session.get_bind().dialect.name == "postgresql"
    new = (postgresql.insert if is_postgres else sqlite.insert)(AdapterMetricRow).values(rows)
    session.execute(
        new.on_conflict_do_update(
            index_elements=list(_Key._fields),
            set_={
                "checkpoints": AdapterMetricRow.checkpoints + new.excluded.checkpoints,
                "finite": AdapterMetricRow.finite + new.excluded.finite,
            },
        ),
    )


def discount_metrics(session: Session, adapter_id: int, *which: ColumnElement[bool]) -> None:
    """Count current metrics of checkpoints of an adapter no longer, before they go or are outdated."""
    rows = session.execute(
        select(
            MetricRow.name, MetricRow.split, func.coalesce(MetricRow.direction, ""), MetricRow.data, MetricRow.value
        ).where(MetricRow.is_current, *which)
    ).all()
    for *found, value in rows:
        key = _Key(adapter_id, *found)
        session.execute(
            update(AdapterMetricRow)
            .where(*(getattr(AdapterMetricRow, field) == wanted for field, wanted in key._asdict().items()))
            .values(
                checkpoints=AdapterMetricRow.checkpoints - 1,
                finite=AdapterMetricRow.finite - int(math.isfinite(value)),
            )
        )
