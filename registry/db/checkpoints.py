"""Checkpoints with their metrics, notes, tags and aliases: list, resolve, add, annotate, remove."""

from __future__ import annotations

import re
from datetime import datetime
from typing import final

from sqlalchemy import ColumnElement, Select, delete, func, select
from sqlalchemy.orm import Session

from registry.db.blobs import Blobs
from registry.db.checkpoint_rows import load, metric_row, note_row
from registry.db.lookup import checkpoint_id, is_adapter, near, ref, starts_with
from registry.db.tables import (
    AdapterRow,
    AliasRow,
    BaseRow,
    CheckpointBlobRow,
    CheckpointRow,
    MergedInputRow,
    MergedRow,
    OriginRow,
    ParentRow,
    ShipmentRow,
    TagRow,
)
from registry.errors import Ambiguous, InUse, NotFound, UnknownAdapter, UnknownBase, UnknownCheckpoint
from registry.manifest import Checkpoint, Metric, Note, Origin, to_json
from registry.refs import AdapterName, CheckpointRef, Digest


@final
class Checkpoints:
    """The checkpoints of all adapters. An adapter exists as long as it has one."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def adapters(self) -> list[AdapterName]:
        """Every adapter, by namespace and name."""
        rows = self._session.execute(
            select(AdapterRow.namespace, AdapterRow.name).where(AdapterRow.id.in_(select(CheckpointRow.adapter_id)))
        )
        return sorted(AdapterName(namespace, name) for namespace, name in rows)

    def count(self) -> int:
        """How many checkpoints there are."""
        return self._session.scalar(select(func.count()).select_from(CheckpointRow)) or 0

    def all(self, adapter: AdapterName | None = None) -> list[Checkpoint]:
        """Every checkpoint (of one adapter), by adapter and version, in a fixed number of queries.

        Raises:
            UnknownAdapter: no adapter of this name.
        """
        if adapter is None:
            return load(self._session)
        found = load(self._session, is_adapter(adapter))
        if not found:
            raise self._unknown(adapter)
        return found

    def neighbours(self, checkpoint: Checkpoint) -> tuple[str, str]:
        """References of the checkpoints before and after one in its run; empty text where it is the first or the last."""
        versions = list(
            self._session.scalars(
                select(CheckpointRow.version)
                .join(AdapterRow)
                .where(is_adapter(checkpoint.adapter), CheckpointRow.run == checkpoint.run)
                .order_by(CheckpointRow.version)
            )
        )
        before = [version for version in versions if version < checkpoint.version][-1:]
        after = [version for version in versions if version > checkpoint.version][:1]
        previous, following = ("".join(f"{checkpoint.adapter}@v{each}" for each in found) for found in (before, after))
        return previous, following

    def find(self, adapter: AdapterName, digest: Digest) -> Checkpoint | None:
        """The checkpoint of an adapter with exactly this content, or None."""
        return next(iter(load(self._session, is_adapter(adapter), CheckpointRow.digest == digest.hex)), None)

    def resolve(self, ref: CheckpointRef) -> Checkpoint:
        """The checkpoint that a reference means. Choosing the best is not a matter of look-up: not handled here.

        A label is an alias first, and else an environment: then it means what is live there now.

        Raises:
            UnknownAdapter, UnknownCheckpoint: nothing by this name; carries similar names.
            Ambiguous: a digest prefix that fits several checkpoints; lists them.
        """
        if ref.adapter is None:
            return self._by_prefix(ref.digest_prefix)
        adapter_id = self._session.scalar(
            select(AdapterRow.id).where(is_adapter(ref.adapter), AdapterRow.id.in_(select(CheckpointRow.adapter_id)))
        )
        if adapter_id is None:
            raise self._unknown(ref.adapter)
        found = self._session.scalar(_selected(ref, adapter_id))
        if found is None:
            raise UnknownCheckpoint(str(ref), near(str(ref), self._references(ref.adapter)))
        return load(self._session, CheckpointRow.id == found)[0]

    def _by_prefix(self, prefix: str) -> Checkpoint:
        found = load(self._session, starts_with(CheckpointRow.digest, prefix))
        if not found:
            raise UnknownCheckpoint(prefix)
        if len(found) > 1:
            raise Ambiguous(prefix, [f"{checkpoint.ref} {checkpoint.digest.short}" for checkpoint in found])
        return found[0]

    def _unknown(self, adapter: AdapterName) -> UnknownAdapter:
        return UnknownAdapter(str(adapter), near(str(adapter), map(str, self.adapters())))

    def _references(self, adapter: AdapterName) -> list[str]:
        """What could be asked for, the labels first."""
        checkpoints = load(self._session, is_adapter(adapter))
        labels = [label for each in checkpoints for label in (*each.aliases, *each.environments)]
        steps = {f"step:{each.step}" for each in checkpoints if each.step is not None}
        runs = {f"run:{each.run}" for each in checkpoints}
        versions = [f"v{each.version}" for each in checkpoints]
        return [f"{adapter}@{name}" for name in (*labels, *versions, *sorted(steps), *sorted(runs))]

    def trail(self, checkpoint: Checkpoint) -> list[Checkpoint]:
        """The checkpoints of a run up to one, that one included, by step (those without one last) and version."""
        found = load(self._session, is_adapter(checkpoint.adapter), CheckpointRow.run == checkpoint.run)
        ordered = sorted(found, key=_place_in_run)
        return [each for each in ordered if _place_in_run(each) <= _place_in_run(checkpoint)]

    def add(self, checkpoint: Checkpoint) -> Checkpoint:
        """Record a checkpoint with its metrics, notes, tags and origin, and the adapter when it is new.

        The version in `checkpoint` does not count: it becomes the one after the highest that the adapter ever had. Metrics are signed by
        the checkpoint's author, at its time.

        Returns:
            The checkpoint as recorded.

        Raises:
            UnknownBase: no base model with its base's weights.
            UnknownAdapter, UnknownCheckpoint: no such parent.
            NameTaken: the adapter has a checkpoint with this content.
        """
        base_id = self._session.scalar(select(BaseRow.id).where(BaseRow.weights == checkpoint.base.hex))
        if base_id is None:
            raise UnknownBase(str(checkpoint.base))
        adapter = self._adapter_for(checkpoint)
        adapter.last_version += 1
        row = CheckpointRow(
            adapter_id=adapter.id,
            version=adapter.last_version,
            digest=checkpoint.digest.hex,
            base_id=base_id,
            arch_version=checkpoint.arch_version,
            run=checkpoint.run,
            step=checkpoint.step,
            source=checkpoint.source,
            manifest=to_json(checkpoint.manifest),
            created_at=checkpoint.created_at,
            author=checkpoint.author,
        )
        self._session.add(row)
        self._session.flush()
        Blobs(self._session).require(CheckpointBlobRow, row.id, checkpoint.manifest.files)
        parts = [
            *(metric_row(row.id, metric, checkpoint.author, checkpoint.created_at) for metric in checkpoint.metrics),
            *(note_row(row.id, note) for note in checkpoint.notes),
            *(TagRow(checkpoint_id=row.id, key=key, value=value) for key, value in checkpoint.tags.items()),
        ]
        self._session.add_all(parts)
        if checkpoint.origin is not None:
            self._add_origin(row.id, checkpoint.origin)
        return load(self._session, CheckpointRow.id == row.id)[0]

    def _add_origin(self, row_id: int, origin: Origin) -> None:
        self._session.add(OriginRow(checkpoint_id=row_id, action=origin.action, detail=to_json(origin.detail)))
        for position, name in enumerate(origin.parents):
            parent_id = checkpoint_id(self._session, self.resolve(CheckpointRef.parse(name)))
            self._session.add(ParentRow(checkpoint_id=row_id, position=position, parent_id=parent_id))
        self._session.flush()

    def children(self, checkpoint: Checkpoint) -> list[str]:
        """References of the checkpoints that were made of this one, the oldest first."""
        return self._children(checkpoint_id(self._session, checkpoint))

    def _children(self, row_id: int) -> list[str]:
        made = select(ParentRow.checkpoint_id).where(ParentRow.parent_id == row_id)
        rows = self._session.execute(
            select(AdapterRow.namespace, AdapterRow.name, CheckpointRow.version)
            .join_from(CheckpointRow, AdapterRow)
            .where(CheckpointRow.id.in_(made))
            .order_by(CheckpointRow.id)
        )
        return [ref(*row) for row in rows]

    def _adapter_for(self, checkpoint: Checkpoint) -> AdapterRow:
        name = checkpoint.adapter
        row = self._session.scalar(select(AdapterRow).where(is_adapter(name)))
        if row is None:
            created_at = checkpoint.created_at
            row = AdapterRow(namespace=name.namespace, name=name.name, last_version=0, created_at=created_at)
            self._session.add(row)
            self._session.flush()
        return row

    def remove(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint with its metrics, notes and tags. Its version is never given again.

        Raises:
            InUse: names every alias, shipment, merged model and checkpoint made of it that needs it.
            UnknownCheckpoint: it is gone already.
        """
        row_id = checkpoint_id(self._session, checkpoint)
        if uses := self._uses(row_id):
            raise InUse(checkpoint.ref, ", ".join(uses))
        self._session.execute(delete(CheckpointRow).where(CheckpointRow.id == row_id))

    def _uses(self, row_id: int) -> list[str]:
        aliases = self._session.scalars(
            select(AliasRow.name).where(AliasRow.checkpoint_id == row_id).order_by(AliasRow.name)
        )
        shipments = self._session.execute(
            select(ShipmentRow.id, ShipmentRow.environment)
            .where(ShipmentRow.checkpoint_id == row_id)
            .order_by(ShipmentRow.id)
        )
        merged = self._session.scalars(
            select(MergedRow.digest)
            .where(MergedRow.id.in_(select(MergedInputRow.merged_id).where(MergedInputRow.checkpoint_id == row_id)))
            .order_by(MergedRow.id)
        )
        return [
            *(f"alias {name}" for name in aliases),
            *(f"shipment {number} to {environment}" for number, environment in shipments),
            *(f"merged model {digest[:12]}" for digest in merged),
            *(f"{child}, which was made of it" for child in self._children(row_id)),
        ]

    def add_metric(self, checkpoint: Checkpoint, metric: Metric, author: str, at: datetime) -> None:
        """Record a measured number; earlier ones of its name stay.

        Raises:
            UnknownCheckpoint: removed meanwhile.
        """
        self._session.add(metric_row(checkpoint_id(self._session, checkpoint), metric, author, at))
        self._session.flush()

    def add_note(self, checkpoint: Checkpoint, note: Note) -> None:
        """Add a note after those there are.

        Raises:
            UnknownCheckpoint: removed meanwhile.
        """
        self._session.add(note_row(checkpoint_id(self._session, checkpoint), note))
        self._session.flush()

    def set_tag(self, checkpoint: Checkpoint, key: str, value: str) -> None:
        """Give a tag a value, instead of the one it had.

        Raises:
            UnknownCheckpoint: removed meanwhile.
        """
        row_id = checkpoint_id(self._session, checkpoint)
        row = self._session.scalar(select(TagRow).where(TagRow.checkpoint_id == row_id, TagRow.key == key))
        if row is None:
            self._session.add(TagRow(checkpoint_id=row_id, key=key, value=value))
        else:
            row.value = value
        self._session.flush()

    def remove_tag(self, checkpoint: Checkpoint, key: str) -> None:
        """Take a tag away.

        Raises:
            NotFound: the checkpoint has no such tag.
            UnknownCheckpoint: removed meanwhile.
        """
        row_id = checkpoint_id(self._session, checkpoint)
        tags = {row.key: row for row in self._session.scalars(select(TagRow).where(TagRow.checkpoint_id == row_id))}
        if key not in tags:
            raise NotFound(key, near(key, tags))
        self._session.delete(tags[key])
        self._session.flush()

    def set_alias(self, checkpoint: Checkpoint, name: str) -> Checkpoint | None:
        """Point an alias of the checkpoint's adapter to it.

        Returns:
            What the alias pointed to before, or None.

        Raises:
            UnknownCheckpoint: removed meanwhile.
        """
        row_id = checkpoint_id(self._session, checkpoint)
        row = self._alias(checkpoint.adapter, name)
        before = row and load(self._session, CheckpointRow.id == row.checkpoint_id)[0]
        if row is None:
            adapter_id = select(CheckpointRow.adapter_id).where(CheckpointRow.id == row_id).scalar_subquery()
            row = AliasRow(adapter_id=adapter_id, name=name)
        row.checkpoint_id = row_id
        self._session.add(row)
        self._session.flush()
        return before

    def remove_alias(self, adapter: AdapterName, name: str) -> Checkpoint:
        """Take an alias away.

        Returns:
            What it pointed to.

        Raises:
            UnknownCheckpoint: the adapter has no such alias.
        """
        row = self._alias(adapter, name)
        if row is None:
            names = self._session.scalars(select(AliasRow.name).join(AdapterRow).where(is_adapter(adapter)))
            raise UnknownCheckpoint(f"{adapter}@{name}", [f"{adapter}@{each}" for each in near(name, names)])
        before = load(self._session, CheckpointRow.id == row.checkpoint_id)[0]
        self._session.delete(row)
        self._session.flush()
        return before

    def _alias(self, adapter: AdapterName, name: str) -> AliasRow | None:
        return self._session.scalar(select(AliasRow).join(AdapterRow).where(is_adapter(adapter), AliasRow.name == name))


