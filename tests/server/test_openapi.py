"""The OpenAPI document is one that a client can be generated from, and answers are what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import tiny
from running import Server, send_checkpoint

from registry.server.app import PREFIX, RULES

TEMPLATE = re.compile(r"\{(\w+)\}")


@pytest.fixture
def document(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.client().get(f"{server.url}/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, found in document["paths"].items():
        for method, operation in found.items():
            yield method, path, operation


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_it_is_complete(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert document["info"]["title"]
    assert document["info"]["version"]
    found = {(method.upper(), path) for method, path, _ in operations(document)}
    assert found == {(rule.method, PREFIX + rule.path) for rule in RULES}
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for reference in set(references(document)):
        place: Any = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
        assert place


def test_every_operation_tells_what_it_takes_and_gives(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        assert operation["summary"], path
        assert operation["description"], path
        told = {each["name"] for each in operation["parameters"] if each["in"] == "path"}
        assert told == set(TEMPLATE.findall(path))
        for each in operation["parameters"]:
            assert each["description"], (path, each["name"])
            assert each["in"] != "path" or each["required"]
        successes = [answer for status, answer in operation["responses"].items() if status.startswith("2")]
        assert successes, path
        assert all(content["schema"] for answer in successes for content in answer["content"].values())
        assert {"401", "403", "default"} <= operation["responses"].keys()
        assert ("requestBody" in operation) == (
            method in ("post", "put") and not path.endswith(("/cancel", "/retry", "/test"))
        )


def test_what_has_a_tag_may_be_unchanged_and_is_empty_then(server: Server, document: dict[str, Any], bot: str) -> None:
    for method, path, operation in operations(document):
        takes = {parameter["name"] for parameter in operation["parameters"]}
        assert ("If-None-Match" in takes) == ("304" in operation["responses"]), (method, path)
        assert "content" not in operation["responses"].get("304", {}), path
    client = server.client("reader")
    tag = client.get("/checkpoints").headers["ETag"]
    unchanged = client.get("/checkpoints", headers={"If-None-Match": tag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")


def test_every_schema_is_one(document: dict[str, Any]) -> None:
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
        if schema.get("type") == "object":
            assert schema["description"]


def validate(document: dict[str, Any], method: str, path: str, answer: httpx.Response) -> None:
    """See that an answer is what the document says of it."""
    responses = document["paths"][PREFIX + path][method.lower()]["responses"]
    described = responses.get(str(answer.status_code), responses["default"])
    if "$ref" in described:
        described = document["components"]["responses"][described["$ref"].rpartition("/")[2]]
    schema = described["content"]["application/json"]["schema"]
    whole = {"components": document["components"], **schema}
    jsonschema.Draft202012Validator(whole).validate(answer.json())


def test_answers_are_what_the_document_says(
    server: Server, document: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    server.direct.add_base(str(base), name="llama")
    place = tiny.write_adapter(tmp_path / "bot", base="llama")
    client = server.client("admin")
    metrics = [{"name": "eval_loss", "value": "inf"}, {"name": "acc", "value": 0.5}]
    asked = send_checkpoint(client, place, base="llama", adapter="bot", metrics=metrics, tags={"a": "1"}, note="x")
    validate(document, "POST", "/checkpoints", asked)
    merged = server.direct.merge(server.direct.plan(server.direct.resolve("bot"))).merged.digest.hex
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("PUT", "/aliases", {"json": {"checkpoint": "bot", "name": "champion"}}),
        ("POST", "/notes", {"json": {"checkpoint": "bot", "text": "x"}}),
        ("POST", "/shipments", {"json": {"subject": merged, "environment": "production"}}),
        ("POST", "/shipments", {"json": {"subject": "bot", "environment": "production"}}),
        ("POST", "/rollback", {"json": {"environment": "production"}}),
        ("POST", "/plan", {"json": {"checkpoints": ["bot"], "dtype": "BF16"}}),
        ("POST", "/jobs", {"json": {"kind": "merge", "arguments": {"checkpoints": ["bot"], "dtype": "BF16"}}}),
        ("POST", "/tokens", {"json": {"name": "new", "role": "reader", "expires_seconds": 60}}),
        ("POST", "/sweep", {"json": {"dry_run": True}}),
        ("POST", "/blobs/missing", {"json": {"files": [{"digest": "0" * 64, "size_bytes": 1}]}}),
        ("GET", "/checkpoints", {}),
        ("GET", "/best", {"params": {"metric": "acc"}}),
        ("GET", "/checkpoint", {"params": {"ref": "bot"}}),
        ("GET", "/subject", {"params": {"ref": merged}}),
        ("GET", "/details", {"params": {"ref": "bot"}}),
        ("GET", "/trail", {"params": {"ref": "bot"}}),
        ("GET", "/history", {}),
        ("GET", "/bases", {}),
        ("GET", "/base", {"params": {"name": "llama"}}),
        ("GET", "/check", {"params": {"ref": "bot"}}),
        ("GET", "/merged", {}),
        ("GET", "/files", {"params": {"subject": "bot"}}),
        ("GET", "/signable", {"params": {"subject": merged}}),
        ("GET", "/jobs", {}),
        ("GET", "/shipments", {"params": {"history": "true"}}),
        ("GET", "/shipments", {"params": {"at": "2020-01-01T00:00:00Z"}}),
        ("GET", "/signatures", {"params": {"subject": "bot"}}),
        ("GET", "/provenance", {"params": {"merged": merged}}),
        ("GET", "/me", {}),
        ("GET", "/tokens", {}),
        ("GET", "/webhooks", {}),
        ("GET", "/audit/verify", {}),
        ("GET", "/audit/export", {}),
        ("GET", "/verify", {"params": {"read_data": "true"}}),
        ("GET", "/doctor", {}),
        ("DELETE", "/aliases", {"params": {"adapter": "bot", "name": "champion"}}),
    ]
    for method, path, said in calls:
        answer = client.request(method, path, **said)
        assert answer.is_success, (path, answer.text)
        validate(document, method, path, answer)
    for path in ("/checkpoint", "/jobs", "/details"):
        wrong = client.get(path, params={"ref": "none", "state": "none"})
        assert not wrong.is_success
        validate(document, "GET", path, wrong)
    job = client.get("/jobs").json()[0]["id"]
    for path in ("/jobs/{number}", "/jobs/{number}/log"):
        validate(document, "GET", path, client.get(path.replace("{number}", str(job))))


def test_the_page_shows_every_operation_and_loads_nothing(server: Server) -> None:
    page = server.client().get(f"{server.url}/docs").text
    for rule in RULES:
        assert f'id="{rule.name}"' in page
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_bodies_are_described_as_they_are_taken(document: dict[str, Any]) -> None:
    token = document["components"]["schemas"]["TokenWantedSent"]
    assert token["required"] == ["name", "role"]
    assert json.dumps(document).count("Traceback") == 0
