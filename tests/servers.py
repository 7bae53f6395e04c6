"""A real PostgreSQL and a real S3 server (SeaweedFS) for the tests: on loopback and random ports, without rights, gone with their starter.

Each test process starts its own when a test first asks; every test gets a database or bucket of its own in it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import randbelow, token_hex
from typing import Any

START_SECONDS = 180.0
_GIVEN_TO_ANYBODY = 32_768  # ports from here on, by Linux's own settings
_KEY, _SECRET = "ckpttest", "ckptsecret123"
# What tests write is not meant to outlast a power cut: syncing would only slow them down.
_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


def free_ports(count: int, *, twin: int = 0) -> list[int]:
    """Ports of the loopback interface that are free and stay so; with `twin`, so is the port that much higher.

    They are below those that the system gives to whoever asks for any: a client's connection could take one of those before its server does.
    """
    found: list[int] = []
    while len(found) < count:
        port = 1024 + randbelow(_GIVEN_TO_ANYBODY - twin - 1024)
        if all(_is_free(each) for each in {port, port + twin}):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    """Whether nobody listens there, and no other test process is about to: those have a socket for datagrams there until they end."""
    mark = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        mark.bind(("127.0.0.1", port))
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        mark.close()
        return False
    mark.detach()
    return True


def _user() -> tuple[str, ...]:
    """The start of a command that runs the rest as somebody without rights, and ends it with this process."""
    if os.geteuid() != 0:
        return ("setpriv", "--pdeathsig", "KILL", "--")
    return ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig", "KILL", "--")


def unprivileged_folder() -> Path:
    """A new folder for a server's data, that the server may write to."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-test-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    return folder


def _wait(process: subprocess.Popen[bytes], log: Path, is_ready: Callable[[], bool]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError):
            if is_ready():
                return
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text()[-4000:]}")


def _answers(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), 1):
        return True


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs: its process, its port, the folder of its data and of its log."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path

    def kill(self) -> None:
        """As if somebody pulled the plug: the process and all that it started, and none of them is there any more afterwards."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGSTOP)  # so that it starts nothing more
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        started = _descendants(self.process.pid)
        for child in started:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        while not all(map(_has_ended, started)):  # PostgreSQL does not start again before
            time.sleep(0.01)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                for child in map(int, (task / "children").read_text().split()):
                    found += [child, *_descendants(child)]
    return found


def _has_ended(pid: int) -> bool:
    """Also one that nobody has asked for how it ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


# -- PostgreSQL


