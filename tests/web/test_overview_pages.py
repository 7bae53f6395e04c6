"""The first page: what a team sees in the morning, and what somebody sees who starts."""

from __future__ import annotations

import re

import pytest
from visiting import Site

from registry.manifest import Metric
from registry.mixing import Mixture


def text_of(html: str) -> str:
    """What is written on a page, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def section(html: str, title: str) -> str:
    """The part of a page under a heading."""
    return html.partition(f'id="{title}"')[2].partition("</section>")[0]


def test_what_is_live_says_since_when_by_whom_and_why(site: Site) -> None:
    live = section(site.visitor("reader").get("/").text, "live-title")
    assert re.findall(r'class="badge live">(\w+)<', live) == ["production", "staging"]
    production = live.partition("staging")[0]
    assert 'href="/checkpoints/support-bot%40v9"' in production
    assert re.search(r'href="/merged/[0-9a-f]{64}"', production)
    assert "rolled back" in production
    assert "answers got worse" in text_of(production)
    assert 'href="/shipped?environment=staging"' in live


def test_the_best_of_each_adapter_is_drawn(site: Site) -> None:
    html = site.visitor("reader").get("/").text
    best = section(html, "best-title")
    rows = {re.search(r"/adapters/([^\"?]+)", row)[1]: row for row in best.split("<tr>")[2:]}  # type: ignore[index]
    assert list(rows) == ["support-mix", "vision/caption", "nlu/intent", "support-bot"]
    assert "no metric tells" in rows["support-mix"]
    bot = rows["support-bot"]
    assert "v9" in bot
    assert "0.62601" in bot
    assert bot.count("<circle") == 1
    assert len(re.search(r'<polyline points="([^"]+)"', bot)[1].split()) == 6  # type: ignore[index]
    assert 'href="/adapters/support-bot?metric=eval_loss"' in bot


def test_a_metric_that_not_all_have_still_finds_a_best(site: Site) -> None:
    site.direct.add_metrics(site.direct.resolve("support-mix"), [Metric(name="eval_loss", value=0.5)])
    mix = section(site.visitor("reader").get("/").text, "best-title").partition("vision/caption")[0]
    assert "0.5<" in mix


def test_the_last_checkpoints_are_shown_with_their_metrics(site: Site) -> None:
    recent = section(site.visitor("reader").get("/").text, "recent-title")
    assert re.findall(r'<th scope="row"><a href="[^"]+">([^<]+)<', recent)[:2] == [
        "support-mix@v1",
        "vision/caption@v2",
    ]
    assert "eval_loss" in recent


def test_running_work_is_shown_and_asked_for_again(site: Site) -> None:
    client, registry = site.visitor("reader"), site.direct.signed_by("writer")
    assert "Nothing is running" in client.get("/").text
    with registry.workspace.writing() as change:
        job = change.catalog.jobs.add("merge", "support-bot@v1", {"checkpoints": ["support-bot@v1"]}, author="writer")
    part = client.get("/?part=jobs", headers={"HX-Request": "true"})
    assert "<html" not in part.text
    if not registry.job(job.id).state.is_over:
        assert 'hx-trigger="every' in part.text
    registry.follow_job(registry.start_merge(_planned(site)).id)
    assert "<html" in client.get("/?part=jobs").text


def _planned(site: Site) -> object:
    return site.direct.plan(site.direct.resolve("support-bot@v1"), mixture=Mixture(weights=(0.3,)))


def test_others_see_their_own(site: Site) -> None:
    html = site.visitor("nlu").get("/").text
    assert "nlu/intent" in html
    for other in ("support-bot", "vision/caption", "support-mix", "staging"):
        assert other not in html


def test_whoever_starts_is_told_how(empty_site: Site) -> None:
    client = empty_site.visitor("")
    html = client.get("/").text
    assert "Nothing is registered yet" in html
    assert f"export CKPT_SERVER={empty_site.url}" in html
    assert "ckpt register" in html
    assert "best-title" not in html


@pytest.mark.parametrize("path", ["/", "/?part=jobs"])
def test_it_is_for_those_who_have_signed_in(site: Site, path: str) -> None:
    answer = site.visitor("").get(path)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/sign-in")
