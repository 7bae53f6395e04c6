"""Sweeping: what nothing needs goes after its grace, what somebody needs or is about to record stays; on SQLite and disk, PostgreSQL and S3."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from random import Random

import pytest
import tiny

from registry import connect
from registry.errors import BlobSwept, Conflict, DamagedBlob, InUse
from registry.manifest import Checkpoint
from registry.refs import Digest
from registry.registering import Registration
from registry.service import Registry
from registry.settings import Settings
from registry.store import Store
from registry.sweeping import Swept

NOW, DAY = timedelta(0), timedelta(days=1)
Opener = Callable[[], Registry]


@pytest.fixture(params=["embedded", pytest.param("team", marks=pytest.mark.xdist_group("servers"))])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same registry again and again, as several processes would."""
    environment = {"CKPT_HOME": str(tmp_path / "home"), "CKPT_USER": "ada"}
    if request.param == "team":
        store = request.getfixturevalue("s3_url") + "/store"
        environment |= {"CKPT_DATABASE_URL": request.getfixturevalue("postgres_url"), "CKPT_STORE": store}
    settings = Settings.from_environment(environment)
    return lambda: connect(settings)


@pytest.fixture
def ckpt(opener: Opener) -> Iterator[Registry]:
    with opener() as opened:
        yield opened


@pytest.fixture
def bot(ckpt: Registry, tmp_path: Path) -> Checkpoint:
    return register(ckpt, tmp_path, "bot")


def register(ckpt: Registry, tmp_path: Path, name: str, seed: int = 1) -> Checkpoint:
    base = tmp_path / "base"
    if not base.exists():
        tiny.write_base(base)
    adapter = tiny.write_adapter(tmp_path / name, base=base, seed=seed)
    return ckpt.register(str(adapter), Registration(base=str(base))).registered[0].checkpoint


def blobs(ckpt: Registry) -> set[Digest]:
    return {digest for digest, _ in ckpt.workspace.store.blobs()}


def digests(checkpoint: Checkpoint) -> set[Digest]:
    return {entry.digest for entry in checkpoint.manifest.files}


def move_clock(ckpt: Registry, back: timedelta) -> None:
    """As if everything that is marked had been so for longer."""
    with ckpt.workspace.writing() as change:
        condemned = change.catalog.condemned
        sizes = condemned.all()
        since = condemned.marked(sizes)
        condemned.pardon(sizes)
        for digest, size_bytes in sizes.items():
            condemned.mark({digest: size_bytes}, since[digest] - back)


