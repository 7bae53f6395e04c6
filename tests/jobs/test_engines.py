"""What jobs promise, whoever does them: the threads of one process on SQLite, or workers on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import tiny
from teams import fill, texts

from registry.base_models import Verification
from registry.codec import from_json
from registry.combining import Combination
from registry.comparing import Difference
from registry.errors import Cancelled, Conflict, InvalidInput, NotFound, NothingMerged, Refused, UnknownJob
from registry.merging import MergeResult
from registry.service import Registry
from registry.teamwork import JobState

Both = tuple[Registry, Callable[[], AbstractContextManager[object]]]


def test_a_merge_is_done_in_the_background(both: Both, tmp_path: Path) -> None:
    registry, working = both
    fill(registry, tmp_path)
    job = registry.start("merge", {"checkpoints": ["bot"], "note": "for the demo"})
    assert job.state is JobState.QUEUED
    assert job.arguments["checkpoints"] == ["bot@v1"]
    seen: list[int] = []
    with working():
        done = registry.follow_job(job.id, lambda what, done, total: seen.append(done))
    result = from_json(MergeResult, done.result)
    assert result.merged == registry.merged()[0]
    assert result.merged.note == "for the demo"
    assert sum(seen) == done.total_bytes == done.done_bytes
    assert done.finished_at is not None
    assert texts(registry, done)[-1] == "finished"


def test_the_one_who_asked_signs(both: Both, tmp_path: Path) -> None:
    registry, working = both
    fill(registry, tmp_path)
    job = registry.signed_by("grace").start("merge", {"checkpoints": ["bot"]})
    with working():
        registry.follow_job(job.id)
    assert registry.merged()[0].author == "grace"
    assert [(event.author, event.action) for event in registry.history()[-2:]] == [
        ("grace", "job.start"),
        ("grace", "merge"),
    ]


def test_other_verbs_give_what_they_give(both: Both, tmp_path: Path) -> None:
    registry, working = both
    fill(registry, tmp_path)
    registry.register(str(tiny.write_adapter(tmp_path / "other", base=tmp_path / "base", seed=5)))
    diff = registry.start("diff", {"one": "bot", "other": "other"})
    verify = registry.start("verify_base", {"base": "base"})
    both_ = registry.start("combine", {"checkpoints": ["bot", "other"], "making": {"adapter": "both"}})
    several = registry.start(
        "candidates",
        {"checkpoints": ["bot", "other"], "mixture": {"method": "task_arithmetic"}, "option": "lambda", "values": ["0.5", 1]},
    )  # fmt: skip
    with working():
        results = [registry.follow_job(job.id).result for job in (diff, verify, both_, several)]
    assert from_json(Difference, results[0]) == registry.diff(registry.resolve("bot"), registry.resolve("other"))
    assert from_json(Verification, results[1]).is_intact
    assert from_json(Combination, results[2]).checkpoint.ref == "both@v1"
    assert len(from_json(list[Combination], results[3])) == 2


def test_a_job_that_cannot_be_done_says_why(both: Both, tmp_path: Path) -> None:
    registry, working = both
    base = tiny.write_base(tmp_path / "base", shards=2)
    registry.add_base(str(base), name="base", copy=True)
    registry.register(str(tiny.write_adapter(tmp_path / "idle", base=base, config={"lora_alpha": 1e-30})))
    job = registry.start("merge", {"checkpoints": ["idle"]})
    with working(), pytest.raises(NothingMerged) as error:
        registry.follow_job(job.id)
    failed = registry.job(job.id)
    assert failed.state is JobState.FAILED
    assert error.value.subject == "base"
    assert failed.error is not None
    assert failed.error["code"] == "nothing_merged"
    assert texts(registry, failed)[-1].startswith("failed: ")
    assert registry.merged() == []


def test_a_merge_that_is_refused_is_not_queued(both: Both, tmp_path: Path) -> None:
    registry, _ = both
    fill(registry, tmp_path)
    other = tiny.write_base(tmp_path / "other", seed=9)
    registry.add_base(str(other), name="other", copy=True)
    registry.register(str(tiny.write_adapter(tmp_path / "odd", base=other)))
    with pytest.raises(Refused):
        registry.start("merge", {"checkpoints": ["bot", "odd"]})
    assert registry.jobs() == []


def test_the_same_merge_is_not_done_twice(both: Both, tmp_path: Path) -> None:
    registry, working = both
    fill(registry, tmp_path)
    first = registry.start("merge", {"checkpoints": ["bot"]})
    assert registry.start("merge", {"checkpoints": ["bot@v1"]}).id == first.id
    with working():
        registry.follow_job(first.id)
    again = registry.start("merge", {"checkpoints": ["bot"]})
    assert again.id != first.id
    assert again.state is JobState.SUCCEEDED
    assert from_json(MergeResult, again.result).created is False


def test_what_is_cancelled_in_the_queue_is_not_done_until_it_is_tried_again(both: Both, tmp_path: Path) -> None:
    registry, working = both
    fill(registry, tmp_path)
    job = registry.start("merge", {"checkpoints": ["bot"]})
    assert registry.cancel_job(job.id).state is JobState.CANCELLED
    with pytest.raises(Conflict):
        registry.cancel_job(job.id)
    with working():
        other = registry.start("verify_base", {"base": "base"})
        registry.follow_job(other.id)
        assert registry.merged() == []
        with pytest.raises(Cancelled):
            registry.follow_job(job.id)
        registry.retry_job(job.id)
        registry.follow_job(job.id)
        with pytest.raises(Conflict):
            registry.retry_job(job.id)
    assert len(registry.merged()) == 1
    assert [event.action for event in registry.history() if event.action.startswith("job.")] == [
        "job.start", "job.cancel", "job.start", "job.retry",
    ]  # fmt: skip


def test_jobs_are_listed(both: Both, tmp_path: Path) -> None:
    registry, _ = both
    fill(registry, tmp_path)
    jobs = [registry.start("verify_base", {"base": "base"}) for _ in range(3)]
    registry.cancel_job(jobs[1].id)
    assert [job.id for job in registry.jobs()] == [job.id for job in reversed(jobs)]
    assert [job.id for job in registry.jobs("cancelled")] == [jobs[1].id]
    assert len(registry.jobs(limit=2)) == 2
    assert registry.job(jobs[0].id) == jobs[0]
    for number in (0, 999, 1 << 40):
        with pytest.raises(UnknownJob):
            registry.job(number)
    with pytest.raises(InvalidInput):
        registry.jobs("finished")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("paint", {}),
        ("merge", {}),
        ("merge", {"checkpoints": "bot"}),
        ("merge", {"checkpoints": ["bot"], "out": "/etc/model"}),
        ("merge", {"checkpoints": ["bot"], "out": "file:///etc/model"}),
        ("convert", {"text": "bot", "wanted": {"layout": "litgpt", "out": "/etc/model"}}),
        ("convert", {"text": "bot", "wanted": {"layout": "litgpt"}}),
        ("verify_base", {"base": 3}),
    ],
)
def test_what_makes_no_sense_is_refused(both: Both, tmp_path: Path, kind: str, arguments: dict[str, object]) -> None:
    registry, _ = both
    fill(registry, tmp_path)
    with pytest.raises(InvalidInput):
        registry.start(kind, arguments)
    assert registry.jobs() == []


def test_a_place_of_the_machine_is_nothing_that_a_job_can_name(both: Both, tmp_path: Path) -> None:
    registry, _ = both
    fill(registry, tmp_path)
    for kind, arguments in (
        ("verify_base", {"base": str(tmp_path / "base")}),
        ("convert", {"text": str(tmp_path / "base"), "wanted": {"layout": "litgpt", "name": "x"}}),
        ("extract", {"base": "base", "tuned": str(tmp_path / "base"), "wanted": {"rank": 2, "name": "x"}}),
    ):
        with pytest.raises((NotFound, InvalidInput)):
            registry.start(kind, arguments)
