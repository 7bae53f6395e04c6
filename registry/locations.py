"""Folders of files that are only read: a path, or any fsspec URL.

Reading at an offset is thread-safe and does not move anything, so that many threads may share one location.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, cast, final, runtime_checkable
from urllib.parse import unquote

from registry.disk import Translating
from registry.errors import CorruptFile, InvalidInput, PathNotFound, StorageFailed

MAX_FILES = 20_000
_BLOCK_BYTES = 4 << 20  # what is fetched at once of a stream; far less than the 50 MiB that s3fs takes to read a header
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(?:://|::)")
# Names that some system cannot hold, or reads as a path of its own, and bytes that are not UTF-8.
_ODD = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
_HALF = re.compile(r"[\ud800-\udfff]")
# Tries besides s3fs's own; how long an answer may take, which is long where the server copies first; connections at once.
_S3_OPTIONS = {
    "config_kwargs": {
        "retries": {"mode": "standard", "total_max_attempts": 5},
        "connect_timeout": 5,
        "read_timeout": 120,
        "max_pool_connections": 32,
    }
}
# Of a file that is passed on. Each piece costs a server a change of threads, and is held up to three times: by who reads, by who sends, by
# the socket's queue.
_PIECE_BYTES = 4 << 20
# A link to nothing or to itself, or deleted since it was listed.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of an S3 store, as it is at one time: `etag` changes with its bytes."""

    bucket: str
    key: str
    etag: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an S3 store has bytes that are also at hand."""

    source: StoredObject
    offset_bytes: int

    def after(self, count: int) -> Origin:
        """Where the bytes after so many are."""
        return Origin(self.source, self.offset_bytes + count)


@runtime_checkable
class OfObjects(Protocol):
    """A location whose files may be objects of an S3 store, which can copy them without moving their bytes to us and back."""

    def stored_object(self, path: str) -> StoredObject | None:
        """The object that has a file's bytes; None where there is none.

        Raises:
            PathNotFound: no such file.
        """


class Location(Protocol):
    """A folder of files to read. Paths are relative to it, with `/` between their parts."""

    @property
    def url(self) -> str:
        """Where it is, for people and for recording."""

    def files(self) -> Mapping[str, int]:
        """Every file below the folder and its size in bytes, in the order of paths. Hidden ones (`.cache/x`) do not count.

        Raises:
            CorruptFile: more than `MAX_FILES`, or a name that not every system can hold.
            StorageFailed: a folder cannot be read.
        """

    def identity(self, path: str) -> str:
        """Text that changes whenever the file does, without reading it."""

    def open(self, path: str) -> IO[bytes]:
        """Open a file for reading; the stream can seek.

        Raises:
            PathNotFound: no such file.
        """

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill the buffer with the file's bytes from an offset on.

        Raises:
            CorruptFile: the file ends before the buffer is full.
            PathNotFound: no such file.
        """

    def local_path(self, path: str) -> Path | None:
        """The file on this machine's file system, or None."""

    def close(self) -> None:
        """Release what reading opened. The location can be used again afterwards."""


def is_url(text: str) -> bool:
    """Whether the text is a URL other than a plain path (`C:\\x` is a path)."""
    return _URL.match(text) is not None


def local_folder(text: str) -> Path | None:
    """The absolute path that a path or `file://` URL means; None for another URL."""
    if not is_url(text):
        return Path(os.path.abspath(os.path.expanduser(text)))
    scheme, _, rest = text.partition("://")
    path = rest.removeprefix("localhost")
    return Path(unquote(path)) if scheme.lower() == "file" and path.startswith("/") else None


def open_location(text: str) -> Location:
    """The folder at a path or fsspec URL.

    Raises:
        PathNotFound: nothing there, or it is not a folder.
        InvalidInput: the path is not UTF-8.
    """
    folder = local_folder(text)
    return LocalLocation(folder) if folder is not None else RemoteLocation(text)


def pieces_of(stream: IO[bytes], url: str, start: int, end: int) -> Iterator[bytes]:
    """Bytes `start … end` of a stream, which is closed then, even when nobody reads on.

    Raises:
        StorageFailed: the place does not give them.
    """
    with stream, Translating(url):
        stream.seek(start)
        left = end - start
        while left > 0 and (piece := stream.read(min(left, _PIECE_BYTES))):
            left -= len(piece)
            yield piece


