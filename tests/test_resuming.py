"""What is kept of a trainer's state, the folder that a run goes on in, and the lineage of what is registered from there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem

from registry.errors import Conflict, CorruptFile, NoTrainerState
from registry.manifest import Checkpoint
from registry.outbox import Outbox
from registry.registering import Intake, Registered, Registration
from registry.resuming import resume
from registry.service import Registry
from registry.training_state import LINEAGE_FILE, is_state, missing_state

STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
DATA = Path(__file__).parent / "data" / "litgpt"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "base")


def write_step(run: Path, base: Path, step: int, *, seed: int = 1) -> Path:
    """A checkpoint as the Trainer leaves it."""
    folder = tiny.write_adapter(run / f"checkpoint-{step}", base=base, seed=seed)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    (folder / "training_args.bin").write_bytes(b"arguments")
    for name in STATE:
        (folder / name).write_bytes(f"{name} of step {step}".encode())
    return folder


def files_of(checkpoint: Checkpoint) -> set[str]:
    return {entry.path for entry in checkpoint.manifest.files}


def only(intake: Intake) -> Registered:
    (found,) = intake.registered
    return found


def test_the_trainers_state_is_kept_only_where_that_is_said(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    write_step(tmp_path / "bot", base, 10)
    without = only(ckpt.register(str(tmp_path / "bot")))
    assert files_of(without.checkpoint).isdisjoint(STATE)
    assert {"trainer_state.json", "training_args.bin"} < files_of(without.checkpoint)
    assert set(without.left_out) == set(STATE)
    kept = only(ckpt.register(str(tmp_path / "bot"), Registration(with_state=True)))
    assert set(STATE) < files_of(kept.checkpoint)
    assert not kept.left_out
    assert kept.created
    assert ckpt.check(kept.checkpoint).findings == ckpt.check(without.checkpoint).findings


@pytest.mark.parametrize(
    "path",
    [*STATE, "optimizer.bin", "scaler.pt", "rng_state_7.pth", "global_step40/mp_rank_00_model_states.pt", "latest",
     "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"],
)  # fmt: skip
def test_files_for_the_trainer_alone(path: str) -> None:
    assert is_state(path)


@pytest.mark.parametrize(
    "path", ["adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "training_args.bin", "README.md",
             "tokenizer.json", "other/optimizer.pt", "my_optimizer.pt"],
)  # fmt: skip
def test_other_files(path: str) -> None:
    assert not is_state(path)


def test_what_a_trainer_would_miss() -> None:
    assert missing_state([*STATE, "trainer_state.json"]) == ()
    assert missing_state(["global_step4/x.pt", "rng_state_0.pth", "trainer_state.json"]) == ()
    assert missing_state(["adapter_config.json"]) == (
        "optimizer",
        "scheduler",
        "random numbers' state",
        "trainer_state.json",
    )


def test_a_run_goes_on_and_points_back(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    write_step(tmp_path / "bot", base, 10)
    parent = only(ckpt.register(str(tmp_path / "bot"), Registration(with_state=True))).checkpoint
    again = tmp_path / "again"
    found = resume(ckpt, parent, again)
    assert {path.name for path in found.place.iterdir()} == files_of(parent)
    write_step(again, base, 20, seed=2)
    # without state too, the beginning is known: it is taken whole
    old, new = ckpt.register(str(again)).registered
    assert (old.checkpoint.ref, old.created) == (parent.ref, False)
    assert new.checkpoint.origin is not None
    assert new.checkpoint.origin.parents == (parent.ref,)
    assert new.checkpoint.origin.detail == {
        "from": parent.ref,
        "digest": parent.digest.hex,
        "step": 10,
        "weights_only": False,
    }
    assert (new.checkpoint.run, files_of(new.checkpoint).isdisjoint(STATE)) == ("again", True)
    with pytest.raises(Conflict):
        resume(ckpt, parent, again)


def test_one_checkpoint_of_a_resumed_run_points_back_too_also_through_the_outbox(
    ckpt: Registry, base: Path, tmp_path: Path
) -> None:
    write_step(tmp_path / "bot", base, 10)
    parent = only(ckpt.register(str(tmp_path / "bot"), Registration(with_state=True))).checkpoint
    resume(ckpt, parent, tmp_path / "again")
    later = write_step(tmp_path / "again", base, 20, seed=2)
    last = write_step(tmp_path / "again", base, 30, seed=3)
    (later / LINEAGE_FILE).write_bytes((tmp_path / "again" / LINEAGE_FILE).read_bytes())
    found = only(ckpt.register(str(later))).checkpoint
    assert found.origin is not None
    assert LINEAGE_FILE not in files_of(found)
    box = Outbox(ckpt.settings.home)
    for place in (last, tmp_path / "again/checkpoint-10"):
        box.put(place, Registration())
    shutil.rmtree(tmp_path / "again")
    sent = [each for each in box.send(ckpt) if isinstance(each, Registered)]
    assert [(each.created, each.checkpoint.step) for each in sent] == [(True, 30), (False, 10)]
    assert sent[0].checkpoint.origin is not None
    assert sent[0].checkpoint.origin.parents == (parent.ref,)


def test_a_parent_of_another_registry_is_told_of(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    write_step(tmp_path / "bot", base, 10)
    with tiny.open_registry(tmp_path / "elsewhere") as other:
        parent = only(other.register(str(tmp_path / "bot"), Registration(with_state=True))).checkpoint
        resume(other, parent, tmp_path / "again")
    stranger = tiny.write_adapter(tmp_path / "stranger", base=base, seed=9)
    ckpt.register(str(stranger), Registration(adapter="bot"))  # another bot@v1
    new = only(ckpt.register(str(write_step(tmp_path / "again", base, 20, seed=2)))).checkpoint
    assert new.origin is not None
    assert (new.origin.action, new.origin.parents) == ("resume", ())
    assert (new.origin.detail["from"], new.origin.detail["digest"]) == ("bot@v1", parent.digest.hex)


def test_under_another_name_the_beginning_is_a_copy(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    write_step(tmp_path / "bot", base, 10)
    parent = only(ckpt.register(str(tmp_path / "bot"), Registration(with_state=True))).checkpoint
    resume(ckpt, parent, tmp_path / "again")
    write_step(tmp_path / "again", base, 20, seed=2)
    copy, new = ckpt.register(str(tmp_path / "again"), Registration(adapter="mine")).registered
    assert (copy.checkpoint.digest, copy.checkpoint.origin) == (parent.digest, None)
    assert new.checkpoint.origin is not None
    assert new.checkpoint.origin.parents == (parent.ref,)


def test_without_state_only_the_weights_go_on(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    write_step(tmp_path / "bot", base, 10)
    parent = only(ckpt.register(str(tmp_path / "bot"))).checkpoint
    with pytest.raises(NoTrainerState) as refused:
        resume(ckpt, parent, tmp_path / "again")
    assert refused.value.missing == ["optimizer", "scheduler", "random numbers' state"]
    assert not (tmp_path / "again").exists()
    found = resume(ckpt, parent, tmp_path / "again", weights_only=True)
    assert found.place == tmp_path / "again/adapter"
    new = only(ckpt.register(str(write_step(tmp_path / "again", base, 10, seed=2)))).checkpoint
    assert new.origin is not None
    assert new.origin.detail["weights_only"] is True


def test_a_lineage_that_was_tampered_with_is_refused(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    place = write_step(tmp_path / "bot", base, 10)
    for text in (
        "",
        "[]",
        "{}",
        '{"checkpoint": "bot", "digest": "' + "0" * 64 + '"}',
        '{"checkpoint": "bot@v1", "digest": "7"}',
    ):
        (tmp_path / "bot" / LINEAGE_FILE).write_text(text)
        with pytest.raises(CorruptFile, match=LINEAGE_FILE):
            ckpt.register(str(place))


@pytest.mark.parametrize(
    ("name", "words"), [("adapter_v2-llama", ""), ("lora-llama-qv", "ckpt convert"), ("adapter-llama", "adapter")]
)
def test_litgpt_goes_on_where_it_can(ckpt: Registry, tmp_path: Path, name: str, words: str) -> None:
    said = Registration(adapter="bot", base=str(DATA / "base-llama-gqa"))
    checkpoint = only(ckpt.register(str(DATA / name / "final"), said)).checkpoint
    if words:
        with pytest.raises(Conflict, match=words):
            resume(ckpt, checkpoint, tmp_path / "again")
        return
    found = resume(ckpt, checkpoint, tmp_path / "again")
    newest = max((tmp_path / "again").rglob("step-*/*.pth.adapter_v2"), key=lambda p: int(p.parent.name.split("-")[1]))
    assert newest.parent == found.place
    assert "--resume true" in found.ways[0].text
    assert str(DATA / "base-llama-gqa") in found.ways[0].text


def test_a_run_behind_a_url_points_back(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    write_step(tmp_path / "bot", base, 10)
    parent = only(ckpt.register(str(tmp_path / "bot"), Registration(with_state=True))).checkpoint
    resume(ckpt, parent, tmp_path / "again")
    write_step(tmp_path / "again", base, 20, seed=2)
    url = f"memory://{tmp_path.name}/again"
    MemoryFileSystem().put(str(tmp_path / "again"), url, recursive=True)
    old, new = ckpt.register(url).registered
    assert (old.checkpoint.ref, old.created) == (parent.ref, False)
    assert new.checkpoint.origin is not None
    assert new.checkpoint.origin.parents == (parent.ref,)
    assert LINEAGE_FILE not in files_of(new.checkpoint)
