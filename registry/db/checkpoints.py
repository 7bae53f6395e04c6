"""Checkpoints with their metrics, notes, tags and aliases: list, resolve, add, annotate, remove."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import final

from sqlalchemy import ColumnElement, Select, delete, func, select, update
from sqlalchemy.orm import Session

from registry.codec import plain
from registry.db.adding import add_rows
from registry.db.checkpoint_rows import load, metric_values, note_values, tag_values
from registry.db.counting import count_metrics, discount_metrics
from registry.db.listing import Scope, page
from registry.db.lookup import checkpoint_id, is_adapter, near, ref, starts_with, unknown_adapter
from registry.db.needs import in_parts
from registry.db.ranking import rank
from registry.db.tables import (
    AdapterRow,
    AliasRow,
    CheckpointRow,
    MergedInputRow,
    MergedRow,
    MetricRow,
    NoteRow,
    OriginRow,
    ParentRow,
    RecipeInputRow,
    RecipeRow,
    ShipmentRow,
    TagRow,
)
from registry.errors import Ambiguous, InUse, NotFound, UnknownCheckpoint
from registry.manifest import Checkpoint, Direction, Metric, Note, Origin
from registry.refs import AdapterName, CheckpointRef, Digest
from registry.selection import Grouping, Ranking
from registry.teamwork import Page

_SUGGESTED = 500


@final
class Checkpoints:
    """The checkpoints of all adapters. An adapter exists as long as it has one."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def adapters(self) -> list[AdapterName]:
        """Every adapter, by namespace and name."""
        rows = self._session.execute(select(AdapterRow.namespace, AdapterRow.name).where(AdapterRow.checkpoints > 0))
        return sorted(AdapterName(namespace, name) for namespace, name in rows)

    def count(self) -> int:
        """How many checkpoints there are."""
        return int(self._session.scalar(select(func.sum(AdapterRow.checkpoints))) or 0)

    def all(self, adapter: AdapterName | None = None) -> list[Checkpoint]:
        """Every checkpoint (of one adapter), by adapter and version, in a fixed number of queries.

        Raises:
            UnknownAdapter: no adapter of this name.
        """
        return self.passing(Scope(adapter))

    def page(self, scope: Scope, *, sort: str = "", cursor: str = "", limit: int = 50) -> Page[Checkpoint]:
        """A part of a list, the newest first; see `registry.service.Registry.page`."""
        return page(self._session, scope, sort=sort, cursor=cursor, limit=limit)

    def rank(
        self,
        scope: Scope,
        *,
        metric: str | None = None,
        direction: Direction | None = None,
        per: Grouping | None = None,
        top: int = 1,
    ) -> Ranking:
        """The best by a metric; see `registry.service.Registry.rank`."""
        return rank(self._session, scope, metric=metric, direction=direction, per=per, top=top)

    def passing(self, scope: Scope) -> list[Checkpoint]:
        """All of them, by adapter and version.

        Raises:
            UnknownAdapter: no adapter of this name in these namespaces.
        """
        return load(self._session, *scope.conditions(self._session))

    def neighbours(self, checkpoint: Checkpoint) -> tuple[str, str]:
        """References of the checkpoints before and after one in its run; empty text where it is the first or the last."""
        in_run = (
            select(CheckpointRow.version)
            .join(AdapterRow)
            .where(is_adapter(checkpoint.adapter), CheckpointRow.run == checkpoint.run)
            .limit(1)
        )
        version = CheckpointRow.version
        before = self._session.scalar(in_run.where(version < checkpoint.version).order_by(version.desc()))
        after = self._session.scalar(in_run.where(version > checkpoint.version).order_by(version))
        previous, following = (f"{checkpoint.adapter}@v{each}" if each else "" for each in (before, after))
        return previous, following

    def find(self, adapter: AdapterName, digest: Digest) -> Checkpoint | None:
        """The checkpoint of an adapter with exactly this content, or None."""
        return next(iter(load(self._session, is_adapter(adapter), CheckpointRow.digest == digest.hex)), None)

    def known(self, wanted: Iterable[tuple[AdapterName, Digest]]) -> set[tuple[AdapterName, Digest]]:
        """Those of some adapters and contents that there is a checkpoint of."""
        named = set(wanted)
        found: set[tuple[AdapterName, Digest]] = set()
        for part in in_parts({digest for _, digest in named}):
            rows = self._session.execute(
                select(AdapterRow.namespace, AdapterRow.name, CheckpointRow.digest)
                .join(AdapterRow, AdapterRow.id == CheckpointRow.adapter_id)
                .where(CheckpointRow.digest.in_(part))
            )
            found |= {(AdapterName(namespace, name), Digest(digest)) for namespace, name, digest in rows}
        return named & found

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
            select(AdapterRow.id).where(is_adapter(ref.adapter), AdapterRow.checkpoints > 0)
        )
        if adapter_id is None:
            raise unknown_adapter(self._session, ref.adapter)
        found = self._session.scalar(_selected(ref, adapter_id))
        if found is None:
            raise UnknownCheckpoint(str(ref), near(str(ref), self._references(ref.adapter, adapter_id)))
        return load(self._session, CheckpointRow.id == found)[0]

    def _by_prefix(self, prefix: str) -> Checkpoint:
        found = load(self._session, starts_with(CheckpointRow.digest, prefix))
        if not found:
            raise UnknownCheckpoint(prefix)
        if len(found) > 1:
            raise Ambiguous(prefix, [f"{checkpoint.ref} {checkpoint.digest.short}" for checkpoint in found])
        return found[0]

    def _references(self, adapter: AdapterName, adapter_id: int) -> list[str]:
        """What could be asked for, the labels first; of an adapter's checkpoints only the newest are looked at."""
        aliases = self._session.scalars(
            select(AliasRow.name).where(AliasRow.adapter_id == adapter_id).order_by(AliasRow.name).limit(_SUGGESTED)
        )
        environments = self._session.scalars(
            select(ShipmentRow.environment).where(ShipmentRow.adapter_id == adapter_id).distinct().limit(_SUGGESTED)
        )
        newest = self._session.execute(
            select(CheckpointRow.version, CheckpointRow.step, CheckpointRow.run)
            .where(CheckpointRow.adapter_id == adapter_id)
            .order_by(CheckpointRow.version.desc())
            .limit(_SUGGESTED)
        ).all()
        steps = sorted({f"step:{step}" for _, step, _ in newest if step is not None})
        runs = sorted({f"run:{run}" for _, _, run in newest})
        versions = [f"v{version}" for version, _, _ in reversed(newest)]
        return [f"{adapter}@{name}" for name in (*aliases, *sorted(environments), *versions, *steps, *runs)]

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
        return self.add_many([checkpoint])[0]

    def add_many(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Record checkpoints in order, as `add` does, in as many statements as for one."""
        added = add_rows(self._session, checkpoints)
        for row_id, checkpoint in added:
            if checkpoint.origin is not None:
                self._add_origin(row_id, checkpoint.origin)
        return [checkpoint for _, checkpoint in added]

    def _add_origin(self, row_id: int, origin: Origin) -> None:
        self._session.add(OriginRow(checkpoint_id=row_id, action=origin.action, detail=plain(origin.detail)))
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

    def remove(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint with its metrics, notes and tags. Its version is never given again.

        Raises:
            InUse: names every alias, shipment, merged model, kept recipe and checkpoint made of it that needs it.
            UnknownCheckpoint: it is gone already.
        """
        row_id, adapter_id = self._place(checkpoint)
        if uses := self._uses(row_id):
            raise InUse(checkpoint.ref, ", ".join(uses))
        discount_metrics(self._session, adapter_id, MetricRow.checkpoint_id == row_id)
        self._session.execute(
            update(AdapterRow).where(AdapterRow.id == adapter_id).values(checkpoints=AdapterRow.checkpoints - 1)
        )
        self._session.execute(delete(CheckpointRow).where(CheckpointRow.id == row_id))

    def uses(self, checkpoint: Checkpoint) -> list[str]:
        """Everything that needs a checkpoint, for people: aliases, shipments, merged models, kept recipes, and checkpoints made
        of it.

        Raises:
            UnknownCheckpoint: removed meanwhile.
        """
        return self._uses(self._place(checkpoint)[0])

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
        recipes = self._session.scalars(
            select(RecipeRow.digest)
            .where(RecipeRow.id.in_(select(RecipeInputRow.recipe_id).where(RecipeInputRow.checkpoint_id == row_id)))
            .order_by(RecipeRow.id)
        )
        return [
            *(f"alias {name}" for name in aliases),
            *(f"shipment {number} to {environment}" for number, environment in shipments),
            *(f"merged model {digest[:12]}" for digest in merged),
            *(f"recipe merged-{digest[:12]}" for digest in recipes),
            *(f"{child}, which was made of it" for child in self._children(row_id)),
        ]

    def add_metric(self, checkpoint: Checkpoint, metric: Metric, author: str, at: datetime) -> None:
        """Record a measured number; earlier ones of its name stay.

        Raises:
            UnknownCheckpoint: removed meanwhile.
        """
        row_id, adapter_id = self._place(checkpoint)
        earlier = (MetricRow.checkpoint_id == row_id, MetricRow.name == metric.name)
        discount_metrics(self._session, adapter_id, *earlier)
        self._session.execute(update(MetricRow).where(MetricRow.is_current, *earlier).values(is_current=False))
        self._session.add(MetricRow(**metric_values(row_id, metric, author, at)))
        self._session.flush()
        count_metrics(self._session, [(adapter_id, [metric])])

    def _place(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """The ids of a checkpoint's row and of its adapter's."""
        found = self._session.execute(
            select(CheckpointRow.id, CheckpointRow.adapter_id)
            .join(AdapterRow)
            .where(is_adapter(checkpoint.adapter), CheckpointRow.version == checkpoint.version)
        ).one_or_none()
        if found is None:
            raise UnknownCheckpoint(checkpoint.ref)
        return found.id, found.adapter_id

    def add_note(self, checkpoint: Checkpoint, note: Note) -> None:
        """Add a note after those there are.

        Raises:
            UnknownCheckpoint: removed meanwhile.
        """
        self._session.add(NoteRow(**note_values(checkpoint_id(self._session, checkpoint), note)))
        self._session.flush()

    def set_tag(self, checkpoint: Checkpoint, key: str, value: str) -> None:
        """Give a tag a value, instead of the one it had.

        Raises:
            UnknownCheckpoint: removed meanwhile.
        """
        row_id = checkpoint_id(self._session, checkpoint)
        self._session.execute(delete(TagRow).where(TagRow.checkpoint_id == row_id, TagRow.key == key))
        self._session.add(TagRow(**tag_values(row_id, key, value)))
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
