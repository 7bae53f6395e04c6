"""The outbox: checkpoints survive the run that wrote them, and a registry that is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

from registry.errors import NotACheckpoint, PathNotFound, RegistryError, UnknownBase
from registry.intake import Registered, Registration
from registry.manifest import Metric
from registry.outbox import Outbox
from registry.service import Registry


@pytest.fixture
def box(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "home")


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    return tiny.write_run(tmp_path / "support-bot", base=base)


def test_what_is_put_in_is_registered_although_the_trainer_deleted_it(ckpt: Registry, box: Outbox, run: Path) -> None:
    assert box.put(run / "checkpoint-9", Registration(adapter="bot", run="first", tags={"team": "nlu"})) == []
    before = tiny.contents(run / "checkpoint-9")
    shutil.rmtree(run / "checkpoint-9")
    (waiting,) = box.waiting()
    assert (waiting.said.step, waiting.said.adapter, waiting.problem) == (9, "bot", "")
    (done,) = box.send(ckpt)
    assert isinstance(done, Registered)
    found = done.checkpoint
    assert (found.ref, found.step, found.run, found.tags) == ("bot@v1", 9, "first", {"team": "nlu"})
    assert found.metric("eval_loss") == pytest.approx(1.41)
    assert found.source == str(run / "checkpoint-9")
    assert {entry.path for entry in found.manifest.files} == set(before)
    assert box.waiting() == []


def test_names_run_and_step_are_those_that_registering_would_find(ckpt: Registry, box: Outbox, run: Path) -> None:
    for step in (9, 50):
        box.put(run / f"checkpoint-{step}", Registration())
    sent = [done.checkpoint for done in box.send(ckpt) if isinstance(done, Registered)]
    direct = [done.checkpoint for done in ckpt.register(str(run)).registered]
    assert [(each.ref, each.run, each.step, each.metrics) for each in direct][:2] == [
        (each.ref, each.run, each.step, each.metrics) for each in sent
    ]


def test_what_fails_stays_and_says_why(ckpt: Registry, box: Outbox, run: Path, tmp_path: Path) -> None:
    box.put(run / "checkpoint-9", Registration(base="nowhere"))
    box.put(run / "checkpoint-50", Registration())
    failed, done = box.send(ckpt)
    assert isinstance(failed, tuple)
    assert isinstance(failed[1], (UnknownBase, PathNotFound))
    assert isinstance(done, Registered)
    (waiting,) = box.waiting()
    assert "nowhere" in waiting.problem
    box.drop(waiting.id)
    assert box.waiting() == []
    assert list((tmp_path / "home/outbox").iterdir()) == []


def test_sending_again_registers_nothing_twice(ckpt: Registry, box: Outbox, run: Path) -> None:
    box.put(run / "checkpoint-9", Registration(adapter="bot"))
    box.put(run / "checkpoint-9", Registration(adapter="bot", metrics=(Metric(name="f1", value=0.5),)))
    first, second = box.send(ckpt)
    assert isinstance(first, Registered)
    assert isinstance(second, Registered)
    assert (first.created, second.created) == (True, False)
    assert len(ckpt.checkpoints("bot")) == 1


def test_the_oldest_make_room(box: Outbox, run: Path, tmp_path: Path) -> None:
    for step in (9, 50):
        box.put(run / f"checkpoint-{step}", Registration())
    small = Outbox(tmp_path / "home", limit_bytes=sum(each.size_bytes for each in box.waiting()) + 500)
    (dropped,) = small.put(run / "checkpoint-100", Registration())
    assert dropped.said.step == 9
    assert [each.said.step for each in small.waiting()] == [50, 100]


def test_only_one_process_sends_at_a_time(ckpt: Registry, box: Outbox, run: Path, tmp_path: Path) -> None:
    box.put(run / "checkpoint-9", Registration())
    box.put(run / "checkpoint-50", Registration())
    sending = box.send(ckpt)
    next(sending)
    assert list(Outbox(tmp_path / "home").send(ckpt)) == []
    assert len(list(sending)) == 1


def test_what_is_no_checkpoint_is_refused(box: Outbox, tmp_path: Path, run: Path) -> None:
    with pytest.raises(RegistryError):
        box.put(tmp_path / "nowhere", Registration())
    with pytest.raises(NotACheckpoint, match="found 4"):
        box.put(run, Registration())
    assert box.waiting() == []


def test_what_was_cut_off_while_it_was_put_in_is_no_item(
    ckpt: Registry, box: Outbox, run: Path, tmp_path: Path
) -> None:
    box.put(run / "checkpoint-9", Registration())
    (place,) = (tmp_path / "home/outbox").iterdir()
    (place / "said.json").rename(place / "said.draft")
    assert box.waiting() == []
    assert list(box.send(ckpt)) == []
    (place / "said.json").write_text(json.dumps({"said": {"adapter": 3}}))
    assert box.waiting() == []
