"""Which objects of the store are known, and which of them something still needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

from sqlalchemy import ColumnElement, Select, delete, exists, insert, or_, select
from sqlalchemy.orm import Session

from registry.db.tables import BaseBlobRow, BlobRow, CheckpointBlobRow, MergedBlobRow
from registry.errors import InUse
from registry.manifest import FileEntry
from registry.refs import Digest

_NEEDS = (CheckpointBlobRow, BaseBlobRow, MergedBlobRow)
Need = type[CheckpointBlobRow] | type[BaseBlobRow] | type[MergedBlobRow]


@final
class Blobs:
    """The blobs of the store, as far as the database knows them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, entries: Iterable[FileEntry]) -> None:
        """Record blobs. Of those known already a missing sha256 is filled in."""
        wanted = {entry.digest.hex: entry for entry in entries}
        rows = self._session.scalars(select(BlobRow).where(BlobRow.digest.in_(wanted)))
        known = {row.digest: row for row in rows}
        for digest, entry in wanted.items():
            if digest not in known:
                self._session.add(BlobRow(digest=digest, sha256=entry.sha256, size_bytes=entry.size_bytes))
            elif entry.sha256:
                known[digest].sha256 = entry.sha256

    def require(self, table: Need, owner_id: int, entries: Iterable[FileEntry]) -> None:
        """Record that a row needs exactly these blobs, and the blobs with it."""
        entries = list(entries)
        self.add(entries)
        self._session.execute(delete(table).where(table.owner_id == owner_id))
        digests = {entry.digest.hex for entry in entries}
        ids = self._session.scalars(select(BlobRow.id).where(BlobRow.digest.in_(digests)))
        self._session.add_all([table(owner_id=owner_id, blob_id=blob_id) for blob_id in ids])

    def require_new(self, table: Need, wanted: Mapping[int, Iterable[FileEntry]]) -> None:
        """The same for several rows that were just made, all at once."""
        needs = {owner_id: {entry.digest.hex: entry for entry in entries} for owner_id, entries in wanted.items()}
        self.add(entry for entries in needs.values() for entry in entries.values())
        self._session.flush()
        digests = {digest for entries in needs.values() for digest in entries}
        found = self._session.execute(select(BlobRow.digest, BlobRow.id).where(BlobRow.digest.in_(digests)))
        ids = {row.digest: row.id for row in found}
        rows = [
            {"owner_id": owner_id, "blob_id": ids[digest]} for owner_id, entries in needs.items() for digest in entries
        ]
        if rows:
            self._session.execute(insert(table), rows)

    def required(self) -> list[FileEntry]:
        """The blobs that something needs, by digest; a blob's path is its digest."""
        rows = self._session.scalars(select(BlobRow).where(or_(*_needed())).order_by(BlobRow.digest))
        return [
            FileEntry(path=row.digest, size_bytes=row.size_bytes, digest=Digest(row.digest), sha256=row.sha256)
            for row in rows
        ]

    def forget(self, digests: Iterable[Digest]) -> None:
        """Delete the rows of blobs, so that their objects may go.

        Raises:
            InUse: something needs one of them (again).
        """
        texts = {digest.hex for digest in digests}
        free = set(self._session.scalars(_unreferenced().where(BlobRow.digest.in_(texts))))
        known = set(self._session.scalars(select(BlobRow.digest).where(BlobRow.digest.in_(texts))))
        if needed := sorted(known - free):
            raise InUse(", ".join(needed), "something needs these blobs")
        self._session.execute(delete(BlobRow).where(BlobRow.digest.in_(free)))


def _unreferenced() -> Select[str]:
    return select(BlobRow.digest).where(*(~needed for needed in _needed()))


def _needed() -> list[ColumnElement[bool]]:
    return [exists().where(table.blob_id == BlobRow.id) for table in _NEEDS]
