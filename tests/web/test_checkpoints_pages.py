"""The list of checkpoints: filtered, sorted, in parts, with columns of choice; and tags for several at once."""

from __future__ import annotations

import html as entities
import re
import sqlite3
from contextlib import closing
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from visiting import Site

from registry.errors import InvalidInput, InvalidReference
from registry.manifest import Metric
from registry.server.pages.table import Asked, parse_tags

PARTIAL = {"HX-Request": "true"}


def refs(answer: httpx.Response) -> list[str]:
    """The checkpoints in the table, in order."""
    return re.findall(r'<th scope="row"><a href="[^"]+">([^<]+)<', answer.text)


def best(answer: httpx.Response) -> list[str]:
    """The checkpoints that are marked as the best."""
    return re.findall(r'<tr class="best">.*?<a href="[^"]+">([^<]+)<', answer.text, re.DOTALL)


def columns(answer: httpx.Response) -> list[str]:
    return re.findall(r'<a id="sort-\d+"[^>]*>([^<]+)<', answer.text)


def link(answer: httpx.Response, rel: str) -> str:
    found = re.search(rf'rel="{rel}" href="([^"]+)"', answer.text)
    return entities.unescape(found[1]) if found else ""


def test_the_list_has_the_newest_first_and_marks_the_best(site: Site) -> None:
    answer = site.visitor("reader").get("/checkpoints")
    assert refs(answer)[:2] == ["support-mix@v1", "vision/caption@v2"]
    assert len(refs(answer)) == 21
    assert "21 checkpoints" in answer.text
    assert best(answer) == ["nlu/intent@v6"]
    assert columns(answer)[3:6] == ["eval_loss", "loss", "accuracy"]


def test_filters_are_those_of_the_command_line(site: Site) -> None:
    client = site.visitor("reader")
    where = "metric.eval_loss < 0.9 and tag.team = 'nlu'"
    answer = client.get("/checkpoints", params={"where": where, "sort": "metric.eval_loss"})
    assert refs(answer) == ["support-bot@v9", "support-bot@v6"]
    assert best(answer) == ["support-bot@v9"]
    assert entities.escape(where, quote=False) in answer.text.replace("&#39;", "'")
    of_adapter = client.get("/checkpoints?adapter=nlu/intent&sort=-step&metric=accuracy")
    assert refs(of_adapter)[0] == "nlu/intent@v6"
    assert columns(of_adapter)[3:4] == ["accuracy"]
    assert 'aria-sort="descending"' in of_adapter.text
    assert "No checkpoint passes this filter" in client.get("/checkpoints?where=step > 9999").text


@pytest.mark.parametrize(
    ("query", "field", "said"),
    [
        ({"where": "metric.eval_loss <"}, "where", "expected a number"),
        ({"where": "<script>alert(1)</script>"}, "where", "cannot read the filter"),
        ({"adapter": "support-bo"}, "adapter", "support-bot"),
        ({"adapter": "a b"}, "adapter", "letters, digits"),
    ],
)
def test_what_is_wrong_is_said_beside_its_field(site: Site, query: dict[str, str], field: str, said: str) -> None:
    client = site.visitor("reader")
    answer = client.get("/checkpoints", params=query)
    assert answer.status_code == 400
    assert f'aria-describedby="{field}-problem"' in answer.text
    assert said in answer.text.partition(f'id="{field}-problem"')[2].partition("</label>")[0]
    assert f'value="{entities.escape(query[field])}"' in answer.text  # what was typed is still there
    assert "<script>alert" not in answer.text
    part = client.get("/checkpoints", params=query, headers=PARTIAL)
    assert part.status_code == 200  # so that it takes the list's place
    assert f'id="{field}-problem"' in part.text


def test_columns_are_chosen(site: Site) -> None:
    client = site.visitor("reader")
    site.direct.add_metrics(site.direct.resolve("support-bot@v1"), [Metric(name='odd "<name>', value=0.25)])
    answer = client.get("/checkpoints", params={"metric": ['odd "<name>', "loss"]})
    assert [entities.unescape(each) for each in columns(answer)[3:5]] == ['odd "<name>', "loss"]
    assert ">0.25<" in answer.text
    none = client.get("/checkpoints?metric=")
    assert columns(none) == ["Checkpoint", "Run", "Step", "Method", "Size", "Created"]
    assert best(none) == []


def test_pages_follow_one_another_there_and_back(site: Site) -> None:
    client = site.visitor("reader")
    everything = refs(client.get("/checkpoints?sort=metric.loss"))
    first = client.get("/checkpoints?sort=metric.loss&limit=8")
    second = client.get(link(first, "next"))
    third = client.get(link(second, "next"))
    assert [*refs(first), *refs(second), *refs(third)] == everything
    assert link(third, "next") == ""
    assert refs(client.get(link(third, "prev"))) == refs(second)
    assert refs(client.get(link(second, "prev"))) == refs(first)
    assert link(first, "prev") == ""
    assert client.get("/checkpoints?cursor=nonsense").status_code == 400
    assert client.get("/checkpoints?sort=nonsense").status_code == 400
    assert client.get("/checkpoints?limit=9999").status_code == 400


def test_a_long_list_is_sorted_by_what_has_an_index(site: Site) -> None:
    with closing(sqlite3.connect(site.server.home / "ckpt.db")) as database, database:
        database.execute("UPDATE adapters SET checkpoints = 300000 WHERE name = 'support-bot'")
    client = site.visitor("reader")
    whole = client.get("/checkpoints")
    assert columns(whole) == ["Run", "Step", "eval_loss", "loss", "accuracy", "Method", "Size", "Created"]
    assert "21 of 300,009 checkpoints" in whole.text
    assert "Checkpoint" in columns(client.get("/checkpoints?adapter=nlu/intent"))


