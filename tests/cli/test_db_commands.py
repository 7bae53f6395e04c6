"""`ckpt db`: where the database is, whether it fits, and carrying a registry to another place."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import servers

from registry.db.schema import HEAD_REVISION


def set_revision(database: Path, revision: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [revision])


def test_where_the_database_is(ckpt: Any, tmp_path: Path) -> None:
    assert ckpt("db", "current").out == f"no tables yet, this version works with {HEAD_REVISION}\n"
    result = ckpt("db", "check")
    assert (result.code, "ckpt db upgrade" in result.err) == (5, True)
    assert ckpt("db", "upgrade").code == 0
    assert ckpt("db", "current", "--json").json == {"database": HEAD_REVISION, "package": HEAD_REVISION}
    assert ckpt("db", "check").code == 0
    (database,) = tmp_path.rglob("ckpt.db")
    set_revision(database, "9999")
    result = ckpt("db", "check")
    assert (result.code, "newer than this package: upgrade ckpt-registry" in result.err) == (5, True)
    assert ckpt("db", "current", "--json").json["database"] == "9999"


def test_a_server_s_database(ckpt: Any, postgres: servers.Server) -> None:
    url = servers.create_database(postgres)
    assert ckpt("db", "check", url).code == 5
    assert ckpt("db", "upgrade", url).code == 0
    assert ckpt("db", "check", url).code == 0
    servers.drop_database(url)


def test_copy(registered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (database,) = tmp_path.rglob("ckpt.db")
    source, target = f"sqlite:///{database}", f"sqlite:///{tmp_path / 'copy' / 'ckpt.db'}"
    expected = registered("list", "--json").json
    result = registered("db", "copy", source, target)
    assert result.code == 0, result.err
    assert "rows and" in result.out
    assert "is still at" in result.err
    assert registered("db", "copy", source, target, "--json").json["written"] == 0
    monkeypatch.setenv("CKPT_HOME", str(tmp_path / "copy"))
    assert registered("list", "--json").json == expected


def test_a_copy_needs_to_know_the_stores(ckpt: Any) -> None:
    result = ckpt("db", "copy", "sqlite:///a.db", "postgresql://ada:secret@127.0.0.1/ckpt")
    assert (result.code, "--to-store" in result.err, "secret" in result.err) == (2, True, False)
