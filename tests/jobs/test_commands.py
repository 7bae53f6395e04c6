"""`ckpt jobs …`, `ckpt merge --detach`, `ckpt worker` as people call them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from teams import fill, worker_thread

from cli.app import main
from registry.service import Registry
from registry.teamwork import JobState

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    shared: Registry,
    team_environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """A command in this process, with the team's registry: exit code, stdout, stderr."""
    fill(shared, tmp_path / "inputs")
    for name, value in team_environment.items():
        monkeypatch.setenv(name, value)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(list(words))
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


def test_a_merge_is_left_to_workers_and_followed_later(run: Run, shared: Registry) -> None:
    code, out, talk = run("merge", "bot", "--detach", "--note", "later")
    assert (code, out) == (0, "1\n")
    assert "ckpt jobs show 1" in talk
    assert "queued" in run("jobs", "list")[1]
    assert json.loads(run("merge", "bot", "--detach", "--json")[1])["id"] == 1  # which is at it already
    with worker_thread(shared):
        code, out, _ = run("jobs", "show", "1", "--follow")
    assert code == 0
    assert "succeeded" in out
    assert "model-00001-of-00004.safetensors" in out
    assert run("jobs", "logs", "1")[1].splitlines()[-1].endswith("finished")
    found = json.loads(run("jobs", "show", "1", "--json")[1])
    assert found["result"]["merged"]["note"] == "later"
    assert [shard["state"] for shard in found["shards"]] == ["finished"] * 4
    assert len(json.loads(run("jobs", "list", "--json", "--state", "succeeded")[1])) == 1
    assert json.loads(run("jobs", "logs", "1", "--json")[1])[-1]["text"] == "finished"


def test_merging_waits_for_the_workers(run: Run, shared: Registry) -> None:
    with worker_thread(shared):
        code, out, _ = run("merge", "bot", "--json")
    assert code == 0
    assert json.loads(out)["digest"] == f"blake3:{shared.merged()[0].digest.hex}"
    with worker_thread(shared):
        assert json.loads(run("merge", "bot", "--json")[1])["created"] is False


def test_a_job_is_cancelled_and_tried_again(run: Run, shared: Registry) -> None:
    run("merge", "bot", "--detach")
    assert run("jobs", "cancel", "1")[:2] == (0, "job 1: cancelled\n")
    code, _, talk = run("jobs", "show", "1", "--follow")
    assert code == 130
    assert "job 1 was cancelled" in talk
    assert run("jobs", "cancel", "1")[0] == 5
    assert run("jobs", "retry", "1")[:2] == (0, "job 1: queued\n")
    assert run("jobs", "retry", "1")[0] == 5
    assert run("jobs", "show", "2")[0] == 3
    assert run("jobs", "list", "--state", "lost")[0] == 2
    assert "cancelled by" in run("jobs", "logs", "1")[1]


def test_the_failure_of_a_job_is_that_of_the_command(run: Run, shared: Registry, tmp_path: Path) -> None:
    shared.register(
        str(tiny.write_adapter(tmp_path / "idle", base=tmp_path / "inputs" / "base", config={"lora_alpha": 1e-30}))
    )
    with worker_thread(shared):
        code, _, talk = run("merge", "idle")
    assert code == 4
    assert "base" in talk
    out = run("jobs", "show", "1")[1]
    assert "failed" in out


def test_what_makes_no_sense_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("merge", "bot", "--detach", "--out", str(tmp_path / "out"))[0] == 2
    assert run("worker", "--concurrency", "0")[0] == 2
    assert run("worker", "--queues", "nothing")[0] == 2
    monkeypatch.delenv("CKPT_DATABASE_URL")
    code, _, talk = run("worker")
    assert code == 2
    assert "PostgreSQL" in talk
    assert "ckpt serve" in talk
    assert run("base", "add", str(tmp_path / "inputs" / "base"))[0] == 0
    assert run("register", str(tmp_path / "inputs" / "bot"))[0] == 0
    assert run("merge", "bot", "--detach")[0] == 2


def test_an_interrupt_ends_the_watching_and_not_the_job(
    run: Run, shared: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as keyboard:
        keyboard.setattr(time, "sleep", interrupt)
        code, _, talk = run("merge", "bot")
    assert code == 130
    assert "job 1 goes on" in talk
    assert "ckpt jobs show 1 --follow" in talk
    assert "ckpt jobs cancel 1" in talk
    assert shared.job(1).state is JobState.QUEUED


def test_what_cannot_be_done_with_a_job_is_said_in_its_words(run: Run, shared: Registry) -> None:
    assert "`ckpt jobs list` shows" in run("jobs", "show", "7")[2]
    run("merge", "bot", "--detach")
    assert "it is queued: only what failed" in run("jobs", "retry", "1")[2]
    with worker_thread(shared):
        shared.follow_job(1)
    assert "it has succeeded: only what failed" in run("jobs", "retry", "1")[2]
    assert "it has succeeded" in run("jobs", "cancel", "1")[2]
