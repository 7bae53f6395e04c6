"""HTML out of templates: everything that is put into them is escaped, and what they need of the registry's words is here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from registry.manifest import BaseModel, Checkpoint, Merged, utc_now
from registry.refs import AdapterName, Digest
from registry.teamwork import Job

_STATIC = files("registry.server.pages") / "static"
_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "LICENSE": "text/plain; charset=utf-8",
}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_SPARK_WIDTH, _SPARK_HEIGHT, _SPARK_MARGIN = 120, 32, 4


# -- what does not change


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that pages use: its bytes, what it is, and a name that changes with them."""

    data: bytes
    media_type: str
    tag: str


@cache
def asset(name: str) -> Asset | None:
    """A file of the package's `static` folder, by its path there; None where there is none."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") or "\\" in part for part in parts):
        return None
    path = _STATIC.joinpath(*parts)
    kind = _TYPES.get(parts[-1].rpartition(".")[2])
    if kind is None or not path.is_file():
        return None
    data = path.read_bytes()
    return Asset(data, kind, hashlib.sha256(data).hexdigest()[:16])


def static(name: str) -> str:
    """Where a file of the package is found; browsers may keep it for ever."""
    found = asset(name)
    if found is None:
        raise LookupError(name)
    return f"/static/{found.tag}/{name}"


# -- where things are


def url_of(subject: object) -> str:
    """The page of a checkpoint (or its reference), an adapter, a base model, a merged model or a job."""
    if isinstance(subject, Checkpoint):
        return f"/checkpoints/{quote(subject.ref)}"
    if isinstance(subject, AdapterName):
        return f"/adapters/{quote(str(subject))}"
    if isinstance(subject, BaseModel):
        return f"/bases/{quote(subject.name)}"
    if isinstance(subject, Merged):
        return f"/merged/{subject.digest.hex}"
    if isinstance(subject, Job):
        return f"/jobs/{subject.id}"
    if isinstance(subject, str):
        return f"/checkpoints/{quote(subject)}"
    raise TypeError(f"no page for a {type(subject).__name__}")


# -- how things read


def size(count: float) -> str:
    """Bytes for people, as the command line shows them: `1.5 GB`, in powers of 1000."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.1f} {_UNITS[unit]}"


def number(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,}"


def metric(value: float | None) -> str:
    """A measured value: five digits that count; `–` for none."""
    if value is None:
        return "–"
    return f"{value:.5g}" if math.isfinite(value) else str(value)


def short(digest: Digest | str) -> str:
    """The first 12 digits of a digest."""
    return digest.short if isinstance(digest, Digest) else digest.removeprefix("blake3:")[:12]


def when(at: datetime | None) -> Markup:
    """A time, in UTC, to the minute."""
    if at is None:
        return Markup("–")
    at = at.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(at.isoformat(), f"{at:%Y-%m-%d %H:%M}")


def ago(at: datetime | None) -> Markup:
    """How long ago a time was; the time itself when pointed at."""
    if at is None:
        return Markup("–")
    at = at.astimezone(UTC)
    return Markup('<time datetime="{}" title="{} UTC">{}</time>').format(
        at.isoformat(), f"{at:%Y-%m-%d %H:%M:%S}", _distance(utc_now(), at)
    )


def _distance(now: datetime, at: datetime) -> str:
    seconds = int((now - at).total_seconds())
    if seconds < 0:
        return f"{at:%Y-%m-%d %H:%M}"
    if seconds < _MINUTE:
        return "just now"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE} min ago"
    if seconds < _DAY:
        return f"{seconds // _HOUR} h ago"
    if seconds < 30 * _DAY:
        days = seconds // _DAY
        return f"{days} day{'s' if days > 1 else ''} ago"
    return f"{at:%Y-%m-%d}"


def _is_safe_link(url: str) -> bool:
    return urlsplit(url).scheme.lower() in ("", "http", "https", "mailto")


@cache
def _markdown() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable("table").disable("image")
    reader.validateLink = _is_safe_link  # type: ignore[method-assign]
    return reader


def markdown(text: str) -> Markup:
    """A text in Markdown as HTML. HTML in it is shown as text, pictures are left out, and links lead to pages only."""
    tokens = _markdown().parse(text[:200_000])
    for token in (each for line in tokens for each in line.children or ()):
        if token.type == "link_open":
            token.attrSet("rel", "nofollow noopener noreferrer")
    drawn = _markdown().renderer.render(tokens, _markdown().options, {})
    for level in range(5, 0, -1):  # the page has a heading of its own
        drawn = drawn.replace(f"<h{level}>", f"<h{level + 1}>").replace(f"</h{level}>", f"</h{level + 1}>")
    return Markup(drawn)  # noqa: S704 - of markdown-it, which escapes what is in the text


def spark(values: Sequence[float], best: float | None = None) -> dict[str, Any]:
    """The points of a small curve in a box of 120 by 32, and where its best one is."""
    finite = [(at, value) for at, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        return {"points": "", "best": None}
    low, high = min(value for _, value in finite), max(value for _, value in finite)
    wide, tall = max(1, len(values) - 1), (high - low) or 1.0
    places = {
        at: (
            _SPARK_MARGIN + (_SPARK_WIDTH - 2 * _SPARK_MARGIN) * at / wide,
            _SPARK_MARGIN + (_SPARK_HEIGHT - 2 * _SPARK_MARGIN) * (1 - (value - low) / tall),
        )
        for at, value in finite
    }
    found = next((at for at, value in finite if value == best), None)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places.values())
    return {"points": points, "best": None if found is None else places[found]}


# -- drawing


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("registry.server.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"static": static, "url_of": url_of, "spark": spark}
    made.filters |= {
        "size": size,
        "number": number,
        "metric": metric,
        "short": short,
        "when": when,
        "ago": ago,
        "markdown": markdown,
        "query": _query,
    }
    return made


def _query(text: object) -> Markup:
    """Text as part of a query."""
    return escape(quote(str(text), safe=""))


def draw(template: str, values: Mapping[str, Any]) -> str:
    """The HTML of a template."""
    return _templates().get_template(template).render(values)


Drawing = Callable[[str, Mapping[str, Any]], str]
