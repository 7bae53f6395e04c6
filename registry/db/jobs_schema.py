"""The job engine's own tables, in a schema of its own within the registry's database."""

from __future__ import annotations

from pathlib import Path

from registry.db.tasks import SCHEMA
from registry.errors import MissingPackage

_LOCK = 0x6A6F6273  # "jobs": a key for PostgreSQL's advisory locks


def apply(url: str) -> None:
    """Create procrastinate's tables in a PostgreSQL database, or bring them up to the installed version. Harmless when they are.

    Args:
        url: as libpq takes it, `postgresql://…`.

    Raises:
        MissingPackage: procrastinate is not installed.
    """
    try:
        import psycopg  # noqa: PLC0415 - an embedded registry has neither
        from procrastinate.schema import SchemaManager  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackage("procrastinate", "postgres") from error
    steps = sorted(path.name for path in Path(SchemaManager.get_migrations_path()).glob("*.sql"))
    with psycopg.connect(url) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")  # a constant
        connection.execute(f"SET LOCAL search_path TO {SCHEMA}")
        connection.execute("CREATE TABLE IF NOT EXISTS ckpt_steps (name text PRIMARY KEY)")
        done = {name for (name,) in connection.execute("SELECT name FROM ckpt_steps").fetchall()}
        if not done:
            connection.execute(SchemaManager.get_schema().encode())
        else:
            for name in steps:
                if name not in done:
                    connection.execute((Path(SchemaManager.get_migrations_path()) / name).read_bytes())
        connection.cursor().executemany(
            "INSERT INTO ckpt_steps (name) VALUES (%s) ON CONFLICT DO NOTHING", [(name,) for name in steps]
        )
