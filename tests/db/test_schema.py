"""Opening, creating, upgrading and locking the database, and how its failures are told."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
import servers
from alembic import command
from alembic.script import ScriptDirectory
from factories import NOON, checkpoint
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session

from registry.db import schema
from registry.db.catalog import Catalog
from registry.db.schema import (
    HEAD_REVISION,
    alembic_config,
    back_up,
    open_engine,
    prepare,
    reading,
    upgrade,
    writing,
)
from registry.db.tables import NoteRow
from registry.errors import (
    Conflict,
    CorruptFile,
    DatabaseVersion,
    InUse,
    InvalidInput,
    InvalidSetting,
    NameTaken,
    StorageFailed,
)
from registry.manifest import Note


def run(program: str, *arguments: object) -> subprocess.Popen[str]:
    command_line = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def set_revision(database: Path, revision: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [revision])


def test_head_is_what_the_code_expects(engine: Engine) -> None:
    with engine.connect() as connection:
        assert ScriptDirectory.from_config(alembic_config(connection)).get_heads() == [HEAD_REVISION]


def test_migrations_make_the_tables_that_the_code_declares(engine: Engine) -> None:
    with engine.connect() as connection:
        command.check(alembic_config(connection))  # raises when they differ


def test_migrations_make_every_named_rule(sqlite: Engine) -> None:
    with sqlite.connect() as connection:
        sql = " ".join(connection.scalars(text("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")))
    for table in NoteRow.metadata.tables.values():
        for rule in [*table.constraints, *table.indexes]:
            assert str(rule.name) in sql


def test_sqlite_is_set_up_to_be_durable(sqlite: Engine) -> None:
    with sqlite.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_prepare_creates_a_database_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'ckpt.db'}"
    for _ in range(2):
        engine = prepare(url, tmp_path / "backups")
        with reading(engine) as session:
            assert Catalog(session).checkpoints.all() == []
        engine.dispose()
    assert not (tmp_path / "backups").exists()


def test_two_processes_may_create_it_at_once(tmp_path: Path) -> None:
    program = "import sys, pathlib; from registry.db.schema import prepare; prepare(sys.argv[1], pathlib.Path('b'))"
    processes = [run(program, f"sqlite:///{tmp_path / 'ckpt.db'}") for _ in range(3)]
    assert [process.communicate()[1] for process in processes] == ["", "", ""]
    upgrade(f"sqlite:///{tmp_path / 'ckpt.db'}", tmp_path / "backups")
    assert not (tmp_path / "backups").exists()


def test_an_up_to_date_database_does_not_need_alembic(database: Path) -> None:
    program = (
        "import sys, pathlib; from registry.db.schema import prepare, reading; from registry.db.catalog import Catalog\n"
        "with reading(prepare(sys.argv[1], pathlib.Path('b'))) as session: print(Catalog(session).checkpoints.count())\n"
        "print(sorted({'alembic', 'torch', 'fsspec'} & set(sys.modules)))"
    )
    assert run(program, f"sqlite:///{database}").communicate() == ("0\n[]\n", "")


def test_a_newer_database_is_refused(database: Path, tmp_path: Path) -> None:
    set_revision(database, "0999")
    for opened in (prepare, upgrade):
        with pytest.raises(DatabaseVersion, match="newer than this package: upgrade ckpt-registry"):
            opened(f"sqlite:///{database}", tmp_path / "backups")


def test_a_database_of_something_else_is_refused(database: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("DROP TABLE alembic_version")
    with pytest.raises(DatabaseVersion, match="not a database of this package"):
        prepare(f"sqlite:///{database}", tmp_path / "backups")


def test_an_older_database_is_copied_before_the_upgrade(database: Path, tmp_path: Path) -> None:
    set_revision(database, "0000")  # a revision that the migrations do not know: the upgrade itself must fail
    with pytest.raises(DatabaseVersion, match="cannot be upgraded"):
        upgrade(f"sqlite:///{database}", tmp_path / "backups")
    (copy,) = (tmp_path / "backups").iterdir()
    assert copy.name.startswith("ckpt-0000-2")


def test_a_backup_holds_what_is_committed(database: Path, sqlite: Engine, tmp_path: Path) -> None:
    with writing(sqlite) as session:
        Catalog(session).checkpoints.add(checkpoint())
    with writing(sqlite) as session:
        Catalog(session).checkpoints.add(checkpoint(version=2))
        copy = back_up(database, tmp_path / "backups", "0001", NOON)
    assert copy.name == "ckpt-0001-20250301T120000.000000Z.db"
    assert list(copy.parent.glob("*.partial")) == []
    copied = open_engine(f"sqlite:///{copy}")
    with reading(copied) as session:
        assert Catalog(session).checkpoints.count() == 1
    copied.dispose()


def test_a_backup_that_cannot_be_written(database: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed):
        back_up(database, tmp_path / "file" / "backups", "0001", NOON)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "ckpt.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(CorruptFile):
        prepare(f"sqlite:///{tmp_path / 'ckpt.db'}", tmp_path / "backups")


def test_a_place_that_cannot_hold_a_database(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed):
        prepare(f"sqlite:///{tmp_path / 'file' / 'ckpt.db'}", tmp_path / "backups")
    with pytest.raises(StorageFailed):
        prepare(f"sqlite:///{tmp_path}", tmp_path / "backups")


@pytest.mark.parametrize("url", ["no url", "oracle+nothing://x", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_cannot_be_used(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting):
        prepare(url, tmp_path / "backups")


def test_a_full_disk(sqlite: Engine) -> None:
    @event.listens_for(sqlite, "connect")
    def _forbid_growth(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # never less than there are

    large = checkpoint(tags={f"key-{i}": "x" * 20_000 for i in range(10)})
    with pytest.raises(StorageFailed, match="full"), writing(sqlite) as session:
        Catalog(session).checkpoints.add(large)


def test_an_error_leaves_nothing_behind(engine: Engine) -> None:
    def fail(session: Session) -> None:
        Catalog(session).checkpoints.add(checkpoint())
        raise KeyError

    with pytest.raises(KeyError), writing(engine) as session:
        fail(session)
    with reading(engine) as session:
        assert Catalog(session).checkpoints.count() == 0
        Catalog(session).checkpoints.add(checkpoint())
    with reading(engine) as session:
        assert Catalog(session).checkpoints.count() == 0


def test_broken_rules_are_told_by_name(engine: Engine) -> None:
    with writing(engine) as session:
        added = Catalog(session).checkpoints.add(checkpoint())
    with pytest.raises(NameTaken, match="checkpoints_adapter_id_digest"), writing(engine) as session:
        Catalog(session).checkpoints.add(checkpoint())
    note = Note(text="x" * 20_001, author="ada", created_at=NOON)
    with pytest.raises(InvalidInput, match="notes_text_length"), writing(engine) as session:
        Catalog(session).checkpoints.add_note(added, note)
    with pytest.raises(InUse), writing(engine) as session:
        session.execute(text("DELETE FROM bases"))
    with pytest.raises(Conflict), writing(engine) as session:
        session.execute(text("UPDATE checkpoints SET run = NULL"))


def test_naive_times_are_refused(engine: Engine) -> None:
    naive = datetime(2025, 3, 1)  # noqa: DTZ001 - the point
    with pytest.raises(Exception, match="without its zone"), writing(engine) as session:
        Catalog(session).checkpoints.add(checkpoint(created_at=naive))


def test_a_lock_held_for_too_long(database: Path, sqlite: Engine) -> None:
    @event.listens_for(sqlite, "connect")
    def _be_impatient(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA busy_timeout = 50")

    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Conflict, match="locked"), writing(sqlite):
            pass


def test_a_lock_held_for_too_long_by_another_server_process(
    postgresql: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "BUSY_TIMEOUT_SECONDS", 0.05)
    with writing(postgresql), pytest.raises(Conflict, match="locked"), writing(postgresql):
        pass


def test_a_reader_sees_one_state(engine: Engine) -> None:
    with reading(engine) as session:
        assert Catalog(session).checkpoints.count() == 0
        with writing(engine) as other:
            Catalog(other).checkpoints.add(checkpoint())
        assert Catalog(session).checkpoints.all() == []
    with reading(engine) as session:
        assert Catalog(session).checkpoints.count() == 1


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    (port,) = servers.free_ports(1)
    with pytest.raises(StorageFailed):
        prepare(f"postgresql://postgres@127.0.0.1:{port}/ckpt", tmp_path / "backups")


def test_writers_wait_and_readers_do_not(engine: Engine, url: str) -> None:
    program = (
        "import sys; from registry.db.schema import open_engine, writing; from registry.db.tables import BlobRow\n"
        "engine = open_engine(sys.argv[1])\n"
        "with writing(engine) as session:\n"
        "    session.add(BlobRow(digest='0' * 64, sha256='', size_bytes=1)); session.flush()\n"
        "    print('written', flush=True); sys.stdin.readline()\n"
        "engine.dispose()"
    )
    other = run(program, url)
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "written\n"
    with reading(engine) as session:
        assert Catalog(session).needs.unneeded() == {}
    other.stdin.write("go on\n")
    other.stdin.flush()
    with writing(engine) as session:
        assert len(Catalog(session).needs.unneeded()) == 1
    assert other.communicate() == ("", "")


def stand_still(session: Session, engine: Engine) -> None:
    """Until the server has ended the session."""
    mine = {"pid": session.scalar(text("SELECT pg_backend_pid()"))}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
        while watching.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), mine):
            time.sleep(0.05)


def test_a_writer_that_stands_still_does_not_keep_others_waiting_for_ever(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.db.schema.LONGEST_PAUSE_SECONDS", 1)
    engine = open_engine(postgres_url)
    with pytest.raises(Conflict, match="stood still"), writing(engine) as session:
        stand_still(session, engine)
    with writing(engine) as session:
        assert session.scalar(text("SELECT 1")) == 1
    engine.dispose()
