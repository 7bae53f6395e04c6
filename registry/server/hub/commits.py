"""A commit of a Hub client as it streams in: lines of JSON, of which those of files carry their bytes in base64.

Such a line may be as long as a file is. Its bytes go to the store piece by piece, whether the file's path comes before them or after.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, final

from registry.errors import BlobSwept, CorruptFile, InvalidInput, TooLarge
from registry.locations import MAX_FILES
from registry.manifest import FileEntry

_LINE_BYTES = 1 << 20  # of a line, without a file's bytes
# Within a JSON string its quotes would be escaped: this is a key.
_CONTENT = re.compile(rb'[{,]\s*"content"\s*:\s*"')
_QUANTUM = 4  # characters of base64 that are bytes of their own
_SHA256 = re.compile(r"[0-9a-f]{64}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a client wants to have committed: files that are in the store by now, and paths of files and folders that are to go.

    `message` is the summary, with the description below it; `parent` the commit that it is to follow, empty where that does not matter.
    """

    message: str
    parent: str
    files: tuple[FileEntry, ...]
    deleted: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """Where a commit's files go: `take` stores bytes; `sent` gives what came before under a SHA-256, or None."""

    take: Callable[[Iterable[bytes]], FileEntry]
    sent: Callable[[str], FileEntry | None]


def read_commit(pieces: Iterable[bytes], intake: Intake) -> Commit:
    """Read a commit, and store its files.

    Args:
        pieces: the body.
        intake: where its files go.

    Raises:
        InvalidInput: it is none, or asks for what there is not.
        CorruptFile: a path leads out of its folder, or a size is not the announced one.
        BlobSwept: a file that is told of by its SHA-256 was not sent.
        TooLarge: too many files, or a line is too long.
    """
    header: dict[str, Any] = {}
    files: dict[str, FileEntry] = {}
    deleted: list[str] = []
    for key, value, entry in _operations(_Lines(pieces), intake.take):
        match key:
            case "header":
                header = value
            case "file":
                files[_text(value, "path")] = _regular(value, entry)
            case "lfsFile":
                files[_text(value, "path")] = _large(value, intake.sent)
            case "deletedFile" | "deletedFolder":
                deleted.append(_text(value, "path").rstrip("/"))
            case _:
                raise InvalidInput("key", str(key)[:80], "expected header, file, lfsFile, deletedFile or deletedFolder")
        if len(files) > MAX_FILES:
            raise TooLarge("files", len(files), f"at most {MAX_FILES} in a commit")
    parts = (str(header.get(name) or "").strip() for name in ("summary", "description"))
    return Commit(
        message="\n\n".join(filter(None, parts)),
        parent=str(header.get("parentCommit") or ""),
        files=tuple(files[path] for path in sorted(files)),
        deleted=tuple(deleted),
    )


def _regular(value: dict[str, Any], entry: FileEntry | None) -> FileEntry:
    if entry is None or value.get("encoding", "base64") != "base64":
        raise InvalidInput("file", _text(value, "path"), "expected its content in base64")
    return replace(entry, path=_text(value, "path"))


def _large(value: dict[str, Any], sent: Callable[[str], FileEntry | None]) -> FileEntry:
    path, oid = _text(value, "path"), _text(value, "oid")
    if not _SHA256.fullmatch(oid):
        raise InvalidInput("oid", oid[:80], "expected a SHA-256 of 64 hex digits")
    entry = sent(oid)
    if entry is None:
        raise BlobSwept(path, f"sha256:{oid}", "not sent")
    if value.get("size", entry.size_bytes) != entry.size_bytes:
        raise CorruptFile(path, f"it has {entry.size_bytes} bytes, not {value['size']}")
    return replace(entry, path=path)


def _text(value: dict[str, Any], key: str) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not found:
        raise InvalidInput(key, "", "expected text")
    return found


# -- lines


def _operations(
    lines: _Lines, take: Callable[[Iterable[bytes]], FileEntry]
) -> Iterator[tuple[object, dict[str, Any], FileEntry | None]]:
    """The operations of a commit: key, value, and what was stored of its bytes, if it has any."""
    while (head := lines.head()) is not None:
        entry = None
        if _CONTENT.search(head):
            entry = take(lines.content())
            head += lines.tail()
        if not head.strip():
            continue
        try:
            found = json.loads(head)
        except (ValueError, RecursionError) as error:
            raise InvalidInput("body", "", f"expected a line of JSON: {error}") from error
        value = found.get("value") if isinstance(found, dict) else None
        if not isinstance(value, dict):
            raise InvalidInput("body", "", "expected lines of JSON objects with key and value")
        yield found.get("key"), value, entry


@final
class _Lines:
    """A body, line by line; of a line, what comes before a file's bytes, these, and what comes after."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._held = iter(pieces), bytearray()

    def head(self) -> bytes | None:
        """A line up to its bytes, or all of it where it has none; None at the end."""
        while True:
            end = self._held.find(b"\n") + 1
            if match := _CONTENT.search(self._held, 0, end or len(self._held)):
                return self._cut(match.end())
            if end:
                return self._cut(end)
            if len(self._held) > _LINE_BYTES:
                raise TooLarge("body", "", f"at most {_LINE_BYTES} bytes in a line, without what a file has")
            if not self._more():
                return self._cut(len(self._held)) or None

    def content(self) -> Iterator[bytes]:
        """The bytes that a line's base64 stands for."""
        while (end := self._held.find(b'"')) < 0:
            yield _decoded(self._cut(len(self._held) // _QUANTUM * _QUANTUM))
            if not self._more():
                raise InvalidInput("body", "", "it ends within a file's content")
        yield _decoded(self._cut(end))

    def tail(self) -> bytes:
        """The rest of a line."""
        while not (end := self._held.find(b"\n") + 1):
            if len(self._held) > _LINE_BYTES:
                raise TooLarge("body", "", f"at most {_LINE_BYTES} bytes in a line, without what a file has")
            if not self._more():
                return self._cut(len(self._held))
        return self._cut(end)

    def _more(self) -> bool:
        piece = next(self._pieces, b"")
        self._held += piece
        return bool(piece)

    def _cut(self, count: int) -> bytes:
        found = bytes(memoryview(self._held)[:count])
        del self._held[:count]
        return found


def _decoded(text: bytes) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        raise InvalidInput("content", "", f"not base64: {error}") from error
