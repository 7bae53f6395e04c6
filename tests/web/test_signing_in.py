"""Signing in and out, what pages allow, and what surrounds them."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from running import serving, settings_of
from visiting import Site

from registry.server.app import Listening
from registry.server.pages.drawing import asset, markdown
from registry.server.pages.signing_in import own_url
from registry.teamwork import Role

HERE = "http://127.0.0.1"


def test_who_is_nobody_is_sent_to_sign_in_and_then_on(site: Site) -> None:
    client = site.visitor("")
    sent = client.get("/checkpoints?where=step+%3E+100")
    assert sent.status_code == 303
    assert sent.headers["location"] == "/sign-in?next=%2Fcheckpoints%3Fwhere%3Dstep%2B%253E%2B100"
    form = client.get(sent.headers["location"])
    assert 'value="/checkpoints?where=step+%3E+100"' in form.text
    answer = client.post("/sign-in", data={"token": site.secrets["reader"], "next": "/checkpoints?where=step+%3E+100"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/checkpoints?where=step+%3E+100")
    assert client.get("/checkpoints?where=step+%3E+100").status_code == 200


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(site: Site) -> None:
    answer = site.visitor("").post("/sign-in", data={"token": site.secrets["reader"]})
    words = {word.strip().lower() for word in answer.headers["set-cookie"].split(";")}
    assert {"httponly", "samesite=lax", "path=/"} <= words
    assert site.secrets["reader"] not in answer.headers["set-cookie"]


def test_a_wrong_token_is_said_on_the_form(site: Site) -> None:
    client = site.visitor("")
    answer = client.post("/sign-in", data={"token": "ckpt_wrong", "next": "/jobs"})
    assert answer.status_code == 401
    assert "not a token" in answer.text
    assert 'value="/jobs"' in answer.text
    assert client.get("/").status_code == 303


def test_too_many_wrong_tokens_are_not_looked_at(site: Site) -> None:
    client = site.visitor("")
    answers = [client.post("/sign-in", data={"token": "ckpt_wrong"}).status_code for _ in range(12)]
    assert answers[-1] == 429


def test_signing_out_ends_it_on_the_server_too(site: Site) -> None:
    client = site.visitor("reader")
    kept = dict(client.cookies)
    assert client.get("/").status_code == 200
    assert client.post("/sign-out").headers["location"] == "/sign-in"
    assert client.get("/").status_code == 303
    cookie = "; ".join(f"{name}={value}" for name, value in kept.items())
    assert site.visitor("").get("/", headers={"Cookie": cookie}).status_code == 303


def test_a_revoked_token_ends_what_was_entered_with_it(site: Site) -> None:
    client = site.visitor("reader")
    site.direct.revoke_token("reader")
    assert client.get("/").status_code == 303


def test_the_cookie_is_good_for_pages_only(site: Site) -> None:
    assert site.visitor("admin").get("/api/v1/checkpoints").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://elsewhere.example"}],
)
def test_a_page_of_another_site_changes_nothing(site: Site, headers: dict[str, str]) -> None:
    client = site.visitor("admin")
    assert client.post("/sign-out", headers=headers).status_code == 403
    assert client.get("/").status_code == 200


def test_scripts_and_styles_come_from_here_alone(site: Site) -> None:
    client = site.visitor("admin")
    for path in ("/", "/sign-in", "/nowhere"):
        answer = client.get(path, headers={"Accept": "text/html"})
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)(?![^>]*application/json)", answer.text), (
            path
        )


def test_every_page_needs_its_role(site: Site) -> None:
    needed = {(rule.method, rule.path): rule.role for rule in site.server.app.state.pages}
    assert {path for (_, path), role in needed.items() if role is None} == {"/sign-in", "/sign-out"}
    nobody = site.visitor("")
    visitors = {role: site.visitor(role.value) for role in Role}
    for (method, path), role in needed.items():
        if role is None:
            continue
        place = re.sub(r"\{(\w+)(:path)?\}", "nothing", path)
        assert nobody.request(method, place).status_code == 303, path
        for mine, client in visitors.items():
            status = client.request(method, place).status_code
            assert (status == 403) == (not mine.covers(role)), (method, path, mine, status)


def test_admins_of_some_namespaces_are_no_admins_of_pages(site: Site) -> None:
    site.secrets["part"] = site.direct.create_token("part", Role.ADMIN, ["nlu"]).secret
    assert site.visitor("part").get("/tokens").status_code == 403


def test_an_invitation_lets_the_owner_in_once(tmp_path: Path) -> None:
    with serving(settings_of(tmp_path / "home"), Listening(is_private=True)) as server:
        assert httpx.get(f"{server.url}/", timeout=60).status_code == 303
        key = server.app.state.sign_ins.invite()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.get("/sign-in", params={"key": key}).headers["location"] == "/"
            assert client.get("/").status_code == 200
        again = httpx.get(f"{server.url}/sign-in", params={"key": key}, timeout=60)
        assert again.status_code == 401
        assert "was used already, or is too old: `ckpt ui` gives another" in again.text
        assert "set-cookie" not in again.headers


@pytest.mark.parametrize(
    "text", ["//evil.example", "https://evil.example", "/\\evil.example", "evil", "", "javascript:x", "/a\nb"]
)
def test_nobody_is_sent_elsewhere(text: str) -> None:
    assert own_url(text) == "/"


def test_what_does_not_change_may_be_kept_and_nothing_else_is_given(site: Site) -> None:
    client = site.visitor("")
    found = asset("app.css")
    assert found is not None
    answer = client.get(f"/static/{found.tag}/app.css")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/css; charset=utf-8")
    assert "immutable" in answer.headers["cache-control"]
    for path in ("/static/0/app.css", f"/static/{found.tag}/../drawing.py", f"/static/{found.tag}/%2e%2e/drawing.py"):
        assert client.get(path).status_code == 404


def test_markdown_has_no_html_and_no_odd_links() -> None:
    drawn = markdown(
        "# Hi\n<script>x</script> [a](javascript:x) [b](https://example.org) ![c](https://example.org/x.png)"
    )
    assert "<script" not in drawn
    assert "javascript:" not in drawn.replace("[a](javascript:x)", "")
    assert 'rel="nofollow noopener noreferrer"' in drawn
    assert "<img" not in drawn
    assert "<h2>Hi</h2>" in drawn


def test_browsers_see_pages_where_there_is_nothing_and_programs_json(site: Site) -> None:
    client = site.visitor("reader")
    assert "there is no page" in client.get("/no/such/place/here", headers={"Accept": "text/html"}).text
    assert client.get("/no/such/place/here", headers={"Accept": "*/*"}).json()["error"]["code"] == "no_such_route"
