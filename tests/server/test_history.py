"""The history over HTTP: in pages of what may be seen, and all of it, however long it is, without anybody holding it whole."""

from __future__ import annotations

import sqlite3
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from running import Server, settings_of

from registry import connect
from registry.errors import ServerFailed
from registry.service import Registry


def tell(server: Server, count: int, subject: str = "nlu/bot@v1") -> None:
    with server.direct.workspace.writing() as change:
        for number in range(count):
            change.record("note", subject, text=f"{number} \N{SNOWMAN}")


@pytest.fixture
def ckpt(server: Server, tmp_path: Path) -> Iterator[Registry]:
    """The server as an admin sees it from another machine."""
    said = {"CKPT_SERVER": server.url, "CKPT_TOKEN": server.secrets["admin"]}
    with connect(settings_of(tmp_path / "elsewhere", **said)) as registry:
        yield registry


def test_pages_are_full_of_what_is_seen(server: Server) -> None:
    for number in range(6):
        tell(server, 1, f"nlu/bot@v{number}")
        tell(server, 50, "vision/bot@v1")
    client, subjects, cursor = server.client("nlu"), list[str](), ""
    for more in (True, True, False):
        page = client.get("/history", params={"limit": 2, "cursor": cursor}).json()
        subjects, cursor = [event["subject"] for event in page["items"]] + subjects, page["cursor"]
        assert bool(cursor) == more
    assert subjects == [f"nlu/bot@v{number}" for number in range(6)]


def test_all_that_was_ever_changed_is_seen_from_elsewhere(server: Server, ckpt: Registry) -> None:
    tell(server, 2300)
    assert ckpt.history() == server.direct.history()
    assert ckpt.history(limit=1500) == server.direct.history(limit=1500)
    assert list(ckpt.export_audit()) == server.direct.history()


def test_an_export_is_sent_while_it_is_read(server: Server) -> None:
    tell(server, 1)
    answer = server.client("admin").get("/audit/export")
    assert "content-length" not in answer.headers
    assert "etag" not in answer.headers
    history = server.client("admin").get("/history").json()["items"]
    assert answer.json() == history


def test_an_export_takes_no_more_memory_where_there_is_more_of_it(server: Server, ckpt: Registry) -> None:
    peaks = []
    for count in (2000, 6000):
        tell(server, count)
        tracemalloc.start()
        for _ in ckpt.export_audit():  # the server is in this process, too
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_an_export_that_is_cut_off_is_no_shorter_history(server: Server, ckpt: Registry) -> None:
    tell(server, 2500)
    with closing(sqlite3.connect(server.direct.settings.home / "ckpt.db")) as database, database:
        database.execute("UPDATE events SET at = 'never' WHERE number = 2400")
    with pytest.raises(ServerFailed):
        list(ckpt.export_audit())
