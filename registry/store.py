"""The store: blobs named by the BLAKE3 of their bytes, on this machine's disk or any object store that fsspec reaches.

Layout below the store's URL:

    blobs/ab/<64 hex>     a blob; `ab` are the first two digits of its digest
    staging/<random>      what is being written, or was when its writer died
    probe/<random>        what is tried out

A blob appears under its name complete or not at all, and never changes. How a disk does it is in `registry.local_files`, how object
stores do it in `registry.s3` and `registry.objects`. Nothing is created before the first write.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast, final

from blake3 import blake3

from registry.disk import Translating
from registry.errors import (
    Changed,
    Conflict,
    CorruptFile,
    DamagedBlob,
    InvalidSetting,
    PathNotFound,
    StorageFailed,
)
from registry.local_files import LocalFiles
from registry.locations import Location, Origin, StoredObject, is_s3, local_folder
from registry.manifest import FileEntry, digest_of
from registry.objects import Files, OpenBlob, RemoteFiles, Upload, holds, probe_key
from registry.refs import Digest
from registry.s3 import S3Files

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 4 << 20
_WORST_SKEW_SECONDS = 60.0
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
        self._files: Files = _files_at(self.url, self._folder)
        self._block_bytes = 8 * BLOCK_BYTES if self._folder is None else BLOCK_BYTES  # one request each

    def probe(self) -> tuple[str, ...]:
        """Try out what a team relies on, with a file that is removed again.

        Returns:
            What to be careful about, a sentence for each.

        Raises:
            InvalidSetting: it lets one writer replace what another has written, or does not give back what was written.
        """
        key = probe_key()
        with Translating(self.url):
            self._demand(
                self._files.claim(key, b"the first"), "it does not take a file on the condition that none is there"
            )
            try:
                is_refused = not self._files.claim(key, b"the second")
                self._demand(is_refused, "it ignores write conditions: two writers could replace each other's files")
                self._demand(self._range(key, 4, 5) == b"first", "it does not give the range of bytes asked for")
                age_seconds = self._files.age_seconds(key)
            finally:
                self._files.delete(key)
            self._demand(not holds(self._files, key, 9), "what is deleted stays there")
        if abs(age_seconds) <= _WORST_SKEW_SECONDS:
            return ()
        return (f"its clock is {abs(age_seconds):.0f} s {'behind' if age_seconds > 0 else 'ahead of'} this machine's",)

    def _demand(self, is_right: bool, reason: str) -> None:
        if not is_right:
            raise InvalidSetting("store", self.url, reason)

    def _range(self, key: str, offset_bytes: int, count: int) -> bytes:
        buffer = bytearray(count)
        with closing(self._files.open(key)) as blob:
            return bytes(buffer[: blob.read_into(offset_bytes, memoryview(buffer))])

    def create(self, *, sha256: bool = False, expected: Digest | None = None, size_bytes: int = 0) -> BlobWriter:
        """Start a blob.

        Args:
            sha256: compute that digest too, beside BLAKE3.
            expected: the digest it must have to be committed, where that is known: an object store can then have it under its name at once.
            size_bytes: how large it will be, where that is known; S3 must know it for more than 156 GiB.
        """
        return BlobWriter(self._files, self.url, sha256=sha256, expected=expected, size_bytes=size_bytes)

    def put_file(self, location: Location, path: str) -> Blob:
        """Copy a file of a location into the store, with both digests.

        Raises:
            Changed: the file changed while it was read.
            PathNotFound: no such file.
        """
        source = f"{location.url}/{path}"
        identity = location.identity(path)
        with Translating(source), location.open(path) as stream:
            before = (identity, stream.seek(0, os.SEEK_END))
            stream.seek(0)
            with self.create(sha256=True, size_bytes=before[1]) as writer:
                for block in _blocks(stream, source, BLOCK_BYTES):
                    writer.write(block)
                after = (location.identity(path), writer.size_bytes)
                if after != before:
                    raise Changed(source, *(f"{mark}, {size_bytes} bytes" for mark, size_bytes in (before, after)))
                return writer.commit()

    def open(self, digest: Digest) -> IO[bytes]:
        """Open a blob for reading; the stream can seek.

        Raises:
            DamagedBlob: it is missing.
        """
        with self._reading(digest):
            blob = self._files.open(_key(digest))
        return io.BufferedReader(_BlobStream(blob, self._reading(digest)), BLOCK_BYTES)

    def read_into(self, digest: Digest, offset_bytes: int, buffer: memoryview) -> None:
        """Fill the buffer with a blob's bytes from an offset on.

        Raises:
            DamagedBlob: it is missing, or ends before the buffer is full.
        """
        with self._reading(digest), closing(self._files.open(_key(digest))) as blob:
            self._fill(digest, blob, offset_bytes, buffer)

    def _fill(self, digest: Digest, blob: OpenBlob, offset_bytes: int, buffer: memoryview) -> None:
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
        """How long ago a blob was written; on a disk, also when it was put here again.

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
        with Translating(self.url):
            return self._files.sweep_staging(older_than.total_seconds())

    def stored_object(self, digest: Digest) -> StoredObject | None:
        """A blob as an object that its server can copy; None elsewhere.

        Raises:
            DamagedBlob: it is missing.
        """
        with self._reading(digest):
            return self._files.stored_object(_key(digest))

    def _reading(self, digest: Digest) -> Translating:
        return Translating(self.url, missing=self._damaged(digest, str(digest), "missing"))

    def _damaged(self, digest: Digest, expected: str, found: str) -> DamagedBlob:
        return DamagedBlob(f"{self.url}/{_key(digest)}", expected, found)


