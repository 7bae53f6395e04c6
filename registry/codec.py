"""Domain values back from the plain JSON that `registry.manifest.to_json` makes of them, by their annotations.

One rule for the database's documents and for what goes over HTTP: a value has this one written form.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from registry.errors import InvalidInput
from registry.manifest import to_json
from registry.refs import AdapterName, Digest

T = TypeVar("T")
_Read = Callable[[Any], Any]
_ODD_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def plain(value: object) -> Any:
    """A domain value as JSON that any reader takes: `to_json`, with the numbers that JSON does not have as text."""
    return _without_odd_numbers(to_json(value))


def _without_odd_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_odd_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_odd_numbers(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json(kind: type[T], document: Any) -> T:
    """The value of a type that a document was made of. Unknown keys are passed over, so that newer writers can be read.

    Args:
        kind: a frozen dataclass, or any type that its fields may have.
        document: plain JSON. Numbers that JSON does not have are the texts `nan`, `inf` and `-inf`.

    Raises:
        InvalidInput: the document is not one of such a value; names the field.
    """
    try:
        return cast("T", _reader(cast("Any", kind))(document))
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidInput(getattr(kind, "__name__", str(kind)), "", str(error)) from error


@cache
def _reader(kind: Any) -> _Read:
    origin = get_origin(kind)
    if is_dataclass(kind) and kind not in (Digest, AdapterName):
        return _dataclass_reader(cast("type[Any]", kind))
    if is_dataclass(origin):
        return _dataclass_reader(cast("type[Any]", origin), get_args(kind))
    if origin in (Union, types.UnionType):
        return _union_reader(get_args(kind))
    if origin is Literal:
        return _literal_reader(get_args(kind))
    if origin is tuple:
        return _tuple_reader(get_args(kind))
    if origin in (Mapping, dict) or kind is Mapping:
        values = _reader(get_args(kind)[1]) if origin else _as_is
        return lambda found: {str(key): values(item) for key, item in _object(found).items()}
    if origin in (Sequence, list):
        items = _reader(get_args(kind)[0])
        return lambda found: [items(item) for item in _array(found)]
    return _plain_reader(kind)


def _plain_reader(kind: Any) -> _Read:
    readers: dict[Any, _Read] = {
        Any: _as_is,
        object: _as_is,
        type(None): _nothing,
        str: _text,
        bool: _flag,
        int: _whole,
        float: _number,
        datetime: _time,
        Digest: lambda found: Digest.parse(_text(found)),
        AdapterName: lambda found: AdapterName.parse(_text(found)),
    }
    if kind in readers:
        return readers[kind]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    raise TypeError(f"no way to read a {kind}")


def _dataclass_reader(kind: type[Any], of: tuple[Any, ...] = ()) -> _Read:
    """Of a generic one, `of` are the types that it is of."""
    hints = {
        name: hint[of] if of and getattr(hint, "__parameters__", ()) else hint
        for name, hint in get_type_hints(kind).items()
    }
    # Readers are made when first used: a class may refer to itself.
    wanted = [
        (each.name, hints[each.name], each.default is MISSING and each.default_factory is MISSING)
        for each in fields(kind)
    ]

    def read(found: Any) -> Any:
        document = _object(found)
        values = {}
        for name, hint, is_required in wanted:
            if name in document:
                try:
                    values[name] = _reader(hint)(document[name])
                except (TypeError, ValueError) as error:
                    raise InvalidInput(name, "", str(error)) from error
            elif is_required:
                raise InvalidInput(name, "", "missing")
        return kind(**values)

    return read


def _union_reader(kinds: Sequence[Any]) -> _Read:
    """The first kind that takes the document; more particular ones go first. Where text is one, `inf` is text."""
    readers = [_reader(kind) for kind in kinds]

    def read(found: Any) -> Any:
        if found is None and type(None) in kinds:
            return None
        problem: Exception = TypeError("expected something else")
        for reader in readers:
            try:
                return reader(found)
            except (TypeError, ValueError, InvalidInput) as error:
                problem = error
        raise problem

    return read


def _literal_reader(choices: Sequence[Any]) -> _Read:
    def read(found: Any) -> Any:
        if found not in choices:
            raise ValueError(f"expected one of {', '.join(map(str, choices))}, found {found!r}")
        return found

    return read


def _tuple_reader(kinds: Sequence[Any]) -> _Read:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        items = _reader(kinds[0])
        return lambda found: tuple(items(item) for item in _array(found))
    readers = [_reader(kind) for kind in kinds]
    return lambda found: tuple(reader(item) for reader, item in zip(readers, _array(found), strict=True))


def _as_is(found: Any) -> Any:
    return found


def _nothing(found: Any) -> None:
    if found is not None:
        raise TypeError(f"expected null, found {found!r}")


def _object(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise TypeError(f"expected an object, found {type(found).__name__}")
    return found


def _array(found: Any) -> Sequence[Any]:
    if not isinstance(found, (list, tuple)):
        raise TypeError(f"expected an array, found {type(found).__name__}")
    return found


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"expected text, found {type(found).__name__}")
    return found


def _flag(found: Any) -> bool:
    if not isinstance(found, bool):
        raise TypeError(f"expected true or false, found {found!r}")
    return found


def _whole(found: Any) -> int:
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"expected a whole number, found {found!r}")
    return found


def _number(found: Any) -> float:
    if isinstance(found, str) and found in _ODD_NUMBERS:
        return _ODD_NUMBERS[found]
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"expected a number, found {found!r}")
    return float(found)


def _time(found: Any) -> datetime:
    moment = datetime.fromisoformat(_text(found))
    if moment.tzinfo is None:
        raise ValueError(f"a time without its zone: {found}")
    return moment.astimezone(UTC)
