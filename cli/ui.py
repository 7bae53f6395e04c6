"""`ckpt ui`: the pages of the registry, in the browser."""

from __future__ import annotations

import os
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from cli import output
from cli.options import flag
from registry.errors import MissingPackage
from registry.settings import Settings


def ui(
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="On which port. Default: one that is free.")
    ] = 0,
    no_browser: Annotated[bool, flag("--no-browser", "Only print the address.")] = False,
) -> None:
    """Look at the registry in the browser: nothing to set up, until Ctrl-C.

    The address that is printed lets one browser in, once, as you; others on this machine see nothing. With a server set, its pages are opened.
    """
    settings = Settings.from_environment(os.environ)
    if settings.server:
        output.say(f"the registry is at {output.plain(settings.server)}")
        if not no_browser:
            webbrowser.open(settings.server)
        return
    try:
        from registry.server import app as server  # noqa: PLC0415 - the help need not wait for it
        from registry.server import ui as pages  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        raise MissingPackage(error.name or "fastapi", "server") from error

    def tell(url: str, page: Path) -> None:
        output.say(f"the registry is at {output.plain(url)}")
        output.say("the address is good for one browser, within ten minutes; Ctrl-C ends it")
        if not no_browser:  # browsers take their time, or the terminal; the server does not wait for them
            threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True).start()

    for line in server.check_start(settings):
        output.say(line)
    pages.show(settings, port, tell)
    output.say("closed")
