"""A run that is resumed from the registry against one that was never stopped: the same losses, the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import trained
from safetensors.numpy import load_file

from registry.registering import Registration
from registry.resuming import resume
from registry.service import Registry

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that was never stopped, and its trainer."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained.train(folder / "bot", trained.write_model(folder / "base"), steps=(20, 80))


@pytest.fixture
def registered(whole: tuple[Path, Any], tmp_path: Path) -> Iterator[Registry]:
    with tiny.open_registry(tmp_path / "home") as ckpt:
        ckpt.add_base(str(whole[0] / "base"), name="base")
        ckpt.register(str(whole[0] / "bot"), Registration(base="base", with_state=True))
        yield ckpt


def losses(trainer: Any, after: int) -> dict[tuple[int, str], float]:
    return {
        (entry["step"], name): entry[name]
        for entry in trainer.state.log_history
        for name in ("loss", "eval_loss", "grad_norm")
        if name in entry and entry["step"] > after
    }


def test_a_resumed_run_is_the_run_that_was_never_stopped(
    registered: Registry, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, trainer = whole
    found = resume(registered, registered.resolve("bot@step:40"), tmp_path / "again")
    assert found.place == tmp_path / "again/checkpoint-40"
    assert str(found.place) in found.ways[0].text
    other = trained.train(tmp_path / "again", folder / "base", steps=(20, 80), resume=str(found.place))
    assert losses(other, 40) == losses(trainer, 40)
    assert len(losses(other, 40)) == 8 + 2 + 8
    weights = [
        load_file(place / "checkpoint-80/adapter_model.safetensors") for place in (folder / "bot", tmp_path / "again")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_what_the_new_run_registers_points_back(registered: Registry, whole: tuple[Path, Any], tmp_path: Path) -> None:
    parent = registered.resolve("bot@step:40")
    found = resume(registered, parent, tmp_path / "again")
    trained.train(tmp_path / "again", whole[0] / "base", steps=(20, 60), resume=str(found.place))
    intake = registered.register(str(tmp_path / "again"), Registration(base="base"))
    old, new = intake.registered
    assert (old.checkpoint.ref, old.created, old.checkpoint.origin) == (parent.ref, False, None)
    assert new.created
    assert (str(new.checkpoint.adapter), new.checkpoint.run, new.checkpoint.step) == ("bot", "again", 60)
    assert new.checkpoint.origin is not None
    assert (new.checkpoint.origin.action, new.checkpoint.origin.parents) == ("resume", (parent.ref,))
    assert registered.details(parent).children == (new.checkpoint.ref,)


def test_the_weights_alone_can_be_trained_on(registered: Registry, whole: tuple[Path, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = resume(registered, registered.resolve("bot@step:40"), tmp_path / "anew", weights_only=True)
    base = AutoModelForCausalLM.from_pretrained(whole[0] / "base")
    model = PeftModel.from_pretrained(base, str(found.place), is_trainable=True)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert "is_trainable=True" in found.ways[0].text
