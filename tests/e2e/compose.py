"""The services of `docker-compose.yml` as processes of this machine: the same commands and environments, on loopback and random ports."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import servers
import yaml
from throttle import Throttle, throttled

ROOT = Path(__file__).parents[2]
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def read_compose(environment: Mapping[str, str]) -> dict[str, Any]:
    """The compose file with its variables filled in, as the tool does.

    Raises:
        KeyError: a variable that the file insists on is not set.
    """

    def fill(match: re.Match[str]) -> str:
        name, sign, text = match.groups()
        if environment.get(name):
            return environment[name]
        if sign == "-":
            return str(text)
        raise KeyError(f"{name}: {text}")

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return _VARIABLE.sub(fill, value) if isinstance(value, str) else value

    document: dict[str, Any] = filled(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))
    return document


class Stack:
    """The services, started one by one. `folder` holds their homes and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        secrets = {"POSTGRES_PASSWORD": "pg-secret", "S3_ACCESS_KEY": "s3-key", "S3_SECRET_KEY": "s3-secret"}
        self.services = read_compose({**secrets, "TORCH_INDEX_URL": "unused"})["services"]
        self.postgres: servers.Server | None = None
        self.s3: servers.Server | None = None
        self.way_to_s3 = Throttle()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (self.port,) = servers.free_ports(1)
        self._places = {"172.16.0.0/12": "127.0.0.1"}  # of containers' networks, where a proxy's requests come from

    # -- the servers that are not ours

    def start_postgres(self) -> None:
        """PostgreSQL with the user and the database that its image would make of the environment."""
        import psycopg

        environment = self.services["postgres"]["environment"]
        self.postgres = servers.start_postgres(servers.make_postgres_folder())
        user, password = environment["POSTGRES_USER"], environment["POSTGRES_PASSWORD"]
        with psycopg.connect(
            f"postgresql://postgres@127.0.0.1:{self.postgres.port}/postgres", autocommit=True
        ) as admin:
            admin.execute(f"CREATE ROLE \"{user}\" LOGIN PASSWORD '{password}'")
            admin.execute(f'CREATE DATABASE "{environment["POSTGRES_DB"]}" OWNER "{user}"')
        self._places["postgres:5432"] = f"127.0.0.1:{self.postgres.port}"

    def start_s3(self) -> None:
        """SeaweedFS with the command of its service; only addresses, ports and the folder are this machine's."""
        service = self.services["s3"]
        folder = servers.unprivileged_folder()
        s3, master, volume, filer, admin = servers.free_ports(5, twin=10_000)
        own = {"-dir": folder, "-ip.bind": "127.0.0.1", "-s3.port": s3}
        command = [_changed(word, own) for word in service["command"]]
        ports = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}"]
        self.s3 = servers.start_weed([*command, *ports], folder, s3, service["environment"])

    @contextmanager
    def reaching_s3(self) -> Iterator[None]:
        """Our services reach it through a proxy that can hold their requests."""
        assert self.s3 is not None
        with throttled(self.s3.port) as self.way_to_s3:
            self._places["s3:8333"] = f"127.0.0.1:{self.way_to_s3.port}"
            yield

    # -- ours

    def environment(self, name: str) -> dict[str, str]:
        """What a service has in its environment, with nothing of this process's registry."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("CKPT_", "AWS_"))}
        wanted = {key: self._here(str(value)) for key, value in self.services[name]["environment"].items()}
        return {**kept, **wanted, "CKPT_HOME": str(self.folder / name), "PYTHONPATH": str(ROOT)}

    def command(self, name: str) -> list[str]:
        """The command of a service of ours."""
        own = {"0.0.0.0": "127.0.0.1", "8000": str(self.port)}
        words = [own.get(str(word), str(word)) for word in self.services[name]["command"]]
        return [sys.executable, "-m", "cli", *words]

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A command within a service, as `docker compose exec`."""
        command = [sys.executable, "-m", "cli", *words]
        return subprocess.run(
            command, env=self.environment(name), capture_output=True, text=True, timeout=600, check=False
        )

    def start(self, name: str) -> None:
        """Start a service of ours, and let it go on."""
        with (self.folder / f"{name}.log").open("ab") as log:
            pdeath = ("setpriv", "--pdeathsig", "KILL", "--")
            self.processes[name] = subprocess.Popen(
                [*pdeath, *self.command(name)], env=self.environment(name), stdout=log, stderr=log, cwd=self.folder
            )

    def migrate(self) -> None:
        """Run the service that others wait for."""
        done = subprocess.run(
            self.command("migrate"), env=self.environment("migrate"), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> int:
        """End a service and wait for it."""
        process = self.processes.pop(name)
        process.send_signal(how)
        return process.wait(300)

    def log(self, name: str) -> str:
        """What a service said so far."""
        return (self.folder / f"{name}.log").read_text()

    def health(self, name: str) -> list[str]:
        """The command of a service's health check, to be run here."""
        words = [self._here(str(word)) for word in self.services[name]["healthcheck"]["test"][1:]]
        places = {"127.0.0.1:8000": f"127.0.0.1:{self.port}", "127.0.0.1:8333": self._places["s3:8333"]}
        for there, here in places.items():
            words = [word.replace(there, here) for word in words]
        ours = {"ckpt": [sys.executable, "-m", "cli"], "python": [sys.executable]}
        return ours.get(words[0], words[:1]) + words[1:]

    def is_healthy(self, name: str) -> bool:
        """Whether a service passes its health check."""
        command, environment = self.health(name), self.environment(name)
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0

    def _here(self, text: str) -> str:
        for there, here in self._places.items():
            text = text.replace(there, here)
        return text

    def close(self) -> None:
        """End everything."""
        for name in list(self.processes):
            with suppress(subprocess.TimeoutExpired):
                self.stop(name, signal.SIGKILL)
        for server in (self.postgres, self.s3):
            if server is not None:
                server.kill()
                shutil.rmtree(server.folder, ignore_errors=True)


def _changed(word: str, own: Mapping[str, object]) -> str:
    name, _, _ = word.partition("=")
    return f"{name}={own[name]}" if name in own else word


@contextmanager
def running(folder: Path) -> Iterator[Stack]:
    """The whole stack, started in the order that the file asks for."""
    stack = Stack(folder)
    try:
        stack.start_postgres()
        stack.start_s3()
        with stack.reaching_s3():
            stack.migrate()
            for name in ("server", "worker-1", "worker-2"):
                stack.start(name)
            assert eventually(lambda: stack.is_healthy("server")), stack.log("server")
            yield stack
    finally:
        stack.close()


def eventually(check: Callable[[], bool], seconds: float = 300) -> bool:
    """Whether something comes true before it can be said that it never will."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.1)
    return False
