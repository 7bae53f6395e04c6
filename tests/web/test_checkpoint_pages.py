"""A checkpoint as a page: what it shows, what is written on it, and what others must not see."""

from __future__ import annotations

import re
import shutil

import httpx
import pytest
from visiting import Site

from registry.errors import UnknownCheckpoint
from registry.filters import parse_filter
from registry.server.pages.lineage import lineage
from registry.server.scope import Scope
from registry.teamwork import Principal, Role

V9 = "/checkpoints/support-bot@v9"


def test_it_shows_what_it_is_and_where_it_is_live(site: Site) -> None:
    shown = site.visitor("reader").get(V9)
    assert shown.status_code == 200
    page = shown.text
    for expected in ("support-bot@v9", "★ best eval_loss", "tiny-llama", "Beats the slow run", "tickets-2026"):
        assert expected in page
    assert page.count("<h1") == 1
    assert re.search(r'class="badge live" href="/shipped\?environment=production"', page)
    assert 'class="badge alias"' in page


def test_any_reference_leads_to_it(site: Site) -> None:
    client = site.visitor("reader")
    digest = site.direct.resolve("support-bot@v9").digest.hex
    for ref in (
        "support-bot@candidate",
        "support-bot@best",
        "support-bot@best:eval_loss",
        "support-bot@run:lr-3e-4",
        digest[:12],
    ):
        found = client.get(f"/checkpoints/{ref}")
        assert found.status_code == 200, ref
        assert "<h1>support-bot@v" in found.text
    assert "now, for support-bot@candidate" in client.get("/checkpoints/support-bot@candidate").text
    assert "now, for" not in client.get(V9).text
    assert client.get("/checkpoints/support-bot@v99").status_code == 404
    assert client.get("/checkpoints/a b").status_code == 400


def test_model_cards_and_notes_are_text_not_html(site: Site) -> None:
    page = site.visitor("reader").get("/checkpoints/support-bot@v5").text
    assert "<strong>orders</strong>" in page
    assert "<script>alert" not in page
    assert "&lt;b&gt;bold claims&lt;/b&gt; &amp; &#34;quotes&#34;" in page
    assert "<b>bold" not in page


def test_hostile_words_stay_words_everywhere(site: Site) -> None:
    """Whatever users type: in notes, tags, notes of shipments, names of metrics and runs."""
    evil = "</script><img src=x onerror=alert(1)>'\"`"
    found = site.direct.resolve("support-bot@v9")
    site.direct.note(found, evil)
    site.direct.tag(found, {"evil": evil})
    site.direct.ship(found, "staging", evil)
    client = site.visitor("admin")
    pages = [
        client.get(path).text
        for path in (V9, "/adapters/support-bot", "/compare?ref=support-bot@v9&ref=support-bot@v1")
    ]
    for page in pages:
        assert "<img src=x" not in page
    link = re.search(r'href="(/checkpoints\?where=[^"]*evil[^"]*)"', pages[0])
    assert link
    asked = httpx.URL(link[1].replace("&amp;", "&").replace("&#39;", "'")).params["where"]
    assert [each.version for each in site.direct.checkpoints(where=parse_filter(asked))] == [9]


def test_files_are_sent_whole_and_in_ranges(site: Site) -> None:
    client, found = site.visitor("reader"), site.direct.resolve("support-bot@v9")
    path = f"{V9}/files/{found.manifest.weights_file}"
    with site.direct.workspace.folder_of(found).open(found.manifest.weights_file) as stream:
        data = stream.read()
    assert client.get(path).content == data
    part = client.get(path, headers={"Range": "bytes=8-19"})
    assert (part.status_code, part.content) == (206, data[8:20])
    assert client.get(f"{V9}/files/no.such").status_code == 404
    assert client.get(f"{V9}/files/../../etc/passwd").status_code in (404, 400)


def test_norms_are_drawn_with_a_table_that_says_the_same(site: Site) -> None:
    part = site.visitor("reader").get(f"{V9}/parts/norms").text
    assert part.count('<rect class="q') == 4 + 9  # four weights, and the legend
    assert part.count('<th scope="row">') == 4
    assert "model.layers.1.self_attn.v_proj.weight" in part


def test_checking_fully_reads_the_values(site: Site) -> None:
    part = site.visitor("reader").get(f"{V9}/parts/check").text
    assert "all values were read" in part
    assert "merges" in part


def test_what_engines_cannot_serve_is_said_with_what_to_do(site: Site) -> None:
    page = site.visitor("reader").get("/checkpoints/vision/caption@v1").text
    assert "DoRA" in page
    assert "merge it: ckpt merge vision/caption@v1" in page
    assert "--lora-modules" not in page  # what does not work is not offered
    assert "--lora-modules" in site.visitor("reader").get(V9).text


