"""Opening the database, bounding transactions, and keeping the tables up to date.

Writers queue: a writing transaction waits for the one before it from its very start, so that what it reads first still holds when it
commits. SQLite's one writer does that when asked for at BEGIN; on PostgreSQL an advisory lock does.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    UniqueConstraint,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    StatementError,
)
from sqlalchemy.orm import Session

from registry.db.tables import Table
from registry.errors import (
    Conflict,
    CorruptFile,
    DatabaseVersion,
    InUse,
    InvalidInput,
    InvalidSetting,
    NameTaken,
    RegistryError,
    StorageFailed,
)
from registry.manifest import utc_now

# Revisions are numbers with leading zeros, so that older and newer ones compare as text.
HEAD_REVISION = "0008"
BUSY_TIMEOUT_SECONDS = 30
LONGEST_PAUSE_SECONDS = 60
CONNECT_TIMEOUT_SECONDS = 10
_PASSWORD = re.compile(r":[^/@]*@")
_WRITERS_LOCK = 0x636B7074  # "ckpt": a key for PostgreSQL's advisory locks


def open_engine(url: str) -> Engine:
    """Connect to a database whose tables are up to date. Nothing is read yet.

    Raises:
        InvalidSetting: the URL is none, or names a database without a driver here.
    """
    return _engine(url, foreign_keys=True)


def _engine(url: str | URL, *, foreign_keys: bool) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            # a database that nobody answers for must not hold up whoever asks for long
            patience = {} if "connect_timeout" in parsed.query else {"connect_timeout": CONNECT_TIMEOUT_SECONDS}
            return create_engine(parsed, pool_pre_ping=True, connect_args=patience)
        # isolation_level None: the driver leaves BEGIN to us
        arguments = {"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None}
        engine = create_engine(parsed, connect_args=arguments)
    except (ArgumentError, ImportError, ValueError) as error:
        raise InvalidSetting("database_url", _PASSWORD.sub(":***@", str(url)), str(error)) from error

    @event.listens_for(engine, "connect")
    def _set_up(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA foreign_keys = {int(foreign_keys)}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that starts by reading cannot become a writing one once somebody else has written.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A session that sees one state of the database throughout. Nothing it changes is kept.

    Raises:
        StorageFailed, CorruptFile, Conflict: the database cannot be read, is none, or stays locked.
    """
    with _translated(engine), Session(_of_one_state(engine)) as session:
        yield session


def _of_one_state(engine: Engine) -> Engine:
    """SQLite's transactions see one state anyway."""
    if engine.dialect.name != "postgresql":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ")


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """A session that waits for other writers, commits at the end, and changes nothing when an error leaves the block.

    Raises:
        NameTaken, InUse, InvalidInput: the change breaks a rule that the database itself holds.
        StorageFailed, CorruptFile, Conflict: the database cannot be written, is none, or stays locked.
    """
    with _translated(engine), Session(engine.execution_options(writes=True)) as session, session.begin():
        _wait_for_writers(session.connection())
        yield session


