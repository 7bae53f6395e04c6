"""Files on their way to a server and back: hashed here, sent only where they are missing, several at once, gone on with after a cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from blake3 import blake3

from registry.arriving import arrive_in_parts
from registry.client_wire import Wire
from registry.disk import check_free
from registry.errors import Changed, Conflict
from registry.formats.adapter import read_json
from registry.locations import Location, open_location
from registry.manifest import FileEntry, Recipe, content_digest
from registry.merge.plan import PROVENANCE_FILE
from registry.progress import Progress
from registry.refs import Digest

WHOLE_BYTES = 64 << 20  # a server takes no more at once
PART_BYTES = 32 << 20
_THREADS = 4
_BLOCK_BYTES = 1 << 20


# -- there


def entries_of(location: Location, paths: Sequence[str], advance: Callable[[int], None]) -> tuple[FileEntry, ...]:
    """Files of a folder with both digests.

    Raises:
        PathNotFound: one is not there.
    """
    return tuple(_entry(location, path, advance) for path in paths)


def _entry(location: Location, path: str, advance: Callable[[int], None]) -> FileEntry:
    hasher, sha256, size_bytes = blake3(), hashlib.sha256(), 0
    with location.open(path) as stream:
        while block := stream.read(_BLOCK_BYTES):
            hasher.update(block)
            sha256.update(block)
            size_bytes += len(block)
            advance(len(block))
    return FileEntry(path=path, size_bytes=size_bytes, digest=Digest(hasher.hexdigest()), sha256=sha256.hexdigest())


@dataclass(frozen=True, slots=True)
class _Missing:
    missing: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class _Parts:
    parts: Mapping[str, int]


def missing_of(wire: Wire, entries: Sequence[FileEntry]) -> tuple[Digest, ...]:
    """Which files a server's store does not have; the others it keeps for a day."""
    asked = [{"digest": entry.digest, "size_bytes": entry.size_bytes} for entry in entries]
    return wire.write(_Missing, "POST", "/blobs/missing", {"files": asked}).missing


def send(wire: Wire, files: Sequence[tuple[Location, FileEntry]], progress: Progress) -> None:
    """Bring files into a server's store, those that are not there.

    Raises:
        Changed: a file is not what it was when it was hashed.
        ServerFailed: the server does not take them.
    """
    by_digest = {entry.digest: (location, entry) for location, entry in files}
    missing = missing_of(wire, [entry for _, entry in by_digest.values()])
    wanted = [by_digest[digest] for digest in missing if digest in by_digest]
    total = sum(entry.size_bytes for _, entry in wanted)
    with ThreadPoolExecutor(_THREADS) as threads:
        sending = _Sending(wire, threads, lambda done: progress("sending", done, total))
        whole = [each for each in wanted if each[1].size_bytes <= WHOLE_BYTES]
        tasks = [threads.submit(sending.whole, *each) for each in whole]
        try:
            for each in wanted:
                if each[1].size_bytes > WHOLE_BYTES:
                    sending.in_parts(*each)
            for task in tasks:
                task.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(frozen=True, slots=True)
class _Sending:
    """Sends single files; `advance` is told of every byte once, however often it has to be sent."""

    wire: Wire
    threads: ThreadPoolExecutor
    advance: Callable[[int], None]

    def whole(self, location: Location, entry: FileEntry) -> None:
        self._send(location, entry, 0, entry.size_bytes, f"/blobs/{entry.digest.hex}")

    def in_parts(self, location: Location, entry: FileEntry) -> None:
        """Of a file that was begun, only the parts that are missing."""
        upload = f"/uploads/{entry.digest.hex}"
        there = self.wire.get(_Parts, upload).parts
        starts = range(0, entry.size_bytes, PART_BYTES)
        tasks = []
        for number, start in enumerate(starts, 1):
            size_bytes = min(PART_BYTES, entry.size_bytes - start)
            if there.get(str(number)) == size_bytes:
                self.advance(size_bytes)
            else:
                part = f"{upload}/parts/{number}"
                tasks.append(self.threads.submit(self._send, location, entry, start, size_bytes, part))
        for task in tasks:
            task.result()
        asked = {"size_bytes": entry.size_bytes, "parts": len(starts)}
        try:
            self.wire.write(dict[str, object], "POST", f"{upload}/complete", asked)
        except Conflict:  # it was put together before, and the answer was lost
            if missing_of(self.wire, [entry]):
                raise

    def _send(self, location: Location, entry: FileEntry, start: int, size_bytes: int, path: str) -> None:
        told = 0

        def blocks() -> Iterator[bytes]:
            nonlocal told
            done = 0
            while done < size_bytes:
                block = bytearray(min(_BLOCK_BYTES, size_bytes - done))
                location.read_into(entry.path, start + done, memoryview(block))
                yield bytes(block)
                done += len(block)
                if done > told:
                    self.advance(done - told)
                    told = done

        self.wire.send("PUT", path, blocks, size_bytes)


# -- back


def fetch(wire: Wire, subject: str, files: Sequence[FileEntry], target: Path, progress: Progress) -> None:
    """Write the files of a checkpoint or merged model into a folder that is new or empty; see `registry.arriving`.

    Args:
        wire: the server.
        subject: a reference, which names exactly one content.
        files: of which it consists.
        target: the folder.
        progress: told of the bytes that are there.
    """
    opener = partial(_opened, wire, subject)
    arrive_in_parts(target, files, opener, progress, name=content_digest(files).short, threads=_THREADS)


def hashed(wire: Wire, subject: str, files: Sequence[FileEntry], progress: Progress) -> tuple[FileEntry, ...]:
    """The files of a checkpoint or merged model, with the SHA-256 of the bytes that the server sends now.

    Raises:
        Changed: a file is not what was recorded.
    """
    total = sum(entry.size_bytes for entry in files)
    return tuple(_hashed(wire, subject, entry, lambda done: progress("reading", done, total)) for entry in files)


def _hashed(wire: Wire, subject: str, entry: FileEntry, advance: Callable[[int], None]) -> FileEntry:
    name, sha256 = blake3(), hashlib.sha256()
    for piece in _read(wire, subject, entry, 0):
        name.update(piece)
        sha256.update(piece)
        advance(len(piece))
    if name.hexdigest() != entry.digest.hex:
        raise Changed(entry.path, str(entry.digest), f"blake3:{name.hexdigest()}")
    return replace(entry, sha256=sha256.hexdigest())


def is_copied(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder of this machine holds what a recipe gives, by its `merge.json`; False where it is free.

    Raises:
        Conflict: something else is there.
    """
    try:
        check_free(folder)
    except Conflict:
        if not (folder / PROVENANCE_FILE).is_file():
            raise
        with closing(open_location(str(folder))) as there:
            said = read_json(there, PROVENANCE_FILE)
            sizes = there.files()
        listed = said.get("files")
        files = listed if isinstance(listed, dict) else {}
        if said.get("recipe_digest") == str(recipe.digest) and all(
            isinstance(each, dict) and sizes.get(path) == each.get("size_bytes") for path, each in files.items()
        ):
            return True
        raise
    return False


@contextmanager
def _opened(wire: Wire, subject: str, entry: FileEntry, offset_bytes: int) -> Iterator[Iterator[bytes]]:
    yield _read(wire, subject, entry, offset_bytes)


def _read(wire: Wire, subject: str, entry: FileEntry, offset_bytes: int) -> Iterator[bytes]:
    return wire.read("/file", {"subject": subject, "path": entry.path}, offset_bytes, entry.size_bytes)
