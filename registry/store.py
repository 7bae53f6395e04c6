"""The store: blobs named by the BLAKE3 of their bytes, on this machine's disk or any object store that fsspec reaches.

Layout below the store's URL:

    blobs/ab/<64 hex>     a blob; `ab` are the first two digits of its digest
    staging/<random>      what is being written, or was when its writer died

A blob appears under its name complete or not at all, and never changes. On a disk it is written to staging, synced, renamed, and the folders
are synced; on an object store it is uploaded to staging and copied there by the server. Nothing is created before the first write.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, Self, cast, final

from blake3 import blake3

from registry.disk import DurableFile, Translating, make_folders, sync_folder
from registry.errors import Changed, Conflict, CorruptFile, DamagedBlob, PathNotFound, StorageFailed
from registry.locations import Location, local_folder, open_filesystem
from registry.manifest import FileEntry, digest_of
from registry.refs import Digest

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 4 << 20
_BLOB_KEY = re.compile(r"blobs/([0-9a-f]{2})/(\1[0-9a-f]{62})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """What was stored. `sha256` is 64 hex digits, or empty where it was not asked for."""

    digest: Digest
    sha256: str
    size_bytes: int


@final
class Store:
    """A content-addressed store at a path or fsspec URL. Opening it touches neither disk nor network; all methods are thread-safe.

    Every method raises `StorageFailed` when disk, permissions or server refuse; so does reading a stream that `open` gave.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._folder = local_folder(url)
        self._files: _Files = _RemoteFiles(self.url) if self._folder is None else _LocalFiles(self._folder)
        self._block_bytes = 8 * BLOCK_BYTES if self._folder is None else BLOCK_BYTES  # one request each

    def create(self, *, sha256: bool = False) -> BlobWriter:
        """Start a blob.

        Args:
            sha256: compute that digest too, beside BLAKE3.
        """
        return BlobWriter(self._files, self.url, sha256=sha256)

    def put_file(self, location: Location, path: str) -> Blob:
        """Copy a file of a location into the store, with both digests.

        Raises:
            Changed: the file changed while it was read.
            PathNotFound: no such file.
        """
        source = f"{location.url}/{path}"
        identity = location.identity(path)
        with self.create(sha256=True) as writer:
            with Translating(source), location.open(path) as stream:
                before = (identity, stream.seek(0, os.SEEK_END))
                stream.seek(0)
                for block in _blocks(stream, source, BLOCK_BYTES):
                    writer.write(block)
            after = (location.identity(path), writer.size_bytes)
            if after != before:
                raise Changed(source, *(f"{identity}, {size_bytes} bytes" for identity, size_bytes in (before, after)))
            return writer.commit()

    def open(self, digest: Digest) -> IO[bytes]:
        """Open a blob for reading; the stream can seek.

        Raises:
            DamagedBlob: it is missing.
        """
        with self._reading(digest):
            blob = self._files.open(_key(digest))
        return io.BufferedReader(_BlobStream(blob, self.url), BLOCK_BYTES)

    def read_into(self, digest: Digest, offset_bytes: int, buffer: memoryview) -> None:
        """Fill the buffer with a blob's bytes from an offset on.

        Raises:
            DamagedBlob: it is missing, or ends before the buffer is full.
        """
        with self._reading(digest), closing(self._files.open(_key(digest))) as blob:
            self._fill(digest, blob, offset_bytes, buffer)

    def _fill(self, digest: Digest, blob: _OpenBlob, offset_bytes: int, buffer: memoryview) -> None:
        if blob.read_into(offset_bytes, buffer) < len(buffer):
            raise self._damaged(digest, f"at least {offset_bytes + len(buffer)} bytes", f"{blob.size_bytes} bytes")

    def size(self, digest: Digest) -> int:
        """Size of a blob, in bytes.

        Raises:
            DamagedBlob: it is missing.
        """
        with self._reading(digest):
            return self._files.size(_key(digest))

    def local_path(self, digest: Digest) -> Path | None:
        """A blob as a file of this machine, to be read only; None when the store is elsewhere.

        Raises:
            DamagedBlob: it is missing.
        """
        if self._folder is None:
            return None
        self.size(digest)
        return self._folder / _key(digest)

    def verify(self, digest: Digest) -> None:
        """Read a blob whole and compare its bytes with its name.

        Raises:
            DamagedBlob: it is missing, or its bytes are others.
        """
        for _ in self._verified(digest):
            pass

    def _verified(self, digest: Digest) -> Iterator[memoryview]:
        hasher = blake3()
        with self.open(digest) as source:
            for block in _blocks(source, self.url, self._block_bytes):
                hasher.update(block)
                yield block
        if hasher.hexdigest() != digest.hex:
            raise self._damaged(digest, str(digest), f"blake3:{hasher.hexdigest()}")

    def blobs(self) -> Iterator[tuple[Digest, int]]:
        """Every blob and its size in bytes, in no particular order. Other files in the folder are not ours and left out."""
        with Translating(self.url):
            for key, size_bytes in self._files.walk("blobs"):
                if match := _BLOB_KEY.fullmatch(key):
                    yield Digest(match[2]), size_bytes

    def age(self, digest: Digest) -> timedelta:
        """How long ago a blob was last put here.

        Raises:
            DamagedBlob: it is missing.
        """
        with self._reading(digest):
            return timedelta(seconds=self._files.age_seconds(_key(digest)))

    def delete(self, digest: Digest) -> None:
        """Remove a blob; a missing one is fine."""
        with Translating(self.url):
            self._files.delete(_key(digest))

    def sweep_staging(self, older_than: timedelta) -> int:
        """Remove what dead writers left, and return how many files that were.

        Args:
            older_than: how long the last write must be past; well above the longest pause of a living writer.
        """
        removed = 0
        with Translating(self.url):
            for key, _ in self._files.walk("staging"):
                with suppress(FileNotFoundError):  # committed or swept by another process since it was listed
                    if self._files.age_seconds(key) >= older_than.total_seconds():
                        self._files.delete(key)
                        removed += 1
        return removed

    def _reading(self, digest: Digest) -> Translating:
        return Translating(self.url, missing=self._damaged(digest, str(digest), "missing"))

    def _damaged(self, digest: Digest, expected: str, found: str) -> DamagedBlob:
        return DamagedBlob(f"{self.url}/{_key(digest)}", expected, found)


