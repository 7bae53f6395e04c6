"""The server, put together: the routes over one registry, who may use them, and what runs beside them."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import anyio.to_thread
import uvicorn
from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from registry.errors import InvalidInput, InvalidSetting, RegistryError
from registry.jobs import InlineEngine
from registry.server import adapters, bases, checkpoints, choosing, keeping, repositories, shipping, uploads, work
from registry.server.answering import Kitchen, endpoint
from registry.server.authority import Authority, is_this_machine, require
from registry.server.boundary import Boundary, Figures, is_ready, log_as_json, seen
from registry.server.hub import RULES as HUB_RULES
from registry.server.hub.browsing import BrowsedRepositories
from registry.server.hub.routing import HubRoutes
from registry.server.openapi import describe
from registry.server.pages import PAGES
from registry.server.pages.serving import PageServer, give_asset, in_order, nothing_here
from registry.server.pages.signing_in import SignIns, pages_of
from registry.server.pages.visits import PageRule
from registry.server.problems import own_problem, problem
from registry.server.reference import page
from registry.server.routing import Rule
from registry.service import Registry
from registry.settings import Settings
from registry.teamwork import Role

log = logging.getLogger("ckpt.server")

PREFIX = "/api/v1"
RULES: tuple[Rule, ...] = tuple(
    rule
    for routes in (
        checkpoints.routes,
        adapters.routes,
        bases.routes,
        work.routes,
        uploads.routes,
        shipping.routes,
        choosing.routes,
        repositories.routes,
        keeping.routes,
    )
    for rule in routes
)
# What needs no rule: it tells nothing of the registry's content, or decides by itself.
OPEN = ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs")
STATIC = "/static/{tag}/{name:path}"
_SHORT_THREADS = 12  # fewer than SQLAlchemy's pool has connections, so that none waits for one
_LONG_THREADS = 64
_HEADER_BYTES = 64 << 10
_IDLE_SECONDS = 30
_GRACE_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where a server listens, and to whom.

    `hosts` are the names that it answers to besides the machine's own; `needs_none`: it asks nobody for a token; `is_private`: it lets nobody
    in without one, not even on this machine while there is none.

    Raises:
        InvalidSetting: nobody is asked for a token where others can reach it.
    """

    host: str = "127.0.0.1"
    hosts: Sequence[str] = ()
    needs_none: bool = False
    is_private: bool = False

    def __post_init__(self) -> None:
        if self.needs_none and not self.is_loopback:
            raise InvalidSetting("host", self.host, "without tokens, only this machine may reach the server")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def names(self) -> frozenset[str] | None:
        """The names that it answers to, so that no page can pass one of its own off for it; None for all."""
        if not self.is_loopback and not self.hosts:
            return None
        return frozenset(name.lower().strip("[]") for name in ("localhost", "127.0.0.1", "::1", self.host, *self.hosts))


def create_app(settings: Settings, listening: Listening | None = None) -> FastAPI:
    """The server of a registry, to be run by uvicorn.

    With SQLite it does the registry's background work itself.

    Raises:
        InvalidSetting: it would let everybody in.
    """
    listening = listening or Listening()
    registry = Registry(settings)
    kitchen = Kitchen(
        registry=registry,
        authority=Authority(
            registry,
            is_loopback=listening.is_loopback and not listening.is_private,
            needs_none=listening.needs_none,
        ),
        figures=Figures(registry),
        short=CapacityLimiter(_SHORT_THREADS),
        long=CapacityLimiter(_LONG_THREADS),
        closing=threading.Event(),
    )
    app = FastAPI(
        title="ckpt registry",
        version=version("ckpt-registry"),
        lifespan=_running(kitchen),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for rule in RULES:
        app.add_api_route(PREFIX + rule.path, endpoint(rule, kitchen), methods=[rule.method], include_in_schema=False)
    _add_own_routes(app, kitchen)
    sign_ins = SignIns(registry, kitchen.authority)
    pages = _add_pages(app, kitchen, sign_ins)
    _check_rules(app, pages)
    app.state.kitchen, app.state.sign_ins, app.state.pages = kitchen, sign_ins, pages
    app.add_exception_handler(HTTPException, _own_error)
    app.add_middleware(Boundary, figures=kitchen.figures, hosts=listening.names)
    return app


def _add_pages(app: FastAPI, kitchen: Kitchen, sign_ins: SignIns) -> tuple[PageRule, ...]:
    rules = tuple(in_order([*PAGES, *pages_of(sign_ins)]))
    server = PageServer(kitchen, sign_ins)
    for rule in rules:
        app.add_api_route(rule.path, server.endpoint(rule), methods=[rule.method], include_in_schema=False)
    app.add_api_route(STATIC, give_asset, methods=["GET"], include_in_schema=False)
    # an adapter may be called as a page is: its files come before pages, its own page after them
    app.router.routes.insert(0, HubRoutes(HUB_RULES, kitchen))
    app.router.routes.append(BrowsedRepositories(server))
    return rules


def _check_rules(app: FastAPI, pages: Sequence[PageRule]) -> None:
    """See that nothing can be asked for that no rule is about."""
    ruled = {(rule.method, PREFIX + rule.path) for rule in RULES} | {("GET", path) for path in (*OPEN, STATIC)}
    ruled |= {(rule.method, rule.path) for rule in pages}
    found = {
        (method, route.path) for route in app.routes if isinstance(route, APIRoute) for method in route.methods or ()
    }
    others = [type(route) for route in app.routes if not isinstance(route, APIRoute)]
    if found != ruled or len(app.routes) - len(others) != len(ruled) or others != [HubRoutes, BrowsedRepositories]:
        raise RuntimeError(f"routes without a rule: {sorted(found - ruled)}")


def _running(kitchen: Kitchen) -> Any:
    @asynccontextmanager
    async def run(_: FastAPI) -> AsyncIterator[None]:
        registry = kitchen.registry
        engine = None if registry.settings.is_shared else InlineEngine(registry)
        kitchen.authority.uses.start()
        if engine is not None:
            engine.start()
        try:
            yield
        finally:
            if engine is not None:
                await anyio.to_thread.run_sync(engine.stop, _GRACE_SECONDS)
            await anyio.to_thread.run_sync(kitchen.authority.uses.stop)
            registry.close()

    return run


async def _own_error(request: Request, error: Exception) -> Response:
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    if status == 404 and "text/html" in request.headers.get("accept", ""):
        return nothing_here(request)
    return own_problem(status, seen(request.scope).request_id, headers)


def _add_own_routes(app: FastAPI, kitchen: Kitchen) -> None:
    document = describe(RULES, PREFIX, app.version)
    shown = page(document)

    def is_alive(request: Request) -> Response:
        seen(request.scope).route = "/healthz"
        return JSONResponse({"status": "alive"})

    def is_able(request: Request) -> Response:
        seen(request.scope).route = "/readyz"
        error = is_ready(kitchen.registry)
        return JSONResponse({"status": "ready"}) if error is None else problem(error, seen(request.scope).request_id)

    def tell_figures(request: Request) -> Response:
        seen(request.scope).route = "/metrics"
        try:
            _let_watch(request, kitchen.authority)
            return Response(kitchen.figures.text(), media_type=CONTENT_TYPE_LATEST)
        except RegistryError as error:
            return problem(error, seen(request.scope).request_id)

    def give_document(request: Request) -> Response:
        seen(request.scope).route = "/openapi.json"
        return JSONResponse(document, headers={"Cache-Control": "no-cache"})

    def give_page(request: Request) -> Response:
        seen(request.scope).route = "/docs"
        return HTMLResponse(shown, headers={"Cache-Control": "no-cache"})

    for path, answer in zip(OPEN, (is_alive, is_able, tell_figures, give_document, give_page), strict=True):
        app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)


