"""A file on its way out: whole, a range of it, or that nothing has changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from registry.server.answering import is_among
from registry.server.flowing import flowing

Pieces = Callable[[int, int], Iterator[bytes | memoryview]]
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_BYTES = "application/octet-stream"


def send_file(
    pieces: Pieces,
    size: int,
    tag: str,
    asked: Headers,
    *,
    name: str,
    extra: Mapping[str, str] | None = None,
    is_head: bool = False,
) -> Response:
    """The answer that a file is. What goes wrong with the first piece still becomes an error; afterwards, the connection ends.

    Args:
        pieces: gives the bytes from a place up to another, each piece valid until the next; called only for bytes that are sent.
        size: of the whole file, in bytes.
        tag: what names these bytes, without quotes.
        asked: the request's headers.
        name: the file's, for who saves it.
        extra: more headers.
        is_head: only headers are wanted.

    Raises:
        HTTPException: 416, none of the bytes asked for are there.
    """
    quoted = f'"{tag}"'
    told = {
        "ETag": quoted,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Vary": "Authorization",
        "Content-Disposition": _disposition(name),
        **(extra or {}),
    }
    if is_among(quoted, asked.get("if-none-match", "")):
        return Response(status_code=304, headers=told)
    wanted = _range(asked, quoted, size)
    start, end = wanted or (0, size)
    if wanted is not None and start >= end:
        raise HTTPException(416, headers={"Content-Range": f"bytes */{size}"})
    if wanted is not None:
        told["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    told["Content-Length"] = str(end - start)
    status = 200 if wanted is None else 206
    if is_head or start == end:
        return Response(status_code=status, headers=told, media_type=_BYTES)
    rest = pieces(start, end)
    return StreamingResponse(flowing(next(rest, b""), rest), status, told, _BYTES)


def _disposition(name: str) -> str:
    """How a file is to be called, also for those who read plain names only, as curl does."""
    plain = "".join(each if " " <= each <= "~" and each not in '"\\' else "_" for each in name)
    return f"attachment; filename*=UTF-8''{quote(name, errors='surrogatepass')}; filename=\"{plain}\""


def _range(asked: Headers, tag: str, size: int) -> tuple[int, int] | None:
    """The bytes that are asked for, from and up to; None for all. Several ranges at once are not answered: all is."""
    match = _RANGE.fullmatch(asked.get("range", "").replace(" ", ""))
    if match is None or match[1] == match[2] == "" or asked.get("if-range", tag) != tag:
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size if int(match[2]) else 0
    return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
