"""Domain values: digests that follow from content alone, JSON, and the little that values compute themselves."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from factories import NOON, checkpoint, digest, manifest

from registry.errors import CorruptFile
from registry.manifest import (
    FileEntry,
    Finding,
    Level,
    Metric,
    Recipe,
    RecipeInput,
    Report,
    canonical_json,
    content_digest,
    to_json,
    utc_now,
)
from registry.refs import AdapterName
from registry.tensors import DType


def entry(path: str, content: str) -> FileEntry:
    return FileEntry(path=path, size_bytes=len(content), digest=digest(content))


def test_a_content_digest_follows_from_paths_and_bytes_alone() -> None:
    files = entry("a", "one"), entry("b/c", "two")
    assert content_digest(files) == content_digest(files[::-1]) == manifest(files=files).digest
    assert content_digest(files) == content_digest([replace(each, sha256="0" * 64) for each in files])
    changed = [
        (entry("a", "two"), files[1]),
        (entry("A", "one"), files[1]),
        files[:1],
        (entry("a", "two"), entry("b/c", "one")),
    ]
    assert len({content_digest(each) for each in [files, *changed]}) == 5


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a/.", "..", "a\\b", "a\0"]
)
def test_a_file_lies_below_its_folder(path: str) -> None:
    with pytest.raises(CorruptFile):
        entry(path, "x")


def test_files_may_have_any_plain_name() -> None:
    assert [entry(path, "x").path for path in ("a", "a b/c..d", ".x")] == ["a", "a b/c..d", ".x"]


def test_every_part_of_a_recipe_changes_its_digest() -> None:
    one, two = RecipeInput(checkpoint=digest("one")), RecipeInput(checkpoint=digest("two"))
    recipe = Recipe(base=digest("base"), inputs=(one, two))
    others = [
        replace(recipe, base=digest("other")),
        replace(recipe, inputs=(two, one)),
        replace(recipe, inputs=(replace(one, weight=0.5), two)),
        replace(recipe, dtype=DType.BF16),
        replace(recipe, formula=1),
        replace(recipe, method="ties"),
        replace(recipe, options={"density": 0.5}),
    ]
    assert recipe.digest == replace(recipe).digest
    assert len({each.digest for each in [recipe, *others]}) == 8


def test_values_become_plain_json() -> None:
    noon_in_zurich = NOON.astimezone(timezone(timedelta(hours=1)))
    found = to_json(checkpoint(adapter=AdapterName("team", "bot"), created_at=noon_in_zurich, tags={"k": "v"}))
    assert found["adapter"] == "team/bot"
    assert found["created_at"] == "2025-03-01T12:00:00Z"
    assert found["base"] == str(digest("base"))
    assert found["manifest"]["format"] == "peft"
    assert found["tags"] == {"k": "v"}
    assert canonical_json({"b": [1, None], "a": "é"}) == '{"a":"é","b":[1,null]}'.encode()


def test_canonical_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_the_last_metric_of_a_name_counts() -> None:
    measured = [Metric(name="loss", value=2.0), Metric(name="acc", value=0.5), Metric(name="loss", value=1.0)]
    found = checkpoint(adapter="team/bot", version=3, metrics=measured)
    assert (found.metric("loss"), found.metric("acc"), found.metric("bleu")) == (1.0, 0.5, None)
    assert found.ref == "team/bot@v3"


def test_a_verdict_is_the_worst_finding() -> None:
    def report(*levels: Level) -> Report:
        findings = tuple(Finding(code=level.value, level=level, where="", fits=False) for level in levels)
        return Report(checkpoint="a@v1", base="b", findings=findings)

    assert report().verdict is Level.PASS
    assert report(Level.PASS, Level.WARNING).verdict is Level.WARNING
    assert report(Level.REFUSED, Level.PASS, Level.WARNING).verdict is Level.REFUSED
    assert [finding.code for finding in report(*Level).misfits] == ["refused"]


def test_now_is_aware() -> None:
    assert abs(datetime.now().astimezone() - utc_now()) < timedelta(minutes=1)
