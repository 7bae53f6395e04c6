"""Which rows need which blobs of the store: what a sweep spares, and what `verify` looks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, NamedTuple, final

from sqlalchemy import Select, delete, exists, select
from sqlalchemy.orm import Session, undefer

from registry.db.lookup import ref
from registry.db.tables import (
    AdapterRow,
    BaseBlobRow,
    BaseRow,
    BlobRow,
    CheckpointBlobRow,
    CheckpointRow,
    JobRow,
    LeaseRow,
    MergedBlobRow,
    MergedLocationRow,
    MergedRow,
    ReplyRow,
    ShardRow,
)
from registry.manifest import FileEntry, content_digest
from registry.refs import Digest

_NEEDS = (CheckpointBlobRow, BaseBlobRow, MergedBlobRow)
_PART = 5000  # parameters of one statement
_OWNERS = 500  # rows looked through at once
REPLIES_KEPT = timedelta(hours=48)


class Gap(NamedTuple):
    """A row that contradicts itself: whose, and how."""

    owner: str
    expected: str
    found: str


class _Owner(NamedTuple):
    """A row that needs blobs: the digests and sizes that its own document names, and the digest it goes by where that follows from them."""

    id: int
    name: str
    files: Mapping[str, int]
    digest: str
    content: str


def in_parts(digests: Iterable[Digest]) -> Iterator[list[str]]:
    """Digests as hex digits, in lists that one statement can take."""
    texts = (digest.hex for digest in digests)
    while part := list(islice(texts, _PART)):
        yield part


@final
class Needs:
    """What needs what."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def sizes(self) -> dict[Digest, int]:
        """Every blob that something needs, with its recorded size in bytes."""
        rows = self._session.execute(_needed().execution_options(yield_per=10_000))
        return {Digest(text): size_bytes for text, size_bytes in rows}

    def known(self, digests: Iterable[Digest]) -> set[Digest]:
        """Those that are recorded, needed or not."""
        return {
            Digest(text)
            for part in in_parts(digests)
            for text in self._session.scalars(select(BlobRow.digest).where(BlobRow.digest.in_(part)))
        }

    def unneeded(self) -> dict[Digest, int]:
        """Every recorded blob that nothing needs any more, with its size in bytes."""
        rows = select(BlobRow.digest, BlobRow.size_bytes).where(*(~_needs(table) for table in _NEEDS))
        return {Digest(text): size_bytes for text, size_bytes in self._session.execute(rows)}

    def free(self, digests: Iterable[Digest], now: datetime) -> set[Digest]:
        """Those that no row needs, nobody has a lease on, and no running job has made.

        Args:
            now: the database's time.
        """
        wanted = set(digests)
        held = self._made_by_jobs()
        for part in in_parts(wanted):
            needed = self._session.scalars(_needed().with_only_columns(BlobRow.digest).where(BlobRow.digest.in_(part)))
            leased = select(LeaseRow.digest).where(LeaseRow.digest.in_(part), LeaseRow.expires_at > now)
            held |= set(needed) | set(self._session.scalars(leased))
        return {digest for digest in wanted if digest.hex not in held}

    def _made_by_jobs(self) -> set[str]:
        entries = self._session.scalars(
            select(ShardRow.entry)
            .join(JobRow, JobRow.id == ShardRow.job_id)
            .where(JobRow.state.in_(("queued", "running")), ShardRow.entry.is_not(None))
        )
        return {Digest.parse(entry["digest"]).hex for entry in entries if entry}

    def owners(self, digest: Digest) -> list[str]:
        """What needs a blob, as people refer to it, sorted."""
        blob = select(BlobRow.id).where(BlobRow.digest == digest.hex).scalar_subquery()
        checkpoints = self._session.execute(
            select(AdapterRow.namespace, AdapterRow.name, CheckpointRow.version)
            .join(CheckpointRow, CheckpointRow.adapter_id == AdapterRow.id)
            .join(CheckpointBlobRow, CheckpointBlobRow.owner_id == CheckpointRow.id)
            .where(CheckpointBlobRow.blob_id == blob)
        )
        bases = self._session.scalars(
            select(BaseRow.name)
            .join(BaseBlobRow, BaseBlobRow.owner_id == BaseRow.id)
            .where(BaseBlobRow.blob_id == blob)
        )
        merged = self._session.scalars(
            select(MergedRow.digest)
            .join(MergedBlobRow, MergedBlobRow.owner_id == MergedRow.id)
            .where(MergedBlobRow.blob_id == blob)
        )
        return sorted(
            [
                *(ref(*each) for each in checkpoints),
                *(f"base model {name}" for name in bases),
                *(f"merged model {text[:12]}" for text in merged),
            ]
        )

    def expire(self, now: datetime) -> None:
        """Forget leases and kept answers whose time is over."""
        self._session.execute(delete(LeaseRow).where(LeaseRow.expires_at <= now))
        self._session.execute(delete(ReplyRow).where(ReplyRow.created_at <= now - REPLIES_KEPT))

    def gaps(self) -> Iterator[Gap]:
        """Rows whose own list of files is not what is recorded beside them, or not what their digest says."""
        for table, owners in (
            (CheckpointBlobRow, self._checkpoints()),
            (BaseBlobRow, self._bases()),
            (MergedBlobRow, self._merged()),
        ):
            while part := list(islice(owners, _OWNERS)):
                found = self._blobs_of(table, [owner.id for owner in part])
                for owner in part:
                    yield from _gaps(owner, found.get(owner.id, {}))

    def _blobs_of(self, table: Any, owners: list[int]) -> dict[int, dict[str, int]]:
        found: dict[int, dict[str, int]] = {}
        for owner, digest, size_bytes in self._session.execute(
            select(table.owner_id, BlobRow.digest, BlobRow.size_bytes)
            .join(BlobRow, BlobRow.id == table.blob_id)
            .where(table.owner_id.in_(owners))
        ):
            found.setdefault(owner, {})[digest] = size_bytes
        return found

    def _checkpoints(self) -> Iterator[_Owner]:
        rows = select(
            CheckpointRow.id,
            AdapterRow.namespace,
            AdapterRow.name,
            CheckpointRow.version,
            CheckpointRow.digest,
            CheckpointRow.manifest,
        ).join(AdapterRow, AdapterRow.id == CheckpointRow.adapter_id)
        for id_, namespace, name, version, digest, manifest in self._after(rows, CheckpointRow.id):
            files = [_entry(each) for each in manifest["files"]]
            yield _Owner(id_, ref(namespace, name, version), _sizes(files), digest, content_digest(files).hex)

    def _merged(self) -> Iterator[_Owner]:
        rows = (
            select(MergedRow.id, MergedRow.digest, MergedRow.files)
            .join(MergedLocationRow, MergedLocationRow.merged_id == MergedRow.id)
            .where(MergedLocationRow.url == "")
        )
        for id_, digest, documents in self._after(rows, MergedRow.id):
            files = [_entry(each) for each in documents]
            yield _Owner(id_, f"merged model {digest[:12]}", _sizes(files), digest, content_digest(files).hex)

    def _bases(self) -> Iterator[_Owner]:
        for row in self._session.scalars(select(BaseRow).where(BaseRow.in_store).options(undefer(BaseRow.document))):
            files = {Digest.parse(each["identity"]).hex: each["size_bytes"] for each in row.document["files"]}
            yield _Owner(row.id, f"base model {row.name}", files, "", "")

    def _after(self, rows: Any, id_: Any) -> Iterator[Any]:
        """All rows, by a few hundred: a result that stays open while others are asked for is not what every driver can hold."""
        last = 0
        while part := self._session.execute(rows.where(id_ > last).order_by(id_).limit(_OWNERS)).all():
            yield from part
            last = part[-1][0]


