"""Bring files out of the registry: exact bytes, verified, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from registry.disk import Translating, appearing, sync
from registry.errors import Changed
from registry.locations import Location
from registry.manifest import Checkpoint, FileEntry, Merged
from registry.merging import merged_folder
from registry.workspace import Progress, Workspace, silent

_BLOCK_BYTES = 4 << 20


def pull(workspace: Workspace, subject: Checkpoint | Merged, target: Path, progress: Progress = silent) -> None:
    """Write the files of a checkpoint or merged model into a folder that is new or empty.

    They are written beside it first and appear under its name when all of them are there and right.

    Raises:
        Conflict: something is there already.
        Changed: a file is not what was recorded.
        PathNotFound: a merged model is in none of its places any more.
        StorageFailed: the disk does not take it.
    """
    if isinstance(subject, Merged):
        folder, files = merged_folder(workspace, subject), subject.files
    else:
        folder, files = workspace.folder_of(subject), subject.manifest.files
    total = sum(entry.size_bytes for entry in files)
    with appearing(target) as partial:
        for entry in files:
            _copy(folder, entry, partial / entry.path, lambda done: progress("pulling", done, total))


def _copy(folder: Location, entry: FileEntry, target: Path, advance: Callable[[int], None]) -> None:
    hasher = blake3()
    with Translating(str(target)), folder.open(entry.path) as source:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            while block := source.read(_BLOCK_BYTES):
                hasher.update(block)
                file.write(block)
                advance(len(block))
            sync(file)
    if hasher.hexdigest() != entry.digest.hex:
        raise Changed(f"{folder.url}/{entry.path}", str(entry.digest), f"blake3:{hasher.hexdigest()}")
