"""A folder that is far away, read as if it were near: small reads are served from blocks that are kept in memory.

An adapter is hundreds of small tensors, and the heads of a model's files are small too: each read of its own would wait once for the network.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, final

from registry.locations import Location, OfObjects, StoredObject

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 1 << 20
_KEPT_BLOCKS = 64
_HEAD_BYTES = 256 << 10  # more than the head of most files


@final
class Nearby:
    """A location whose files do not change, with its last 64 MiB of small reads in memory. Reads of a whole block or more pass by."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._blocks: OrderedDict[tuple[str, int], _Block] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._location.url

    def files(self) -> Mapping[str, int]:
        return self._location.files()

    def identity(self, path: str) -> str:
        return self._location.identity(path)

    def local_path(self, path: str) -> Path | None:
        return self._location.local_path(path)

    def stored_object(self, path: str) -> StoredObject | None:
        return self._location.stored_object(path) if isinstance(self._location, OfObjects) else None

    def open(self, path: str) -> IO[bytes]:
        size_bytes = self.files().get(path)
        if size_bytes is None:
            return self._location.open(path)  # which says that it is not there
        return io.BufferedReader(_Stream(self._location, path, size_bytes), _HEAD_BYTES)

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        size_bytes = self.files().get(path)
        if size_bytes is None or len(buffer) >= BLOCK_BYTES or offset_bytes + len(buffer) > size_bytes:
            self._location.read_into(path, offset_bytes, buffer)
            return
        done = 0
        while done < len(buffer):
            number, start = divmod(offset_bytes + done, BLOCK_BYTES)
            part = self._block(path, number, size_bytes)[start : start + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def _block(self, path: str, number: int, size_bytes: int) -> memoryview:
        with self._lock:
            block = self._blocks.setdefault((path, number), _Block())
            self._blocks.move_to_end((path, number))
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        with block.lock:  # whoever comes second waits for the first one's read
            if block.data is None:
                data = bytearray(min(BLOCK_BYTES, size_bytes - number * BLOCK_BYTES))
                self._location.read_into(path, number * BLOCK_BYTES, memoryview(data))
                block.data = memoryview(data).toreadonly()
            return block.data

    def close(self) -> None:
        with self._lock:
            self._blocks.clear()
        self._location.close()


@final
class _Block:
    """A part of a file, once it was read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.data: memoryview | None = None


@final
class _Stream(io.RawIOBase):
    """A file as a stream, whose reads are as large as its reader's buffer."""

    def __init__(self, folder: Location, path: str, size_bytes: int) -> None:
        self._folder, self._path, self._size, self._position = folder, path, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._size - self._position)]
        if view:
            self._folder.read_into(self._path, self._position, view)
        self._position += len(view)
        return len(view)

    def readall(self) -> bytes:
        rest = bytearray(max(0, self._size - self._position))
        return bytes(memoryview(rest)[: self.readinto(rest)])
