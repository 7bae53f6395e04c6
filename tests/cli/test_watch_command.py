"""`ckpt watch` and `ckpt outbox` as processes: beside a real litgpt run, stopped, killed, started anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from commands import Ckpt, interruptible
from waiting import until

LITGPT_BASE = Path(__file__).parents[1] / "data/litgpt/base-llama-gqa"
ROWS = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "three", "four")] * 5


@contextmanager
def watching(folder: Path, home: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "CKPT_HOME": str(home), "CKPT_USER": "ada"}
    command = interruptible("watch", str(folder), "--settle", "0.3", "--json", *words)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "watching" in process.stderr.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def steps(ckpt: Ckpt) -> list[int]:
    found = ckpt("list", "--json")
    return sorted(each["step"] for each in found.json) if found.code == 0 else []


def complete(run: Path, base: Path, step: int) -> Path:
    place = tiny.write_adapter(run / f"checkpoint-{step}", base=base, seed=step)
    tiny.write_json(place / "trainer_state.json", {"global_step": step, "log_history": []})
    return place


def test_a_real_litgpt_run_is_registered_while_it_runs(ckpt: Ckpt, tmp_path: Path) -> None:
    data = tiny.write_json(tmp_path / "data.json", ROWS)
    out = tmp_path / "out"
    out.mkdir()
    command = [
        sys.executable, "-m", "litgpt", "finetune_lora", str(LITGPT_BASE), "--data", "JSON", "--data.json_path", str(data),
        "--data.val_split_fraction", "0.2", "--out_dir", str(out), "--precision", "32-true", "--train.max_steps", "4",
        "--train.save_interval", "2", "--train.global_batch_size", "2", "--train.micro_batch_size", "2", "--train.epochs", "1",
        "--train.lr_warmup_steps", "1", "--train.max_seq_length", "64", "--eval.interval", "2", "--eval.max_iters", "2",
        "--eval.initial_validation", "false", "--logger_name", "csv", "--lora_r", "4",
    ]  # fmt: skip
    with watching(out, tmp_path / "home", "--adapter", "lit", "--base", str(LITGPT_BASE)) as watch:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        until(lambda: steps(ckpt) == [2, 4])
        watch.send_signal(signal.SIGINT)
        assert watch.wait(300) == 130
    found = {each["step"]: each for each in ckpt("list", "lit", "--json").json}
    assert set(found) == {2, 4}  # `final` is the last step, once more
    assert all({"loss", "val_loss"} <= {metric["name"] for metric in each["metrics"]} for each in found.values())
    assert ckpt("check", "lit@step:4").code == 0


def test_a_watcher_that_was_killed_goes_on_where_it_was(ckpt: Ckpt, tmp_path: Path) -> None:
    base, run = tiny.write_base(tmp_path / "base"), tmp_path / "run"
    complete(run, base, 10)
    with watching(run, tmp_path / "home") as watch:
        assert watch.stdout is not None
        assert json.loads(watch.stdout.readline())["step"] == 10
        watch.kill()
    complete(run, base, 20)
    with watching(run, tmp_path / "home") as watch:
        assert watch.stdout is not None
        assert json.loads(watch.stdout.readline()) == {"checkpoint": "run@v2", "step": 20, "created": True}
    assert steps(ckpt) == [10, 20]


def test_once_registers_what_is_there_and_ends(ckpt: Ckpt, tmp_path: Path) -> None:
    base, run = tiny.write_base(tmp_path / "base"), tmp_path / "run"
    for step in (10, 20):
        complete(run, base, step)
    done = ckpt("watch", str(run), "--once", "--settle", "0.2")
    assert (done.code, done.out) == (0, "registered run@v1, step 10\nregistered run@v2, step 20\n")
    assert ckpt("watch", str(run), "--once", "--settle", "0.2").out == ""
    assert ckpt("watch", str(tmp_path / "nowhere")).code == 3


def test_what_cannot_be_registered_waits_in_the_outbox(ckpt: Ckpt, tmp_path: Path) -> None:
    base, run = tiny.write_base(tmp_path / "base"), tmp_path / "run"
    complete(run, base, 10)
    assert ckpt("outbox", "list").err == "nothing waits\n"
    done = ckpt("watch", str(run), "--once", "--settle", "0.2", "--base", "later")
    assert done.code == 1
    assert "waits" in done.err
    (waiting,) = ckpt("outbox", "list", "--json").json
    assert "later" in waiting["problem"]
    failed = ckpt("outbox", "send")
    assert failed.code == 3
    assert ckpt("base", "add", str(base), "--name", "later").code == 0
    assert ckpt("outbox", "send").out == "registered run@v1, step 10\n"
    assert ckpt("outbox", "list", "--json").json == []


def test_what_waits_can_be_forgotten(ckpt: Ckpt, tmp_path: Path) -> None:
    base, run = tiny.write_base(tmp_path / "base"), tmp_path / "run"
    complete(run, base, 10)
    ckpt("watch", str(run), "--once", "--settle", "0.2", "--base", "never")
    (waiting,) = ckpt("outbox", "list", "--json").json
    assert ckpt("outbox", "rm", waiting["id"]).code == 2
    assert ckpt("outbox", "rm", "other", "--yes").code == 2
    assert ckpt("outbox", "rm", waiting["id"], "--yes").code == 0
    assert ckpt("outbox", "list", "--json").json == []


@pytest.mark.parametrize("words", [("--settle", "0"), ("--tag", "odd")])
def test_wrong_words_are_said(ckpt: Ckpt, tmp_path: Path, words: tuple[str, str]) -> None:
    assert ckpt("watch", str(tmp_path), *words).code == 2


def test_once_ends_badly_where_something_cannot_be_read(ckpt: Ckpt, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    complete(tmp_path / "bot", base, 10)
    weights = complete(tmp_path / "bot", base, 20) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    found = ckpt("watch", str(tmp_path / "bot"), "--once", "--settle", "0.1", "--base", str(base))
    assert found.code == 1
    assert "checkpoint-20 is left" in found.err
    assert steps(ckpt) == [10] or "registered" in found.out


@pytest.mark.parametrize("words", [("--adapter", "not a name"), ("--run", "a/b"), ("--tag", "a b=c")])
def test_names_that_are_none_are_refused_at_once(ckpt: Ckpt, tmp_path: Path, words: tuple[str, str]) -> None:
    complete(tmp_path / "bot", tiny.write_base(tmp_path / "base"), 10)
    assert ckpt("watch", str(tmp_path / "bot"), "--once", "--settle", "0.1", *words).code == 2
    assert ckpt("outbox", "list", "--json").json == []
