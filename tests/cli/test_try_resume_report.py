"""`ckpt try`, `ckpt resume` and `ckpt report`, as people type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trained
from commands import Ckpt


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trained.train(folder / "bot", trained.write_model(folder / "base"), steps=(20, 40))
    return folder


@pytest.fixture
def bot(ckpt: Ckpt, runs: Path) -> Ckpt:
    assert ckpt("base", "add", str(runs / "base"), "--name", "base").code == 0
    return ckpt


def test_trying_shows_answers_side_by_side_and_records(bot: Ckpt, runs: Path, tmp_path: Path) -> None:
    bot("register", str(runs / "bot"), "--base", "base")
    (tmp_path / "prompts.txt").write_text("what colour is the sky\nwhat colour is the sea\n")
    found = bot("try", "bot@v2", "--prompts", "prompts.txt", "--max-tokens", "8", "--tolerance", "0.01")
    assert found.code == 0
    assert "logit difference" in found.out
    assert "what colour is the sky" in found.out
    shown = bot("show", "bot@v2", "--json").json
    assert {each["name"] for each in shown["metrics"]} >= {
        "try/logit_difference",
        "try/agreement",
        "try/tokens_per_second",
    }
    assert "what colour is the sea" in shown["notes"][0]["text"]
    strict = bot(
        "try", "bot@v1", "--prompts", "prompts.txt", "--max-tokens", "2", "--tolerance", "0", "--no-record", "--json"
    )
    assert strict.code == 4
    assert "more than 0" in strict.err
    assert len(strict.json["trials"]) == 2
    assert not bot("show", "bot@v1", "--json").json["notes"]


def test_wrong_words_are_said(bot: Ckpt, runs: Path, tmp_path: Path) -> None:
    bot("register", str(runs / "bot"), "--base", "base")
    (tmp_path / "empty.txt").write_text("\n")
    assert bot("try", "bot", "--prompts", "empty.txt").code == 2
    assert bot("try", "bot", "--prompts", "nowhere.txt").code == 3
    assert bot("try", "bot", "--device", "abacus").code == 2
    assert bot("try", "bot", "--dtype", "int3").code == 2
    assert bot("report", "bot", "--out", "report.pdf").code == 2
    assert bot("report", "bot", "--out", "nowhere/report.md").code == 8
    assert bot("report", "nobody", "--out", "report.md").code == 3


def test_a_run_is_resumed(bot: Ckpt, runs: Path, tmp_path: Path) -> None:
    without = bot("register", str(runs / "bot"), "--base", "base")
    assert "left out optimizer.pt, rng_state.pth, scheduler.pt: state of the trainer" in without.err
    refused = bot("resume", "bot@step:20", "again")
    assert refused.code == 3
    assert "optimizer, scheduler" in refused.err
    assert "--weights-only" in refused.err
    anew = bot("resume", "bot@step:20", "anew", "--weights-only")
    assert "is_trainable=True" in anew.out
    assert "begin anew" in anew.err
    assert bot("register", str(runs / "bot"), "--base", "base", "--with-state").code == 0
    found = bot("resume", "bot@step:20", "again", "--json")
    place = tmp_path / "again/checkpoint-20"
    assert (found.json["place"], found.json["weights_only"]) == (str(place), False)
    assert f"resume_from_checkpoint='{place}'" in found.json["ways"][0]["text"]
    assert (place / "optimizer.pt").read_bytes() == (runs / "bot/checkpoint-20/optimizer.pt").read_bytes()
    assert json.loads((tmp_path / "again/ckpt-resumed.json").read_text())["step"] == 20
    assert bot("resume", "bot@step:20", "again").code == 5
    again = bot("register", "again", "--base", "base", "--json").json
    assert [each["created"] for each in again] == [False]


def test_a_report_is_written(bot: Ckpt, runs: Path, tmp_path: Path) -> None:
    bot("register", str(runs / "bot"), "--base", "base")
    assert bot("report", "bot", "--out", "report.html").out == "wrote report.html\n"
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert bot("report", "bot", "--out", "report.md", "--policy", "eval_loss min, loss <= 100").code == 0
    assert "loss &lt;= 100" in (tmp_path / "report.md").read_text()
