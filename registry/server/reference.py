"""The page that shows the API to people: made of the OpenAPI document, without scripts, and with nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c1e21;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d8dbe0}
details{margin:.35rem 0}summary{cursor:pointer}code,pre{font:13px/1.45 ui-monospace,monospace}
.m{display:inline-block;min-width:4.2rem;font-weight:600}.r{color:#5b6370;float:right}
table{border-collapse:collapse;margin:.4rem 0 .4rem 1rem}td{padding:.1rem .8rem .1rem 0;vertical-align:top}.n{white-space:nowrap}
p.d{margin:.3rem 0 .3rem 1rem}
@media(prefers-color-scheme:dark){body{color:#dfe3e8;background:#15181c}h2{border-color:#394049}.r{color:#98a1ad}}
"""


def page(document: Mapping[str, Any]) -> str:
    """The page, as HTML."""
    body = "\n".join(_parts(document))
    title = escape(document["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>{body}</body></html>'
    )


def _parts(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    yield f"<h1>{escape(info['title'])} {escape(info['version'])}: HTTP API</h1>"
    yield "".join(f"<p>{escape(text)}</p>" for text in info["description"].split("\n\n"))
    yield '<p>For programs: <a href="/openapi.json">/openapi.json</a>, an OpenAPI 3.1 document.</p>'
    for tag in document["tags"]:
        yield f"<h2>{escape(tag['name'])}</h2>"
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    yield _operation(method, path, operation)
    yield "<h2>values</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield _value(name, schema)


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = [
        (each["name"], f"{_kind(each['schema'])}{'' if each['required'] else ', optional'}", each["description"])
        for each in operation["parameters"]
    ]
    rows += [("body", _content(operation["requestBody"]), "")] if "requestBody" in operation else []
    rows += [
        (f"answers {status}", _content(answer), answer["description"])
        for status, answer in operation["responses"].items()
        if status.startswith("2")
    ]
    return (
        f'<details id="{escape(operation["operationId"])}"><summary><span class="r">{escape(operation["x-role"])}</span>'
        f'<code><span class="m">{method.upper()}</span>{escape(path)}</code> {escape(operation["summary"])}</summary>'
        f'<p class="d">{escape(operation["description"])}</p>{_table(rows)}</details>'
    )


def _value(name: str, schema: Mapping[str, Any]) -> str:
    needed = schema.get("required", ())
    rows = [
        (each, f"{_kind(kind)}{'' if each in needed else ', optional'}", kind.get("description", ""))
        for each, kind in schema.get("properties", {}).items()
    ]
    about = f'<p class="d">{escape(schema.get("description", ""))}</p>'
    return f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>{about}{_table(rows)}</details>'


def _table(rows: list[tuple[str, str, str]]) -> str:
    cells = (
        f'<tr><td class="n"><code>{escape(name)}</code></td><td>{kind}</td><td>{escape(text)}</td></tr>'
        for name, kind, text in rows
    )
    return f"<table>{''.join(cells)}</table>"


def _content(described: Mapping[str, Any]) -> str:
    ((kind, content),) = described["content"].items()
    return _kind(content["schema"]) if kind == "application/json" else escape(kind)


def _kind(schema: Mapping[str, Any]) -> str:
    """A type, as HTML: with links to the values that have names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(escape(str(each)) for each in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if "items" in schema else "list"
    if isinstance(schema.get("additionalProperties"), Mapping):
        return f"map to {_kind(schema['additionalProperties'])}"
    return escape(str(schema.get("type", "any")))