@final
class LocalLocation:
    """A folder on this machine's file system. Links to files are followed (the Hub's cache is made of them), links to folders are not."""

    def __init__(self, folder: Path) -> None:
        if _HALF.search(str(folder)):
            raise InvalidInput("path", ascii(str(folder)), "not UTF-8: rename the folder")
        if not os.path.isdir(folder):  # unlike Path.is_dir, false for a name that is too long
            raise PathNotFound(str(folder))
        self._folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return str(self._folder)

    def files(self) -> Mapping[str, int]:
        return _listing(self.url, self._walk())

    def _walk(self) -> Iterator[tuple[str, int]]:
        def fail(error: OSError) -> None:
            if error.filename == self.url or error.errno not in _GONE:
                raise error

        with _reading(self.url):
            for parent, folders, names in os.walk(self._folder, onerror=fail):
                folders[:] = (name for name in folders if not name.startswith("."))
                for name in names:
                    path = os.path.join(parent, name)
                    try:
                        status = os.stat(path)
                    except OSError as error:
                        fail(error)
                        continue
                    if stat.S_ISREG(status.st_mode):
                        yield os.path.relpath(path, self._folder).replace(os.sep, "/"), status.st_size

    def identity(self, path: str) -> str:
        with _reading(self._at(path)):
            status = os.stat(self._at(path))
        return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"

    def open(self, path: str) -> IO[bytes]:
        with _reading(self._at(path)):
            return open(self._at(path), "rb")

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        done = 0
        with _reading(self._at(path)):
            descriptor = self._descriptor(path)
            while done < len(buffer):
                read = os.preadv(descriptor, [buffer[done:]], offset_bytes + done)
                if read == 0:
                    raise CorruptFile(path, f"ends before byte {offset_bytes + len(buffer)}")
                done += read

    def _at(self, path: str) -> str:
        return str(self._folder / path)

    def _descriptor(self, path: str) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(self._at(path), os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]

    def local_path(self, path: str) -> Path | None:
        return self._folder / path

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@final
class RemoteLocation:
    """A folder behind an fsspec URL. Credentials come from the environment, as fsspec documents for each scheme."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._system, self._root = open_filesystem(self._url)
        with _reading(url):
            self._system.invalidate_cache()  # what was there when this process last looked does not count
            if not self._system.isdir(self._root):
                raise PathNotFound(url)

    @property
    def url(self) -> str:
        return self._url

    def files(self) -> Mapping[str, int]:
        start = len(self._root.rstrip("/")) + 1
        with _reading(self._url):
            self._system.invalidate_cache()
            found = self._system.find(self._root, detail=True)
        return _listing(self._url, ((name[start:], int(info["size"])) for name, info in found.items()))

    def identity(self, path: str) -> str:
        with _reading(f"{self._url}/{path}"):
            self._system.invalidate_cache()
            info = self._system.info(f"{self._root}/{path}")
        marks = [info.get(key) for key in ("ETag", "etag", "md5", "mtime", "LastModified", "created")]
        return ":".join(str(mark) for mark in [info["size"], *marks] if mark is not None)

    def open(self, path: str) -> IO[bytes]:
        with _reading(f"{self._url}/{path}"):
            return cast("IO[bytes]", self._system.open(f"{self._root}/{path}", "rb", block_size=_BLOCK_BYTES))

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        end = offset_bytes + len(buffer)
        with _reading(f"{self._url}/{path}"):
            found = self._system.cat_file(f"{self._root}/{path}", start=offset_bytes, end=end) if buffer else b""
        if len(found) != len(buffer):
            raise CorruptFile(path, f"ends before byte {end}")
        buffer[:] = found

    def local_path(self, path: str) -> Path | None:
        del path
        return None

    def stored_object(self, path: str) -> StoredObject | None:
        with _reading(f"{self._url}/{path}"):
            return find_object(self._system, f"{self._root}/{path}")

    def close(self) -> None:
        """Nothing is held open."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system for a URL, and the path inside it.

    Raises:
        StorageFailed: the scheme is unknown, its package is missing, or it does not answer.
    """
    import fsspec  # noqa: PLC0415 - listing and showing never touch a store, and start faster without it

    try:
        system, root = fsspec.core.url_to_fs(url, **(_S3_OPTIONS if is_s3(url) else {}))
    except (ImportError, ValueError, OSError) as error:
        raise StorageFailed(url, str(error)) from error
    return system, str(root)


def is_s3(url: str) -> bool:
    """Whether a URL is that of an S3 store."""
    return url.partition("://")[0].lower() in ("s3", "s3a")


def find_object(system: Any, path: str) -> StoredObject | None:
    """An object of a file system; None where that is not an S3 store.

    Raises:
        FileNotFoundError: no such object.
    """
    if not hasattr(system, "call_s3"):
        return None
    bucket, _, key = path.partition("/")
    return StoredObject(bucket, key, system.call_s3("head_object", Bucket=bucket, Key=key)["ETag"])


def status_of(error: OSError) -> int:
    """The HTTP status behind what s3fs raised; 0 where there is none."""
    response = getattr(error.__cause__, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _listing(url: str, files: Iterable[tuple[str, int]]) -> Mapping[str, int]:
    """The files of a folder in the order of paths, without hidden ones. A part `..` is hidden as well: no path leads out."""
    found: dict[str, int] = {}
    for path, size_bytes in files:
        if any(part.startswith(".") or not part for part in path.split("/")):
            continue
        if _ODD.search(path):
            raise CorruptFile(url, f"a file name that not every system can hold: {path!r}")
        found[path] = size_bytes
        if len(found) > MAX_FILES:
            raise CorruptFile(url, f"more than {MAX_FILES} files: not the folder of one model or run")
    return dict(sorted(found.items()))


def _reading(url: str) -> Translating:
    return Translating(url, missing=PathNotFound(url))
