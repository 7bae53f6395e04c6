"""Base models: identified by weights, recorded by place, found from what an adapter's files say, and refused once they changed."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load_file, save_file

from registry import Settings, connect
from registry.base_models import check_reachable
from registry.errors import (
    BaseChanged,
    Changed,
    Conflict,
    CorruptFile,
    DamagedBlob,
    InvalidReference,
    NameTaken,
    NotACheckpoint,
    PathNotFound,
    Refused,
    UnknownBase,
    Unreachable,
)
from registry.manifest import Checkpoint, Finding, Level
from registry.registering import Registration
from registry.service import Registry


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "models" / "llama")


@pytest.fixture
def bot(ckpt: Registry, base: Path, tmp_path: Path) -> Checkpoint:
    """A checkpoint trained on the base."""
    return ckpt.register(str(tiny.write_adapter(tmp_path / "bot", base=base))).registered[0].checkpoint


def change_weights(folder: Path, name: str = "lm_head.weight") -> None:
    """Change one value, as a second training would."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] + np.float32(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def touch(path: Path) -> None:
    """A new time, the same bytes: what copying or unpacking does."""
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))


def refused(ckpt: Registry, checkpoint: Checkpoint, base: str = "") -> dict[str, Finding]:
    findings = ckpt.check(checkpoint, base).findings
    return {finding.code: finding for finding in findings if finding.level is Level.REFUSED}


# -- adding


def test_a_base_is_recorded_with_place_name_and_facts(ckpt: Registry, base: Path) -> None:
    added = ckpt.add_base(str(base), arch_version="v2")
    assert added.created
    assert (added.base.name, added.base.url, added.base.in_store) == ("llama", str(base), False)
    assert (added.base.arch_version, added.base.author, added.base.config["model_type"]) == ("v2", "ada", "llama")
    assert {file.path for file in added.base.files} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert added.base.parameters == sum(array.size for array in tiny.base_tensors().values())
    assert ckpt.base("llama") == ckpt.base(added.base.digest.hex[:6]) == added.base


def test_adding_it_again_changes_nothing(ckpt: Registry, base: Path) -> None:
    first = ckpt.add_base(str(base)).base
    again = ckpt.add_base(base.as_uri(), name="llama")
    assert (again.created, again.base) == (False, first)
    assert [event.action for event in ckpt.history("llama")] == ["base.add"]


