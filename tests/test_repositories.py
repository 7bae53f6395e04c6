"""Repositories: what ids and revisions mean, commits and tags that never mean other bytes, and the bytes themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from registry.errors import (
    Ambiguous,
    BaseChanged,
    Conflict,
    InUse,
    InvalidInput,
    PathNotFound,
    UnknownMetric,
    UnknownRepository,
    UnknownRevision,
    Unreachable,
)
from registry.manifest import BaseModel, Checkpoint, Metric
from registry.mixing import Mixture
from registry.registering import Registration
from registry.repository_ids import recipe_alone
from registry.results import Repository
from registry.service import Registry

Add = Callable[..., Checkpoint]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def known(ckpt: Registry, tmp_path: Path) -> BaseModel:
    """A base model outside the store, in two files."""
    return ckpt.add_base(str(tiny.write_base(tmp_path / "base", shards=2)), name="tiny-llama").base


@pytest.fixture
def add(ckpt: Registry, known: BaseModel, tmp_path: Path) -> Add:
    """Registers a new checkpoint; of `bot` unless told otherwise."""
    seeds = iter(range(1, 100))

    def register(adapter: str = "bot", *, config: dict[str, object] | None = None, **said: object) -> Checkpoint:
        seed = next(seeds)
        place = tiny.write_adapter(tmp_path / f"adapter-{seed}", base=known.url, seed=seed, config=config)
        wanted = Registration(adapter=adapter, base="tiny-llama", **said)  # type: ignore[arg-type]
        return ckpt.register(str(place), wanted).registered[0].checkpoint

    return register


def files_of(ckpt: Registry, repository: Repository) -> dict[str, bytes]:
    """Every file, whole; checks its size."""
    found = {each.path: joined(ckpt, repository, each.path) for each in repository.files}
    assert {path: len(data) for path, data in found.items()} == {
        each.path: each.size_bytes for each in repository.files
    }
    return found


def joined(ckpt: Registry, repository: Repository, path: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(bytes(piece) for piece in ckpt.read_file(repository, path, start, end))


def merged_by_hand(
    ckpt: Registry, target: Path, *checkpoints: Checkpoint, mixture: Mixture | None = None
) -> dict[str, bytes]:
    ckpt.merge(ckpt.plan(*checkpoints, mixture=mixture), out=str(target))
    found = tiny.contents(target)
    del found["merge.json"]
    return found


# -- adapters


def test_an_adapter_is_its_newest_checkpoint(ckpt: Registry, add: Add) -> None:
    first, second = add(), add()
    found = ckpt.repository("bot")
    assert (found.id, found.kind, found.commit) == ("bot", "adapter", second.digest.hex[:40])
    assert (found.checkpoints, found.base, found.is_stored, found.recipe) == (("bot@v2",), "tiny-llama", True, None)
    assert (found.created_at, found.author) == (second.created_at, "ada")
    assert ckpt.repository("bot", "v1").commit == first.digest.hex[:40]
    assert files_of(ckpt, found) == tiny.contents(Path(second.source))


def test_tags_are_sha256_of_weights_and_40_digits_of_others(ckpt: Registry, add: Add) -> None:
    entries = {each.path: each for each in add().manifest.files}
    tags = {each.path: (each.etag, each.sha256) for each in ckpt.repository("bot").files}
    assert tags[WEIGHTS] == (entries[WEIGHTS].sha256, entries[WEIGHTS].sha256)
    assert tags["adapter_config.json"] == (entries["adapter_config.json"].digest.hex[:40], "")


def test_every_way_to_ask_for_a_checkpoint_is_a_revision(ckpt: Registry, add: Add) -> None:
    first = add("team/bot", run="slow", step=500, metrics=(Metric(name="eval_loss", value=0.1),))
    add("team/bot", run="fast", step=100, metrics=(Metric(name="eval_loss", value=0.2),))
    ckpt.set_alias(first, "candidate")
    ckpt.ship(first, "production")
    hexed = first.digest.hex
    asked = ["v1", "candidate", "production", "step:500", "run:slow", "run:1", "best:eval_loss", "best"]
    for revision in (*asked, hexed[:6], hexed[:40], hexed):
        assert ckpt.repository("team/bot", revision).commit == hexed[:40], revision
        assert ckpt.repository("team/bot-merged", revision).checkpoints == ("team/bot@v1",), revision
    assert ckpt.repository("team/bot", "latest").checkpoints == ("team/bot@v2",)


def test_no_other_revision_answers(ckpt: Registry, add: Add) -> None:
    add(step=1)
    odd = ["v9", "nothing", "refs/pr/1", "step:7", "f" * 40, "abcdef0", "", "a@b", "run:x"]
    for id_, revision in product(["bot", "bot-merged", "bot-v1", "bot-v1-merged", "tiny-llama"], odd):
        with pytest.raises(UnknownRevision):
            ckpt.repository(id_, revision)


def test_revisions_that_cannot_be_told(ckpt: Registry, add: Add) -> None:
    add()
    with pytest.raises(UnknownMetric):
        ckpt.repository("bot", "best:loss")
    ckpt.set_alias(add(), "candidate")
    with pytest.raises(UnknownRevision) as unknown:
        ckpt.repository("bot", "candidat")
    assert unknown.value.near == ("candidate",)


def test_an_alias_called_main_is_main(ckpt: Registry, add: Add) -> None:
    first = add()
    add()
    ckpt.set_alias(first, "main")
    assert ckpt.repository("bot").checkpoints == ("bot@v1",)
    assert ckpt.repository("bot-merged").checkpoints == ("bot@v1",)


def test_a_version_alone_answers_to_main_and_its_commit(ckpt: Registry, add: Add) -> None:
    first, second = add(), add()
    alone = ckpt.repository("bot-v1")
    assert (alone.kind, alone.checkpoints, alone.commit) == ("adapter", ("bot@v1",), first.digest.hex[:40])
    assert ckpt.repository("bot-v1", alone.commit) == alone
    merged = ckpt.repository("bot-v1-merged")
    assert ckpt.repository("bot-v1-merged", merged.commit) == merged
    assert merged.commit == ckpt.repository("bot-merged", "v1").commit
    for revision in (second.digest.hex[:40], "v1"):
        with pytest.raises(UnknownRevision):
            ckpt.repository("bot-v1", revision)
    with pytest.raises(UnknownRepository):
        ckpt.repository("bot-v3")


# -- base models


@pytest.mark.parametrize("copy", [False, True])
def test_a_base_model_is_its_files(ckpt: Registry, tmp_path: Path, copy: bool) -> None:
    place = tiny.write_base(tmp_path / "base", shards=2)
    base = ckpt.add_base(str(place), name="org/tiny", copy=copy).base
    found = ckpt.repository("org/tiny")
    assert (found.kind, found.base, found.checkpoints, len(found.commit)) == ("base", "org/tiny", (), 40)
    wanted, index = tiny.contents(place), "model.safetensors.index.json"
    files = files_of(ckpt, found)
    assert json.loads(files.pop(index))["weight_map"] == json.loads(wanted.pop(index))["weight_map"]
    assert files == wanted
    assert joined(ckpt, found, index, 5, 30) == joined(ckpt, found, index)[5:30]
    assert ckpt.repository(f"base-{base.digest.short}", found.commit).files == found.files
    assert ckpt.repository("org/tiny").commit == found.commit
    assert all(len(each.etag) == 40 for each in found.files)
    assert joined(ckpt, found, "config.json", 3, 9) == (place / "config.json").read_bytes()[3:9]


def test_a_base_model_answers_to_what_its_adapters_answer_to(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    checkpoint = add("team/bot", run="slow", step=5, metrics=(Metric(name="eval_loss", value=0.1),))
    ckpt.set_alias(checkpoint, "candidate")
    ckpt.ship(checkpoint, "production")
    hexed = checkpoint.digest.hex
    for revision in (
        "v1",
        "candidate",
        "production",
        "step:5",
        "run:slow",
        "best:eval_loss",
        "best",
        hexed[:8],
        hexed[:40],
    ):
        assert ckpt.repository("tiny-llama", revision).base == "tiny-llama"
        with pytest.raises(UnknownRevision):
            ckpt.repository("tiny-llama", revision, namespaces=["other"])
    for revision in ("v2", "best:accuracy", "step:6", "run:fast"):
        with pytest.raises(UnknownRevision):
            ckpt.repository("tiny-llama", revision)
    ckpt.add_base(str(tiny.write_base(tmp_path / "other", seed=5)), name="other")
    with pytest.raises(UnknownRevision):
        ckpt.repository("other", "v1")


def test_a_base_models_file_that_is_another_is_not_given(ckpt: Registry, known: BaseModel) -> None:
    found, path = ckpt.repository("tiny-llama"), Path(known.url) / "tokenizer.json"
    reading = ckpt.read_file(found, "tokenizer.json")
    path.write_text('{"other": true}')
    with pytest.raises(BaseChanged):
        list(reading)
    with pytest.raises(BaseChanged):
        ckpt.read_file(found, "tokenizer.json")
    path.unlink()
    with pytest.raises(BaseChanged):
        ckpt.read_file(found, "tokenizer.json")
    ckpt.add_base(known.url)
    with pytest.raises(UnknownRevision):
        ckpt.repository("tiny-llama", found.commit)
    Path(known.url).rename(f"{known.url}-elsewhere")
    with pytest.raises(Unreachable):
        ckpt.read_file(ckpt.repository("tiny-llama"), "config.json")


# -- merged models


def test_a_merged_model_that_is_nowhere_has_the_bytes_of_the_merge(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    checkpoint = add()
    found = ckpt.repository("bot-merged")
    assert (found.kind, found.is_stored, found.base, found.checkpoints) == ("merged", False, "tiny-llama", ("bot@v1",))
    wanted = merged_by_hand(ckpt, tmp_path / "merged", checkpoint)
    assert files_of(ckpt, found) == wanted
    path = "model-00001-of-00002.safetensors"
    assert joined(ckpt, found, path, 100, 5000) == wanted[path][100:5000]
    assert joined(ckpt, found, path, 100) == wanted[path][100:]
    assert joined(ckpt, found, path, 10**9) == b""
    assert (
        found.recipe
        == recipe_alone(checkpoint.base, checkpoint.digest).digest
        == ckpt.plan(checkpoint).plan.recipe.digest
    )


def test_a_stored_copy_is_sent_under_the_same_names(ckpt: Registry, add: Add, known: BaseModel) -> None:
    checkpoint = add()
    virtual = ckpt.repository("bot-merged")
    before = files_of(ckpt, virtual)
    ckpt.merge(ckpt.plan(checkpoint))
    stored = ckpt.repository("bot-merged", virtual.commit)
    assert stored.is_stored
    assert (stored.commit, stored.files) == (virtual.commit, virtual.files)
    assert files_of(ckpt, virtual) == before
    Path(known.url).rename(f"{known.url}-gone")  # it is not needed any more
    assert files_of(ckpt, ckpt.repository("bot-merged")) == before


def test_a_model_merged_elsewhere_is_computed(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    wanted = merged_by_hand(ckpt, tmp_path / "merged", add())
    found = ckpt.repository("bot-merged")
    assert not found.is_stored
    assert files_of(ckpt, found) == wanted
    assert files_of(ckpt, ckpt.repository(f"merged-{found.recipe.short}")) == wanted  # type: ignore[union-attr]


def test_a_base_model_that_was_only_touched_is_read_anew(ckpt: Registry, add: Add, known: BaseModel) -> None:
    add()
    before = ckpt.repository("bot-merged")
    wanted = files_of(ckpt, before)
    os.utime(Path(known.url) / "model-00001-of-00002.safetensors", (1, 1))
    with pytest.raises(UnknownRevision):
        ckpt.repository("bot-merged", before.commit)
    after = ckpt.repository("bot-merged")
    assert after.commit != before.commit
    assert {each.etag for each in after.files}.isdisjoint(each.etag for each in before.files)
    assert files_of(ckpt, after) == wanted
    with pytest.raises((UnknownRevision, BaseChanged)):  # an old one is never answered with what is there now
        list(ckpt.read_file(before, "config.json"))


def test_a_base_model_that_is_another_now_merges_no_more(ckpt: Registry, add: Add, known: BaseModel) -> None:
    add()
    before = ckpt.repository("bot-merged")
    place = Path(known.url) / "model-00001-of-00002.safetensors"
    tensors = {name: np.asarray(data + 1) for name, data in load_file(place).items()}
    save_file(tensors, place, metadata={"format": "pt"})
    with pytest.raises(BaseChanged):
        list(ckpt.read_file(before, place.name))
    with pytest.raises(UnknownRepository, match="another one") as unknown:
        ckpt.repository("bot-merged")
    assert unknown.value.reason
    Path(known.url).rename(f"{known.url}-gone")
    with pytest.raises(Unreachable):
        ckpt.repository("bot-merged")


def test_what_cannot_be_merged_has_no_merged_repository(ckpt: Registry, known: BaseModel, tmp_path: Path) -> None:
    place = tiny.write_adapter(tmp_path / "prompt", base=known.url)
    config = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": known.url, "num_virtual_tokens": 4}
    tiny.write_json(place / "adapter_config.json", config)
    save_file({"prompt_embeddings": np.zeros((4, tiny.WIDTH), np.float32)}, place / WEIGHTS, metadata={"format": "pt"})
    ckpt.register(str(place), Registration(adapter="prompt", base="tiny-llama"))
    assert ckpt.repository("prompt").kind == "adapter"
    with pytest.raises(UnknownRepository) as unknown:
        ckpt.repository("prompt-merged")
    assert "virtual tokens" in unknown.value.reason
    assert [line.id for line in ckpt.repositories("prompt")] == ["prompt"]


def test_what_would_change_nothing_has_no_merged_repository(ckpt: Registry, known: BaseModel, tmp_path: Path) -> None:
    place = tiny.write_adapter(tmp_path / "zero", base=known.url)
    zeros = {
        name: np.zeros_like(data) if "lora_B" in name else data for name, data in load_file(place / WEIGHTS).items()
    }
    save_file(zeros, place / WEIGHTS, metadata={"format": "pt"})
    ckpt.register(str(place), Registration(adapter="zero", base="tiny-llama"))
    with pytest.raises(UnknownRepository) as unknown:
        ckpt.repository("zero-merged")
    assert unknown.value.reason


def test_the_bytes_of_a_removed_checkpoint_are_not_there(ckpt: Registry, add: Add) -> None:
    found = ckpt.repository("bot", add().digest.hex[:40])
    ckpt.remove(ckpt.resolve("bot"))
    with pytest.raises(UnknownRepository):
        ckpt.repository("bot")
    with pytest.raises(PathNotFound):
        ckpt.read_file(found, "nothing.txt")


# -- recipes


@pytest.mark.parametrize(
    "mixture",
    [
        None,
        Mixture(method="linear", weights=(0.7, 0.3)),
        Mixture(method="ties", weights=(0.7, 0.3), options={"density": 0.5}),
        Mixture(method="slerp", options={"t": 0.3}),
        Mixture(method="dare_linear", options={"density": 0.5, "seed": 3}),
    ],
)
def test_a_recipe_is_kept_and_its_model_computed(
    ckpt: Registry, add: Add, tmp_path: Path, mixture: Mixture | None
) -> None:
    one, other = add("math"), add("code")
    saved = ckpt.save_recipe(ckpt.plan(one, other, mixture=mixture), "for later")
    recipe = ckpt.plan(one, other, mixture=mixture).plan.recipe
    assert (saved.id, saved.recipe) == (f"merged-{recipe.digest.short}", recipe.digest)
    assert (saved.is_stored, saved.checkpoints) == (False, ("math@v1", "code@v1"))
    assert ckpt.repository(saved.id, saved.commit) == saved
    (kept,) = ckpt.recipes()
    assert (kept.recipe, kept.checkpoints, kept.base) == (recipe, ("math@v1", "code@v1"), "tiny-llama")
    assert (kept.note, kept.author, kept.repository) == ("for later", "ada", saved.id)
    assert ckpt.merged() == []
    assert files_of(ckpt, saved) == merged_by_hand(ckpt, tmp_path / "merged", one, other, mixture=mixture)
    for revision in ("v1", recipe.digest.hex[:40], "0" * 40):
        with pytest.raises(UnknownRevision):
            ckpt.repository(saved.id, revision)


def test_a_recipe_is_kept_once_and_keeps_what_it_needs(ckpt: Registry, add: Add) -> None:
    one, other = add("math"), add("code")
    ckpt.save_recipe(ckpt.plan(one, other), "first")
    events = ckpt.history()
    assert (events[-1].action, events[-1].subject) == ("recipe.save", "math@v1")
    ckpt.save_recipe(ckpt.plan(one, other), "second")
    assert ckpt.history() == events
    assert [each.note for each in ckpt.recipes()] == ["first"]
    with pytest.raises(InUse, match="merged-"):
        ckpt.remove(other)


def test_a_recipe_that_was_carried_out_is_a_repository(ckpt: Registry, add: Add) -> None:
    merged = ckpt.merge(ckpt.plan(add("math"), add("code"))).merged
    found = ckpt.repository(f"merged-{merged.recipe.digest.short}")
    assert (found.is_stored, found.checkpoints, found.recipe) == (True, merged.checkpoints, merged.recipe.digest)
    assert found.id in [line.id for line in ckpt.repositories()]
    assert files_of(ckpt, found) == {
        entry.path: ckpt.workspace.store.open(entry.digest).read()
        for entry in merged.files
        if entry.path != "merge.json"
    }


# -- ids


def test_an_id_that_means_two_things_is_refused_with_ids_that_mean_one(
    ckpt: Registry, add: Add, tmp_path: Path
) -> None:
    add("bot")
    own = add("bot-merged")
    with pytest.raises(Conflict, match=r"bot-merged-vN.*bot-vN-merged"):
        ckpt.repository("bot-merged")
    assert ckpt.repository("bot-merged-v1").commit == own.digest.hex[:40]
    assert ckpt.repository("bot-v1-merged").kind == "merged"
    add("bot-v1")
    for id_ in ("bot-v1", "bot-v1-merged"):
        with pytest.raises(Conflict):
            ckpt.repository(id_)
    base = ckpt.add_base(str(tiny.write_base(tmp_path / "other", seed=9)), name="bot").base
    with pytest.raises(Conflict, match=f"base-{base.digest.short}"):
        ckpt.repository("bot")
    assert ckpt.repository(f"base-{base.digest.short}").base == "bot"
    with pytest.raises(Conflict):
        ckpt.repository_refs("bot")


def test_the_beginning_of_a_digest_may_be_that_of_several(ckpt: Registry, add: Add) -> None:
    checkpoints = [add() for _ in range(2)]
    with pytest.raises((Ambiguous, UnknownRevision)):
        ckpt.repository("bot", "0123456")
    assert ckpt.repository("bot", checkpoints[0].digest.hex[:10]).checkpoints == ("bot@v1",)


def test_what_is_outside_the_namespaces_does_not_exist(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    ours, theirs, nobodys = add("nlu/bot"), add("vision/bot"), add("nlu")
    saved = ckpt.save_recipe(ckpt.plan(ours, theirs))
    own = ckpt.save_recipe(ckpt.plan(ours))
    ckpt.add_base(str(tiny.write_base(tmp_path / "other", seed=9)), name="vision/bot")
    for id_ in ("nlu", "nlu-merged", "nlu-v1", saved.id):
        assert ckpt.repository(id_).id == id_
        with pytest.raises(UnknownRepository) as unknown:
            ckpt.repository(id_, namespaces=["nlu"])
        assert not [name for name in unknown.value.near if name.startswith("nlu") and "/" not in name]
    for id_ in ("nlu/bot", "nlu/bot-merged", "nlu/bot-v1-merged", own.id, "tiny-llama"):
        assert ckpt.repository(id_, namespaces=["nlu"]).id == id_
    assert ckpt.repository("vision/bot", namespaces=["nlu"]).kind == "base"
    with pytest.raises(Conflict):
        ckpt.repository("vision/bot")
    seen = {line.id for line in ckpt.repositories(namespaces=["nlu"])}
    assert seen == {"nlu/bot", "nlu/bot-merged", own.id, "tiny-llama", "vision/bot"}
    assert str(nobodys.adapter) in {line.id for line in ckpt.repositories()}


def test_nothing_is_guessed_of_an_unknown_id(ckpt: Registry, add: Add) -> None:
    add("support-bot")
    with pytest.raises(UnknownRepository) as unknown:
        ckpt.repository("suport-bot")
    assert unknown.value.near[0] == "support-bot"
    odd = [
        "",
        "-merged",
        "a b",
        "../x",
        "merged-0123456789ab",
        "base-0123456789ab",
        "x" * 200,
        "a/b/c",
        "k\u00f6nig",
        "-v1",
    ]
    for id_ in odd:
        with pytest.raises(UnknownRepository):
            ckpt.repository(id_)


# -- names and lists


def test_aliases_and_environments_are_branches_and_versions_are_tags(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    first, second = add(), add()
    for number in range(9):
        add(run=str(number))
    ckpt.set_alias(first, "candidate")
    ckpt.ship(second, "production")
    ckpt.ship(first, "production")
    found = {(each.kind, each.name): each.commit for each in ckpt.repository_refs("bot")}
    assert found["branch", "main"] == found["tag", "v11"] == ckpt.repository("bot").commit
    assert found["branch", "candidate"] == found["branch", "production"] == first.digest.hex[:40]
    assert [name for kind, name in found if kind == "tag"] == [f"v{number}" for number in range(1, 12)]
    for each in ckpt.repository_refs("bot-merged"):
        assert each.commit == ckpt.repository("bot-merged", each.name).commit
    for id_ in ("bot-v1", "bot-v1-merged", "tiny-llama"):
        (main,) = ckpt.repository_refs(id_)
        assert (main.name, main.kind, main.commit) == ("main", "branch", ckpt.repository(id_).commit)


def test_repositories_are_listed_latest_first(ckpt: Registry, add: Add) -> None:
    for name in ("bot", "team/helper", "bot"):
        add(name)
    lines = ckpt.repositories()
    assert [line.id for line in lines] == ["bot", "bot-merged", "team/helper", "team/helper-merged", "tiny-llama"]
    assert [line.kind for line in lines] == ["adapter", "merged", "adapter", "merged", "base"]
    assert [line.id for line in ckpt.repositories("HELPER-m")] == ["team/helper-merged"]
    assert [line.id for line in ckpt.repositories(limit=1)] == ["bot"]
    with pytest.raises(InvalidInput):
        ckpt.repositories(limit=0)
