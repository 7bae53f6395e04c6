"""What every use case works with: the settings, the database, the store. The only place where sessions are opened."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, final

from registry.db.catalog import Catalog
from registry.db.condemned import only_sweep
from registry.db.schema import BUSY_TIMEOUT_SECONDS, prepare, reading, upgrade, writing
from registry.errors import BlobSwept, Conflict, DamagedBlob, InvalidInput
from registry.fingerprint import DigestCache
from registry.locations import Location, local_folder
from registry.manifest import Checkpoint, FileEntry, utc_now
from registry.nearby import Nearby
from registry.progress import Progress as Progress
from registry.progress import silent as silent
from registry.refs import Digest
from registry.settings import Settings
from registry.store import Store, StoredFolder


@final
class Change:
    """A write transaction: the catalog, and the history that each change is written to with it."""

    def __init__(self, catalog: Catalog, author: str) -> None:
        self.catalog = catalog
        self.author = author
        self.at = utc_now()

    def record(self, action: str, subject: str, /, **detail: Any) -> None:
        """Write an event, and what webhooks are told of it; both are kept or lost together with the change."""
        event = self.catalog.events.append(self.author, self.at, action, subject, detail)
        self.catalog.webhooks.tell(event)


@final
class Workspace:
    """A registry's parts. Opening it touches nothing; the database is prepared when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.store_url)
        self.cache = DigestCache(settings.home / "cache" / "tensors")
        self._open = threading.local()
        self._turn = threading.Lock()

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
        with _storable(), self._in_turn(), writing(self._engine) as session:
            self._open.change = Change(Catalog(session), self.settings.author)
            try:
                yield self._open.change
            finally:
                self._open.change = None

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """The threads of one process write one after the other. The database would let them, too, but SQLite lets who waits look only now
        and then, so that some wait for seconds; and waiting here takes no connection."""
        if not self._turn.acquire(timeout=BUSY_TIMEOUT_SECONDS):
            raise Conflict("database", f"locked by another thread for {BUSY_TIMEOUT_SECONDS} seconds")
        try:
            yield
        finally:
            self._turn.release()

    @property
    def is_writing(self) -> bool:
        """Whether this thread is within a transaction that writes."""
        return getattr(self._open, "change", None) is not None

    def folder_of(self, checkpoint: Checkpoint) -> Location:
        """A checkpoint's files, as a folder."""
        return self.stored_folder(checkpoint.manifest.files, checkpoint.digest.hex)

    def stored_folder(self, files: Sequence[FileEntry], name: str) -> Location:
        """Files of the store as a folder; where the store is not on this machine, small reads are joined."""
        folder = StoredFolder(self.store, files, name)
        return Nearby(folder) if local_folder(self.store.url) is None else folder

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
        """See, within a write transaction, that blobs about to be recorded are there, and keep them from being swept.

        What is recorded already is there: its row goes before it does.

        Raises:
            BlobSwept: one was swept since it was stored, or is just now; `registry.storing.recording` stores it again.
        """
        digests = {entry.digest for entry in entries}
        with self.reading() as catalog:
            if doomed := catalog.condemned.doomed(digests):
                raise self._swept(doomed[0], "being swept", digests)
            catalog.condemned.pardon(digests)
            for digest in sorted(digests - catalog.needs.known(digests)):
                try:
                    self.store.size(digest)
                except DamagedBlob as error:
                    raise self._swept(digest, error.found, digests) from error

    def _swept(self, digest: Digest, found: str, wanted: Iterable[Digest]) -> BlobSwept:
        return BlobSwept(f"blob {digest.hex}", str(digest), found, sorted(each.hex for each in wanted))

    @contextmanager
    def sweeping(self) -> Iterator[Callable[[], None]]:
        """Be the only one that deletes blobs. Gives what raises `StorageFailed` as soon as that is so no longer.

        Raises:
            Conflict: somebody else is.
        """
        with only_sweep(self._engine) as still_alone:
            yield still_alone

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
