"""Blobs that somebody has shown to have and is about to record, and which blobs one may name at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, final

from sqlalchemy import ColumnElement, delete, exists, or_, select, update
from sqlalchemy.orm import Session

from registry.db.needs import in_parts
from registry.db.tables import (
    AdapterRow,
    BaseBlobRow,
    BlobRow,
    CheckpointBlobRow,
    CheckpointRow,
    LeaseRow,
    MergedBlobRow,
    MergedInputRow,
)
from registry.manifest import FileEntry
from registry.refs import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a file under way, kept as a blob of its own. `number` counts from 1."""

    number: int
    size_bytes: int
    digest: Digest


@final
class Leases:
    """The leases. While one lasts, its blob is not swept, and its holder may name the blob in what he records."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def take(self, holder: str, digests: Iterable[Digest], until: datetime) -> None:
        """Give a holder a lease on blobs, or make the one he has last longer.

        Args:
            holder: who has shown to have them.
            digests: the blobs.
            until: when it ends, by the database's clock.
        """
        wanted = set(digests)
        for part in in_parts(sorted(wanted)):
            mine = [LeaseRow.holder == holder, LeaseRow.digest.in_(part)]
            known = set(self._session.scalars(select(LeaseRow.digest).where(*mine)))
            self._session.execute(
                update(LeaseRow).where(*mine, LeaseRow.expires_at < until).values(expires_at=until),
                execution_options={"synchronize_session": False},
            )
            self._session.add_all(
                LeaseRow(digest=text, holder=holder, expires_at=until) for text in part if text not in known
            )
        self._session.flush()

    def release(self, holder: str) -> None:
        """End all leases of somebody."""
        self._session.execute(delete(LeaseRow).where(LeaseRow.holder == holder))

    def held(self, holder: str, digests: Iterable[Digest], now: datetime) -> set[Digest]:
        """Those of some blobs that a holder has a lease on at a time."""
        found: set[Digest] = set()
        for part in in_parts(digests):
            mine = select(LeaseRow.digest).where(
                LeaseRow.holder == holder, LeaseRow.digest.in_(part), LeaseRow.expires_at > now
            )
            found |= {Digest(text) for text in self._session.scalars(mine)}
        return found

    def of(self, holder: str, now: datetime) -> set[Digest]:
        """The blobs that a holder has a lease on at a time."""
        mine = select(LeaseRow.digest).where(LeaseRow.holder == holder, LeaseRow.expires_at > now)
        return {Digest(text) for text in self._session.scalars(mine)}

    def parts(self, upload: str, now: datetime) -> list[Part]:
        """The parts of an upload, by number: blobs whose holder is the upload's with the number behind it."""
        rows = self._session.execute(
            select(LeaseRow.holder, LeaseRow.digest, BlobRow.size_bytes)
            .join(BlobRow, BlobRow.digest == LeaseRow.digest)
            # a range, so that the index serves it; `:` follows the last digit
            .where(LeaseRow.holder > upload, LeaseRow.holder < f"{upload}:", LeaseRow.expires_at > now)
        )
        found = [
            Part(number=int(holder.removeprefix(upload)), size_bytes=size_bytes, digest=Digest(digest))
            for holder, digest, size_bytes in rows
        ]
        return sorted(found, key=lambda part: part.number)

    def recorded(self, digests: Iterable[Digest]) -> dict[Digest, FileEntry]:
        """What is recorded of blobs: sizes, and SHA-256 where it is known; a blob's path is its digest."""
        found: dict[Digest, FileEntry] = {}
        for part in in_parts(digests):
            for row in self._session.scalars(select(BlobRow).where(BlobRow.digest.in_(part))):
                digest = Digest(row.digest)
                found[digest] = FileEntry(path=row.digest, size_bytes=row.size_bytes, digest=digest, sha256=row.sha256)
        return found

    def visible(self, digests: Iterable[Digest], namespaces: Sequence[str]) -> set[Digest]:
        """Those of some blobs that belong to what is seen from some namespaces (none: everything): a checkpoint, a merged model all of
        whose inputs are seen, any base model."""
        found: set[Digest] = set()
        for part in in_parts(digests):
            rows = select(BlobRow.digest).where(BlobRow.digest.in_(part), _is_seen(namespaces))
            found |= {Digest(text) for text in self._session.scalars(rows)}
        return found


def _is_seen(namespaces: Sequence[str]) -> ColumnElement[bool]:
    of_base = exists().where(BaseBlobRow.blob_id == BlobRow.id)
    of_checkpoint = exists().where(CheckpointBlobRow.blob_id == BlobRow.id)
    of_merged = exists().where(MergedBlobRow.blob_id == BlobRow.id)
    if namespaces:
        of_checkpoint = of_checkpoint.where(
            CheckpointRow.id == CheckpointBlobRow.owner_id, _owner().in_(namespaces)
        ).correlate(BlobRow)
        foreign = exists().where(
            MergedInputRow.merged_id == MergedBlobRow.owner_id,
            CheckpointRow.id == MergedInputRow.checkpoint_id,
            _owner().not_in(namespaces),
        )
        of_merged = of_merged.where(~foreign.correlate(MergedBlobRow)).correlate(BlobRow)
    return or_(of_base, of_checkpoint, of_merged)


def _owner() -> Any:
    return select(AdapterRow.namespace).where(AdapterRow.id == CheckpointRow.adapter_id).scalar_subquery()
