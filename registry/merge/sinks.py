"""Where a merge is written to: the store, a folder of this machine, or a folder behind a URL.

The files of a merge are written one after the other, each from its start to its end. Until `publish`, nothing stands where it was asked for:
a local folder is made beside it under a name that ends in `.partial`; behind a URL `merge.json` comes last and marks the whole as complete;
in the store, blobs have no owner before the registry gives them one.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, cast, final

from blake3 import blake3

from registry.disk import DurableFile, Translating, sync_folder
from registry.errors import Conflict, DamagedBlob, StorageFailed
from registry.locations import Origin, local_folder, open_filesystem
from registry.manifest import FileEntry
from registry.objects import Upload
from registry.refs import Digest
from registry.store import Store, remote_files

BLOCK_BYTES = 4 << 20


class SinkWriter(Protocol):
    """One file being written."""

    def write(self, data: bytes | memoryview, origin: Origin | None = None) -> None:
        """Append. A memory view may be reused afterwards. `origin`: where an S3 store has the same bytes, if it does."""

    def commit(self) -> FileEntry:
        """The file is complete; make it durable."""

    def cancel(self) -> None:
        """Drop it. Harmless at any time, also after `commit`."""


class Sink(Protocol):
    """A place for the files of one merge."""

    @property
    def url(self) -> str:
        """Where it is, empty for the store."""

    def prepare(self, size_bytes: int) -> None:
        """Make sure, before anything is computed, that it can be written.

        Raises:
            Conflict: something else is there.
            StorageFailed: no room, or no permission.
        """

    def holds(self, entry: FileEntry) -> bool:
        """Whether a file of an earlier try is there, complete and intact."""

    def create(self, path: str, size_bytes: int) -> SinkWriter:
        """Start a file of a known size."""

    def publish(self) -> None:
        """All files are written: make them visible, at once."""

    def discard(self) -> None:
        """Remove what was written and is not published."""


def open_sink(out: str | None, store: Store) -> Sink:
    """The store when `out` is None, else a path or fsspec URL."""
    if out is None:
        return StoreSink(store)
    folder = local_folder(out)
    return FolderSink(folder) if folder is not None else RemoteSink(out)


@final
class StoreSink:
    """The registry's own store."""

    url = ""

    def __init__(self, store: Store) -> None:
        self._store = store

    def prepare(self, size_bytes: int) -> None:
        folder = local_folder(self._store.url)
        if folder is not None:
            _check_room(folder, size_bytes)

    def holds(self, entry: FileEntry) -> bool:
        with suppress(DamagedBlob):
            self._store.verify(entry.digest)
            return True
        return False

    def create(self, path: str, size_bytes: int) -> SinkWriter:
        return _StoreWriter(self._store, path, size_bytes)

    def publish(self) -> None:
        """Blobs are published when the registry records them."""

    def discard(self) -> None:
        """Blobs nobody refers to are swept."""


@final
class _StoreWriter:
    def __init__(self, store: Store, path: str, size_bytes: int) -> None:
        self._path, self._writer = path, store.create(size_bytes=size_bytes)

    def write(self, data: bytes | memoryview, origin: Origin | None = None) -> None:
        self._writer.write(data, origin)

    def commit(self) -> FileEntry:
        blob = self._writer.commit()
        return FileEntry(path=self._path, size_bytes=blob.size_bytes, digest=blob.digest)

    def cancel(self) -> None:
        self._writer.cancel()


@final
class FolderSink:
    """A folder of this machine: complete under its name, or not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._target = folder.resolve()
        self._partial = self._target.with_name(f"{self._target.name}.partial")
        self._files: set[Path] = set()

    @property
    def url(self) -> str:
        return str(self._folder)

    def prepare(self, size_bytes: int) -> None:
        with Translating(self.url):
            if self._target.exists() and (not self._target.is_dir() or any(self._target.iterdir())):
                raise Conflict(self.url, "something is there already")
            if self._target.is_mount():
                raise Conflict(self.url, "a mounted file system cannot be replaced: name a folder inside it")
            have = sum(file.stat().st_size for file in self._partial.rglob("*") if file.is_file())
            _check_room(self._target.parent, size_bytes - have)
            self._partial.mkdir(parents=True, exist_ok=True)

    def holds(self, entry: FileEntry) -> bool:
        path = self._partial / entry.path
        with Translating(self.url), suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size == entry.size_bytes and digest_of_stream(file) == entry.digest:
                self._files.add(path)
                return True
        return False

    def create(self, path: str, size_bytes: int) -> SinkWriter:
        del size_bytes
        self._files.add(self._partial / path)
        return _FolderWriter(self._partial / path, path)

    def publish(self) -> None:
        with Translating(self.url):
            self._remove_strangers()
            for folder in [path for path in self._partial.rglob("*") if path.is_dir()] + [self._partial]:
                sync_folder(folder)
            self._partial.replace(self._target)
            sync_folder(self._target.parent)

    def _remove_strangers(self) -> None:
        """Files that an unfinished merge of another recipe left here must not be published with this one's."""
        for path in self._partial.rglob("*"):
            if not path.is_dir() and path not in self._files:
                path.unlink()

    def discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


