"""Repositories and kept recipes, in all three ways to run a registry."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from cutting import Cut, bad_line
from sites import Maker, Site

from registry.errors import (
    Conflict,
    Forbidden,
    InUse,
    InvalidInput,
    PathNotFound,
    UnknownRecipe,
    UnknownRepository,
    UnknownRevision,
)
from registry.manifest import BaseModel
from registry.mixing import Mixture
from registry.registering import Registration
from registry.results import Repository
from registry.service import Registry

WEIGHTS = "model-00001-of-00002.safetensors"


def files_of(ckpt: Registry, repository: Repository) -> dict[str, bytes]:
    return {file.path: joined(ckpt, repository, file.path) for file in repository.files}


def joined(ckpt: Registry, repository: Repository, path: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(bytes(piece) for piece in ckpt.read_file(repository, path, start, end))


def test_everything_is_a_repository(ckpt: Registry, make: Maker, base: BaseModel, tmp_path: Path) -> None:
    one, two = make("team/bot", run="first", step=5), make("team/bot")
    ckpt.set_alias(one, "candidate")
    newest = ckpt.repository("team/bot")
    assert (newest.kind, newest.commit, newest.base) == ("adapter", two.digest.hex[:40], "base")
    assert files_of(ckpt, newest) == tiny.contents(Path(two.source))
    for revision in ("v1", "candidate", "step:5", one.digest.hex[:8], one.digest.hex[:40]):
        assert ckpt.repository("team/bot", revision).checkpoints == ("team/bot@v1",)
    assert ckpt.repository("team/bot-v1").commit == one.digest.hex[:40]
    own = ckpt.repository(f"base-{base.digest.short}", "candidate")
    assert (own.kind, own.commit) == ("base", ckpt.repository("base").commit)
    assert joined(ckpt, own, "config.json", 2, 8) == (tmp_path / "base/config.json").read_bytes()[2:8]
    assert [line.id for line in ckpt.repositories()] == ["team/bot", "team/bot-merged", "base"]
    assert [(line.id, line.kind) for line in ckpt.repositories("MERGED", limit=3)] == [("team/bot-merged", "merged")]
    refs = {(each.kind, each.name): each.commit for each in ckpt.repository_refs("team/bot")}
    assert refs["branch", "main"] == refs["tag", "v2"] == newest.commit
    assert refs["branch", "candidate"] == one.digest.hex[:40]


def test_a_merged_model_is_computed_while_it_is_read(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    checkpoint = make()
    found = ckpt.repository("bot-merged")
    assert (found.kind, found.is_stored, found.checkpoints) == ("merged", False, ("bot@v1",))
    assert ckpt.repository("bot-v1-merged", found.commit).files == found.files
    files = files_of(ckpt, found)
    assert {each.path: each.size_bytes for each in found.files} == {path: len(data) for path, data in files.items()}
    size = len(files[WEIGHTS])
    parts = [joined(ckpt, found, WEIGHTS, *part) for part in pairwise((0, 1, 700, 701, size - 3, size))]
    assert b"".join(parts) == files[WEIGHTS]
    assert joined(ckpt, found, WEIGHTS, 9, 9) == joined(ckpt, found, WEIGHTS, size + 5) == b""
    assert ckpt.merged() == []
    ckpt.merge(ckpt.plan(checkpoint), out=str(tmp_path / "merged"))
    wanted = tiny.contents(tmp_path / "merged")
    del wanted["merge.json"]
    assert files == wanted


def test_a_stored_merge_is_sent_under_the_same_names(ckpt: Registry, make: Maker, working: None) -> None:
    checkpoint = make()
    virtual = ckpt.repository("bot-merged")
    before = files_of(ckpt, virtual)
    ckpt.merge(ckpt.plan(checkpoint))
    stored = ckpt.repository("bot-merged", virtual.commit)
    assert (stored.is_stored, stored.files) == (True, virtual.files)
    assert files_of(ckpt, stored) == files_of(ckpt, virtual) == before


def test_a_recipe_is_kept_without_being_carried_out(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    one, other = make("math"), make("code")
    mixture = Mixture(method="ties", weights=(0.7, 0.3))
    planned = ckpt.plan(one, other, mixture=mixture)
    saved = ckpt.save_recipe(planned, "for later")
    recipe = planned.outline.recipe
    assert (saved.id, saved.recipe, saved.is_stored) == (f"merged-{recipe.digest.short}", recipe.digest, False)
    (kept,) = ckpt.recipes()
    assert (kept.recipe, kept.checkpoints, kept.note, kept.author) == (
        recipe,
        ("math@v1", "code@v1"),
        "for later",
        "ada",
    )
    assert ckpt.repository(kept.repository) == saved == ckpt.save_recipe(planned)
    ckpt.merge(planned, out=str(tmp_path / "merged"))
    wanted = tiny.contents(tmp_path / "merged")
    del wanted["merge.json"]
    assert files_of(ckpt, saved) == wanted


def test_a_recipe_is_kept_no_longer(ckpt: Registry, make: Maker) -> None:
    """What it needs stays as long as it is kept, and may go after that."""
    one, other = make("math"), make("code", run="r", step=1)
    make("code", run="r", step=2)
    saved = ckpt.save_recipe(ckpt.plan(one, other), "for later")
    (kept,) = ckpt.recipes()
    with pytest.raises(InUse, match=f"recipe {saved.id}"):
        ckpt.remove(other)
    assert ckpt.keep("code", "last 1").removed == ()
    assert ckpt.remove_recipe(saved.id) == kept
    assert ckpt.recipes() == []
    event = ckpt.history()[-1]
    assert (event.action, event.subject, event.author) == ("recipe.remove", "math@v1", "ada")
    assert event.detail == {"recipe": kept.recipe.digest.hex, "with": ["code@v1"], "note": "for later"}
    for gone in ("main", saved.commit):
        with pytest.raises(UnknownRepository):
            ckpt.repository(saved.id, gone)
    assert ckpt.keep("code", "last 1", dry_run=False).removed == (other,)
    with pytest.raises(UnknownRecipe) as unknown:
        ckpt.remove_recipe(saved.id)
    assert unknown.value.name == saved.id


def test_a_recipe_is_meant_by_its_id_or_its_digest(ckpt: Registry, make: Maker) -> None:
    one, other = make("math"), make("code")
    planned, digest = ckpt.plan(one, other), ckpt.plan(one, other).outline.recipe.digest
    for text in (f"merged-{digest.hex}", digest.hex, str(digest), digest.hex[:6]):
        ckpt.save_recipe(planned)
        assert ckpt.remove_recipe(text).recipe.digest == digest
    saved = ckpt.save_recipe(planned)
    for text in ("math", digest.hex[:5], "merged-", f"{saved.id}0", "..", "a/b"):
        with pytest.raises(UnknownRecipe):
            ckpt.remove_recipe(text)
    with pytest.raises(UnknownRecipe) as unknown:
        ckpt.remove_recipe(f"{saved.id[:-1]}x")
    assert unknown.value.near == (saved.id,)


def test_what_was_merged_of_a_recipe_stays_without_it(ckpt: Registry, make: Maker, working: None) -> None:
    planned = ckpt.plan(make("math"), make("code"))
    saved = ckpt.save_recipe(planned)
    assert ckpt.recipes()[0].merged is None
    merged = ckpt.merge(planned).merged
    ckpt.ship(merged, "production")
    assert ckpt.recipes()[0].merged == merged.digest
    assert ckpt.remove_recipe(saved.id).merged == merged.digest
    assert ckpt.repository(saved.id).is_stored
    assert [each.merged for each in ckpt.shipped("production")] == [merged.digest]
    with pytest.raises(InUse):
        ckpt.remove(ckpt.resolve("code"))


def test_what_is_not_there_has_errors_of_its_own(ckpt: Registry, make: Maker) -> None:
    make("bot")
    with pytest.raises(UnknownRepository) as unknown:
        ckpt.repository("bott")
    assert unknown.value.near == ("bot",)
    with pytest.raises(UnknownRepository):
        ckpt.repository_refs("nobody-merged")
    with pytest.raises(UnknownRevision):
        ckpt.repository("bot-merged", "v7")
    with pytest.raises(PathNotFound):
        ckpt.read_file(ckpt.repository("bot"), "nothing.txt")
    with pytest.raises(InvalidInput):
        ckpt.repositories(limit=0)
    make("bot-merged")
    with pytest.raises(Conflict, match="bot-vN-merged"):
        ckpt.repository("bot-merged")


# -- over a server only


@pytest.fixture
def ada(server: Site, tmp_path: Path) -> Registry:
    """The registry as Ada sees it; it has `bot`."""
    found = server.connect("ada")
    found.add_base(str(tiny.write_base(tmp_path / "base", shards=2)), name="base", copy=True)
    found.register(str(tiny.write_adapter(tmp_path / "bot", base="base")), Registration(base="base"))
    return found


def test_a_file_that_is_cut_goes_on_where_it_was(server: Site, ada: Registry) -> None:
    found = ada.repository("bot-merged")
    whole = joined(ada, found, WEIGHTS)
    with bad_line(server.url) as line:
        path = "GET /api/v1/repository/file?"
        line.cuts = [Cut(path, received=1000), Cut(path, received=500, times=3)]
        assert joined(server.connect("ada", line.url), found, WEIGHTS, 5) == whole[5:]
        assert [cut.times for cut in line.cuts] == [0, 0]


def test_readers_keep_no_recipes(server: Site, ada: Registry) -> None:
    one = ada.resolve("bot")
    reader, writer = server.connect("reader"), server.connect("writer")
    assert reader.recipes() == []
    with pytest.raises(Forbidden):
        reader.save_recipe(reader.plan(one))
    saved = writer.save_recipe(writer.plan(one))
    assert reader.repository(saved.id) == saved
    with pytest.raises(Forbidden):
        reader.remove_recipe(saved.id)
    assert writer.remove_recipe(saved.id).author == "writer"
    for look in (ada.repositories, lambda namespaces: ada.repository("bot", namespaces=namespaces)):
        with pytest.raises(InvalidInput, match="those of the token"):
            look(namespaces=["team"])
