"""Rounds of sudden death: clients write, somebody is killed, what was acknowledged must be there. Tests play a few rounds, benchmarks many."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import servers
import tiny
from blake3 import blake3

from registry import connect
from registry.errors import NotFound
from registry.manifest import Checkpoint
from registry.registering import Registration
from registry.service import Registry
from registry.settings import Settings
from registry.teamwork import Role

HERE = Path(__file__).parent
ADAPTERS = 24


@dataclass(frozen=True, slots=True)
class Place:
    """Where a registry is, as the environment of its clients says, with a base model and adapters to register in `folder`."""

    folder: Path
    environment: Mapping[str, str]

    def open(self) -> Registry:
        return connect(Settings.from_environment(self.environment))


def make_place(folder: Path, **environment: str) -> Place:
    """A registry with the base model `base` in its store, and adapters that fit it, unregistered."""
    place = Place(folder, {"CKPT_HOME": str(folder / "home"), "CKPT_USER": "ada", **environment})
    base = tiny.write_base(folder / "base")
    for seed in range(ADAPTERS):
        tiny.write_adapter(folder / f"adapter-{seed}", base=base, seed=seed)
    with place.open() as registry:
        registry.add_base(str(base), copy=True)
    return place


@dataclass(slots=True)
class Ledger:
    """What clients were told: `there` by reference, its digest and notes; `gone`; `doubtful`, which was being removed when nobody answered."""

    there: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)
    merged: set[str] = field(default_factory=set)
    failures: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        ref = line.get("ref", "")
        match line["did"]:
            case "register":
                self.there.setdefault(ref, (line["digest"], []))
            case "note":
                self.there[ref][1].append(line["text"])
            case "removing":
                self.doubtful.add(ref)
            case "remove":
                self.gone.add(ref)
            case "merge":
                self.merged.add(line["digest"])
            case "fail":
                self.failures[line["code"]] = self.failures.get(line["code"], 0) + 1
        self.acknowledged += line["did"] not in ("removing", "fail")


class Client:
    """A process that writes without pause and prints what it was told."""

    def __init__(self, place: Place, name: str, seed: int, *, merging: bool = True) -> None:
        command = [sys.executable, str(HERE / "writer.py"), str(place.folder), name, str(seed), str(int(merging))]
        self._out = place.folder / f"told-{name}"
        with self._out.open("ab") as out, (place.folder / f"talk-{name}").open("ab") as talk:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=talk, env={**os.environ, **place.environment, "PYTHONWARNINGS": "error"}
            )

    @property
    def is_there(self) -> bool:
        return self.process.poll() is None

    def wait_until_told(self, count: int = 1, seconds: float = 300) -> None:
        """Until it has been told so many things more."""
        wanted, end = self._lines() + count, time.monotonic() + seconds
        while self._lines() < wanted:
            if not self.is_there or time.monotonic() > end:
                raise AssertionError(f"{self._out.name}: ended, or nothing in {seconds} s")
            time.sleep(0.02)

    def _lines(self) -> int:
        return self._out.read_bytes().count(b'"did": "') - self._out.read_bytes().count(b'"did": "fail"')

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def told(self) -> Iterator[Mapping[str, Any]]:
        """Whole lines; of the last one a killed client may have written only half, and so was not heard."""
        for line in self._out.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def register(registry: Registry, place: Place, seed: int, adapter: str = "") -> Checkpoint:
    """Register one of the adapters, under its own name unless told otherwise."""
    said = Registration(base="base", adapter=adapter or f"adapter-{seed}")
    return registry.register(str(place.folder / f"adapter-{seed}"), said).registered[0].checkpoint


def start_worker(place: Place, name: str) -> subprocess.Popen[bytes]:
    """A worker with a quick pulse: what it leaves half done is taken over within seconds."""
    pace = ["--heartbeat", "0.3", "--silent", "1.5", "--poll", "0.2"]
    with (place.folder / f"talk-{name}").open("ab") as talk:
        return subprocess.Popen(
            [sys.executable, "-m", "cli", "worker", *pace], stderr=talk, env={**os.environ, **place.environment}
        )


def is_at_work(registry: Registry, worker: subprocess.Popen[bytes]) -> bool:
    """Whether a worker has begun with something, or nothing is left to begin with."""
    jobs = registry.jobs()
    names = {shard.worker for job in jobs for shard in job.shards}
    return any(name.endswith(f":{worker.pid}") for name in names) or all(job.state.is_over for job in jobs)


@contextmanager
def reaching_s3(port: int) -> Iterator[None]:
    """The environment says how to reach an S3 server; what fsspec remembers of another one is forgotten."""
    import s3fs

    before = dict(os.environ)
    os.environ.update(servers.s3_environment(port))
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()


class Serving:
    """`ckpt serve` for a registry, that dies and is started again at the same address. `outside` is the same registry for its clients."""

    def __init__(self, inside: Place) -> None:
        with inside.open() as registry:
            token = registry.create_token("client", Role.ADMIN).secret
        (self._port,) = servers.free_ports(1)
        self._inside = inside
        self.address = f"http://127.0.0.1:{self._port}"
        self.outside = Place(
            inside.folder,
            {"CKPT_HOME": str(inside.folder / "outside"), "CKPT_SERVER": self.address, "CKPT_TOKEN": token},
        )
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "cli", "serve", "--port", str(self._port)]
        with (self._inside.folder / "talk-server").open("ab") as talk:
            self.process = subprocess.Popen(command, stderr=talk, env={**os.environ, **self._inside.environment})
        end = time.monotonic() + 180
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError((self._inside.folder / "talk-server").read_text()[-4000:])
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.address}/readyz", timeout=2) as answer:
            return answer.status == 200
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(inside: Place) -> Iterator[Serving]:
    """A server for as long as the block runs."""
    server = Serving(inside)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def writing(place: Place, count: int, seed: int, *, merging: bool = True) -> Iterator[list[Client]]:
    """Clients for as long as the block runs; killed at its end."""
    clients = [Client(place, f"client{seed}x{number}", seed * 100 + number, merging=merging) for number in range(count)]
    try:
        yield clients
    finally:
        for client in clients:
            client.kill()


def settle(clients: Sequence[Client]) -> Ledger:
    """What they were told, all together."""
    ledger = Ledger()
    for client in clients:
        for line in client.told():
            ledger.add(line)
    return ledger


def check(place: Place, ledger: Ledger) -> None:
    """Every acknowledged write is there, every row has its blobs, whole; nothing is half-published; the chain is sound."""
    with place.open() as registry:
        for ref, (digest, notes) in ledger.there.items():
            if ref in ledger.gone:
                assert not _is_there(registry, ref), f"{ref} was removed, and is back"
            elif ref not in ledger.doubtful or _is_there(registry, ref):
                found = registry.resolve(ref)
                assert found.digest.hex == digest, ref
                kept = [note.text for note in found.notes]
                assert set(notes) <= set(kept), f"{ref} lost notes"
                assert len(set(kept)) == len(kept), f"{ref} has a note twice"
        damages = registry.verify(read_data=True).damages
        assert not damages, damages
        assert ledger.merged <= {each.digest.hex for each in registry.merged()}
        for model in place.folder.glob("out-*"):
            if model.suffix != ".partial":  # where an interrupted merge goes on
                _check_published(model)
        state = registry.verify_chain()
        assert state.count >= ledger.acknowledged, "an acknowledged change without its event"


def _check_published(model: Path) -> None:
    """A model that is to be seen is complete, whether its merge was acknowledged or not."""
    said = json.loads((model / "merge.json").read_bytes())["files"]
    for path, entry in said.items():
        assert blake3((model / path).read_bytes()).hexdigest() == entry["blake3"], model / path


def _is_there(registry: Registry, ref: str) -> bool:
    try:
        registry.resolve(ref)
    except NotFound:
        return False
    return True


def pause(random: Random, low: float = 0.05, high: float = 0.8) -> None:
    """Until a random moment."""
    time.sleep(random.uniform(low, high))
