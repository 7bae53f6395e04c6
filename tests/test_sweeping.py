"""Sweeping: what nothing needs goes, what somebody needs or may be about to record stays."""

from __future__ import annotations

import os
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import tiny

from registry.errors import DamagedBlob, StorageFailed
from registry.manifest import Checkpoint
from registry.registering import Registration
from registry.service import Registry

NOW, DAY = timedelta(0), timedelta(days=1)


@pytest.fixture
def bot(ckpt: Registry, tmp_path: Path) -> Checkpoint:
    adapter = tiny.write_adapter(tmp_path / "bot", base=tiny.write_base(tmp_path / "base"))
    return ckpt.register(str(adapter)).registered[0].checkpoint


def blobs(tmp_path: Path) -> set[str]:
    return {path.name for path in tiny.stored_blobs(tmp_path / "home")}


def make_old(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 2 * DAY.total_seconds(),) * 2)


def test_needed_blobs_stay(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    ckpt.merge(ckpt.plan(bot))
    ckpt.add_base(str(tmp_path / "base"), copy=True)
    before = blobs(tmp_path)
    assert ckpt.sweep(older_than=NOW).blobs == 0
    assert blobs(tmp_path) == before
    assert "sweep" not in {event.action for event in ckpt.history()}


def test_what_a_removed_checkpoint_alone_needed_goes(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    other = (
        ckpt.register(str(tiny.write_adapter(tmp_path / "two", base=tmp_path / "base", seed=2)))
        .registered[0]
        .checkpoint
    )
    ckpt.remove(bot)
    gone = {entry.digest.hex: entry.size_bytes for entry in bot.manifest.files if entry not in other.manifest.files}
    would = ckpt.sweep(older_than=NOW, dry_run=True)
    assert gone.keys() <= blobs(tmp_path)
    swept = ckpt.sweep(older_than=NOW)
    assert swept == would
    assert (swept.blobs, swept.size_bytes) == (len(gone), sum(gone.values()))
    assert blobs(tmp_path) == {entry.digest.hex for entry in other.manifest.files}
    assert ckpt.history("store")[-1].detail == {"blobs": swept.blobs, "size_bytes": swept.size_bytes}
    assert ckpt.register(bot.source).registered[0].checkpoint.ref == "bot@v2"


def test_what_is_young_is_spared(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    ckpt.remove(bot)
    assert ckpt.sweep(older_than=DAY).blobs == 0
    make_old(tmp_path / "home/store")
    assert ckpt.sweep(older_than=DAY).blobs == len(bot.manifest.files)
    assert not blobs(tmp_path)


def test_what_dead_writers_left_goes_even_when_no_blob_does(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    dead = tmp_path / "home/store/staging/dead"
    dead.parent.mkdir(parents=True, exist_ok=True)
    dead.write_bytes(b"half a blob")
    ckpt.sweep(older_than=DAY)
    assert dead.exists()
    make_old(dead.parent)
    ckpt.sweep(older_than=DAY, dry_run=True)
    assert dead.exists()
    ckpt.sweep(older_than=DAY)
    assert not dead.exists()


def test_orphans_of_a_crash_go(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    """Blobs come first: a crash before the row leaves them without an owner."""
    orphan = shutil.copytree(tmp_path / "bot", tmp_path / "other")
    tiny.write_adapter(orphan, base=tmp_path / "base", rank=2)

    def crash(what: str, done_bytes: int, total_bytes: int) -> None:
        if what == "storing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckpt.register(str(orphan), progress=crash)
    needed = {entry.digest.hex for entry in bot.manifest.files}
    assert blobs(tmp_path) > needed
    assert ckpt.checkpoints() == [bot]
    ckpt.sweep(older_than=NOW)
    assert blobs(tmp_path) == needed


def test_a_blob_that_was_swept_before_it_was_recorded_is_not_recorded(
    ckpt: Registry, bot: Checkpoint, tmp_path: Path
) -> None:
    place = tiny.write_adapter(tmp_path / "two", base=tmp_path / "base", seed=2)
    needed = {entry.digest.hex for entry in bot.manifest.files}

    def sweep_meanwhile(what: str, done_bytes: int, total_bytes: int) -> None:
        if what == "storing":
            for path in tiny.stored_blobs(tmp_path / "home"):
                if path.name not in needed:
                    path.unlink()

    with pytest.raises(DamagedBlob):
        ckpt.register(str(place), progress=sweep_meanwhile)
    assert ckpt.checkpoints() == [bot]
    ckpt.register(str(place))
    ckpt.pull(ckpt.resolve("two"), tmp_path / "pulled")


def test_sweeping_without_pause_while_others_register(tmp_path: Path) -> None:
    """Whatever the order of things: who was told that it is recorded can have it back."""
    base = tiny.write_base(tmp_path / "base")
    places = [tiny.write_adapter(tmp_path / f"bot-{number}", base=base, seed=number) for number in range(6)]
    registered: list[str] = []
    done = threading.Event()

    def sweep() -> None:
        with tiny.open_registry(tmp_path / "home") as sweeping:
            while not done.is_set():
                sweeping.sweep(older_than=timedelta(milliseconds=30))

    with tiny.open_registry(tmp_path / "home") as ckpt:
        ckpt.add_base(str(base))
        sweeper = threading.Thread(target=sweep)
        sweeper.start()
        try:
            for place in places:
                for _ in range(20):  # the sweep spares next to nothing: it may well win
                    try:
                        registered.append(
                            ckpt.register(str(place), Registration(base="base")).registered[0].checkpoint.ref
                        )
                        break
                    except (DamagedBlob, StorageFailed):
                        continue
        finally:
            done.set()
            sweeper.join()
        assert registered
        assert [checkpoint.ref for checkpoint in ckpt.checkpoints()] == sorted(registered)
        for ref in registered:
            ckpt.pull(ckpt.resolve(ref), tmp_path / "pulled" / ref)
