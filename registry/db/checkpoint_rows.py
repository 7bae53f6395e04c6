"""Checkpoints from their rows: a checkpoint's parts lie in six tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, Select, exists, select
from sqlalchemy.orm import Session, aliased

from registry.codec import from_json
from registry.db.lookup import ref
from registry.db.tables import (
    BEGINNING_LENGTH,
    AdapterRow,
    AliasRow,
    BaseRow,
    CheckpointRow,
    MetricRow,
    NoteRow,
    OriginRow,
    ParentRow,
    ShipmentRow,
    TagRow,
)
from registry.filters import as_number
from registry.manifest import Checkpoint, Direction, Manifest, Metric, Note, Origin
from registry.refs import AdapterName, Digest

Chosen = Select[int] | Sequence[int]
_PART = 1000  # parameters of one statement


def metric_values(row_id: int, metric: Metric, author: str, at: datetime, *, is_current: bool = True) -> dict[str, Any]:
    """The columns of a metric of the checkpoint in a row."""
    return {
        "checkpoint_id": row_id,
        "name": metric.name,
        "value": metric.value,
        "step": metric.step,
        "split": metric.split,
        "data": metric.data,
        "direction": metric.direction,
        "recorded_at": at,
        "author": author,
        "is_current": is_current,
    }


def note_values(row_id: int, note: Note) -> dict[str, Any]:
    """The columns of a note on the checkpoint in a row."""
    return {"checkpoint_id": row_id, "text": note.text, "author": note.author, "created_at": note.created_at}


def tag_values(row_id: int, key: str, value: str) -> dict[str, Any]:
    """The columns of a tag of the checkpoint in a row, with what follows from its value."""
    shown = {"value": value, "beginning": value[:BEGINNING_LENGTH], "number": as_number(value)}
    return {"checkpoint_id": row_id, "key": key, **shown}


def load(session: Session, *conditions: ColumnElement[bool]) -> list[Checkpoint]:
    """The checkpoints that conditions on their and their adapter's row select, by adapter and version: eight queries in all."""
    found = _load(session, select(CheckpointRow.id).join(AdapterRow).where(*conditions), *conditions)
    # not ORDER BY: what comes first in a name is no matter of text
    return sorted(found.values(), key=lambda each: (each.adapter.namespace, each.adapter.name, each.version))


def load_each(session: Session, ids: Sequence[int]) -> list[Checkpoint]:
    """The checkpoints of rows, in the order of the ids."""
    found: dict[int, Checkpoint] = {}
    for start in range(0, len(ids), _PART):
        part = ids[start : start + _PART]
        found |= _load(session, part, CheckpointRow.id.in_(part))
    return [found[each] for each in ids]


def _load(session: Session, chosen: Chosen, *conditions: ColumnElement[bool]) -> dict[int, Checkpoint]:
    metrics, notes = _metrics(session, chosen), _notes(session, chosen)
    tags, aliases, environments = _tags(session, chosen), _aliases(session, chosen), _environments(session, chosen)
    origins = _origins(session, chosen)
    rows = session.execute(
        select(
            CheckpointRow, AdapterRow.namespace, AdapterRow.name, BaseRow.weights, BaseRow.name, BaseRow.architecture
        )
        .join_from(CheckpointRow, AdapterRow)
        .join(BaseRow, CheckpointRow.base_id == BaseRow.id)
        .where(*conditions)
    )
    return {
        row.id: Checkpoint(
            adapter=AdapterName(namespace, name),
            version=row.version,
            digest=Digest(row.digest),
            manifest=from_json(Manifest, row.manifest),
            base=Digest(weights),
            base_name=base_name,
            architecture=Digest(architecture),
            arch_version=row.arch_version,
            run=row.run,
            step=row.step,
            source=row.source,
            created_at=row.created_at,
            author=row.author,
            metrics=tuple(metrics[row.id]),
            notes=tuple(notes[row.id]),
            tags=dict(tags[row.id]),
            aliases=tuple(sorted(aliases[row.id])),
            environments=tuple(sorted(environments[row.id])),
            origin=origins.get(row.id),
        )
        for row, namespace, name, weights, base_name, architecture in rows
    }


def _metrics(session: Session, chosen: Chosen) -> Mapping[int, Sequence[Metric]]:
    rows = session.execute(
        select(
            MetricRow.checkpoint_id,
            MetricRow.name,
            MetricRow.value,
            MetricRow.step,
            MetricRow.split,
            MetricRow.direction,
            MetricRow.data,
        )
        .where(MetricRow.checkpoint_id.in_(chosen))
        .order_by(MetricRow.id)
    )
    found = defaultdict[int, list[Metric]](list)
    for owner, name, value, step, split, direction, data in rows:
        better = cast("Direction | None", direction)
        found[owner].append(Metric(name=name, value=value, step=step, split=split, direction=better, data=data))
    return found


def _notes(session: Session, chosen: Chosen) -> Mapping[int, Sequence[Note]]:
    found = defaultdict[int, list[Note]](list)
    for row in session.scalars(select(NoteRow).where(NoteRow.checkpoint_id.in_(chosen)).order_by(NoteRow.id)):
        found[row.checkpoint_id].append(Note(text=row.text, author=row.author, created_at=row.created_at))
    return found


def _tags(session: Session, chosen: Chosen) -> Mapping[int, Mapping[str, str]]:
    found = defaultdict[int, dict[str, str]](dict)
    statement = select(TagRow.checkpoint_id, TagRow.key, TagRow.value).where(TagRow.checkpoint_id.in_(chosen))
    for owner, key, value in sorted(session.execute(statement)):
        found[owner][key] = value
    return found


def _aliases(session: Session, chosen: Chosen) -> Mapping[int, Sequence[str]]:
    found = defaultdict[int, list[str]](list)
    statement = select(AliasRow.checkpoint_id, AliasRow.name).where(AliasRow.checkpoint_id.in_(chosen))
    for owner, name in session.execute(statement):
        found[owner].append(name)
    return found


def _environments(session: Session, chosen: Chosen) -> Mapping[int, Sequence[str]]:
    later = aliased(ShipmentRow)
    found = defaultdict[int, list[str]](list)
    statement = select(ShipmentRow.checkpoint_id, ShipmentRow.environment).where(
        ShipmentRow.checkpoint_id.in_(chosen),
        ~exists().where(
            later.environment == ShipmentRow.environment,
            later.adapter_id == ShipmentRow.adapter_id,
            later.id > ShipmentRow.id,
        ),
    )
    for owner, environment in session.execute(statement):
        found[owner].append(environment)
    return found


def _origins(session: Session, chosen: Chosen) -> Mapping[int, Origin]:
    parents = defaultdict[int, list[str]](list)
    for owner, namespace, name, version in session.execute(
        select(ParentRow.checkpoint_id, AdapterRow.namespace, AdapterRow.name, CheckpointRow.version)
        .join_from(ParentRow, CheckpointRow, ParentRow.parent_id == CheckpointRow.id)
        .join(AdapterRow)
        .where(ParentRow.checkpoint_id.in_(chosen))
        .order_by(ParentRow.checkpoint_id, ParentRow.position)
    ):
        parents[owner].append(ref(namespace, name, version))
    rows = session.scalars(select(OriginRow).where(OriginRow.checkpoint_id.in_(chosen)))
    return {
        row.checkpoint_id: Origin(action=row.action, parents=tuple(parents[row.checkpoint_id]), detail=row.detail)
        for row in rows
    }
