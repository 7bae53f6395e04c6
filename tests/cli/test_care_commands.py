"""`ckpt gc`, `verify`, `doctor`, `audit`: what they say, as text and JSON, and how they exit."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
import tiny
from commands import Ckpt


@pytest.fixture
def lost(registered: Ckpt, tmp_path: Path) -> Path:
    """A blob that is gone from the store, of the newest checkpoint."""
    files = registered("show", "support-bot", "--json").json["manifest"]["files"]
    weights = max(files, key=lambda entry: entry["size_bytes"])["digest"].removeprefix("blake3:")
    path = tmp_path / "home/store/blobs" / weights[:2] / weights
    path.unlink()
    return path


def test_gc_marks_first_and_says_when_it_removes(registered: Ckpt, tmp_path: Path) -> None:
    registered("rm", "support-bot@v1", "--yes")
    first = registered("gc")
    assert first.out == "removed 0 files, 0 B\n"
    assert "a `ckpt gc` in 24h removes them" in first.err
    would = registered("gc", "--grace", "0h", "--dry-run")
    assert would.out.startswith("would remove ")
    swept = registered("gc", "--grace", "0h", "--json").json
    assert swept["blobs"] > 0
    assert swept["marked"] == 0
    assert registered("gc", "--grace", "soon").code == 2
    assert registered("verify").code == 0


def test_gc_removes_copies_for_serving_that_nobody_uses(registered: Ckpt, tmp_path: Path) -> None:
    assert registered("gc", "--local").out == "removed 0 copies on this machine, 0 B\n"
    copy = Path(registered("serve-config", "vllm", "support-bot@v1", "--json").json["served"][0]["source"])
    assert registered("gc", "--local").out == "removed 0 copies on this machine, 0 B\n"
    would = registered("gc", "--unused", "0h", "--dry-run")
    assert would.out.splitlines()[0] == "would remove 0 files, 0 B"
    assert would.out.splitlines()[1].startswith("would remove 1 copies on this machine, ")
    assert copy.is_dir()
    swept = registered("gc", "--local", "--unused", "0h", "--json").json
    assert swept.keys() == {"copies", "copies_bytes"}
    assert (swept["copies"], swept["copies_bytes"] > 0) == (1, True)
    assert not copy.exists()
    both = registered("gc", "--json").json
    assert {"blobs", "marked", "deliveries", "copies"} <= both.keys()
    assert registered("gc", "--unused", "long").code == 2


def test_verify_names_what_is_lost_and_exits_with_7(registered: Ckpt, lost: Path) -> None:
    found = registered("verify")
    assert found.code == 7
    assert lost.name in found.out
    assert "support-bot@v6" in found.out
    assert "1 wrong" in found.err
    document = registered("verify", "--read-data", "--json")
    assert document.code == 7
    assert document.json["damages"][0]["needed_by"] == ["support-bot@v6"]
    assert {registered("verify", "--subset", f"{number}/2").code for number in (1, 2)} == {0, 7}
    assert registered("verify", "--subset", "3/2").code == 2


def test_the_doctor_shows_what_it_found(registered: Ckpt, tmp_path: Path) -> None:
    found = registered("doctor")
    assert found.code == 0
    assert str(tmp_path / "home") in found.out
    verdicts = {each["name"]: each["verdict"] for each in registered("doctor", "--json").json}
    assert verdicts["database"] == verdicts["store"] == "ok"


def test_the_doctor_exits_with_5_on_a_problem(ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_DATABASE_URL", "postgresql://postgres@127.0.0.1:1/none")
    found = ckpt("doctor")
    assert found.code == 5
    assert "problem" in found.out


def test_the_log_is_filtered(registered: Ckpt) -> None:
    everything = registered("audit", "log", "--json").json
    assert [event["number"] for event in everything] == list(range(1, len(everything) + 1))
    assert len(registered("audit", "log", "--subject", "support-bot@v2", "--json").json) == 1
    assert len(registered("audit", "log", "--limit", "2", "--actor", "ada", "--since", "1h", "--json").json) == 2
    assert registered("audit", "log", "--actor", "eve").err == "no such events\n"
    assert everything[-1]["hash"][:12] in registered("audit", "log").out
    assert registered("audit", "log", "--since", "soon").code == 2


def test_a_checkpoint_kept_elsewhere_shows_a_rewritten_end(registered: Ckpt, tmp_path: Path) -> None:
    exported = registered("audit", "export", "audit.jsonl")
    assert exported.code == 0
    assert "not signed" in exported.err
    assert "checkpoint kept elsewhere" in registered("audit", "verify").err
    assert "as the checkpoint says" in registered("audit", "verify", "--checkpoint", "audit.jsonl").out
    size = json.loads(Path("audit.jsonl").read_text().splitlines()[-1])["checkpoint"]["size"]
    assert registered("audit", "verify", "--json").json["count"] == size
    with sqlite3.connect(tmp_path / "home/ckpt.db") as connection:
        connection.execute("DELETE FROM events WHERE number = ?", (size,))
    assert registered("audit", "verify").code == 0
    refused = registered("audit", "verify", "--checkpoint", "audit.jsonl")
    assert refused.code == 7
    assert f"at least {size} events" in refused.err
    assert registered("audit", "verify", "--checkpoint", "missing").code == 3
    assert registered("audit", "verify", "--key", "key.pem").code == 2


def test_a_chain_that_was_tampered_with_is_named(registered: Ckpt, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "home/ckpt.db") as connection:
        connection.execute("UPDATE events SET author = 'eve' WHERE number = 2")
    refused = registered("audit", "verify")
    assert refused.code == 7
    assert "event 2" in refused.err
    assert registered("audit", "export", "audit.jsonl").code == 7
    assert not Path("audit.jsonl").exists()


def test_blobs_of_the_example_are_all_there(registered: Ckpt, tmp_path: Path) -> None:
    assert registered("verify", "--json").json["objects"] >= len(tiny.stored_blobs(tmp_path / "home"))
