"""What moves bytes: registering, recording base models, pulling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from sites import Maker, Site

from registry.errors import (
    Conflict,
    CorruptFile,
    InvalidInput,
    InvalidReference,
    NameTaken,
    NotACheckpoint,
    PathNotFound,
    Refused,
    RegistryError,
    UnknownBase,
    UnsafePickle,
)
from registry.manifest import BaseModel, Metric
from registry.registering import Registration
from registry.service import Registry

ON_BASE = Registration(base="base")


def actions(ckpt: Registry) -> list[str]:
    """Everything that was done, but for letting people in."""
    return [event.action for event in ckpt.history() if event.action != "token.create"]


def test_a_run_is_registered_and_again_changes_nothing(ckpt: Registry, base: BaseModel, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "bot", base="base")
    told: list[tuple[str, int, int]] = []
    first = ckpt.register(str(run), ON_BASE, progress=lambda *each: told.append(each))
    again = ckpt.register(str(run), ON_BASE)
    assert [each.checkpoint.ref for each in first.registered] == ["bot@v1", "bot@v2", "bot@v3", "bot@v4"]
    assert [each.checkpoint.step for each in first.registered] == [9, 50, 100, None]
    assert [each.checkpoint.metric("eval_loss") for each in first.registered] == [1.41, None, 0.5, None]
    assert [each.created for each in (*first.registered, *again.registered)] == [True] * 4 + [False] * 4
    assert [each.checkpoint for each in again.registered] == [each.checkpoint for each in first.registered]
    assert all(each.report.verdict == "pass" and each.checkpoint.source for each in first.registered)
    for step, _, total in told:
        assert sum(done for what, done, _ in told if what == step) == total > 0
    assert actions(ckpt) == ["base.add", *["register"] * 4]


def test_what_is_said_again_is_added(ckpt: Registry, base: BaseModel, tmp_path: Path) -> None:
    place = str(tiny.write_adapter(tmp_path / "bot"))
    ckpt.register(place, ON_BASE)
    said = Registration(base="base", note="anew", tags={"a": "1"}, metrics=(Metric(name="acc", value=0.5),))
    (again,) = ckpt.register(place, said).registered
    assert (again.created, again.checkpoint.tags, again.checkpoint.metric("acc")) == (False, {"a": "1"}, 0.5)
    assert again.checkpoint == ckpt.resolve("bot")
    assert [event.action for event in ckpt.history("bot")] == ["register", "annotate"]


def test_the_base_model_is_found_beside_the_adapter(ckpt: Registry, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "models" / "tiny")
    (found,) = ckpt.register(str(tiny.write_adapter(tmp_path / "models" / "bot", base="tiny"))).registered
    assert (found.checkpoint.base_name, ckpt.base("tiny").url) == ("tiny", str(base))
    named = Registration(base=str(base), adapter="other")
    assert ckpt.register(str(tiny.write_adapter(tmp_path / "bot", seed=2)), named).registered[0].checkpoint.base == (
        found.checkpoint.base
    )
    assert len(ckpt.bases()) == 1


def test_a_base_in_the_store_stays_there_when_its_folder_is_met_again(
    ckpt: Registry, base: BaseModel, tmp_path: Path
) -> None:
    ckpt.register(str(tiny.write_adapter(tmp_path / "bot", base=tmp_path / "base")))
    assert ckpt.base("base") == base


def test_whole_models_become_base_models(ckpt: Registry, tmp_path: Path) -> None:
    intake = ckpt.register(str(tiny.write_base(tmp_path / "tuned", seed=4)), Registration(adapter="team/tuned"))
    assert ([each.base.name for each in intake.models], intake.registered) == (["team/tuned"], ())
    assert ckpt.base("team/tuned").digest == intake.models[0].base.digest


def test_damaged_checkpoints_of_a_run_are_told(ckpt: Registry, base: BaseModel, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "bot", base="base")
    weights = run / "checkpoint-50/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    intake = ckpt.register(str(run), ON_BASE)
    assert [each.checkpoint.step for each in intake.registered] == [9, 100, None]
    assert [type(error) for error in intake.unreadable] == [CorruptFile]
    assert "checkpoint-50" in intake.unreadable[0].path


def nameless(folder: Path) -> Path:
    return tiny.write_adapter(folder / "odd", base="base", config={"base_model_name_or_path": ""})


def misfit(folder: Path) -> Path:
    place = tiny.write_adapter(folder / "odd")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(place / "adapter_model.safetensors")
    save_file(
        {name: array[:, :3].copy() if "lora_A" in name else array for name, array in tensors.items()},
        place / "adapter_model.safetensors",
    )
    return place


def empty(folder: Path) -> Path:
    (folder / "odd").mkdir()
    return folder / "odd"


def pickled(folder: Path) -> Path:
    import pickle

    place = tiny.write_adapter(folder / "odd")
    (place / "adapter_model.safetensors").unlink()
    (place / "adapter_model.bin").write_bytes(pickle.dumps(print))
    return place


CASES: list[tuple[Callable[[Path], Path], Registration, tuple[type[RegistryError], ...]]] = [
    (lambda folder: folder / "nothing", ON_BASE, (PathNotFound,)),
    (empty, ON_BASE, (NotACheckpoint,)),
    (misfit, ON_BASE, (Refused,)),
    (nameless, Registration(), (UnknownBase,)),
    (nameless, Registration(base="nobody"), (UnknownBase,)),
    (nameless, Registration(base="base", adapter="no name"), (InvalidReference,)),
    (nameless, Registration(base="base", tags={"no key": "x"}), (InvalidReference,)),
    (lambda folder: tiny.write_run(folder / "odd"), Registration(base="base", step=4), (InvalidInput,)),
    (pickled, ON_BASE, (UnsafePickle, CorruptFile)),
]


@pytest.mark.usefixtures("base")
def test_what_cannot_be_registered_leaves_nothing(ckpt: Registry, tmp_path: Path) -> None:
    for number, (write, said, errors) in enumerate(CASES):
        (tmp_path / f"case-{number}").mkdir()
        with pytest.raises(RegistryError) as caught:
            ckpt.register(str(write(tmp_path / f"case-{number}")), said)
        assert type(caught.value) in errors
    assert ckpt.checkpoints() == []
    assert actions(ckpt) == ["base.add"]


def test_content_stays_on_its_base(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    one = make(adapter="bot")
    ckpt.add_base(str(tiny.write_base(tmp_path / "other", seed=9)), copy=True)
    with pytest.raises(Conflict) as caught:
        ckpt.register(one.source, Registration(adapter="bot", base="other"))
    assert caught.value.fields["subject"] == "bot@v1"


def test_a_base_model_comes_back_whole(ckpt: Registry, base: BaseModel, tmp_path: Path) -> None:
    assert ckpt.bases() == [base]
    assert ckpt.base("base") == ckpt.base(base.digest.hex[:10]) == base
    assert (base.in_store, len(base.fingerprint.tensors), base.author) == (True, len(base.tensors), "ada")
    again = ckpt.add_base(str(tmp_path / "base"), arch_version="llama-3")
    assert (again.created, again.base.name, again.base.arch_version, again.base.in_store) == (
        False, "base", "llama-3", True,
    )  # fmt: skip
    other = tiny.write_base(tmp_path / "other", seed=5)
    with pytest.raises(NameTaken):
        ckpt.add_base(str(other), name="base")
    with pytest.raises(Conflict):
        ckpt.add_base(str(tmp_path / "base"), name="another")
    with pytest.raises(NotACheckpoint):
        ckpt.add_base(str(empty(tmp_path)))
    with pytest.raises(PathNotFound):
        ckpt.add_base(str(tmp_path / "nowhere"))
    assert len(ckpt.bases()) == 1


def test_a_checkpoint_is_pulled_to_the_byte(ckpt: Registry, make: Maker, site: Site, tmp_path: Path) -> None:
    one = make()
    told: list[int] = []
    site.connect("bob").pull(one, tmp_path / "pulled", lambda what, done, total: told.append(done))
    assert tiny.contents(tmp_path / "pulled") == tiny.contents(Path(one.source))
    assert sum(told) == one.manifest.size_bytes
    assert sorted(path.name for path in tmp_path.iterdir() if "pulled" in path.name) == ["pulled"]
    with pytest.raises(Conflict) as caught:
        ckpt.pull(one, tmp_path / "pulled")
    assert caught.value.fields["subject"] == str(tmp_path / "pulled")