def _wait_for_writers(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        patience = func.set_config("lock_timeout", f"{BUSY_TIMEOUT_SECONDS}s", True)
        # A writer that was stopped, or whose machine has gone, must not keep the others waiting for ever.
        pause = func.set_config("idle_in_transaction_session_timeout", f"{LONGEST_PAUSE_SECONDS}s", True)
        connection.execute(select(patience, pause, func.pg_advisory_xact_lock(_WRITERS_LOCK)))  # from left to right


def prepare(url: str, backups: Path) -> Engine:
    """Open a database, and see that its tables are those of this package.

    A SQLite database is created and upgraded on the way; several processes may do so at once. Others are upgraded by `upgrade` alone.

    Args:
        url: SQLAlchemy's way to name a database.
        backups: folder for copies of SQLite databases from before an upgrade; made when needed.

    Raises:
        DatabaseVersion: the tables are newer than this package, not its own, or (other than SQLite) older.
        InvalidSetting, StorageFailed, CorruptFile, Conflict: as `open_engine` and `reading`.
    """
    engine = open_engine(url)
    try:
        with _translated(engine):
            if engine.dialect.name == "sqlite":
                _prepare_sqlite(engine, backups)
            elif _found_revision(engine) < HEAD_REVISION:
                raise DatabaseVersion("database", "older than this package: run `ckpt db upgrade`")
    except BaseException:
        engine.dispose()
        raise
    return engine


def upgrade(url: str, backups: Path) -> None:
    """Bring any database to this package's tables, creating them in an empty one. SQLite databases are copied first.

    Raises:
        DatabaseVersion: the tables are newer than this package, or not its own.
        InvalidSetting, StorageFailed, CorruptFile, Conflict: as `open_engine` and `writing`.
    """
    engine = open_engine(url)
    try:
        with _translated(engine):
            if engine.dialect.name == "sqlite":
                _prepare_sqlite(engine, backups)
            else:
                if _found_revision(engine) < HEAD_REVISION:
                    _migrate(engine.url)
                _add_jobs_schema(engine.url)
    finally:
        engine.dispose()


def found_revision(url: str) -> str:
    """Revision of a database's tables, even where it is newer than this package's; empty text for an empty or missing database.

    Raises:
        DatabaseVersion: it holds tables of something else.
        InvalidSetting, StorageFailed, CorruptFile: as `open_engine` and `reading`.
    """
    engine = open_engine(url)
    try:
        if engine.dialect.name == "sqlite" and not Path(engine.url.database or "").exists():
            return ""
        with _translated(engine):
            return _revision(engine)
    finally:
        engine.dispose()


def check_revision(url: str) -> None:
    """See that a database's tables are those of this package.

    Raises:
        DatabaseVersion: they are older, newer, or not its own.
        InvalidSetting, StorageFailed, CorruptFile: as `open_engine` and `reading`.
    """
    if (found := found_revision(url)) < HEAD_REVISION:
        raise DatabaseVersion("database", f"{_older(found)}: run `ckpt db upgrade`")
    if found > HEAD_REVISION:
        raise DatabaseVersion("database", _newer(found))


def _older(revision: str) -> str:
    return f"revision {revision} is older than this package" if revision else "has no tables yet"


def _newer(revision: str) -> str:
    return f"revision {revision} is newer than this package: upgrade ckpt-registry"


def _add_jobs_schema(url: URL) -> None:
    """The job engine keeps its tables in a schema of its own and brings them up to date itself."""
    from registry.db import jobs_schema  # noqa: PLC0415 - needs a package that SQLite does without

    jobs_schema.apply(url.set(drivername="postgresql").render_as_string(hide_password=False))


def back_up(database: Path, backups: Path, revision: str, at: datetime) -> Path:
    """Copy a SQLite database, whole and consistent even while others write to it.

    Returns:
        The copy, named after the revision of its tables and the time (aware, in UTC).

    Raises:
        StorageFailed: the copy cannot be written, or the database not be read.
    """
    copy = backups / f"{database.stem}-{revision}-{at:%Y%m%dT%H%M%S.%fZ}.db"
    partial = copy.with_suffix(".partial")
    try:
        backups.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(partial)) as target:
            source.backup(target)
        return partial.replace(copy)
    except (OSError, sqlite3.Error) as error:
        raise StorageFailed(str(copy), str(error)) from error


def _prepare_sqlite(engine: Engine, backups: Path) -> None:
    name = engine.url.database
    if not name or name == ":memory:":
        raise InvalidSetting("database_url", str(engine.url), "a database in memory would be lost at once")
    database = Path(name)
    with _alone(database):
        found = _found_revision(engine)
        if found == HEAD_REVISION:
            return
        if found:
            back_up(database, backups, found, utc_now())
        _migrate(engine.url)


