"""The journal of a merge that is being written: which files are finished, so that the next try goes on from there.

One small JSON file for each recipe and place, in the registry's home, held under a lock so that two processes never write one merge.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self, final

from registry.disk import Translating
from registry.errors import InvalidInput, MergeRunning
from registry.manifest import FileEntry, TensorRecord, digest_of, to_json
from registry.refs import Digest

_Finished = tuple[FileEntry, tuple[TensorRecord, ...]]


@final
class Journal:
    """A context manager: entering takes the lock, leaving releases it. `finish` removes the journal once the merge is recorded.

    The lock is the place's, whatever recipe is written there; in the store, different recipes do not meet.
    """

    def __init__(self, folder: Path, recipe: Digest, url: str) -> None:
        place = digest_of(url).hex[:32]
        self._path = folder / f"{recipe.hex[:32]}-{place}.json"
        self._lock_path = folder / f"{place if url else recipe.hex[:32]}.lock"
        self._url = url
        self._lock: IO[bytes] | None = None
        self._files: dict[str, _Finished] = {}

    def __enter__(self) -> Self:
        with Translating(str(self._lock_path)):
            self._lock_path.parent.mkdir(parents=True, exist_ok=True)
            while self._lock is None:
                self._lock = self._take_lock()
        self._files = self._read()
        return self

    def _take_lock(self) -> IO[bytes] | None:
        """The locked file; None when its last owner removed it in between, so that others may hold a new one."""
        lock = self._lock_path.open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), self._lock_path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            lock.close()
            raise MergeRunning(self._url or "the store", "another process is writing there") from error
        lock.close()
        return None

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _read(self) -> dict[str, _Finished]:
        try:
            return {path: _parse(path, found) for path, found in json.loads(self._path.read_bytes()).items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, InvalidInput):
            return {}  # none yet, or not one of ours: start over

    def finished(self, path: str) -> _Finished | None:
        """A file that an earlier try finished, with what it recorded of its tensors."""
        return self._files.get(path)

    def add(self, entry: FileEntry, records: Sequence[TensorRecord]) -> None:
        """Remember a finished file. Whether it is still intact, the sink sees when it is needed again."""
        self._files[entry.path] = entry, tuple(records)
        files = {
            path: {"size_bytes": entry.size_bytes, "digest": entry.digest.hex, "records": to_json(records)}
            for path, (entry, records) in self._files.items()
        }
        temporary = self._path.with_suffix(".tmp")
        with Translating(str(self._path)):
            temporary.write_text(json.dumps(files), encoding="utf-8")
            temporary.replace(self._path)

    def finish(self) -> None:
        """The merge is recorded, or given up: forget it."""
        self._path.unlink(missing_ok=True)
        self._lock_path.unlink(missing_ok=True)


def _parse(path: str, found: Any) -> _Finished:
    entry = FileEntry(path=path, size_bytes=found["size_bytes"], digest=Digest(found["digest"]))
    records = ({**record, "coefficients": tuple(record["coefficients"])} for record in found["records"])
    return entry, tuple(TensorRecord(**record) for record in records)
