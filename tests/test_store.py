"""The store: one contract for a disk, any object store and S3, then what only a disk can suffer."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import IO

import fsspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import Changed, Conflict, CorruptFile, DamagedBlob, PathNotFound, StorageFailed
from registry.locations import LocalLocation, Location, local_folder, open_location
from registry.manifest import FileEntry
from registry.refs import Digest
from registry.s3 import PART_BYTES
from registry.store import BLOCK_BYTES, Blob, Store, StoredFolder

NOW = timedelta(0)


def put(store: Store, data: bytes, expected: Digest | None = None) -> Blob:
    with store.create(expected=expected) as writer:
        writer.write(data)
        return writer.commit()


def digest_of_bytes(data: bytes) -> Digest:
    return Digest(blake3(data).hexdigest())


def behind(store: Store, key: str) -> str:
    """Where a key is for fsspec, which does not decode the URL of a local path."""
    folder = local_folder(store.url)
    return f"{store.url if folder is None else folder}/{key}"


def overwrite(store: Store, digest: Digest, data: bytes) -> None:
    """Damage a blob behind the store's back."""
    with fsspec.open(behind(store, f"blobs/{digest.hex[:2]}/{digest.hex}"), "wb") as file:
        file.write(data)


def staged(store: Store) -> int:
    """What dead writers have left: files, and on S3 uploads in parts."""
    system, root = fsspec.url_to_fs(behind(store, "staging"))
    system.invalidate_cache()
    found = sum(1 for path in system.find(root) if path != root)  # what SeaweedFS makes of an empty folder
    if store.url.startswith("s3:"):
        found += len(system.call_s3("list_multipart_uploads", Bucket=root.partition("/")[0]).get("Uploads", ()))
    return found


def noise(size_bytes: int) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store((tmp_path / "a store" / "deep").as_uri())