def test_a_lineage_goes_from_the_base_to_where_it_is_live(site: Site) -> None:
    scope = Scope(site.direct, Principal(name="admin", role=Role.ADMIN))
    found = lineage(scope, site.direct.details(site.direct.resolve("support-bot@v9")))
    names = {node.key: node.title for node in found.nodes}
    edges = {(names[one], names[other]) for one, other in found.edges}
    merged = site.direct.merged()[0].digest.short
    assert edges == {
        ("tiny-llama", "support-bot@v9"),
        ("support-bot@v9", "support-mix@v1"),
        ("support-bot@v9", merged),
        ("support-bot@v9", "staging"),
        (merged, "production"),
    }
    assert len(found.lines) == len(found.edges)
    parents = lineage(scope, site.direct.details(site.direct.resolve("support-mix@v1")))
    titles = {node.title for node in parents.nodes}
    assert titles == {"tiny-llama", "support-bot@v5", "support-bot@v9", "support-mix@v1"}


def test_boxes_do_not_lie_on_each_other(site: Site) -> None:
    found = site.direct.resolve("support-bot@v9")
    for number in range(12):
        site.direct.ship(found, f"place-{number}")
    scope = Scope(site.direct, Principal(name="admin", role=Role.ADMIN))
    drawn = lineage(scope, site.direct.details(found))
    boxes = [(node.x, node.y) for node in drawn.nodes]
    for number, (x, y) in enumerate(boxes):
        assert all(abs(x - other) >= 164 or abs(y - level) >= 46 for other, level in boxes[number + 1 :])
    assert any(node.kind == "more" for node in drawn.nodes)
    assert all(0 <= y <= drawn.height - 46 for _, y in boxes)


# -- write


def test_notes_tags_and_aliases_are_written_by_writers(site: Site) -> None:
    writer, direct = site.visitor("writer"), site.direct
    assert (
        writer.post(f"{V9}/notes", data={"text": "from the page"}).headers["location"]
        == "/checkpoints/support-bot%40v9#notes"
    )
    assert writer.post(f"{V9}/tags", data={"key": "owner", "value": "ann"}).status_code == 303
    assert writer.post(f"{V9}/tags", data={"remove": "team"}).status_code == 303
    assert writer.post(f"{V9}/aliases", data={"name": "blessed"}).status_code == 303
    found = direct.resolve("support-bot@blessed")
    assert (found.version, found.notes[-1].text, found.notes[-1].author) == (9, "from the page", "writer")
    assert found.tags == {"owner": "ann", "dataset": "tickets-2026"}
    assert writer.post(f"{V9}/aliases", data={"remove": "blessed"}).status_code == 303
    with pytest.raises(UnknownCheckpoint):
        direct.resolve("support-bot@blessed")


def test_an_alias_that_has_moved_meanwhile_is_not_taken_from_where_it_is(site: Site) -> None:
    site.direct.set_alias(site.direct.resolve("support-bot@v1"), "candidate")
    site.visitor("writer").post(f"{V9}/aliases", data={"remove": "candidate"})
    assert site.direct.resolve("support-bot@candidate").version == 1


def test_what_cannot_be_written_is_said(site: Site) -> None:
    writer = site.visitor("writer")
    assert writer.post(f"{V9}/notes", data={"text": "  "}).status_code == 400
    assert writer.post(f"{V9}/notes", data={"text": "x" * 20_001}).status_code == 400
    assert writer.post(f"{V9}/tags", data={"key": "no good", "value": ""}).status_code == 400
    assert writer.post(f"{V9}/tags", data={}).status_code == 400
    assert writer.post(f"{V9}/tags", data={"remove": "none"}).status_code == 404
    assert writer.post(f"{V9}/aliases", data={"name": "v3"}).status_code == 400
    assert writer.post(f"{V9}/aliases", data={"name": ""}).status_code == 400


def test_readers_write_nothing_and_see_no_forms(site: Site) -> None:
    reader = site.visitor("reader")
    for path, data in (("notes", {"text": "x"}), ("tags", {"key": "a"}), ("aliases", {"name": "a"}), ("remove", {})):
        assert reader.post(f"{V9}/{path}", data=data).status_code == 403
    page = reader.get(V9).text
    assert f'action="{V9}' not in page.replace("%40", "@")
    assert f'action="{V9}/notes"' in site.visitor("writer").get(V9).text.replace("%40", "@")


def test_removing_is_refused_while_something_needs_it(site: Site) -> None:
    writer = site.visitor("writer")
    refused = writer.post(f"{V9}/remove")
    assert refused.status_code == 409
    assert "alias candidate" in refused.text
    done = writer.post("/checkpoints/support-bot@v1/remove")
    assert done.headers["location"] == "/checkpoints?adapter=support-bot"
    assert writer.get("/checkpoints/support-bot@v1").status_code == 404


# -- what must not be seen


def test_other_namespaces_do_not_exist(site: Site) -> None:
    outsider = site.visitor("nlu")
    for path in (V9, f"{V9}/parts/norms", f"{V9}/files/README.md", "/adapters/support-bot"):
        assert outsider.get(path).status_code == 404, path
    assert outsider.post(f"{V9}/notes", data={"text": "x"}).status_code == 404
    assert outsider.get("/checkpoints/nlu/intent@v6").status_code == 200
    assert "support-bot" not in outsider.get("/bases/tiny-llama").text
    assert "support-bot" not in outsider.get("/compare?ref=nlu/intent@v1").text


def test_a_checkpoint_whose_files_are_gone_still_has_a_page(site: Site) -> None:
    shutil.rmtree(site.server.home / "store")
    shown = site.visitor("reader").get(V9)
    assert shown.status_code == 200
    assert "notice bad" in shown.text