def _entry(document: Mapping[str, Any]) -> FileEntry:
    return FileEntry(path=document["path"], size_bytes=document["size_bytes"], digest=Digest.parse(document["digest"]))


def _sizes(files: Iterable[FileEntry]) -> dict[str, int]:
    return {entry.digest.hex: entry.size_bytes for entry in files}


def _gaps(owner: _Owner, found: Mapping[str, int]) -> Iterator[Gap]:
    if owner.digest != owner.content:
        yield Gap(owner.name, f"the digest {owner.digest}", f"files whose digest is {owner.content}")
    for digest, size_bytes in sorted(owner.files.items()):
        if digest not in found:
            yield Gap(owner.name, f"a record of its blob {digest}", "none")
        elif found[digest] != size_bytes:
            yield Gap(owner.name, f"blob {digest} of {size_bytes} bytes", f"{found[digest]} bytes recorded")


def _needed() -> Select[str, int]:
    """Union by three index look-ups a blob, not by a join that would count some twice."""
    condition = _needs(CheckpointBlobRow) | _needs(BaseBlobRow) | _needs(MergedBlobRow)
    return select(BlobRow.digest, BlobRow.size_bytes).where(condition)


def _needs(table: Any) -> Any:
    return exists().where(table.blob_id == BlobRow.id)
