"""Checking, planning, merging and everything that is made in the background."""

from __future__ import annotations

import threading
from decimal import Decimal
from pathlib import Path

import pytest
import tiny
from sites import Maker, Site

from registry.combining import Making
from registry.errors import (
    Conflict,
    InvalidInput,
    InvalidRecipe,
    NotConvertible,
    NothingMerged,
    RegistryError,
    UnknownBase,
    UnknownCheckpoint,
    UnknownJob,
    Unreachable,
)
from registry.extracting import Extract
from registry.manifest import BaseFormat, BaseModel, Level
from registry.mixing import Mixture
from registry.rearranging import Wanted
from registry.registering import Registration
from registry.separating import Separate
from registry.service import Registry
from registry.teamwork import JobState
from registry.tensors import DType


def test_a_check_tells_every_finding(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    one = make()
    report = ckpt.check(one)
    assert (report.checkpoint, report.base, report.verdict) == ("bot@v1", "base", Level.PASS)
    ckpt.add_base(str(tiny.write_base(tmp_path / "other", seed=9)), name="other", copy=True)
    other = ckpt.check(one, "other")
    assert (other.verdict, [each.code for each in other.misfits]) == (Level.REFUSED, ["base_weights"])
    with pytest.raises(UnknownBase):
        ckpt.check(one, "nobody")


def test_a_plan_says_what_will_be(ckpt: Registry, make: Maker) -> None:
    one = make()
    planned = ckpt.plan(one, dtype=DType.BF16)
    outline = planned.outline
    assert planned.report == outline.report
    assert (outline.base, outline.recipe.dtype, outline.recipe.base) == ("base", DType.BF16, one.base)
    assert [file.path for file in outline.files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert (len(outline.computed), outline.bytes_copied > 0, outline.bytes_computed > 0) == (21, True, True) or outline
    assert outline.size_bytes == sum(file.size_bytes or 0 for file in outline.files)
    assert {file.path: file.origin for file in outline.sidecars}["tokenizer.json"] == "base"
    assert outline.peak_bytes(2) > outline.peak_bytes(1) > 0
    with pytest.raises(InvalidRecipe):
        ckpt.plan(one, dtype=DType.I64)
    with pytest.raises(InvalidRecipe):
        ckpt.plan(one, mixture=Mixture(method="magic"))
    with pytest.raises(InvalidRecipe):
        ckpt.plan()


@pytest.mark.usefixtures("working")
def test_a_merge_goes_into_the_store_and_comes_out_again(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    one, two = make(), make("other")
    mixture = Mixture(weights=(0.75, 0.25))
    planned = ckpt.plan(one, two, mixture=mixture)
    result = ckpt.merge(planned, note="both")
    merged = result.merged
    assert (result.created, result.location, merged.checkpoints) == (True, "", ("bot@v1", "other@v1"))
    assert (merged.recipe, merged.note, merged.author) == (planned.outline.recipe, "both", "ada")
    assert {record.action for record in result.records} == {"merged"}
    assert ckpt.merged() == [merged]
    assert ckpt.subject(merged.digest.hex[:10]) == merged
    again = ckpt.merge(ckpt.plan(one, two, mixture=mixture))
    assert (again.created, again.merged) == (False, merged)
    ckpt.pull(merged, tmp_path / "pulled")
    files = {entry.path: entry.size_bytes for entry in merged.files}
    assert {path: len(data) for path, data in tiny.contents(tmp_path / "pulled").items()} == files
    assert (ckpt.ship(merged, "production").merged, ckpt.details(one).merged) == (merged.digest, (merged,))


@pytest.mark.usefixtures("working")
def test_a_merge_goes_into_a_folder(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    planned = ckpt.plan(make())
    told: list[int] = []
    result = ckpt.merge(planned, out=str(tmp_path / "out"), progress=lambda what, done, total: told.append(done))
    assert result.location == str(tmp_path / "out")
    assert {entry.path for entry in result.merged.files} == set(tiny.contents(tmp_path / "out"))
    with pytest.raises(Conflict):
        ckpt.merge(ckpt.plan(make("other")), out=str(tmp_path / "out"))
    assert sum(told) > 0


@pytest.mark.usefixtures("working")
def test_every_way_merges_to_the_same_bytes(site: Site, ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    ckpt.merge(ckpt.plan(make()), out=str(tmp_path / "out"))
    with tiny.open_registry(tmp_path / "alone") as alone:
        place = str(tmp_path / "adapter-1")
        (found,) = alone.register(place, Registration(base=str(tmp_path / "base"), adapter="bot")).registered
        alone.merge(alone.plan(found.checkpoint), out=str(tmp_path / "expected"))
    assert tiny.contents(tmp_path / "out") == tiny.contents(tmp_path / "expected")


@pytest.mark.usefixtures("working")
def test_what_cannot_be_merged_fails_alike(ckpt: Registry, base: BaseModel, tmp_path: Path) -> None:
    place = tiny.write_adapter(tmp_path / "zero")
    from safetensors.numpy import save_file

    tensors = {name: array * 0 if "lora_B" in name else array for name, array in tiny.adapter_tensors().items()}
    save_file(tensors, place / "adapter_model.safetensors")
    (found,) = ckpt.register(str(place), Registration(base="base")).registered
    with pytest.raises(RegistryError) as caught:
        ckpt.merge(ckpt.plan(found.checkpoint))
    assert caught.value.code in (NothingMerged.code, "refused")
    assert ckpt.merged() == []


@pytest.mark.usefixtures("working")
def test_adapters_are_combined(ckpt: Registry, make: Maker) -> None:
    one, two = make(), make("other")
    made = ckpt.combine(one, two, mixture=Mixture(weights=(0.5, 0.5)), making=Making(adapter="both", note="half"))
    assert (made.checkpoint.ref, made.created, made.rank, made.lost) == ("both@v1", True, 8, 0.0)
    assert made.checkpoint.origin is not None
    assert made.checkpoint.origin.parents == ("bot@v1", "other@v1")
    assert (made.checkpoint, made.checkpoint.author) == (ckpt.resolve("both"), "ada")
    many = ckpt.candidates(
        one, two, mixture=Mixture(method="interpolate"), option="t", values=[Decimal("0.25"), Decimal("0.5")], rank=4,
        making=Making(adapter="swept"),
    )  # fmt: skip
    assert [(each.checkpoint.ref, each.checkpoint.tags) for each in many] == [
        ("swept@v1", {"t": "0.25"}), ("swept@v2", {"t": "0.5"}),
    ]  # fmt: skip
    with pytest.raises(InvalidRecipe):
        ckpt.combine(one, two, mixture=Mixture(method="ties"))


@pytest.mark.usefixtures("working")
def test_two_checkpoints_are_compared(ckpt: Registry, make: Maker) -> None:
    one, two = make(), make()
    found = ckpt.diff(one, two)
    assert (found.one.ref, found.other.ref, len(found.weights)) == ("bot@v1", "bot@v2", 4)
    assert all(pair.distance > 0 and pair.relative > 0 for pair in found.weights)


@pytest.mark.usefixtures("working")
def test_a_base_model_is_verified(ckpt: Registry, base: BaseModel) -> None:
    found = ckpt.verify_base(base)
    assert (found.is_intact, found.tensors, found.base) == (True, len(base.tensors), base)


@pytest.mark.usefixtures("working")
def test_a_fine_tune_becomes_an_adapter(ckpt: Registry, base: BaseModel, tmp_path: Path) -> None:
    tuned = tiny.write_base(tmp_path / "tuned", seed=3)
    ckpt.add_base(str(tuned), name="tuned", copy=True)
    made = ckpt.extract("base", "tuned", Extract(rank=2, name="drawn", out=tmp_path / "drawn"))
    assert (made.rank, made.place, made.registered is not None) == (2, str(tmp_path / "drawn"), True)
    assert "adapter_model.safetensors" in tiny.contents(tmp_path / "drawn")
    assert ckpt.resolve("drawn").manifest.rank == 2


@pytest.mark.usefixtures("working")
def test_an_adapter_changes_its_layout(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    with pytest.raises(NotConvertible):
        ckpt.convert(make().ref, Wanted(layout=BaseFormat.SAFETENSORS, name="same"))
    with pytest.raises(UnknownCheckpoint):
        ckpt.convert("bot@v9", Wanted(layout=BaseFormat.LITGPT, name="other"))
    with pytest.raises(InvalidInput):
        ckpt.convert("bot@v1", Wanted(layout=BaseFormat.LITGPT))


def test_an_adapter_is_taken_out_of_its_model(ckpt: Registry, base: BaseModel, tmp_path: Path) -> None:
    place = tiny.write_adapter(tmp_path / "bot", base="base")
    from safetensors.numpy import load_file, save_file

    adapter, model = load_file(place / "adapter_model.safetensors"), load_whole(tmp_path / "base")
    wrapped = {name.replace(".weight", ".default.weight"): array for name, array in adapter.items()}
    save_file({**wrapped, **model}, tmp_path / "all.safetensors")
    wanted = Separate(
        files=(tmp_path / "all.safetensors",), config=place / "adapter_config.json", base="base", name="apart"
    )
    found = ckpt.separate(wanted)
    assert (found.tensors, found.left, found.place) == (8, len(model), "")
    assert found.registered is not None
    assert found.registered.checkpoint == ckpt.resolve("apart")


def load_whole(folder: Path) -> tiny.Arrays:
    from safetensors.numpy import load_file

    tensors: tiny.Arrays = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {f"base_model.model.{name}": array for name, array in tensors.items()}


@pytest.mark.usefixtures("working")
def test_jobs_are_followed_listed_and_kept(ckpt: Registry, make: Maker, site: Site) -> None:
    one = make()
    job = site.connect("bob").start("merge", {"checkpoints": ["bot"], "note": "later"})
    assert (job.kind, job.subject, job.author, job.arguments["checkpoints"]) == ("merge", "bot@v1", "bob", ["bot@v1"])
    done = ckpt.follow_job(job.id)
    assert (done.state, done.done_bytes, done.error) == (JobState.SUCCEEDED, done.total_bytes, None)
    assert done.result["merged"]["note"] == "later"
    assert ckpt.job(job.id) == done
    assert [each.id for each in ckpt.jobs("succeeded", 1)] == [job.id]
    assert ckpt.jobs("failed") == []
    assert ckpt.job_log(job.id)
    assert ckpt.start_merge(ckpt.plan(one)).state is JobState.SUCCEEDED
    with pytest.raises(UnknownJob):
        ckpt.job(12345)
    with pytest.raises(InvalidInput):
        ckpt.jobs("odd")
    with pytest.raises(InvalidInput):
        ckpt.start("dance", {})
    with pytest.raises(UnknownCheckpoint):
        ckpt.start("merge", {"checkpoints": ["bot@v9"]})
    with pytest.raises(Conflict):
        ckpt.cancel_job(job.id)
    with pytest.raises(Conflict):
        ckpt.retry_job(job.id)


def test_a_job_is_cancelled_and_tried_again(ckpt: Registry, make: Maker, site: Site) -> None:
    make()
    if site.is_remote:  # whose server is always at it
        return
    job = ckpt.start("verify_base", {"base": "base"})
    assert ckpt.cancel_job(job.id).state is JobState.CANCELLED
    assert ckpt.retry_job(job.id).state is JobState.QUEUED
    with site.working():
        assert ckpt.follow_job(job.id).state is JobState.SUCCEEDED


@pytest.mark.usefixtures("working")
def test_two_who_ask_for_one_merge_get_one_model(ckpt: Registry, make: Maker, site: Site) -> None:
    make()
    found, problems = [], []

    def merge(author: str) -> None:
        own = site.connect(author)
        try:
            found.append(own.merge(own.plan(own.resolve("bot"))).merged.digest)
        except RegistryError as error:
            problems.append(error.code)

    threads = [threading.Thread(target=merge, args=(name,)) for name in ("ada", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(ckpt.merged()) == 1
    assert set(problems) <= {"merge_running"}


def test_a_base_on_one_machine_is_refused_where_others_merge(ckpt: Registry, site: Site, tmp_path: Path) -> None:
    if site.name != "team":
        return
    place = tiny.write_adapter(tmp_path / "bot", base=tiny.write_base(tmp_path / "base"))
    (found,) = ckpt.register(str(place)).registered
    with pytest.raises(Unreachable):
        ckpt.merge(ckpt.plan(found.checkpoint))
