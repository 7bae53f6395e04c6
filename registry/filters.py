"""Filters: `metric.eval_loss < 0.9 and tag.team = 'nlu' and step >= 200`, parsed into frozen nodes that judge checkpoints.

    filter     = all { "or" all }
    all        = part { "and" part }
    part       = "not" part | "(" filter ")" | comparison
    comparison = name ( "=" | "==" | "!=" | "<" | "<=" | ">" | ">=" ) value
               | name "like" text                   % stands for any characters, _ for one; a-z are the same as A-Z
               | name "in" "(" value { "," value } ")"
               | name "is" [ "not" ] "null"
    name       = "metric." key | "tag." key         also "metrics." and "tags."
               | "step" | "version" | "rank" | "alpha" | "parameters" | "size"                            numbers; size in bytes
               | "adapter" | "run" | "base" | "method" | "format" | "dtype" | "author" | "arch_version" | "alias"         text
               | "created"                          an ISO 8601 date (midnight UTC) or time (UTC unless it says otherwise) in quotes
    key        = letters, digits and _ | any characters in double quotes or backticks: metric."val/loss"
    value      = number | text
    number     = 1, 1.5, 1e-3, -2
    text       = in single or double quotes; a quote inside is doubled

Keywords may be written in any case; names and text are compared as they are.

What is missing (no such metric or tag, no step, a NaN, an empty `arch_version`…) makes every comparison false, `!=` too; `is null` finds
it, and `not` turns any answer round. A tag compared with a number is compared as a number where its text is one, and else is false.
Of several aliases any one may satisfy a comparison; `alias != 'x'` says that none of them is x.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal, final

from registry.errors import InvalidFilter
from registry.manifest import Checkpoint

MAX_CHARACTERS = 10_000
MAX_NESTING = 50
MAX_PATTERN = 1000

Kind = Literal["number", "text", "time", "tag"]
Value = float | str | datetime

_NUMBER = r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_TOKEN = re.compile(
    rf"""\s*(?:
    (?P<name>[^\W\d]\w*(?:\.(?:\w+|"(?:[^"]|"")+"|`(?:[^`]|``)+`))?)
    |(?P<number>{_NUMBER})
    |(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    |(?P<symbol><=|>=|!=|==|[=<>(),])
    |(?P<other>\S)
    |(?P<end>\Z))""",
    re.VERBOSE,
)
_ATTRIBUTES: Mapping[str, tuple[Kind, Callable[[Checkpoint], Any]]] = {
    "step": ("number", lambda checkpoint: checkpoint.step),
    "version": ("number", lambda checkpoint: checkpoint.version),
    "rank": ("number", lambda checkpoint: checkpoint.manifest.rank),
    "alpha": ("number", lambda checkpoint: checkpoint.manifest.alpha),
    "parameters": ("number", lambda checkpoint: checkpoint.manifest.parameters),
    "size": ("number", lambda checkpoint: checkpoint.manifest.size_bytes),
    "adapter": ("text", lambda checkpoint: str(checkpoint.adapter)),
    "run": ("text", lambda checkpoint: checkpoint.run),
    "base": ("text", lambda checkpoint: checkpoint.base_name),
    "method": ("text", lambda checkpoint: checkpoint.manifest.method),
    "format": ("text", lambda checkpoint: checkpoint.manifest.format.value),
    "dtype": ("text", lambda checkpoint: checkpoint.manifest.dtype),
    "author": ("text", lambda checkpoint: checkpoint.author),
    "arch_version": ("text", lambda checkpoint: checkpoint.arch_version),
    "alias": ("text", lambda checkpoint: checkpoint.aliases),
    "created": ("time", lambda checkpoint: checkpoint.created_at),
}
_KEYED = {"metric": "metric", "metrics": "metric", "tag": "tag", "tags": "tag"}
_KEYWORDS = frozenset({"and", "or", "not", "in", "is", "like", "null"})
_LITERALS: Mapping[Kind, tuple[str, ...]] = {
    "number": ("number",),
    "text": ("text",),
    "time": ("text",),
    "tag": ("number", "text"),
}
_DESCRIPTIONS: Mapping[Kind, str] = {
    "number": "a number",
    "text": "text in quotes",
    "time": "an ISO 8601 date or time in quotes",
    "tag": "a number or text in quotes",
}
_NAMES = f"metric.NAME, tag.KEY, {', '.join(_ATTRIBUTES)}"


@lru_cache(maxsize=256)
def _like_pattern(text: str) -> re.Pattern[str]:
    first, *others = (re.escape(part).replace("_", ".") for part in text.split("%"))
    if not others:
        return re.compile(first, re.IGNORECASE | re.DOTALL | re.ASCII)
    # Atomic: the leftmost place of each part is always good enough, so that no pattern takes exponential time.
    middle = "".join(f"(?>.*?{part})" for part in others[:-1])
    return re.compile(f"{first}{middle}.*{others[-1]}", re.IGNORECASE | re.DOTALL | re.ASCII)


def _is_like(found: str, pattern: str) -> bool:
    return _like_pattern(pattern).fullmatch(found) is not None


def as_number(text: str) -> float | None:
    """The number that a tag's text is written as, if it is one."""
    return float(text) if re.fullmatch(_NUMBER, text) else None


_TESTS: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "like": _is_like,
    "in": operator.eq,
}


@final
@dataclass(frozen=True, slots=True)
class Field:
    """What a comparison looks at: `metric` or `tag` with a key, or the name of an attribute without one."""

    name: str
    key: str = ""

    @property
    def kind(self) -> Kind:
        """What it may be compared with; a tag with text and numbers."""
        if self.key:
            return "number" if self.name == "metric" else "tag"
        return _ATTRIBUTES[self.name][0]

    def values(self, checkpoint: Checkpoint) -> tuple[Value, ...]:
        """What the checkpoint has there: nothing, one value, or several aliases."""
        if self.name == "tag":
            found = checkpoint.tags.get(self.key)
            return () if found is None else (found,)
        value: Any = checkpoint.metric(self.key) if self.key else _ATTRIBUTES[self.name][1](checkpoint)
        if isinstance(value, tuple):
            return value
        is_missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
        return () if is_missing else (value,)

    def __str__(self) -> str:
        if not self.key:
            return self.name
        quoted = self.key.replace('"', '""')
        return f"{self.name}.{self.key}" if re.fullmatch(r"\w+", self.key) else f'{self.name}."{quoted}"'


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """A field against a value; `in` alone has several. `==` is `=` here."""

    field: Field
    operator: str
    values: tuple[Value, ...]

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint has a value there that compares so."""
        found = self.field.values(checkpoint)
        results = (self._holds(item, value) for item in found for value in self.values)
        return bool(found) and (all(results) if self.operator == "!=" else any(results))

    def _holds(self, found: Value, value: Value) -> bool:
        if isinstance(found, str) and isinstance(value, float):
            number = as_number(found)
            return number is not None and _TESTS[self.operator](number, value)
        return _TESTS[self.operator](found, value)

    def __str__(self) -> str:
        shown = ", ".join(_show(value) for value in self.values)
        return f"{self.field} in ({shown})" if self.operator == "in" else f"{self.field} {self.operator} {shown}"


def _show(value: Value) -> str:
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    text = value.isoformat() if isinstance(value, datetime) else value.replace("'", "''")
    return f"'{text}'"


@final
@dataclass(frozen=True, slots=True)
class Exists:
    """`name is not null`."""

    field: Field

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint has a value there."""
        return bool(self.field.values(checkpoint))

    def __str__(self) -> str:
        return f"{self.field} is not null"


@final
@dataclass(frozen=True, slots=True)
class Not:
    """True where its part is false. `name is null` is the negation of `Exists`."""

    part: Node

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether the part does not match."""
        return not self.part.matches(checkpoint)

    def __str__(self) -> str:
        if isinstance(self.part, Exists):
            return f"{self.part.field} is null"
        return f"not ({self.part})" if isinstance(self.part, And | Or) else f"not {self.part}"


@final
@dataclass(frozen=True, slots=True)
class And:
    """True where all of two or more parts are."""

    parts: tuple[Node, ...]

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether every part matches."""
        return all(part.matches(checkpoint) for part in self.parts)

    def __str__(self) -> str:
        return " and ".join(f"({part})" if isinstance(part, And | Or) else str(part) for part in self.parts)


@final
@dataclass(frozen=True, slots=True)
class Or:
    """True where any of two or more parts is."""

    parts: tuple[Node, ...]

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether a part matches."""
        return any(part.matches(checkpoint) for part in self.parts)

    def __str__(self) -> str:
        return " or ".join(f"({part})" if isinstance(part, Or) else str(part) for part in self.parts)


Node = And | Or | Not | Comparison | Exists


@final
@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed filter. `str()` gives an expression that parses to an equal filter."""

    root: Node

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint passes."""
        return self.root.matches(checkpoint)

    def __str__(self) -> str:
        return str(self.root)


def parse_filter(text: str) -> Filter:
    """Read an expression of the grammar in the module's docstring.

    Raises:
        InvalidFilter: it is not one, compares things that cannot be compared, has more than 10,000 characters, or nests `not` and
            parentheses deeper than 50. `position` is where, `reason` what was expected there.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidFilter(text, MAX_CHARACTERS, f"expected at most {MAX_CHARACTERS} characters, found {len(text)}")
    return Filter(_Parser(text).parse())


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= 40 else f"{self.text[:40]}…"
        return shown if self.kind == "text" else repr(shown) if shown else "the end"


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "end"
        yield _Token(kind, match[kind], match.start(kind))


class _Parser:
    """Recursive descent, one method for each rule of the grammar."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._remaining = _tokens(text)
        self._token = next(self._remaining)
        self._nesting = 0

    def parse(self) -> Node:
        node = self._filter()
        if self._token.kind != "end":
            raise self._expected("and, or, the end")
        return node

    def _filter(self) -> Node:
        parts = [self._all()]
        while self._accept("or"):
            parts.append(self._all())
        return Or(tuple(parts)) if len(parts) > 1 else parts[0]

    def _all(self) -> Node:
        parts = [self._part()]
        while self._accept("and"):
            parts.append(self._part())
        return And(tuple(parts)) if len(parts) > 1 else parts[0]

    def _part(self) -> Node:
        opening = self._token
        if self._accept("not"):
            return Not(self._nested(self._part, opening))
        if self._accept("("):
            node = self._nested(self._filter, opening)
            if not self._accept(")"):
                raise self._expected("and, or, )")
            return node
        return self._comparison()

    def _nested(self, rule: Callable[[], Node], opening: _Token) -> Node:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise self._invalid(f"expected at most {MAX_NESTING} levels of parentheses and not", opening)
        node = rule()
        self._nesting -= 1
        return node

    def _comparison(self) -> Node:
        field = self._field()
        if self._accept("is"):
            return self._null(field)
        sign = self._operator(field)
        if sign != "in":
            return Comparison(field, sign, (self._value(field, sign),))
        if not self._accept("("):
            raise self._expected("( and a list of values")
        values = [self._value(field, sign)]
        while self._accept(","):
            values.append(self._value(field, sign))
        if not self._accept(")"):
            raise self._expected("a comma, )")
        return Comparison(field, sign, tuple(values))

    def _null(self, field: Field) -> Node:
        is_negated = self._accept("not")
        if not self._accept("null"):
            raise self._expected("null" if is_negated else "null, not null")
        return Exists(field) if is_negated else Not(Exists(field))

    def _field(self) -> Field:
        token = self._token
        if token.kind != "name" or token.text.lower() in _KEYWORDS:
            raise self._expected(f"not, ( or a name: {_NAMES}")
        name, dot, key = token.text.partition(".")
        if not dot and name in _ATTRIBUTES:
            self._advance()
            return Field(name)
        if name not in _KEYED:
            raise self._invalid(_unknown_name(token), token)
        self._advance()
        if not dot:
            raise self._expected(f'a key right after {name}, as in {name}.loss or {name}."val/loss"')
        return Field(_KEYED[name], _unquote(key))

    def _operator(self, field: Field) -> str:
        sign = "=" if self._token.text == "==" else self._token.text.lower()
        allowed = [test for test in _TESTS if test != "like" or field.kind in ("text", "tag")]
        if sign not in allowed or self._token.kind not in ("symbol", "name"):
            advice = f'; a key with other characters needs quotes: {field.name}."val/loss"' if field.key else ""
            raise self._expected(f"is or one of {' '.join(allowed)} after {field}", advice)
        self._advance()
        return sign

    def _value(self, field: Field, sign: str) -> Value:
        kind: Kind = "text" if sign == "like" else field.kind
        token = self._token
        if token.kind not in _LITERALS[kind]:
            raise self._expected(f"{_DESCRIPTIONS[kind]} for {field}")
        value = self._time(token) if kind == "time" else self._literal(token)
        if sign == "like" and len(token.text) > MAX_PATTERN:
            raise self._invalid(f"expected at most {MAX_PATTERN} characters after like", token)
        self._advance()
        return value

    def _literal(self, token: _Token) -> Value:
        if token.kind == "text":
            return _unquote(token.text)
        value = float(token.text)
        if math.isinf(value):
            raise self._invalid("expected a number that fits 64-bit floating point", token)
        return value

    def _time(self, token: _Token) -> datetime:
        try:
            time = datetime.fromisoformat(_unquote(token.text))
        except ValueError as error:
            raise self._invalid(f"expected {_DESCRIPTIONS['time']}, found {token}", token) from error
        return time if time.tzinfo else time.replace(tzinfo=UTC)

    def _accept(self, text: str) -> bool:
        if self._token.kind not in ("symbol", "name") or self._token.text.lower() != text:
            return False
        self._advance()
        return True

    def _advance(self) -> None:
        self._token = next(self._remaining)

    def _expected(self, what: str, advice: str = "") -> InvalidFilter:
        if self._token.kind == "other" and self._token.text in "'\"":
            return self._invalid(f"expected {what}, found a quote that is not closed", self._token)
        return self._invalid(f"expected {what}, found {self._token}{advice}", self._token)

    def _invalid(self, reason: str, token: _Token) -> InvalidFilter:
        return InvalidFilter(self._text, token.position, reason)


def _unquote(text: str) -> str:
    quote = text[0]
    return text[1:-1].replace(quote * 2, quote) if quote in "'\"`" else text


def _unknown_name(token: _Token) -> str:
    near = get_close_matches(token.text, [*_KEYED, *_ATTRIBUTES], n=1)
    question = f" (did you mean {near[0]}?)" if near else ""
    return f"expected {_NAMES}, found {token}{question}"
