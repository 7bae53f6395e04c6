"""One request, answered: who asks, with what arguments, by which verb, and the answer with its tag. Writes with a key happen once."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import anyio
import anyio.from_thread
import anyio.to_thread
from anyio import CapacityLimiter
from blake3 import blake3
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from registry.codec import plain
from registry.db.replies import Reply
from registry.errors import InvalidInput, Outdated, RegistryError, TooLarge
from registry.server.authority import Authority, require
from registry.server.boundary import Figures, seen
from registry.server.flowing import json_bytes, send_list
from registry.server.problems import own_problem, problem, status_of
from registry.server.routing import HEADED, Later, Rule
from registry.server.scope import Scope
from registry.service import Registry
from registry.teamwork import Principal

log = logging.getLogger("ckpt.server")

KEY = "idempotency-key"
REPLAYED = "Idempotency-Replayed"
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_PIECE_BYTES = 1 << 20
_PATIENCE_SECONDS = 60.0  # for the next bytes of a body
Endpoint = Callable[[Request], Awaitable[Response]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kitchen:
    """What answers are made with.

    `short` are the threads of requests that the database answers, fewer than it takes connections; `long` those of bodies that stream in.
    `closing` is set when the server is told to stop: what would go on for minutes ends then.
    """

    registry: Registry
    authority: Authority
    figures: Figures
    short: CapacityLimiter
    long: CapacityLimiter
    closing: threading.Event


@final
class Incoming:
    """A body that streams in, for a handler in a thread.

    Args:
        request: whose body.
        limit_bytes: the longest.
        figures: told of the bytes.
    """

    def __init__(self, request: Request, limit_bytes: int, figures: Figures) -> None:
        self._stream, self._limit, self._figures = request.stream(), limit_bytes, figures
        self._said = request.headers.get("content-length")

    def pieces(self) -> Iterator[bytes]:
        """The body, a megabyte or so at a time.

        Raises:
            TooLarge: it is longer than what is taken.
            InvalidInput: it ends before it should.
        """
        total = 0
        while piece := anyio.from_thread.run(self._next):
            total += len(piece)
            if total > self._limit:
                raise TooLarge("body", "", f"at most {self._limit} bytes at once")
            self._figures.uploaded.inc(len(piece))
            yield piece
        if self._said is not None and total != int(self._said):
            raise InvalidInput("body", "", f"{self._said} bytes were announced, {total} came")

    async def _next(self) -> bytes:
        piece = bytearray()
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                async for chunk in self._stream:
                    piece += chunk
                    if len(piece) >= _PIECE_BYTES:
                        break
        except (ClientDisconnect, TimeoutError) as error:
            raise InvalidInput("body", "", "it was cut off") from error
        return bytes(piece)


def endpoint(rule: Rule, kitchen: Kitchen) -> Endpoint:
    """What answers the requests of a route."""

    async def answer(request: Request) -> Response:
        known = seen(request.scope)
        known.route = rule.path
        try:
            principal = await who_asks(request, kitchen)
            known.principal = principal.name
            require(principal, rule.role)
            scope = Scope(kitchen.registry, principal)
            if rule.is_raw:
                incoming = Incoming(request, rule.body_bytes, kitchen.figures)
                work = partial(_answer_raw, rule, scope, request, incoming)
                return await anyio.to_thread.run_sync(work, limiter=kitchen.long)
            body = b"" if rule.body is None else await _body(request, rule.body_bytes)
            return await anyio.to_thread.run_sync(partial(_answer, rule, scope, request, body), limiter=kitchen.short)
        except RegistryError as error:
            if status_of(error) >= 500:
                log.error("%s", error, extra={"request_id": known.request_id})
            return problem(error, known.request_id)
        except HTTPException as error:
            return own_problem(error.status_code, known.request_id, error.headers)
        except ClientDisconnect:
            return own_problem(400, known.request_id)  # nobody reads it

    return answer


async def who_asks(request: Request, kitchen: Kitchen) -> Principal:
    """Who it is, by the token of a request.

    Raises:
        Unauthenticated, TooManyTries: as `Authority.principal`.
    """
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    secret = secret.strip() if scheme.lower() == "bearer" else scheme and "not a bearer token"
    if known := kitchen.authority.known(secret):
        return known
    address = request.client.host if request.client else ""
    return await anyio.to_thread.run_sync(kitchen.authority.principal, secret, address, limiter=kitchen.short)


async def _body(request: Request, limit_bytes: int) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InvalidInput("Content-Type", request.headers.get("content-type", ""), "expected application/json")
    if int(request.headers.get("content-length") or 0) > limit_bytes:
        raise TooLarge("body", "", f"at most {limit_bytes} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise TooLarge("body", "", f"at most {limit_bytes} bytes")
    except TimeoutError as error:
        raise InvalidInput("body", "", "it took too long to arrive") from error
    return bytes(body)


# -- in a thread


def _answer_raw(rule: Rule, scope: Scope, request: Request, incoming: Incoming) -> Response:
    arguments = rule.arguments(request.path_params, request.query_params, b"")
    return _rendered(rule.status, plain(rule.handler(scope, incoming=incoming, **arguments)), request)


def _answer(rule: Rule, scope: Scope, request: Request, body: bytes) -> Response:
    arguments = rule.arguments(request.path_params, request.query_params, body)
    if rule.is_headed:
        arguments[HEADED] = request.headers
    call = partial(rule.handler, scope, **arguments)
    if rule.current is not None and (wanted := request.headers.get("if-match")):
        call = partial(_if_unchanged, scope, partial(rule.current, scope, **arguments), wanted, call)
    key = request.headers.get(KEY)
    if key is not None and rule.is_keyed:
        reply, is_again = _once(rule, scope, _checked(key), _digest(request, body), call)
        return _rendered(reply.status, reply.body, request, {REPLAYED: "true"} if is_again else {})
    found = call()
    if isinstance(found, Response):
        return found
    if isinstance(found, Iterator):
        return send_list(found)
    return _rendered(rule.status, plain(found.write() if isinstance(found, Later) else found), request)


def _if_unchanged(scope: Scope, look: Callable[[], Any], wanted: str, call: Callable[[], Any]) -> Any:
    """Do it if what is there is what whoever asks has seen, both within one transaction."""
    with scope.registry.workspace.writing():
        if not is_among(_tag(json_bytes(plain(look()))), wanted):
            raise Outdated("If-Match", "it is not what you have seen: look again")
        return call()


def _once(rule: Rule, scope: Scope, key: str, request: str, call: Callable[[], Any]) -> tuple[Reply, bool]:
    """Do it, unless it was done before; the answer is kept in the same transaction. Tells whether it is that of before."""
    workspace, holder = scope.registry.workspace, scope.principal.name
    with workspace.reading() as catalog:
        known = catalog.replies.find(holder, key, request, catalog.vitals.now())
    if known is not None:
        return known, True
    later = call() if rule.is_later else Later(call)
    with workspace.writing() as change:
        replies, now = change.catalog.replies, change.catalog.vitals.now()
        if known := replies.find(holder, key, request, now):
            return known, True
        reply = Reply(status=rule.status, body=plain(later.write()))
        replies.add(holder, key, request, reply, now)
        return reply, False


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InvalidInput("Idempotency-Key", key[:80], "up to 200 printable characters without blanks")
    return key


def _digest(request: Request, body: bytes) -> str:
    asked = f"{request.method} {request.url.path}?{request.url.query}\n"
    return blake3(asked.encode() + body).hexdigest()


def _rendered(status: int, document: Any, request: Request, headers: Mapping[str, str] | None = None) -> Response:
    text = json_bytes({} if document is None else document)
    if request.method != "GET":
        return Response(text, status, headers, "application/json")
    tag = _tag(text)
    fresh = {**(headers or {}), "ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization"}
    if is_among(tag, request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=fresh)
    return Response(text, status, fresh, "application/json")


def _tag(text: bytes) -> str:
    return f'"{blake3(text).hexdigest(length=16)}"'


def is_among(tag: str, wanted: str) -> bool:
    """Whether a tag, with its quotes, is one of those that a header names."""
    return wanted.strip() == "*" or tag in {each.strip().removeprefix("W/") for each in wanted.split(",")}
