"""Errors as answers: one shape for all of them, the status by the error's class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from registry import errors
from registry.errors import RegistryError
from registry.failures import to_document
from registry.wording import Words, explain

# Looked up along the class tree, so a subclass answers like its parent.
STATUSES: Mapping[type, int] = {
    errors.InvalidInput: 400,
    errors.TooLarge: 413,
    errors.MissingPackage: 501,
    errors.NotFound: 404,
    errors.Ambiguous: 409,
    errors.Conflict: 409,
    errors.Outdated: 412,
    errors.UnreadableFile: 422,
    errors.Refused: 422,
    errors.BelowPolicy: 422,
    errors.Changed: 409,
    errors.NotServable: 422,
    errors.NotConvertible: 422,
    errors.NothingMerged: 422,
    errors.NotFinite: 422,
    errors.StorageFailed: 503,
    errors.OutOfMemory: 503,
    errors.ProgramFailed: 422,
    errors.AccessDenied: 403,
    errors.Unauthenticated: 401,
    errors.TooManyTries: 429,
    errors.Cancelled: 409,
    errors.ServerFailed: 502,
}
_RETRY_SECONDS = 2
# What the server itself has to say, as HTTP has it; no error of the registry.
_OWN_WORDS: Mapping[int, tuple[str, str]] = {
    404: ("no_such_route", "there is nothing at this address"),
    405: ("method_not_allowed", "this address does not take this method"),
    416: ("range_not_satisfiable", "the file has no such bytes"),
    421: ("unknown_host", "this server does not go by that name"),
    500: ("unforeseen", "something unforeseen happened here; the server's log tells what, under this request id"),
    503: ("busy", "too many requests are under way"),
}
_OWN_HINTS: Mapping[int, str] = {
    404: "the API is below /api/v1, and described at /docs",
    421: "`ckpt serve --allow-host NAME`, or CKPT_ALLOWED_HOSTS, names it",
}


def status_of(error: RegistryError) -> int:
    """The HTTP status of an error."""
    if type(error) is errors.Conflict and error.subject == "database":  # busy, and will not be for long
        return 503
    return next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), 500)


def problem(error: RegistryError, request_id: str) -> Response:
    """The answer that an error is."""
    status, document = status_of(error), to_document(error)
    return _answer(status, document["code"], explain(error), document["fields"], request_id, headers_of(error, status))


def own_problem(status: int, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of the server's own: nothing there, not this method, something unforeseen."""
    code, message = _OWN_WORDS.get(status, ("http", f"HTTP status {status}"))
    waits = {"Retry-After": str(_RETRY_SECONDS)} if status == 503 else {}
    return _answer(
        status, code, Words(message, _OWN_HINTS.get(status, "")), {}, request_id, {**waits, **(headers or {})}
    )


def own_words(status: int) -> str:
    """What a status means, in words."""
    return _OWN_WORDS.get(status, ("", f"HTTP status {status}"))[1]


def headers_of(error: RegistryError, status: int) -> dict[str, str]:
    """What an error says in headers."""
    if isinstance(error, errors.Unauthenticated):
        return {"WWW-Authenticate": 'Bearer realm="ckpt"'}
    if isinstance(error, errors.TooManyTries):
        return {"Retry-After": str(error.retry_seconds)}
    return {"Retry-After": str(_RETRY_SECONDS)} if status == 503 else {}


def _answer(
    status: int, code: str, words: Words, fields: Mapping[str, Any], request_id: str, headers: Mapping[str, str]
) -> Response:
    told = {"code": code, "message": words.message, "hint": words.hint, "fields": fields, "request_id": request_id}
    # surrogates, of paths that are not Unicode, have no other way out
    content = json.dumps({"error": told}, default=str).encode()
    return Response(content, status, headers=dict(headers), media_type="application/json")
