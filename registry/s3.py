"""Object stores of Amazon's kind: conditional writes, uploads in parts, copies by the server. Everything goes through s3fs's client.

A file of one part is written under its key by one request, on the condition that nothing is there. A larger one is uploaded in parts, several
at once; where the key is only known in the end, to staging, from where the server copies it. Nothing appears under a key before it is complete.
"""

from __future__ import annotations

import io
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import datetime
from functools import cached_property, partial
from http import HTTPStatus
from typing import Any, final

from registry.errors import StorageFailed
from registry.locations import Origin, StoredObject, find_object, open_filesystem, status_of
from registry.objects import STAGING, OpenBlob, RemoteBlob, Upload, holds, staging_key, sweep_staged

PART_BYTES = 16 << 20
_MOST_PARTS = 10_000
_AT_ONCE = (
    4  # parts under way, of all uploads together: they take so many times a part's memory, and one more for each upload
)
_CONFLICT_PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0)
_OURS = re.compile(r"staging/[0-9a-f]{32}|blobs/[0-9a-f]{2}/[0-9a-f]{64}")


@final
class S3Files:
    """A bucket, or what is below a prefix of it. Opening it touches nothing.

    Args:
        url: where it is.
        copy_bytes: larger objects are copied by the server in parts of this size, several at once.
    """

    def __init__(self, url: str, *, copy_bytes: int = 512 << 20) -> None:
        self._url, self._copy_bytes = url, copy_bytes
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        self._threads = ThreadPoolExecutor(_AT_ONCE, "upload")

    @cached_property
    def _opened(self) -> tuple[Any, str, str]:
        system, root = open_filesystem(self._url)
        bucket, _, prefix = root.strip("/").partition("/")
        return system, bucket, f"{prefix}/" if prefix else ""

    @cached_property
    def _client(self) -> Any:
        """s3fs for requests only: it must not try again by itself, with a body that is read already. The client beneath it rewinds that."""
        system = self._opened[0]
        client = type(system)(**system.storage_options, skip_instance_cache=True)
        client.retries = 1
        return client

    def call(self, method: str, **arguments: Any) -> Mapping[str, Any]:
        """One request of the client, to this bucket."""
        answer: Mapping[str, Any] = self._client.call_s3(method, Bucket=self._opened[1], **arguments)
        return answer

    def at(self, key: str) -> str:
        """A key's name in the bucket."""
        return self._opened[2] + key

    def upload(self, key: str, size_bytes: int) -> Upload:
        return _Upload(self, key or staging_key(), size_bytes, is_staged=not key)

    def replace(self, key: str, size_bytes: int) -> Upload:
        """Start writing a file in place of one that may be there. `size_bytes` as for `upload`.

        Nobody else writes it then: uploads in parts that others began and did not end, as when they were killed, are given up.
        """
        return _Upload(self, key, size_bytes, replaces=True)

    def claim(self, key: str, data: bytes) -> bool:
        return self._claim(key, io.BytesIO(data))

    def _claim(self, key: str, data: io.BytesIO) -> bool:
        for pause in _CONFLICT_PAUSES:
            data.seek(0)
            try:
                self.call("put_object", Key=self.at(key), Body=data, IfNoneMatch="*")
            except OSError as error:
                if status_of(error) == HTTPStatus.PRECONDITION_FAILED:
                    return False
                if status_of(error) != HTTPStatus.CONFLICT:
                    raise
                time.sleep(pause)  # somebody else is just writing it
            else:
                return True
        raise StorageFailed(self._url, f"{key} is being written all the time")

    def put(self, key: str, data: io.BytesIO, *, replaces: bool) -> None:
        """Write a file of one part; one of that size that is there stays, unless it is to be replaced."""
        if replaces or not (self._claim(key, data) or holds(self, key, len(data.getbuffer()))):
            data.seek(0)
            self.call("put_object", Key=self.at(key), Body=data)

    def open(self, key: str) -> OpenBlob:
        system, bucket, _ = self._opened
        return RemoteBlob(system, f"{bucket}/{self.at(key)}", size_bytes=self.size(key))

    def head(self, key: str) -> Mapping[str, Any]:
        """What the server says about a file.

        Raises:
            FileNotFoundError: it is not there; the bucket is.
            OSError: the bucket is not there, or the server does not answer.
        """
        try:
            return self.call("head_object", Key=self.at(key))
        except FileNotFoundError:
            try:
                self.call("head_bucket")
            except FileNotFoundError as error:
                raise StorageFailed(self._url, "there is no such bucket") from error
            raise

    def size(self, key: str) -> int:
        return int(self.head(key)["ContentLength"])

    def age_seconds(self, key: str) -> float:
        return _age_seconds(self.head(key)["LastModified"])

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        start = len(self.at(""))
        for page in self._pages("list_objects_v2", {"ContinuationToken": "NextContinuationToken"}, folder):
            for found in page.get("Contents", ()):
                yield found["Key"][start:], int(found["Size"])

    def _pages(self, method: str, marks: Mapping[str, str], folder: str) -> Iterator[Mapping[str, Any]]:
        return self._following(method, marks, Prefix=self.at(f"{folder}/"))

    def _following(self, method: str, marks: Mapping[str, str], **arguments: Any) -> Iterator[Mapping[str, Any]]:
        """All pages of an answer. `marks` are the arguments of the next request, and what the last answer calls them."""
        page = self.call(method, **arguments)
        yield page
        while page.get("IsTruncated"):
            page = self.call(method, **arguments, **{argument: page[name] for argument, name in marks.items()})
            yield page

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self.call("delete_object", Key=self.at(key))

    def sweep_staging(self, older_than_seconds: float) -> int:
        swept = sweep_staged(self, older_than_seconds)
        for key, upload, age_seconds in self._uploads():
            with suppress(FileNotFoundError):  # completed or aborted since it was listed
                if min(age_seconds, self._idle_seconds(key, upload)) >= older_than_seconds:
                    self.call("abort_multipart_upload", Key=key, UploadId=upload)
                    swept += 1
        return swept

    def _uploads(self) -> Iterator[tuple[str, str, float]]:
        """Uploads in parts of ours that are not complete: name in the bucket, id, age in seconds. Those of others are none of our business."""
        for folder in (STAGING, "blobs"):
            for found in self._incomplete(f"{folder}/"):
                if _OURS.fullmatch(found["Key"].removeprefix(self.at(""))):
                    yield found["Key"], found["UploadId"], _age_seconds(found["Initiated"])

    def _incomplete(self, start: str) -> Iterator[Mapping[str, Any]]:
        """Uploads in parts that are not complete, of all keys that begin so."""
        marks = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._following("list_multipart_uploads", marks, Prefix=self.at(start)):
            yield from page.get("Uploads", ())

    def give_up(self, key: str) -> None:
        """Drop every upload in parts to a key."""
        with suppress(OSError):  # who may not list them can still write; a rule of the bucket's then has to clear them
            for found in [each for each in self._incomplete(key) if each["Key"] == self.at(key)]:
                self.call("abort_multipart_upload", Key=found["Key"], UploadId=found["UploadId"])

    def _idle_seconds(self, key: str, upload: str) -> float:
        """How long ago an upload got its last part; forever where it has none."""
        pages = self._following("list_parts", {"PartNumberMarker": "NextPartNumberMarker"}, Key=key, UploadId=upload)
        ages = [_age_seconds(part["LastModified"]) for page in pages for part in page.get("Parts", ())]
        return min(ages, default=math.inf)

    def stored_object(self, key: str) -> StoredObject | None:
        return find_object(self._client, f"{self._opened[1]}/{self.at(key)}")

    def submit(self, task: Callable[[], str]) -> Future[str]:
        """Have a part sent while the next one is made; waits where too many are under way."""
        self._room.acquire()
        try:
            future = self._threads.submit(task)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future

    def complete(self, key: str, upload: str, etags: Sequence[str], size_bytes: int, *, replaces: bool) -> bool:
        """Make a file of an upload's parts. A file of that size that is there stays, unless it is to be replaced.

        Returns:
            Whether the upload was used up.

        Raises:
            OSError: the server does not, or the file has another size than was sent.
        """
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]

        def run(**condition: str) -> None:
            self.call(
                "complete_multipart_upload",
                Key=self.at(key),
                UploadId=upload,
                MultipartUpload={"Parts": parts},
                **condition,
            )

        return self._make(run, key, size_bytes, replaces=replaces)

    def copy(self, source: str, key: str, size_bytes: int) -> None:
        """Have the server copy a staged file to its final key, where a file of that size that is there stays."""
        origin = {"Bucket": self._opened[1], "Key": self.at(source)}
        if size_bytes > self._copy_bytes:
            self._copy_in_parts(origin, key, size_bytes)
            return

        def run(**condition: str) -> None:
            self.call("copy_object", Key=self.at(key), CopySource=origin, **condition)

        self._make(run, key, size_bytes, replaces=False)

    def _copy_in_parts(self, origin: Mapping[str, str], key: str, size_bytes: int) -> None:
        upload = self.call("create_multipart_upload", Key=self.at(key))["UploadId"]
        part_bytes = max(self._copy_bytes, math.ceil(size_bytes / _MOST_PARTS))
        parts: list[Future[str]] = []
        try:
            for number, start in enumerate(range(0, size_bytes, part_bytes), 1):
                end = min(start + part_bytes, size_bytes)
                parts.append(self.submit(partial(self.copy_part, key, upload, number, origin, start, end)))
            self.complete(key, upload, [part.result() for part in parts], size_bytes, replaces=False)
        finally:
            self.abort(key, upload, parts)

    def copy_part(
        self, key: str, upload: str, number: int, origin: Mapping[str, str], start: int, end: int, **condition: str
    ) -> str:
        """Have the server copy a range of an object as a part; gives its ETag."""
        found = self.call(
            "upload_part_copy",
            Key=self.at(key),
            UploadId=upload,
            PartNumber=number,
            CopySource=origin,
            CopySourceRange=f"bytes={start}-{end - 1}",
            **condition,
        )
        return str(found["CopyPartResult"]["ETag"])

    def abort(self, key: str, upload: str, parts: Sequence[Future[str]]) -> None:
        """Drop an upload's parts, once none is under way any more. Harmless for one that is complete."""
        for part in parts:
            part.cancel()
        wait(parts)
        with suppress(FileNotFoundError):
            self.call("abort_multipart_upload", Key=self.at(key), UploadId=upload)

    def _make(self, run: Callable[..., None], key: str, size_bytes: int, *, replaces: bool) -> bool:
        """Run what puts a large file under a key; unless it replaces what is there, on the condition that none of its size is.

        Returns:
            Whether that was needed, and done.
        """
        try:
            run(**({} if replaces else {"IfNoneMatch": "*"}))
        except OSError as error:
            # Somebody else has it there, or is about to. Not found: done by a first try whose answer was lost.
            expected = (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND)
            if replaces or status_of(error) not in expected:
                raise
            if self._comes(key, size_bytes):
                return False
            run()
        if not holds(self, key, size_bytes):
            raise StorageFailed(self._url, f"{key} has another size than was sent: {size_bytes} bytes")
        return True

    def _comes(self, key: str, size_bytes: int) -> bool:
        """Whether a file of that size is there, or is within a few seconds."""
        for pause in _CONFLICT_PAUSES:
            with suppress(FileNotFoundError):
                return self.size(key) == size_bytes
            time.sleep(pause)
        return False


