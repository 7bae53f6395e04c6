"""Migrations up and down, on both databases, from one that the first release of the tables left behind."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from secrets import token_hex

import psycopg
import pytest
import servers
from alembic import command
from factories import NOON, checkpoint, digest
from sqlalchemy import Engine, text

from registry.db.catalog import Catalog
from registry.db.listing import Scope
from registry.db.schema import (
    HEAD_REVISION,
    alembic_config,
    check_revision,
    found_revision,
    open_engine,
    prepare,
    reading,
    upgrade,
    writing,
)
from registry.errors import DatabaseVersion
from registry.filters import parse_filter
from registry.refs import AdapterName, CheckpointRef

SAVED = Path(__file__).parents[1] / "data"


@pytest.fixture(params=["sqlite", "postgresql"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database with the first tables, and a little in each."""
    dump = (SAVED / f"first_tables.{request.param}.sql").read_text()
    if request.param == "sqlite":
        with closing(sqlite3.connect(tmp_path / "ckpt.db")) as connection:
            connection.executescript(dump)
        yield f"sqlite:///{tmp_path / 'ckpt.db'}"
        return
    url = servers.create_database(request.getfixturevalue("postgres"))
    with psycopg.connect(url) as connection:
        connection.execute(dump.encode())
    yield url
    servers.drop_database(url)


def migrate(url: str, revision: str) -> None:
    engine = open_engine(url)
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA foreign_keys = 0")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        command.downgrade(alembic_config(connection), revision)
        connection.commit()
    engine.dispose()


def check_all_is_there(url: str, backups: Path) -> None:
    engine = prepare(url, backups)
    with writing(engine) as session:
        catalog = Catalog(session)
        found = catalog.checkpoints.all()
        assert [each.ref for each in found] == ["support-bot@v1", "support-bot@v3", "team/bot@v1"]
        assert [each.metric("eval_loss") for each in found][::2] == [0.5, 0.25]
        assert found[1].aliases == ("candidate",)
        assert [each.environments for each in found] == [(), ("production",), ("production",)]
        assert catalog.checkpoints.adapters() == [AdapterName("", "support-bot"), AdapterName("team", "bot")]
        assert catalog.events.verify().count == 4
        assert [event.number for event in catalog.events.all("support-bot")] == [1, 2]
        for where, versions in {
            "rank = 8": [1],
            "alpha = 0.5": [1],
            "metric.eval_loss <= 0.5": [1, 1],
            "tag.score = 10": [3],
            "tag.long like 'xx%'": [1],
            "size = 1000": [1, 3, 1],
            "dtype = 'float32' and method = 'lora' and format = 'peft' and parameters = 250": [1, 3, 1],
        }.items():
            passing = catalog.checkpoints.passing(Scope(where=parse_filter(where)))
            assert [each.version for each in passing] == versions, where
        ranking = catalog.checkpoints.rank(Scope())
        assert (ranking.metric, ranking.without, ranking.groups[0].checkpoints[0].ref) == (
            "eval_loss",
            1,
            "team/bot@v1",
        )
        live = catalog.checkpoints.resolve(CheckpointRef.parse("support-bot@production"))
        new = catalog.checkpoints.add(checkpoint(digest=digest(f"new {catalog.checkpoints.count()}")))
        assert (live.version, new.version) == (3, 4)
        session.rollback()
    engine.dispose()


def test_a_database_with_the_first_tables_is_upgraded(saved: str, tmp_path: Path) -> None:
    assert found_revision(saved) == "0001"
    with pytest.raises(DatabaseVersion, match="revision 0001 is older than this package: run `ckpt db upgrade`"):
        check_revision(saved)
    upgrade(saved, tmp_path / "backups")
    check_revision(saved)
    check_all_is_there(saved, tmp_path / "backups")
    copies = list((tmp_path / "backups").glob("*"))
    assert [each.name[:10] for each in copies] == (["ckpt-0001-"] if saved.startswith("sqlite") else [])


