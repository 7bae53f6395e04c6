"""The journal of a merge that is being written: which files are finished, so that the next try goes on from there.

One small JSON file for each recipe and place, in the registry's home, held under a lock so that two processes never write one merge.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self, final

from registry.errors import MergeRunning
from registry.manifest import FileEntry, TensorRecord, digest_of, to_json
from registry.merge.sinks import translating
from registry.refs import Digest


@final
class Journal:
    """A context manager: entering takes the lock, leaving releases it. `finish` removes the journal once the merge is recorded."""

    def __init__(self, folder: Path, recipe: Digest, url: str) -> None:
        self._path = folder / f"{recipe.hex[:32]}-{digest_of(url).hex[:16]}.json"
        self._url = url
        self._lock: IO[bytes] | None = None
        self._files: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        with translating(str(self._path)):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._path.with_suffix(".lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise MergeRunning(self._url or "the store", "another process is writing this merge") from error
        self._lock = lock
        self._files = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}  # none yet, or cut off while it was written: start over

    def finished(self, path: str) -> tuple[FileEntry, tuple[TensorRecord, ...]] | None:
        """A file that an earlier try finished, with what it recorded of its tensors."""
        found = self._files.get(path)
        if found is None:
            return None
        entry = FileEntry(path=path, size_bytes=found["size_bytes"], digest=Digest(found["digest"]))
        return entry, tuple(TensorRecord(**record) for record in found["records"])

    def add(self, entry: FileEntry, records: Sequence[TensorRecord]) -> None:
        """Remember a finished file, durably."""
        self._files[entry.path] = {
            "size_bytes": entry.size_bytes,
            "digest": entry.digest.hex,
            "records": to_json(list(records)),
        }
        temporary = self._path.with_suffix(".tmp")
        with translating(str(self._path)):
            temporary.write_text(json.dumps(self._files), encoding="utf-8")
            temporary.replace(self._path)

    def finish(self) -> None:
        """The merge is recorded, or given up: forget it."""
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".lock").unlink(missing_ok=True)