def postgres_binary(name: str) -> str:
    """Where a program of the newest PostgreSQL is; Debian keeps servers out of PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    found = str(places[-1]) if places else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed: apt-get install postgresql")
    return found


def make_postgres_folder() -> Path:
    """A folder with a fresh cluster in `data`."""
    folder = unprivileged_folder()
    command = [*_user(), postgres_binary("initdb"), "-D", str(folder / "data"), "-U", "postgres", "-A", "trust"]
    subprocess.run([*command, "-E", "UTF8", "--no-sync", "--locale=C.UTF-8"], check=True, capture_output=True)
    return folder


def start_postgres(folder: Path, port: int | None = None, *, options: Sequence[str] = _FAST) -> Server:
    """Start the cluster of a folder; `options` as `name=value`. Waits until it takes connections."""
    port = port or free_ports(1)[0]
    settings = [
        f"port={port}",
        "listen_addresses=127.0.0.1",
        f"unix_socket_directories={folder}",
        "max_connections=200",
        *options,
    ]
    log = folder / "log"
    command = [*_user(), postgres_binary("postgres"), "-D", str(folder / "data")]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *(part for each in settings for part in ("-c", each))], stdout=output, stderr=output
        )
    _wait(process, log, lambda: _takes_connections(port))
    return Server(process, port, folder)


def _takes_connections(port: int) -> bool:
    import psycopg

    try:
        psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@contextmanager
def postgres_server(*, options: Sequence[str] = _FAST) -> Iterator[Server]:
    """A PostgreSQL for as long as the block runs."""
    folder = make_postgres_folder()
    server = start_postgres(folder, options=options)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def create_database(server: Server, template: str = "template1") -> str:
    """The URL of a new database, a copy of the template."""
    import psycopg

    name = f"test_{token_hex(6)}"
    with psycopg.connect(f"host=127.0.0.1 port={server.port} user=postgres dbname=postgres", autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    return f"postgresql://postgres@127.0.0.1:{server.port}/{name}"


def drop_database(url: str) -> None:
    """Remove a database, whoever is still connected to it."""
    import psycopg

    server, _, name = url.rpartition("/")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


# -- S3


def start_s3(folder: Path, ports: Sequence[int] | None = None) -> Server:
    """Start SeaweedFS's S3 server on the data of a folder. Waits until it answers."""
    ports = list(ports or free_ports(5, twin=10_000))
    s3, master, volume, filer, admin = ports
    config = {
        "identities": [
            {
                "name": "ckpt",
                "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
        ]
    }
    (folder / "s3.json").write_text(json.dumps(config))
    command = [
        "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false", "-webdav=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}",
        f"-filer.port={filer}", f"-admin.port={admin}", f"-s3.config={folder / 's3.json'}",
    ]  # fmt: skip
    return start_weed(command, folder, s3, {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET})


def start_weed(command: Sequence[str], folder: Path, port: int, credentials: Mapping[str, str]) -> Server:
    """Run SeaweedFS with a command of its own. Waits until its S3 server takes objects."""
    weed, log = Path(sys.executable).with_name("weed"), folder / "log"
    environment = {**os.environ, **credentials, "HOME": str(folder)}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*_user(), str(weed), *command], stdout=output, stderr=output, cwd=folder, env=environment
        )
    key, secret = credentials["AWS_ACCESS_KEY_ID"], credentials["AWS_SECRET_ACCESS_KEY"]
    _wait(process, log, lambda: _answers(port) and _serves(port, key, secret))
    return Server(process, port, folder)


def _serves(port: int, key: str, secret: str) -> bool:
    """Whether it takes and gives an object, which it does some time after it answers."""
    try:
        system = s3_filesystem(port, key, secret)
        system.call_s3("put_object", Bucket=_ready_bucket(system), Key="ready", Body=b"ready")
    except Exception:  # noqa: BLE001 - it is not ready yet, whatever the client makes of that
        return False
    return True


def _ready_bucket(system: Any) -> str:
    with suppress(FileExistsError):
        system.mkdir("ready")
    return "ready"


def s3_environment(port: int) -> Mapping[str, str]:
    """What a process needs to know, as environment variables of the AWS clients, to reach the server."""
    return {
        "AWS_ACCESS_KEY_ID": _KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def s3_filesystem(port: int, key: str = _KEY, secret: str = _SECRET) -> Any:
    """s3fs, connected with the server."""
    import s3fs

    return s3fs.S3FileSystem(
        key=key,
        secret=secret,
        endpoint_url=f"http://127.0.0.1:{port}",
        client_kwargs={"region_name": "us-east-1"},
        skip_instance_cache=True,
    )


@contextmanager
def s3_server() -> Iterator[Server]:
    """An S3 server for as long as the block runs."""
    folder = unprivileged_folder()
    server = start_s3(folder)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def create_bucket(server: Server) -> str:
    """The URL of a new bucket, `s3://…`."""
    name = f"test-{token_hex(6)}"
    s3_filesystem(server.port).call_s3("create_bucket", Bucket=name)
    return f"s3://{name}"


def drop_bucket(server: Server, url: str) -> None:
    """Remove a bucket with all that is in it."""
    with suppress(OSError):  # a server that was stopped meanwhile takes it along
        s3_filesystem(server.port).call_s3("delete_bucket", Bucket=url.removeprefix("s3://"))
