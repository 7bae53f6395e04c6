"""How many checkpoints a second are registered over HTTP: one a request, and several, by several clients at once.

    python benchmarks/register_http.py [--clients 8] [--count 500] [--batch 50] [--databases sqlite postgresql] [--json out.json]

The server is `ckpt serve`, a process of its own, with tokens; each client is a process of its own, too, on the same machine. Every
checkpoint has its own weights (a LoRA of rank 4 for a model of two layers, 9 kB), a step, two metrics and a tag. Their files were sent
before: what is counted is recording them, for which the server reads and checks the files. How many files a second are sent is told beside.
PostgreSQL is started here with the durable settings it has by default.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from blake3 import blake3
from measuring import machine
from safetensors.numpy import save

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import servers
import tiny

from registry import Settings, connect
from registry.service import Registry
from registry.teamwork import Role

GOAL = 500.0


@dataclass(frozen=True)
class Rate:
    """What was measured: `sent` files and `registered` checkpoints a second, and how long one request took in the middle."""

    database: str
    batch: int
    clients: int
    registered: float
    sent: float
    median_ms: float


@contextmanager
def server(environment: Mapping[str, str]) -> Iterator[str]:
    """`ckpt serve`; gives its URL."""
    (port,) = servers.free_ports(1)
    command = [sys.executable, "-m", "cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


def work(url: str, secret: str, number: int, batch: int, count: int, barrier: Any, results: Any) -> None:
    """One client: sends the files of its checkpoints; when all clients have, registers them."""
    client = httpx.Client(base_url=f"{url}/api/v1", headers={"Authorization": f"Bearer {secret}"}, timeout=120)
    barrier.wait()
    began = time.monotonic()
    bodies = list(send(client, number, batch, count))
    sending = time.monotonic() - began
    barrier.wait()
    began, each = time.monotonic(), []
    for part in in_parts(bodies, batch):
        asked = time.monotonic()
        path, document = ("/checkpoints", part[0]) if batch == 1 else ("/checkpoints/batch", list(part))
        client.post(path, json=document).raise_for_status()
        each.append(time.monotonic() - asked)
    results.put((began, time.monotonic(), sending, sorted(each)[len(each) // 2]))


def in_parts(bodies: Sequence[Any], batch: int) -> Iterator[Sequence[Any]]:
    return (bodies[start : start + batch] for start in range(0, len(bodies), batch))


def send(client: httpx.Client, number: int, batch: int, count: int) -> Iterator[dict[str, Any]]:
    """Checkpoints whose files the server has now."""
    random = np.random.default_rng([number, batch])
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}).encode()
    tensors = tiny.adapter_tensors(number)
    changing = next(iter(tensors))
    put(client, config)
    for step in range(count):
        tensors[changing] = random.standard_normal(tensors[changing].shape).astype(np.float32)
        weights = save(tensors)
        put(client, weights)
        yield body(number, step, config, weights)


def put(client: httpx.Client, data: bytes) -> None:
    client.put(f"/blobs/{blake3(data).hexdigest()}", content=data).raise_for_status()


def body(number: int, step: int, config: bytes, weights: bytes) -> dict[str, Any]:
    files = {"adapter_config.json": config, "adapter_model.safetensors": weights}
    return {
        "files": [
            {"path": path, "size_bytes": len(data), "digest": blake3(data).hexdigest()} for path, data in files.items()
        ],
        "said": {"base": "llama", "adapter": f"team/bot-{number}", "tags": {"client": str(number)}},
        "found": {
            "run": "run",
            "step": step,
            "metrics": [{"name": "eval_loss", "value": 1 / (step + 1)}, {"name": "loss", "value": 2 / (step + 1)}],
        },
    }


def measure(url: str, secret: str, database: str, *, clients: int, batch: int, count: int) -> Rate:
    """All clients at once. The rate is what all have registered over the time from the first request to the last answer."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(clients), context.Queue()
    processes = [
        context.Process(target=work, args=(url, secret, number + 1000 * batch, batch, count, barrier, results))
        for number in range(clients)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    wall = max(end for _, end, *_ in found) - min(began for began, *_ in found)
    return Rate(
        database=database,
        batch=batch,
        clients=clients,
        registered=clients * count / wall,
        sent=clients * count / max(sending for *_, sending, _ in found),
        median_ms=1000 * sorted(middle for *_, middle in found)[clients // 2],
    )


def prepared(settings: Settings, folder: Path) -> str:
    """A base model, and a token to write with."""
    with connect(settings) as registry:
        assert isinstance(registry, Registry)
        registry.upgrade_database()
        registry.add_base(str(tiny.write_base(folder / "base")), name="llama")
        return registry.create_token("bench", Role.WRITER).secret


def run(database: str, *, clients: int, batches: Sequence[int], count: int) -> list[Rate]:
    with (
        tempfile.TemporaryDirectory() as home,
        servers.postgres_server(options=()) if database != "sqlite" else nullcontext() as started,
    ):
        environment = {"CKPT_HOME": home, "CKPT_USER": "bench"}
        if started is not None:
            environment["CKPT_DATABASE_URL"] = servers.create_database(started)
        secret = prepared(Settings.from_environment(environment), Path(home))
        with server(environment) as url:
            return [measure(url, secret, database, clients=clients, batch=batch, count=count) for batch in batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--count", type=int, default=500, help="checkpoints of each client")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--databases", nargs="+", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rates = [
        rate
        for database in asked.databases
        for rate in run(database, clients=asked.clients, batches=[1, asked.batch], count=asked.count)
    ]
    print(f"{'database':12}{'a request':>10}{'clients':>9}{'registered/s':>14}{'median ms':>11}{'files sent/s':>14}")
    for rate in rates:
        print(
            f"{rate.database:12}{rate.batch:>10}{rate.clients:>9}{rate.registered:>14.0f}{rate.median_ms:>11.1f}{rate.sent:>14.0f}"
        )
    reached = all(rate.registered >= GOAL for rate in rates if rate.batch > 1)
    print(f"goal: {GOAL:.0f} registered a second in batches: {'reached' if reached else 'not reached'}")
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "rates": [asdict(rate) for rate in rates]}, indent=1))


if __name__ == "__main__":
    main()