@pytest.fixture(params=["disk", "memory", "s3"])
def store(request: pytest.FixtureRequest, local: Store) -> Iterator[Store]:
    if request.param == "disk":
        yield local
    elif request.param == "s3":
        yield Store(request.getfixturevalue("s3_url") + "/a store/")
    else:
        url = f"memory://{uuid.uuid4().hex}"
        yield Store(url + "/store/")
        system, root = fsspec.url_to_fs(url)
        if system.exists(root):
            system.rm(root, recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several sizes, one larger than a block."""
    for path, size_bytes in {"b.bin": BLOCK_BYTES + 12345, "a.json": 20, "sub/c.bin": 4096, "empty": 0}.items():
        file = tmp_path / "model" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(noise(size_bytes))
        os.utime(file, (1e9, 1e9))  # long ago, so that a write in the next millisecond shows
    return tmp_path / "model"


# Writing


@pytest.mark.parametrize(
    ("size_bytes", "is_known"), [(0, False), (1, True), (PART_BYTES, False), (40_000_000, False), (40_000_000, True)]
)
def test_what_is_committed_can_be_read_by_its_digest(store: Store, size_bytes: int, is_known: bool) -> None:
    data = noise(size_bytes)
    known = digest_of_bytes(data) if is_known else None
    with store.create(sha256=True, expected=known, size_bytes=size_bytes if is_known else 0) as writer:
        writer.write(data)
        blob = writer.commit(expected=digest_of_bytes(data))
    assert blob == Blob(digest=digest_of_bytes(data), sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    with store.open(blob.digest) as stream:
        assert stream.read() == data
    assert store.size(blob.digest) == len(data)
    assert list(store.blobs()) == [(blob.digest, len(data))]
    assert staged(store) == 0


@given(data=st.binary(max_size=4000), cuts=st.lists(st.integers(0, 4000), max_size=6))
def test_the_digest_does_not_depend_on_how_the_bytes_were_cut(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    with Store("memory://cuts").create(sha256=True) as writer:
        for start, end in pairwise(edges):
            writer.write(memoryview(data)[start:end])
        blob = writer.commit()
    assert (blob.digest, blob.sha256) == (digest_of_bytes(data), hashlib.sha256(data).hexdigest())
    with Store("memory://cuts").open(blob.digest) as stream:
        assert stream.read() == data


def test_a_buffer_may_be_reused_and_hold_other_than_bytes(store: Store) -> None:
    numbers = memoryview(bytearray(64)).cast("d")
    with store.create() as writer:
        for value in (1.0, 2.0):
            numbers[0] = value
            writer.write(numbers)
        blob = writer.commit()
    with store.open(blob.digest) as stream:
        found = memoryview(stream.read()).cast("d")
    assert (found[0], found[8], len(found)) == (1.0, 2.0, 16)


@pytest.mark.parametrize("given", [b"given", bytes(PART_BYTES + 1)], ids=["small", "large"])
def test_other_bytes_than_expected_are_not_published(store: Store, given: bytes) -> None:
    expected = digest_of_bytes(b"wanted")
    for known, said in ((expected, None), (None, expected)):
        writer = store.create(expected=known)
        writer.write(given)
        with pytest.raises(DamagedBlob) as caught:
            writer.commit(said)
        assert (caught.value.expected, caught.value.found) == (str(expected), str(digest_of_bytes(given)))
        assert (list(store.blobs()), staged(store)) == ([], 0)


def test_cancel_drops_an_open_blob_and_leaves_a_committed_one(store: Store) -> None:
    dropped, kept = store.create(), store.create()
    for writer in (dropped, kept):
        writer.write(b"abc")
    dropped.cancel()
    blob = kept.commit()
    kept.cancel()
    dropped.cancel()
    assert list(store.blobs()) == [(blob.digest, 3)]
    for writer in (dropped, kept):
        with pytest.raises(Conflict):
            writer.write(b"more")
        with pytest.raises(Conflict):
            writer.commit()
    for data in (b"left without a commit", bytes(2 * PART_BYTES + 1)):
        with store.create() as writer:
            writer.write(data)
    assert (len(list(store.blobs())), staged(store)) == (1, 0)


@pytest.mark.parametrize("size_bytes", [4, PART_BYTES + 1])
@pytest.mark.parametrize("is_known", [False, True], ids=["found digest", "known digest"])
def test_a_blob_that_is_there_stays_unless_its_size_is_wrong(store: Store, size_bytes: int, is_known: bool) -> None:
    good, evil = b"g" * size_bytes, b"e" * size_bytes
    known = digest_of_bytes(good) if is_known else None
    digest = put(store, good, known).digest
    overwrite(store, digest, evil)  # of the same size: nobody looked
    put(store, good, known)
    with store.open(digest) as stream:
        assert stream.read() == evil
    overwrite(store, digest, b"cut")
    put(store, good, known)
    with store.open(digest) as stream:
        assert stream.read() == good
    assert staged(store) == 0


def test_whoever_writes_the_same_blob_at_the_same_time_succeeds(store: Store) -> None:
    data = noise(PART_BYTES + 1000)
    writers = [store.create(expected=digest_of_bytes(data) if n % 2 else None) for n in range(4)]
    for writer in writers:
        writer.write(data)
    with ThreadPoolExecutor(4) as pool:
        blobs = list(pool.map(lambda writer: writer.commit(), writers))
    assert [blob.digest for blob in blobs] == [digest_of_bytes(data)] * 4
    assert (list(store.blobs()), staged(store)) == ([(blobs[0].digest, len(data))], 0)
    store.verify(blobs[0].digest)


def test_many_threads_may_write_the_same_blobs(store: Store) -> None:
    contents = [bytes([n]) * 10_000 for n in range(10)] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda data: put(store, data).digest, contents))
    assert found == [digest_of_bytes(data) for data in contents]
    assert dict(store.blobs()) == dict.fromkeys(found, 10_000)
    assert staged(store) == 0


# Reading


def test_streams_of_one_blob_seek_apart(store: Store) -> None:
    data = random.Random(1).randbytes(BLOCK_BYTES + 999)
    digest = put(store, data).digest
    with store.open(digest) as first, store.open(digest) as second:
        assert first.read(10) == data[:10]
        assert second.seek(-500, os.SEEK_END) == len(data) - 500
        assert first.seek(BLOCK_BYTES - 10, os.SEEK_CUR) == BLOCK_BYTES
        assert (second.read(), first.read(5), second.read()) == (data[-500:], data[BLOCK_BYTES:][:5], b"")
        assert first.seek(len(data) + 7) == len(data) + 7
        assert first.read() == b""


def test_read_into_fills_the_buffer_or_says_that_the_blob_is_short(store: Store) -> None:
    digest, buffer = put(store, b"0123456789").digest, memoryview(bytearray(4))
    store.read_into(digest, 6, buffer)
    assert bytes(buffer) == b"6789"
    store.read_into(digest, 10, buffer[:0])
    for offset_bytes in (7, 10, 50):
        with pytest.raises(DamagedBlob) as caught:
            store.read_into(digest, offset_bytes, buffer)
        assert caught.value.found == "10 bytes"


def test_a_missing_blob_is_named(store: Store) -> None:
    digest = digest_of_bytes(b"never stored")
    reads: dict[str, Callable[[], object]] = {
        "open": lambda: store.open(digest),
        "read_into": lambda: store.read_into(digest, 0, memoryview(bytearray(1))),
        "size": lambda: store.size(digest),
        "verify": lambda: store.verify(digest),
        "age": lambda: store.age(digest),
    }
    for read in reads.values():
        with pytest.raises(DamagedBlob) as caught:
            read()
        assert (caught.value.expected, caught.value.found) == (str(digest), "missing")
        assert digest.hex in caught.value.subject
    store.delete(digest)
    assert list(store.blobs()) == []
    assert store.sweep_staging(NOW) == 0


def test_damage_is_found_by_verify(store: Store) -> None:
    data = random.Random(2).randbytes(BLOCK_BYTES + 1)
    digest = put(store, data).digest
    store.verify(digest)
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], data + b"x", b""):
        overwrite(store, digest, damaged)
        with pytest.raises(DamagedBlob):
            store.verify(digest)


# Housekeeping


def test_delete_and_listing(store: Store) -> None:
    kept, gone = put(store, b"kept"), put(store, b"gone")
    with fsspec.open(behind(store, "blobs/notes.txt"), "wb") as file:
        file.write(b"not a blob")
    store.delete(gone.digest)
    store.delete(gone.digest)
    assert list(store.blobs()) == [(kept.digest, 4)]


def test_a_blob_is_as_old_as_its_last_writing(store: Store) -> None:
    assert abs(store.age(put(store, b"new").digest)) < timedelta(seconds=30)


def test_a_good_store_passes_the_probe_and_nothing_is_left_of_it(store: Store) -> None:
    assert store.probe() == ()
    system, root = fsspec.url_to_fs(behind(store, ""))
    system.invalidate_cache()
    assert [path for path in system.find(root) if path.strip("/") != root.strip("/")] == []


def test_the_sweep_takes_what_is_old_enough(store: Store) -> None:
    put(store, b"a blob is not swept")
    with fsspec.open(behind(store, "staging/left-by-the-dead"), "wb") as file:
        file.write(b"half")
    assert store.sweep_staging(timedelta(hours=1)) == 0
    assert staged(store) == 1
    assert store.sweep_staging(NOW) == 1
    assert (staged(store), len(list(store.blobs()))) == (0, 1)


@pytest.mark.parametrize("store", ["disk", "memory"], indirect=True)  # to S3, a key is only a name
def test_a_store_below_a_file_fails_as_storage(store: Store) -> None:
    digest = put(store, b"data").digest
    below = Store(f"{store.url}/blobs/{digest.hex[:2]}/{digest.hex}/store")
    with pytest.raises(StorageFailed) as caught:
        put(below, b"data")
    assert caught.value.url == below.url
    assert caught.value.reason


@pytest.mark.parametrize("url", ["nosuch://bucket/store", "ftp://127.0.0.1:1/store"], ids=["scheme", "unreachable"])
def test_an_unusable_url_fails_at_first_use(url: str) -> None:
    store = Store(url)
    for use in (store.create, lambda: store.size(digest_of_bytes(b"")), lambda: list(store.blobs())):
        with pytest.raises(StorageFailed) as caught:
            use()
        assert (caught.value.url, bool(caught.value.reason)) == (url, True)


# Files of a location


def test_put_file_takes_any_file_of_a_location(store: Store, folder: Path) -> None:
    location = LocalLocation(folder)
    for path, size_bytes in location.files().items():
        data = (folder / path).read_bytes()
        assert store.put_file(location, path) == Blob(
            digest=digest_of_bytes(data), sha256=hashlib.sha256(data).hexdigest(), size_bytes=size_bytes
        )
    with pytest.raises(PathNotFound):
        store.put_file(location, "absent")
    assert (len(list(store.blobs())), staged(store)) == (4, 0)


class Unsteady:
    """A folder in which somebody writes to a file just after it was opened."""

    def __init__(self, folder: Path, new_content: bytes) -> None:
        self._folder, self._new_content = folder, new_content
        self._inner = LocalLocation(folder)
        self.url, self.files, self.identity = self._inner.url, self._inner.files, self._inner.identity
        self.read_into, self.local_path, self.close = self._inner.read_into, self._inner.local_path, self._inner.close

    def open(self, path: str) -> IO[bytes]:
        stream = self._inner.open(path)
        (self._folder / path).write_bytes(self._new_content)
        return stream


@pytest.mark.parametrize("new_content", [b"", b"x" * 4096, b"x" * 5000], ids=["truncated", "rewritten", "grown"])
def test_put_file_refuses_a_file_that_changes(store: Store, folder: Path, new_content: bytes) -> None:
    with pytest.raises(Changed) as caught:
        store.put_file(Unsteady(folder, new_content), "sub/c.bin")
    assert caught.value.subject == f"{folder}/sub/c.bin"
    assert caught.value.expected != caught.value.found
    assert (list(store.blobs()), staged(store)) == ([], 0)


# A stored folder is a location


@pytest.fixture
def both(store: Store, folder: Path) -> Iterator[tuple[Location, StoredFolder]]:
    location = LocalLocation(folder)
    entries = []
    for path in reversed(list(location.files())):
        blob = store.put_file(location, path)
        entries.append(FileEntry(path=path, size_bytes=blob.size_bytes, digest=blob.digest, sha256=blob.sha256))
    stored = StoredFolder(store, entries)
    yield location, stored
    location.close()
    stored.close()


def test_a_stored_folder_reads_like_the_folder_it_came_from(both: tuple[Location, StoredFolder]) -> None:
    location, stored = both
    assert list(stored.files().items()) == list(location.files().items())
    for path, size_bytes in location.files().items():
        with location.open(path) as expected, stored.open(path) as found:
            data = expected.read()
            assert found.read() == data
        assert stored.identity(path) == str(digest_of_bytes(data))
        buffers = [memoryview(bytearray(size_bytes // 2)) for _ in both]
        for side, buffer in zip(both, buffers, strict=True):
            side.read_into(path, size_bytes // 3, buffer)
            with pytest.raises(CorruptFile):
                side.read_into(path, size_bytes - 1, memoryview(bytearray(2)))
        assert buffers[0] == buffers[1]
        copy = stored.local_path(path)
        assert copy is None or copy.read_bytes() == data
    for side in both:
        for read in (side.open, side.identity, lambda path, side=side: side.read_into(path, 0, memoryview(b""))):
            with pytest.raises(PathNotFound):
                read("absent")


def test_a_stored_folder_is_named_by_its_content(both: tuple[Location, StoredFolder], store: Store) -> None:
    _, stored = both
    entries = [
        FileEntry(path=path, size_bytes=size_bytes, digest=Digest.parse(stored.identity(path)))
        for path, size_bytes in stored.files().items()
    ]
    assert StoredFolder(store, entries).url == stored.url
    assert StoredFolder(store, entries[1:]).url != stored.url
    assert StoredFolder(store, entries, "llama").url == "store:llama"


def test_threads_share_a_stored_folder_and_it_reopens(both: tuple[Location, StoredFolder]) -> None:
    location, stored = both
    with location.open("b.bin") as stream:
        data = stream.read()

    def matches(offset_bytes: int) -> bool:
        buffer = memoryview(bytearray(5000))
        stored.read_into("b.bin", offset_bytes, buffer)
        return bytes(buffer) == data[offset_bytes : offset_bytes + 5000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(matches, range(0, len(data) - 5000, 40_001)))
    stored.close()
    stored.close()
    assert matches(17)


def test_a_stored_folder_reports_missing_and_short_blobs(both: tuple[Location, StoredFolder], store: Store) -> None:
    _, stored = both
    digest, buffer = Digest.parse(stored.identity("sub/c.bin")), memoryview(bytearray(4096))
    overwrite(store, digest, b"short")
    with pytest.raises(DamagedBlob) as caught:
        stored.read_into("sub/c.bin", 0, buffer)
    assert caught.value.found == "5 bytes"
    stored.close()
    store.delete(digest)
    for read in (stored.open, stored.local_path, lambda path: stored.read_into(path, 0, buffer)):
        if read != stored.local_path or store.url.startswith("file:"):
            with pytest.raises(DamagedBlob) as caught:
                read("sub/c.bin")
            assert caught.value.found == "missing"


# A disk


def test_opening_touches_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    assert list(store.blobs()) == []
    assert store.sweep_staging(NOW) == 0
    store.delete(digest_of_bytes(b""))
    assert not (tmp_path / "store").exists()


def test_a_path_and_its_url_are_the_same_store(local: Store, tmp_path: Path) -> None:
    digest = put(local, b"data").digest
    by_path = Store(str(tmp_path / "a store" / "deep"))
    path = by_path.local_path(digest)
    assert path == tmp_path / "a store" / "deep" / "blobs" / digest.hex[:2] / digest.hex
    assert path.read_bytes() == b"data"
    with open_location(str(path.parent)).open(digest.hex) as stream:
        assert stream.read() == b"data"


PRELUDE = """
import os, random, sys, time
from registry.errors import StorageFailed
from registry.store import Store
store = Store(sys.argv[1])
def put(data):
    with store.create() as writer:
        writer.write(data)
        return writer.commit()
"""


def start(store: Store, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def result(child: subprocess.Popen[str]) -> str:
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 0
    return output.strip()


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=300)


def test_a_local_store_does_without_fsspec(local: Store) -> None:
    code = "store.verify(put(b'data').digest); print(*{'fsspec', 'torch'}.intersection(sys.modules))"
    assert result(start(local, code)) == ""


def test_a_writer_killed_in_the_middle_leaves_no_blob(local: Store) -> None:
    child = start(local, "w = store.create(); w.write(bytes(1 << 20)); print('half', flush=True); time.sleep(600)")
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    kill(child)
    assert (list(local.blobs()), staged(local)) == ([], 1)
    blob = put(local, bytes(2 << 20))
    local.verify(blob.digest)
    assert local.sweep_staging(NOW) == 1
    assert list(local.blobs()) == [(blob.digest, 2 << 20)]


def test_whatever_a_killed_writer_published_is_whole(local: Store) -> None:
    child = start(local, "while True: print(put(random.randbytes(300_000)).digest.hex, flush=True)")
    assert child.stdout is not None
    acknowledged = {child.stdout.readline().strip() for _ in range(5)}
    kill(child)
    published = [digest for digest, _ in local.blobs()]
    assert acknowledged <= {digest.hex for digest in published}
    for digest in published:
        local.verify(digest)


def test_a_blob_that_is_swept_while_it_is_put_again_is_written(local: Store) -> None:
    code = """
digest = put(b'data').digest
def sweep(event, arguments):
    if event == 'os.utime': os.unlink(arguments[0])
sys.addaudithook(sweep)
print(put(b'data').digest == digest)
"""
    assert result(start(local, code)) == "True"
    local.verify(digest_of_bytes(b"data"))


def test_processes_may_commit_the_same_blobs_at_once(local: Store) -> None:
    code = """
print('ready', flush=True); sys.stdin.readline()
for n in range(60): put(n.to_bytes(2, 'big') * 20_000)
print('done')
"""
    children = [start(local, code) for _ in range(3)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [result(child) for child in children] == ["done"] * 3
    assert dict(local.blobs()) == {digest_of_bytes(n.to_bytes(2, "big") * 20_000): 40_000 for n in range(60)}
    assert staged(local) == 0


def test_a_full_disk_fails_as_storage_and_leaves_nothing(local: Store) -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
small = put(bytes(1000))
writer = store.create()
for attempt in (lambda: put(bytes(4 << 20)), lambda: [writer.write(bytes(300_000)) for _ in range(9)]):
    try: attempt()
    except StorageFailed as error: print(error.url == store.url, error.reason)
"""
    assert result(start(local, code)).splitlines() == ["True file too large"] * 2
    assert (list(local.blobs()), staged(local)) == ([(digest_of_bytes(bytes(1000)), 1000)], 0)


def test_a_folder_that_may_not_be_written_fails_as_storage() -> None:
    with tempfile.TemporaryDirectory() as name:
        put(Store(name), b"readable")
        for folder in (Path(name), Path(name, "staging")):
            folder.chmod(0o555)
        code = """
if os.getuid() == 0: os.setuid(65534)  # permissions do not bind root
print([size for _, size in store.blobs()])
try: put(b'data')
except StorageFailed as error: print(error.url == store.url, error.reason)
"""
        assert result(start(Store(name), code)).splitlines() == ["[8]", "True permission denied"]
        for folder in (Path(name), Path(name, "staging")):
            folder.chmod(0o755)