@final
class BlobWriter:
    """A blob in the making. It ends with `commit` or `cancel`; leaving a `with` block cancels what was not committed.

    Whatever fails also cancels it: half a write never becomes a blob, and a failed sync is not tried again.
    """

    def __init__(self, files: _Files, url: str, *, sha256: bool) -> None:
        self._files, self._url = files, url
        self._blake3 = blake3()
        self._sha256 = hashlib.sha256() if sha256 else None
        self.size_bytes = 0
        with Translating(url):
            self._staged: _Staged | None = files.stage()

    def write(self, data: bytes | memoryview[Any]) -> None:
        """Append bytes; a memory view must be contiguous and may be reused afterwards.

        Raises:
            Conflict: the writer has ended.
            StorageFailed: the store does not take them.
        """
        staged, view = self._unfinished(), memoryview(data).cast("B")
        try:
            with Translating(self._url):
                staged.stream.write(view)
        except BaseException:
            self.cancel()
            raise
        self._blake3.update(view)
        if self._sha256 is not None:
            self._sha256.update(view)
        self.size_bytes += len(view)

    def commit(self, expected: Digest | None = None) -> Blob:
        """Publish what was written under its digest. A blob that is there already stays, unless its size shows that it is damaged.

        Args:
            expected: the digest it must have; None takes what comes.

        Raises:
            Conflict: the writer has ended.
            DamagedBlob: the bytes have another digest than the expected one.
            StorageFailed: the store does not take them.
        """
        staged, digest = self._unfinished(), Digest(self._blake3.hexdigest())
        try:
            if expected is not None and digest != expected:
                raise DamagedBlob(f"{self._url}/{_key(expected)}", str(expected), str(digest))
            with Translating(self._url):
                self._files.publish(staged, _key(digest), self.size_bytes)
        finally:
            self.cancel()
        return Blob(digest=digest, sha256=self._sha256.hexdigest() if self._sha256 else "", size_bytes=self.size_bytes)

    def cancel(self) -> None:
        """Drop what was written. Harmless at any time, also after `commit`; what the store does not let go is left to the sweep."""
        staged, self._staged = self._staged, None
        if staged is not None:
            with suppress(StorageFailed), Translating(self._url):
                try:
                    staged.stream.close()
                finally:
                    self._files.delete(staged.key)

    def _unfinished(self) -> _Staged:
        if self._staged is None:
            raise Conflict(f"a blob for {self._url}", "its writer has ended")
        return self._staged

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()


