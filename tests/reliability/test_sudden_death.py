"""kill -9 of clients, of PostgreSQL and of the S3 server while clients write. `benchmarks/reliability.py` plays the same for many rounds."""

from __future__ import annotations

import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from random import Random

import pytest
import servers

from registry.teamwork import JobState

sys.path.insert(0, str(Path(__file__).parent))
import rounds

ROUNDS = 6


@pytest.fixture
def random() -> Random:
    return Random(20260503)


def test_clients(tmp_path: Path, random: Random) -> None:
    """On SQLite and the disk, two at a time; what each leaves half done, sweeps and the others must bear."""
    place = rounds.make_place(tmp_path)
    everybody: list[rounds.Client] = []
    for number in range(ROUNDS // 2):
        with rounds.writing(place, 2, number) as clients:
            for client in clients:
                client.wait_until_told()
            rounds.pause(random)
        everybody += clients
        with place.open() as registry:
            registry.sweep(grace=timedelta(0))
        rounds.check(place, rounds.settle(everybody))


@pytest.mark.xdist_group("servers")
def test_postgresql(tmp_path: Path, random: Random) -> None:
    from registry.db.schema import upgrade

    folder = servers.make_postgres_folder()
    server = servers.start_postgres(folder, options=())
    try:
        url = servers.create_database(server)
        upgrade(url, tmp_path / "backups")
        place = rounds.make_place(tmp_path, CKPT_DATABASE_URL=url, CKPT_STORE=(tmp_path / "store").as_uri())
        with rounds.writing(place, 2, 1, merging=False) as clients:
            for _ in range(ROUNDS):
                clients[0].wait_until_told()
                rounds.pause(random, high=0.4)
                server.kill()
                server = servers.start_postgres(folder, server.port, options=())
            clients[0].wait_until_told()
        ledger = rounds.settle(clients)
        rounds.check(place, ledger)
        assert ledger.failures, "nobody noticed"
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.xdist_group("servers")
def test_the_store(tmp_path: Path, random: Random, postgres_url: str) -> None:
    folder = servers.unprivileged_folder()
    ports = servers.free_ports(5, twin=10_000)
    server = servers.start_s3(folder, ports)
    try:
        with rounds.reaching_s3(server.port):
            store = servers.create_bucket(server) + "/store"
            place = rounds.make_place(tmp_path, CKPT_DATABASE_URL=postgres_url, CKPT_STORE=store)
            with rounds.writing(place, 1, 1, merging=False) as clients:
                for _ in range(2):
                    clients[0].wait_until_told()
                    rounds.pause(random, high=0.4)
                    server.kill()
                    server = servers.start_s3(folder, ports)
                clients[0].wait_until_told(3)
            rounds.check(place, rounds.settle(clients))
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.xdist_group("servers")
def test_workers(tmp_path: Path, random: Random, postgres_url: str) -> None:
    """Whatever they were at is taken over, and every merge is published once, whole."""
    store = (tmp_path / "store").as_uri()
    place = rounds.make_place(tmp_path, CKPT_DATABASE_URL=postgres_url, CKPT_STORE=store)
    with place.open() as registry:
        found = [rounds.register(registry, place, seed) for seed in range(6)]
        wanted = [registry.start_merge(registry.plan(each)).id for each in found]
        workers = [rounds.start_worker(place, f"worker-{number}") for number in range(2)]
        try:
            for number in range(2):
                while not rounds.is_at_work(registry, workers[number]):
                    time.sleep(0.02)
                rounds.pause(random, high=0.4)
                workers[number].kill()
                workers[number].wait()
                workers[number] = rounds.start_worker(place, f"worker-{number}")
            for number in wanted:
                assert registry.follow_job(number).state is JobState.SUCCEEDED
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        assert len(registry.merged()) == len({each.digest for each in found})
    rounds.check(place, rounds.Ledger())


def test_the_server(tmp_path: Path, random: Random) -> None:
    """Its clients repeat what got no answer, and nothing is done twice."""
    inside = rounds.make_place(tmp_path)
    with rounds.serving(inside) as running:
        with rounds.writing(running.outside, 2, 1, merging=False) as clients:
            for _ in range(3):
                for client in clients:
                    client.wait_until_told()
                rounds.pause(random, high=0.4)
                running.kill()
                running.start()
            for client in clients:
                client.wait_until_told()
        ledger = rounds.settle(clients)
    rounds.check(inside, ledger)


def test_sweeping_a_server_whose_clients_write(tmp_path: Path) -> None:
    """Nobody dies here: whatever a sweep without grace does, no client is told of it."""
    inside = rounds.make_place(tmp_path)
    with rounds.serving(inside) as running:
        with rounds.writing(running.outside, 2, 1, merging=False) as clients:
            with inside.open() as registry:
                while any(client.is_there and len(list(client.told())) < 50 for client in clients):
                    registry.sweep(grace=timedelta(0))
            for client in clients:
                client.wait_until_told()
        ledger = rounds.settle(clients)  # when they write no more
    rounds.check(inside, ledger)
    assert not ledger.failures
