"""Answers that are made while they are sent: nobody ever holds them whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Generator, Iterator
from functools import partial
from typing import Any

import anyio.to_thread
from anyio import CancelScope
from starlette.responses import Response, StreamingResponse

from registry.codec import plain

_PIECE_BYTES = 1 << 16


async def flowing(first: bytes | memoryview, rest: Iterator[bytes | memoryview]) -> AsyncIterator[bytes | memoryview]:
    """Pieces as they are sent: while one is on its way, a thread gets the next. Whatever they are read from is let go of in a thread, too."""
    try:
        yield first
        while (piece := await anyio.to_thread.run_sync(partial(next, rest, None))) is not None:
            yield piece
    finally:
        if isinstance(rest, Generator):
            with CancelScope(shield=True):
                await anyio.to_thread.run_sync(rest.close)


def send_list(values: Iterator[object]) -> Response:
    """A list in JSON. What goes wrong with its first piece still becomes an error; afterwards, the connection ends."""
    pieces = _listed(values)
    return StreamingResponse(flowing(next(pieces), pieces), 200, {"Cache-Control": "no-store"}, "application/json")


def _listed(values: Iterator[object]) -> Iterator[bytes]:
    piece, between = bytearray(b"["), b""
    for value in values:
        piece += between + json_bytes(plain(value))
        between = b","
        if len(piece) >= _PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece + b"]")


def json_bytes(document: Any) -> bytes:
    """JSON as it is sent."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
