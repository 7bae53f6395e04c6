"""Copy a whole registry to another database and store: from one's own machine to the team's, or back.

Files first, each compared with its digest on the way, then all rows in one transaction: until that ends the target stays as it was. Done
again it goes on, because files that are there are passed over; a target that was copied from the same registry before is brought up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from registry.db.blobs import Blobs
from registry.db.schema import open_engine, prepare, reading, upgrade, writing
from registry.db.transfer import bases_elsewhere, check_target, copy_rows, row_count
from registry.errors import DamagedBlob, InvalidInput, PathNotFound
from registry.manifest import FileEntry
from registry.store import Store
from registry.workspace import Progress, silent

if TYPE_CHECKING:
    from sqlalchemy import Engine

_BLOCK_BYTES = 4 << 20
_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a registry is: its database and its store."""

    database_url: str
    store_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy holds now: rows by table, files, and how many files of them this run wrote.

    `elsewhere` are base models by name, with the places outside the store where they still are.
    """

    rows: Mapping[str, int]
    blobs: int
    written: int
    written_bytes: int
    elsewhere: Mapping[str, str]


def copy(source: Place, target: Place, backups: Path, progress: Progress = silent) -> Copied:
    """Copy everything but work under way.

    Args:
        source: what to copy; nothing in it is changed, and others may go on working with it: what they record meanwhile is not copied.
        target: an empty database and any store. The database is given its tables.
        backups: folder for copies of SQLite databases from before an upgrade.
        progress: told of the bytes of files, then of the rows.

    Raises:
        InvalidInput: source and target are the same.
        PathNotFound: the source is a file that is not there.
        Conflict: the target is in use, or holds another registry.
        DatabaseVersion: the source has older or newer tables.
        DamagedBlob: a file of the source is missing, or is not what was recorded.
        Changed: the copy does not have all rows, or its history is not sound.
    """
    if source.database_url == target.database_url or source.store_url == target.store_url:
        raise InvalidInput(
            "target", target.store_url, "both its database and its store must be others than the source's"
        )
    _see_it_is_there(source.database_url)
    upgrade(target.database_url, backups)
    with _opened(source, backups) as read, _opened(target, backups) as write:
        with reading(read) as old, reading(write) as new:
            check_target(old, new)
        with reading(read) as old:
            entries = Blobs(old).required()
            written = _copy_blobs(Store(source.store_url), Store(target.store_url), entries, progress)
            total = row_count(old)
            with writing(write) as new:
                check_target(old, new)
                rows = copy_rows(old, new, lambda table, count: progress(table, count, total))
            elsewhere = dict(bases_elsewhere(old))
    return Copied(rows=rows, blobs=len(entries), written=len(written), written_bytes=sum(written), elsewhere=elsewhere)


def _see_it_is_there(database_url: str) -> None:
    """SQLite would make an empty database of a mistyped path."""
    url = open_engine(database_url).url
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        raise PathNotFound(url.database or database_url)


@contextmanager
def _opened(place: Place, backups: Path) -> Iterator[Engine]:
    engine = prepare(place.database_url, backups)
    try:
        yield engine
    finally:
        engine.dispose()


def _copy_blobs(source: Store, target: Store, entries: list[FileEntry], progress: Progress) -> list[int]:
    """Copy what is not there yet; gives the sizes of what was."""
    total = sum(entry.size_bytes for entry in entries)
    lock = Lock()

    def advance(done_bytes: int) -> None:
        with lock:
            progress("files", done_bytes, total)

    with ThreadPoolExecutor(_THREADS) as threads:
        jobs = [threads.submit(_copy_blob, source, target, entry, advance) for entry in entries]
        try:
            return [entry.size_bytes for entry, job in zip(entries, jobs, strict=True) if job.result()]
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _copy_blob(source: Store, target: Store, entry: FileEntry, advance: Callable[[int], None]) -> bool:
    if _has(target, entry):
        advance(entry.size_bytes)
        return False
    with (
        source.open(entry.digest) as stream,
        target.create(expected=entry.digest, size_bytes=entry.size_bytes) as writer,
    ):
        while block := stream.read(_BLOCK_BYTES):
            writer.write(block)
            advance(len(block))
        writer.commit(expected=entry.digest)
    return True


def _has(store: Store, entry: FileEntry) -> bool:
    try:
        return store.size(entry.digest) == entry.size_bytes
    except DamagedBlob:
        return False
