"""A visit to a page: who comes, what they ask for, and what they get. A page is a function of a `Visit`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, final

from starlette.datastructures import Headers
from starlette.responses import Response

from registry.errors import InvalidInput
from registry.server.scope import Scope
from registry.teamwork import Principal, Role

T = TypeVar("T")


@final
class Values:
    """What a query or a form says: names with one value or several, as text without blanks around it."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._pairs = pairs

    def one(self, name: str, default: str = "") -> str:
        """The last value of a name."""
        return next((value.strip() for key, value in reversed(self._pairs) if key == name), default)

    def all(self, name: str) -> list[str]:
        """Every value of a name that says something, in order, each once."""
        return list(dict.fromkeys(value.strip() for key, value in self._pairs if key == name and value.strip()))

    def number(self, name: str, default: int, bounds: range) -> int:
        """A whole number.

        Raises:
            InvalidInput: it is none, or out of bounds.
        """
        text = self.one(name)
        if not text:
            return default
        if not text.isascii() or not text.isdecimal() or int(text[:18]) not in bounds:
            raise InvalidInput(name, text[:80], f"expected a whole number from {bounds[0]} to {bounds[-1]}")
        return int(text)

    def has(self, name: str) -> bool:
        """Whether it is there at all, as a box that was ticked is."""
        return any(key == name for key, _ in self._pairs)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Everything, as it came."""
        return tuple(self._pairs)


class Draw(Protocol):
    """Draws a template with values."""

    def __call__(self, template: str, /, **values: Any) -> str: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request for a page.

    `scope` is the registry as the visitor may see and change it. `path`, `query` and `form` are what was asked with; `url` is path and
    query. `is_partial`: htmx asks, for a part of a page. `address` is where from, `kept` what the browser keeps of signing in. `draw` gives the
    HTML of a template, `in_thread` has something done that waits. `is_closing` tells whether the server is about to stop.
    """

    scope: Scope
    path: Mapping[str, str]
    query: Values
    form: Values
    url: str
    is_partial: bool
    headers: Headers
    address: str
    kept: str
    draw: Draw
    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    is_closing: Callable[[], bool]

    @property
    def principal(self) -> Principal:
        """Who comes."""
        return self.scope.principal

    def can(self, role: str) -> bool:
        """Whether the visitor may do what a role is needed for; what an admin may, only without limits to namespaces."""
        needed = Role(role)
        return self.principal.role.covers(needed) and not (needed is Role.ADMIN and self.principal.namespaces)


@final
class Shown:
    """A page, or a part of one.

    Args:
        template: what is drawn; a fragment's name begins with `_`.
        status: of the answer.
        replace_url: what the browser's address becomes, when a part of a page was drawn.
        is_secret: nothing keeps a copy of it on the way.
        values: what it is drawn with.
    """

    def __init__(
        self, template: str, /, *, status: int = 200, replace_url: str = "", is_secret: bool = False, **values: Any
    ) -> None:
        self.template, self.status, self.replace_url, self.values = template, status, replace_url, values
        self.is_secret = is_secret


@final
@dataclass(frozen=True, slots=True)
class Moved:
    """Go on at another page of ours. `cookie` is set on the way: its text, empty to take it away."""

    url: str
    cookie: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Stream:
    """Server-sent events: the name of each, and its HTML. Ends when the iterator does, or the visitor goes."""

    events: AsyncIterator[tuple[str, str]]


Answer = Shown | Moved | Stream | Response
Handler = Callable[[Visit], Answer]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PageRule:
    """A page: how it is asked for and who may. `role` is None for what everybody may see. `is_slow`: it takes longer than the database does."""

    method: str
    path: str
    role: Role | None
    handler: Handler
    is_slow: bool
    subject: str


@final
class Pages:
    """The pages of one subject."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._rules: list[PageRule] = []

    def __iter__(self) -> Iterator[PageRule]:
        return iter(self._rules)

    def page(
        self, method: str, path: str, role: Role | None, *, is_slow: bool = False
    ) -> Callable[[Callable[[Visit], T]], Callable[[Visit], T]]:
        """Make a function a page.

        Args:
            method, path: what is asked for. Of two paths that fit, the one with more fixed text counts.
            role: the least one that may; None: everybody.
            is_slow: it takes longer than asking the database does.
        """

        def add(handler: Callable[[Visit], T]) -> Callable[[Visit], T]:
            self._rules.append(
                PageRule(
                    method=method,
                    path=path,
                    role=role,
                    handler=handler,  # type: ignore[arg-type]
                    is_slow=is_slow,
                    subject=self._subject,
                )
            )
            return handler

        return add
