"""`ckpt eval` and `ckpt metric import`, as people type them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import trained
from commands import Ckpt


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trained.train(folder / "bot", trained.write_model(folder / "base"), steps=(20, 60))
    return folder


@pytest.fixture
def bot(ckpt: Ckpt, runs: Path) -> Ckpt:
    assert ckpt("base", "add", str(runs / "base"), "--name", "base").code == 0
    assert ckpt("register", str(runs / "bot"), "--base", "base", "--run", "first").code == 0
    return ckpt


def test_checkpoints_are_measured_and_ranked(bot: Ckpt, tmp_path: Path) -> None:
    data = str(trained.write_data(tmp_path / "hard.jsonl", 4))
    dry = bot("eval", "--all-missing", "--run", "first", "--data", data, "--dry-run", "--json").json
    assert [each["metrics"] for each in dry] == [[], [], []]
    found = bot(
        "eval", "--all-missing", "--run", "first", "--data", data, "--metric", "loss", "--metric", "exact_match"
    )
    assert found.code == 0
    assert "hard/loss" in found.out
    assert "hard/exact_match" in found.out
    again = bot("eval", "bot@v1", "bot@v2", "--data", data, "--json").json
    assert [each["is_known"] for each in again] == [True, True]
    values = {each["checkpoint"]: each["metrics"][0]["value"] for each in again}
    assert bot("list", "--best", "hard/loss", "--where", "version < 3", "--json").json[0]["ref"] == min(
        values, key=values.get
    )
    assert not bot("eval", "bot@v1", "--data", data, "--again", "--json").json[0]["is_known"]


def test_somebody_elses_program_measures(ckpt: Ckpt, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    tiny.write_adapter(tmp_path / "bot", base=base)
    ckpt("register", str(tmp_path / "bot"), "--base", str(base))
    script = tmp_path / "mine.py"
    script.write_text(
        "import json, os, sys\n"
        "print('warming up')\n"
        "print(json.dumps({'files': len(os.listdir(sys.argv[1])), 'sub': {'shards': len(os.listdir(sys.argv[2]))}, 'ref': sys.argv[3]}))\n"
    )
    command = f"{sys.executable} {script} {{path}} {{base}} {{ref}}"
    found = ckpt("eval", "bot", "--command", command, "--name", "mine")
    assert found.code == 0
    metrics = {each["name"]: each["value"] for each in ckpt("show", "bot", "--json").json["metrics"]}
    assert metrics == {"mine/files": 2.0, "mine/sub/shards": 3.0}


@pytest.mark.parametrize(
    ("code", "seconds", "words"),
    [
        ("print('nothing')", 300, "no JSON object"),
        ("print('{}')", 300, "no number"),
        ("import sys; sys.exit('out of luck')", 300, "out of luck"),
        ("import time; time.sleep(600)", 1, "longer than 1 s"),
    ],
)
def test_a_program_that_fails_is_told_of(ckpt: Ckpt, tmp_path: Path, code: str, seconds: int, words: str) -> None:
    base = tiny.write_base(tmp_path / "base")
    tiny.write_adapter(tmp_path / "bot", base=base)
    ckpt("register", str(tmp_path / "bot"), "--base", str(base))
    (tmp_path / "mine.py").write_text(code)
    found = ckpt("eval", "bot", "--command", f"{sys.executable} {tmp_path / 'mine.py'}", "--timeout", str(seconds))
    assert found.code == 8
    assert words in found.err
    assert ckpt("show", "bot", "--json").json["metrics"] == []


def test_results_from_elsewhere_are_recorded(bot: Ckpt, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"results": {"arc": {"acc,none": 0.5}}, "versions": {}}))
    found = bot("metric", "import", "bot@v2", str(results))
    assert (found.code, found.out) == (0, "recorded 1 metrics of bot@v2: arc/acc\n")
    assert bot("metric", "import", "bot@v2", str(results), "--from", "excel").code == 2
    assert bot("metric", "import", "bot@v2", str(tmp_path / "nowhere")).code == 3
    results.write_text("{}")
    assert bot("metric", "import", "bot@v2", str(results)).code == 2


def test_wrong_words_are_said(bot: Ckpt, tmp_path: Path) -> None:
    data = str(trained.write_data(tmp_path / "hard.jsonl", 2))
    for words in (
        ("eval", "--data", data),
        ("eval", "bot", "--all-missing", "--run", "first", "--data", data),
        ("eval", "bot"),
        ("eval", "bot", "--data", data, "--command", "x"),
        ("eval", "--all-missing", "--data", data),
        ("eval", "--all-missing", "--run", "nothing", "--data", data),
        ("eval", "bot", "--data", data, "--metric", "bleu"),
        ("eval", "bot", "--data", data, "--device", "tpu"),
        ("eval", "bot", "--data", data, "--device", "mps"),
        ("eval", "bot", "--data", data, "--dtype", "int8"),
        ("eval", "bot", "--command", "'"),
    ):
        assert bot(*words).code == 2, words
    assert bot("eval", "bot", "--data", str(tmp_path / "nowhere.jsonl")).code == 3
    (tmp_path / "odd.jsonl").write_text('{"txt": 1}\n')
    wrong = bot("eval", "bot", "--data", str(tmp_path / "odd.jsonl"))
    assert wrong.code == 2
    assert "line 1" in wrong.err


def test_a_program_measures_what_is_missing(ckpt: Ckpt, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    for step in (10, 20):
        tiny.write_adapter(tmp_path / f"bot/checkpoint-{step}", base=base, seed=step)
    ckpt("register", str(tmp_path / "bot"), "--base", str(base))
    (tmp_path / "mine.py").write_text("print('{\"f1\": 0.5}')")
    words = ("--command", f"{sys.executable} {tmp_path / 'mine.py'}")
    assert ckpt("eval", "bot@v1", *words, "--name", "mine").code == 0
    every = ("eval", "--all-missing", "--adapter", "bot", *words)
    nameless = ckpt(*every)
    assert (nameless.code, "--name" in nameless.err) == (2, True)
    dry = ckpt(*every, "--name", "mine", "--dry-run")
    assert [line.split()[0] for line in dry.out.splitlines() if "to be measured" in line] == ["bot@v2"]
    found = ckpt(*every, "--name", "mine", "--json").json
    assert [each["is_known"] for each in found] == [True, False]
    again = ckpt(*every, "--name", "mine", "--again", "--json").json
    assert [each["is_known"] for each in again] == [False, False]
