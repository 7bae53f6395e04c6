"""Who may call what: every route, with every role and none, against this table. A route that is not in it fails the test."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from running import Server, error, serving, settings_of

from registry.server.app import OPEN, PREFIX, STATIC
from registry.teamwork import Role

NEEDED = {
    "GET /checkpoints": "reader",
    "GET /best": "reader",
    "GET /checkpoint": "reader",
    "GET /subject": "reader",
    "GET /details": "reader",
    "GET /trail": "reader",
    "GET /history": "reader",
    "GET /bases": "reader",
    "GET /base": "reader",
    "GET /check": "reader",
    "POST /plan": "reader",
    "GET /merged": "reader",
    "GET /files": "reader",
    "GET /file": "reader",
    "GET /signable": "reader",
    "GET /jobs": "reader",
    "GET /jobs/{number}": "reader",
    "GET /jobs/{number}/log": "reader",
    "GET /shipments": "reader",
    "GET /adapters": "reader",
    "GET /series": "reader",
    "GET /metrics/names": "reader",
    "GET /repositories": "reader",
    "GET /repository": "reader",
    "GET /repository/refs": "reader",
    "GET /repository/file": "reader",
    "GET /recipes": "reader",
    "GET /policies": "reader",
    "GET /policy": "reader",
    "GET /selection": "reader",
    "GET /signatures": "reader",
    "GET /provenance": "reader",
    "GET /me": "reader",
    "POST /checkpoints": "writer",
    "POST /checkpoints/batch": "writer",
    "DELETE /checkpoint": "writer",
    "POST /notes": "writer",
    "POST /tags": "writer",
    "POST /metrics": "writer",
    "PUT /aliases": "writer",
    "DELETE /aliases": "writer",
    "POST /bases": "writer",
    "POST /bases/at": "writer",
    "POST /jobs": "writer",
    "POST /jobs/{number}/cancel": "writer",
    "POST /jobs/{number}/retry": "writer",
    "POST /blobs/missing": "writer",
    "PUT /blobs/{hex}": "writer",
    "PUT /uploads/{hex}/parts/{number}": "writer",
    "GET /uploads/{hex}": "writer",
    "POST /uploads/{hex}/complete": "writer",
    "POST /signatures": "writer",
    "POST /keep": "writer",
    "POST /recipes": "writer",
    "DELETE /recipes": "writer",
    "POST /shipments": "shipper",
    "POST /rollback": "shipper",
    "PUT /policy": "shipper",
    "DELETE /policy": "shipper",
    "POST /tokens": "admin",
    "GET /tokens": "admin",
    "DELETE /tokens/{name}": "admin",
    "POST /webhooks": "admin",
    "GET /webhooks": "admin",
    "DELETE /webhooks/{number}": "admin",
    "POST /webhooks/{number}/test": "admin",
    "GET /webhooks/{number}/deliveries": "admin",
    "GET /audit/verify": "admin",
    "GET /audit/export": "admin",
    "POST /sweep": "admin",
    "GET /verify": "admin",
    "GET /doctor": "admin",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
FILLED = {"number": "7", "hex": "0" * 64, "name": "nobody"}


def filled(path: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: FILLED[match[1]], path)


def ask(client: httpx.Client, call: str) -> httpx.Response:
    method, path = call.split()
    body = {} if method == "GET" else {"json": {}}
    return client.request(method, filled(path), **body)


def is_let_in(answer: httpx.Response) -> bool:
    return answer.status_code not in (401, 403)


def test_every_route_is_in_the_table(server: Server) -> None:
    routes = {
        (method, route.path) for route in server.app.routes if isinstance(route, APIRoute) for method in route.methods
    }
    # tests/hub has a table of the Hub's
    others = {type(route).__name__ for route in server.app.routes if not isinstance(route, APIRoute)}
    assert others == {"HubRoutes", "BrowsedRepositories"}, "a route that is none of FastAPI's"
    assert len(server.app.routes) == len(routes) + len(others)
    below = {f"{method} {path.removeprefix(PREFIX)}" for method, path in routes if path.startswith(PREFIX)}
    assert below == set(NEEDED)
    pages = {(rule.method, rule.path) for rule in server.app.state.pages}  # tests/web has a table of theirs
    assert {(method, path) for method, path in routes if not path.startswith(PREFIX)} - pages == {
        ("GET", path) for path in (*OPEN, STATIC)
    }


@pytest.mark.parametrize("role", list(Role))
def test_a_role_may_do_what_is_its_own_and_that_of_those_before_it(server: Server, role: Role) -> None:
    client = server.client(role.value)
    for call, needed in NEEDED.items():
        answer = ask(client, call)
        assert is_let_in(answer) == role.covers(Role(needed)), (call, answer.text)
        if not is_let_in(answer):
            assert (answer.status_code, error(answer)) == (403, "forbidden")


def test_nobody_may_do_anything_without_a_good_token(server: Server) -> None:
    server.add_token("late", Role.ADMIN)
    server.direct.revoke_token("late")
    nobody = server.client()
    for call in NEEDED:
        answer = ask(nobody, call)
        assert (answer.status_code, error(answer)) == (401, "unauthenticated"), call
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    for stranger in (server.client("late"), server.client(Authorization="Basic cm9vdDpyb290")):
        for call in NEEDED:
            # wrong tokens are slowed down, too
            assert ask(stranger, call).status_code in (401, 429), call


def test_an_admin_of_some_namespaces_looks_after_none_of_the_whole(server: Server) -> None:
    server.add_token("head", Role.ADMIN, ["nlu"])
    client = server.client("head")
    for call, needed in NEEDED.items():
        assert is_let_in(ask(client, call)) == (needed != "admin"), call


def test_no_other_method_does_anything(server: Server) -> None:
    client = server.client("admin")
    for path in {call.split()[1] for call in NEEDED}:
        for method in METHODS:
            if f"{method} {path}" not in NEEDED:
                answer = client.request(method, filled(path))
                others = {
                    other for other in NEEDED if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", other), f"{method} {path}")
                }
                assert answer.status_code == 405 or others, (method, path, answer.status_code)


def test_what_needs_no_token_tells_nothing(server: Server, bot: str) -> None:
    digest = server.direct.resolve(bot).digest
    for path in OPEN:
        answer = server.client().get(f"{server.url}{path}")
        assert answer.status_code == 200
        assert bot not in answer.text
        assert digest.short not in answer.text


def test_figures_are_for_this_machine_or_for_readers(server: Server) -> None:
    # as a proxy on the same machine passes on what others ask
    passed_on = {"X-Forwarded-For": "203.0.113.9"}
    assert server.client().get(f"{server.url}/metrics").status_code == 200
    assert server.client().get(f"{server.url}/metrics", headers=passed_on).status_code == 401
    reader = {**passed_on, "Authorization": f"Bearer {server.secrets['reader']}"}
    assert server.client().get(f"{server.url}/metrics", headers=reader).status_code == 200


def test_until_there_is_a_token_the_machine_itself_may_do_everything(tmp_path: Path) -> None:
    with serving(settings_of(tmp_path / "home")) as server:
        client = server.client()
        assert client.get("/me").json() == {"name": "owner", "role": "admin", "namespaces": []}
        assert client.get("/me", headers={"X-Forwarded-For": "203.0.113.9"}).status_code == 401
        made = client.post("/tokens", json={"name": "ada", "role": "reader"})
        assert made.status_code == 201
        server.secrets["ada"] = made.json()["secret"]
        assert server.client("ada").get("/me").json()["name"] == "ada"
        time.sleep(1.1)  # so long it may go on that nobody needed one
        assert client.get("/me").status_code == 401
