"""What every use case works with: the settings, the database, the store. The only place where sessions are opened."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, final

from registry.db.catalog import Catalog
from registry.db.schema import prepare, reading, upgrade, writing
from registry.errors import InvalidInput
from registry.fingerprint import DigestCache
from registry.locations import Location
from registry.manifest import Checkpoint, FileEntry, utc_now
from registry.settings import Settings
from registry.store import Store, StoredFolder

Progress = Callable[[str, int, int], None]
"""Told what is being done, the bytes done since the last call, and the bytes there are in all."""


def silent(what: str, done_bytes: int, total_bytes: int) -> None:
    """The progress of who does not want to know."""
    del what, done_bytes, total_bytes


@final
class Change:
    """A write transaction: the catalog, and the history that each change is written to with it."""

    def __init__(self, catalog: Catalog, author: str) -> None:
        self.catalog = catalog
        self.author = author
        self.at = utc_now()

    def record(self, action: str, subject: str, /, **detail: Any) -> None:
        """Write an event; it is kept or lost together with the change it tells of."""
        self.catalog.events.append(self.author, self.at, action, subject, detail)


@final
class Workspace:
    """A registry's parts. Opening it touches nothing; the database is prepared when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.store_url)
        self.cache = DigestCache(settings.home / "cache" / "tensors")
        self._open = threading.local()

    def signed_by(self, author: str) -> Workspace:
        """The same parts, for somebody else: what is recorded through it has that author. Closing it is left to the first."""
        _ = self._engine  # one for all
        other = copy(self)
        other.settings = replace(self.settings, author=author)
        return other

    @cached_property
    def _engine(self) -> Any:
        return prepare(self.settings.database_url, self.settings.home / "backups")

    def upgrade_database(self) -> None:
        """Bring the database to this package's tables. SQLite's is upgraded by itself whenever it is opened; others only here.

        Raises:
            DatabaseVersion: it is newer than this package, or holds something else.
        """
        upgrade(self.settings.database_url, self.settings.home / "backups")

    @contextmanager
    def reading(self) -> Iterator[Catalog]:
        """One consistent view of the database; within a transaction of this thread, that one's.

        Raises:
            InvalidInput: it is asked for what no database can hold.
        """
        outer: Change | None = getattr(self._open, "change", None)
        if outer is not None:
            yield outer.catalog
            return
        with _storable(), reading(self._engine) as session:
            yield Catalog(session)

    @contextmanager
    def writing(self) -> Iterator[Change]:
        """A transaction that is committed at the end, or not at all. One within another, in the same thread, is part of the outer one.

        Raises:
            InvalidInput: it is given what no database can hold.
        """
        outer: Change | None = getattr(self._open, "change", None)
        if outer is not None:
            yield outer
            return
        with _storable(), writing(self._engine) as session:
            self._open.change = Change(Catalog(session), self.settings.author)
            try:
                yield self._open.change
            finally:
                self._open.change = None

    def folder_of(self, checkpoint: Checkpoint) -> Location:
        """A checkpoint's files, as a folder."""
        return StoredFolder(self.store, checkpoint.manifest.files, checkpoint.digest.hex)

    def store_files(
        self, location: Location, paths: Iterable[str], advance: Callable[[int], None] = lambda done_bytes: None
    ) -> tuple[FileEntry, ...]:
        """Put files of a folder into the store, with both digests. Nobody refers to them yet.

        Raises:
            Changed: a file changed while it was read.
            PathNotFound: a file is not there.
        """
        entries = []
        for path in paths:
            blob = self.store.put_file(location, path)
            entries.append(FileEntry(path=path, size_bytes=blob.size_bytes, digest=blob.digest, sha256=blob.sha256))
            advance(blob.size_bytes)
        return tuple(entries)

    def check_stored(self, entries: Iterable[FileEntry]) -> None:
        """See, within a write transaction, that blobs about to be recorded are there: the sweep deletes only while it holds one itself.

        Raises:
            DamagedBlob: one was swept since it was stored; trying again stores it again.
        """
        for entry in entries:
            self.store.size(entry.digest)

    def close(self) -> None:
        """Release the database."""
        if "_engine" in vars(self):
            self._engine.dispose()


@contextmanager
def _storable() -> Iterator[None]:
    """Text that is not Unicode (halves of characters, from bytes that were not UTF-8) and numbers beyond 64 bits are refused."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidInput("text", ascii(error.object)[:80], "not Unicode text") from error
    except OverflowError as error:
        raise InvalidInput("number", "", str(error)) from error


def nothing_but(values: Mapping[str, object]) -> dict[str, object]:
    """The entries that say something, for the detail of an event."""
    return {key: value for key, value in values.items() if value not in (None, "", (), {}, [])}