def _place_in_run(checkpoint: Checkpoint) -> tuple[bool, int, int]:
    return checkpoint.step is None, checkpoint.step or 0, checkpoint.version


def _selected(ref: CheckpointRef, adapter_id: int) -> Select[int]:
    """The id of the checkpoint of an adapter that a selector means."""
    newest = (
        select(CheckpointRow.id)
        .where(CheckpointRow.adapter_id == adapter_id)
        .order_by(CheckpointRow.version.desc())
        .limit(1)
    )
    match ref.selector:
        case "newest":
            return newest
        case "version":
            return newest.where(CheckpointRow.version == ref.version)
        case "step":
            return newest.where(CheckpointRow.step == int(ref.value))
        case "run":
            return newest.where(CheckpointRow.run == _run_name(ref.value, adapter_id))
        case "label":
            alias = select(AliasRow.checkpoint_id).where(AliasRow.adapter_id == adapter_id, AliasRow.name == ref.value)
            live = (
                select(ShipmentRow.checkpoint_id)
                .join(CheckpointRow)
                .where(CheckpointRow.adapter_id == adapter_id, ShipmentRow.environment == ref.value)
                .order_by(ShipmentRow.id.desc())
                .limit(1)
            )
            return select(func.coalesce(alias.scalar_subquery(), live.scalar_subquery()))
        case _:
            raise ValueError(f"not a matter of look-up: {ref}")


def _run_name(text: str, adapter_id: int) -> ColumnElement[str]:
    """The run of an adapter that is called so, or else the one of this number, counted from 1 in the order of registration."""
    of_adapter = select(CheckpointRow.run).where(CheckpointRow.adapter_id == adapter_id)
    named = of_adapter.where(CheckpointRow.run == text).limit(1)
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        return named.scalar_subquery()
    by_age = of_adapter.group_by(CheckpointRow.run).order_by(func.min(CheckpointRow.id))
    return func.coalesce(named.scalar_subquery(), by_age.offset(int(text) - 1).limit(1).scalar_subquery())
