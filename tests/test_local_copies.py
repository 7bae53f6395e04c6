"""Copies for serving engines on this machine: made once, swept when nobody uses them any more, never while somebody does."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import tiny

from registry.errors import Changed, StorageFailed
from registry.local_copies import SweptCopies, sweep_copies, used_copy, used_copy_of_base
from registry.manifest import Checkpoint
from registry.registering import Registration
from registry.service import Registry

DAY, NOW = timedelta(days=1), timedelta(0)
NOTHING = SweptCopies()


@pytest.fixture
def bot(ckpt: Registry, adapter: Path) -> Checkpoint:
    return ckpt.register(str(adapter), Registration(adapter="support-bot")).registered[0].checkpoint


def copied(ckpt: Registry, checkpoint: Checkpoint, *, days_ago: float = 0) -> Path:
    """A copy that was used last so long ago."""
    with used_copy(ckpt, checkpoint) as folder:
        pass
    make_old(folder, days_ago)
    return folder


def make_old(folder: Path, days: float) -> None:
    at = time.time() - days * 86400
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (at, at))


def place(ckpt: Registry) -> Path:
    return ckpt.settings.home / "serving"


# -- copying


def test_it_is_copied_once_whoever_asks(ckpt: Registry, bot: Checkpoint, adapter: Path) -> None:
    pulled: list[int] = []

    def copy(_: int) -> Path:
        with (
            tiny.open_registry(ckpt.settings.home) as another,
            used_copy(another, bot, lambda what, done, total: pulled.append(done)) as folder,
        ):
            return folder

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(copy, range(16)))
    assert len(folders) == 1
    assert tiny.contents(folders.pop()) == tiny.contents(adapter)
    assert sum(pulled) == bot.manifest.size_bytes


def test_a_damaged_copy_is_none(ckpt: Registry, bot: Checkpoint) -> None:
    for blob in tiny.stored_blobs(ckpt.settings.home):
        blob.chmod(0o600)
        blob.write_bytes(b"x" * blob.stat().st_size)
    with pytest.raises(Changed), used_copy(ckpt, bot):
        pass
    assert not (place(ckpt) / bot.digest.hex).exists()


# -- sweeping


def test_where_nothing_was_copied_nothing_is_swept(ckpt: Registry) -> None:
    assert sweep_copies(ckpt.settings.home) == NOTHING
    assert not place(ckpt).exists()


def test_what_nobody_has_used_for_a_while_goes(ckpt: Registry, bot: Checkpoint, adapter: Path) -> None:
    folder, gone = copied(ckpt, bot, days_ago=31), SweptCopies(copies=1, copies_bytes=bot.manifest.size_bytes)
    assert sweep_copies(ckpt.settings.home, unused=32 * DAY) == NOTHING
    assert sweep_copies(ckpt.settings.home, dry_run=True) == gone
    assert folder.is_dir()
    assert sweep_copies(ckpt.settings.home) == gone
    assert list(place(ckpt).iterdir()) == []
    assert sweep_copies(ckpt.settings.home) == NOTHING
    assert tiny.contents(copied(ckpt, bot)) == tiny.contents(adapter)


def test_a_base_model_of_the_store_is_copied_and_goes_too(ckpt: Registry, base: Path) -> None:
    kept = ckpt.add_base(str(base), name="kept", copy=True).base
    with used_copy_of_base(ckpt, kept) as folder:
        assert tiny.contents(folder) == tiny.contents(base)
        make_old(folder, 31)
        assert sweep_copies(ckpt.settings.home) == NOTHING
    make_old(folder, 31)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert sweep_copies(ckpt.settings.home) == SweptCopies(copies=1, copies_bytes=size)
    assert list(place(ckpt).iterdir()) == []


def test_asking_for_it_and_reading_it_are_uses(ckpt: Registry, bot: Checkpoint) -> None:
    folder = copied(ckpt, bot, days_ago=31)
    with used_copy(ckpt, bot):
        pass
    assert sweep_copies(ckpt.settings.home) == NOTHING
    make_old(folder, 31)
    weights = folder / bot.manifest.weights_file
    os.utime(weights, (time.time(), weights.stat().st_mtime))  # as reading leaves it, where the file system keeps that
    assert sweep_copies(ckpt.settings.home) == NOTHING


def test_what_is_in_use_stays_whatever_its_age(ckpt: Registry, bot: Checkpoint) -> None:
    with used_copy(ckpt, bot) as folder:
        make_old(folder, 1000)
        with used_copy(ckpt, bot):
            pass
        make_old(folder, 1000)
        assert sweep_copies(ckpt.settings.home, unused=NOW) == NOTHING
    assert sweep_copies(ckpt.settings.home, unused=NOW).copies == 1


def test_what_a_running_program_was_started_with_stays(ckpt: Registry, bot: Checkpoint) -> None:
    """As an engine is, with the flags of `ckpt serve-config`: it holds no lock."""
    folder = copied(ckpt, bot, days_ago=1000)
    engine = [sys.executable, "-c", "print(flush=True); input()", "--lora-modules", f"support-bot@v1={folder}"]
    with subprocess.Popen(engine, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert sweep_copies(ckpt.settings.home) == NOTHING
        running.communicate(b"\n")
    assert sweep_copies(ckpt.settings.home).copies == 1


def test_what_is_being_written_stays(ckpt: Registry, bot: Checkpoint) -> None:
    is_written, may_go_on = threading.Event(), threading.Event()

    def wait(what: str, done: int, total: int) -> None:
        is_written.set()
        may_go_on.wait(60)

    def copy() -> Path:
        with used_copy(ckpt, bot, wait) as folder:
            return folder

    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(copy)
        assert is_written.wait(60)
        assert sweep_copies(ckpt.settings.home, unused=NOW) == NOTHING
        may_go_on.set()
        assert copying.result().is_dir()


def test_what_a_dead_writer_has_left_goes_with_its_lock(ckpt: Registry, bot: Checkpoint) -> None:
    left, others = place(ckpt) / f".{bot.digest.hex}.0123abcd.partial", place(ckpt) / "notes.txt"
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_bytes(b"{}")
    (place(ckpt) / f".{bot.digest.hex}.lock").touch()
    others.write_text("mine")
    assert sweep_copies(ckpt.settings.home) == NOTHING  # a far registry's copying goes on with it
    make_old(left, 31)
    (place(ckpt) / f".{bot.digest.hex}.lock").touch()
    assert sweep_copies(ckpt.settings.home) == SweptCopies(copies=1, copies_bytes=2)
    assert list(place(ckpt).iterdir()) == [others]


def test_who_waited_for_a_lock_that_was_swept_takes_the_new_one(ckpt: Registry, bot: Checkpoint) -> None:
    """A lock that has lost its name keeps nobody out."""
    lock = copied(ckpt, bot).with_name(f".{bot.digest.hex}.lock")
    is_used, may_end = threading.Event(), threading.Event()

    def use() -> None:
        with used_copy(ckpt, bot):
            is_used.set()
            may_end.wait(60)

    with ThreadPoolExecutor(1) as pool, lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        using = pool.submit(use)
        wait_until_waited_for(lock)
        lock.unlink()
        fcntl.flock(held, fcntl.LOCK_UN)
        assert is_used.wait(60)
        swept = sweep_copies(ckpt.settings.home, unused=NOW)
        may_end.set()
        using.result(60)
    assert swept == NOTHING


def wait_until_waited_for(lock: Path) -> None:
    """Until somebody waits for a lock, as far as the system tells."""
    wanted, end = re.compile(rf"-> FLOCK .*:{lock.stat().st_ino} "), time.monotonic() + 20
    while time.monotonic() < end and not wanted.search(Path("/proc/locks").read_text()):
        time.sleep(0.01)


def test_copying_and_sweeping_at_once_leaves_whole_copies_only(ckpt: Registry, bot: Checkpoint, adapter: Path) -> None:
    wanted, is_over = tiny.contents(adapter), threading.Event()

    def sweep() -> int:
        found = 0
        while not is_over.is_set():
            found += sweep_copies(ckpt.settings.home, unused=NOW).copies
        return found

    def use(_: int) -> bool:
        with used_copy(ckpt, bot) as folder:
            return tiny.contents(folder) == wanted

    with ThreadPoolExecutor(4) as pool:
        sweeping = pool.submit(sweep)
        try:
            assert all(pool.map(use, range(60)))
        finally:
            is_over.set()
        assert sweeping.result(60) >= 0


def test_a_place_that_cannot_be_swept_is_told_of(ckpt: Registry, bot: Checkpoint) -> None:
    (place(ckpt) / f".{bot.digest.hex}.lock").mkdir(parents=True)
    with pytest.raises(StorageFailed):
        sweep_copies(ckpt.settings.home)
