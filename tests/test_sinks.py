"""The places that a merge is written to: one contract, and what is special about each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import factories
import fsspec
import pytest
from blake3 import blake3

from registry.errors import Conflict, StorageFailed
from registry.locations import open_location
from registry.manifest import FileEntry
from registry.merge.sinks import FolderSink, RemoteSink, Sink, StoreSink, open_sink
from registry.store import Store, StoredFolder

DATA = bytes(range(256)) * 40
LARGE = bytes(range(256)) * (70 << 10)  # more than a part


def write(sink: Sink, path: str, data: bytes) -> FileEntry:
    writer = sink.create(path, len(data))
    step = max(100, len(data) // 100)
    buffer = bytearray(step)
    for start in range(0, len(data), step):
        part = data[start : start + step]
        buffer[: len(part)] = part
        writer.write(memoryview(buffer)[: len(part)])  # reused, as the engine does
    entry = writer.commit()
    writer.cancel()  # harmless
    return entry


Open = Callable[[], Sink]
Read = Callable[[FileEntry], bytes]


@pytest.fixture(params=["store", "store on S3", "folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Open, Read]]:
    """Opens a sink, as often as wanted, and reads a published file of it."""
    bucket = request.getfixturevalue("s3_url") if "s3" in request.param.lower() else ""
    store, url = Store(bucket or str(tmp_path / "store")), f"memory://sinks/{tmp_path.name}"
    places = {"folder": str(tmp_path / "sub" / "out"), "memory": url, "s3": f"{bucket}/sub/out"}
    out = places.get(request.param)

    def read(entry: FileEntry) -> bytes:
        folder = StoredFolder(store, [entry]) if out is None else open_location(out)
        with folder.open(entry.path) as stream:
            return stream.read()

    yield lambda: open_sink(out, store), read
    system = fsspec.filesystem("memory")
    if system.exists(f"/sinks/{tmp_path.name}"):
        system.rm(f"/sinks/{tmp_path.name}", recursive=True)


def test_published_as_written(place: tuple[Open, Read]) -> None:
    open_it, read = place
    sink = open_it()
    sink.prepare(len(DATA))
    entries = [write(sink, "model.safetensors", DATA), write(sink, "sub/empty", b""), write(sink, "merge.json", b"{}")]
    sink.publish()
    assert [read(entry) for entry in entries] == [DATA, b"", b"{}"]
    assert [entry.size_bytes for entry in entries] == [len(DATA), 0, 2]
    assert entries[0].digest.hex == blake3(DATA).hexdigest()


def test_holds_what_an_earlier_try_wrote(place: tuple[Open, Read]) -> None:
    open_it, _ = place
    first = open_it()
    first.prepare(len(DATA))
    entry = write(first, "model.safetensors", DATA)
    again = open_it()
    again.prepare(len(DATA))
    assert again.holds(entry)
    other = FileEntry(path=entry.path, size_bytes=entry.size_bytes, digest=factories.digest("other"))
    missing = FileEntry(path="missing", size_bytes=1, digest=factories.digest("missing"))
    shorter = FileEntry(path=entry.path, size_bytes=1, digest=factories.digest("shorter"))
    assert not any(again.holds(wrong) for wrong in (other, missing, shorter))


def test_a_file_may_be_written_again(place: tuple[Open, Read]) -> None:
    open_it, read = place
    for data in (DATA, DATA[::-1], LARGE, LARGE[::-1]):
        sink = open_it()
        sink.prepare(len(data))
        entry = write(sink, "model.safetensors", data)
        assert sink.holds(entry)
    sink.publish()
    assert read(entry) == data


def test_a_cancelled_file_is_gone(place: tuple[Open, Read]) -> None:
    open_it, _ = place
    sink = open_it()
    sink.prepare(len(DATA))
    kept = write(sink, "kept", b"kept")
    writer = sink.create("model.safetensors", len(DATA))
    writer.write(DATA)
    writer.cancel()
    writer.cancel()
    unwanted = FileEntry(path="model.safetensors", size_bytes=len(DATA), digest=factories.digest("x"))
    assert sink.holds(kept)
    assert not sink.holds(unwanted)


def test_which_sink_is_for_what(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert isinstance(open_sink(None, store), StoreSink)
    assert isinstance(open_sink(str(tmp_path), store), FolderSink)
    assert isinstance(open_sink(tmp_path.as_uri(), store), FolderSink)
    assert isinstance(open_sink("memory://x", store), RemoteSink)


# ---- folders


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    sink = FolderSink(out)
    sink.prepare(1)
    write(sink, "model.safetensors", DATA)
    assert not out.exists()
    sink.publish()
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_discarded_folder_leaves_nothing(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path / "out")
    sink.prepare(1)
    write(sink, "model.safetensors", DATA)
    sink.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_stands_there_already(tmp_path: Path, kind: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    {"folder": out.mkdir, "link": lambda: out.symlink_to(elsewhere), "file": out.touch}[kind]()
    sink = FolderSink(out)
    if kind == "file":
        with pytest.raises(Conflict):
            sink.prepare(1)
        return
    sink.prepare(1)  # an empty folder is fine
    entry = write(sink, "model.safetensors", DATA)
    sink.publish()
    assert (out / entry.path).read_bytes() == DATA
    assert out.is_symlink() is (kind == "link")
    with pytest.raises(Conflict):
        FolderSink(out).prepare(1)


def test_only_this_merges_files_are_published(tmp_path: Path) -> None:
    earlier = FolderSink(tmp_path / "out")
    earlier.prepare(1)
    kept, _ = write(earlier, "kept", DATA), write(earlier, "stale", DATA)
    sink = FolderSink(tmp_path / "out")
    sink.prepare(1)
    assert sink.holds(kept)
    write(sink, "new", b"new")
    sink.publish()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"kept", "new"}


def test_a_damaged_file_is_not_held(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path / "out")
    sink.prepare(1)
    entry = write(sink, "model.safetensors", DATA)
    (tmp_path / "out.partial" / entry.path).write_bytes(DATA[:-1] + b"x")
    assert not sink.holds(entry)


def test_no_room(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed) as caught:
        FolderSink(tmp_path / "deep" / "out").prepare(1 << 60)
    assert "no space left" in caught.value.reason
    with pytest.raises(StorageFailed):
        StoreSink(Store(str(tmp_path / "store"))).prepare(1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_what_earlier_tries_wrote_needs_no_more_room(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "model.safetensors").open("wb") as file:
        file.truncate(free)  # a hole: takes no room
    FolderSink(tmp_path / "out").prepare(free + free // 2)


@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_a_parent_that_takes_no_files(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed):
        FolderSink(tmp_path / parent / "out").prepare(0)


# ---- URLs


def test_a_merged_model_is_not_written_over(tmp_path: Path) -> None:
    url = f"memory://sinks/{tmp_path.name}-taken"
    sink = RemoteSink(url)
    sink.prepare(1)
    write(sink, "merge.json", b"{}")
    with pytest.raises(Conflict):
        RemoteSink(f"{url}/").prepare(1)


def test_discarding_keeps_what_others_put_there(tmp_path: Path) -> None:
    url = f"memory://sinks/{tmp_path.name}-shared"
    with fsspec.open(f"{url}/mine", "wb") as file:
        file.write(b"keep me")
    sink = RemoteSink(url)
    sink.prepare(1)
    write(sink, "sub/model.safetensors", DATA)
    sink.discard()
    sink.discard()
    assert list(open_location(url).files()) == ["mine"]
