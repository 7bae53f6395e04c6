"""Requests to a server: who asks, what may be asked again when an answer is lost, and errors as themselves."""

from __future__ import annotations

import json
import random
import re
import secrets
import time
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TypeVar, final
from uuid import uuid4

import httpx

from registry.codec import from_json, plain
from registry.errors import InvalidInput, InvalidSetting, RegistryError, ServerFailed
from registry.failures import from_document, is_known
from registry.manifest import Checkpoint, FileEntry, Merged

T = TypeVar("T")
Body = Callable[[], Iterator[bytes]]
"""Gives the bytes of a body from the start, each time it is called."""

Query = Mapping[str, object]

API = "/api/v1"
READ_SECONDS = 120.0
LONG_SECONDS = 3600.0  # for what the server reads first
_CONNECT_SECONDS = 5.0
PATIENCE_SECONDS = 20.0
_PATIENCE_TO_CONNECT_SECONDS = 2.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 4.0
_MOST_CUTS = 5  # of a stream, without a byte in between
_TOKEN = re.compile(r"[\x21-\x7e]*")
_BETWEEN = re.compile(r"[\s\[,]*")
_PASSING = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, as often as it is made."""

    method: str
    path: str
    query: Query
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    body: Body | None = None
    is_streamed: bool = False
    patience_seconds: float = READ_SECONDS


@dataclass(frozen=True, slots=True)
class _Failure:
    """No answer, or none that counts: what that means if it stays so, how long to try for, and how long to wait at least."""

    error: RegistryError
    patience_seconds: float
    wait_seconds: float = 0.0


@final
class Wire:
    """A server, as somebody with a token. Any thread may use it.

    Args:
        url: where it is.
        token: shown to it; empty for none.
        patience_seconds: for how long after its first failure a request is made again that was not answered, or is to be made later.
    """

    def __init__(self, url: str, token: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.url, self._patience, self._was_there = url, patience_seconds, False
        if not _TOKEN.fullmatch(token):
            raise InvalidSetting("token", "", "a token has printable characters only, and no blanks")
        headers = {"User-Agent": f"ckpt-registry/{version('ckpt-registry')}", "Accept": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            self._client = httpx.Client(
                base_url=f"{url}{API}",
                headers=headers,
                timeout=httpx.Timeout(READ_SECONDS, connect=_CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=16),
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidSetting("server", url, str(error)) from error
        if self._client.base_url.scheme not in ("http", "https") or not self._client.base_url.host:
            raise InvalidSetting("server", url, "expected a URL such as https://ckpt.example.org")

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def get(self, kind: type[T], path: str, query: Query | None = None, *, patience_seconds: float = READ_SECONDS) -> T:
        """What is at a path, as a value of a kind.

        Args:
            kind: what the answer is to be read as.
            path: below the API's.
            query: parameters; those that are None or empty text are left away.
            patience_seconds: how long the answer may take.

        Raises:
            ServerFailed: no answer, or none that can be read.
            RegistryError: what the server says instead.
        """
        return self._read(kind, self._ask(_Asked("GET", path, query or {}, patience_seconds=patience_seconds)))

    def write(
        self,
        kind: type[T],
        method: str,
        path: str,
        document: object = None,
        *,
        query: Query | None = None,
        patience_seconds: float = READ_SECONDS,
    ) -> T:
        """Change something, once: should the answer be lost, the same request is made again under the same key.

        Args:
            kind: what the answer is to be read as.
            method, path: what is asked for.
            document: the body, a value or plain JSON; None for none.
            query, patience_seconds: as `get`.

        Raises:
            as `get`.
        """
        content = (
            None
            if document is None
            else json.dumps(plain(document), ensure_ascii=False).encode("utf-8", "surrogatepass")
        )
        headers = {"Idempotency-Key": str(uuid4())}
        if content is not None:
            headers["Content-Type"] = "application/json"
        asked = _Asked(method, path, query or {}, headers, content, patience_seconds=patience_seconds)
        return self._read(kind, self._ask(asked))

    def send(self, method: str, path: str, body: Body, size_bytes: int) -> None:
        """Send bytes. The same again is harmless.

        Args:
            method, path: what is asked for.
            body: gives the bytes anew for each try.
            size_bytes: how many there are.

        Raises:
            as `get`.
        """
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)}
        self._ask(_Asked(method, path, {}, headers, body=body))

    def read(self, path: str, query: Query, start: int, end: int) -> Iterator[bytes]:
        """Bytes `start … end` at a path, in pieces. Where they are cut off, they are asked for from there.

        Raises:
            ServerFailed: they do not come, or not from there on.
        """
        cuts = 0
        while start < end:
            with self._stream(path, query, start, end) as pieces:
                try:
                    for piece in pieces:
                        start, cuts = start + len(piece), 0
                        yield piece
                except ServerFailed:
                    cuts += 1
                    if cuts > _MOST_CUTS:
                        raise

    @contextmanager
    def _stream(self, path: str, query: Query, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """Those bytes, as they come. Once they come, nothing is asked again here."""
        headers = {
            "Accept": "application/octet-stream",
            "Accept-Encoding": "identity",
            "Range": f"bytes={start}-{end - 1}",
        }
        answer = self._ask(_Asked("GET", path, query, headers, is_streamed=True))
        try:
            if answer.status_code != httpx.codes.PARTIAL_CONTENT:
                raise ServerFailed(self.url, f"expected the bytes from {start} on, found status {answer.status_code}")
            yield self._pieces(answer)
        finally:
            answer.close()

    def _pieces(self, answer: httpx.Response) -> Iterator[bytes]:
        try:
            yield from answer.iter_raw()  # as they come: what is held back would be lost in a cut
        except httpx.TransportError as error:
            raise _unanswered(self.url, error) from error

    def each(self, kind: type[T], path: str, *, patience_seconds: float = READ_SECONDS) -> Iterator[T]:
        """The objects of a list at a path, as they come: the list is never held whole.

        Args:
            kind, path, patience_seconds: as `get`.

        Raises:
            as `get`.
        """
        headers = {"Accept-Encoding": "identity"}
        answer = self._ask(_Asked("GET", path, {}, headers, is_streamed=True, patience_seconds=patience_seconds))
        try:
            for document in _elements(self._pieces(answer)):
                yield from_json(kind, document)
        except (ValueError, InvalidInput) as error:
            raise self._unreadable(error) from error
        finally:
            answer.close()

    def _ask(self, asked: _Asked) -> httpx.Response:
        """Ask until there is an answer that will not be another one soon."""
        failing_since, pauses = None, _pauses()
        headers = {**asked.headers, "X-Request-Id": secrets.token_hex(8)}
        while True:
            found = self._try(asked, headers)
            if isinstance(found, httpx.Response):
                return found
            now, pause = time.monotonic(), max(next(pauses), found.wait_seconds)
            # Not since it was first asked: an answer that took long and was lost on its way is worth asking for again.
            failing_since = failing_since or now
            if now - failing_since + pause > found.patience_seconds:
                raise found.error
            time.sleep(pause)

    def _try(self, asked: _Asked, headers: Mapping[str, str]) -> httpx.Response | _Failure:
        request = self._client.build_request(
            asked.method,
            asked.path,
            params={key: _as_text(value) for key, value in asked.query.items() if value is not None and value != ""},
            headers=dict(headers),
            content=asked.content if asked.body is None else asked.body(),
            timeout=httpx.Timeout(asked.patience_seconds, connect=_CONNECT_SECONDS),
        )
        try:
            answer = self._client.send(request, stream=asked.is_streamed)
        except httpx.TransportError as error:
            return _Failure(_unanswered(self.url, error), self._patience_with(error))
        self._was_there = True
        if answer.is_success:
            return answer
        is_passing = answer.status_code in _PASSING
        return _Failure(self._problem(answer), self._patience if is_passing else 0.0, _seconds_wanted(answer))

    def _patience_with(self, error: httpx.TransportError) -> float:
        if isinstance(error, (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.ReadTimeout)):
            return 0.0
        is_down = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
        # One that was there a moment ago is being started anew; one that never was may not be there at all.
        return min(self._patience, _PATIENCE_TO_CONNECT_SECONDS) if is_down and not self._was_there else self._patience

    def _read(self, kind: type[T], answer: httpx.Response) -> T:
        try:
            document = answer.json()
            return from_json(kind, document)
        except (ValueError, InvalidInput) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ServerFailed:
        return ServerFailed(self.url, f"an answer that cannot be read: {error}")

    def _problem(self, answer: httpx.Response) -> RegistryError:
        """What an answer that is no success says."""
        try:
            found = json.loads(answer.read())["error"]
            if is_known(found["code"]):
                return from_document(found, self.url)
            said = f"{found['message']} (request {found.get('request_id')})"
        except (ValueError, KeyError, TypeError, AttributeError, InvalidInput, httpx.TransportError):
            said = f"status {answer.status_code}, and not from a registry's server"
        finally:
            answer.close()
        return ServerFailed(self.url, said)


def _elements(pieces: Iterator[bytes]) -> Iterator[object]:
    """The objects of a JSON list, of which one at most is held with the piece that it ends in.

    Raises:
        ValueError: it is no such list, or ends too early.
    """
    decoder, decode, held = json.JSONDecoder(), getincrementaldecoder("utf-8")("surrogatepass").decode, ""
    for piece in pieces:
        held, place = held + decode(piece), 0
        with suppress(json.JSONDecodeError):  # the rest of it is still to come
            while True:
                found, place = decoder.raw_decode(held, _BETWEEN.match(held, place).end())  # type: ignore[union-attr]
                yield found
        held = held[place:]
    if held.strip(" \t\r\n[,") != "]":
        raise ValueError("a list was expected, to its end")


def _pauses() -> Iterator[float]:
    """Longer and longer ones, each somewhat off, so that many clients do not come back at once."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
        yield pause * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _seconds_wanted(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0


def _unanswered(url: str, error: httpx.TransportError) -> ServerFailed:
    text = str(error) or type(error).__name__
    failed = ServerFailed(url, text[:1].lower() + text[1:])
    failed.__cause__ = error
    return failed


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(plain(value))


def check_namespaces(namespaces: Sequence[str]) -> None:
    """See that nobody tells a server which namespaces may be seen.

    Raises:
        InvalidInput: somebody does.
    """
    if namespaces:
        raise InvalidInput("namespaces", ", ".join(namespaces), "over a server, those of the token count")


def name_of(subject: Checkpoint | Merged) -> str:
    """A reference that means this very content, as a server takes it."""
    return subject.digest.hex if isinstance(subject, Merged) else subject.ref


def files_of(subject: Checkpoint | Merged) -> tuple[FileEntry, ...]:
    """Of which files it consists."""
    return subject.files if isinstance(subject, Merged) else subject.manifest.files
