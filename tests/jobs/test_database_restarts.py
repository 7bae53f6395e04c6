"""PostgreSQL goes away under a worker and comes back."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import servers
from teams import fill_large, team, texts, wait_until, worker_process
from throttle import asks_from, nothing, throttled

from registry.db.schema import upgrade

# Kept through a crash, unlike in other tests.
DURABLE = ()


def test_a_worker_goes_on_when_its_database_is_back(tmp_path: Path, s3: servers.Server, s3_url: str) -> None:
    folder = servers.make_postgres_folder()
    postgres = servers.start_postgres(folder, options=DURABLE)
    try:
        url = servers.create_database(postgres)
        upgrade(url, tmp_path / "backups")
        environment = {
            "CKPT_HOME": str(tmp_path / "worker"),
            "CKPT_DATABASE_URL": url,
            "CKPT_STORE": f"{s3_url}/store",
            "CKPT_USER": "worker",
        }
        log = tmp_path / "log"
        with team(tmp_path / "home", url, f"{s3_url}/store") as registry, throttled(s3.port) as throttle:
            fill_large(registry, tmp_path / "inputs")
            environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{throttle.port}"
            throttle.holds = asks_from(2 << 20)  # in the middle of a file
            with worker_process(environment, "--grace", "5", log=log) as worker:
                job = registry.start("merge", {"checkpoints": ["bot"]})
                wait_until(lambda: any(shard.done_bytes for shard in registry.job(job.id).shards))
                postgres.kill()
                time.sleep(1.0)
                postgres = servers.start_postgres(folder, postgres.port, options=DURABLE)
                throttle.holds = nothing
                registry.follow_job(job.id)
                assert worker.poll() is None
                again = registry.start("verify_base", {"base": "base"})
                registry.follow_job(again.id)
            assert len(registry.merged()) == 1
            assert texts(registry, job)[-1] == "finished"
    finally:
        postgres.kill()
        shutil.rmtree(folder, ignore_errors=True)
