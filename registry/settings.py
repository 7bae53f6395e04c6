"""Settings: read once, frozen, passed down. Nothing else looks at the environment."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import platformdirs

from registry.errors import InvalidSetting

_KEYS = ("database_url", "store", "user", "server", "webhook_allow", "cache_bytes")
CACHE_BYTES = 256 << 20
SETTINGS_FILE, CREDENTIALS_FILE = "config.toml", "credentials.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where things are and who is asking.

    `home` holds the database, the store, caches and the journals of running merges. `database_url` and `store_url` default to places
    inside it. `author` signs what is recorded. `hub_cache` is where the Hugging Face Hub's client keeps what it downloaded. `server` is the
    URL of a server that has the registry, empty when this process opens it itself; `token` is what it wants to see. `webhook_allow` are hosts
    and networks that webhooks may reach although they are not on the Internet. `cache_bytes` is the memory for blocks of merged models that are
    computed while they are read. `origins` tells of each setting where it was found.
    """

    home: Path
    database_url: str
    store_url: str
    author: str
    hub_cache: Path
    server: str = ""
    token: str = field(default="", repr=False)
    webhook_allow: tuple[str, ...] = ()
    cache_bytes: int = CACHE_BYTES
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_shared(self) -> bool:
        """Whether the database is a server's, so that several machines work with it and merges are workers' business."""
        return not self.database_url.startswith("sqlite")

    @property
    def address(self) -> str:
        """Which registry this is: the URL of its server or database, without passwords and options."""
        url = self.server or self.database_url
        parts, host = urlsplit(url), urlsplit(url).hostname
        if not host:
            return url
        return urlunsplit(parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host, query=""))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read `CKPT_HOME`, `CKPT_DATABASE_URL`, `CKPT_STORE`, `CKPT_USER`, `CKPT_SERVER`, `CKPT_WEBHOOK_ALLOW`, `CKPT_CACHE_BYTES`;
        then `config.toml` for what is unset, which lies in the home.

        The token is `CKPT_TOKEN`, or what `ckpt login` kept for the server. A database in the environment goes before a server in the file.
        Where the Hub's client keeps its files is read as that client does (`HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`).

        Raises:
            InvalidSetting: the file is not TOML, or has a key that means nothing; or a number is none.
        """
        place = environment.get("CKPT_HOME") or platformdirs.user_data_path("ckpt", appauthor=False)
        home = Path(os.path.abspath(os.path.expanduser(place)))
        file = _read_file(home / SETTINGS_FILE)

        def choose(key: str, default: str) -> str:
            return environment.get(f"CKPT_{key.upper()}") or file.get(key) or default

        def origin(key: str) -> str:
            if environment.get(f"CKPT_{key.upper()}"):
                return f"CKPT_{key.upper()}"
            return "config.toml" if file.get(key) else "default"

        server = "" if environment.get("CKPT_DATABASE_URL") else choose("server", "")
        server = (environment.get("CKPT_SERVER") or server).rstrip("/")
        return cls(
            home=home,
            database_url=choose("database_url", f"sqlite:///{quote(str(home / 'ckpt.db'))}"),
            store_url=_store_url(choose("store", (home / "store").as_uri())),
            author=choose("user", "") or _login_name(),
            hub_cache=_hub_cache(environment),
            server=server,
            token=environment.get("CKPT_TOKEN") or (_kept_token(home, server) if server else ""),
            origins={key: origin(key) for key in ("home", *_KEYS)},
            cache_bytes=_number("cache_bytes", choose("cache_bytes", str(CACHE_BYTES))),
            webhook_allow=tuple(part.strip() for part in choose("webhook_allow", "").split(",") if part.strip()),
        )


def _store_url(text: str) -> str:
    scheme, is_url, place = text.partition("://")
    if is_url and scheme in ("s3", "s3a") and not place.strip("/"):
        raise InvalidSetting("store", text, f"expected a bucket: {scheme}://BUCKET or {scheme}://BUCKET/FOLDER")
    return text


def _number(key: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise InvalidSetting(key, text, "expected a whole number")
    return int(text)


def _kept_token(home: Path, server: str) -> str:
    """What `ckpt login` wrote down for a server; empty when it did not."""
    try:
        found = json.loads((home / CREDENTIALS_FILE).read_bytes())
        return str(found[server]) if server in found else ""
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError) as error:
        raise InvalidSetting(CREDENTIALS_FILE, str(home / CREDENTIALS_FILE), str(error)) from error


def _read_file(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
        import tomllib  # noqa: PLC0415 - most homes have no such file

        found: dict[str, Any] = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError) as error:
        raise InvalidSetting(SETTINGS_FILE, str(path), str(error)) from error
    for key, value in found.items():
        if key not in _KEYS or not isinstance(value, str):
            raise InvalidSetting(SETTINGS_FILE, key, f"expected text for one of {', '.join(_KEYS)}")
    return found


def _hub_cache(environment: Mapping[str, str]) -> Path:
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{caches}/huggingface"
    return Path(os.path.expanduser(environment.get("HF_HUB_CACHE") or f"{home}/hub"))


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no entry for this user id, as in many containers
        return "unknown"
