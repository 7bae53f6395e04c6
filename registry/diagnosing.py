"""How a registry is: its settings, database, store, clocks, versions, room and work; and what to do where something is not right.

Nothing is changed. A client of a server looks at its own machine, and asks the server for the rest.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import Forbidden, RegistryError
from registry.locations import local_folder
from registry.manifest import utc_now
from registry.settings import CREDENTIALS_FILE, Settings
from registry.wording import explain

if TYPE_CHECKING:
    from registry.workspace import Workspace

_PACKAGES = ("torch", "safetensors", "sqlalchemy", "fsspec", "s3fs", "procrastinate", "fastapi")
_LITTLE_ROOM, _NO_ROOM = 10_000_000_000, 1_000_000_000
_SLOW_SECONDS = 0.05
_SKEW = timedelta(seconds=5)
_STUCK = timedelta(minutes=5)
_OLDEST_POSTGRESQL = 15
_TRIES = 5


class Verdict(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One thing that was looked at: what was found, and what to do about it; nothing when it is fine."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def _fine(name: str, found: str) -> Diagnosis:
    return Diagnosis(name=name, verdict=Verdict.OK, found=found)


def _warning(name: str, found: str, advice: str) -> Diagnosis:
    return Diagnosis(name=name, verdict=Verdict.WARNING, found=found, advice=advice)


def _problem(name: str, found: str, advice: str) -> Diagnosis:
    return Diagnosis(name=name, verdict=Verdict.PROBLEM, found=found, advice=advice)


def diagnose(workspace: Workspace) -> list[Diagnosis]:
    """Look at everything, whatever fails on the way."""
    return [
        *diagnose_here(workspace.settings),
        *_looking("compiled kernel", _kernel),
        *_looking("database", lambda: _database(workspace)),
        *_looking("store", lambda: _store(workspace)),
    ]


def diagnose_here(settings: Settings) -> list[Diagnosis]:
    """What can be seen of this machine alone: settings, versions, room."""
    return [
        *_settings(settings),
        *_looking("home", lambda: _home(settings)),
        _fine("ckpt-registry", _package()),
        _fine("versions", ", ".join([f"Python {platform.python_version()}", *_versions()])),
    ]


def diagnose_from(settings: Settings, ask: Callable[[], Sequence[Diagnosis]]) -> list[Diagnosis]:
    """What a client sees of its own machine, and what its server says of itself when it is asked, as far as the client may know."""
    try:
        there = ask()
    except Forbidden as error:
        there = [_warning("rights", explain(error).message, "an admin is told how the server is")]
    except RegistryError as error:
        there = [_failure("connection", error)]
    return with_server(diagnose_here(settings), there)


def with_server(here: Sequence[Diagnosis], there: Sequence[Diagnosis]) -> list[Diagnosis]:
    """A client's own view joined with its server's, whose names are told apart; two versions that differ are pointed out."""
    versions = {each.found for each in (*here, *there) if each.name == "ckpt-registry"}
    joined = [*here, *(replace(each, name=f"server: {each.name}") for each in there)]
    if len(versions) > 1:
        found = " here and on the server: ".join(sorted(versions))
        joined.append(_warning("versions", found, "install the server's version of ckpt-registry"))
    return joined


def _looking(name: str, look: Callable[[], Iterable[Diagnosis]]) -> list[Diagnosis]:
    """What a look finds; that it fails is the finding where it does."""
    found: list[Diagnosis] = []
    try:
        found.extend(look())  # what was found before it failed is kept
    except RegistryError as error:
        found.append(_failure(name, error))
    return found


def _failure(name: str, error: RegistryError) -> Diagnosis:
    words = explain(error)
    return _problem(name, words.message, words.hint)


# -- this machine


def _settings(settings: Settings) -> Iterator[Diagnosis]:
    origin = settings.origins
    shown = {"home": str(settings.home), "user": settings.author}
    if settings.server:
        shown["server"] = settings.server
    else:
        shown |= {"database_url": settings.address, "store": settings.store_url}
    for key, value in shown.items():
        yield _fine(key, f"{value} ({origin[key]})" if key in origin else value)
    if origin.get("server", "").startswith("CKPT_") and origin.get("database_url", "").startswith("CKPT_"):
        yield _warning(
            "settings", "CKPT_SERVER and CKPT_DATABASE_URL are both set; the server counts", "unset one of them"
        )
    if settings.token and not settings.server:
        yield _warning("settings", "CKPT_TOKEN is set, but no server to show it to", "set CKPT_SERVER, or unset it")
    if settings.is_shared and not settings.server and local_folder(settings.store_url) is not None:
        yield _warning(
            "settings", "the database is shared, the store is a folder", "set CKPT_STORE to what all machines reach"
        )


def _home(settings: Settings) -> Iterator[Diagnosis]:
    credentials = settings.home / CREDENTIALS_FILE
    if credentials.exists() and stat.S_IMODE(credentials.stat().st_mode) & 0o077:
        yield _warning(
            "credentials", f"others can read {credentials}", f"chmod 600 {credentials}, and revoke the token"
        )
    folders = {"home": settings.home, "store": None if settings.server else local_folder(settings.store_url)}
    for name, folder in folders.items():
        if folder is not None:
            yield _room(name, folder)


def _room(name: str, folder: Path) -> Diagnosis:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return _problem(f"room of the {name}", f"{existing} cannot be written", "fix the permissions")
    free_bytes = shutil.disk_usage(existing).free
    found = f"{free_bytes / 1e9:.1f} GB free in {existing}"
    if free_bytes < _NO_ROOM:
        return _problem(f"room of the {name}", found, "free some room; `ckpt gc` removes what nothing needs")
    if free_bytes < _LITTLE_ROOM:
        return _warning(
            f"room of the {name}", found, "a merged model may not fit; `ckpt gc` removes what nothing needs"
        )
    return _fine(f"room of the {name}", found)


def _package() -> str:
    return version("ckpt-registry")


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _kernel() -> Iterator[Diagnosis]:
    from registry.merge.kernel import is_there  # noqa: PLC0415 - loads numpy, which a client does without

    if is_there():
        yield _fine("compiled kernel", "there")
    else:
        advice = "merging gives the same bytes, more slowly: install a C compiler, then ckpt-registry again"
        yield _warning("compiled kernel", "was not built", advice)


# -- the database


def _database(workspace: Workspace) -> Iterator[Diagnosis]:
    from registry.db.schema import HEAD_REVISION  # noqa: PLC0415 - a client has no database

    with workspace.reading() as catalog:
        vitals = catalog.vitals
        server, seconds = vitals.server(), _latency(vitals.now)
        yield _server(server, seconds)
        yield _fine("tables", f"revision {vitals.revision()} of {HEAD_REVISION}")
        yield _clock("clock of the database", abs(vitals.now() - utc_now()))
        backlog, now, workers = vitals.backlog(), vitals.now(), vitals.workers()
        waiting = now - backlog.oldest if backlog.oldest else timedelta(0)
        found = f"{backlog.queued} waiting, {backlog.running} running"
        if workers is not None:
            found += f", {workers} workers alive"
        if waiting > _STUCK and not (workers or backlog.running):
            yield _warning("jobs", found, "start `ckpt worker`, or with SQLite `ckpt serve`")
        else:
            yield _fine("jobs", found)
        tokens = vitals.tokens(now)
    found = f"{tokens.valid} valid, {tokens.admins} of admins, {tokens.endless} without an end"
    if tokens.valid and not tokens.admins:
        yield _warning("tokens", found, "make an admin's with `ckpt token create NAME --role admin`")
    elif tokens.endless:
        yield _warning(
            "tokens", found, "give them an end: `ckpt token create … --expires 90d`, then revoke the old ones"
        )
    else:
        yield _fine("tokens", found)


def _server(server: str, seconds: float) -> Diagnosis:
    found = f"{server}, answers in {seconds * 1000:.1f} ms"
    name, _, number = server.partition(" ")
    if name == "PostgreSQL" and int(number.partition(".")[0]) < _OLDEST_POSTGRESQL:
        return _warning("database", found, f"PostgreSQL {_OLDEST_POSTGRESQL} or newer is what is tested")
    if seconds > _SLOW_SECONDS:
        return _warning("database", found, "every command waits for some of these: move closer, or use `ckpt serve`")
    return _fine("database", found)


def _latency(ask: Callable[[], object]) -> float:
    """The median of a few, in seconds."""
    taken = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _clock(name: str, skew: timedelta) -> Diagnosis:
    found = f"{skew.total_seconds():.1f} s away from this machine's"
    if skew > _SKEW:
        return _warning(name, found, "set both by NTP: times in the history would mislead")
    return _fine(name, found)


# -- the store


def _store(workspace: Workspace) -> Iterator[Diagnosis]:
    store = workspace.store
    start = time.perf_counter()
    findings = store.probe()
    seconds = time.perf_counter() - start
    for finding in findings:
        yield _warning("store", str(finding), "see docs/storage.md")
    if not findings:
        yield _fine("store", f"takes and gives objects, probed in {seconds * 1000:.0f} ms")
