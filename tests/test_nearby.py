"""A far folder read through blocks gives the same bytes, with fewer reads."""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from registry.errors import CorruptFile, PathNotFound
from registry.locations import Location, open_location
from registry.nearby import BLOCK_BYTES, Nearby

SIZE = 3 * BLOCK_BYTES + 12345


class Counting:
    """A location that counts its reads."""

    def __init__(self, location: Location) -> None:
        self.location, self.reads = location, 0

    @property
    def url(self) -> str:
        return self.location.url

    def files(self) -> Mapping[str, int]:
        return self.location.files()

    def identity(self, path: str) -> str:
        return self.location.identity(path)

    def open(self, path: str) -> IO[bytes]:
        return self.location.open(path)

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        self.reads += 1
        self.location.read_into(path, offset_bytes, buffer)

    def local_path(self, path: str) -> Path | None:
        return self.location.local_path(path)

    def close(self) -> None:
        self.location.close()


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    found = random.Random(3).randbytes(SIZE)
    (tmp_path / "weights").write_bytes(found)
    (tmp_path / "empty").write_bytes(b"")
    return found


def read(folder: Location, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    folder.read_into("weights", offset, memoryview(buffer))
    return bytes(buffer)


def test_reads_give_what_is_there(tmp_path: Path, data: bytes) -> None:
    far, chosen = Counting(open_location(str(tmp_path))), random.Random(4)
    folder = Nearby(far)
    places = [(chosen.randrange(SIZE - 9000), chosen.randrange(9000)) for _ in range(300)]
    places += [(0, SIZE), (SIZE, 0), (BLOCK_BYTES - 1, 2), (SIZE - 1, 1), (5, BLOCK_BYTES), (7, BLOCK_BYTES - 1)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda place: read(folder, *place), places))
    assert found == [data[start : start + size] for start, size in places]
    assert far.reads <= 4 + 2
    folder.close()
    assert read(folder, 3, 9) == data[3:12]


def test_streams_give_what_is_there(tmp_path: Path, data: bytes) -> None:
    folder = Nearby(open_location(str(tmp_path)))
    with folder.open("weights") as stream:
        assert stream.read(8) == data[:8]
        assert stream.seek(BLOCK_BYTES - 3) == BLOCK_BYTES - 3
        assert stream.read(9) == data[BLOCK_BYTES - 3 : BLOCK_BYTES + 6]
        assert stream.seek(-5, 2) == SIZE - 5
        assert stream.read() == data[-5:]
        assert stream.read(5) == b""
        stream.seek(0)
        assert stream.read() == data
    with folder.open("empty") as stream:
        assert stream.read() == b""


def test_what_is_not_there_is_told_as_by_the_folder_itself(tmp_path: Path, data: bytes) -> None:
    folder = Nearby(open_location(str(tmp_path)))
    assert folder.files() == {"empty": 0, "weights": len(data)}
    with pytest.raises(PathNotFound):
        folder.open("nothing")
    with pytest.raises(PathNotFound):
        folder.read_into("nothing", 0, memoryview(bytearray(3)))
    with pytest.raises(CorruptFile):
        read(folder, SIZE - 2, 3)