def test_htmx_gets_the_list_alone_but_the_page_when_somebody_goes_back(site: Site) -> None:
    client = site.visitor("reader")
    part = client.get("/checkpoints?adapter=support-bot", headers=PARTIAL)
    assert part.text.lstrip().startswith('<div id="list"')
    assert 'hx-swap-oob="innerHTML:#said"' in part.text
    back = client.get("/checkpoints?adapter=support-bot", headers={**PARTIAL, "HX-History-Restore-Request": "true"})
    assert "<html" in back.text


def test_others_are_not_in_the_list(site: Site) -> None:
    client = site.visitor("nlu")
    answer = client.get("/checkpoints")
    assert {ref.partition("@")[0] for ref in refs(answer)} == {"nlu/intent"}
    for name in ("support-bot", "support-mix", "vision"):
        assert name not in answer.text
    unknown = client.get("/checkpoints?adapter=support-bot")
    assert unknown.status_code == 400
    assert "21 checkpoints" not in answer.text
    assert client.get("/tag?ref=support-bot@v1").status_code == 404
    assert client.post("/tag", data={"ref": "support-bot@v1", "set": "a=b"}).status_code == 404


def test_an_empty_list_says_how_to_begin(empty_site: Site) -> None:
    assert "ckpt register" in empty_site.visitor("").get("/checkpoints").text


# -- tags


def test_several_are_tagged_at_once(site: Site) -> None:
    client = site.visitor("writer")
    chosen = ["support-bot@v6", "support-bot@v9", "nlu/intent@v1"]
    form = client.get(
        "/tag", params={"ref": chosen}, headers={"Referer": f"{site.url}/checkpoints?sort=-step&tagged=4"}
    )
    assert 'name="back" value="/checkpoints?sort=-step"' in form.text
    assert "on 2 of 3" in form.text
    data = {
        "ref": chosen,
        "set": "stage = review\nlang=de=at",
        "remove": ["team", "dataset"],
        "back": "/checkpoints?sort=-step",
    }
    answer = client.post("/tag", data=data)
    assert (answer.status_code, answer.headers["location"]) == (303, "/checkpoints?sort=-step&tagged=3")
    for ref in chosen:
        assert site.direct.resolve(ref).tags == {"stage": "review", "lang": "de=at"}
    assert "Tagged 3 checkpoints." in client.get(answer.headers["location"]).text
    assert {event.author for event in site.direct.history()[-3:]} == {"writer"}


def test_all_are_tagged_or_none(site: Site) -> None:
    client = site.visitor("writer")
    before = len(site.direct.history())
    answer = client.post("/tag", data={"ref": ["support-bot@v1", "support-bot@v99"], "set": "a=b"})
    assert answer.status_code == 404
    long = client.post("/tag", data={"ref": ["support-bot@v1", "support-bot@v2"], "set": f"a={'x' * 20_001}"})
    assert long.status_code == 400
    assert len(site.direct.history()) == before
    assert not site.direct.resolve("support-bot@v1").tags


@pytest.mark.parametrize(("text", "said"), [("", "say which"), ("nonsense", "key=value"), ("a=1\na=2", "twice")])
def test_tags_that_make_no_sense_stay_in_the_form(site: Site, text: str, said: str) -> None:
    client = site.visitor("writer")
    data = {"ref": "support-bot@v9", "set": text, "back": "//evil.example/checkpoints"}
    answer = client.post("/tag", data=data)
    assert answer.status_code == 400
    assert said in answer.text.partition('id="set-problem"')[2]
    assert text in answer.text
    assert "evil.example" not in answer.text
    part = client.post("/tag", data=data, headers=PARTIAL)
    assert (part.status_code, "<html" in part.text) == (200, False)


def test_readers_tag_nothing(site: Site) -> None:
    client = site.visitor("reader")
    page = client.get("/checkpoints").text
    assert 'formaction="/compare"' in page
    assert 'formaction="/tag"' not in page
    assert client.get("/tag?ref=support-bot@v1").status_code == 403
    assert client.post("/tag", data={"ref": "support-bot@v1", "set": "a=b"}).status_code == 403


def test_tags_lead_to_those_that_have_them(site: Site) -> None:
    client = site.visitor("reader")
    site.direct.tag(site.direct.resolve("support-bot@v2"), {"odd-key": "it's <b>"})
    page = client.get("/checkpoints?where=step >= 100")
    href = next(each for each in re.findall(r'class="badge tag" href="([^"]+)"', page.text) if "odd-key" in each)
    assert "<b>" not in page.text
    assert refs(client.get(entities.unescape(href))) == ["support-bot@v2"]
    (where,) = parse_qs(urlsplit(entities.unescape(href)).query)["where"]
    assert where == "(step >= 100) and tag.\"odd-key\" = 'it''s <b>'"


# -- addresses


def test_an_address_says_only_what_is_not_usual() -> None:
    assert Asked().url == "/checkpoints"
    assert Asked(metrics=()).url == "/checkpoints?metric="
    assert Asked(sort="step").by("step") == "/checkpoints?sort=-step"
    assert Asked(sort="-step", trail=("a",)).by("step") == "/checkpoints?sort=step"
    long = Asked(trail=tuple(str(number) for number in range(40)))
    assert len(parse_qs(urlsplit(long.after("last")).query)["cursor"]) == 12


def test_tags_are_lines() -> None:
    assert parse_tags(" a = 1 \n\nb=\n") == {"a": "1", "b": ""}
    for text in ("=x", "a", "a=1\na=1"):
        with pytest.raises(InvalidInput):
            parse_tags(text)
    with pytest.raises(InvalidReference):
        parse_tags("a b=c")
