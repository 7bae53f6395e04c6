"""`ckpt db`: the database that this machine works with, and moving a registry to another one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote

import typer

from cli import output
from cli.options import Json
from registry import Settings
from registry.errors import InvalidInput, InvalidSetting

if TYPE_CHECKING:
    from registry.copying import Copied, Place

db_app = typer.Typer(no_args_is_help=True, help="The database.")

_Database = Annotated[str, typer.Argument(metavar="URL", help="Default: the one in CKPT_DATABASE_URL, or the home's.")]
_StoreUrl = Annotated[str, typer.Option(metavar="URL", help="Its store. Default: `store` beside an SQLite database.")]


def _database(url: str) -> str:
    """The database that is meant."""
    settings = Settings.from_environment(os.environ)
    if settings.server and not url:
        raise InvalidSetting("server", settings.server, "its database is seen to where it runs; or name one here")
    return url or settings.database_url


@db_app.command("upgrade")
def db_upgrade(url: _Database = "") -> None:
    """Bring the database to this version's tables. SQLite's is upgraded by itself, after a backup; others only here."""
    from registry.db.schema import upgrade  # noqa: PLC0415 - the help need not wait for SQLAlchemy

    upgrade(_database(url), Settings.from_environment(os.environ).home / "backups")
    output.print_line("the database is up to date")


@db_app.command("current")
def db_current(url: _Database = "", json: Json = False) -> None:
    """Show the revision of the database's tables, and the one that this version works with."""
    from registry.db.schema import HEAD_REVISION, found_revision  # noqa: PLC0415 - as above

    found = found_revision(_database(url))
    if json:
        output.print_json({"database": found or None, "package": HEAD_REVISION})
    else:
        output.print_line(f"{found or 'no tables yet'}, this version works with {HEAD_REVISION}")


@db_app.command("check")
def db_check(url: _Database = "") -> None:
    """See that the database's tables are those of this version; else exit with 5 and say what to do."""
    from registry.db.schema import check_revision  # noqa: PLC0415 - as above

    check_revision(_database(url))
    output.print_line("the database is up to date")


@db_app.command("copy")
def db_copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The database to copy, as a URL.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="An empty database, as a URL.")],
    from_store: _StoreUrl = "",
    to_store: _StoreUrl = "",
    json: Json = False,
) -> None:
    """Copy a registry with its files to another database and store. Run again, it goes on where it was."""
    from registry.copying import copy  # noqa: PLC0415 - as above

    backups = Settings.from_environment(os.environ).home / "backups"
    places = _place(source, from_store, "--from-store"), _place(target, to_store, "--to-store")
    with output.progress() as tell:
        copied = copy(*places, backups, tell)
    if json:
        output.print_json({name: getattr(copied, name) for name in type(copied).__slots__})
    else:
        _print(copied)


def _place(database_url: str, store_url: str, option: str) -> Place:
    from registry.copying import Place  # noqa: PLC0415 - as above

    if not store_url and not database_url.startswith("sqlite:///"):
        raise InvalidInput(option, "", "say where its files are, as a URL")
    beside = Path(unquote(database_url.removeprefix("sqlite:///"))).absolute().parent / "store"
    return Place(database_url=database_url, store_url=store_url or beside.as_uri())


def _print(copied: Copied) -> None:
    written = f"{copied.written} of them written now, {output.size(copied.written_bytes)}"
    output.print_line(f"copied {sum(copied.rows.values())} rows and {copied.blobs} files, {written}")
    for name, url in copied.elsewhere.items():
        output.say(
            f"[yellow]![/yellow] {output.plain(name)} is still at {output.plain(url)}: `ckpt base add PATH --copy`"
        )
