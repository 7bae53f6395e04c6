"""What only S3 can suffer: lost answers, dead uploads, ignored conditions; and what only it can do: copy by itself."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import servers
from blake3 import blake3
from s3_proxy import Passed, Spoil, spoiling

from registry.errors import InvalidSetting, StorageFailed
from registry.locations import Origin, StoredObject, open_location
from registry.refs import Digest
from registry.s3 import PART_BYTES, S3Files
from registry.store import Blob, Store

NOW = timedelta(0)


def noise(size_bytes: int) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


def put(store: Store, data: bytes, expected: Digest | None = None) -> Blob:
    with store.create(expected=expected) as writer:
        writer.write(data)
        return writer.commit()


def uploads(s3: servers.Server, url: str) -> list[str]:
    """Keys of uploads in parts that are not complete."""
    found = servers.s3_filesystem(s3.port).call_s3("list_multipart_uploads", Bucket=url.split("/")[2])
    return [upload["Key"] for upload in found.get("Uploads", ())]


@contextmanager
def behind(s3: servers.Server, spoil: Spoil = lambda method, path: "") -> Iterator[Passed]:
    """Have stores that are opened in the block reach the server through a proxy."""
    with spoiling(s3.port, spoil) as passed, pytest.MonkeyPatch.context() as environment:
        for name, value in servers.s3_environment(passed.port).items():
            environment.setenv(name, value)
        import fsspec

        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield passed
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def every(nth: int, method: str, fate: str) -> Spoil:
    """A fate for one of so many requests of a method that are made for the first time."""
    seen: Counter[str] = Counter()

    def spoil(found: str, path: str) -> str:
        is_first = not seen[path]
        seen[path] += 1
        return fate if found == method and is_first and len(seen) % nth == 0 else ""

    return spoil


# Faults


@pytest.mark.parametrize("fate", ["busy", "lost", "unheard"])
@pytest.mark.parametrize("size_bytes", [1000, 3 * PART_BYTES])
def test_requests_that_fail_are_made_again(s3: servers.Server, s3_url: str, fate: str, size_bytes: int) -> None:
    data = noise(size_bytes)
    with behind(s3, every(1, "PUT", fate)):
        blob = put(Store(s3_url + "/store"), data)
    assert blob.digest == Digest(blake3(data).hexdigest())
    assert list(Store(s3_url + "/store").blobs()) == [(blob.digest, size_bytes)]
    Store(s3_url + "/store").verify(blob.digest)


@pytest.mark.parametrize("is_known", [False, True])
def test_an_answer_that_is_lost_at_the_end_is_found_out(s3: servers.Server, s3_url: str, is_known: bool) -> None:
    data = noise(PART_BYTES + 1)
    digest = Digest(blake3(data).hexdigest())
    with behind(
        s3, lambda method, path: "unheard" if method == "POST" and "uploads" not in path and next(once) else ""
    ):
        once = iter([True, *[False] * 99])
        put(Store(s3_url + "/store"), data, digest if is_known else None)
    assert list(Store(s3_url + "/store").blobs()) == [(digest, len(data))]


def test_a_store_that_stays_broken_fails_as_storage(s3: servers.Server, s3_url: str) -> None:
    with behind(s3, lambda method, path: "busy" if "partNumber=2" in path else ""):
        store = Store(s3_url + "/store")
        with pytest.raises(StorageFailed) as caught:
            put(store, bytes(3 * PART_BYTES))
        assert (caught.value.url, caught.value.reason) == (store.url, "busy")
    assert (list(Store(s3_url).blobs()), uploads(s3, s3_url)) == ([], [])


def test_a_wrong_key_or_bucket_is_said(s3: servers.Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageFailed) as caught:
        Store("s3://no-such-bucket-here/store").size(Digest("0" * 64))
    assert caught.value.reason == "there is no such bucket"
    with behind(s3):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for use in (
            Store(s3_url).probe,
            lambda: Store(s3_url).size(Digest("0" * 64)),
            lambda: list(Store(s3_url).blobs()),
        ):
            with pytest.raises(StorageFailed):
                use()


def test_a_store_that_ignores_conditions_is_refused(s3: servers.Server, s3_url: str) -> None:
    with behind(s3, lambda method, path: "careless" if method == "PUT" else ""):
        with pytest.raises(InvalidSetting) as caught:
            Store(s3_url + "/store").probe()
        assert "ignores write conditions" in caught.value.reason
    assert [listed for listed in servers.s3_filesystem(s3.port).find(s3_url[5:]) if "/probe/" in listed] == []


def test_a_clock_that_is_wrong_is_found(s3: servers.Server, s3_url: str) -> None:
    with behind(s3, lambda method, path: "late"):
        (finding,) = Store(s3_url + "/store").probe()
    assert re.fullmatch(r"its clock is 1\d\d s behind this machine's", finding)


# Dead writers


KILLED = """
import sys
from registry.refs import Digest
from registry.store import Blob, Store
writer = Store(sys.argv[1]).create(expected=Digest(sys.argv[2]) if sys.argv[2] else None)
writer.write(bytes(3 << 24)); writer.write(b'more')
print('half', flush=True); sys.stdin.read()
"""


@pytest.mark.parametrize("expected", ["", "ab" * 32], ids=["found digest", "known digest"])
def test_a_writer_killed_in_the_middle_leaves_no_blob(s3: servers.Server, s3_url: str, expected: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, s3_url + "/store", expected],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=300)
    system, bucket = servers.s3_filesystem(s3.port), s3_url[5:]
    others = ("store/blobs/notes", "store2/" + uploads(s3, s3_url)[0].partition("/")[2])
    for key in others:
        system.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    store = Store(s3_url + "/store")
    assert list(store.blobs()) == []
    assert store.sweep_staging(timedelta(hours=1)) == 0
    assert len(uploads(s3, s3_url)) == 3
    assert store.sweep_staging(NOW) == 1
    assert sorted(uploads(s3, s3_url)) == sorted(others)


# Copies by the server


def test_bytes_that_the_store_has_are_not_sent_again(s3: servers.Server, s3_url: str) -> None:
    data, head = noise(3 * PART_BYTES), noise(1000)
    system, bucket = servers.s3_filesystem(s3.port), s3_url[5:]
    etag = system.call_s3("put_object", Bucket=bucket, Key="base", Body=data)["ETag"]
    expected = head + data[7:] + head
    for source, is_copied in (
        (StoredObject(bucket, "base", etag), True),
        (StoredObject(bucket, "base", '"changed"'), False),
        (StoredObject(bucket, "gone", etag), False),
    ):
        with behind(s3) as passed:
            store = Store(f"{s3_url}/{source.key}{is_copied}")
            origin = Origin(source, 7)
            with store.create() as writer:
                writer.write(head)
                for start in range(7, len(data), 5_000_000):
                    piece = memoryview(data)[start : start + 5_000_000]
                    writer.write(piece, origin)
                    origin = origin.after(len(piece))
                writer.write(head)
                blob = writer.commit(expected=Digest(blake3(expected).hexdigest()))
            store.verify(blob.digest)
            assert (passed.sent_bytes < 2 * PART_BYTES + 2000) is is_copied


def test_a_very_large_blob_is_copied_from_staging_in_parts(s3: servers.Server, s3_url: str) -> None:
    data = noise(PART_BYTES + 1000)
    key = f"blobs/ab/{'ab' * 32}"
    files = S3Files(s3_url, copy_bytes=7_000_000)
    for _ in range(2):  # the second time it is there
        upload = files.upload("", len(data))
        upload.write(memoryview(data), None)
        upload.publish(key, len(data))
        upload.cancel()
        assert (list(files.walk("blobs")), list(files.walk("staging"))) == ([(key, len(data))], [])
    assert uploads(s3, s3_url) == []
    assert servers.s3_filesystem(s3.port).cat_file(f"{s3_url}/{key}") == data


def test_only_an_object_can_be_copied(s3_url: str, tmp_path: os.PathLike[str]) -> None:
    store = Store(s3_url + "/store")
    blob = put(store, b"data")
    folder = open_location(s3_url + "/store/blobs/" + blob.digest.hex[:2])
    found = folder.stored_object(blob.digest.hex)
    assert found == store.stored_object(blob.digest)
    assert found is not None
    assert (found.bucket, found.key) == (s3_url[5:], f"store/blobs/{blob.digest.hex[:2]}/{blob.digest.hex}")
    local = Store(str(tmp_path))
    assert local.stored_object(put(local, b"data").digest) is None
