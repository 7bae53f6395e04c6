"""New checkpoints as rows, many at once: a batch takes as many statements as one does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from registry.codec import plain
from registry.db.blobs import Blobs
from registry.db.checkpoint_rows import metric_values, note_values, tag_values
from registry.db.counting import count_metrics
from registry.db.lookup import is_adapter
from registry.db.tables import AdapterRow, BaseRow, CheckpointBlobRow, CheckpointRow, MetricRow, NoteRow, Table, TagRow
from registry.errors import UnknownBase
from registry.manifest import Checkpoint, Manifest
from registry.refs import AdapterName


def add_rows(session: Session, checkpoints: Sequence[Checkpoint]) -> list[tuple[int, Checkpoint]]:
    """Record checkpoints with all but their origins; see `registry.db.checkpoints.Checkpoints.add`.

    Returns:
        For each the id of its row, and the checkpoint as recorded.

    Raises:
        UnknownBase: no base model with a base's weights.
        NameTaken: an adapter has a checkpoint with this content.
    """
    bases = _bases(session, {each.base.hex for each in checkpoints})
    adapters = _adapters(session, checkpoints)
    recorded, rows = [], []
    for each in checkpoints:
        base, adapter = bases[each.base.hex], adapters[each.adapter]
        adapter.last_version += 1
        adapter.checkpoints += 1
        recorded.append(_as_recorded(each, adapter.last_version, base.name, base.architecture))
        rows.append(_row(recorded[-1], adapter.id, base.id))
    session.add_all(rows)
    session.flush()
    Blobs(session).require_new(
        CheckpointBlobRow, {row.id: each.manifest.files for row, each in zip(rows, recorded, strict=True)}
    )
    owned = [(row.id, each) for row, each in zip(rows, recorded, strict=True)]
    _insert(session, MetricRow, (values for each in owned for values in _metrics(*each)))
    _insert(session, NoteRow, (note_values(row_id, note) for row_id, each in owned for note in each.notes))
    _insert(session, TagRow, (tag_values(row_id, *tag) for row_id, each in owned for tag in each.tags.items()))
    count_metrics(session, [(row.adapter_id, each.metrics) for row, each in zip(rows, recorded, strict=True)])
    return owned


def _bases(session: Session, weights: set[str]) -> dict[str, Any]:
    rows = session.execute(
        select(BaseRow.weights, BaseRow.id, BaseRow.name, BaseRow.architecture).where(BaseRow.weights.in_(weights))
    )
    found = {row.weights: row for row in rows}
    if missing := sorted(weights - found.keys()):
        raise UnknownBase(f"blake3:{missing[0]}")
    return found


def _adapters(session: Session, checkpoints: Iterable[Checkpoint]) -> dict[AdapterName, AdapterRow]:
    """The rows of their adapters; of those that are new, new ones."""
    found: dict[AdapterName, AdapterRow] = {}
    for each in checkpoints:
        if each.adapter not in found:
            found[each.adapter] = _adapter(session, each)
    session.flush()
    return found


def _adapter(session: Session, checkpoint: Checkpoint) -> AdapterRow:
    name = checkpoint.adapter
    row = session.scalar(select(AdapterRow).where(is_adapter(name)))
    if row is None:
        row = AdapterRow(
            namespace=name.namespace,
            name=name.name,
            last_version=0,
            created_at=checkpoint.created_at,
            checkpoints=0,
        )
        session.add(row)
    return row


def _as_recorded(checkpoint: Checkpoint, version: int, base_name: str, architecture: str) -> Checkpoint:
    return replace(
        checkpoint,
        version=version,
        base_name=base_name,
        architecture=type(checkpoint.architecture)(architecture),
        created_at=checkpoint.created_at.astimezone(UTC),
        tags=dict(sorted(checkpoint.tags.items())),
        aliases=(),
        environments=(),
    )


def _row(checkpoint: Checkpoint, adapter_id: int, base_id: int) -> CheckpointRow:
    return CheckpointRow(
        adapter_id=adapter_id,
        version=checkpoint.version,
        digest=checkpoint.digest.hex,
        base_id=base_id,
        arch_version=checkpoint.arch_version,
        run=checkpoint.run,
        step=checkpoint.step,
        source=checkpoint.source,
        manifest=plain(checkpoint.manifest),
        created_at=checkpoint.created_at,
        author=checkpoint.author,
        **listed(checkpoint.manifest),
    )


def listed(manifest: Manifest) -> dict[str, Any]:
    """What lists are filtered and sorted by, out of a manifest."""
    return {
        "method": manifest.method,
        "format": manifest.format.value,
        "dtype": manifest.dtype,
        "rank": manifest.rank,
        "alpha": manifest.alpha,
        "parameters": manifest.parameters,
        "size_bytes": manifest.size_bytes,
    }


def _metrics(row_id: int, checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    last = {metric.name: index for index, metric in enumerate(checkpoint.metrics)}
    for index, metric in enumerate(checkpoint.metrics):
        is_current = last[metric.name] == index
        yield metric_values(row_id, metric, checkpoint.author, checkpoint.created_at, is_current=is_current)


def _insert(session: Session, table: type[Table], rows: Iterable[dict[str, Any]]) -> None:
    """Rows that nobody needs the ids of: half the work of adding objects."""
    if values := list(rows):
        session.execute(insert(table), values)
