"""Folders of files that are only read: a path, or any fsspec URL.

Reading at an offset is thread-safe and does not move anything, so that many threads may share one location.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, cast, final
from urllib.parse import unquote, urlsplit

from registry.errors import CorruptFile, PathNotFound, StorageFailed

MAX_FILES = 20_000


class Location(Protocol):
    """A folder of files to read. Paths are relative to it, with `/` between their parts."""

    @property
    def url(self) -> str:
        """Where it is, for people and for recording."""

    def files(self) -> Mapping[str, int]:
        """Every file below the folder and its size in bytes, in the order of paths."""

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
    return len(urlsplit(text).scheme) > 1 and ("://" in text or "::" in text)


def local_folder(text: str) -> Path | None:
    """The absolute path that a path or `file://` URL means; None for another URL."""
    if not is_url(text):
        return Path(os.path.abspath(Path(text).expanduser()))
    parts = urlsplit(text)
    return Path(unquote(parts.path)) if parts.scheme == "file" and parts.netloc in ("", "localhost") else None


def open_location(text: str) -> Location:
    """The folder at a path or fsspec URL.

    Raises:
        PathNotFound: nothing there, or it is not a folder.
    """
    folder = local_folder(text)
    return LocalLocation(folder) if folder is not None else RemoteLocation(text)


@final
class LocalLocation:
    """A folder on this machine's file system. Links to files are followed (the Hub's cache is made of them), links to folders are not."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise PathNotFound(str(folder))
        self._folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return str(self._folder)

    def files(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for parent, folders, names in os.walk(self._folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                path = Path(parent, name)
                if not name.startswith(".") and path.is_file():
                    found[path.relative_to(self._folder).as_posix()] = path.stat().st_size
            if len(found) > MAX_FILES:
                raise CorruptFile(self.url, f"more than {MAX_FILES} files: not the folder of one model or run")
        return dict(sorted(found.items()))

    def identity(self, path: str) -> str:
        try:
            status = (self._folder / path).stat()
        except OSError as error:
            raise PathNotFound(str(self._folder / path)) from error
        return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"

    def open(self, path: str) -> IO[bytes]:
        try:
            return (self._folder / path).open("rb")
        except FileNotFoundError as error:
            raise PathNotFound(str(self._folder / path)) from error
        except OSError as error:
            raise StorageFailed(str(self._folder / path), error.strerror or str(error)) from error

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        descriptor, done = self._descriptor(path), 0
        while done < len(buffer):
            read = os.preadv(descriptor, [buffer[done:]], offset_bytes + done)
            if read == 0:
                raise CorruptFile(path, f"ends before byte {offset_bytes + len(buffer)}")
            done += read

    def _descriptor(self, path: str) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(self._folder / path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError as error:
                    raise PathNotFound(str(self._folder / path)) from error
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
        if not self._system.isdir(self._root):
            raise PathNotFound(url)

    @property
    def url(self) -> str:
        return self._url

    def files(self) -> Mapping[str, int]:
        found = self._system.find(self._root, detail=True)
        if len(found) > MAX_FILES:
            raise CorruptFile(self.url, f"more than {MAX_FILES} files: not the folder of one model or run")
        start = len(self._root.rstrip("/")) + 1
        return {name[start:]: int(info["size"]) for name, info in sorted(found.items())}

    def identity(self, path: str) -> str:
        info = self._info(path)
        marks = [info.get(key) for key in ("ETag", "etag", "md5", "mtime", "LastModified", "created")]
        return ":".join(str(mark) for mark in [info["size"], *marks] if mark is not None)

    def _info(self, path: str) -> Mapping[str, Any]:
        try:
            return cast("Mapping[str, Any]", self._system.info(f"{self._root}/{path}"))
        except FileNotFoundError as error:
            raise PathNotFound(f"{self._url}/{path}") from error

    def open(self, path: str) -> IO[bytes]:
        try:
            return cast("IO[bytes]", self._system.open(f"{self._root}/{path}", "rb"))
        except FileNotFoundError as error:
            raise PathNotFound(f"{self._url}/{path}") from error

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        try:
            found = self._system.cat_file(f"{self._root}/{path}", start=offset_bytes, end=offset_bytes + len(buffer))
        except FileNotFoundError as error:
            raise PathNotFound(f"{self._url}/{path}") from error
        if len(found) != len(buffer):
            raise CorruptFile(path, f"ends before byte {offset_bytes + len(buffer)}")
        buffer[:] = found

    def local_path(self, path: str) -> Path | None:
        del path
        return None

    def close(self) -> None:
        """Nothing is held open."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system for a URL, and the path inside it.

    Raises:
        StorageFailed: the scheme is unknown, its package is missing, or it does not answer.
    """
    import fsspec  # noqa: PLC0415 - listing and showing never touch a store, and start faster without it

    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise StorageFailed(url, str(error)) from error
    return system, str(root)
