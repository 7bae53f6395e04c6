"""Bring files out of the registry: exact bytes, verified, complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from registry.arriving import arrive
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
    arrive(target, files, partial(_opened, folder), progress)


@contextmanager
def _opened(folder: Location, entry: FileEntry, offset_bytes: int) -> Iterator[Iterator[bytes]]:
    with folder.open(entry.path) as stream:
        stream.seek(offset_bytes, os.SEEK_SET)
        yield iter(lambda: stream.read(_BLOCK_BYTES), b"")
