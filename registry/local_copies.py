"""Copies of checkpoints and base models on this machine, for what reads a folder: one for each content, made once, and swept when they are
used no more.

A copy's lock is shared by whoever uses it, and held alone by whoever makes or sweeps it. It goes with whoever dies.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from registry.disk import Translating, appearing
from registry.manifest import BaseModel, Checkpoint
from registry.progress import Progress, silent

if TYPE_CHECKING:
    from registry.results import Repository
    from registry.service import Registry

UNUSED = timedelta(days=30)
_FOLDER = "serving"
_OURS = re.compile(r"\.?([0-9a-f]{64}|base-[0-9a-f]{40})(?:\..+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptCopies:
    """How many copies were removed, and their bytes. Of a dry run: would be."""

    copies: int = 0
    copies_bytes: int = 0


@contextmanager
def used_copy(registry: Registry, checkpoint: Checkpoint, progress: Progress = silent) -> Iterator[Path]:
    """A folder with a checkpoint's files, which no sweep takes within the block; copied and verified once, whoever asks for it.

    Raises:
        Changed: a file is not what was recorded.
        StorageFailed: the disk does not take it.
    """

    def pull(folder: Path) -> None:
        registry.pull(checkpoint, folder, progress)

    with _used(registry.settings.home / _FOLDER / checkpoint.digest.hex, pull) as folder:
        yield folder


@contextmanager
def used_copy_of_base(registry: Registry, base: BaseModel) -> Iterator[Path]:
    """A folder with a base model's files, as `used_copy`.

    Raises:
        UnknownRepository: it is not there any more.
        StorageFailed: the disk does not take it.
    """
    found = registry.repository(f"base-{base.digest.short}")
    with _used(registry.settings.home / _FOLDER / f"base-{found.commit}", partial(_fetch, registry, found)) as folder:
        yield folder


@contextmanager
def _used(folder: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    while True:
        with _locked(folder, fcntl.LOCK_SH):
            if folder.is_dir():
                with Translating(str(folder)):
                    os.utime(folder)  # not every file system tells when a file was read
                yield folder
                return
        with _locked(folder, fcntl.LOCK_EX):
            if not folder.is_dir():
                make(folder)


def _fetch(registry: Registry, found: Repository, target: Path) -> None:
    with appearing(target) as folder:
        for file in found.files:
            place = folder / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as stream:
                for piece in registry.read_file(found, file.path):
                    stream.write(piece)


def sweep_copies(home: Path, *, unused: timedelta = UNUSED, dry_run: bool = False) -> SweptCopies:
    """Remove the copies that were not used for a while; never one that is locked, or that a running program was started with.

    Args:
        home: the registry's folder on this machine.
        unused: for how long nobody has asked for it or read it.
        dry_run: change nothing, only say.

    Raises:
        StorageFailed: the disk does not allow it.
    """
    place = home / _FOLDER
    if not place.is_dir():
        return SweptCopies()
    before, started_with = time.time() - unused.total_seconds(), _command_lines()
    swept: list[int] = []
    with Translating(str(place)):
        for name in sorted({match[1] for path in place.iterdir() if (match := _OURS.fullmatch(path.name))}):
            if f"{_FOLDER}/{name}".encode() not in started_with:
                swept += _sweep(place / name, before, dry_run=dry_run)
    return SweptCopies(copies=len(swept), copies_bytes=sum(swept))


def _sweep(folder: Path, before: float, *, dry_run: bool) -> list[int]:
    """Remove a copy, and what a dead writer or sweep has left of it, if it was last used before a time; gives the bytes of each."""
    with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_alone:
        if not is_alone:
            return []
        there = [path for path in (folder, *folder.parent.glob(f".{folder.name}.*")) if path.is_dir()]
        old = [path for path in there if _last_used(path) <= before]
        sizes = [sum(file.stat().st_size for file in _files(path)) for path in old]
        if not dry_run:
            for path in old:
                # Whole under its name, or not there at all.
                shutil.rmtree(path.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")))
            if not folder.exists():
                _lock_of(folder).unlink()
        return sizes


def _last_used(folder: Path) -> float:
    """When somebody last asked for a copy or read it, in seconds since 1970."""
    read = (max(status.st_atime, status.st_mtime) for status in (file.stat() for file in _files(folder)))
    return max(folder.stat().st_mtime, *read)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _command_lines() -> bytes:
    """Those of all programs on this machine: an engine reads what it was started with again and again, and holds no lock."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found.append(path.read_bytes())
    return b"\n".join(found)


# -- locks


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Hold a copy's lock, shared or alone, among processes and threads; gives whether it is held: with `LOCK_NB` it may not be.

    Raises:
        StorageFailed: the disk does not take it.
    """
    with Translating(str(folder)):
        descriptor = _lock(_lock_of(folder), how)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: Path, how: int) -> int | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, how)
            if _is_named(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of this name: a sweep removes the lock with the copy."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
