"""Errors as plain JSON, and back: how they pass from a server or a worker to whoever asked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from registry import errors
from registry.codec import from_json
from registry.errors import RegistryError, ServerFailed
from registry.manifest import Report, to_json


def to_document(error: RegistryError) -> dict[str, Any]:
    """`code` and `fields` of an error."""
    return {"code": error.code, "fields": {name: to_json(value) for name, value in error.fields.items()}}


def from_document(document: Mapping[str, Any], source: str = "") -> RegistryError:
    """The error that was written down, of its own class, with its fields.

    Args:
        document: with `code` and `fields`.
        source: where it comes from, to be told when it is an error that this version does not know.
    """
    code, fields = document.get("code"), document.get("fields") or {}
    kind = _KINDS.get(str(code))
    if kind is None:
        return ServerFailed(source, f"{code}: {document.get('message') or fields}")
    wanted = [name for name in inspect.signature(kind).parameters if name in fields]
    error: RegistryError = kind(**{name: _field(name, fields[name]) for name in wanted})
    return error


def is_known(code: object) -> bool:
    """Whether there is an error of this code here."""
    return code in _KINDS


def _field(name: str, found: Any) -> Any:
    if name == "report":
        return from_json(Report, found)
    return tuple(found) if isinstance(found, list) else found


def _kinds(root: type[RegistryError]) -> Iterator[type[RegistryError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _kinds(kind)


_KINDS: Mapping[str, type[Any]] = {kind.code: kind for kind in _kinds(errors.RegistryError)}
