"""What more workers bring: a merge of 8 files with 1, 2 and 4 worker processes, where each connection to S3 is slow; and how fast the queue is.

    python benchmarks/workers.py [--megabytes 64] [--rate 20] [--latency 20] [--workers 1,2,4] [--json FILE]

The S3 server runs on this machine, behind a proxy that gives each connection a latency and a bandwidth, as a network would: so that merging
waits for the store and not for this machine's cores. Near-linear is what workers on machines of their own should be; here all share one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from measuring import machine

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "jobs")]
import servers  # noqa: E402 - the line above says where
from teams import fill, fill_large, team, wait_until, worker_process  # noqa: E402
from throttle import Throttle, throttled  # noqa: E402

from registry.db.schema import upgrade  # noqa: E402
from registry.service import Registry  # noqa: E402

FILES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """A fresh registry: how this process opens it, and what workers need to know."""

    registry: Registry
    environment: Mapping[str, str]
    folder: Path


@contextmanager
def fresh_team(postgres: servers.Server, store_url: str, port: int = 0) -> Iterator[Team]:
    """A database of its own; workers reach S3 through a port."""
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as name:
        folder = Path(name)
        url = servers.create_database(postgres)
        upgrade(url, folder / "backups")
        environment = {
            "CKPT_HOME": str(folder / "worker"),
            "CKPT_DATABASE_URL": url,
            "CKPT_STORE": store_url or (folder / "store").as_uri(),
            "CKPT_USER": "worker",
        }
        if port:
            environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        with team(folder / "home", url, environment["CKPT_STORE"]) as registry:
            yield Team(registry=registry, environment=environment, folder=folder)
        servers.drop_database(url)


@contextmanager
def workers(found: Team, count: int, *options: str) -> Iterator[None]:
    """Worker processes that have started."""
    with ExitStack() as stack:
        logs = [found.folder / f"log-{number}" for number in range(count)]
        for log in logs:
            stack.enter_context(worker_process(found.environment, *options, log=log))
        wait_until(lambda: all("started" in log.read_text() for log in logs), 60)
        yield


def seconds_to_merge(found: Team, count: int, throttle: Throttle, options: argparse.Namespace) -> float:
    """Seconds from asking for a merge until it is published."""
    throttle.latency_seconds = throttle.bytes_per_second = 0
    fill_large(found.registry, found.folder / "inputs", files=FILES, tensors=options.megabytes // 8, side=2048)
    planned = found.registry.plan(found.registry.resolve("bot"))
    with workers(found, count):
        throttle.latency_seconds, throttle.bytes_per_second = options.latency / 1e3, options.rate * 1e6
        start = time.perf_counter()
        found.registry.follow_job(found.registry.start_merge(planned).id)
        return time.perf_counter() - start


def scaling(postgres: servers.Server, options: argparse.Namespace) -> list[dict[str, float]]:
    """The merge with each number of workers."""
    rows: list[dict[str, float]] = []
    with servers.s3_server() as s3:
        os.environ.update(servers.s3_environment(s3.port))
        with throttled(s3.port) as throttle:
            for count in map(int, options.workers.split(",")):
                with fresh_team(postgres, f"{servers.create_bucket(s3)}/store", throttle.port) as found:
                    seconds = seconds_to_merge(found, count, throttle, options)
                first = rows[0] if rows else {"workers": count, "seconds": seconds}
                speed_up = first["seconds"] / seconds
                rows.append({"workers": count, "seconds": seconds, "speed_up": speed_up})
                print(f"{count} workers: {seconds:6.1f} s, {speed_up:.2f} times as fast", flush=True)
    return rows


def queueing(postgres: servers.Server, options: argparse.Namespace) -> dict[str, float]:
    """The smallest jobs there are (a base model of a few kilobytes is read): how long asking takes, and how many are done in a second."""
    with fresh_team(postgres, "") as found:
        registry = found.registry
        fill(registry, found.folder / "inputs", shards=1)
        taken = []
        for _ in range(options.jobs):
            start = time.perf_counter()
            registry.start("verify_base", {"base": "base"})
            taken.append(time.perf_counter() - start)
        with workers(found, 2, "--concurrency", "4", "--poll", "1"):
            start = time.perf_counter()
            before = len(registry.jobs("queued", limit=options.jobs))
            wait_until(lambda: not registry.jobs("queued", limit=1) and not registry.jobs("running", limit=1), 600)
            seconds = time.perf_counter() - start
    result = {
        "enqueue_median_ms": 1e3 * statistics.median(taken),
        "enqueue_p95_ms": 1e3 * sorted(taken)[int(0.95 * len(taken))],
        "jobs_per_second": before / seconds if seconds else 0.0,
    }
    print(
        f"asking takes {result['enqueue_median_ms']:.1f} ms (95 %: {result['enqueue_p95_ms']:.1f}); "
        f"2 workers do {result['jobs_per_second']:.0f} of the smallest jobs a second"
    )
    return result


def main() -> None:
    """Measure both, and print what they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="of each of the 8 files; tensors are of 8")
    parser.add_argument("--rate", type=float, default=20, help="MB/s of each connection and direction")
    parser.add_argument("--latency", type=float, default=20, help="milliseconds of each answer")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--jobs", type=int, default=500, help="how many of the smallest jobs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with servers.postgres_server(options=()) as postgres:
        found = {"machine": machine(), "merge": scaling(postgres, options), "queue": queueing(postgres, options)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
