"""Merged models: find, add, and where they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import final

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from registry.codec import from_json, plain
from registry.db.blobs import Blobs
from registry.db.lookup import MOST_SUGGESTED_FROM, checkpoint_id, digest_prefix, is_adapter, near, ref, starts_with
from registry.db.tables import (
    AdapterRow,
    BaseRow,
    CheckpointRow,
    MergedBlobRow,
    MergedInputRow,
    MergedLocationRow,
    MergedRow,
)
from registry.errors import Ambiguous, UnknownBase, UnknownCheckpoint, UnknownMerged
from registry.manifest import Checkpoint, FileEntry, Merged, Recipe
from registry.refs import AdapterName, Digest

STORE = ""


@final
class MergedModels:
    """The merged models, oldest first."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def all(self) -> list[Merged]:
        """Every merged model."""
        return self._load()

    def find(self, recipe: Digest) -> Merged | None:
        """The result of a recipe, by the recipe's digest, or None."""
        return next(iter(self._load(MergedRow.recipe_digest == recipe.hex)), None)

    def of_recipes(self, prefix: str) -> list[Merged]:
        """The results of recipes whose digests begin with some hex digits."""
        return self._load(starts_with(MergedRow.recipe_digest, prefix))

    def resolve(self, text: str) -> Merged:
        """A merged model by its digest or a prefix of it (at least 6 hex digits). Of several with the same bytes, the oldest.

        Raises:
            UnknownMerged: none.
            Ambiguous: the prefix fits several digests; lists them.
        """
        prefix = digest_prefix(text)
        found = self._load(starts_with(MergedRow.digest, prefix)) if prefix else []
        if not found:
            newest = select(MergedRow.digest).order_by(MergedRow.id.desc()).limit(MOST_SUGGESTED_FROM)
            raise UnknownMerged(text, near(text, self._session.scalars(newest)))
        if len(digests := {merged.digest for merged in found}) > 1:
            raise Ambiguous(text, [digest.hex for digest in sorted(digests)])
        return found[0]

    def of(self, checkpoint: Checkpoint) -> list[Merged]:
        """Those that a checkpoint is an input of."""
        used = select(MergedInputRow.merged_id).where(
            MergedInputRow.checkpoint_id == checkpoint_id(self._session, checkpoint)
        )
        return self._load(MergedRow.id.in_(used))

    def add(self, merged: Merged, kept: Iterable[FileEntry] = ()) -> Merged:
        """Record the result of a recipe, with its inputs (as `merged.checkpoints` names them) and locations.

        Args:
            merged: the result.
            kept: its files that the store keeps wherever the others are.

        Raises:
            NameTaken: the recipe has a result already.
            UnknownBase, UnknownCheckpoint: what the recipe names is not recorded.
        """
        base_id = self._session.scalar(select(BaseRow.id).where(BaseRow.weights == merged.recipe.base.hex))
        if base_id is None:
            raise UnknownBase(str(merged.recipe.base))
        row = MergedRow(
            digest=merged.digest.hex,
            recipe_digest=merged.recipe.digest.hex,
            recipe=plain(merged.recipe),
            base_id=base_id,
            files=plain(merged.files),
            note=merged.note,
            created_at=merged.created_at,
            author=merged.author,
        )
        self._session.add(row)
        self._session.flush()
        self._add_inputs(row.id, merged)
        Blobs(self._session).require(MergedBlobRow, row.id, kept)
        for url in merged.locations:
            self.add_location(merged, url)
        return self._one(row.id)

    def _add_inputs(self, merged_id: int, merged: Merged) -> None:
        for position, (name, item) in enumerate(zip(merged.checkpoints, merged.recipe.inputs, strict=True)):
            adapter, _, version = name.rpartition("@v")
            found = self._session.scalar(
                select(CheckpointRow.id)
                .join(AdapterRow)
                .where(
                    is_adapter(AdapterName.parse(adapter)),
                    CheckpointRow.version == int(version),
                    CheckpointRow.digest == item.checkpoint.hex,
                )
            )
            if found is None:
                raise UnknownCheckpoint(name)
            self._session.add(
                MergedInputRow(merged_id=merged_id, position=position, checkpoint_id=found, weight=item.weight)
            )

    def add_location(self, merged: Merged, url: str) -> Merged:
        """Record that a folder (empty text: the store) holds it; no harm if that is known."""
        merged_id = merged_row_id(self._session, merged)
        if url not in self._one(merged_id).locations:
            self._session.add(MergedLocationRow(merged_id=merged_id, url=url))
        if url == STORE:
            Blobs(self._session).require(MergedBlobRow, merged_id, merged.files)
        return self._one(merged_id)

    def _one(self, merged_id: int) -> Merged:
        return self._load(MergedRow.id == merged_id)[0]

    def _load(self, *conditions: ColumnElement[bool]) -> list[Merged]:
        rows = self._session.execute(
            select(MergedRow, BaseRow.name).join(BaseRow).where(*conditions).order_by(MergedRow.id)
        ).all()
        if not rows:
            return []
        wanted = select(MergedRow.id).where(*conditions)
        inputs, locations = defaultdict[int, list[str]](list), defaultdict[int, list[str]](list)
        for merged_id, namespace, name, version in self._session.execute(
            select(MergedInputRow.merged_id, AdapterRow.namespace, AdapterRow.name, CheckpointRow.version)
            .join_from(MergedInputRow, CheckpointRow)
            .join(AdapterRow)
            .where(MergedInputRow.merged_id.in_(wanted))
            .order_by(MergedInputRow.merged_id, MergedInputRow.position)
        ):
            inputs[merged_id].append(ref(namespace, name, version))
        for place in self._session.scalars(
            select(MergedLocationRow).where(MergedLocationRow.merged_id.in_(wanted)).order_by(MergedLocationRow.id)
        ):
            locations[place.merged_id].append(place.url)
        return [_value(row, base_name, tuple(inputs[row.id]), tuple(locations[row.id])) for row, base_name in rows]


def merged_row_id(session: Session, merged: Merged) -> int:
    """The row of a merged model.

    Raises:
        UnknownMerged: it is not recorded.
    """
    found = session.scalar(select(MergedRow.id).where(MergedRow.recipe_digest == merged.recipe.digest.hex))
    if found is None:
        raise UnknownMerged(str(merged.digest))
    return found


def _value(row: MergedRow, base_name: str, checkpoints: tuple[str, ...], locations: tuple[str, ...]) -> Merged:
    return Merged(
        digest=Digest(row.digest),
        recipe=from_json(Recipe, row.recipe),
        base_name=base_name,
        checkpoints=checkpoints,
        files=from_json(tuple[FileEntry, ...], row.files),
        locations=locations,
        note=row.note,
        created_at=row.created_at,
        author=row.author,
    )
