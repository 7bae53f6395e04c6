"""What surrounds every request: its id, its line in the log and its place in the figures; which hosts and origins may ask; how many at once."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, final
from urllib.parse import urlsplit

from blake3 import blake3
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.errors import DamagedBlob, Forbidden, RegistryError
from registry.refs import Digest
from registry.server.problems import own_problem, problem
from registry.service import Registry

log = logging.getLogger("ckpt.server")

MOST_AT_ONCE = 256
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_UNMATCHED = "(none)"
_NOTHING = Digest(blake3(b"").hexdigest())
_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(slots=True)
class Seen:
    """What is known of a request under way, for its line in the log: filled in as it becomes known."""

    request_id: str
    route: str = _UNMATCHED
    principal: str = ""


def seen(scope: MutableMapping[str, Any]) -> Seen:
    """What is known of a request."""
    found: Seen = scope["ckpt.seen"]
    return found


# -- figures


@final
class Figures:
    """What Prometheus is told: requests and their time by route, bytes taken in, jobs by state, checkpoints."""

    def __init__(self, registry: Registry) -> None:
        self._collectors = CollectorRegistry()
        labels = ["method", "route", "status"]
        self.requests = Counter("ckpt_requests", "Requests answered.", labels, registry=self._collectors)
        self.seconds = Histogram(
            "ckpt_request_seconds", "Time until a request was answered.", ["method", "route"], registry=self._collectors
        )
        self.under_way = Gauge("ckpt_requests_under_way", "Requests being answered.", registry=self._collectors)
        self.uploaded = Counter("ckpt_uploaded_bytes", "Bytes taken in as blobs or parts.", registry=self._collectors)
        self._collectors.register(_Contents(registry))

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._collectors)


class _Contents(Collector):
    """What is counted when somebody looks."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        with self._registry.workspace.reading() as catalog:
            states, checkpoints = catalog.jobs.count(), catalog.checkpoints.count()
        jobs = GaugeMetricFamily("ckpt_jobs", "Jobs by state.", labels=["state"])
        for state, count in states.items():
            jobs.add_metric([state], count)
        return [jobs, GaugeMetricFamily("ckpt_checkpoints", "Checkpoints registered.", value=checkpoints)]


# -- every request


@final
class Boundary:
    """Middleware around everything.

    Args:
        app: what answers.
        figures: told of each request.
        hosts: the names that this server answers to; None: all.
    """

    def __init__(self, app: ASGIApp, *, figures: Figures, hosts: frozenset[str] | None) -> None:
        self._app, self._figures, self._hosts = app, figures, hosts
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        known = Seen(given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8))
        scope["ckpt.seen"] = known
        answer = _Answer(send, known.request_id)
        began = time.perf_counter()
        self._under_way += 1
        try:
            await self._guarded(scope, receive, answer)
        except Exception:  # the HTTP boundary
            log.exception("unforeseen", extra={"request_id": known.request_id})
            if not answer.status:
                await own_problem(500, known.request_id)(scope, receive, answer)
        finally:
            self._under_way -= 1
            self._tell(scope, known, answer.status, time.perf_counter() - began)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        known, headers = seen(scope), Headers(scope=scope)
        if self._under_way > MOST_AT_ONCE:
            await own_problem(503, known.request_id)(scope, receive, send)
        elif self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            await own_problem(421, known.request_id)(scope, receive, send)
        elif scope["method"] not in _SAFE and not _is_own_origin(headers):
            error = Forbidden("a page of another site may not change anything here")
            await problem(error, known.request_id)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _tell(self, scope: Scope, known: Seen, status: int, seconds: float) -> None:
        method = scope["method"] if known.route != _UNMATCHED else "other"  # of strangers' words no figures are kept
        self._figures.under_way.set(self._under_way)
        self._figures.requests.labels(method, known.route, str(status)).inc()
        self._figures.seconds.labels(method, known.route).observe(seconds)
        told = {
            "request_id": known.request_id,
            "method": scope["method"],
            "route": known.route,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "principal": known.principal,
        }
        log.info("request", extra=told)


class _Answer:
    """Sends an answer with the headers that all have; remembers its status, 0 while there is none."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id, self.status = send, request_id, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._request_id
            headers.setdefault("Cache-Control", "no-store")
            for name, value in _SECURITY.items():
                headers.setdefault(name, value)
        await self._send(message)


def _host_name(host: str) -> str:
    """Of `name:port` or `[::1]:port`, the name."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_own_origin(headers: Headers) -> bool:
    """Whether a request that changes something comes from no page, or from one of this server."""
    site = headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


# -- logs


class JsonLines(logging.Formatter):
    """Log lines as JSON: when, how bad, what, and the fields that came along."""

    _FIELDS = ("request_id", "method", "route", "status", "ms", "principal")

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {name: vars(record)[name] for name in self._FIELDS if name in vars(record)}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json(loggers: Mapping[str, int]) -> None:
    """Write the lines of some loggers to stderr, each from a level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in loggers.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def is_ready(registry: Registry) -> RegistryError | None:
    """What keeps the registry from answering, None if nothing: the database and the store are asked something."""
    try:
        with registry.workspace.reading() as catalog:
            catalog.vitals.now()
        registry.workspace.store.size(_NOTHING)
    except DamagedBlob:  # it has looked, and there is none: fine
        return None
    except RegistryError as error:
        return error
    return None
