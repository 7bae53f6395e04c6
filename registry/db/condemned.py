"""Blobs on their way out of the store: marked when nothing needed them, being deleted once a sweep has decided."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import final

from sqlalchemy import Connection, Engine, ScalarResult, delete, func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from registry.db.needs import in_parts
from registry.db.tables import CondemnedRow
from registry.errors import Conflict, StorageFailed
from registry.refs import Digest

_SWEEP_LOCK = 0x73776570  # "swep": a key for PostgreSQL's advisory locks
_ONE_AT_A_TIME = "another process sweeps it just now"


@final
class Condemned:
    """The condemned blobs. What is marked may be pardoned; what is being deleted must be stored again first."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def all(self) -> dict[Digest, int]:
        """Every marked blob with its size in bytes; not those that are being deleted."""
        rows = self._session.execute(
            select(CondemnedRow.digest, CondemnedRow.size_bytes).where(~CondemnedRow.is_deleting)
        )
        return {Digest(text): size_bytes for text, size_bytes in rows}

    def marked(self, digests: Iterable[Digest]) -> dict[Digest, datetime]:
        """Since when each of these is marked; others are left out."""
        found: dict[Digest, datetime] = {}
        for part in in_parts(digests):
            rows = self._session.execute(
                select(CondemnedRow.digest, CondemnedRow.marked_at).where(
                    CondemnedRow.digest.in_(part), ~CondemnedRow.is_deleting
                )
            )
            found |= {Digest(text): marked_at for text, marked_at in rows}
        return found

    def mark(self, sizes: Mapping[Digest, int], at: datetime) -> None:
        """Mark blobs that are not condemned yet.

        Args:
            sizes: the blobs, with their sizes in bytes.
            at: the database's time.
        """
        for part in in_parts(sizes):
            self._session.add_all(
                CondemnedRow(digest=text, size_bytes=sizes[Digest(text)], marked_at=at, is_deleting=False)
                for text in part
            )
            self._session.flush()

    def pardon(self, digests: Iterable[Digest]) -> None:
        """They are needed again. Those that are being deleted stay condemned."""
        for part in in_parts(digests):
            self._session.execute(delete(CondemnedRow).where(CondemnedRow.digest.in_(part), ~CondemnedRow.is_deleting))

    def doom(self, digests: Iterable[Digest]) -> None:
        """Decide that marked blobs are deleted: from here on nobody may record them."""
        for part in in_parts(digests):
            self._session.execute(update(CondemnedRow).where(CondemnedRow.digest.in_(part)).values(is_deleting=True))

    def doomed(self, digests: Iterable[Digest] | None = None) -> list[Digest]:
        """Those that are being deleted, of these or of all."""
        rows = select(CondemnedRow.digest).where(CondemnedRow.is_deleting).order_by(CondemnedRow.digest)
        if digests is None:
            return _digests(self._session.scalars(rows))
        return [
            digest
            for part in in_parts(digests)
            for digest in _digests(self._session.scalars(rows.where(CondemnedRow.digest.in_(part))))
        ]

    def drop(self, digests: Iterable[Digest]) -> None:
        """They are deleted, and may be stored again."""
        for part in in_parts(digests):
            self._session.execute(delete(CondemnedRow).where(CondemnedRow.digest.in_(part)))


def _digests(found: ScalarResult[str]) -> list[Digest]:
    return [Digest(text) for text in found]


@contextmanager
def only_sweep(engine: Engine) -> Iterator[Callable[[], None]]:
    """Hold what only one sweep of a registry can hold. Gives what raises `StorageFailed` when it is held no longer.

    Raises:
        Conflict: another process holds it.
        StorageFailed: the database cannot be reached.
    """
    if engine.dialect.name == "sqlite":
        with _locked_file(f"{engine.url.database}.sweep"):
            yield lambda: None  # a file's lock lasts as long as the process
        return
    try:
        # The lock belongs to this one connection: whoever loses the connection has lost the lock.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            if not connection.scalar(select(func.pg_try_advisory_lock(_SWEEP_LOCK))):
                raise Conflict("the store", _ONE_AT_A_TIME)
            try:
                yield lambda: _check_alive(connection)
            finally:
                if not connection.invalidated:
                    connection.execute(select(func.pg_advisory_unlock(_SWEEP_LOCK)))
    except DBAPIError as error:
        raise StorageFailed(engine.url.render_as_string(), str(error.orig)) from error


def _check_alive(connection: Connection) -> None:
    try:
        connection.scalar(select(1))
    except DBAPIError as error:
        raise StorageFailed(
            connection.engine.url.render_as_string(), f"the sweep's lock is lost: {error.orig}"
        ) from error


@contextmanager
def _locked_file(path: str) -> Iterator[None]:
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageFailed(path, error.strerror or str(error)) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict("the store", _ONE_AT_A_TIME) from error
        yield
    finally:
        os.close(lock)
