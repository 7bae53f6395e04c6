"""Downloads by the Hub's own clients: from nginx, from the registry where the file is stored, and where it is computed while it is sent.

    python benchmarks/hub.py [--repeat 5] [--layers 8] [--folder /dev/shm] [--json out.json]

The file is one of 1 GB, the weights of a merged model. nginx is the distribution's package, with sendfile and two workers; the server is
`ckpt serve`; both, and each client, are processes of their own on this machine, and all files lie in memory. A client is `hf_hub_download` of
huggingface_hub 0.36 or 2.x with an empty cache, in an environment of its own; what is counted is that call. Contestants take turns; figures
are medians. How long the first byte takes, and what eight at once cost, is measured with bare sockets. All input is made here and removed at
the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import inputs
from inputs import Llama, write_adapter, write_base
from measuring import machine
from performance import Figure, table, vars_of
from register_http import server

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import servers
from hub_clients import CLIENTS, Client

from registry import Settings, connect
from registry.registering import Registration
from registry.service import Registry

AT_ONCE = 8
NGINX = "/usr/sbin/nginx"
FILE = "model.safetensors"
STORED, VIRTUAL = "v1", "v2"
DOWNLOAD = """
import time
began = time.perf_counter()
hf_hub_download("bot-merged", {file!r}, revision={revision!r})
told = time.perf_counter() - began
"""
CONFIGURATION = """
{user}daemon off; pid {folder}/pid; error_log {folder}/errors; worker_processes 2;
events {{}}
http {{
    access_log off; sendfile on; tcp_nopush on;
    client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3; uwsgi_temp_path {folder}/4;
    scgi_temp_path {folder}/5;
    server {{
        listen 127.0.0.1:{port};
        location / {{ root {folder}/files; add_header X-Repo-Commit {commit}; }}
    }}
}}
"""


# ---- who sends


def prepare(folder: Path, layers: int) -> None:
    """Versions of an adapter on a base model of one file. The first is merged into the store; all others are not."""
    shape, inputs.SHARD_BYTES = Llama(layers=layers), 40 << 30
    write_base(folder / "base", shape)
    with connect(Settings.from_environment(environment(folder))) as registry:
        assert isinstance(registry, Registry)
        registry.add_base(str(folder / "base"), name="llama")
        for number in (1, 2, 3):
            write_adapter(folder / f"bot-{number}", folder / "base", shape, seed=number)
            registry.register(str(folder / f"bot-{number}"), Registration(adapter="bot"))
        registry.merge(registry.plan(registry.resolve("bot@v1")))


def environment(folder: Path) -> dict[str, str]:
    return {"CKPT_HOME": str(folder / "home"), "CKPT_USER": "bench"}


@contextmanager
def nginx(folder: Path, file: Path, commit: str) -> Iterator[str]:
    """nginx with one file, at the address that the Hub's clients ask for; gives its URL."""
    (port,) = servers.free_ports(1)
    place = folder / "nginx"
    target = place / "files/bot-merged/resolve" / STORED / FILE
    target.parent.mkdir(parents=True)
    os.link(file, target)
    user = "user root; " if os.getuid() == 0 else ""  # else its workers are nobody, who may not read this folder
    (place / "conf").write_text(CONFIGURATION.format(folder=place, port=port, commit=commit, user=user))
    process = subprocess.Popen([NGINX, "-p", str(place), "-c", str(place / "conf")], stderr=subprocess.DEVNULL)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 10
        while not is_up(port):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError("nginx did not start")
            time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def is_up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ---- who reads


def download(name: str, url: str, revision: str, folder: Path) -> float:
    """Seconds that one of the clients takes for the file."""
    client = Client(name, url, "", folder / "cache")
    seconds: float = client.does(DOWNLOAD.format(file=FILE, revision=revision))
    shutil.rmtree(folder / "cache")
    return seconds


def read(url: str, revision: str, start: int = 0, end: int | None = None) -> tuple[float, float, int]:
    """Read the file, or a range, over a bare socket: seconds until the first byte of it, until the last, and how many there were."""
    address, buffer = httpx.URL(url), bytearray(1 << 20)
    last = "" if end is None else end - 1
    began = time.perf_counter()
    with socket.create_connection((address.host, address.port)) as line:
        asked = f"GET /bot-merged/resolve/{revision}/{FILE} HTTP/1.1\r\nHost: {address.host}\r\nRange: bytes={start}-{last}\r\n"
        line.sendall(f"{asked}Connection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head or head.endswith(b"\r\n\r\n"):
            head += line.recv(4096)
        first, count = time.perf_counter() - began, len(head.partition(b"\r\n\r\n")[2])
        while got := line.recv_into(buffer):
            count += got
    if not head.startswith(b"HTTP/1.1 206"):
        raise RuntimeError(head.decode("latin-1"))
    return first, time.perf_counter() - began, count


def together(url: str, revision: str, size: int) -> tuple[float, float]:
    """Eight read the whole file at once: their bytes a second, and the longest that another request took meanwhile."""
    longest, over = 0.0, threading.Event()

    def look() -> None:
        nonlocal longest
        with httpx.Client(base_url=url, timeout=60) as client:
            while not over.wait(0.05):
                began = time.perf_counter()
                client.head("/bot/resolve/v3/adapter_config.json").raise_for_status()
                longest = max(longest, time.perf_counter() - began)

    command = [sys.executable, __file__, "--read", url, revision]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(AT_ONCE)]
    watcher = threading.Thread(target=look)
    watcher.start()
    told = [json.loads(reader.communicate()[0]) for reader in readers]
    over.set()
    watcher.join()
    seconds = max(end for _, end in told) - min(began for began, _ in told)
    return AT_ONCE * size / seconds, longest


