"""`ckpt merge --virtual`: the recipe is kept, the model is nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from commands import Ckpt


@pytest.fixture
def two(ckpt: Ckpt, tmp_path: Path) -> Ckpt:
    base = tiny.write_base(tmp_path / "base")
    for seed, name in enumerate(("math", "code"), 1):
        place = tiny.write_adapter(tmp_path / name, base=base, seed=seed)
        assert ckpt("register", str(place), "--base", str(base)).code == 0
    return ckpt


def test_the_recipe_is_kept_and_its_id_printed(two: Ckpt, tmp_path: Path) -> None:
    asked = ("merge", "math", "code", "--method", "ties", "--weights", "0.7,0.3", "--virtual")
    found = two(*asked, "--note", "for later")
    assert found.code == 0
    id_ = found.out.strip()
    assert id_.startswith("merged-")
    assert f'from_pretrained("{id_}")' in found.err
    told = two(*asked, "--json").json
    assert (told["id"], told["checkpoints"], told["is_stored"]) == (id_, ["math@v1", "code@v1"], False)
    assert not [path for path in tiny.stored_blobs(tmp_path / "home") if path.stat().st_size > 15_000]
    refused = two("rm", "math@v1", "--yes")
    assert refused.code != 0
    assert id_ in refused.err


def test_nothing_is_written_anywhere_else(two: Ckpt, tmp_path: Path) -> None:
    found = two("merge", "math", "--virtual", "--out", str(tmp_path / "out"))
    assert found.code == 2
    assert "leave --out away" in found.err
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed_and_removed(two: Ckpt) -> None:
    empty = two("recipe", "list")
    assert (empty.out, empty.code) == ("", 0)
    assert "--virtual" in empty.err
    id_ = two("merge", "math", "code", "--method", "ties", "--weights", "0.7,0.3", "--virtual").out.strip()
    (kept,) = two("recipe", "list", "--json").json
    assert (kept["repository"], kept["checkpoints"], kept["merged"]) == (id_, ["math@v1", "code@v1"], None)
    assert kept["recipe"]["method"] == "ties"
    listed = two("recipe", "list").out
    assert id_ in listed
    assert "math@v1:0.7" in listed
    refused = two("rm", "math@v1", "--yes")
    assert (refused.code, "kept recipes" in refused.err) == (5, True)
    removed = two("recipe", "rm", id_)
    assert (removed.out, removed.err) == (f"removed recipe {id_}\n", "")
    assert two("recipe", "list", "--json").json == []
    gone = two("recipe", "rm", id_)
    assert gone.code == 3
    assert f"no recipe '{id_}' is kept" in gone.err
    assert "ckpt recipe list" in gone.err
    assert two("rm", "math@v1", "--yes").code == 0


def test_a_model_that_was_merged_meanwhile_is_told_of(two: Ckpt) -> None:
    id_ = two("merge", "math", "code", "--virtual").out.strip()
    digest = two("merge", "math", "code", "--json").json["digest"].removeprefix("blake3:")
    removed = two("recipe", "rm", id_)
    assert removed.code == 0
    assert f"its repository stays: it was merged meanwhile, to {digest[:12]}" in removed.err