def test_needed_blobs_stay(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    ckpt.add_base(str(tmp_path / "base"), copy=True)
    before = blobs(ckpt)
    assert ckpt.sweep(grace=NOW) == Swept()
    assert blobs(ckpt) == before
    assert "sweep" not in {event.action for event in ckpt.history()}


def test_a_merged_model_in_the_store_stays(tmp_path: Path) -> None:
    with tiny.open_registry(tmp_path / "home") as ckpt:
        ckpt.merge(ckpt.plan(register(ckpt, tmp_path, "bot")))
        assert ckpt.sweep(grace=NOW) == Swept()


def test_what_a_removed_checkpoint_alone_needed_goes(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    other = register(ckpt, tmp_path, "two", seed=2)
    ckpt.remove(bot)
    gone = {entry.digest: entry.size_bytes for entry in bot.manifest.files if entry not in other.manifest.files}
    would = ckpt.sweep(grace=NOW, dry_run=True)
    assert gone.keys() <= blobs(ckpt)
    swept = ckpt.sweep(grace=NOW)
    assert swept == would == Swept(blobs=len(gone), size_bytes=sum(gone.values()))
    assert blobs(ckpt) == digests(other)
    assert ckpt.history("store")[-1].detail == {"blobs": swept.blobs, "size_bytes": swept.size_bytes}
    assert ckpt.register(bot.source).registered[0].checkpoint.ref == "bot@v2"


def test_what_a_kept_recipe_is_made_of_stays_until_the_recipe_is_removed(
    ckpt: Registry, bot: Checkpoint, tmp_path: Path
) -> None:
    other = register(ckpt, tmp_path, "two", seed=2)
    saved = ckpt.save_recipe(ckpt.plan(bot, other))
    with pytest.raises(InUse, match=saved.id):
        ckpt.remove(bot)
    assert ckpt.sweep(grace=NOW) == Swept()
    ckpt.remove_recipe(saved.id)
    assert ckpt.sweep(grace=NOW) == Swept()
    ckpt.remove(bot)
    assert ckpt.sweep(grace=NOW).blobs == len(digests(bot) - digests(other))


def test_unneeded_blobs_wait_out_their_grace(ckpt: Registry, bot: Checkpoint) -> None:
    ckpt.remove(bot)
    waiting = Swept(marked=len(digests(bot)), marked_bytes=sum(entry.size_bytes for entry in bot.manifest.files))
    assert ckpt.sweep(grace=DAY, dry_run=True) == waiting
    assert ckpt.sweep(grace=DAY) == waiting
    move_clock(ckpt, back=DAY - timedelta(minutes=1))
    assert ckpt.sweep(grace=DAY) == waiting
    move_clock(ckpt, back=timedelta(minutes=1))
    assert ckpt.sweep(grace=DAY) == Swept(blobs=waiting.marked, size_bytes=waiting.marked_bytes)
    assert not blobs(ckpt)


def test_a_marked_blob_that_is_needed_again_starts_anew(ckpt: Registry, bot: Checkpoint) -> None:
    ckpt.remove(bot)
    ckpt.sweep(grace=DAY)
    move_clock(ckpt, back=DAY)
    again = ckpt.register(bot.source).registered[0].checkpoint
    assert ckpt.sweep(grace=DAY) == Swept()
    ckpt.remove(again)
    assert ckpt.sweep(grace=DAY).marked == len(digests(bot))


def test_a_lease_holds_a_sweep_off_until_it_ends(ckpt: Registry, bot: Checkpoint) -> None:
    ckpt.remove(bot)
    with ckpt.workspace.writing() as change:
        now = change.catalog.vitals.now()
        change.catalog.leases.take("ada", digests(bot), now + DAY)
    assert ckpt.sweep(grace=NOW) == Swept()
    with ckpt.workspace.writing() as change:
        change.catalog.leases.release("ada")
        change.catalog.leases.take("ada", digests(bot), now)
    assert ckpt.sweep(grace=NOW).blobs == len(digests(bot))


def test_the_next_sweep_finishes_one_that_died(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    """It had decided, and deleted nothing yet. Nobody may record these blobs now, but whoever needs them need not wait for a sweep."""
    die_before_deleting(ckpt, bot)
    with ckpt.workspace.writing(), pytest.raises(BlobSwept, match="being swept"):
        ckpt.workspace.check_stored(bot.manifest.files)
    assert ckpt.sweep(grace=DAY) == Swept()
    assert not blobs(ckpt)
    register(ckpt, tmp_path, "bot")
    assert ckpt.sweep(grace=NOW) == Swept()


def test_who_registers_what_a_dead_sweep_left_deletes_it_himself(
    ckpt: Registry, bot: Checkpoint, tmp_path: Path
) -> None:
    die_before_deleting(ckpt, bot)
    again = register(ckpt, tmp_path, "bot")
    assert ckpt.sweep(grace=NOW) == Swept()
    ckpt.pull(again, tmp_path / "pulled")


def die_before_deleting(ckpt: Registry, bot: Checkpoint) -> None:
    ckpt.remove(bot)
    with ckpt.workspace.writing() as change:
        catalog = change.catalog
        sizes = {entry.digest: entry.size_bytes for entry in bot.manifest.files}
        catalog.condemned.mark(sizes, catalog.vitals.now())
        catalog.blobs.forget(sizes)
        catalog.condemned.doom(sizes)


def test_only_one_sweep_at_a_time(ckpt: Registry, bot: Checkpoint, opener: Opener) -> None:
    with opener() as other, other.workspace.sweeping(), pytest.raises(Conflict, match="sweeps it just now"):
        ckpt.sweep(grace=NOW)
    assert ckpt.sweep(grace=NOW) == Swept()
    assert ckpt.sweep(grace=NOW, dry_run=True) == Swept()


def test_what_dead_writers_left_goes_even_when_no_blob_does(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for leftover in ("store/staging/dead", "making/tmp1/file"):
        (home / leftover).parent.mkdir(parents=True)
        (home / leftover).write_bytes(b"half a blob")
    with tiny.open_registry(home) as ckpt:
        assert ckpt.sweep(grace=NOW).leftovers == 0  # whatever is wanted, an hour is spared
        for path in (home / "store/staging/dead", home / "making/tmp1"):
            os.utime(path, (time.time() - 2 * DAY.total_seconds(),) * 2)
        assert ckpt.sweep(grace=DAY, dry_run=True).leftovers == 0
        assert ckpt.sweep(grace=DAY).leftovers == 2
    assert not list(home.glob("*/*/*"))


def test_expired_leases_and_answers_are_forgotten(ckpt: Registry, bot: Checkpoint) -> None:
    with ckpt.workspace.writing() as change:
        now = change.catalog.vitals.now()
        change.catalog.leases.take("old", digests(bot), now - DAY)
    ckpt.sweep()
    with ckpt.workspace.writing() as change:
        assert not change.catalog.leases.held("old", digests(bot), now - 2 * DAY)


def test_a_blob_that_is_swept_between_storing_and_recording_is_stored_again(
    ckpt: Registry, bot: Checkpoint, opener: Opener, tmp_path: Path
) -> None:
    place = tiny.write_adapter(tmp_path / "two", base=tmp_path / "base", seed=2)
    swept: list[Swept] = []

    def sweep_meanwhile(what: str, done_bytes: int, total_bytes: int) -> None:
        if what == "storing":
            with opener() as other:
                swept.append(other.sweep(grace=NOW))

    two = ckpt.register(str(place), Registration(base="base"), progress=sweep_meanwhile).registered[0].checkpoint
    assert sum(each.blobs for each in swept) > 0
    assert digests(two) <= blobs(ckpt)
    ckpt.pull(two, tmp_path / "pulled")


def test_a_blob_that_vanishes_without_a_sweep_is_not_recorded(tmp_path: Path) -> None:
    with tiny.open_registry(tmp_path / "home") as ckpt:
        bot = register(ckpt, tmp_path, "bot")
        place = tiny.write_adapter(tmp_path / "two", base=tmp_path / "base", seed=2)

        def lose(what: str, done_bytes: int, total_bytes: int) -> None:
            if what == "storing":
                for digest in blobs(ckpt) - digests(bot):
                    ckpt.workspace.store.delete(digest)

        with pytest.raises(DamagedBlob):
            ckpt.register(str(place), Registration(base="base"), progress=lose)
        assert ckpt.checkpoints() == [bot]


def test_a_blob_that_vanishes_while_it_is_read_is_missing() -> None:
    store = Store("memory://sweeping")
    with store.create() as writer:
        writer.write(b"data")
        blob = writer.commit()
    with store.open(blob.digest) as stream:
        store.delete(blob.digest)
        with pytest.raises(DamagedBlob, match="missing"):
            stream.read()


def test_a_merge_whose_files_are_swept_before_it_is_recorded_makes_them_again(tmp_path: Path) -> None:
    with tiny.open_registry(tmp_path / "home") as ckpt, tiny.open_registry(tmp_path / "home") as other:
        bot = register(ckpt, tmp_path, "bot")
        planned, swept = ckpt.plan(bot), list[Swept]()

        def sweep_meanwhile(what: str, done_bytes: int, total_bytes: int) -> None:
            if what == "merging":
                swept.append(other.sweep(grace=NOW))

        merged = ckpt.merge(planned, progress=sweep_meanwhile).merged
        ckpt.pull(merged, tmp_path / "pulled")
        assert ckpt.sweep(grace=NOW) == Swept()


def test_orphans_of_a_crash_go(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    """Blobs come first: a crash before the row leaves them without an owner."""
    orphan = shutil.copytree(tmp_path / "bot", tmp_path / "other")
    tiny.write_adapter(orphan, base=tmp_path / "base", rank=2)

    def crash(what: str, done_bytes: int, total_bytes: int) -> None:
        if what == "storing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckpt.register(str(orphan), progress=crash)
    assert blobs(ckpt) > digests(bot)
    ckpt.sweep(grace=NOW)
    assert blobs(ckpt) == digests(bot)


def test_a_sweep_that_was_paused_does_not_delete_late(tmp_path: Path) -> None:
    """It is stopped between its decision and its deletions; meanwhile somebody waits, in vain, and gets through once it goes on."""
    home = tmp_path / "home"
    with tiny.open_registry(home) as ckpt:
        bot = register(ckpt, tmp_path, "bot")
        die_before_deleting(ckpt, bot)
        program = (
            "import sys, time; sys.path.insert(0, 'tests'); from pathlib import Path; import tiny\n"
            f"with tiny.open_registry(Path({str(home)!r})) as ckpt, ckpt.workspace.sweeping():\n"
            "    print('alone', flush=True); sys.stdin.read()\n"
        )
        root = Path(__file__).parents[1]
        with subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
        ) as paused:
            assert paused.stdout is not None
            assert paused.stdout.readline() == b"alone\n"
            registered: list[Checkpoint] = []
            waiting = threading.Thread(target=lambda: registered.append(register(ckpt, tmp_path, "bot")))
            waiting.start()
            time.sleep(0.3)
            assert waiting.is_alive()
            paused.kill()
            waiting.join(120)
        assert digests(registered[0]) <= blobs(ckpt)
        assert ckpt.sweep(grace=NOW) == Swept()


@contextmanager
def running(*works: Callable[[threading.Event], None]) -> Iterator[threading.Event]:
    """Threads that work until the block ends; what they raise comes out of it. Gives what is set when one has failed."""
    done, failures = threading.Event(), list[Exception]()

    def work(do: Callable[[threading.Event], None]) -> None:
        try:
            while not done.is_set():
                do(done)
        except Exception as failure:  # noqa: BLE001 - raised again where the threads end
            failures.append(failure)
            done.set()

    threads = [threading.Thread(target=work, args=(each,)) for each in works]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def test_sweeping_without_pause_and_grace_while_others_register_and_remove(opener: Opener, tmp_path: Path) -> None:
    """Whatever the order of things: no row without its blob, and who was told that it is recorded can have it back."""
    base = tiny.write_base(tmp_path / "base")
    places = [tiny.write_adapter(tmp_path / f"bot-{number}", base=base, seed=number) for number in range(8)]
    with opener() as ckpt:
        ckpt.add_base(str(base))
    acknowledged: dict[str, Checkpoint] = {}
    came, went, swept = list[Checkpoint](), list[Checkpoint](), list[Swept]()

    def sweep(done: threading.Event) -> None:
        with opener() as sweeping:
            while not done.is_set():
                with suppress(Conflict):  # who records may just be finishing what another sweep has begun
                    swept.append(sweeping.sweep(grace=NOW))

    def come_and_go(own: list[Path], seed: int) -> Callable[[threading.Event], None]:
        random = Random(seed)

        def work(done: threading.Event) -> None:
            with opener() as ckpt:
                while not done.is_set():
                    place = random.choice(own)
                    if place.name in acknowledged and random.random() < 0.6:
                        went.append(acknowledged.pop(place.name))
                        ckpt.remove(went[-1])
                    else:
                        found = ckpt.register(str(place), Registration(base="base")).registered[0].checkpoint
                        acknowledged[place.name] = found
                        came.append(found)

        return work

    with running(sweep, come_and_go(places[:4], 1), come_and_go(places[4:], 2)) as done:
        while not done.wait(0.05) and (len(came) < 24 or len(went) < 12 or sum(each.blobs for each in swept) < 24):
            pass
    with opener() as ckpt:
        assert {each.ref for each in ckpt.checkpoints()} == {each.ref for each in acknowledged.values()}
        for each in acknowledged.values():
            ckpt.pull(each, tmp_path / "pulled" / each.ref)
        ckpt.sweep(grace=NOW)
        assert blobs(ckpt) == {digest for each in acknowledged.values() for digest in digests(each)}
        assert ckpt.history("store")
        with ckpt.workspace.reading() as catalog:
            catalog.events.verify()


def test_a_shipped_checkpoint_cannot_be_removed_and_so_not_be_swept(ckpt: Registry, bot: Checkpoint) -> None:
    ckpt.ship(bot, "production")
    with pytest.raises(InUse):
        ckpt.remove(bot)
    assert ckpt.sweep(grace=NOW) == Swept()
