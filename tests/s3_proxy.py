"""A proxy before the S3 server of the tests, that spoils requests as a bad network or another kind of server would."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import servers

Spoil = Callable[[str, str], str]
"""Given method and path, what becomes of a request: nothing said, it is passed on; `busy`, the server says so; `lost`, it does not arrive;
`unheard`, its answer is lost; `careless`, its condition is; `late`, objects were written two minutes ago."""


@dataclass
class Passed:
    """What went through. `sent_bytes`: of the bodies of requests."""

    port: int = 0
    sent_bytes: int = 0


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behind_port: int, spoil: Spoil) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind_port, self.spoil, self.lock = behind_port, spoil, threading.Lock()
        self.passed = Passed(port=self.server_port)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.passed.sent_bytes += len(body)
            fate = self.server.spoil(self.command, self.path)
        if fate == "lost":
            self.close_connection = True
        elif fate == "busy":
            self.answer(503, {}, b"<Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>")
        elif fate == "careless" and "If-None-Match" in self.headers:
            self.put_carelessly(body)
        else:
            self.pass_on(body, fate)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def pass_on(self, body: bytes, fate: str) -> None:
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind_port)
        headers = {
            name: value for name, value in self.headers.items() if name != "Expect"
        }  # with the Host that was signed
        behind.request(self.command, self.path, body, headers)
        found = behind.getresponse()
        data = found.read()
        behind.close()
        if fate == "unheard":
            self.close_connection = True
            return
        answered = dict(found.getheaders())
        if fate == "late" and "Last-Modified" in answered:
            answered["Last-Modified"] = formatdate(time.time() - 120, usegmt=True)
        self.answer(found.status, answered, data)

    def put_carelessly(self, body: bytes) -> None:
        """The condition is signed, so that it cannot just be left out."""
        _, bucket, key = unquote(self.path).split("/", 2)
        servers.s3_filesystem(self.server.behind_port).call_s3("put_object", Bucket=bucket, Key=key, Body=body)
        self.answer(200, {"ETag": '"x"'}, b"")

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def spoiling(server_port: int, spoil: Spoil = lambda method, path: "") -> Iterator[Passed]:
    """Run the proxy in threads; `port` is where it listens."""
    with _Proxy(server_port, spoil) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy.passed
        finally:
            proxy.shutdown()
            thread.join()
