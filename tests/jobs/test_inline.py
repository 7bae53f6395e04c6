"""The threads of one process: whose turn it is, what a dead process leaves, and how they end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny
from teams import ROOT, fill, inline, texts, wait_until

from registry.jobs import InlineEngine
from registry.service import Registry
from registry.teamwork import JobState

# Claims the job in the queue as the engine does, and then does nothing.
CLAIM = """
import sys, time
sys.path.insert(0, "tests")
import tiny
from pathlib import Path
from registry.jobs import InlineEngine
engine = InlineEngine(tiny.open_registry(Path(sys.argv[1])), poll_seconds=0.05)
engine._do = lambda claim, job: time.sleep(600)
engine.start()
time.sleep(600)
"""


def test_what_a_dead_process_was_at_goes_on(ckpt: Registry, tmp_path: Path) -> None:
    fill(ckpt, tmp_path / "inputs")
    job = ckpt.start("merge", {"checkpoints": ["bot"]})
    process = subprocess.Popen([sys.executable, "-c", CLAIM, str(tmp_path / "home")], cwd=ROOT)
    try:
        wait_until(lambda: ckpt.job(job.id).state is JobState.RUNNING)
        with inline(ckpt):
            time.sleep(0.3)
            assert ckpt.merged() == []
            process.send_signal(signal.SIGKILL)
            ckpt.follow_job(job.id)
    finally:
        process.kill()
        process.wait()
    assert any("taken up again" in line for line in texts(ckpt, job))
    assert ckpt.job(job.id).attempts == 2
    assert len(ckpt.merged()) == 1


def test_one_of_several_processes_does_the_jobs(ckpt: Registry, tmp_path: Path) -> None:
    fill(ckpt, tmp_path / "inputs")
    with inline(ckpt), tiny.open_registry(tmp_path / "home") as other:
        engine = InlineEngine(other, poll_seconds=0.05)
        engine.start()
        for _ in range(5):
            ckpt.follow_job(ckpt.start("verify_base", {"base": "base"}).id)
        engine.stop(0.0)
    assert all(job.attempts == 1 for job in ckpt.jobs())


def test_stopping_without_grace_gives_back(ckpt: Registry, tmp_path: Path) -> None:
    fill(ckpt, tmp_path / "inputs", shards=1)
    job = ckpt.start("merge", {"checkpoints": ["bot"]})
    engine = InlineEngine(ckpt, poll_seconds=0.01)
    engine._is_ending.set()  # as at the end of the grace
    engine.start()
    wait_until(lambda: any("given back" in line for line in texts(ckpt, job)))
    engine.stop(0.0)
    assert ckpt.job(job.id).state is JobState.QUEUED
    with inline(ckpt):
        ckpt.follow_job(job.id)
    assert len(ckpt.merged()) == 1


def test_an_engine_may_be_stopped_while_it_begins(ckpt: Registry) -> None:
    for _ in range(3):
        engine = InlineEngine(ckpt, poll_seconds=0.01)
        engine.start()
        while len(engine._threads) < 2:
            pass
        engine.stop(0.0)


def test_a_job_under_way_is_cancelled_at_its_next_step(ckpt: Registry, tmp_path: Path) -> None:
    fill(ckpt, tmp_path / "inputs")
    job = ckpt.start("merge", {"checkpoints": ["bot"]})
    with ckpt.workspace.writing() as change:
        claim = change.catalog.jobs.claim(job.id, "somebody")
        assert claim is not None
        assert change.catalog.jobs.tell(claim, "merging", 1, 2)
    assert ckpt.cancel_job(job.id).state is JobState.RUNNING
    with ckpt.workspace.writing() as change:
        assert not change.catalog.jobs.tell(claim, "merging", 2, 2)
        assert not change.catalog.jobs.let_go(claim, "stopped")
    assert ckpt.job(job.id).state is JobState.CANCELLED
