"""Base models: find, add, move."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session, undefer

from registry.db.blobs import Blobs
from registry.db.documents import base_document, base_parts_from, tensor_digests_from
from registry.db.lookup import digest_prefix, near, starts_with
from registry.db.tables import BaseBlobRow, BaseRow
from registry.errors import Ambiguous, NameTaken, UnknownBase
from registry.manifest import BaseFormat, BaseModel, FileEntry, Fingerprint
from registry.refs import Digest


@final
class Bases:
    """The registered base models."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def all(self) -> list[BaseModel]:
        """Every base model, by name."""
        return sorted(self._load(), key=lambda base: base.name)

    def names(self) -> list[str]:
        """Every base model's name, sorted; their tables of tensors are not read for that."""
        return sorted(self._session.scalars(select(BaseRow.name)))

    def find(self, text: str) -> BaseModel:
        """A base model by its name, its weights' digest, or a prefix of that (at least 6 hex digits).

        Raises:
            UnknownBase: none.
            Ambiguous: the prefix fits several; lists name and digest of each.
        """
        found = self._load(BaseRow.name == text)
        if not found and (prefix := digest_prefix(text)):
            found = self._load(starts_with(BaseRow.weights, prefix))
        if not found:
            raise UnknownBase(text, near(text, self.names()))
        if len(found) > 1:
            raise Ambiguous(text, sorted(f"{base.name} {base.digest.short}" for base in found))
        return found[0]

    def by_weights(self, weights: Digest) -> BaseModel | None:
        """The base model with exactly these weights, or None."""
        return next(iter(self._load(BaseRow.weights == weights.hex)), None)

    def add(self, base: BaseModel, blobs: Iterable[FileEntry] = ()) -> BaseModel:
        """Record a base model.

        Args:
            base: with weights that are not recorded yet.
            blobs: the files of the registry's own copy, if it has one.

        Raises:
            NameTaken: the name or the weights are recorded already.
        """
        taken = self._session.scalar(select(BaseRow.weights).where(BaseRow.name == base.name))
        if taken is not None:
            raise NameTaken(base.name, f"names the base model {taken[:12]}")
        row = BaseRow(
            name=base.name,
            weights=base.fingerprint.weights.hex,
            architecture=base.fingerprint.architecture.hex,
            parameters=base.parameters,
            size_bytes=base.size_bytes,
            created_at=base.created_at,
            author=base.author,
        )
        return self._store(row, base, blobs)

    def update(self, base: BaseModel, blobs: Iterable[FileEntry] = ()) -> BaseModel:
        """Record where and how known weights lie now, and their `arch_version`. Name, author and time stay.

        Raises:
            UnknownBase: these weights are not recorded.
        """
        row = self._session.scalar(select(BaseRow).where(BaseRow.weights == base.digest.hex))
        if row is None:
            raise UnknownBase(str(base.digest))
        return self._store(row, base, blobs)

    def _store(self, row: BaseRow, base: BaseModel, blobs: Iterable[FileEntry]) -> BaseModel:
        row.url, row.in_store, row.format = base.url, base.in_store, base.format.value
        row.arch_version, row.document = base.arch_version, base_document(base)
        self._session.add(row)
        self._session.flush()
        Blobs(self._session).require(BaseBlobRow, row.id, blobs)
        return _value(row)

    def _load(self, *conditions: ColumnElement[bool]) -> list[BaseModel]:
        rows = self._session.scalars(select(BaseRow).where(*conditions).options(undefer(BaseRow.document)))
        return [_value(row) for row in rows]


def _value(row: BaseRow) -> BaseModel:
    return BaseModel(
        name=row.name,
        url=row.url,
        in_store=row.in_store,
        format=BaseFormat(row.format),
        fingerprint=Fingerprint(
            architecture=Digest(row.architecture),
            weights=Digest(row.weights),
            tensors=tensor_digests_from(row.document),
        ),
        arch_version=row.arch_version,
        created_at=row.created_at,
        author=row.author,
        **base_parts_from(row.document),
    )
