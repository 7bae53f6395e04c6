"""What must never be lost is not: sudden death in a loop, sweeping against writers, 32 clients at once. Prints a table.

    python benchmarks/reliability.py [--rounds 50] [--minutes 5] [--seed 1] [--folder DIR] [--json out.json] [--only NAME ...]

clients, postgresql, store, server, workers: one of them is killed with SIGKILL at a random moment, again and again, while clients write; then
every acknowledged write is looked for, every blob is read, and the chain of events is walked. PostgreSQL runs with its own durable settings.
sweep: clients register and remove while a sweep without grace runs without pause. crowd: 32 processes at once. An error ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from random import Random

from measuring import machine

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/reliability")]

import rounds  # noqa: E402 - it lies with the tests
import servers  # noqa: E402

WRITERS = 4
NOW = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was played and held. `acknowledged` are writes that clients were told of, `refused` those that failed while somebody was dead."""

    name: str
    rounds: int
    acknowledged: int
    refused: int
    seconds: float
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line asks for."""

    folder: Path
    rounds: int
    minutes: float
    random: Random


def clients(wanted: Wanted) -> Outcome:
    """On SQLite and the disk. Each round's clients die in the middle of something; a sweep follows."""
    place, everybody = rounds.make_place(wanted.folder), list[rounds.Client]()
    for number in range(wanted.rounds):
        with rounds.writing(place, 2, number) as now:
            for client in now:
                client.wait_until_told()
            rounds.pause(wanted.random)
        everybody += now
        with place.open() as registry:
            registry.sweep(grace=NOW)
        if number % 10 == 9 or number == wanted.rounds - 1:
            rounds.check(place, rounds.settle(everybody))
    return outcome("clients", wanted.rounds, rounds.settle(everybody))


def postgresql(wanted: Wanted) -> Outcome:
    """All its processes at once, then it starts again and recovers."""
    with postgres(wanted) as (server, url):
        place = rounds.make_place(wanted.folder, CKPT_DATABASE_URL=url, CKPT_STORE=(wanted.folder / "store").as_uri())
        with rounds.writing(place, WRITERS, 1, merging=False) as now:
            for _ in range(wanted.rounds):
                now[0].wait_until_told()
                rounds.pause(wanted.random, high=0.5)
                server.stop()
                server.start()
            now[0].wait_until_told()
        ledger = rounds.settle(now)
        rounds.check(place, ledger)
    return outcome("postgresql", wanted.rounds, ledger)


def store(wanted: Wanted) -> Outcome:
    """The S3 server, on whose disk the blobs are."""
    with postgres(wanted) as (_, url), s3(wanted) as (server, store_url):
        place = rounds.make_place(wanted.folder, CKPT_DATABASE_URL=url, CKPT_STORE=store_url)
        with rounds.writing(place, 2, 1, merging=False) as now:
            for _ in range(wanted.rounds):
                now[0].wait_until_told()
                rounds.pause(wanted.random, high=0.5)
                server.stop()
                server.start()
            now[0].wait_until_told(3)
        ledger = rounds.settle(now)
        rounds.check(place, ledger)
    return outcome("store", wanted.rounds, ledger)


def server(wanted: Wanted) -> Outcome:
    """`ckpt serve`, which has the registry alone; its clients reach it over HTTP and repeat what got no answer."""
    inside = rounds.make_place(wanted.folder)
    with rounds.serving(inside) as running:
        with rounds.writing(running.outside, 2, 1, merging=False) as now:
            for _ in range(wanted.rounds):
                now[0].wait_until_told()
                rounds.pause(wanted.random, high=0.5)
                running.kill()
                running.start()
            now[0].wait_until_told()
        ledger = rounds.settle(now)
    rounds.check(inside, ledger)
    return outcome("server", wanted.rounds, ledger)


def workers(wanted: Wanted) -> Outcome:
    """Two of them share merges; whatever one was at when it died, the other takes over."""
    with postgres(wanted) as (_, url):
        place = rounds.make_place(wanted.folder, CKPT_DATABASE_URL=url, CKPT_STORE=(wanted.folder / "store").as_uri())
        running = [rounds.start_worker(place, f"worker-{number}") for number in range(2)]
        kills, done = 0, 0
        try:
            with place.open() as registry:
                while kills < wanted.rounds:
                    found = [rounds.register(registry, place, seed, f"bot-{done + seed}") for seed in range(4)]
                    jobs = [registry.start_merge(registry.plan(each, dtype=None)).id for each in found]
                    time.sleep(wanted.random.uniform(0.5, 2))
                    victim = kills % 2
                    running[victim].kill()
                    running[victim].wait()
                    running[victim] = rounds.start_worker(place, f"worker-{victim}")
                    kills += 1
                    for number in jobs:
                        assert registry.follow_job(number).state == "succeeded", registry.job(number)
                    done += len(jobs)
        finally:
            for each in running:
                each.kill()
                each.wait()
        rounds.check(place, rounds.Ledger())
    return Outcome(name="workers", rounds=kills, acknowledged=done, refused=0, seconds=0, detail="merges")


