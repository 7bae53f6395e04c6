"""JSON schemas of the domain's values, by the annotations that `registry.codec` reads and writes them by."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Literal, Union, final, get_args, get_origin, get_type_hints

from registry.refs import AdapterName, Digest

Schema = dict[str, Any]
_PLAIN: Mapping[Any, Schema] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]},
    datetime: {"type": "string", "format": "date-time"},
    Digest: {"type": "string", "pattern": "^blake3:[0-9a-f]{64}$"},
    AdapterName: {"type": "string", "description": "name or namespace/name"},
    type(None): {"type": "null"},
    Any: {},
    object: {},
}


@final
class Schemas:
    """Makes schemas. Those of dataclasses are components, named after their class.

    What is sent may leave out what has a default, and write a digest without its `blake3:`; what is answered has everything.
    """

    def __init__(self) -> None:
        self.components: dict[str, Schema] = {}
        self._kinds: dict[str, Any] = {}

    def of(self, kind: Any, *, is_sent: bool = False) -> Schema:
        """The schema of a type; `is_sent`: by a client."""
        origin, inner = get_origin(kind), get_args(kind)
        if is_dataclass(origin if origin is not None else kind) and kind not in _PLAIN:
            return self._component(kind, is_sent)
        if kind is Digest and is_sent:
            return {"type": "string", "pattern": "^(blake3:)?[0-9a-f]{64}$"}
        if isinstance(kind, type) and issubclass(kind, Enum):
            return {"enum": [each.value for each in kind]}
        if kind in _PLAIN:
            return dict(_PLAIN[kind])
        if origin in (Union, types.UnionType):
            return {"anyOf": [self.of(each, is_sent=is_sent) for each in inner]}
        if origin is Literal:
            return {"enum": list(inner)}
        if origin in (Mapping, dict):
            return {"type": "object", "additionalProperties": self.of(inner[1], is_sent=is_sent)}
        return self._array(origin, inner, is_sent)

    def _array(self, origin: Any, inner: tuple[Any, ...], is_sent: bool) -> Schema:
        if origin in (Sequence, list, Iterator) or (origin is tuple and inner[-1] is Ellipsis):
            return {"type": "array", "items": self.of(inner[0], is_sent=is_sent)}
        if origin is tuple:
            items = [self.of(each, is_sent=is_sent) for each in inner]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        raise TypeError(f"no schema for {origin}")

    def _component(self, kind: Any, is_sent: bool) -> Schema:
        name = _name(kind) + ("Sent" if is_sent and not _name(kind).startswith(("Sent", "New")) else "")
        if self._kinds.setdefault(name, (kind, is_sent)) != (kind, is_sent):
            raise TypeError(f"two types are called {name}")
        if name not in self.components:
            self.components[name] = {}  # it may refer to itself
            self.components[name] = self._object(get_origin(kind) or kind, get_args(kind), is_sent)
        return {"$ref": f"#/components/schemas/{name}"}

    def _object(self, kind: Any, of: tuple[Any, ...], is_sent: bool) -> Schema:
        hints = get_type_hints(kind)
        if of:  # of a generic one, what it is of
            hints = {name: hint[of] if getattr(hint, "__parameters__", ()) else hint for name, hint in hints.items()}
        needed = [
            each.name
            for each in fields(kind)
            if not is_sent or (each.default is MISSING and each.default_factory is MISSING)
        ]
        found: Schema = {
            "type": "object",
            "description": inspect.cleandoc(kind.__doc__ or ""),
            "properties": {each.name: self.of(hints[each.name], is_sent=is_sent) for each in fields(kind)},
        }
        return {**found, "required": needed} if needed else found


def _name(kind: Any) -> str:
    """`Page[Checkpoint]` is a `PageOfCheckpoint`."""
    origin = get_origin(kind)
    if origin is None:
        return str(kind.__name__)
    return f"{origin.__name__}Of{''.join(_name(each) for each in get_args(kind))}"
