"""The chain of events: what is written comes back, and whatever is tampered with is named."""

from __future__ import annotations

from datetime import timedelta
from math import nan

import pytest
from factories import NOON, digest
from sqlalchemy import Engine

from registry.db.catalog import Catalog
from registry.db.schema import reading, writing
from registry.errors import Changed, InvalidInput


@pytest.fixture
def history(engine: Engine) -> Engine:
    with writing(engine) as session:
        for i in range(1, 7):
            subject = f"{'Bot' if i % 2 else 'bot'}@v{i}"
            Catalog(session).events.append("ada", NOON + timedelta(minutes=i), "register", subject, {"step": i})
    return engine


def tamper(engine: Engine, *statements: str) -> None:
    with writing(engine) as session:
        for statement in statements:
            session.connection().exec_driver_sql(statement)


def test_events_come_back_as_they_were_appended(history: Engine) -> None:
    with writing(history) as session:
        written = Catalog(session).events.append("bob", NOON, "ship", "bot@v1", {"to": digest("x"), "loss": nan})
    assert written.number == 7
    assert written.detail == {"to": str(digest("x")), "loss": "nan"}
    with reading(history) as session:
        events = Catalog(session).events
        assert events.all()[-1] == written
        assert [event.number for event in events.all()] == [1, 2, 3, 4, 5, 6, 7]
        assert [event.number for event in events.all(limit=2)] == [6, 7]
        assert [event.number for event in events.all("bot")] == [2, 4, 6, 7]
        assert [event.number for event in events.all("bot", limit=1)] == [7]
        assert [event.number for event in events.all("bot@v1")] == [7]
        assert [event.number for event in events.all("b_t")] == []
        assert [event.number for event in events.all("bo")] == []
        assert events.verify().count == 7


def test_pages_go_back_through_what_is_seen_and_wanted(engine: Engine) -> None:
    subjects = [
        "nlu/bot@v1",
        "vision/bot@v1",
        "nlu/bot",
        "nlux/bot@v1",
        "NLU/bot@v1",
        "bot@v1",
        "job 1",
        "llama",
        "nlu/b%@v2",
    ]
    with writing(engine) as session:
        for i in range(40):
            subject, action = subjects[i % 9], "base.add" if i % 9 == 7 else "note"
            Catalog(session).events.append("ab"[i % 2], NOON + timedelta(minutes=i), action, subject, {})
    with reading(engine) as session:
        events = Catalog(session).events
        for asked in ({}, {"author": "a"}, {"since": NOON + timedelta(minutes=25)}, {"subject": "nlu/bot"}):
            pages = [events.page(limit=3, namespaces=("nlu", "none"), **asked)]  # type: ignore[arg-type]
            while pages[-1].cursor:
                pages.append(events.page(limit=3, namespaces=("nlu", "none"), cursor=pages[-1].cursor, **asked))  # type: ignore[arg-type]
            found = [event for page in reversed(pages) for event in page.items]
            seen = ("nlu/bot@v1", "nlu/b%@v2", "llama")
            assert found == [event for event in events.all(**asked) if event.subject in seen]  # type: ignore[arg-type]
            assert all(len(page.items) == 3 for page in pages[:-1])
        for wrong in ({"cursor": "-1"}, {"cursor": "\u0663"}, {"cursor": "9" * 40}, {"limit": 0}, {"limit": 10_001}):
            with pytest.raises(InvalidInput):
                events.page(**wrong)  # type: ignore[arg-type]


def test_no_events_are_a_sound_chain(catalog: Catalog) -> None:
    assert catalog.events.verify().count == 0


@pytest.mark.parametrize(
    ("statements", "first_bad"),
    [
        (["UPDATE events SET author = 'eve' WHERE number = 4"], 4),
        (["UPDATE events SET at = '2020-01-01 00:00:00.000000' WHERE number = 2"], 2),
        (["UPDATE events SET detail = '{\"step\":9}' WHERE number = 6"], 6),
        ([f"UPDATE events SET subject = 'bot@v9', hash = '{1:064d}' WHERE number = 3"], 3),
        (["DELETE FROM events WHERE number = 3"], 3),
        (["DELETE FROM events WHERE number = 1"], 1),
        (["DELETE FROM events WHERE number = 3", "UPDATE events SET number = number - 1 WHERE number > 3"], 3),
        ([f"UPDATE events SET number = {new} WHERE number = {old}" for old, new in ((2, 0), (3, 2), (0, 3))], 2),
    ],
    ids=["author", "time", "detail", "hash", "removed", "first removed", "removed and renumbered", "reordered"],
)
def test_tampering_is_found(history: Engine, statements: list[str], first_bad: int) -> None:
    tamper(history, *statements)
    with reading(history) as session, pytest.raises(Changed) as caught:
        Catalog(session).events.verify()
    assert caught.value.subject == f"event {first_bad}"
