"""A proxy before a server that loses answers and cuts what is sent, as bad lines do. It knows just enough of HTTP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_BLOCK_BYTES = 16 << 10


@dataclass
class Cut:
    """The next `times` requests that start so lose their connection: after `sent` bytes of their body, or after `received` of the answer's,
    which was `late_seconds` in coming."""

    start: str
    sent: int | None = None
    received: int = 0
    times: int = 1
    late_seconds: float = 0.0


@dataclass
class Line:
    """What the proxy is to do, and the first lines of the requests that came; `answered` of those whose answer was passed on whole."""

    url: str
    cuts: list[Cut] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)

    def cut(self, first: str) -> Cut | None:
        for each in self.cuts:
            if each.times and first.startswith(each.start):
                each.times -= 1
                return each
        return None


class _Over(Exception):
    """A side has hung up, or is to see the other do so."""


@contextmanager
def bad_line(server_url: str, at: int = 0) -> Iterator[Line]:
    """Run the proxy; `url` is where it listens, on any port or on that."""
    host, _, port = server_url.partition("://")[2].partition(":")
    listener = socket.create_server(("127.0.0.1", at))
    line = Line(f"http://127.0.0.1:{listener.getsockname()[1]}")

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=_serve, args=(near, (host, int(port)), line), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield line
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _serve(near: socket.socket, server: tuple[str, int], line: Line) -> None:
    with near, socket.create_connection(server) as far, suppress(OSError, _Over):
        while True:
            head, rest = _head(near)
            first = head.decode("latin-1").partition("\r\n")[0]
            line.asked.append(first)
            cut = line.cut(first)
            far.sendall(head)
            _pass(near, far, rest, _length(head), cut.sent if cut else None)
            head, rest = _head(far)
            if cut and not cut.received:
                time.sleep(cut.late_seconds)
                raise _Over
            near.sendall(head)
            length = 0 if first.startswith("HEAD ") else _length(head)
            _pass(far, near, rest, length, cut.received if cut else None)
            line.answered.append(first)


def _head(source: socket.socket) -> tuple[bytes, bytes]:
    found = b""
    while b"\r\n\r\n" not in found:
        if not (block := source.recv(_BLOCK_BYTES)):
            raise _Over
        found += block
    head, end, rest = found.partition(b"\r\n\r\n")
    return head + end, rest


def _length(head: bytes) -> int:
    for each in head.lower().split(b"\r\n"):
        if each.startswith(b"content-length:"):
            return int(each.partition(b":")[2])
    return 0


def _pass(source: socket.socket, target: socket.socket, block: bytes, length: int, most: int | None) -> None:
    done = 0
    while done < length:
        block = block or source.recv(min(_BLOCK_BYTES, length - done))
        if not block:
            raise _Over
        if most is not None and done + len(block) >= most:
            target.sendall(block[: most - done])
            raise _Over
        target.sendall(block)
        done, block = done + len(block), b""
