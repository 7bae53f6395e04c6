"""`ckpt login`, `logout`: which server the commands go to, and the token they show there."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from getpass import getpass
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from cli import output
from registry import connect
from registry.errors import InvalidInput
from registry.settings import Settings

if TYPE_CHECKING:
    from registry.teamwork import Principal

_HERE = frozenset({"localhost", "127.0.0.1", "::1"})


def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, such as https://ckpt.example.org.")],
    token: Annotated[
        str, typer.Option(metavar="TOKEN", help="The token. Better not said here: it is asked for, or read from stdin.")
    ] = "",
) -> None:
    """Go to a server from now on: its registry, instead of one of this machine.

    The token is tried, then kept in the registry's home, where only you can read it. An admin of the server makes one with `ckpt token create`.
    """
    from registry import credentials  # noqa: PLC0415 - the help need not wait for it

    url = url.rstrip("/")
    parts = urlsplit(url)
    secret = token.strip() or _ask()
    settings = replace(Settings.from_environment(os.environ), server=url, token=secret)
    with connect(settings) as registry:
        principal = registry.authenticate(secret)
    credentials.keep(settings.home, url, secret)
    output.print_line(f"logged in at {url} as {_described(principal)}")
    if parts.scheme == "http" and parts.hostname not in _HERE:
        output.say("[yellow]![/yellow] without https, the token can be read on its way")
    if os.environ.get("CKPT_DATABASE_URL") and not os.environ.get("CKPT_SERVER"):
        output.say("[yellow]![/yellow] CKPT_DATABASE_URL is set and goes before it: unset it")


def _ask() -> str:
    secret = getpass("token: ", sys.stderr) if sys.stdin.isatty() else sys.stdin.readline()
    if not secret.strip():
        raise InvalidInput("token", "", "none was given: type it, pipe it in, or say --token")
    return secret.strip()


def _described(principal: Principal) -> str:
    where = f" in {', '.join(principal.namespaces)}" if principal.namespaces else ""
    return f"{principal.name}, {principal.role.value}{where}"


def logout(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server. Default: the one that is set.")] = "",
) -> None:
    """Forget a server and its token. The token itself stays good until `ckpt token revoke`."""
    from registry import credentials  # noqa: PLC0415 - as above

    settings = Settings.from_environment(os.environ)
    server = url.rstrip("/") or settings.server
    if not server:
        output.say("not logged in anywhere")
        return
    was_known = credentials.forget(settings.home, server)
    output.print_line(f"logged out of {server}" if was_known else f"was not logged in at {server}")
    if os.environ.get("CKPT_SERVER"):
        output.say("CKPT_SERVER is still set")
