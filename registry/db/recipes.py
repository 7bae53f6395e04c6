"""Recipes that are kept without being carried out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import final

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import Session

from registry.codec import from_json, plain
from registry.db.lookup import checkpoint_id, digest_prefix, near, ref, starts_with
from registry.db.tables import AdapterRow, BaseRow, CheckpointRow, MergedRow, RecipeInputRow, RecipeRow
from registry.errors import Ambiguous, UnknownBase, UnknownRecipe
from registry.manifest import Checkpoint, Recipe
from registry.refs import Digest
from registry.results import KeptRecipe


@final
class Recipes:
    """The kept recipes, the oldest first."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def all(self) -> list[KeptRecipe]:
        """Every recipe."""
        return self._load()

    def starting(self, prefix: str) -> list[KeptRecipe]:
        """Those whose digests begin with some hex digits."""
        return self._load(starts_with(RecipeRow.digest, prefix))

    def find(self, text: str) -> KeptRecipe:
        """A recipe by the id of its repository, or by its digest's first digits (at least 6).

        Raises:
            UnknownRecipe: none; carries similar ids.
            Ambiguous: several; lists their ids.
        """
        prefix = digest_prefix(text.removeprefix("merged-"))
        found = self.starting(prefix) if prefix else []
        if not found:
            raise UnknownRecipe(text, near(text, (each.repository for each in self.all())))
        if len(found) > 1:
            raise Ambiguous(text, [f"merged-{each.recipe.digest.hex}" for each in found])
        return found[0]

    def add(
        self, recipe: Recipe, checkpoints: Sequence[Checkpoint], *, note: str, author: str, at: datetime
    ) -> KeptRecipe:
        """Keep a recipe.

        Args:
            recipe: one that is not kept yet.
            checkpoints: its inputs, in its order.
            note: why.
            author: by whom.
            at: when; aware.

        Raises:
            UnknownBase, UnknownCheckpoint: what it needs is not recorded (any more).
        """
        base_id = self._session.scalar(select(BaseRow.id).where(BaseRow.weights == recipe.base.hex))
        if base_id is None:
            raise UnknownBase(str(recipe.base))
        row = RecipeRow(
            digest=recipe.digest.hex, recipe=plain(recipe), base_id=base_id, note=note, created_at=at, author=author
        )
        self._session.add(row)
        self._session.flush()
        for position, checkpoint in enumerate(checkpoints):
            needed = checkpoint_id(self._session, checkpoint)
            self._session.add(RecipeInputRow(recipe_id=row.id, position=position, checkpoint_id=needed))
        self._session.flush()
        return self._load(RecipeRow.id == row.id)[0]

    def remove(self, text: str) -> KeptRecipe:
        """Keep a recipe no longer; gives what it was.

        Raises:
            UnknownRecipe, Ambiguous: as `find`.
        """
        kept = self.find(text)
        self._session.execute(delete(RecipeRow).where(RecipeRow.digest == kept.recipe.digest.hex))
        return kept

    def _load(self, *conditions: ColumnElement[bool]) -> list[KeptRecipe]:
        rows = self._session.execute(
            select(RecipeRow, BaseRow.name, MergedRow.digest)
            .join_from(RecipeRow, BaseRow)
            .outerjoin(MergedRow, MergedRow.recipe_digest == RecipeRow.digest)
            .where(*conditions)
            .order_by(RecipeRow.id)
        ).all()
        inputs = defaultdict[int, list[str]](list)
        for recipe_id, namespace, name, version in self._session.execute(
            select(RecipeInputRow.recipe_id, AdapterRow.namespace, AdapterRow.name, CheckpointRow.version)
            .join_from(RecipeInputRow, CheckpointRow)
            .join(AdapterRow)
            .where(RecipeInputRow.recipe_id.in_(select(RecipeRow.id).where(*conditions)))
            .order_by(RecipeInputRow.recipe_id, RecipeInputRow.position)
        ):
            inputs[recipe_id].append(ref(namespace, name, version))
        return [
            KeptRecipe(
                recipe=from_json(Recipe, row.recipe),
                base=base,
                checkpoints=tuple(inputs[row.id]),
                note=row.note,
                created_at=row.created_at,
                author=row.author,
                merged=Digest(merged) if merged else None,
            )
            for row, base, merged in rows
        ]