@contextmanager
def _alone(database: Path) -> Iterator[None]:
    """Hold a lock on a file beside the database: two processes must not create or upgrade it at once."""
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(database.with_name(database.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageFailed(str(database), error.strerror or str(error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _found_revision(engine: Engine) -> str:
    """Revision of the tables; empty text for an empty database.

    Raises:
        DatabaseVersion: newer than this package, or not its tables at all.
    """
    found = _revision(engine)
    if found > HEAD_REVISION:
        raise DatabaseVersion("database", _newer(found))
    return found


def _revision(engine: Engine) -> str:
    with engine.connect() as connection:
        tables = inspect(connection).get_table_names()
        if "alembic_version" not in tables:
            if tables:
                raise DatabaseVersion("database", "holds tables of something else: not a database of this package")
            return ""
        found: str = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() or ""
    return found


def alembic_config(connection: Connection) -> Any:
    """What alembic needs to work on a connection, without an ini file."""
    from alembic.config import Config  # noqa: PLC0415 - takes 0.25 s, and an up-to-date database does not need it

    packaged = Path(__file__).parents[1] / "_migrations"
    scripts = packaged if packaged.is_dir() else Path(__file__).parents[2] / "migrations"
    # alembic would print, and remembers the stdout it was imported with
    config = Config(attributes={"connection": connection}, stdout=io.StringIO())
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    return config


def _migrate(url: URL) -> None:
    from alembic import command  # noqa: PLC0415 - as above
    from alembic.util import CommandError  # noqa: PLC0415 - as above

    # SQLite rebuilds a table to change it, and dropping the old one would delete the rows that refer to it
    engine = _engine(url, foreign_keys=False)
    try:
        with engine.execution_options(writes=True).begin() as connection:
            _wait_for_writers(connection)
            command.upgrade(alembic_config(connection), "head")
            if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_key_check").first():
                raise DatabaseVersion("database", "the upgrade would break references; nothing was changed")
    except CommandError as error:
        raise DatabaseVersion("database", f"cannot be upgraded: {error}") from error
    finally:
        engine.dispose()


@contextmanager
def _translated(engine: Engine) -> Iterator[None]:
    """Turn what drivers raise into the errors of the registry."""
    where = engine.url.database or "" if engine.dialect.name == "sqlite" else engine.url.render_as_string()
    try:
        yield
    except IntegrityError as error:
        raise _broken_rule(error) from error
    except DBAPIError as error:
        translated = _failure(error, where)
        if translated is None:
            raise
        raise translated from error
    except StatementError as error:
        # what a column's type refuses to hold
        if isinstance(error.orig, RegistryError):
            raise error.orig from None
        raise


_UNIQUE_COLUMNS = {
    ", ".join(f"{table.name}.{column.name}" for column in rule.columns): str(rule.name)
    for table in Table.metadata.tables.values()
    for rule in table.constraints
    if isinstance(rule, UniqueConstraint)
}


def _broken_rule(error: IntegrityError) -> RegistryError:
    """The error for a broken constraint, by its name. SQLite tells the columns of unique ones, and nothing of foreign keys."""
    diagnosis = getattr(error.orig, "diag", None)
    detail = str(error.orig).rpartition("failed: ")[2]
    name = str(diagnosis.constraint_name or error.orig) if diagnosis else _UNIQUE_COLUMNS.get(detail, detail)
    if name.startswith("uq_"):
        return NameTaken(name.removeprefix("uq_"), "there is one already")
    if name.startswith("ck_"):
        return InvalidInput(name.removeprefix("ck_"), "", "too long, or not an accepted value")
    if name.startswith("fk_") or "FOREIGN KEY" in name:
        return InUse(name, "something else refers to it")
    return Conflict("database", name)


# Of PostgreSQL: waited too long for a lock, a deadlock, a change that another one came before
_CONTENTION = frozenset({"55P03", "40P01", "40001"})
_PAUSED = "25P03"


def _failure(error: DBAPIError, where: str) -> RegistryError | None:
    reason = str(error.orig)
    kind = getattr(error.orig, "sqlite_errorname", "")
    if isinstance(error, DataError):
        return InvalidInput("value", "", reason.partition("\n")[0])
    if kind.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or getattr(error.orig, "sqlstate", "") in _CONTENTION:
        return Conflict("database", f"locked by another process for {BUSY_TIMEOUT_SECONDS} seconds")
    if getattr(error.orig, "sqlstate", "") == _PAUSED:
        return Conflict(
            "database",
            f"this process stood still for {LONGEST_PAUSE_SECONDS} seconds while others waited; nothing was changed",
        )
    if kind.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return CorruptFile(where, reason)
    if kind.startswith(("SQLITE_READONLY", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return StorageFailed(where, reason)
    if not kind and isinstance(error, (OperationalError, InterfaceError)):
        return StorageFailed(where, reason)
    return None
