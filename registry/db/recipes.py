"""Recipes that are kept without being carried out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import final

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from registry.codec import from_json, plain
from registry.db.lookup import checkpoint_id, ref, starts_with
from registry.db.tables import AdapterRow, BaseRow, CheckpointRow, RecipeInputRow, RecipeRow
from registry.errors import UnknownBase
from registry.manifest import Checkpoint, Recipe
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

    def _load(self, *conditions: ColumnElement[bool]) -> list[KeptRecipe]:
        rows = self._session.execute(
            select(RecipeRow, BaseRow.name).join(BaseRow).where(*conditions).order_by(RecipeRow.id)
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
            )
            for row, base in rows
        ]