def read_whole(url: str, revision: str) -> None:
    """Read the file, and print when that began and ended; the clocks of all processes agree."""
    began = time.monotonic()
    read(url, revision)
    print(json.dumps([began, time.monotonic()]))


def peak_bytes(port: int) -> int:
    """The largest resident set so far of the process that listens on a port."""
    found = subprocess.run(["pgrep", "-f", f"serve --port {port}"], capture_output=True, text=True, check=True)
    status = Path(f"/proc/{found.stdout.split()[0]}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


# ---- measuring


def measure(folder: Path, repeat: int, layers: int) -> dict[str, object]:
    """All figures."""
    prepare(folder, layers)
    with server(environment(folder)) as url:
        look = httpx.head(f"{url}/bot-merged/resolve/{STORED}/{FILE}").raise_for_status()
        size = int(look.headers["Content-Length"])
        stored = next(each for each in (folder / "home").rglob("*") if each.is_file() and each.stat().st_size == size)
        fresh = [1000 * read(url, "v3", at, at + 100_000)[0] for at in (0, size // 2)]
        before = peak_bytes(httpx.URL(url).port or 0)
        with nginx(folder, stored, look.headers["X-Repo-Commit"]) as other:
            seconds = taking_turns(folder, url, other, repeat)
        one = peak_bytes(httpx.URL(url).port or 0)
        rates = {revision: together(url, revision, size) for revision in (STORED, VIRTUAL)}
        eight = peak_bytes(httpx.URL(url).port or 0)
    speeds = {name: size / 1e6 / statistics.median(each) for name, each in seconds.items()}
    figures = [*speed_figures(speeds), *other_figures(fresh, rates, (before, one, eight))]
    told = [{**vars_of(figure), "holds": figure.holds} for figure in figures]
    return {"machine": machine(), "bytes": size, "repeat": repeat, "seconds": seconds, "figures": told}


def taking_turns(folder: Path, url: str, other: str, repeat: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    for turn in range(repeat):
        for name in CLIENTS:
            for what, at, revision in (("nginx", other, STORED), ("stored", url, STORED), ("virtual", url, VIRTUAL)):
                took = download(name, at, revision, folder)
                seconds.setdefault(f"{name} {what}", []).append(took)
                print(f"{turn + 1} {name} {what}: {took:.2f} s", file=sys.stderr, flush=True)
    return seconds


def speed_figures(speeds: Mapping[str, float]) -> Iterator[Figure]:
    for name in CLIENTS:
        for what, goal in (("stored", 0.8), ("virtual", 0.5)):
            ours, theirs = speeds[f"{name} {what}"], speeds[f"{name} nginx"]
            yield Figure(name=f"{name}, {what}, times nginx", value=ours / theirs, unit="x", at_least=goal,
                         detail=f"{ours:.0f} MB/s against {theirs:.0f} MB/s")  # fmt: skip


def other_figures(
    fresh: list[float], rates: Mapping[str, tuple[float, float]], peaks: tuple[int, int, int]
) -> Iterator[Figure]:
    for name, took in zip(("start", "middle"), fresh, strict=True):
        yield Figure(name=f"first byte of a virtual file never asked for, {name}", value=took, unit="ms", at_most=100)
    for revision, (rate, longest) in rates.items():
        what = "stored" if revision == STORED else "virtual"
        yield Figure(name=f"{AT_ONCE} at once, {what}, together", value=rate / 1e6, unit="MB/s", at_least=0)
        yield Figure(name=f"longest HEAD meanwhile, {what}", value=1000 * longest, unit="ms", at_most=1000)
    before, one, eight = (each / 1e6 for each in peaks)
    yield Figure(name=f"the server's peak memory after {AT_ONCE} at once", value=eight, unit="MB", at_most=1000,
                 detail=f"{before:.0f} MB before, {one:.0f} MB after one at a time")  # fmt: skip


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8, help="of the base model; 8 make 1 GB")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="a file system in memory")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckpt-benchmark-", dir=options.folder) as folder:
        report = measure(Path(folder), options.repeat, options.layers)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read_whole(*sys.argv[2:])
    else:
        main()