@final
class StoredFolder:
    """Files of a checkpoint or base model that lie in a store, seen as a location. A file's identity is its digest.

    Args:
        store: where the blobs are.
        files: their paths, sizes and digests.
        name: what follows `store:` in the URL; the digest of the content unless given.
    """

    def __init__(self, store: Store, files: Sequence[FileEntry], name: str = "") -> None:
        self._store = store
        self._entries = {entry.path: entry for entry in sorted(files, key=lambda entry: entry.path)}
        self._name = name or digest_of([[path, entry.digest.hex] for path, entry in self._entries.items()]).hex
        self._opened: dict[str, _OpenBlob] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"store:{self._name}"

    def files(self) -> Mapping[str, int]:
        return {path: entry.size_bytes for path, entry in self._entries.items()}

    def identity(self, path: str) -> str:
        return str(self._entry(path).digest)

    def open(self, path: str) -> IO[bytes]:
        return self._store.open(self._entry(path).digest)

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        entry = self._entry(path)
        if offset_bytes + len(buffer) > entry.size_bytes:
            raise CorruptFile(path, f"ends before byte {offset_bytes + len(buffer)}")
        with self._store._reading(entry.digest):
            self._store._fill(entry.digest, self._blob(entry), offset_bytes, buffer)

    def local_path(self, path: str) -> Path | None:
        return self._store.local_path(self._entry(path).digest)

    def close(self) -> None:
        with self._lock:
            for blob in self._opened.values():
                blob.close()
            self._opened.clear()

    def _entry(self, path: str) -> FileEntry:
        try:
            return self._entries[path]
        except KeyError:
            raise PathNotFound(f"{self.url}/{path}") from None

    def _blob(self, entry: FileEntry) -> _OpenBlob:
        with self._lock:
            if entry.path not in self._opened:
                self._opened[entry.path] = self._store._files.open(_key(entry.digest))
            return self._opened[entry.path]


def _key(digest: Digest) -> str:
    return f"blobs/{digest.hex[:2]}/{digest.hex}"


def _holds(files: _Files, key: str, size_bytes: int) -> bool:
    with suppress(FileNotFoundError):
        return files.size(key) == size_bytes
    return False


def _blocks(stream: IO[bytes], url: str, block_bytes: int) -> Iterator[memoryview]:
    """The rest of a stream in blocks that share one buffer: each is valid until the next."""
    buffer = memoryview(bytearray(block_bytes))
    source = cast("io.BufferedIOBase", stream)
    while True:
        with Translating(url):
            count = source.readinto(buffer)
        if not count:
            return
        yield buffer[:count]


class _OpenBlob(Protocol):
    """A blob to read from, by any number of threads; `read_into` gives the count of bytes, short only where the blob ends."""

    size_bytes: int

    def read_into(self, offset_bytes: int, buffer: memoryview) -> int: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Staged:
    """What is being written, and its key."""

    key: str
    stream: _Stream


class _Stream(Protocol):
    def write(self, data: memoryview, /) -> object: ...
    def close(self) -> None: ...


class _Files(Protocol):
    """Where keys (relative paths with `/`) have bytes. Raises the errors of the operating system or the client.

    `publish` puts the bytes of a staged file under a key, complete and durable, unless a file of that size is there. `walk` gives every key
    below a folder with its size in bytes, nothing for a missing folder; to `delete` a missing file is fine.
    """

    def stage(self) -> _Staged: ...
    def publish(self, staged: _Staged, key: str, size_bytes: int) -> None: ...
    def open(self, key: str) -> _OpenBlob: ...
    def size(self, key: str) -> int: ...
    def age_seconds(self, key: str) -> float: ...
    def walk(self, folder: str) -> Iterator[tuple[str, int]]: ...
    def delete(self, key: str) -> None: ...


