"""Pages over HTTP: who visits, what they may, what they get, and what it looks like when it goes wrong."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from typing import Any, final
from urllib.parse import parse_qsl

import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse

from registry.errors import InvalidInput, RegistryError, TooLarge, Unauthenticated
from registry.server.answering import Endpoint, Kitchen, who_asks
from registry.server.authority import require
from registry.server.boundary import seen
from registry.server.pages.drawing import asset, draw
from registry.server.pages.signing_in import COOKIE, LASTS, SignIns, sign_in_url
from registry.server.pages.visits import Answer, Moved, PageRule, Shown, Stream, Values, Visit
from registry.server.problems import status_of
from registry.server.scope import Scope
from registry.teamwork import Principal, Role
from registry.wording import Words, explain

log = logging.getLogger("ckpt.server")

FORM_BYTES = 1 << 20
_FORM = "application/x-www-form-urlencoded"
_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
    "Vary": "Cookie, HX-Request",
}
_FOR_EVER = {"Cache-Control": "public, max-age=31536000, immutable"}
_NOBODY = Principal(name="", role=Role.READER)


@final
class PageServer:
    """Answers visits.

    Args:
        kitchen: what answers are made with.
        sign_ins: who has signed in.
    """

    def __init__(self, kitchen: Kitchen, sign_ins: SignIns) -> None:
        self._kitchen, self._sign_ins = kitchen, sign_ins

    def endpoint(self, rule: PageRule) -> Endpoint:
        """What answers the visits of a page."""

        async def answer(request: Request) -> Response:
            known = seen(request.scope)
            known.route = rule.path
            principal = _NOBODY
            try:
                if rule.role is not None:
                    principal = await self._visitor(request)
                    known.principal = principal.name
                    require(principal, rule.role)
                visit = await self._visit(request, principal)
                limiter = self._kitchen.long if rule.is_slow else self._kitchen.short
                return await anyio.to_thread.run_sync(partial(_answer, rule, visit, request), limiter=limiter)
            except Unauthenticated:
                return _moved(Moved(sign_in_url(_url(request) if request.method == "GET" else "/")), request)
            except RegistryError as error:
                if status_of(error) >= 500:
                    log.error("%s", error, extra={"request_id": known.request_id})
                return _problem(request, principal, explain(error), status_of(error))
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it

        return answer

    async def _visitor(self, request: Request) -> Principal:
        """By the request's token, as everywhere; else by the cookie; else as whoever needs none."""
        kept = request.cookies.get(COOKIE, "")
        if kept and "authorization" not in request.headers:
            look = partial(self._by_cookie, kept)
            if found := await anyio.to_thread.run_sync(look, limiter=self._kitchen.short):
                return found
        return await who_asks(request, self._kitchen)

    def _by_cookie(self, kept: str) -> Principal | None:
        try:
            return self._sign_ins.principal(kept)
        except Unauthenticated:
            return None  # it may be that none is needed

    async def _visit(self, request: Request, principal: Principal) -> Visit:
        form = await _form(request) if request.method == "POST" else Values([])

        async def in_thread(work: Callable[[], Any]) -> Any:
            return await anyio.to_thread.run_sync(work, limiter=self._kitchen.short)

        visit: Visit

        def drawn(template: str, /, **values: Any) -> str:
            return draw(template, {**_surroundings(request, principal), "visit": visit, **values})

        visit = Visit(
            scope=Scope(self._kitchen.registry, principal),
            path=request.path_params,
            query=Values(request.query_params.multi_items()),
            form=form,
            url=_url(request),
            is_partial=_is_partial(request),
            headers=request.headers,
            address=request.client.host if request.client else "",
            kept=request.cookies.get(COOKIE, ""),
            draw=drawn,
            in_thread=in_thread,
            is_closing=self._kitchen.closing.is_set,
        )
        return visit


def _answer(rule: PageRule, visit: Visit, request: Request) -> Response:
    found: Answer = rule.handler(visit)
    if isinstance(found, Shown):
        headers = {**_SECURITY, **({"HX-Replace-Url": found.replace_url} if found.replace_url else {})}
        if found.is_secret:
            headers["Cache-Control"] = "no-store"
        return HTMLResponse(visit.draw(found.template, **found.values), found.status, headers)
    if isinstance(found, Moved):
        return _moved(found, request)
    if isinstance(found, Stream):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(found), 200, headers, "text/event-stream")
    return found


async def _events(stream: Stream) -> AsyncIterator[str]:
    async for name, html in stream.events:
        lines = "".join(f"data: {line}\n" for line in html.splitlines() or [""])
        yield f"event: {name}\n{lines}\n"


def _moved(moved: Moved, request: Request) -> Response:
    if _is_partial(request):
        answer: Response = Response(status_code=204, headers={"HX-Redirect": moved.url})
    else:
        answer = RedirectResponse(moved.url, 303, {"Cache-Control": "no-store"})
    if moved.cookie is not None:
        answer.set_cookie(
            COOKIE,
            moved.cookie,
            max_age=int(LASTS.total_seconds()) if moved.cookie else 0,
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="lax",
        )
    return answer


def _problem(request: Request, principal: Principal, words: Words, status: int) -> Response:
    template = "_problem.html" if _is_partial(request) else "problem.html"
    values = {**_surroundings(request, principal), "words": words, "status": status}
    return HTMLResponse(draw(template, values), status, _SECURITY)


def _surroundings(request: Request, principal: Principal) -> Mapping[str, Any]:
    """What every template may use."""
    return {
        "principal": principal,
        "can": partial(_can, principal),
        "here": request.url.path,
        "request_id": seen(request.scope).request_id,
        "server_url": str(request.base_url).rstrip("/"),
        "is_signed_in": COOKIE in request.cookies,
    }


def _can(principal: Principal, role: str) -> bool:
    needed = Role(role)
    return (
        bool(principal.name) and principal.role.covers(needed) and not (needed is Role.ADMIN and principal.namespaces)
    )


def _url(request: Request) -> str:
    query = request.url.query
    return request.url.path + (f"?{query}" if query else "")


def _is_partial(request: Request) -> bool:
    """Whether htmx asks for a part of a page; going back, it asks for a whole one."""
    headers = request.headers
    return headers.get("hx-request") == "true" and headers.get("hx-history-restore-request") != "true"


async def _form(request: Request) -> Values:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > FORM_BYTES:
            raise TooLarge("form", "", f"at most {FORM_BYTES} bytes")
    if body and kind != _FORM:
        raise InvalidInput("Content-Type", kind, f"expected {_FORM}")
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=10_000, errors="strict")
    except ValueError as error:
        raise InvalidInput("form", "", str(error)) from error
    return Values(pairs)


async def give_asset(request: Request) -> Response:
    """A file of the package. Its address changes with it, so that it may be kept for ever."""
    seen(request.scope).route = "/static"
    found = asset(request.path_params["name"])
    if found is None or found.tag != request.path_params["tag"]:
        return Response("not found", 404, media_type="text/plain")
    return Response(found.data, headers=_FOR_EVER, media_type=found.media_type)


def nothing_here(request: Request) -> Response:
    """What a browser is shown where there is no page."""
    words = Words("there is no page at this address", "it may have moved: start from the overview")
    return _problem(request, _NOBODY, words, 404)


def in_order(rules: Iterable[PageRule]) -> list[PageRule]:
    """Rules in an order in which the first that fits is the right one: those with more fixed text first."""
    return sorted(rules, key=lambda rule: -_fixed(rule.path))


def _fixed(path: str) -> int:
    return sum(len(part.partition("}")[2]) if "}" in part else len(part) for part in path.split("{"))