@final
class BlobWriter:
    """A blob in the making. It ends with `commit` or `cancel`; leaving a `with` block cancels what was not committed.

    Whatever fails also cancels it: half a write never becomes a blob, and a failed sync is not tried again.
    """

    def __init__(self, files: Files, url: str, *, sha256: bool, expected: Digest | None, size_bytes: int) -> None:
        self._url, self._expected = url, expected
        self._blake3 = blake3()
        self._sha256 = hashlib.sha256() if sha256 else None
        self.size_bytes = 0
        with Translating(url):
            self._upload: Upload | None = files.upload(_key(expected) if expected else "", size_bytes)

    def write(self, data: bytes | memoryview[Any], origin: Origin | None = None) -> None:
        """Append bytes; a memory view must be contiguous and may be reused afterwards.

        Args:
            data: the bytes.
            origin: where an S3 store has the same bytes. The same store may then copy them itself.

        Raises:
            Conflict: the writer has ended.
            StorageFailed: the store does not take them.
        """
        upload, view = self._unfinished(), memoryview(data).cast("B")
        try:
            with Translating(self._url):
                upload.write(view, origin)
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
            expected: the digest it must have, as for `Store.create`; None takes what comes.

        Raises:
            Conflict: the writer has ended.
            DamagedBlob: the bytes have another digest than the expected one.
            StorageFailed: the store does not take them.
        """
        upload, digest = self._unfinished(), Digest(self._blake3.hexdigest())
        try:
            for wanted in (expected, self._expected):
                if wanted is not None and digest != wanted:
                    raise DamagedBlob(f"{self._url}/{_key(wanted)}", str(wanted), str(digest))
            with Translating(self._url):
                upload.publish(_key(digest), self.size_bytes)
        finally:
            self.cancel()
        return Blob(digest=digest, sha256=self._sha256.hexdigest() if self._sha256 else "", size_bytes=self.size_bytes)

    def cancel(self) -> None:
        """Drop what was written. Harmless at any time, also after `commit`; what the store does not let go is left to the sweep."""
        upload, self._upload = self._upload, None
        if upload is not None:
            with suppress(StorageFailed), Translating(self._url):
                upload.cancel()

    def _unfinished(self) -> Upload:
        if self._upload is None:
            raise Conflict(f"a blob for {self._url}", "its writer has ended")
        return self._upload

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
        self._opened: dict[str, OpenBlob] = {}
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

    def stored_object(self, path: str) -> StoredObject | None:
        return self._store.stored_object(self._entry(path).digest)

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

    def _blob(self, entry: FileEntry) -> OpenBlob:
        with self._lock:
            if entry.path not in self._opened:
                self._opened[entry.path] = self._store._files.open(_key(entry.digest))
            return self._opened[entry.path]


def _key(digest: Digest) -> str:
    return f"blobs/{digest.hex[:2]}/{digest.hex}"


def _files_at(url: str, folder: Path | None) -> Files:
    return remote_files(url) if folder is None else LocalFiles(folder)


def remote_files(url: str) -> S3Files | RemoteFiles:
    """What is behind a URL that is not a path."""
    return S3Files(url) if is_s3(url) else RemoteFiles(url)


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


@final
class _BlobStream(io.RawIOBase):
    """A blob as a stream with a position of its own (the streams of fsspec's `memory://` share one)."""

    def __init__(self, blob: OpenBlob, translating: Translating) -> None:
        self._blob, self._translating, self._position = blob, translating, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._blob.size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        with self._translating:  # also that it was deleted since it was opened
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
