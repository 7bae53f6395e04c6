"""What is live where, as pages; shipping and rolling back are shown before they are done."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from visiting import Site

from registry.errors import InvalidInput
from registry.manifest import Shipment
from registry.refs import Digest
from registry.server.pages.moments import in_form, moment
from registry.server.pages.timeline import LABELS, MOST_LANES, WIDTH, draw_timeline

NOON = datetime(2026, 5, 3, 12, tzinfo=UTC)
HTMX = {"HX-Request": "true"}


def shipment(number: int, checkpoint: str, *, days: float, until: float | None = None) -> Shipment:
    digest = Digest(f"{number:064x}")
    return Shipment(
        number=number,
        environment="production",
        checkpoint=checkpoint,
        checkpoint_digest=digest,
        merged=None,
        base=digest,
        base_name="base",
        note="",
        author="me",
        shipped_at=NOON + timedelta(days=days),
        until=None if until is None else NOON + timedelta(days=until),
    )


def hidden(answer: httpx.Response) -> dict[str, str]:
    """The fields of a form that were filled in for whoever confirms."""
    return dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', answer.text))


# -- the picture


def test_bars_lie_where_their_times_are() -> None:
    drawn = draw_timeline(
        [shipment(1, "a@v1", days=-2, until=5), shipment(2, "a@v2", days=5), shipment(3, "a@v0", days=-9, until=-8)],
        NOON,
        NOON + timedelta(days=10),
        NOON + timedelta(days=2.5),
    )
    (lane,) = drawn.lanes
    middle, wide = (LABELS + WIDTH) / 2, (WIDTH - LABELS) / 2
    assert [(bar.x, bar.width, bar.text) for bar in lane.bars] == [(LABELS, wide, "v1"), (middle, wide, "v2")]
    assert drawn.mark == LABELS + (WIDTH - LABELS) / 4
    assert all(LABELS <= tick.x <= WIDTH for tick in drawn.ticks)
    assert 2 <= len(drawn.ticks) <= 8


def test_what_was_live_for_a_moment_is_still_seen_and_says_nothing() -> None:
    drawn = draw_timeline(
        [shipment(1, "a@v1", days=0, until=0.001), shipment(2, "a@v2", days=300)], NOON, NOON + timedelta(days=300)
    )
    first, last = drawn.lanes[0].bars
    assert (first.width, first.text) == (3.0, "")
    assert last.x + last.width == WIDTH


def test_a_picture_has_so_many_lanes_and_says_how_many_it_left_out() -> None:
    drawn = draw_timeline(
        [shipment(number, f"a{number}@v1", days=0) for number in range(MOST_LANES + 4)], NOON, NOON + timedelta(days=1)
    )
    assert (len(drawn.lanes), drawn.left_out) == (MOST_LANES, 4)


@pytest.mark.parametrize("minutes", [0, 1, 100, 5000, 10**6])
def test_times_are_written_few_enough_to_be_read(minutes: int) -> None:
    drawn = draw_timeline([], NOON, NOON + timedelta(minutes=minutes))
    assert len(drawn.ticks) <= 8


def test_times_in_forms() -> None:
    assert moment("2026-05-03", "at") == datetime(2026, 5, 3, tzinfo=UTC)
    assert moment("2026-05-03", "at", is_end=True) == datetime(2026, 5, 3, 23, 59, 59, 999999, tzinfo=UTC)
    assert moment("2026-05-03T14:00+02:00", "at", is_end=True) == NOON
    assert moment("", "at") is None
    assert in_form(moment("2026-05-03T12:00", "at")) == "2026-05-03T12:00"
    with pytest.raises(InvalidInput, match="expected a date"):
        moment("soon", "at")


# -- look


def test_the_page_tells_what_is_live_and_what_was(site: Site) -> None:
    shown = site.visitor("reader").get("/shipped").text
    assert shown.count('class="badge live"') >= 3
    assert "answers got worse" in shown
    assert ">rollback<" in shown
    assert "Roll back" not in shown
    assert "/shipped/ship" not in shown
    assert '<svg class="timeline"' in shown


def test_one_environment_and_one_time(site: Site) -> None:
    client = site.visitor("reader")
    only = client.get("/shipped?environment=staging").text
    assert "beats the baseline" in only
    assert "first release" not in only
    (first,) = [each for each in site.direct.shipments("production") if each.note == "first release"]
    at = first.shipped_at.isoformat().replace("+00:00", "")
    then = client.get("/shipped", params={"environment": "production", "at": at}).text
    assert "Live at" in then
    assert 'class="asked"' in then
    assert 'class="asked"' not in client.get("/shipped").text
    assert "Nothing was live then" in client.get("/shipped?at=2001-01-01").text
    assert client.get("/shipped?environment=nowhere").status_code == 404
    assert client.get("/shipped?at=soon").status_code == 400
    assert client.get("/shipped?period=aeon").status_code == 400
    assert client.get("/shipped?period=day").status_code == 200


def test_nothing_was_shipped_yet(empty_site: Site) -> None:
    assert "Nothing was shipped yet" in empty_site.visitor("").get("/shipped").text


def test_others_shipments_are_not_there(site: Site) -> None:
    shown = site.visitor("nlu").get("/shipped").text
    assert "nlu/intent" in shown
    assert "support-bot" not in shown


# -- ship


def test_shipping_is_shown_then_done(site: Site) -> None:
    client = site.visitor("shipper")
    chosen = client.get("/shipped/ship", params={"environment": "staging"}).text
    assert '<option value="support-bot@candidate">' in chosen
    asked = client.get("/shipped/ship", params={"ref": "support-bot@baseline", "environment": "staging"})
    assert "support-bot@v9" in asked.text
    assert "support-bot@v5" in asked.text
    answer = client.post("/shipped/ship", data={**hidden(asked), "note": "back to basics"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/shipped?environment=staging")
    (live,) = site.direct.shipped("staging")
    assert (live.checkpoint, live.author, live.note) == ("support-bot@v5", "shipper", "back to basics")


def test_a_merged_model_is_shipped_by_its_digest(site: Site) -> None:
    client, merged = site.visitor("shipper"), site.direct.merged()[0]
    asked = client.get("/shipped/ship", params={"ref": merged.digest.short, "environment": "canary"})
    assert "nothing of support-bot" in asked.text
    client.post("/shipped/ship", data=hidden(asked))
    assert site.direct.shipped("canary")[0].merged == merged.digest


def test_what_was_confirmed_is_what_is_done(site: Site) -> None:
    client = site.visitor("shipper")
    asked = client.get("/shipped/ship", params={"ref": "support-bot@v1", "environment": "staging"})
    site.direct.ship(site.direct.resolve("support-bot@v2"), "staging", "quicker")
    answer = client.post("/shipped/ship", data={**hidden(asked), "note": "mine"})
    assert answer.status_code == 409
    assert "in the meantime" in answer.text
    assert 'value="mine"' in answer.text
    assert site.direct.shipped("staging")[0].checkpoint == "support-bot@v2"
    assert client.post("/shipped/ship", data={**hidden(answer), "note": "mine"}).status_code == 303


def test_a_policy_asks_for_a_reason(site: Site) -> None:
    site.direct.set_policy("support-bot", "accuracy max, accuracy >= 0.99, gate production")
    client = site.visitor("shipper")
    asked = client.get("/shipped/ship", params={"ref": "support-bot@v1", "environment": "production"})
    assert "is against it" in asked.text
    answer = client.post("/shipped/ship", data=hidden(asked))
    assert answer.status_code == 422
    assert 'name="override"' in answer.text
    assert client.post("/shipped/ship", data={**hidden(answer), "override": "a demo"}).status_code == 303
    assert "a demo" in site.direct.shipments("production")[-1].note


# -- roll back


def test_rolling_back_is_shown_then_done(site: Site) -> None:
    client = site.visitor("shipper")
    where = {"environment": "production", "adapter": "support-bot"}
    assert client.get("/shipped").text.count("Roll back…") == 2
    asked = client.get("/shipped/rollback", params=where)
    answer = client.post("/shipped/rollback", data={**hidden(asked), "note": "further back"})
    assert answer.status_code == 303
    live = {each.checkpoint for each in site.direct.shipped("production")}
    assert live == {"nlu/intent@v6", "support-bot@v5"}
    again = client.post("/shipped/rollback", data={**hidden(asked), "note": "twice"})
    assert again.status_code == 409


def test_in_a_dialog_only_the_form_is_drawn(site: Site) -> None:
    where = {"environment": "production", "adapter": "support-bot"}
    client = site.visitor("shipper")
    assert "<html" not in client.get("/shipped/rollback", params=where, headers=HTMX).text
    assert "<html" in client.get("/shipped/rollback", params=where).text


def test_where_there_is_nothing_to_go_back_to(site: Site) -> None:
    client = site.visitor("shipper")
    answer = client.get("/shipped/rollback", params={"environment": "production", "adapter": "nlu/intent"})
    assert answer.status_code == 409
    assert "nothing was live there before" in answer.text


def test_writers_ship_nothing(site: Site) -> None:
    client = site.visitor("writer")
    for path in ("/shipped/ship", "/shipped/rollback"):
        assert client.get(path).status_code == 403
        assert client.post(path).status_code == 403
