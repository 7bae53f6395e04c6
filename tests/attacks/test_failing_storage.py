"""A disk that is full, or fails, at every single step of writing: nothing is left half-done, and trying again succeeds.

strace has the system call fail that a command makes as its n-th of a kind, for n = 1, 2, 3… until no call is left to fail. The commands run in
forks of one process that has loaded everything before, so that only their own calls count.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import pytest
import tiny

from registry.store import Store

STORAGE_FAILED = 8

FORKING = """
import ctypes, gc, io, os, resource, shlex, signal, sys
from cli.app import main

def run(line):
    os.environ["CKPT_HOME"], *words = shlex.split(line)
    sys.argv = ["ckpt", *words]
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    order, _, line = line.partition(" ")
    if order == "here":
        print(run(line), file=answers, flush=True)
        continue
    gc.freeze()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # may be traced also where that is restricted
        if order == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if order.isdigit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(order), int(order)))
        code = run(line)
        try:
            os.write(2, sys.stderr.getvalue().encode())
        finally:
            os._exit(code)
    if order == "stopped":
        os.waitpid(child, os.WUNTRACED)
        print(child, file=answers, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Failure:
    """What goes wrong: a system call, its error, and whether all later calls of the kind fail, too.

    `strides`: SQLite writes a hundred pages, and commands open as many files, so that not every single call is tried, but ever fewer.
    """

    call: str
    error: str
    lasts: bool = False
    strides: bool = False

    def at(self, step: int) -> str:
        return f"inject={self.call}:error={self.error}:when={step}{'+' if self.lasts else ''}"


FAILURES = [
    Failure("write", "ENOSPC", lasts=True),
    Failure("pwrite64", "ENOSPC", lasts=True, strides=True),
    Failure("fsync", "EIO"),
    Failure("fdatasync", "EIO"),
    Failure("rename", "EIO"),
    Failure("mkdir", "ENOSPC"),
    Failure("openat", "EIO", strides=True),
]
# What a command writes as another one does need not be tried twice.
CALLS = {
    "register": ("write", "pwrite64", "fsync", "fdatasync", "rename", "mkdir", "openat"),
    "merge into the store": ("write", "pwrite64", "fsync", "rename", "mkdir", "openat"),
    "merge into a folder": ("write", "fsync", "rename", "mkdir"),
}


@final
class Commands:
    """Runs command lines of `ckpt` in forks of a process."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True
            )

    def _ask(self, order: str, home: Path, words: list[str]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order} {shlex.join([str(home), *words])}\n")
        self._process.stdin.flush()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def load(self, home: Path, *words: str) -> None:
        """Run it in the process itself, which then has loaded what it takes."""
        self._ask("here", home, list(words))
        assert self._answer() == 0

    def run(self, home: Path, *words: str, most_bytes: int = 0) -> int:
        """The exit code of a command that nothing happens to, except that no file may be larger than asked for."""
        self._ask(str(most_bytes) if most_bytes else "free", home, list(words))
        return self._answer()

    def run_failing(self, failure: Failure, step: int, home: Path, *words: str) -> tuple[int, str]:
        """The exit code, and the call that failed, empty where there was none to fail."""
        self._ask("stopped", home, list(words))
        child, trace = self._answer(), self._log.with_suffix(".strace")
        options = ["-f", "-o", str(trace), "-e", f"trace={failure.call}", "-e", failure.at(step), "-p", str(child)]
        with subprocess.Popen(["strace", *options], stderr=subprocess.PIPE) as tracer:
            assert tracer.stderr is not None
            assert b"attached" in tracer.stderr.readline()
            os.kill(child, signal.SIGCONT)
            code = self._answer()
        return code, next((line for line in trace.read_text().splitlines() if "(INJECTED)" in line), "")

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Case:
    """A command, the registry that it starts from, and the folder that it writes besides, with what is in it in the end."""

    words: tuple[str, ...]
    home: Path
    records: int
    out: Path
    written: dict[str, bytes]


def check_registry(home: Path) -> int:
    """See that every file that a row names is there, and that whatever is there is whole. Gives the number of records."""
    store = Store(str(home / "store"))
    with tiny.open_registry(home) as ckpt:
        checkpoints, merged = ckpt.checkpoints(), ckpt.merged()
    files = [entry for checkpoint in checkpoints for entry in checkpoint.manifest.files]
    files += [entry for each in merged if "" in each.locations for entry in each.files]
    for digest in {entry.digest for entry in files} | {digest for digest, _ in store.blobs()}:
        store.verify(digest)
    return len(checkpoints) + len(merged)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("forks") / "log")
    yield running
    running.close()


@pytest.fixture(scope="module")
def cases(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Everything is run once where nothing fails: so it is loaded, and what it should give is known."""
    folder = tmp_path_factory.mktemp("cases")
    base = tiny.write_base(folder / "base", shards=2)
    adapter = tiny.write_adapter(folder / "bot", base=base)
    empty, filled, out = folder / "empty", folder / "filled", folder / "out"
    register = ("register", str(adapter), "--base", "base")
    commands.load(empty, "base", "add", str(base), "--name", "base")
    shutil.copytree(empty, filled)
    commands.load(filled, *register)
    for number, words in enumerate([("merge", "bot"), ("merge", "bot", "--out", str(out))]):
        shutil.copytree(filled, folder / f"loaded{number}")
        commands.load(folder / f"loaded{number}", *words)
    written = tiny.contents(out)
    return {
        "register": Case(register, empty, 0, out, {}),
        "merge into the store": Case(("merge", "bot"), filled, 1, out, {}),
        "merge into a folder": Case(("merge", "bot", "--out", str(out)), filled, 1, out, written),
    }


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        pytest.param(name, failure, id=f"{name}: {failure.call} {failure.error}")
        for name, calls in CALLS.items()
        for failure in FAILURES
        if failure.call in calls
    ],
)
def test_what_fails_leaves_nothing_and_is_done_the_next_time(
    tmp_path: Path, commands: Commands, cases: dict[str, Case], name: str, failure: Failure
) -> None:
    case, step, home = cases[name], 1, tmp_path / "home"
    while True:
        for folder in (home, case.out, case.out.with_name("out.partial")):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case.home, home)
        code, failed = commands.run_failing(failure, step, home, *case.words)
        if not failed:
            break
        if failure.call != "openat":
            assert code in (0, STORAGE_FAILED)
        elif not any(
            f"{each}/" in failed for each in (sys.prefix, sys.base_prefix)
        ):  # Python opens its own when it likes
            assert code in (0, 2, 6, STORAGE_FAILED), failed
        assert check_registry(home) - case.records in ((0, 1) if code else (1,))
        assert not case.out.exists() or tiny.contents(case.out) == case.written
        if code:
            assert commands.run(home, *case.words) == 0
            assert check_registry(home) == case.records + 1
        assert not case.written or tiny.contents(case.out) == case.written
        step += step // 2 if failure.strides and step > 3 else 1
    assert (code, step > 1) == (0, True)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[int]:
    """A disk of that size in a folder. Who may not mount one gets a bound on the size of each file instead, which is given."""
    options = ("-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder))
    is_mounted = subprocess.run(["mount", *options], check=False, capture_output=True).returncode == 0
    try:
        yield 0 if is_mounted else size_bytes // 8
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size_bytes", [40 << 10, 80 << 10, 160 << 10])
@pytest.mark.parametrize("name", ["register", "merge into the store"])
def test_a_small_disk_that_fills_up(
    tmp_path: Path, commands: Commands, cases: dict[str, Case], name: str, size_bytes: int
) -> None:
    case, disk, home = cases[name], tmp_path / "disk", tmp_path / "home"
    disk.mkdir()
    taken = sum(map(len, tiny.contents(case.home).values()))
    with small_disk(disk, taken + size_bytes) as most_bytes:
        shutil.copytree(case.home, disk / "home")
        code = commands.run(disk / "home", *case.words, most_bytes=most_bytes)
        shutil.copytree(disk / "home", home)
    assert code == STORAGE_FAILED or (code == 0 and size_bytes > 80 << 10)
    assert check_registry(home) - case.records == (0 if code else 1)
    assert commands.run(home, *case.words) == 0
    assert check_registry(home) == case.records + 1


@pytest.mark.parametrize("most_bytes", [1 << 10, 10 << 10])
@pytest.mark.parametrize("name", ["register", "merge into the store"])
def test_files_that_may_not_grow(
    tmp_path: Path, commands: Commands, cases: dict[str, Case], name: str, most_bytes: int
) -> None:
    case, home = cases[name], tmp_path / "home"
    shutil.copytree(case.home, home)
    assert commands.run(home, *case.words, most_bytes=most_bytes) == STORAGE_FAILED
    assert check_registry(home) == case.records
    assert commands.run(home, *case.words) == 0
    assert check_registry(home) == case.records + 1