def sweep(wanted: Wanted) -> Outcome:
    """Both ends as hard as they can, on PostgreSQL and S3: no grace, no pause."""
    with postgres(wanted) as (_, url), s3(wanted) as (_, store_url):
        place = rounds.make_place(wanted.folder, CKPT_DATABASE_URL=url, CKPT_STORE=store_url)
        end, sweeps, blobs = time.monotonic() + wanted.minutes * 60, 0, 0
        with rounds.writing(place, WRITERS, 1, merging=False) as now, place.open() as registry:
            while time.monotonic() < end:
                blobs += registry.sweep(grace=NOW).blobs
                sweeps += 1
        ledger = rounds.settle(now)
        rounds.check(place, ledger)
    return outcome("sweep", sweeps, ledger, f"{blobs} blobs swept")


def crowd(wanted: Wanted) -> Outcome:
    """32 processes, each with its own adapter and all with a shared one, on SQLite and on PostgreSQL."""
    program, count = str(ROOT / "tests/reliability/crowd.py"), 0
    with postgres(wanted) as (_, url):
        for number in range(max(1, wanted.rounds // 10)):
            team = {"CKPT_DATABASE_URL": url, "CKPT_STORE": (wanted.folder / "store").as_uri()} if number == 0 else {}
            place = rounds.make_place(wanted.folder / str(number), **team)
            command = [sys.executable, program, str(place.folder), "32", str(int(not team))]
            subprocess.run(command, env={**os.environ, **place.environment}, check=True)
            with place.open() as registry:
                assert len({each.adapter.name for each in registry.checkpoints()}) == 33
                count += registry.verify_chain().count
            rounds.check(place, rounds.Ledger())
    return Outcome(name="crowd", rounds=number + 1, acknowledged=count, refused=0, seconds=0, detail="32 processes")


def outcome(name: str, played: int, ledger: rounds.Ledger, detail: str = "") -> Outcome:
    refused = sum(ledger.failures.values())
    codes = ", ".join(f"{count} x {code}" for code, count in sorted(ledger.failures.items()))
    detail = "; ".join(filter(None, [detail, codes and f"refused: {codes}"]))
    return Outcome(
        name=name, rounds=played, acknowledged=ledger.acknowledged, refused=refused, seconds=0, detail=detail
    )


class Mortal:
    """A server of `tests/servers.py` that is killed and starts again on its data."""

    def __init__(self, start: Callable[[], servers.Server]) -> None:
        self._start = start
        self.start()

    def start(self) -> None:
        self.server = self._start()

    def stop(self) -> None:
        self.server.kill()


@contextmanager
def postgres(wanted: Wanted) -> Iterator[tuple[Mortal, str]]:
    from registry.db.schema import upgrade

    folder, (port,) = servers.make_postgres_folder(), servers.free_ports(1)
    mortal = Mortal(lambda: servers.start_postgres(folder, port, options=()))
    try:
        url = servers.create_database(mortal.server)
        upgrade(url, wanted.folder / "backups")
        yield mortal, url
    finally:
        mortal.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3(wanted: Wanted) -> Iterator[tuple[Mortal, str]]:
    folder, ports = servers.unprivileged_folder(), servers.free_ports(5, twin=10_000)
    mortal = Mortal(lambda: servers.start_s3(folder, ports))
    try:
        with rounds.reaching_s3(mortal.server.port):
            yield mortal, servers.create_bucket(mortal.server) + "/store"
    finally:
        mortal.stop()
        shutil.rmtree(folder, ignore_errors=True)


PLAYS: Mapping[str, Callable[[Wanted], Outcome]] = {
    each.__name__: each for each in (clients, postgresql, store, server, workers, sweep, crowd)
}


def play(name: str, wanted: Wanted) -> Outcome:
    start = time.monotonic()
    found = PLAYS[name](wanted)
    return Outcome(**{**asdict(found), "seconds": time.monotonic() - start})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(PLAYS), default=list(PLAYS))
    asked = parser.parse_args()
    results = []
    print(f"{'what':<12}{'rounds':>8}{'acknowledged':>14}{'refused':>9}{'lost':>6}{'seconds':>9}  detail")
    for name in asked.only:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            random = Random(asked.seed)
            found = play(name, Wanted(folder=Path(folder), rounds=asked.rounds, minutes=asked.minutes, random=random))
        results.append(asdict(found))
        counts = f"{found.rounds:>8}{found.acknowledged:>14}{found.refused:>9}{0:>6}{found.seconds:>9.0f}"
        print(f"{name:<12}{counts}  {found.detail}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
