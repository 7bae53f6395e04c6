"""Keys that have bytes: what a store wants of a disk or an object store, and any object store that fsspec reaches.

Amazon's kind of object store, which can do more than fsspec knows, has `registry.s3`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any, Protocol, final

from registry.locations import Origin, StoredObject, open_filesystem

STAGING = "staging"
_PROBES = "probe"
_PART_BYTES = 16 << 20


class OpenBlob(Protocol):
    """A blob to read from, by any number of threads."""

    size_bytes: int

    def read_into(self, offset_bytes: int, buffer: memoryview) -> int:
        """Fill a buffer; gives the count of bytes, short only where the blob ends."""

    def close(self) -> None:
        """Release it. Harmless at any time."""


class Upload(Protocol):
    """Bytes on their way to a key. It ends with `publish` or `cancel`."""

    def write(self, data: memoryview, origin: Origin | None) -> None:
        """Append bytes, which may be reused afterwards. `origin`: where an object store has them already."""

    def publish(self, key: str, size_bytes: int) -> None:
        """Put them under the key, complete and durable, unless a file of that size is there."""

    def cancel(self) -> None:
        """Drop what is not published. Harmless at any time."""


class Files(Protocol):
    """Where keys (relative paths with `/`) have bytes. Raises the errors of the operating system or the client."""

    def upload(self, key: str, size_bytes: int) -> Upload:
        """Start writing. `key` and `size_bytes` are what they will be in the end where that is known, else empty and 0."""

    def claim(self, key: str, data: bytes) -> bool:
        """Write a small file unless one is there, and tell whether there was none."""

    def open(self, key: str) -> OpenBlob:
        """Open a file for reading."""

    def size(self, key: str) -> int:
        """Size of a file, in bytes."""

    def age_seconds(self, key: str) -> float:
        """How long ago a file was written."""

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        """Every key below a folder with its size in bytes; none where the folder is missing."""

    def delete(self, key: str) -> None:
        """Remove a file; a missing one is fine."""

    def sweep_staging(self, older_than_seconds: float) -> int:
        """Remove what was last written so long ago without being published, and tell how many files that were."""

    def stored_object(self, key: str) -> StoredObject | None:
        """The file as an object that its server can copy; None elsewhere."""


def staging_key() -> str:
    """A key of one's own for what has no name yet."""
    return f"{STAGING}/{secrets.token_hex(16)}"


def probe_key() -> str:
    """A key of one's own to try something out with."""
    return f"{_PROBES}/{secrets.token_hex(16)}"


def holds(files: Files, key: str, size_bytes: int) -> bool:
    """Whether a file of that size is there."""
    with suppress(FileNotFoundError):
        return files.size(key) == size_bytes
    return False


def sweep_staged(files: Files, older_than_seconds: float) -> int:
    """Remove staged and tried files that were last written so long ago."""
    removed = 0
    for folder in (STAGING, _PROBES):
        for key, _ in files.walk(folder):
            with suppress(FileNotFoundError):  # committed or swept by another process since it was listed
                if files.age_seconds(key) >= older_than_seconds:
                    files.delete(key)
                    removed += 1
    return removed


@final
class RemoteFiles:
    """An object store as fsspec sees it: uploaded to staging, and copied to the final key by the server."""

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        system, root = open_filesystem(self._url)
        return system, root.rstrip("/")

    def at(self, key: str) -> tuple[Any, str]:
        """The file system without what it remembers (other processes write, too), and the key's path in it."""
        system, root = self._opened
        system.invalidate_cache()
        return system, f"{root}/{key}"

    def upload(self, key: str, size_bytes: int) -> Upload:
        del key, size_bytes
        return _StagedUpload(self)

    def replace(self, key: str, size_bytes: int) -> Upload:
        """Start writing a file in place of one that may be there."""
        del size_bytes
        return _PlainUpload(self, key)

    def claim(self, key: str, data: bytes) -> bool:
        system, path = self.at(key)
        try:
            system.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def open(self, key: str) -> OpenBlob:
        return RemoteBlob(*self.at(key), size_bytes=self.size(key))

    def size(self, key: str) -> int:
        system, path = self.at(key)
        return int(system.info(path)["size"])

    def age_seconds(self, key: str) -> float:
        system, path = self.at(key)
        return time.time() - float(system.modified(path).timestamp())

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        system, path = self.at(folder)
        for name, info in system.find(path, detail=True).items():
            yield folder + name[len(path) :], int(info["size"])

    def delete(self, key: str) -> None:
        system, path = self.at(key)
        with suppress(FileNotFoundError):
            system.rm_file(path)

    def sweep_staging(self, older_than_seconds: float) -> int:
        return sweep_staged(self, older_than_seconds)

    def stored_object(self, key: str) -> StoredObject | None:
        del key
        return None


@final
class _StagedUpload:
    def __init__(self, files: RemoteFiles) -> None:
        self._files, self._key = files, staging_key()
        system, path = files.at(self._key)
        self._stream = system.open(path, "wb")

    def write(self, data: memoryview, origin: Origin | None) -> None:
        del origin
        self._stream.write(data)

    def publish(self, key: str, size_bytes: int) -> None:
        self._stream.close()
        if not holds(self._files, key, size_bytes):
            system, path = self._files.at(key)
            system.cp_file(self._files.at(self._key)[1], path)

    def cancel(self) -> None:
        try:
            self._stream.close()
        finally:
            self._files.delete(self._key)


@final
class _PlainUpload:
    """Written under its key from the start: most object stores show it only when it is complete."""

    def __init__(self, files: RemoteFiles, key: str) -> None:
        self._files, self._key, self._is_open = files, key, True
        system, path = files.at(key)
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._stream = system.open(path, "wb", block_size=_PART_BYTES)

    def write(self, data: memoryview, origin: Origin | None) -> None:
        del origin
        self._stream.write(bytes(data))  # fsspec's uploads keep what they are given until a part is full

    def publish(self, key: str, size_bytes: int) -> None:
        del key, size_bytes
        self._stream.close()
        self._is_open = False

    def cancel(self) -> None:
        if self._is_open:
            self._is_open = False
            try:
                self._stream.close()
            finally:
                self._files.delete(self._key)


@final
class RemoteBlob:
    """A file of an object store, read by ranges."""

    def __init__(self, system: Any, path: str, *, size_bytes: int) -> None:
        self._system, self._path = system, path
        self.size_bytes = size_bytes

    def read_into(self, offset_bytes: int, buffer: memoryview) -> int:
        end = min(offset_bytes + len(buffer), self.size_bytes)
        if end <= offset_bytes:  # a range of nothing is an error to some servers
            return 0
        found = self._system.cat_file(self._path, start=offset_bytes, end=end)
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Nothing is held open."""
