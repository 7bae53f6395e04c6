"""`ckpt serve`: the registry for others, over HTTP."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from cli import output
from cli.options import flag
from registry.errors import InvalidSetting, MissingPackage
from registry.settings import Settings


def serve(
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="On which port.")] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name it is reached by, besides this machine's own; may be repeated. Or CKPT_ALLOWED_HOSTS.",
        ),
    ] = None,
    no_auth: Annotated[bool, flag("--no-auth", "Ask nobody for a token. Only where nobody else can reach it.")] = False,
) -> None:
    """Serve the registry over HTTP: the API at /api/v1, its description at /docs.

    Whoever asks needs a token (`ckpt token create`). Only on this machine, and as long as there is none, nobody does.
    With SQLite, merges and other work are done here, too; with PostgreSQL `ckpt worker` does them.
    """
    try:
        from registry.server import app as server  # noqa: PLC0415 - the help need not wait for it
    except ModuleNotFoundError as error:
        raise MissingPackage(error.name or "fastapi", "server") from error
    settings = Settings.from_environment(os.environ)
    if settings.server:
        raise InvalidSetting(
            "server", settings.server, "a server cannot serve another one's registry: unset CKPT_SERVER"
        )
    named = server.hosts_from(os.environ.get("CKPT_ALLOWED_HOSTS", ""))
    listening = server.Listening(host=host, hosts=(*(allow_host or ()), *named), needs_none=no_auth)
    lines = (*server.check_start(settings), *server.advice(settings, listening))
    server.check_address(host, port)
    for line in lines:
        output.say(line)
    output.say(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}, described at /docs; Ctrl-C stops it")
    server.serve(server.create_app(settings, listening), host, port)