@final
class _LocalFiles:
    def __init__(self, root: Path) -> None:
        self._root = root

    def stage(self) -> _Staged:
        key = f"staging/{secrets.token_hex(16)}"
        make_folders(self._root / "staging")
        return _Staged(key, DurableFile(self._root / key, "xb"))

    def publish(self, staged: _Staged, key: str, size_bytes: int) -> None:
        blob = self._root / key
        if not _holds(self, key, size_bytes):
            cast("DurableFile", staged.stream).sync()
            make_folders(blob.parent)
            # Another process may have published the same bytes just now; replacing them by themselves harms nobody.
            (self._root / staged.key).replace(blob)
        else:
            os.utime(blob)  # whoever sweeps must see that somebody wants it again
        # Also for a blob that was there: its writer may not have come that far, and its folder may be as new.
        sync_folder(blob.parent)
        sync_folder(blob.parent.parent)

    def open(self, key: str) -> _OpenBlob:
        return _LocalBlob(self._root / key)

    def size(self, key: str) -> int:
        return (self._root / key).stat().st_size

    def age_seconds(self, key: str) -> float:
        return time.time() - (self._root / key).stat().st_mtime

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        with suppress(FileNotFoundError), os.scandir(self._root / folder) as entries:
            for entry in entries:
                key = f"{folder}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    yield from self.walk(key)
                else:
                    with suppress(FileNotFoundError):  # deleted since it was listed
                        yield key, entry.stat().st_size

    def delete(self, key: str) -> None:
        (self._root / key).unlink(missing_ok=True)


@final
class _RemoteFiles:
    def __init__(self, url: str) -> None:
        self._url = url

    def _at(self, key: str) -> tuple[Any, str]:
        """The file system without what it remembers (other processes write, too), and the key's path in it."""
        system, root = open_filesystem(self._url)
        system.invalidate_cache()
        return system, f"{root.rstrip('/')}/{key}"

    def stage(self) -> _Staged:
        key = f"staging/{secrets.token_hex(16)}"
        system, path = self._at(key)
        return _Staged(key, system.open(path, "wb"))

    def publish(self, staged: _Staged, key: str, size_bytes: int) -> None:
        staged.stream.close()
        if not _holds(self, key, size_bytes):
            system, path = self._at(key)
            system.cp_file(self._at(staged.key)[1], path)

    def open(self, key: str) -> _OpenBlob:
        return _RemoteBlob(*self._at(key), size_bytes=self.size(key))

    def size(self, key: str) -> int:
        system, path = self._at(key)
        return int(system.info(path)["size"])

    def age_seconds(self, key: str) -> float:
        system, path = self._at(key)
        return time.time() - float(system.modified(path).timestamp())

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        system, path = self._at(folder)
        for name, info in system.find(path, detail=True).items():
            yield folder + name[len(path) :], int(info["size"])

    def delete(self, key: str) -> None:
        system, path = self._at(key)
        with suppress(FileNotFoundError):
            system.rm_file(path)


@final
class _LocalBlob:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._descriptor).st_size

    def read_into(self, offset_bytes: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer) and (count := os.preadv(self._descriptor, [buffer[done:]], offset_bytes + done)):
            done += count
        return done

    def close(self) -> None:
        os.close(self._descriptor)


@final
class _RemoteBlob:
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
        pass


@final
class _BlobStream(io.RawIOBase):
    """A blob as a stream with a position of its own (the streams of fsspec's `memory://` share one)."""

    def __init__(self, blob: _OpenBlob, url: str) -> None:
        self._blob, self._url, self._position = blob, url, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._blob.size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        with Translating(self._url):
            count = self._blob.read_into(self._position, memoryview(buffer).cast("B"))
        self._position += count
        return count

    def readall(self) -> bytes:
        rest = bytearray(max(0, self._blob.size_bytes - self._position))
        return bytes(memoryview(rest)[: self.readinto(rest)])

    def close(self) -> None:
        if not self.closed:
            self._blob.close()
        super().close()
