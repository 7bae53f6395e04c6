"""Real training runs with the callbacks: everything is registered, and nothing that the registry does can stop or slow a run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import tiny
import trained
from waiting import until

from registry.integrations.transformers import RegistryCallback
from registry.outbox import Outbox
from registry.service import Registry
from registry.settings import Settings

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.write_model(tmp_path_factory.mktemp("model") / "base")


ENOUGH = 600.0  # seconds for what is waited for: on however slow a machine


def settings(home: Path, **more: str) -> Settings:
    return Settings.from_environment({"CKPT_HOME": str(home), "CKPT_USER": "ada", **more})


def test_every_checkpoint_of_a_real_run_is_registered(model: Path, tmp_path: Path) -> None:
    callback = RegistryCallback(
        "support-bot", tags={"team": "nlu"}, settings=settings(tmp_path / "home"), flush_seconds=ENOUGH
    )
    trainer = trained.train(tmp_path / "lr-1e-2", model, callbacks=[callback])
    said = {each["step"]: each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each}
    with tiny.open_registry(tmp_path / "home") as ckpt:
        found = ckpt.checkpoints("support-bot")
        assert [each.step for each in found] == list(trained.STEPS)
        assert {each.step: each.metric("eval_loss") for each in found} == said
        assert {(each.run, each.tags["team"], each.base_name) for each in found} == {("lr-1e-2", "nlu", "base")}
        best = ckpt.rank("support-bot").groups[0].checkpoints[0]
        assert best.step == min(said, key=lambda step: said[step]) != trained.STEPS[-1]
    assert Outbox(tmp_path / "home").waiting() == []


def test_what_the_trainer_deletes_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = RegistryCallback("bot", settings=settings(tmp_path / "home"), flush_seconds=ENOUGH)
    monkeypatch.setattr("transformers.TrainingArguments.save_total_limit", 1, raising=False)
    deleting = _Deleting()
    trained.train(tmp_path / "run", model, callbacks=[callback, deleting], steps=(20, 40, 60))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-60"]
    with tiny.open_registry(tmp_path / "home") as ckpt:
        assert [each.step for each in ckpt.checkpoints("bot")] == [20, 40, 60]


class _Deleting(RegistryCallback):
    """Keeps only the newest checkpoint, right after it was written."""

    def __init__(self) -> None:
        super().__init__("unused")

    def on_save(self, args: object, state: object, control: object, **_: object) -> None:
        root = Path(args.output_dir)  # type: ignore[attr-defined]
        for path in root.iterdir():
            if path.name != f"checkpoint-{state.global_step}":  # type: ignore[attr-defined]
                shutil.rmtree(path)


def test_a_registry_that_is_out_of_reach_does_not_stop_the_run(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = settings(tmp_path / "home", CKPT_SERVER="http://127.0.0.1:9", CKPT_TOKEN="ckpt_none")
    callback = RegistryCallback("bot", settings=gone, flush_seconds=0.2)
    with caplog.at_level(logging.WARNING, "ckpt.training"):
        trainer = trained.train(tmp_path / "run", model, callbacks=[callback], steps=(20, 40))
    assert trainer.state.global_step == 40
    assert "wait to be registered" in caplog.text
    assert [each.said.step for each in Outbox(tmp_path / "home").waiting()] == [20, 40]
    with tiny.open_registry(tmp_path / "home") as ckpt:  # later, when it is back
        assert len(_sent(Outbox(tmp_path / "home"), ckpt)) == 2
        assert [each.step for each in ckpt.checkpoints("bot")] == [20, 40]


def _sent(box: Outbox, ckpt: Registry) -> list[object]:
    """What is sent as soon as the run's own thread, which may be trying to the last, lets somebody else."""
    done: list[object] = []
    until(lambda: done.extend(box.send(ckpt)) or done)
    return done


def test_a_disk_that_takes_nothing_does_not_stop_the_run(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file where the home should be")
    callback = RegistryCallback("bot", settings=settings(tmp_path / "home"), flush_seconds=1)
    with caplog.at_level(logging.WARNING, "ckpt.training"):
        trainer = trained.train(tmp_path / "run", model, callbacks=[callback], steps=(20,))
    assert trainer.state.global_step == 20
    assert "is not taken into the registry" in caplog.text


def test_a_base_that_is_not_known_yet_makes_checkpoints_wait(model: Path, tmp_path: Path) -> None:
    callback = RegistryCallback("bot", base="the-one", settings=settings(tmp_path / "home"), flush_seconds=ENOUGH)
    trained.train(tmp_path / "run", model, callbacks=[callback], steps=(20,))
    (waiting,) = Outbox(tmp_path / "home").waiting()
    assert "the-one" in waiting.problem
    with tiny.open_registry(tmp_path / "home") as ckpt:
        ckpt.add_base(str(model), name="the-one")
        assert len(list(Outbox(tmp_path / "home").send(ckpt))) == 1
        assert _only(ckpt).base_name == "the-one"


def _only(ckpt: Registry) -> object:
    (found,) = ckpt.checkpoints("bot")
    return found


@pytest.mark.filterwarnings("ignore")  # of lightning's own making
def test_a_module_of_lightning_registers_what_it_saves(model: Path, tmp_path: Path) -> None:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from registry.integrations.lightning import RegistryCallback as LightningCallback
    from registry.integrations.lightning import folder_of

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            config = LoraConfig(r=2, target_modules=["q_proj"])
            self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
            del checkpoint
            self.model.save_pretrained(folder_of(self.trainer))

    saving = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)
    callback = LightningCallback(
        "bot", base=str(model), run="first", settings=settings(tmp_path / "home"), flush_seconds=ENOUGH
    )
    data = torch.utils.data.DataLoader(torch.randint(5, 80, (12, 10)), batch_size=2)
    trainer = Trainer(
        max_steps=6,
        default_root_dir=tmp_path / "run",
        callbacks=[saving, callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Module(), data)
    with tiny.open_registry(tmp_path / "home") as ckpt:
        found = ckpt.checkpoints("bot")
        assert [each.step for each in found] == [2, 4, 6]
        assert all(each.metric("loss") is not None and each.run == "first" for each in found)
