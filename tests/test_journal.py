"""What a merge remembers of its finished files, and the lock that keeps others away."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest

from registry.errors import MergeRunning, StorageFailed
from registry.manifest import FileEntry, TensorRecord
from registry.merge.journal import Journal
from registry.refs import Digest

RECIPE, OTHER = factories.digest("recipe"), factories.digest("other")
ENTRY = FileEntry(path="model.safetensors", size_bytes=3, digest=factories.digest("abc"))
RECORDS = (TensorRecord(name="w", action="merged", base_norm=1.5, delta_norm=0.25, changed=0.5, lost=0.125),)


def test_remembers_finished_files(tmp_path: Path) -> None:
    with Journal(tmp_path, RECIPE, "/out") as journal:
        assert journal.finished(ENTRY.path) is None
        journal.add(ENTRY, RECORDS)
    with Journal(tmp_path, RECIPE, "/out") as journal:
        assert journal.finished(ENTRY.path) == (ENTRY, RECORDS)
        assert journal.finished("other") is None


@pytest.mark.parametrize(("recipe", "url"), [(OTHER, "/out"), (RECIPE, "/elsewhere"), (RECIPE, "")])
def test_knows_nothing_of_other_recipes_and_places(tmp_path: Path, recipe: Digest, url: str) -> None:
    with Journal(tmp_path, RECIPE, "/out") as journal:
        journal.add(ENTRY, RECORDS)
    with Journal(tmp_path, recipe, url) as journal:
        assert journal.finished(ENTRY.path) is None


def test_finishing_leaves_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path, RECIPE, "/out") as journal:
        journal.add(ENTRY, RECORDS)
        journal.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model.safetensors": 1}', '{"model.safetensors": {"size_bytes": 3}}']
)
def test_a_broken_journal_starts_over(tmp_path: Path, text: str) -> None:
    with Journal(tmp_path, RECIPE, "/out") as journal:
        journal.add(ENTRY, RECORDS)
    (file,) = tmp_path.glob("*.json")
    file.write_text(text)
    with Journal(tmp_path, RECIPE, "/out") as journal:
        assert journal.finished(ENTRY.path) is None
        journal.add(ENTRY, RECORDS)
        assert journal.finished(ENTRY.path) == (ENTRY, RECORDS)


@pytest.mark.parametrize(("recipe", "url"), [(RECIPE, "/out"), (OTHER, "/out")])
def test_one_at_a_time_at_a_place(tmp_path: Path, recipe: Digest, url: str) -> None:
    second = Journal(tmp_path, recipe, url)
    with Journal(tmp_path, RECIPE, "/out"), pytest.raises(MergeRunning):
        second.__enter__()
    with second as journal:
        assert journal.finished(ENTRY.path) is None


def test_one_recipe_at_a_time_in_the_store(tmp_path: Path) -> None:
    with Journal(tmp_path, RECIPE, ""), Journal(tmp_path, OTHER, ""), pytest.raises(MergeRunning):
        Journal(tmp_path, RECIPE, "").__enter__()


def test_finishing_leaves_the_place_to_the_next_one(tmp_path: Path) -> None:
    with Journal(tmp_path, RECIPE, "/out") as first:
        first.finish()  # removes the lock's file while it is still held
        with Journal(tmp_path, RECIPE, "/out"), pytest.raises(MergeRunning):
            Journal(tmp_path, RECIPE, "/out").__enter__()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed):
        Journal(tmp_path / "file" / "merging", RECIPE, "/out").__enter__()
