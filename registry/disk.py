"""Files that outlast a power cut, and the errors of the system and of object stores' clients in the registry's words."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, final

from registry.errors import Conflict, RegistryError, StorageFailed

EARLY_BYTES = 8 << 20
# The errors of object stores' clients are known by their package: importing those to name the classes would cost every start-up.
_CLIENTS = frozenset(["botocore", "aiohttp", "gcsfs", "azure"])


@final
class Translating:
    """A context that turns what the system or a client raises into `StorageFailed`, or into `missing` where something is not there."""

    def __init__(self, url: str, missing: RegistryError | None = None) -> None:
        self._url, self._missing = url, missing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._missing is not None and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise self._missing from error
        is_client = type(error).__module__.partition(".")[0] in _CLIENTS
        if isinstance(error, (OSError, NotImplementedError)) or is_client:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StorageFailed(self._url, reason[:1].lower() + reason[1:]) from error


def sync(file: IO[bytes]) -> None:
    """Make what was written to a file durable."""
    file.flush()
    os.fsync(file.fileno())


@final
class DurableFile:
    """A new file that is written from start to end. While more is being written, what is there already goes to the disk.

    So the disk works all the time, and little is left for `sync`.
    """

    def __init__(self, path: Path, mode: str = "wb") -> None:
        self._file: IO[bytes] = path.open(mode, buffering=0)
        self._written = self._sent = 0

    def write(self, data: memoryview) -> None:
        """Append bytes. They may be reused afterwards."""
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])
        self._written += len(data)
        if self._written - self._sent >= EARLY_BYTES and hasattr(os, "posix_fadvise"):
            # Linux starts to write back what it is told will not be needed, and drops only what is on the disk by then.
            os.posix_fadvise(self._file.fileno(), self._sent, self._written - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self._written

    def sync(self) -> None:
        """Make all that was written durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close it. Harmless at any time."""
        self._file.close()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make a folder and its missing parents, durably."""
    if not folder.is_dir():
        make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write files into, that appears under its name when the block has ended well; else nothing is left of it.

    Args:
        target: a path that is free, or an empty folder.

    Raises:
        Conflict: something is there already.
        StorageFailed: the disk does not take it.
    """
    target = Path(os.path.abspath(target))
    check_free(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with Translating(str(target)):
            partial.mkdir(parents=True)
        yield partial
        publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(target: Path) -> None:
    """See that a folder can appear there.

    Raises:
        Conflict: something is there already.
    """
    with Translating(str(target)):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise Conflict(str(target), "something is there already")


def publish(partial: Path, target: Path) -> None:
    """Let a folder that is complete appear under its name, durably.

    Raises:
        StorageFailed: the disk does not take it.
    """
    with Translating(str(target)):
        for folder in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
            sync_folder(folder)
        partial.replace(target)
        sync_folder(target.parent)


@contextmanager
def passing(parent: Path) -> Iterator[Path]:
    """A folder to write files into, that is gone when the block has ended."""
    with Translating(str(parent)):
        make_folders(parent)
        folder = tempfile.mkdtemp(dir=parent)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
