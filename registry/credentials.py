"""Which server the commands of a home go to, and the tokens they show there: `config.toml` and `credentials.json`."""

from __future__ import annotations

import json
import os
import re
import secrets
import tomllib
from pathlib import Path
from typing import Any

from registry.disk import Translating, sync, sync_folder
from registry.errors import InvalidSetting
from registry.settings import CREDENTIALS_FILE, SETTINGS_FILE

_SERVER_LINE = re.compile(r"[ \t]*server[ \t]*=.*(?:\n|\Z)")


def keep(home: Path, server: str, token: str) -> None:
    """Go to a server from now on, with a token that only the user can read.

    Raises:
        InvalidSetting: a file that is there cannot be read.
        StorageFailed: the disk does not take it.
    """
    tokens = _tokens(home)
    _write(home / CREDENTIALS_FILE, json.dumps({**tokens, server: token}, indent=2) + "\n", 0o600)
    _name_server(home, server)


def forget(home: Path, server: str) -> bool:
    """Go to that server no more, and forget its token; tells whether there was anything to forget.

    Raises:
        InvalidSetting, StorageFailed: as `keep`.
    """
    tokens = _tokens(home)
    was_known = tokens.pop(server, None) is not None
    if was_known:
        _write(home / CREDENTIALS_FILE, json.dumps(tokens, indent=2) + "\n", 0o600)
    return (_server(home) == server and _name_server(home, "")) or was_known


def _tokens(home: Path) -> dict[str, Any]:
    path = home / CREDENTIALS_FILE
    try:
        found = json.loads(_read(path) or "{}")
    except ValueError as error:
        raise InvalidSetting(CREDENTIALS_FILE, str(path), str(error)) from error
    if not isinstance(found, dict):
        raise InvalidSetting(CREDENTIALS_FILE, str(path), "expected an object")
    return found


def _server(home: Path) -> str:
    path = home / SETTINGS_FILE
    try:
        found = tomllib.loads(_read(path)).get("server", "")
    except ValueError as error:
        raise InvalidSetting(SETTINGS_FILE, str(path), str(error)) from error
    return str(found).rstrip("/")


def _name_server(home: Path, server: str) -> bool:
    """Set the line of the server, or take it away when empty; all others stay. Tells whether anything changed."""
    path = home / SETTINGS_FILE
    before = _read(path)
    others = "".join(line for line in before.splitlines(keepends=True) if not _SERVER_LINE.fullmatch(line))
    end = "" if not others or others.endswith("\n") else "\n"
    after = f"{others}{end}server = {json.dumps(server)}\n" if server else others
    if after != before:
        _write(path, after, 0o644)
    return after != before


def _read(path: Path) -> str:
    with Translating(str(path)):
        return path.read_text(encoding="utf-8") if path.exists() else ""


def _write(path: Path, text: str, mode: int) -> None:
    """Replace a file at once; nobody else can read it before it has its mode."""
    with Translating(str(path)):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(text.encode())
                sync(file)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        sync_folder(path.parent)
