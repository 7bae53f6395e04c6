"""The history, tokens and webhooks as pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import serving, settings_of
from visiting import Site

from registry.auditing import read_checkpoint
from registry.db.webhooks import ACTIONS
from registry.manifest import utc_now
from registry.server.pages import admin
from registry.service import Registry
from registry.teamwork import Role

HTMX = {"HX-Request": "true"}


def numbers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r'<tr id="event-(\d+)"', text)]


# -- audit


def test_the_history_is_shown_the_newest_first_and_in_parts(site: Site) -> None:
    client, last = site.visitor("reader"), len(site.direct.history())
    shown = client.get("/audit?limit=10").text
    assert numbers(shown) == list(range(last, last - 10, -1))
    assert "limit=110#event-" in shown
    assert numbers(client.get("/audit?limit=1000").text)[-1] == 1
    assert "Verify" not in shown
    assert client.get("/audit?limit=0").status_code == 400


def test_the_history_is_narrowed_down(site: Site) -> None:
    client = site.visitor("reader")
    site.direct.signed_by("ann").note(site.direct.resolve("nlu/intent@v1"), "<script>x</script>")
    only = client.get("/audit", params={"author": "ann"}).text
    assert len(numbers(only)) == 1
    assert "&lt;script&gt;" in only
    assert 'href="/checkpoints/nlu/intent%40v1"' in only
    assert "nlu/intent@v1" in client.get("/audit?subject=nlu/intent").text
    assert "support-bot" not in client.get("/audit?subject=nlu/intent").text
    assert "No such events" in client.get("/audit", params={"since": "2999-01-01"}).text
    assert client.get("/audit?since=ever").status_code == 400


def test_others_events_are_not_there(site: Site) -> None:
    shown = site.visitor("nlu").get("/audit").text
    assert "nlu/intent@v1" in shown
    assert "support-bot" not in shown
    assert "token" not in shown.partition("<main")[2]


def test_the_chain_is_walked_for_admins(site: Site) -> None:
    client, count = site.visitor("admin"), len(site.direct.history())
    assert f"{count} events, every one as it was written" in client.get("/audit/verify", headers=HTMX).text
    assert "<html" in client.get("/audit/verify").text
    assert site.visitor("shipper").get("/audit/verify").status_code == 403


def test_an_export_can_be_checked_by_others(site: Site, tmp_path: Path) -> None:
    answer = site.visitor("admin").get("/audit/export")
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert re.search(r'attachment; filename="audit-\w+\.ndjson"', answer.headers["content-disposition"])
    (tmp_path / "audit.ndjson").write_bytes(answer.content)
    assert read_checkpoint(tmp_path / "audit.ndjson").checkpoint.size == len(site.direct.history())


# -- tokens


def test_a_token_is_made_shown_once_and_revoked(site: Site) -> None:
    client = site.visitor("admin")
    form = {"name": "ci", "role": "writer", "namespaces": "nlu, vision", "expires": "30d"}
    made = client.post("/tokens", data=form).text
    (secret,) = set(re.findall(r"ckpt_w_\w+", made))
    assert site.direct.authenticate(secret).namespaces == ("nlu", "vision")
    listed = client.get("/tokens").text
    assert secret not in listed
    assert f"…{secret[-4:]}" in listed
    (token,) = [each for each in site.direct.tokens() if each.name == "ci"]
    assert token.expires_at is not None
    assert 29 <= (token.expires_at - utc_now()).days <= 30
    assert "Revoke the token of ci?" in client.get(f"/tokens/{token.id}/revoke", headers=HTMX).text
    assert client.post(f"/tokens/{token.id}/revoke").headers["location"] == "/tokens"
    assert "1 is revoked or over" in client.get("/tokens").text


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"name": "reader", "role": "reader"}, "reader"),
        ({"name": "42", "role": "reader"}, "reads as a token"),
        ({"name": "x", "role": "king"}, "one of reader"),
        ({"name": "x", "role": "reader", "expires": "soon"}, "such as 30d"),
        ({"name": "", "role": "reader"}, "New token"),
        ({"name": "x", "role": "reader", "namespaces": "a/b"}, "a/b"),
    ],
)
def test_what_is_wrong_with_a_token_is_said_beside_its_form(site: Site, form: dict[str, str], words: str) -> None:
    answer = site.visitor("admin").post("/tokens", data=form)
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    assert words in answer.text
    assert f'value="{form["name"]}"' in answer.text


def test_a_token_that_is_not_there(site: Site) -> None:
    client = site.visitor("admin")
    assert client.get("/tokens/999/revoke").status_code == 404
    assert client.post("/tokens/x/revoke").status_code == 404


# -- webhooks


@pytest.fixture
def listened(tmp_path: Path) -> Iterator[Site]:
    """A server that may tell addresses of this machine."""
    settings = settings_of(tmp_path / "home", CKPT_WEBHOOK_ALLOW="127.0.0.1/32")
    with Registry(settings) as registry:
        secrets = {"admin": registry.create_token("admin", Role.ADMIN).secret}
    with serving(settings) as server:
        yield Site(server, secrets)


def test_every_action_has_its_words() -> None:
    assert set(admin.WEBHOOK_WORDS) == set(ACTIONS.values())


def test_a_webhook_is_added_tested_and_removed(listened: Site) -> None:
    client = listened.visitor("admin")
    url = f"{listened.url}/nowhere"
    made = client.post("/webhooks", data={"url": url, "action": ["shipped", "merged"]}).text
    assert len(set(re.findall(r"whsec_[\w-]+", made))) == 1
    assert "whsec_" not in client.get("/webhooks").text
    assert url in client.get("/webhooks").text
    assert client.post("/webhooks/1/test").headers["location"] == "/webhooks/1"
    shown = client.get("/webhooks/1").text
    assert ">test<" in shown
    assert "404" in shown or "405" in shown
    assert "Remove webhook 1?" in client.get("/webhooks/1/remove", headers=HTMX).text
    client.post("/webhooks/1/remove")
    assert "Nobody is told yet" in client.get("/webhooks").text
    assert client.get("/webhooks/1").status_code == 404


@pytest.mark.parametrize("form", [{"url": "https://127.0.0.1/x", "action": "shipped"}, {"url": "", "action": "shipped"},
                                  {"url": "https://example.org", "action": "nothing"}, {"url": "https://example.org"}])  # fmt: skip
def test_what_is_wrong_with_a_webhook_is_said_beside_its_form(site: Site, form: dict[str, str]) -> None:
    answer = site.visitor("admin").post("/webhooks", data=form)
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    assert f'value="{form["url"]}"' in answer.text