@final
class _Upload:
    """A file on its way: kept back until it is more than one part, so that a small one takes a single request."""

    def __init__(
        self, files: S3Files, key: str, size_bytes: int, *, is_staged: bool = False, replaces: bool = False
    ) -> None:
        self._files, self._key = files, key
        self._is_staged, self._replaces = is_staged, replaces
        self._part_bytes = max(PART_BYTES, math.ceil(size_bytes / _MOST_PARTS))
        self._part = _Part()
        self._id = ""
        self._sent: list[Future[str]] = []
        self._under_way: list[Future[str]] = []

    def write(self, data: memoryview, origin: Origin | None) -> None:
        done = 0
        while done < len(data):
            if self._part.size_bytes == self._part_bytes:
                self._send()
            piece = data[done : done + self._part_bytes - self._part.size_bytes]
            self._part.add(piece, origin and origin.after(done))
            done += len(piece)

    def _send(self) -> None:
        if not self._id:
            if self._replaces:
                self._files.give_up(self._key)
            self._id = self._files.call("create_multipart_upload", Key=self._files.at(self._key))["UploadId"]
        for part in [part for part in self._under_way if part.done()]:
            part.result()  # raises what became of it
            self._under_way.remove(part)
        number = len(self._sent) + 1
        self._sent.append(self._files.submit(partial(self._send_part, number, self._part)))
        self._under_way.append(self._sent[-1])
        self._part = _Part()

    def _send_part(self, number: int, part: _Part) -> str:
        if part.origin is not None:
            source, start = part.origin.source, part.origin.offset_bytes
            place, end = {"Bucket": source.bucket, "Key": source.key}, start + part.size_bytes
            with suppress(OSError):  # changed since, or not to be copied from: it is sent instead
                condition = {"CopySourceIfMatch": source.etag}
                return self._files.copy_part(self._key, self._id, number, place, start, end, **condition)
        part.data.seek(0)
        key = self._files.at(self._key)
        sent = self._files.call("upload_part", Key=key, UploadId=self._id, PartNumber=number, Body=part.data)
        return str(sent["ETag"])

    def publish(self, key: str, size_bytes: int) -> None:
        if not self._id:
            self._files.put(key, self._part.data, replaces=self._replaces)
            return
        self._send()
        etags = [part.result() for part in self._sent]
        if self._files.complete(self._key, self._id, etags, size_bytes, replaces=self._replaces):
            self._id = ""
        if self._is_staged:
            try:
                self._files.copy(self._key, key, size_bytes)
            finally:
                self._files.delete(self._key)

    def cancel(self) -> None:
        upload, self._id, self._part = self._id, "", _Part()
        if upload:
            self._files.abort(self._key, upload, self._sent)


@final
class _Part:
    """The bytes of a part, and where an S3 store has all of them in one piece, if it does."""

    def __init__(self) -> None:
        self.data = io.BytesIO()
        self.origin: Origin | None = None

    @property
    def size_bytes(self) -> int:
        return self.data.tell()

    def add(self, data: memoryview, origin: Origin | None) -> None:
        """Append bytes, and see whether they lie behind the last ones there, too."""
        if not self.size_bytes:
            self.origin = origin
        elif self.origin is not None and origin != self.origin.after(self.size_bytes):
            self.origin = None
        self.data.write(data)


def _age_seconds(at: datetime) -> float:
    return time.time() - at.timestamp()