def _let_watch(request: Request, authority: Authority) -> None:
    """Figures are for this machine, and for whoever may read."""
    address = request.client.host if request.client else ""
    if is_this_machine(address) and "authorization" not in request.headers:
        return
    secret = request.headers.get("authorization", "").partition(" ")[2].strip()
    require(authority.principal(secret, address), Role.READER)


# -- run it


def check_start(settings: Settings) -> tuple[str, ...]:
    """See that a server can work with its database and its store. Gives what to be careful about, a sentence for each.

    Raises:
        DatabaseVersion: the tables are not this package's.
        InvalidSetting: the store does not do what several machines need.
        StorageFailed: one of them does not answer.
    """
    with Registry(settings) as registry:
        if (error := is_ready(registry)) is not None:
            raise error
        return registry.workspace.store.probe() if settings.is_shared else ()


def check_address(host: str, port: int) -> None:
    """See that one can listen there, before anybody is told that somebody does.

    Raises:
        InvalidInput: one cannot: somebody else does, or this machine has no such address.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family is socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind(address)
    except OSError as error:
        raise InvalidInput("address", f"{host}:{port}", f"cannot listen there: {error.strerror}") from error


class _Server(uvicorn.Server):
    """Tells what streams for minutes that it is to end, before it waits for it."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Any = self.config.app
        app.state.kitchen.closing.set()
        await super().shutdown(sockets)


def serving(app: FastAPI, host: str, port: int) -> uvicorn.Server:
    """What runs a server: `run()` ends when it is told to stop, after what is under way, for which it waits up to twenty seconds."""
    # h11 is the implementation that limits headers
    config = uvicorn.Config(
        app, host=host, port=port, http="h11", log_config=None, access_log=False, server_header=False,
        h11_max_incomplete_event_size=_HEADER_BYTES, timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=int(_GRACE_SECONDS),
    )  # fmt: skip
    return _Server(config)


def serve(app: FastAPI, host: str, port: int) -> None:
    """Run a server until it is told to stop, with its log on stderr."""
    log_as_json({"ckpt": logging.INFO, "uvicorn": logging.INFO})
    serving(app, host, port).run()


def hosts_from(text: str) -> Iterable[str]:
    """Host names out of a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def advice(settings: Settings, listening: Listening) -> list[str]:
    """What whoever starts a server ought to know, in sentences."""
    with Registry(settings) as registry, registry.workspace.reading() as catalog:
        has_tokens = catalog.tokens.exist()
    if listening.needs_none:
        return ["no tokens are asked for: everybody on this machine may do everything"]
    if not has_tokens and listening.is_loopback:
        return [
            "there is no token yet: everybody on this machine may do everything, until `ckpt token create NAME --role admin`"
        ]
    told = (
        []
        if has_tokens
        else ["there is no token yet, and nobody is let in: `ckpt token create NAME --role admin` makes the first"]
    )
    if not listening.is_loopback:
        told.append(
            "this is plain HTTP, and tokens can be read on the way: put a proxy with TLS in front, and let only it reach this port"
        )
    return told
