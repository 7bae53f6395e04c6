"""Watching a run: nothing half-written is taken, nothing twice, nothing is missed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny

from registry.intake import Registered, Registration
from registry.outbox import Outbox
from registry.service import Registry
from registry.watching import Watch, checkpoint_folders

LITGPT = Path(__file__).parent / "data/litgpt"


class Clock:
    """Time as the test wants it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def watching(run: Path, tmp_path: Path) -> Watch:
    return Watch(run, Outbox(tmp_path / "home"), Registration(adapter="bot"), tmp_path / "home", settle_seconds=5)


def look(watched: Watch, clock: Clock, *, seconds: float = 6) -> list[str]:
    """What is taken within some seconds, a look each second."""
    found = []
    for _ in range(int(seconds)):
        found += [f"{'!' if taken.problem else ''}{taken.folder.name}" for taken in watched.look(clock)]
        clock.now += 1
    return found


def complete(run: Path, base: Path, step: int) -> Path:
    place = tiny.write_adapter(run / f"checkpoint-{step}", base=base, seed=step)
    tiny.write_json(place / "trainer_state.json", {"global_step": step, "log_history": []})
    return place


def test_a_checkpoint_is_taken_when_it_has_settled_and_only_once(
    run: Path, base: Path, tmp_path: Path, clock: Clock
) -> None:
    watched = watching(run, tmp_path)
    assert look(watched, clock) == []
    complete(run, base, 10)
    assert look(watched, clock, seconds=5) == []
    assert look(watched, clock) == ["checkpoint-10"]
    complete(run, base, 20)
    assert look(watched, clock, seconds=20) == ["checkpoint-20"]
    assert [each.said.step for each in watched.outbox.waiting()] == [10, 20]


def test_nothing_half_written_is_taken(run: Path, base: Path, tmp_path: Path, clock: Clock) -> None:
    whole = complete(tmp_path / "elsewhere", base, 10)
    weights = (whole / "adapter_model.safetensors").read_bytes()
    watched = watching(run, tmp_path)
    place = run / "checkpoint-10"
    place.mkdir()
    shutil.copy(whole / "adapter_config.json", place)
    assert look(watched, clock, seconds=30) == []
    (place / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert look(watched, clock, seconds=40) == []
    shutil.copy(whole / "trainer_state.json", place)
    assert look(watched, clock, seconds=20) == ["!checkpoint-10"]
    assert watched.outbox.waiting() == []
    (place / "adapter_model.safetensors").write_bytes(weights)
    assert look(watched, clock, seconds=20) == ["checkpoint-10"]


def test_a_trainer_that_writes_no_state_is_waited_for_longer(
    run: Path, base: Path, tmp_path: Path, clock: Clock
) -> None:
    tiny.write_adapter(run / "checkpoint-10", base=base)
    watched = watching(run, tmp_path)
    assert look(watched, clock, seconds=45) == []
    assert look(watched, clock, seconds=10) == ["checkpoint-10"]


def test_a_new_start_takes_nothing_twice_and_what_came_meanwhile(
    run: Path, base: Path, tmp_path: Path, clock: Clock
) -> None:
    complete(run, base, 10)
    assert look(watching(run, tmp_path), clock, seconds=8) == ["checkpoint-10"]
    complete(run, base, 20)
    again = watching(run, tmp_path)
    assert again.is_waiting
    assert look(again, clock, seconds=8) == ["checkpoint-20"]
    assert not again.is_waiting


def test_what_is_deleted_before_it_settles_is_passed_over(run: Path, base: Path, tmp_path: Path, clock: Clock) -> None:
    watched = watching(run, tmp_path)
    place = complete(run, base, 10)
    assert look(watched, clock, seconds=3) == []
    shutil.rmtree(place)
    assert look(watched, clock, seconds=20) == []


def test_what_is_written_anew_is_taken_anew(
    ckpt: Registry, run: Path, base: Path, tmp_path: Path, clock: Clock
) -> None:
    watched = watching(run, tmp_path)
    complete(run, base, 10)
    assert look(watched, clock, seconds=8) == ["checkpoint-10"]
    tiny.write_adapter(run / "checkpoint-10", base=base, seed=77)
    assert look(watched, clock, seconds=8) == ["checkpoint-10"]
    done = [each for each in watched.outbox.send(ckpt) if isinstance(each, Registered)]
    assert [each.checkpoint.version for each in done] == [1, 2]


def test_what_makes_room_for_others_is_told_of(run: Path, base: Path, tmp_path: Path, clock: Clock) -> None:
    watched = Watch(run, Outbox(tmp_path / "home", limit_bytes=1), Registration(), tmp_path / "home", settle_seconds=5)
    for step in (10, 20):
        complete(run, base, step)
    taken = []
    for clock.now in range(8):
        taken += watched.look(clock)
    assert [[dropped.said.step for dropped in each.dropped] for each in taken] == [[], [10]]


def test_runs_of_litgpt_and_runs_within_runs_are_found(tmp_path: Path, base: Path, clock: Clock) -> None:
    root = tmp_path / "all"
    for place in tiny.write_litgpt_run(root / "lit", base=str(base)).glob("*/lit_model.pth.lora"):
        place.with_name("prompt_style.yaml").touch()
    complete(root / "hf/lr-1", base, 200)
    complete(root / "hf/lr-1", base, 30)
    (root / ".hidden").mkdir()
    complete(root / ".hidden", base, 1)
    names = [str(place.relative_to(root)) for place in checkpoint_folders(root)]
    assert names == [
        "hf/lr-1/checkpoint-30",
        "hf/lr-1/checkpoint-200",
        "lit/step-000003",
        "lit/step-000006",
        "lit/final",
    ]
    assert len(look(watching(root, tmp_path), clock, seconds=8)) == 5


@pytest.mark.parametrize("name", ["lora-llama-qv", "adapter-llama", "adapter_v2-llama"])
def test_litgpt_is_done_when_the_style_of_prompts_is_there(run: Path, tmp_path: Path, clock: Clock, name: str) -> None:
    """It writes that last. Taken without, a checkpoint would be taken once more with it, as another version."""
    style = shutil.copytree(LITGPT / name, run, dirs_exist_ok=True) / "final/prompt_style.yaml"
    style.rename(tmp_path / "style")
    watched = watching(run, tmp_path)
    assert "final" not in look(watched, clock, seconds=40)
    (tmp_path / "style").rename(style)
    assert look(watched, clock, seconds=8) == ["final"]


def test_a_slow_writer_is_not_overtaken(ckpt: Registry, run: Path, base: Path, tmp_path: Path, clock: Clock) -> None:
    """A checkpoint is written in pieces, with pauses just under what is waited for."""
    whole = complete(tmp_path / "elsewhere", base, 10)
    watched = watching(run, tmp_path)
    (run / "checkpoint-10").mkdir()
    for name in ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors"):
        data = (whole / name).read_bytes()
        with (run / "checkpoint-10" / name).open("wb", buffering=0) as stream:
            for start in range(0, len(data), -(-len(data) // 4)):
                stream.write(data[start : start + -(-len(data) // 4)])
                assert look(watched, clock, seconds=5) == []
    assert look(watched, clock, seconds=1) == ["checkpoint-10"]
    (done,) = watched.outbox.send(ckpt)
    assert isinstance(done, Registered)
    entries = {entry.path: entry.size_bytes for entry in done.checkpoint.manifest.files}
    assert entries["adapter_model.safetensors"] == (whole / "adapter_model.safetensors").stat().st_size
