"""Keys that have bytes on a disk of this machine. A power cut leaves all of a file or nothing: it is written to staging and synced, then renamed
and the folders synced.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import final

from registry.disk import DurableFile, make_folders, sync_folder
from registry.locations import Origin, StoredObject
from registry.objects import OpenBlob, Upload, holds, staging_key, sweep_staged


@final
class LocalFiles:
    """What is below a folder, which need not be there yet."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, key: str) -> Path:
        """Where a key's file is, or would be."""
        return self._root / key

    def upload(self, key: str, size_bytes: int) -> Upload:
        del key, size_bytes  # found only in the end, as on every store
        return _Upload(self)

    def claim(self, key: str, data: bytes) -> bool:
        make_folders(self.path(key).parent)
        with suppress(FileExistsError), closing(DurableFile(self.path(key), "xb")) as file:
            file.write(memoryview(data))
            file.sync()
            return True
        return False

    def open(self, key: str) -> OpenBlob:
        return _Blob(self.path(key))

    def size(self, key: str) -> int:
        return self.path(key).stat().st_size

    def age_seconds(self, key: str) -> float:
        return time.time() - self.path(key).stat().st_mtime

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
        self.path(key).unlink(missing_ok=True)

    def sweep_staging(self, older_than_seconds: float) -> int:
        return sweep_staged(self, older_than_seconds)

    def stored_object(self, key: str) -> StoredObject | None:
        del key
        return None


@final
class _Upload:
    def __init__(self, files: LocalFiles) -> None:
        self._files, self._key = files, staging_key()
        make_folders(files.path(self._key).parent)
        self._file = DurableFile(files.path(self._key), "xb")

    def write(self, data: memoryview, origin: Origin | None) -> None:
        del origin
        self._file.write(data)

    def publish(self, key: str, size_bytes: int) -> None:
        blob = self._files.path(key)
        if not (holds(self._files, key, size_bytes) and _renew(blob)):
            self._file.sync()
            make_folders(blob.parent)
            # Another process may have published the same bytes just now; replacing them by themselves harms nobody.
            self._files.path(self._key).replace(blob)
        # Also for a blob that was there: its writer may not have come that far, and its folders may be as new.
        for folder in (blob.parent, blob.parent.parent, self._files.path("")):
            sync_folder(folder)

    def cancel(self) -> None:
        try:
            self._file.close()
        finally:
            self._files.delete(self._key)


def _renew(blob: Path) -> bool:
    """Let a blob's age say that somebody wants it again; False when it was swept since it was looked at."""
    try:
        os.utime(blob)
    except FileNotFoundError:
        return False
    return True


@final
class _Blob:
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