@pytest.mark.parametrize("revision", ["0007", "0006", "0005", "0004", "0003", "0002", "0001"])
def test_down_and_up_again(saved: str, tmp_path: Path, revision: str) -> None:
    upgrade(saved, tmp_path / "backups")
    migrate(saved, revision)
    assert found_revision(saved) == revision
    upgrade(saved, tmp_path / "backups")
    check_all_is_there(saved, tmp_path / "backups")
    engine = open_engine(saved)
    with engine.connect() as connection:
        command.check(alembic_config(connection))
    engine.dispose()


def test_only_sqlite_is_upgraded_by_opening_it(saved: str, tmp_path: Path) -> None:
    if saved.startswith("sqlite"):
        prepare(saved, tmp_path / "backups").dispose()
        assert found_revision(saved) == HEAD_REVISION
    else:
        with pytest.raises(DatabaseVersion, match="ckpt db upgrade"):
            prepare(saved, tmp_path / "backups")


def test_a_database_that_is_not_there_yet(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ckpt.db'}"
    assert found_revision(url) == ""
    with pytest.raises(DatabaseVersion, match="no tables yet"):
        check_revision(url)
    assert not (tmp_path / "ckpt.db").exists()


def test_text_is_by_code_points_in_every_column(postgresql: Engine) -> None:
    columns = text(
        "SELECT table_name || '.' || column_name FROM information_schema.columns WHERE table_schema = 'public'"
        " AND data_type IN ('character varying', 'text') AND table_name <> 'alembic_version'"
        " AND collation_name IS DISTINCT FROM 'C'"
    )
    with postgresql.connect() as connection:
        assert list(connection.scalars(columns)) == []


def test_the_job_engine_has_a_schema_of_its_own(postgresql: Engine) -> None:
    with postgresql.connect() as connection:
        schemas = set(connection.scalars(text("SELECT nspname FROM pg_namespace")))
        assert "procrastinate" in schemas
        command.check(alembic_config(connection))


@pytest.fixture
def german(postgres: servers.Server, tmp_path: Path) -> Iterator[str]:
    """A database whose own order is that of a German dictionary."""
    name = f"test_{token_hex(6)}"
    admin = f"host=127.0.0.1 port={postgres.port} user=postgres dbname=postgres"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C.UTF-8'"
            " LOCALE_PROVIDER icu ICU_LOCALE 'de-DE'"
        )
    url = f"postgresql://postgres@127.0.0.1:{postgres.port}/{name}"
    upgrade(url, tmp_path / "backups")
    yield url
    servers.drop_database(url)


def test_the_order_of_a_language_makes_no_difference(german: str, make_base: Iterator[object]) -> None:
    runs = ["a", "B", "ä", "b", "A", "z", "Ä", "_"]
    engine = open_engine(german)
    with writing(engine) as session:
        catalog = Catalog(session)
        catalog.bases.add(make_base())  # type: ignore[operator]
        for run in runs:
            catalog.checkpoints.add(checkpoint(run=run, digest=digest(run), created_at=NOON))
    with reading(engine) as session:
        checkpoints = Catalog(session).checkpoints
        assert [each.run for each in checkpoints.page(Scope(), sort="run").items] == sorted(runs)
        assert [each.run for each in checkpoints.page(Scope(), sort="-run").items] == sorted(runs)[::-1]
        for where in ("run < 'a'", "run >= 'ä'", "run like 'Ä'", "run = 'ä'"):
            keep = parse_filter(where)
            found = {each.run for each in checkpoints.passing(Scope(where=keep))}
            assert found == {run for run in runs if keep.matches(checkpoint(run=run))}
    engine.dispose()


def test_down_to_nothing(saved: str, tmp_path: Path) -> None:
    upgrade(saved, tmp_path / "backups")
    migrate(saved, "base")
    assert found_revision(saved) == ""
    upgrade(saved, tmp_path / "backups")
    engine = prepare(saved, tmp_path / "backups")
    with reading(engine) as session:
        assert Catalog(session).checkpoints.count() == 0
    engine.dispose()
