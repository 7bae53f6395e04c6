"""The table of what the Hub endpoint answers, and the one route object that looks things up in it.

In a rule's pattern, `{repo}` stands for a repository id, of one or two segments; `/{path*}` for all that is left, perhaps nothing; any other
`{name}` for one segment, such as `{rev}`, whose slashes come quoted. They are decoded after they are told apart, which is why no path of
FastAPI's can say this. What fits no rule goes on to the routes that come after.

A handler is a function of a `HubCall`; what it gives is answered as JSON, unless it is an answer already. Errors are answered as the Hub does.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, final
from urllib.parse import parse_qsl, unquote

import anyio.to_thread
from starlette import types
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match

from registry.errors import Conflict, InvalidInput, RegistryError, UnknownRepository
from registry.results import Repository
from registry.server.answering import Incoming, Kitchen, who_asks
from registry.server.authority import require
from registry.server.boundary import seen
from registry.server.hub.announced import announced
from registry.server.hub.answers import hub_problem
from registry.server.hub.tickets import TICKET, holder
from registry.server.problems import own_words, status_of
from registry.server.scope import Scope
from registry.teamwork import Principal, Role

log = logging.getLogger("ckpt.server")

T = TypeVar("T")
MAIN = "main"
NO_NAMESPACE = "ckpt"
_ANY = "surrogateescape"  # paths of files need not be Unicode
_FOUND = "ckpt.hub"
_NAME = re.compile(r"\{(\w+)\}")
_PLACE = r"(?P<%s>[^/]+)"
_PLACES = {"repo": r"(?P<%s>[^/]+(?:/[^/]+)?)", "path": r"(?:/(?P<%s>.*))?"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HubCall:
    """One request of a Hub client.

    `id`, `revision` and `path` are what the address says, empty (the revision: `main`) where its rule has no such part; `names` are the other
    placeholders. `endpoint` is this server's address as the client knows it. `incoming` is the body.
    """

    scope: Scope
    method: str
    id: str
    revision: str
    path: str
    names: Mapping[str, str]
    query: QueryParams
    headers: Headers
    endpoint: str
    url_path: str
    incoming: Incoming

    def repository(self) -> Repository:
        """The repository that is asked for, at its revision. Where a client wants a namespace and there is none, `ckpt` stands for it.

        Raises:
            UnknownRepository, UnknownRevision: there is none that may be seen.
            Conflict: the id means two things.
        """
        try:
            return self._recorded()
        except UnknownRepository:
            if empty := announced(self.scope, self.id.removeprefix(f"{NO_NAMESPACE}/"), self.revision):
                return empty
            raise

    def _recorded(self) -> Repository:
        space, _, name = self.id.rpartition("/")
        if space != NO_NAMESPACE:
            return self.scope.repository(self.id, self.revision)
        try:
            found = self.scope.repository(name, self.revision)
        except UnknownRepository:
            return self.scope.repository(self.id, self.revision)
        self._see_that_only(name)
        return found

    def _see_that_only(self, name: str) -> None:
        """See that an id with the namespace that stands for none means nothing else."""
        try:
            self.scope.repository(self.id)
        except UnknownRepository:
            return
        raise Conflict(
            f"repository {self.id}", f"it is one of its own, and may stand for {name}: ask for that by its own id"
        )

    def flag(self, name: str) -> bool:
        """Whether a parameter of the query says yes."""
        return self.query.get(name, "").lower() in ("true", "1")

    def document(self) -> dict[str, Any]:
        """The body, an object of JSON.

        Raises:
            InvalidInput: it is none.
            TooLarge: it is longer than the rule takes.
        """
        try:
            found = json.loads(b"".join(self.incoming.pieces()) or b"{}")
        except (ValueError, RecursionError) as error:
            raise InvalidInput("body", "", f"expected JSON: {error}") from error
        if not isinstance(found, dict):
            raise InvalidInput("body", "", "expected a JSON object")
        return found

    def form(self) -> list[tuple[str, str]]:
        """The body, as a form's fields.

        Raises:
            InvalidInput: it is none.
            TooLarge: it is longer than the rule takes.
        """
        try:
            text = b"".join(self.incoming.pieces()).decode()
            return parse_qsl(text, keep_blank_values=True, max_num_fields=10_000, errors="strict")
        except ValueError as error:
            raise InvalidInput("form", "", str(error)) from error


Handler = Callable[[HubCall], Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HubRule:
    """What is answered at an address. `is_long`: it takes a body that streams in, or longer than the database does."""

    method: str
    pattern: str
    role: Role
    handler: Handler
    body_bytes: int
    is_long: bool


@final
class HubTable:
    """The rules of one part of the endpoint."""

    def __init__(self) -> None:
        self._rules: list[HubRule] = []

    def __iter__(self) -> Iterator[HubRule]:
        return iter(self._rules)

    def route(
        self, method: str, pattern: str, role: Role, *, body_bytes: int = 0, is_long: bool = False
    ) -> Callable[[Callable[[HubCall], T]], Callable[[HubCall], T]]:
        """Make a function the handler of an address.

        Args:
            method, pattern: what is asked for.
            role: the least one that may.
            body_bytes: the longest body; 0 for none.
            is_long: it takes a body that streams in, or longer than asking the database does.
        """

        def add(handler: Callable[[HubCall], T]) -> Callable[[HubCall], T]:
            rule = HubRule(
                method=method, pattern=pattern, role=role, handler=handler, body_bytes=body_bytes, is_long=is_long
            )
            self._rules.append(rule)
            return handler

        return add


@final
class HubRoutes(BaseRoute):
    """All of the endpoint, as one route of the app.

    Args:
        rules: the table. Of two that fit, the one with more fixed text counts.
        kitchen: what answers are made with.
    """

    def __init__(self, rules: Sequence[HubRule], kitchen: Kitchen) -> None:
        self.rules, self._kitchen = tuple(rules), kitchen
        self._table = [(_compiled(rule.pattern), rule) for rule in sorted(rules, key=_fixed, reverse=True)]

    def matches(self, scope: types.Scope) -> tuple[Match, types.Scope]:
        """Whether a request fits a rule."""
        if scope["type"] != "http":
            return Match.NONE, {}
        path = scope["raw_path"].decode("latin-1")
        for expression, rule in self._table:
            if rule.method == scope["method"] and (match := expression.fullmatch(path)):
                names = match.groupdict(default="").items()
                return Match.FULL, {_FOUND: (rule, {name: unquote(text, errors=_ANY) for name, text in names})}
        return Match.NONE, {}

    async def handle(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Answer a request that fits."""
        rule, names = scope[_FOUND]
        answer = await self._answer(Request(scope, receive), rule, names)
        await answer(scope, receive, send)

    async def _answer(self, request: Request, rule: HubRule, names: Mapping[str, str]) -> Response:
        known = seen(request.scope)
        known.route = rule.pattern
        try:
            principal = await self._who_asks(request)
            known.principal = principal.name
            require(principal, rule.role)
            call = self._call(request, Scope(self._kitchen.registry, principal), rule, names)
            limiter = self._kitchen.long if rule.is_long else self._kitchen.short
            return await anyio.to_thread.run_sync(partial(_carry_out, rule, call), limiter=limiter)
        except RegistryError as error:
            if status_of(error) >= 500:
                log.error("%s", error, extra={"request_id": known.request_id})
            return hub_problem(
                error,
                has_token="authorization" in request.headers,
                is_of_repository="repo" in names,
                is_reading=rule.role is Role.READER,
            )
        except HTTPException as error:
            return JSONResponse({"error": own_words(error.status_code)}, error.status_code, error.headers)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    async def _who_asks(self, request: Request) -> Principal:
        """By a ticket in the address, or as everywhere."""
        text = request.query_params.get(TICKET)
        if text is None:
            return await who_asks(request, self._kitchen)
        path = request.scope["raw_path"].decode("latin-1")
        look = partial(holder, self._kitchen.registry, text, request.method, path)
        return await anyio.to_thread.run_sync(look, limiter=self._kitchen.short)

    def _call(self, request: Request, scope: Scope, rule: HubRule, names: Mapping[str, str]) -> HubCall:
        return HubCall(
            scope=scope,
            method=request.method,
            id=names.get("repo", ""),
            revision=names.get("rev", MAIN),
            path=names.get("path", ""),
            names={name: value for name, value in names.items() if name not in ("repo", "rev", "path")},
            query=request.query_params,
            headers=request.headers,
            endpoint=str(request.base_url).rstrip("/"),
            url_path=request.scope["raw_path"].decode("latin-1"),
            incoming=Incoming(request, rule.body_bytes, self._kitchen.figures),
        )


def _carry_out(rule: HubRule, call: HubCall) -> Response:
    found = rule.handler(call)
    return found if isinstance(found, Response) else JSONResponse(found)


# -- patterns


def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as an expression over a path whose segments are still quoted."""
    fixed = (re.escape(text) if at % 2 == 0 else _PLACES.get(text, _PLACE) % text for at, text in _parts(pattern))
    return re.compile("".join(fixed))


def _parts(pattern: str) -> Iterator[tuple[int, str]]:
    return enumerate(_NAME.split(pattern.replace("/{path*}", "{path}")))


def _fixed(rule: HubRule) -> int:
    return sum(len(text) for at, text in _parts(rule.pattern) if at % 2 == 0)
