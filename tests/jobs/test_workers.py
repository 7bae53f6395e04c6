"""Workers as processes: killed, paused, told to stop. What is published is what one process would have written, and published once."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
import tiny
from teams import PATIENT, fill, fill_large, texts, wait_until, worker_process, worker_thread
from throttle import Throttle, asks_from, nothing

from registry.errors import BaseChanged, Unreachable
from registry.service import Registry
from registry.shards import Plans, write_shard
from registry.teamwork import Job, JobState, Shard
from registry.workspace import silent

Far = tuple[Registry, Throttle, dict[str, str]]
SLOW = 512 << 10  # bytes per second: the rest of a file takes several seconds
in_the_middle = asks_from(2 << 20)  # of a file, of which there are 4 MiB


def merged_files(registry: Registry) -> dict[str, str]:
    return {entry.path: entry.digest.hex for entry in registry.merged()[0].files}


def files_of_inline_merge(tmp_path: Path) -> dict[str, str]:
    """What an embedded registry writes of the same inputs."""
    with tiny.open_registry(tmp_path / "alone") as registry:
        registry.add_base(str(tmp_path / "inputs" / "base"), name="base")
        registry.register(str(tmp_path / "inputs" / "bot"))
        merged = registry.merge(registry.plan(registry.resolve("bot"))).merged
    return {entry.path: entry.digest.hex for entry in merged.files}


def running(registry: Registry, job: int) -> list[Shard]:
    return [shard for shard in registry.job(job).shards if shard.state == "running"]


def start_merge(registry: Registry) -> Job:
    """Start one, and wait until a worker is in the middle of a file."""
    job = registry.start("merge", {"checkpoints": ["bot"]})
    wait_until(lambda: any(shard.done_bytes for shard in running(registry, job.id)))
    return job


def pause(process: subprocess.Popen[bytes], database_url: str) -> None:
    """Stop a process, but not within a transaction: the others would wait for the end of one that writes."""
    of_others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with psycopg.connect(database_url, autocommit=True) as watching:

        def count(states: str) -> int:
            (found,) = watching.execute(f"SELECT count(*) {of_others} AND state LIKE '{states}'").fetchone() or (0,)
            return int(found)

        while True:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            wait_until(lambda: count("active") == 0)
            if count("idle in transaction%") == 0:
                return
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)


def test_workers_write_what_one_process_writes(
    shared: Registry, team_environment: dict[str, str], tmp_path: Path
) -> None:
    fill(shared, tmp_path / "inputs")
    with ExitStack() as workers:
        for _ in range(2):
            workers.enter_context(worker_process(team_environment, "--concurrency", "2", *PATIENT))
        result = shared.merge(shared.plan(shared.resolve("bot")), note="by workers")
    assert result.created
    assert result.merged.note == "by workers"
    assert merged_files(shared) == files_of_inline_merge(tmp_path)
    job = shared.jobs()[0]
    assert len(job.shards) == 4
    assert {shard.state for shard in job.shards} == {"finished"}
    assert all(shard.done_bytes == shard.size_bytes for shard in job.shards)


def test_a_worker_that_is_killed_is_taken_over(far: Far, tmp_path: Path) -> None:
    registry, throttle, environment = far
    fill_large(registry, tmp_path / "inputs")
    throttle.holds = in_the_middle
    with worker_process(environment) as first:
        job = start_merge(registry)
        with worker_process(environment):
            wait_until(lambda: len(running(registry, job.id)) == 2)  # the second one has the other file
            first.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            throttle.holds = nothing
            wait_until(lambda: any("no sign of life" in line for line in texts(registry, job)))
            assert time.monotonic() - killed < 60
            done = registry.follow_job(job.id)
    log = texts(registry, done)
    assert any("taken over by" in line or "claimed by" in line for line in log)
    assert max(shard.attempt for shard in done.shards) >= 2
    assert [event.action for event in registry.history()].count("merge") == 1
    assert merged_files(registry) == files_of_inline_merge(tmp_path)


def test_a_worker_that_was_only_paused_comes_too_late(far: Far, tmp_path: Path) -> None:
    registry, throttle, environment = far
    fill_large(registry, tmp_path / "inputs")
    throttle.holds = in_the_middle
    log = tmp_path / "log"
    with worker_process(environment, log=log) as paused:
        job = start_merge(registry)
        pause(paused, environment["CKPT_DATABASE_URL"])
        owner = running(registry, job.id)[0]
        throttle.holds = nothing
        with worker_process(environment):
            done = registry.follow_job(job.id)
            before = registry.job(job.id)
            paused.send_signal(signal.SIGCONT)
            wait_until(lambda: "done with it" in log.read_text())
    assert registry.job(job.id) == before
    assert done.shards[owner.position].worker != owner.worker
    assert done.shards[owner.position].attempt > owner.attempt
    assert [event.action for event in registry.history()].count("merge") == 1


def test_a_stopped_worker_gives_back_what_it_cannot_finish(far: Far, tmp_path: Path) -> None:
    registry, throttle, environment = far
    fill_large(registry, tmp_path / "inputs")
    throttle.holds, log = in_the_middle, tmp_path / "log"
    with worker_process(environment, "--grace", "0.2", *PATIENT, log=log) as first:
        job = start_merge(registry)
        first.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in log.read_text())
        throttle.bytes_per_second, throttle.holds = SLOW, nothing
        assert first.wait(120) == 0
    assert running(registry, job.id) == []
    throttle.bytes_per_second = 0
    with worker_process(environment, *PATIENT):
        done = registry.follow_job(job.id)
    assert any("given back by" in line for line in texts(registry, done))
    assert not any("no sign of life" in line for line in texts(registry, done))


def test_a_stopped_worker_finishes_what_it_can(far: Far, tmp_path: Path) -> None:
    registry, throttle, environment = far
    fill_large(registry, tmp_path / "inputs")
    throttle.holds, log = in_the_middle, tmp_path / "log"
    with worker_process(environment, "--grace", "120", *PATIENT, log=log) as first:
        job = start_merge(registry)
        first.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in log.read_text())
        throttle.holds = nothing
        assert first.wait(120) == 0
    states = [shard.state for shard in registry.job(job.id).shards]
    assert sorted(states) == ["finished", "queued"]


def test_cancelling_stops_a_file_under_way_and_trying_again_goes_on(far: Far, tmp_path: Path) -> None:
    registry, throttle, environment = far
    fill_large(registry, tmp_path / "inputs", files=3)
    log, is_held = tmp_path / "log", threading.Event()
    is_held.set()
    read, written = list[bytes](), list[bytes]()

    def in_the_second_file(request: bytes) -> bool:
        method, path, *_ = request.split(b" ", 2)
        if method in (b"PUT", b"POST"):
            written.append(path)
        if not in_the_middle(request):
            return False
        read.append(path)
        return is_held.is_set() and path != read[0]

    with worker_process(environment, "--concurrency", "1", *PATIENT, log=log):
        throttle.holds = in_the_second_file
        job = start_merge(registry)
        wait_until(lambda: any(shard.state == "finished" for shard in registry.job(job.id).shards))
        wait_until(lambda: any(shard.done_bytes for shard in running(registry, job.id)))
        before = len(written)
        assert registry.cancel_job(job.id).state is JobState.CANCELLED
        throttle.bytes_per_second = SLOW
        is_held.clear()
        wait_until(lambda: log.read_text().count("done with it") == 2)
        assert len(written) == before  # nothing of the second file
        assert registry.merged() == []
        finished = [shard for shard in registry.job(job.id).shards if shard.state == "finished"]
        throttle.bytes_per_second = 0
        registry.retry_job(job.id)
        done = registry.follow_job(job.id)
    for shard in finished:
        assert done.shards[shard.position].attempt == shard.attempt
    assert len(registry.merged()) == 1


def test_a_base_that_changed_fails_the_merge_at_once(shared: Registry, tmp_path: Path) -> None:
    fill(shared, tmp_path / "inputs")
    job = shared.start("merge", {"checkpoints": ["bot"]})
    blobs = [path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file()]
    largest = max(blobs, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.chmod(0o644)
    largest.write_bytes(data)
    with worker_thread(shared), pytest.raises(BaseChanged):
        shared.follow_job(job.id)
    assert not any("tried again" in line for line in texts(shared, job))
    assert shared.merged() == []


def test_a_store_that_fails_for_a_while_is_tried_again(shared: Registry, tmp_path: Path) -> None:
    fill(shared, tmp_path / "inputs", shards=1)
    job = shared.start("merge", {"checkpoints": ["bot"]})
    staging = tmp_path / "store" / "staging"
    staging.rmdir()
    staging.write_text("in the way")
    with worker_thread(shared):
        wait_until(lambda: any("tried again in 2 s" in line for line in texts(shared, job)))
        staging.unlink()
        done = shared.follow_job(job.id)
    assert done.shards[0].attempt == 1 + sum("tried again" in line for line in texts(shared, job))
    assert merged_files(shared) == files_of_inline_merge(tmp_path)


def test_files_that_were_swept_before_the_end_are_written_again(shared: Registry, tmp_path: Path) -> None:
    fill(shared, tmp_path / "inputs", shards=2)
    job = shared.start("merge", {"checkpoints": ["bot"]})
    plans, workspace = Plans(), shared.workspace
    for position in (0, 1):
        with workspace.writing() as change:
            claim = change.catalog.jobs.claim(job.id, "me", position)
        assert claim is not None
        assert write_shard(shared, shared.job(job.id), claim, plans, silent, 1)
    with workspace.reading() as catalog:
        first = catalog.jobs.written(job.id)[0].entry
    workspace.store.delete(first.digest)
    with worker_thread(shared):
        done = shared.follow_job(job.id)
    assert [shard.attempt for shard in done.shards] == [2, 1]
    assert merged_files(shared) == files_of_inline_merge(tmp_path)


def test_what_an_earlier_claim_says_counts_no_more(shared: Registry, tmp_path: Path) -> None:
    fill(shared, tmp_path / "inputs", shards=2)
    job = shared.start("merge", {"checkpoints": ["bot"]})
    with shared.workspace.writing() as change:
        jobs = change.catalog.jobs
        early, late = jobs.claim(job.id, "early", 0), jobs.claim(job.id, "late", 0)
        assert early is not None
        assert late is not None
        assert not jobs.holds(early)
        assert not jobs.tell(early, "merging", 7, 9)
        assert not jobs.give_back(early, "too late")
        assert not jobs.fail(early, {"code": "conflict", "fields": {}}, "too late")
    before = shared.job(job.id)
    assert not write_shard(shared, before, early, Plans(), silent, 1)
    assert shared.job(job.id) == before
    assert write_shard(shared, before, late, Plans(), silent, 1)
    assert not write_shard(shared, before, late, Plans(), silent, 1)


def test_a_worker_that_has_ended_may_be_told_to_stop_again(shared: Registry) -> None:
    with worker_thread(shared) as worker:
        pass
    worker.stop()


def test_a_base_on_the_disk_of_one_machine_is_refused(shared: Registry, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    shared.add_base(str(base), name="base")
    shared.register(str(tiny.write_adapter(tmp_path / "bot", base=base)))
    with pytest.raises(Unreachable):
        shared.start("merge", {"checkpoints": ["bot"]})
    assert shared.jobs() == []