def test_sharding_and_file_names_do_not_matter(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    first = ckpt.add_base(str(base)).base
    sharded = ckpt.add_base(str(tiny.write_base(tmp_path / "sharded", shards=3)))
    assert not sharded.created
    assert sharded.base.fingerprint == first.fingerprint
    assert (sharded.base.name, sharded.base.url) == ("llama", str(tmp_path / "sharded"))


def test_a_renamed_folder_moves_the_base(ckpt: Registry, bot: Checkpoint, base: Path) -> None:
    moved = base.rename(base.with_name("moved"))
    with pytest.raises(PathNotFound):
        ckpt.check(bot)
    assert ckpt.add_base(str(moved)).base.url == str(moved)
    assert not refused(ckpt, bot)
    assert ckpt.history("llama")[-1].detail["url"] == str(moved)


def test_other_weights_cannot_take_a_name(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    ckpt.add_base(str(base))
    other = tiny.write_base(tmp_path / "other" / "llama", seed=1)
    with pytest.raises(NameTaken):
        ckpt.add_base(str(other), name="llama")
    assert ckpt.add_base(str(other)).base.name.startswith("llama-")


def test_known_weights_cannot_take_a_second_name(ckpt: Registry, base: Path) -> None:
    ckpt.add_base(str(base))
    with pytest.raises(Conflict):
        ckpt.add_base(str(base), name="other")


def test_the_same_weights_with_another_configuration_are_refused(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    ckpt.add_base(str(base))
    with pytest.raises(Conflict, match="configuration"):
        ckpt.add_base(str(tiny.write_base(tmp_path / "other", config={"num_attention_heads": 2})))


def test_an_architecture_version_is_given_once(ckpt: Registry, base: Path) -> None:
    ckpt.add_base(str(base))
    assert ckpt.add_base(str(base), arch_version="v1").base.arch_version == "v1"
    assert ckpt.add_base(str(base)).base.arch_version == "v1"
    with pytest.raises(Conflict, match="v1"):
        ckpt.add_base(str(base), arch_version="v2")


@pytest.mark.parametrize("name", ["a/b/c", "../x", "deadbeef", "a b"])
def test_a_name_is_checked_before_anything_is_read(ckpt: Registry, base: Path, name: str) -> None:
    with pytest.raises(InvalidReference):
        ckpt.add_base(str(base), name=name)
    assert not ckpt.bases()


def test_what_is_no_base_model_says_why(ckpt: Registry, tmp_path: Path) -> None:
    empty, pickled = tmp_path / "empty", tmp_path / "pickled"
    empty.mkdir()
    pickled.mkdir()
    (pickled / "pytorch_model.bin").touch()
    for place, reason in (
        (empty, "empty"),
        (pickled, "safetensors"),
        (tiny.write_adapter(tmp_path / "a"), "an adapter"),
    ):
        with pytest.raises(NotACheckpoint, match=reason):
            ckpt.add_base(str(place))
    with pytest.raises(PathNotFound):
        ckpt.add_base(str(tmp_path / "nothing"))


def test_a_truncated_shard_is_corrupt(ckpt: Registry, base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptFile):
        ckpt.add_base(str(base))
    assert not ckpt.bases()


def test_a_base_may_lie_behind_a_url(ckpt: Registry, base: Path) -> None:
    memory, url = MemoryFileSystem(), "memory://bases/far"
    memory.put(str(base), "/bases/far", recursive=True)
    try:
        added = ckpt.add_base(url)
        assert (added.base.name, added.base.url) == ("far", url)
        assert ckpt.add_base(str(base)).base.fingerprint == added.base.fingerprint
    finally:
        memory.rm("/bases", recursive=True)


def test_progress_counts_every_byte_of_the_weights(ckpt: Registry, base: Path) -> None:
    done: list[int] = []
    for times in (1, 2):  # the second time they come from the cache
        added = ckpt.add_base(str(base), progress=lambda what, count, total: done.append(count))
        assert sum(done) == times * added.base.size_bytes


def test_files_are_closed_after_use(ckpt: Registry, bot: Checkpoint) -> None:
    ckpt.merge(ckpt.plan(bot))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        ckpt.verify_base(ckpt.base("llama"))
        ckpt.check(bot)
        ckpt.add_base(ckpt.base("llama").url)
    assert len(os.listdir("/proc/self/fd")) == before


# -- copies in the store


def test_a_copy_outlives_the_original_and_is_merged_from(
    ckpt: Registry, bot: Checkpoint, base: Path, tmp_path: Path
) -> None:
    from_original = ckpt.merge(ckpt.plan(bot), out=str(tmp_path / "one")).merged
    copied = ckpt.add_base(str(base), copy=True)
    assert (copied.created, copied.base.in_store, copied.base.name) == (False, True, "llama")
    shutil.rmtree(base)
    assert ckpt.verify_base(copied.base).is_intact
    ckpt.merge(ckpt.plan(bot), out=str(tmp_path / "two"))
    assert tiny.contents(tmp_path / "one") == tiny.contents(tmp_path / "two")
    assert [merged.digest for merged in ckpt.merged()] == [from_original.digest]


def test_a_copy_stays_the_place_to_read_from(ckpt: Registry, base: Path) -> None:
    copied = ckpt.add_base(str(base), copy=True).base
    assert ckpt.add_base(str(base)).base == copied == ckpt.add_base(str(base), copy=True).base


def test_a_copy_with_a_missing_blob_is_damaged(ckpt: Registry, bot: Checkpoint, base: Path, tmp_path: Path) -> None:
    copied = ckpt.add_base(str(base), copy=True).base
    weights = next(file for file in copied.files if file.path == "model.safetensors")
    next((tmp_path / "home/store/blobs").glob(f"*/{weights.identity.removeprefix('blake3:')}")).unlink()
    with pytest.raises(DamagedBlob):
        ckpt.check(bot)
    assert ckpt.add_base(str(base), copy=True).base == copied
    assert not refused(ckpt, bot)


def test_a_base_that_changes_while_it_is_copied_is_not_recorded(ckpt: Registry, base: Path) -> None:
    def overwrite(what: str, done_bytes: int, total_bytes: int) -> None:
        touch(base / "config.json")

    with pytest.raises(Changed):
        ckpt.add_base(str(base), copy=True, progress=overwrite)
    assert not ckpt.bases()


# -- changes


def test_verifying_names_the_tensors_that_differ(ckpt: Registry, base: Path) -> None:
    known = ckpt.add_base(str(base)).base
    assert ckpt.verify_base(known).is_intact
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, base / "model.safetensors")
    found = ckpt.verify_base(known)
    assert (found.different, found.missing, found.unexpected) == (
        ("lm_head.weight",),
        ("model.norm.weight",),
        ("extra",),
    )
    assert not found.is_intact


def test_a_touched_base_is_the_same_and_remembered(ckpt: Registry, bot: Checkpoint, base: Path) -> None:
    touch(base / "model.safetensors")
    assert not refused(ckpt, bot)
    identities = {file.path: file.identity for file in ckpt.base("llama").files}
    assert identities["model.safetensors"].endswith(":1000000000")


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja"])
def test_a_new_tokenizer_is_no_change_of_the_model(ckpt: Registry, bot: Checkpoint, base: Path, file: str) -> None:
    (base / file).write_text('{"model": {"vocab": {"other": 3}}}')
    assert not refused(ckpt, bot)
    assert (base / file).stat().st_size in {each.size_bytes for each in ckpt.base("llama").files if each.path == file}


def test_a_changed_base_is_refused(ckpt: Registry, bot: Checkpoint, base: Path) -> None:
    change_weights(base)
    finding = refused(ckpt, bot)["base_changed"]
    assert finding.where == f"{base}/model.safetensors"
    with pytest.raises(Refused):
        ckpt.plan(bot)


def test_an_added_shard_is_a_change(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").rename(base / "part-1.safetensors")
    bot = ckpt.register(str(tiny.write_adapter(tmp_path / "bot", base=base))).registered[0].checkpoint
    save_file({"extra": np.zeros(3, np.float32)}, base / "part-2.safetensors")
    assert refused(ckpt, bot)["base_changed"].where.endswith("part-2.safetensors")


def test_a_configuration_of_another_shape_is_a_change(ckpt: Registry, bot: Checkpoint, base: Path) -> None:
    tiny.write_json(base / "config.json", {**tiny.CONFIG, "num_attention_heads": 2})
    assert refused(ckpt, bot)["base_changed"].where == f"{base}/config.json"


def test_a_change_behind_an_unchanged_identity_stops_the_merge(
    ckpt: Registry, bot: Checkpoint, base: Path, tmp_path: Path
) -> None:
    planned, weights = ckpt.plan(bot), base / "model.safetensors"
    status, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    with weights.open("r+b") as file:
        file.write(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BaseChanged):
        ckpt.merge(planned, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not ckpt.merged()


def test_another_base_is_refused_whatever_it_is_called(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "elsewhere" / "llama", seed=1)
    finding = refused(ckpt, bot, str(other))["base_weights"]
    assert bot.base.short in finding.expected
    assert not refused(ckpt, bot, str(tiny.write_base(tmp_path / "same", shards=2)))


# -- finding


def base_of(ckpt: Registry, adapter: Path, base: str = "") -> str:
    return ckpt.register(str(adapter), Registration(base=base)).registered[0].checkpoint.base_name


def test_a_base_beside_the_adapter_is_found_from_a_relative_path(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    assert base_of(ckpt, tiny.write_adapter(tmp_path / "runs" / "one", base="models/llama")) == "llama"
    assert base_of(ckpt, tiny.write_adapter(tmp_path / "runs" / "two", base="../models/llama", seed=2)) == "llama"


def test_a_base_is_found_from_the_current_folder(
    ckpt: Registry, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    assert base_of(ckpt, tiny.write_adapter(tmp_path / "a/b/c/d/e", base="llama")) == "llama"


def test_a_base_is_found_by_the_name_it_was_registered_under(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    ckpt.add_base(str(base), name="meta/llama")
    assert base_of(ckpt, tiny.write_adapter(tmp_path / "bot", base="meta/llama")) == "meta/llama"
    assert base_of(ckpt, tiny.write_adapter(tmp_path / "two", base="gone", seed=2), "meta/llama") == "meta/llama"
    assert base_of(ckpt, tiny.write_adapter(tmp_path / "three", base="gone", seed=3), str(base)) == "meta/llama"


def test_a_base_is_found_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--meta--llama"
    tiny.write_base(cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    with connect(
        Settings.from_environment({"CKPT_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "hub")})
    ) as ckpt:
        assert base_of(ckpt, tiny.write_adapter(tmp_path / "bot", base="meta/llama")) == "meta/llama"


def test_a_litgpt_base_is_found_beside_the_run(ckpt: Registry, tmp_path: Path) -> None:
    tiny.write_litgpt_base(tmp_path / "checkpoints" / "meta" / "llama")
    assert base_of(ckpt, tiny.write_litgpt_run(tmp_path / "out" / "run", base="checkpoints/meta/llama")) == "llama"


@pytest.mark.parametrize(
    "name", ["lama", "meta/llama", "", "/nowhere/llama", "x" * 5000, "../../etc", "a\0b", "~nobody-by-this-name"]
)
def test_a_base_that_is_nowhere_is_unknown(ckpt: Registry, base: Path, tmp_path: Path, name: str) -> None:
    ckpt.add_base(str(base))
    with pytest.raises(UnknownBase):
        ckpt.register(str(tiny.write_adapter(tmp_path / "far/away/from/it", base=name)))
    assert not ckpt.checkpoints()


def test_similar_names_are_offered(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    ckpt.add_base(str(base))
    adapter = tiny.write_adapter(tmp_path / "bot", base=base)
    with pytest.raises(UnknownBase) as caught:
        ckpt.register(str(adapter), Registration(base="lama"))
    assert caught.value.near == ("llama",)


@pytest.mark.parametrize(
    ("url", "in_store", "is_reachable"),
    [
        ("/home/ada/llama", False, False),
        ("file:///home/ada/llama", False, False),
        ("local:///home/ada/llama", False, False),
        ("memory://llama", False, False),
        ("s3://models/llama", False, True),
        ("https://models.example/llama", False, True),
        ("/home/ada/llama", True, True),
    ],
)
def test_a_team_merges_only_into_bases_that_all_its_machines_can_read(
    ckpt: Registry, base: Path, url: str, in_store: bool, is_reachable: bool
) -> None:
    found = replace(ckpt.add_base(str(base)).base, url=url, in_store=in_store)
    alone = ckpt.settings
    team = replace(alone, database_url="postgresql://db/registry")
    check_reachable(alone, found)
    with nullcontext() if is_reachable else pytest.raises(Unreachable):
        check_reachable(team, found)
