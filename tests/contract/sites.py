"""The three ways to run a registry, each real: files and SQLite, PostgreSQL and S3 with a worker, a server with tokens."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import registry
from registry.jobs import InlineEngine
from registry.manifest import Checkpoint
from registry.service import Registry
from registry.settings import Settings
from registry.teamwork import Role
from registry.worker import Pace, Worker

Maker = Callable[..., Checkpoint]
FAST = Pace(heartbeat=0.5, silent=5.0, tell=0.1, poll=0.1, deliver=0.5, recover=0.3)


@dataclass
class Site:
    """A place where a registry can be opened, by anybody and several times at once.

    `name` is embedded, team or remote. `working` is a block in which background work is done. `secrets` are the tokens by name, `url`
    the server's, both of a remote one only.
    """

    name: str
    home: Path
    environment: Mapping[str, str]
    working: Callable[[], AbstractContextManager[object]]
    url: str = ""
    secrets: dict[str, str] = field(default_factory=dict)
    opened: ExitStack = field(default_factory=ExitStack)

    @property
    def is_remote(self) -> bool:
        return self.name == "remote"

    def connect(self, author: str = "ada", url: str = "") -> Registry:
        """A registry of its own for somebody; closed with the site. `url`: the server as seen through something else."""
        environment = {**self.environment, "CKPT_USER": author, "CKPT_HOME": str(self.home)}
        if self.is_remote:
            environment |= {"CKPT_HOME": str(self.home / author), "CKPT_SERVER": url or self.url}
            environment |= {"CKPT_TOKEN": self.secrets[author]}
        return self.opened.enter_context(registry.connect(Settings.from_environment(environment)))


@contextmanager
def embedded(folder: Path) -> Iterator[Site]:
    site = Site("embedded", folder / "home", {}, lambda: inline(site.connect("worker")))
    with site.opened:
        yield site


@contextmanager
def team(folder: Path, database_url: str, store_url: str) -> Iterator[Site]:
    environment = {"CKPT_DATABASE_URL": database_url, "CKPT_STORE": store_url}
    site = Site("team", folder / "home", environment, lambda: worker_thread(site.connect("worker")))
    with site.opened:
        yield site


@contextmanager
def remote(folder: Path) -> Iterator[Site]:
    """A server of files and SQLite; `ada` and `bob` have tokens of an admin, `reader` and `writer` those of their roles."""
    settings = Settings.from_environment({"CKPT_HOME": str(folder / "server"), "CKPT_USER": "server"})
    site = Site("remote", folder / "clients", {}, nullcontext)
    roles = {"ada": Role.ADMIN, "bob": Role.ADMIN, "reader": Role.READER, "writer": Role.WRITER}
    with registry.connect(settings) as direct:
        site.secrets |= {name: direct.create_token(name, role).secret for name, role in roles.items()}
    with serving(settings) as url, site.opened:
        site.url = url
        yield site


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """A server in a thread; gives its URL."""
    import uvicorn

    from registry.server import create_app

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(120)
        listener.close()
        assert not thread.is_alive()


@contextmanager
def inline(own: Registry) -> Iterator[InlineEngine]:
    engine = InlineEngine(own, poll_seconds=0.05)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(5.0)


@contextmanager
def worker_thread(own: Registry, **settings: Any) -> Iterator[Worker]:
    worker = Worker(own, pace=FAST, grace_seconds=5.0, **settings)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(120)
        assert not thread.is_alive()
