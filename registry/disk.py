"""Files that outlast a power cut, and the errors of the system and of object stores' clients in the registry's words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, final

from registry.errors import RegistryError, StorageFailed

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
