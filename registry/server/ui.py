"""The pages for the owner of a machine: on a free port of its own, let in with a key that is good once."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from registry.disk import Translating
from registry.errors import InvalidInput
from registry.server.app import Listening, create_app, serving
from registry.server.boundary import log_as_json
from registry.settings import Settings

_HOST = "127.0.0.1"
# Pages that wait for news hold their connections; nobody else is connected who could be cut off.
_GRACE_SECONDS = 1


def show(settings: Settings, port: int, told: Callable[[str, Path], None]) -> None:
    """Serve the pages until interrupted. Nobody but whoever has the key is let in, not even from this machine.

    Args:
        settings: of the registry.
        port: where to listen; 0 for one that is free.
        told: gets the address with the key, and a file that only the owner can read and that leads a browser there.

    Raises:
        InvalidInput: the port is taken.
        StorageFailed: the home does not take the file.
    """
    log_as_json({"ckpt": logging.WARNING, "uvicorn": logging.WARNING})
    with _listening(port) as listener:
        app = create_app(settings, Listening(is_private=True))
        running = serving(app, _HOST, port)
        running.config.timeout_graceful_shutdown = _GRACE_SECONDS
        url = f"http://{_HOST}:{listener.getsockname()[1]}/sign-in?key={quote(app.state.sign_ins.invite())}"
        with _leading_to(url, settings.home) as page, suppress(KeyboardInterrupt):
            told(url, page)
            running.run([listener])


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """A socket that takes connections already, so that a browser may come before the server is ready."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_HOST, port))
        except OSError as error:
            raise InvalidInput("port", port, f"cannot listen there: {error.strerror}") from error
        listener.listen()
        yield listener


@contextmanager
def _leading_to(url: str, home: Path) -> Iterator[Path]:
    """A page that sends a browser on. What a browser is started with can be seen by everybody on a machine; this file cannot."""
    with Translating(str(home)):
        home.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="ui-", suffix=".html", dir=home)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(
                f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url={url}"><title>ckpt</title>\n'
            )
    try:
        yield Path(name)
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()
