"""Folders to read from: a path and a URL keep one contract, and nothing in them leads out or hangs."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from registry.errors import CorruptFile, PathNotFound, RegistryError, StorageFailed
from registry.locations import MAX_FILES, Location, is_url, local_folder, open_location

FILES = {"a.txt": b"abc", "b/c.bin": b"0123456789", "b/d/e": b"", ".hidden": b"x", ".git/config": b"x", "b/.x": b"x"}


@pytest.fixture(params=["path", "file URL", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    folder = tmp_path / "a folder"
    urls = {"path": str(folder), "file URL": folder.as_uri(), "memory": f"memory://{uuid.uuid4().hex}"}
    url = urls.get(request.param) or request.getfixturevalue("s3_url") + "/a folder"
    system, root = fsspec.url_to_fs(str(folder) if request.param == "file URL" else url)
    for path, data in FILES.items():
        system.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
        system.pipe_file(f"{root}/{path}", data)
    found = open_location(url)
    yield found
    found.close()
    system.rm(root, recursive=True)


def test_files_are_listed_by_path_with_sizes_and_without_hidden_ones(location: Location) -> None:
    assert list(location.files().items()) == [("a.txt", 3), ("b/c.bin", 10), ("b/d/e", 0)]


def test_reading_whole_and_at_an_offset(location: Location) -> None:
    with location.open("b/c.bin") as stream:
        assert (stream.read(3), stream.seek(8), stream.read()) == (b"012", 8, b"89")
    for start, expected in ((2, b"2345"), (10, b""), (0, b"0123456789")):
        buffer = bytearray(len(expected))
        location.read_into("b/c.bin", start, memoryview(buffer))
        assert buffer == expected


def test_a_file_that_ends_early_is_corrupt(location: Location) -> None:
    with pytest.raises(CorruptFile):
        location.read_into("b/c.bin", 8, memoryview(bytearray(3)))


def test_a_missing_file_is_not_found_by_any_way(location: Location) -> None:
    for look in (
        lambda: location.open("nothing"),
        lambda: location.identity("nothing"),
        lambda: location.read_into("nothing", 0, memoryview(bytearray(1))),
        lambda: location.identity("a.txt/below"),
    ):
        with pytest.raises(PathNotFound):
            look()


def test_an_identity_changes_with_the_file(location: Location) -> None:
    before = location.identity("a.txt")
    assert location.identity("a.txt") == before
    system, root = fsspec.url_to_fs(location.url)
    system.pipe_file(f"{root}/a.txt", b"xyz")
    assert location.identity("a.txt") != before
    system.pipe_file(f"{root}/new", b"")
    assert "new" in location.files()


def test_a_location_can_be_used_again_after_it_was_closed(location: Location) -> None:
    buffer = bytearray(3)
    for _ in range(2):
        location.read_into("a.txt", 0, memoryview(buffer))
        location.close()
    assert buffer == b"abc"


@pytest.mark.parametrize(
    "text",
    ["{}/nothing", "{}/file", "memory://nothing-here", "{}/" + "x" * 300, "{}/\0", "//[", "~nobody-by-this-name/x"],
)
def test_what_is_no_folder_is_not_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PathNotFound):
        open_location(text.format(tmp_path))


@pytest.mark.parametrize("text", ["nosuch://x", "file://elsewhere/x", "http://[", "s3://", "::"])
def test_a_url_nobody_can_open_is_an_error_of_ours(text: str) -> None:
    with pytest.raises(RegistryError):
        open_location(text)


def test_a_path_is_told_from_a_url() -> None:
    assert [
        text for text in ("s3://b/k", "zip::s3://b", "C:\\x", "C:/x", "a:b", "/a://b", "./x", "a b://c") if is_url(text)
    ] == [
        "s3://b/k",
        "zip::s3://b",
    ]
    assert local_folder("file:///a%20b/c%23") == Path("/a b/c#")
    assert local_folder("file://localhost/a") == Path("/a")
    assert local_folder("a/../b") == Path.cwd() / "b"
    assert local_folder("~/x") == Path.home() / "x"
    assert local_folder("s3://bucket") is None


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "secret").write_bytes(b"abc")
    (folder / "file").symlink_to(other / "secret")
    (folder / "folder").symlink_to(other)
    (folder / "loop").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "dangling").symlink_to(other / "nothing")
    assert open_location(str(folder)).files() == {"file": 3}


def test_what_is_not_a_file_does_not_count(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)  # which binding makes too, but only at the end of a short path
    assert open_location(str(tmp_path)).files() == {}


@pytest.mark.parametrize("name", [b"\xff", b"a\nb", b"a\\b", b"\x7f"])
def test_a_name_that_not_every_system_can_hold_is_refused(tmp_path: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    with pytest.raises(CorruptFile, match="name"):
        open_location(str(tmp_path)).files()


def test_no_key_of_an_object_store_leads_out(tmp_path: Path) -> None:
    system, bucket = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for key in ("a/x", "a/../../evil", "a//y", "a/."):
        system.store[f"{bucket}/{key}"] = MemoryFile(system, f"{bucket}/{key}", b"abc")
    system.pseudo_dirs.append(bucket)
    try:
        assert open_location(f"memory:/{bucket}").files() == {"a/x": 3}
    finally:
        for key in [key for key in system.store if key.startswith(bucket)]:
            del system.store[key]


def test_a_folder_with_too_many_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for number in range(MAX_FILES):
        os.link(tmp_path / "file", tmp_path / str(number))
    with pytest.raises(CorruptFile, match="more than"):
        open_location(str(tmp_path)).files()


def test_a_file_that_cannot_be_read_is_a_failure_of_the_storage(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageFailed):
        open_location(str(tmp_path)).open("folder")
    with pytest.raises(StorageFailed):
        open_location(str(tmp_path)).read_into("folder", 0, memoryview(bytearray(1)))