@final
class _FolderWriter:
    def __init__(self, target: Path, path: str) -> None:
        self._target, self._path, self._url = target, path, str(target)
        self._hasher, self._size = blake3(), 0
        with Translating(self._url):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file: DurableFile | None = DurableFile(target)

    def write(self, data: bytes | memoryview, origin: Origin | None = None) -> None:
        del origin
        view = memoryview(data).cast("B")
        with Translating(self._url):
            cast("DurableFile", self._file).write(view)
        self._hasher.update(view)
        self._size += len(view)

    def commit(self) -> FileEntry:
        with Translating(self._url):
            file = cast("DurableFile", self._file)
            file.sync()
            file.close()
            self._file = None
        return FileEntry(path=self._path, size_bytes=self._size, digest=Digest(self._hasher.hexdigest()))

    def cancel(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._target.unlink(missing_ok=True)


@final
class RemoteSink:
    """A folder behind an fsspec URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._system, self._root = open_filesystem(self._url)
        self._place = remote_files(self._url)
        self._files: set[str] = set()

    @property
    def url(self) -> str:
        return self._url

    def prepare(self, size_bytes: int) -> None:
        del size_bytes  # object stores do not say how much room they have
        with Translating(self._url):
            self._system.invalidate_cache()  # what was there when this process last looked does not count
            if self._system.exists(f"{self._root}/merge.json"):
                raise Conflict(self._url, "a merged model is there already")

    def holds(self, entry: FileEntry) -> bool:
        path = f"{self._root}/{entry.path}"
        with Translating(self._url), suppress(FileNotFoundError):
            self._system.invalidate_cache()
            if int(self._system.info(path)["size"]) == entry.size_bytes:
                with self._system.open(path, "rb", block_size=4 * BLOCK_BYTES) as file:
                    if digest_of_stream(file) == entry.digest:
                        self._files.add(path)
                        return True
        return False

    def create(self, path: str, size_bytes: int) -> SinkWriter:
        self._files.add(f"{self._root}/{path}")
        with Translating(self._url):
            return _RemoteWriter(self._place.replace(path, size_bytes), path, self._url)

    def publish(self) -> None:
        """`merge.json`, the last file, has done it."""

    def discard(self) -> None:
        for path in self._files:  # and no others: the place may have been in use before
            with Translating(self._url), suppress(FileNotFoundError):
                self._system.rm_file(path)


@final
class _RemoteWriter:
    def __init__(self, upload: Upload, path: str, url: str) -> None:
        self._upload, self._path, self._url = upload, path, url
        self._hasher, self._size = blake3(), 0

    def write(self, data: bytes | memoryview, origin: Origin | None = None) -> None:
        view = memoryview(data).cast("B")
        with Translating(self._url):
            self._upload.write(view, origin)
        self._hasher.update(view)
        self._size += len(view)

    def commit(self) -> FileEntry:
        with Translating(self._url):
            self._upload.publish(self._path, self._size)
        return FileEntry(path=self._path, size_bytes=self._size, digest=Digest(self._hasher.hexdigest()))

    def cancel(self) -> None:
        with suppress(StorageFailed), Translating(self._url):
            self._upload.cancel()


def digest_of_stream(file: IO[bytes]) -> Digest:
    """BLAKE3 of the rest of a file, in blocks."""
    hasher, buffer = blake3(), memoryview(bytearray(BLOCK_BYTES))
    while count := cast("Any", file).readinto(buffer):
        hasher.update(buffer[:count])
    return Digest(hasher.hexdigest())


def _check_room(folder: Path, size_bytes: int) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise StorageFailed(str(folder), f"no space left on device: {size_bytes:,} bytes needed, {free:,} free")
