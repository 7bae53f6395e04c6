"""Files that arrive in a new folder from wherever they come: exact bytes, verified, all of them or none."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from blake3 import blake3

from registry.disk import Translating, appearing, check_free, publish, sync
from registry.errors import Changed, Conflict
from registry.manifest import FileEntry
from registry.progress import Progress

Opener = Callable[[FileEntry, int], AbstractContextManager[Iterable[bytes]]]
"""Gives the bytes of a file, from an offset on."""

_BLOCK_BYTES = 4 << 20


def arrive(target: Path, files: Sequence[FileEntry], opener: Opener, progress: Progress) -> None:
    """Write files into a folder that is new or empty; it appears when all of them are there and right. Else nothing is left.

    Raises:
        Conflict: something is there already.
        Changed: a file is not what was recorded.
        StorageFailed: the disk does not take it.
    """
    total = sum(entry.size_bytes for entry in files)
    with appearing(target) as folder:
        for entry in files:
            _write(folder, opener, lambda done: progress("pulling", done, total), entry)


def arrive_in_parts(
    target: Path, files: Sequence[FileEntry], opener: Opener, progress: Progress, *, name: str, threads: int
) -> None:
    """The same, several files at once; what has come before a cut is kept beside the target, and the next try goes on there.

    Args:
        target, files, opener, progress: as `arrive`.
        name: of the content, the same for every try.
        threads: how many files at once.
    """
    total = sum(entry.size_bytes for entry in files)

    def advance(done_bytes: int) -> None:
        progress("pulling", done_bytes, total)

    with _kept(target, name) as folder, ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(_write, folder, opener, advance, entry) for entry in files]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _kept(target: Path, name: str) -> Iterator[Path]:
    """A folder beside the target that becomes it at the end; it stays as it is when the block fails."""
    target = Path(os.path.abspath(target))
    check_free(target)
    folder = target.with_name(f".{target.name}.{name}.partial")
    with Translating(str(target)):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, target):
        yield folder
        publish(folder, target)


@contextmanager
def _alone(folder: Path, target: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise Conflict(str(target), "another process is writing it") from error
    finally:
        os.close(descriptor)


def _write(folder: Path, opener: Opener, advance: Callable[[int], None], entry: FileEntry) -> None:
    path = folder / entry.path
    hasher = blake3()
    with Translating(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            there = _take_in(file, hasher, entry.size_bytes, advance)
            if there < entry.size_bytes or not entry.size_bytes:
                with opener(entry, there) as pieces:
                    for piece in pieces:
                        hasher.update(piece)
                        file.write(piece)
                        advance(len(piece))
            sync(file)
    if hasher.hexdigest() != entry.digest.hex:
        path.unlink()
        raise Changed(entry.path, str(entry.digest), f"blake3:{hasher.hexdigest()}")


def _take_in(file: IO[bytes], hasher: blake3, size_bytes: int, advance: Callable[[int], None]) -> int:
    """Hash what an earlier try has left; gives how much that is."""
    file.seek(0, os.SEEK_END)
    if file.tell() > size_bytes:
        file.truncate(0)
    file.seek(0)
    while block := file.read(_BLOCK_BYTES):
        hasher.update(block)
        advance(len(block))
    return file.tell()
