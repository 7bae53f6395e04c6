"""Pulling: the exact bytes, complete and verified, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from registry.errors import Changed, Conflict, DamagedBlob, PathNotFound, StorageFailed
from registry.manifest import Checkpoint
from registry.service import Registry


@pytest.fixture
def bot(ckpt: Registry, tmp_path: Path) -> Checkpoint:
    adapter = tiny.write_adapter(tmp_path / "bot", base=tiny.write_base(tmp_path / "base"))
    (adapter / "extra" / "deep").mkdir(parents=True)
    (adapter / "extra" / "deep" / "empty.txt").touch()
    return ckpt.register(str(adapter)).registered[0].checkpoint


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "place"


def blob(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    """The blob of the last file that is pulled with bytes in it."""
    entry = next(entry for entry in checkpoint.manifest.files if entry.path == "adapter_model.safetensors")
    return tmp_path / "home/store/blobs" / entry.digest.hex[:2] / entry.digest.hex


def test_a_checkpoint_comes_back_byte_by_byte(ckpt: Registry, bot: Checkpoint, target: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    ckpt.pull(bot, target, lambda what, *counts: done.append(counts))
    assert tiny.contents(target) == tiny.contents(tmp_path / "bot")
    total = bot.manifest.size_bytes
    assert (sum(count for count, _ in done), {each for _, each in done}) == (total, {total})
    assert [path.name for path in target.parent.iterdir()] == ["place"]


def test_what_was_pulled_is_the_same_checkpoint(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    ckpt.pull(bot, tmp_path / "elsewhere" / "bot")
    (again,) = ckpt.register(str(tmp_path / "elsewhere" / "bot")).registered
    assert (again.created, again.checkpoint) == (False, bot)


def test_an_empty_folder_is_taken(
    ckpt: Registry, bot: Checkpoint, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.mkdir(parents=True)
    monkeypatch.chdir(target)
    ckpt.pull(bot, Path("."))
    assert "adapter_config.json" in tiny.contents(target)


def test_a_place_that_is_taken_is_refused(ckpt: Registry, bot: Checkpoint, target: Path) -> None:
    target.mkdir(parents=True)
    (target / "mine").write_text("mine")
    for place in (target, target / "mine"):
        with pytest.raises(Conflict):
            ckpt.pull(bot, place)
    assert tiny.contents(target.parent) == {"place/mine": b"mine"}


def test_what_lies_beside_the_target_stays(ckpt: Registry, bot: Checkpoint, target: Path) -> None:
    partial = target.with_name("place.partial")  # of an interrupted merge, perhaps
    partial.mkdir(parents=True)
    (partial / "work").write_text("hours")
    ckpt.pull(bot, target)
    assert (partial / "work").read_text() == "hours"


@pytest.mark.parametrize(("data", "error"), [(b"damaged", Changed), (None, DamagedBlob)])
def test_a_damaged_blob_leaves_nothing(
    ckpt: Registry, bot: Checkpoint, target: Path, tmp_path: Path, data: bytes | None, error: type[Exception]
) -> None:
    if data is None:
        blob(tmp_path, bot).unlink()
    else:
        blob(tmp_path, bot).write_bytes(data)
    with pytest.raises(error):
        ckpt.pull(bot, target)
    assert not tiny.contents(target.parent)


def test_a_place_below_a_file_is_a_failure_of_the_storage(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed):
        ckpt.pull(bot, tmp_path / "file" / "below")


def test_a_merged_model_comes_from_wherever_it_still_lies(
    ckpt: Registry, bot: Checkpoint, target: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    merged = ckpt.merge(ckpt.plan(bot), out=str(out)).merged
    ckpt.pull(merged, target)
    assert tiny.contents(target) == tiny.contents(out)

    (out / "model.safetensors").unlink()
    with pytest.raises(PathNotFound):
        ckpt.pull(merged, tmp_path / "second")
    stored = ckpt.merge(ckpt.plan(bot)).merged
    ckpt.pull(stored, tmp_path / "second")
    assert tiny.contents(tmp_path / "second") == tiny.contents(target)


def test_a_merged_model_that_was_changed_where_it_lies_is_noticed(
    ckpt: Registry, bot: Checkpoint, target: Path, tmp_path: Path
) -> None:
    merged = ckpt.merge(ckpt.plan(bot), out=str(tmp_path / "merged")).merged
    config = tmp_path / "merged" / "config.json"
    config.write_bytes(config.read_bytes().replace(b"llama", b"LLAMA"))
    with pytest.raises(Changed):
        ckpt.pull(merged, target)
    assert not tiny.contents(target.parent)
