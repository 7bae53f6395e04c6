"""The OpenAPI document, out of the table of routes: nothing in it is written twice."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import Enum
from typing import Any

from starlette.responses import Response

from registry.server.answering import KEY, REPLAYED
from registry.server.problems import STATUSES
from registry.server.routing import Param, Rule
from registry.server.schemas import Schema, Schemas
from registry.teamwork import Role

_ABOUT = """Record adapter checkpoints, choose, check, merge and ship them.

Every error has one shape, `Error`. Values are those of the Python library, field by field. Numbers that JSON does not have are the texts
`nan`, `inf` and `-inf`. Writes that take an `Idempotency-Key` happen once for each key of yours, within two days. Lists with a `cursor` in their
answer go on there. The answers of GET carry an `ETag`, but for lists that are sent while they are read."""
_ERROR: Schema = {
    "type": "object",
    "description": "What went wrong.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "hint", "fields", "request_id"],
            "properties": {
                "code": {"type": "string", "description": "Stable; one for each kind of error."},
                "message": {"type": "string", "description": "What happened, for people."},
                "hint": {"type": "string", "description": "What to do about it; may be empty."},
                "fields": {"type": "object", "description": "What the message is made of."},
                "request_id": {"type": "string", "description": "Names the request in the server's log."},
            },
        }
    },
}
_ERRORS = {
    "400": "Something in the request is not acceptable.",
    "401": "No token, or none that is good.",
    "403": "Not for this token.",
    "404": "Nothing has this name, or it may not be seen.",
    "409": "The state of the registry forbids it.",
    "429": "Too many wrong tokens.",
    "503": "The database or the store does not answer.",
}
_READS = frozenset({"400", "401", "403", "404", "409", "429", "503"})


def describe(rules: Sequence[Rule], prefix: str, version: str) -> dict[str, Any]:
    """The document.

    Args:
        rules: the routes.
        prefix: what goes before their paths.
        version: of this package.
    """
    schemas = Schemas()
    schemas.components["Error"] = _ERROR
    paths: dict[str, dict[str, Any]] = {}
    for rule in rules:
        paths.setdefault(prefix + rule.path, {})[rule.method.lower()] = _operation(rule, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ckpt registry", "version": version, "description": _ABOUT},
        "security": [{"token": []}],
        "tags": [{"name": name} for name in dict.fromkeys(rule.subject for rule in rules)],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.components.items())),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "`ckpt token create`"}},
            "responses": {_response_name(status): _error(text) for status, text in _ERRORS.items()},
        },
    }


def _operation(rule: Rule, schemas: Schemas) -> dict[str, Any]:
    summary, _, more = inspect.cleandoc(rule.handler.__doc__ or "").partition(". ")
    needed = f"Needs the role {rule.role}{', for all namespaces' if rule.role is Role.ADMIN else ''}."
    found: dict[str, Any] = {
        "operationId": rule.name,
        "tags": [rule.subject],
        "summary": summary.rstrip("."),
        "description": " ".join(filter(None, [more, needed])),
        "parameters": [*(_parameter(param, schemas) for param in rule.params), *_headers(rule)],
        "responses": {**_success(rule, schemas), **_unchanged(rule), **_failures(rule)},
        "x-role": rule.role.value,
    }
    if rule.is_raw:
        content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        found["requestBody"] = {"required": True, "content": content}
    elif rule.body is not None:
        schema = schemas.of(rule.body, is_sent=True)
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return found


def _parameter(param: Param, schemas: Schemas) -> dict[str, Any]:
    schema = schemas.of(param.kind)
    if param.bounds is not None:
        schema |= {"minimum": param.bounds[0], "maximum": param.bounds[-1]}
    if not param.is_required and param.default is not None:
        schema["default"] = param.default.value if isinstance(param.default, Enum) else param.default
    return {
        "name": param.name,
        "in": "path" if param.is_in_path else "query",
        "required": param.is_required,
        "description": param.about,
        "schema": schema,
    }


def _headers(rule: Rule) -> list[dict[str, Any]]:
    wanted = []
    if rule.is_keyed:
        wanted.append((KEY.title(), "The same key again gives the same answer, and changes nothing again."))
    if rule.is_conditional:
        wanted.append(
            ("If-Match", "The tag of what is about to be changed; when it is another by now, the status is 412.")
        )
    if _is_tagged(rule):
        wanted.append(
            ("If-None-Match", "The tag of an answer that is still there: if it has not changed, the status is 304.")
        )
    if rule.is_headed:
        wanted.append(("Range", "Some of the bytes: `bytes=FROM-TO`."))
    return [
        {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in wanted
    ]


def _success(rule: Rule, schemas: Schemas) -> dict[str, Any]:
    if rule.answer is Response:
        content: Schema = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        whole, part = (
            {"description": "The bytes.", "content": content},
            {"description": "A range of them.", "content": content},
        )
        return {"200": whole, "206": part, "416": _error("The file has no such bytes.")}
    told: dict[str, Any] = {
        "description": "Done." if rule.method != "GET" else "Found.",
        "content": {"application/json": {"schema": schemas.of(rule.answer)}},
    }
    if rule.is_keyed:
        told["headers"] = {REPLAYED: {"description": "It is the answer of before.", "schema": {"enum": ["true"]}}}
    return {str(rule.status): told}


def _is_tagged(rule: Rule) -> bool:
    return rule.method == "GET" and not rule.is_streamed


def _unchanged(rule: Rule) -> dict[str, Any]:
    return {"304": {"description": "It is what `If-None-Match` names; nothing is sent."}} if _is_tagged(rule) else {}


def _failures(rule: Rule) -> dict[str, Any]:
    found = {status: {"$ref": f"#/components/responses/{_response_name(status)}"} for status in sorted(_READS)}
    if rule.is_conditional:
        found["412"] = _error("It has changed since you have seen it.")
    if rule.body is not None or rule.is_raw:
        found["413"] = _error(f"The body is longer than {rule.body_bytes} bytes.")
    others = ", ".join(sorted({str(status) for status in STATUSES.values()} - found.keys()))
    return {**found, "default": _error(f"Any other error: {others}, or 500 for what was not foreseen.")}


def _error(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}


def _response_name(status: str) -> str:
    return f"Error{status}"
