"""Merged models that are computed while they are read, next to reading them from files.

    python benchmarks/virtual.py [--repeat 5] [--layers 10] [--folder /dev/shm] [--json out.json]

What is read is copied to a file, or goes through a socket to a process that throws it away. Contestants take turns, each run in a process of its
own; figures are medians, peak memory is the largest resident set of any run. All input is made here, and all of it is removed at the end.
Close other programs: with two cores, computing takes what sending leaves.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from inputs import Llama, write_adapter, write_base
from measuring import Sample, machine, spawn
from performance import Figure, table, vars_of

CLIENTS, ADAPTERS = 8, 3
DRAIN = """
import socket, sys
source, buffer = socket.socket(fileno=int(sys.argv[1])), bytearray(1 << 20)
while source.recv_into(buffer):
    pass
"""


# ---- what runs in a process of its own


def prepare(folder: Path, layers: int) -> None:
    """Make a base and adapters on it, register them, and merge the first."""
    import registry
    from registry.registering import Registration

    shape = Llama(layers=layers)
    write_base(folder / "base", shape)
    with registry.connect() as ckpt:
        for number in range(1, ADAPTERS + 1):
            write_adapter(folder / f"adapter-{number}", folder / "base", shape, seed=number)
            ckpt.register(str(folder / f"adapter-{number}"), Registration(base=str(folder / "base")))
        ckpt.merge(ckpt.plan(ckpt.resolve("adapter-1")), out=str(folder / "merged"))


@contextmanager
def drain() -> Iterator[socket.socket]:
    """A socket whose other end takes everything."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([sys.executable, "-c", DRAIN, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    with ours:
        yield ours
    process.wait()


def send(pieces: Iterable[bytes | memoryview]) -> None:
    """Send everything, and see that it arrived."""
    with drain() as sink:
        for piece in pieces:
            sink.sendall(piece)


def copy(pieces: Iterable[bytes | memoryview], folder: Path) -> None:
    """Write everything to a file in memory, and remove it."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as out:
        for piece in pieces:
            out.write(piece)


def stored(folder: Path, is_copied: int) -> None:
    """Read the merged model that was written, and print the seconds."""
    from registry.locations import open_location

    location = open_location(str(folder / "merged"))
    files = {path: size for path, size in location.files().items() if path.endswith(".safetensors")}

    def pieces() -> Iterator[memoryview]:
        buffer = memoryview(bytearray(4 << 20))
        for path, size in files.items():
            for at in range(0, size, len(buffer)):
                piece = buffer[: min(len(buffer), size - at)]
                location.read_into(path, at, piece)
                yield piece

    start = time.perf_counter()
    if is_copied:
        copy(pieces(), folder)
    else:
        send(pieces())
    print(json.dumps({"seconds": time.perf_counter() - start}))


def virtual(folder: Path, is_copied: int, clients: int, adapters: int) -> None:
    """Plan, then read the same without it being there, so many at once; print the seconds, and of one client how long first bytes took."""
    import registry
    from registry.virtual import VirtualModel, VirtualModels
    from registry.workspace import Workspace

    with registry.connect() as ckpt:
        planned = [ckpt.plan(ckpt.resolve(f"adapter-{number + 1}")) for number in range(adapters)]
        models = VirtualModels(Workspace(ckpt.settings))
        found: dict[str, float] = {}

        def first_byte(name: str, share: float) -> None:
            start = time.perf_counter()
            model = models.open(planned[0])
            path = max(weights(model), key=lambda path: model.files[path])
            next(iter(model.read(path, int(share * model.files[path]))))
            found[name] = time.perf_counter() - start

        def whole(number: int) -> None:
            model = models.open(planned[number % adapters])
            pieces = (piece for path in weights(model) for piece in model.read(path))
            if is_copied:
                copy(pieces, folder)
            else:
                send(pieces)

        def weights(model: VirtualModel) -> list[str]:
            return [path for path in model.files if path.endswith(".safetensors")]

        if is_copied:
            for name, share in (("start", 0.0), ("middle", 0.5), ("middle again", 0.5)):
                first_byte(name, share)
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(whole, range(clients)))
        found["seconds"] = time.perf_counter() - start
        models.close()
    print(json.dumps(found))


CHILDREN = {"prepare": prepare, "stored": stored, "virtual": virtual}


# ---- measuring


def child(folder: Path, name: str, *arguments: int) -> tuple[Sample, dict[str, float]]:
    """One of this file's functions in a fresh interpreter; what it printed."""
    words = [sys.executable, __file__, "--child", name, str(folder), *map(str, arguments)]
    sample, printed = spawn(words, folder / "home")
    return sample, json.loads(printed or "{}")


def measure(folder: Path, repeat: int, layers: int) -> dict[str, object]:
    """All figures."""
    child(folder, "prepare", layers)
    size = sum(path.stat().st_size for path in (folder / "merged").glob("*.safetensors"))
    runs = {
        "stored, copied": ("stored", 1),
        "copied": ("virtual", 1, 1, 1),
        "stored, sent": ("stored", 0),
        "sent": ("virtual", 0, 1, 1),
        "same": ("virtual", 0, CLIENTS, 1),
        "other": ("virtual", 0, CLIENTS, ADAPTERS),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for turn in range(repeat):
        for name, (what, *arguments) in runs.items():
            sample, printed = child(folder, what, *map(int, arguments))
            found[name].append({**printed, "peak_bytes": sample.peak_bytes})
            print(f"{turn + 1} {name}: {printed['seconds']:.2f} s", file=sys.stderr, flush=True)

    def median(name: str, key: str) -> float:
        return statistics.median(each[key] for each in found[name])

    def speed(name: str, clients: int = 1) -> float:
        return clients * size / 1e6 / median(name, "seconds")

    def peak(name: str) -> float:
        return max(each["peak_bytes"] for each in found[name]) / 1e6

    def against_stored(name: str) -> Figure:
        mine, theirs = speed(name), speed(f"stored, {name}")
        detail = f"{mine:.0f} MB/s against {theirs:.0f} MB/s"
        return Figure(
            name=f"{name}, times the speed of the stored files",
            value=mine / theirs,
            unit="x",
            at_least=0.5,
            detail=detail,
        )

    figures = [
        against_stored("copied"), against_stored("sent"),
        *(Figure(name=f"first byte, {name} of a file", value=1e3 * median("copied", name), unit="ms", at_most=100)
          for name in ("start", "middle", "middle again")),
        Figure(name="8 readers of one model, together", value=speed("same", CLIENTS), unit="MB/s", at_least=speed("sent")),
        Figure(name="8 readers of 3 models, together", value=speed("other", CLIENTS), unit="MB/s", at_least=0.5 * speed("sent")),
        Figure(name="1 reader, peak memory", value=peak("sent"), unit="MB", at_most=300),
        Figure(name="8 readers of one model, peak memory", value=peak("same"), unit="MB", at_most=650),
        Figure(name="8 readers of 3 models, peak memory", value=peak("other"), unit="MB", at_most=650),
    ]  # fmt: skip
    return {"machine": machine(), "bytes": size, "repeat": repeat, "samples": found,
            "figures": [{**vars_of(figure), "holds": figure.holds} for figure in figures]}  # fmt: skip


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="Merged models that are computed while they are read.")
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
    if sys.argv[1:2] == ["--child"]:
        name, place, *numbers = sys.argv[2:]
        CHILDREN[name](Path(place), *map(int, numbers))
    else:
        main()
