"""The table of routes: how each is called, who may call it, and what it answers. Rights are decided here and nowhere else.

A handler is a function of a `Scope`, of what the path and the query say (plain parameters, their annotation carries the sentence that the
documentation shows), and of at most one body, a frozen dataclass. What it returns is what is answered.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Generic,
    NoReturn,
    TypeVar,
    Union,
    final,
    get_args,
    get_origin,
    get_type_hints,
)

from registry.codec import from_json
from registry.errors import InvalidInput
from registry.teamwork import Role

T = TypeVar("T")
_H = TypeVar("_H", bound=Callable[..., Any])

BODY_BYTES = 4 << 20
RAW, HEADED = "incoming", "headers"  # what a handler calls a body that it reads itself, and the request's headers
_YES_NO = {"true": True, "false": False, "1": True, "0": False}


@final
@dataclass(frozen=True, slots=True)
class Later(Generic[T]):
    """What a handler gives that has only read so far: `write` does the rest, in one transaction with the answer to a keyed request."""

    write: Callable[[], T]


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """A parameter of the path or the query. `kind` is its Python type; `about` the sentence that documents it; `bounds` what a number may be."""

    name: str
    is_in_path: bool
    kind: Any
    about: str
    default: Any = inspect.Parameter.empty
    bounds: range | None = None

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A route. `body` is the type of its JSON body, None for none; `is_raw`: its body is bytes, which the handler reads itself.

    `is_keyed`: it takes an `Idempotency-Key`; `is_later`: its handler gives a `Later`. `current` gives what `If-Match` speaks of. `answer` is
    the type of what it answers, `status` that of success.
    """

    method: str
    path: str
    role: Role
    handler: Callable[..., Any]
    params: tuple[Param, ...]
    body_name: str
    body: Any
    answer: Any
    is_raw: bool
    is_headed: bool
    is_keyed: bool
    is_later: bool
    current: Callable[..., Any] | None
    status: int
    body_bytes: int
    subject: str

    @property
    def name(self) -> str:
        """Its operation's name, the same for ever: clients are generated from it."""
        return self.handler.__name__

    @property
    def is_streamed(self) -> bool:
        """Whether it answers a list that is sent while it is made, and so has no tag."""
        return get_origin(self.answer) is Iterator

    @property
    def is_conditional(self) -> bool:
        """Whether it takes an `If-Match`."""
        return self.current is not None

    def arguments(self, path: Mapping[str, str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        """What the handler is called with, from a request.

        Raises:
            InvalidInput: something is missing, unknown, or not what it should be.
        """
        known = {param.name for param in self.params if not param.is_in_path}
        if unknown := sorted(query.keys() - known):
            raise InvalidInput(
                unknown[0], query[unknown[0]], f"not a parameter here: {', '.join(sorted(known)) or 'none'}"
            )
        found = {}
        for param in self.params:
            given = path if param.is_in_path else query
            if param.name in given:
                found[param.name] = _parse(param, given[param.name])
            elif param.is_required:
                raise InvalidInput(param.name, "", "missing")
        if self.body is not None:
            found[self.body_name] = from_json(self.body, _document(body))
        return found


def _parse(param: Param, text: str) -> Any:
    kind = _plain_kind(param.kind)
    try:
        if kind is bool:
            return _YES_NO[text.lower()]
        if kind is int:
            return _within(param.bounds, int(text))
        if kind is float:
            return float(text)
        if text == "" and not param.is_required:
            return param.default
        return from_json(kind, text)
    except (ValueError, KeyError) as error:
        raise InvalidInput(param.name, text, f"expected {_wording(kind)}") from error
    except InvalidInput as error:
        raise InvalidInput(param.name, text, error.reason) from error


def _within(bounds: range | None, number: int) -> int:
    if bounds is not None and number not in bounds:
        raise InvalidInput("", "", f"expected {bounds[0]} to {bounds[-1]}")
    return number


def _plain_kind(kind: Any) -> Any:
    """Of an optional kind, what it is when it is given."""
    if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    return kind


def _wording(kind: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "something else")


def _document(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("body", "", f"expected JSON: {error}") from error


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f'{text} is not JSON; write it as text, "{text.lower()}"')


@final
class Routes:
    """The routes of one subject, in the order of their definition."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._rules: list[Rule] = []

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules)

    def route(
        self,
        method: str,
        path: str,
        role: Role,
        *,
        is_keyed: bool = False,
        current: Callable[..., Any] | None = None,
        status: int = 200,
        body_bytes: int = BODY_BYTES,
    ) -> Callable[[_H], _H]:
        """Make a function the handler of a route.

        Args:
            method, path: what is asked for; below `/api/v1`.
            role: the least one that may.
            is_keyed: it is carried out in one transaction, together with the answer that an idempotency key keeps.
            current: gives, with the same arguments, what is about to be changed, so that `If-Match` can guard it.
            status: of success.
            body_bytes: the longest body.
        """

        def add(handler: _H) -> _H:
            found = _signature(path, handler)
            self._rules.append(
                Rule(
                    method=method,
                    path=path,
                    role=role,
                    handler=handler,
                    is_keyed=is_keyed,
                    current=current,
                    status=status,
                    body_bytes=body_bytes,
                    subject=self._subject,
                    **found,
                )
            )
            return handler

        return add


def _signature(path: str, handler: Callable[..., Any]) -> dict[str, Any]:
    """What a handler takes and gives, by its annotations."""
    hints = get_type_hints(handler, include_extras=True)
    answer = hints.pop("return")
    is_later = get_origin(answer) is Later
    params, body_name, body = [], "", None
    for name, declared in list(inspect.signature(handler).parameters.items())[1:]:
        kind = hints[name]
        if get_origin(kind) is Annotated:
            found, about, *bounds = get_args(kind)
            is_in_path = f"{{{name}}}" in path
            params.append(
                Param(
                    name=name,
                    is_in_path=is_in_path,
                    kind=found,
                    about=about,
                    default=declared.default,
                    bounds=bounds[0] if bounds else None,
                )
            )
        elif name not in (RAW, HEADED):
            body_name, body = name, kind
    return {
        "params": tuple(params),
        "body_name": body_name,
        "body": body,
        "answer": get_args(answer)[0] if is_later else answer,
        "is_later": is_later,
        "is_raw": RAW in hints,
        "is_headed": HEADED in hints,
    }
