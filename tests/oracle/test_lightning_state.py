"""Lightning's trainer: what it needs to go on is kept beside the adapter, and a run goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import trained

from registry.errors import InvalidReference
from registry.resuming import resume
from registry.settings import Settings
from registry.training_state import LIGHTNING_STATE, LINEAGE_FILE

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # those are of lightning's own making
ENOUGH = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.write_model(tmp_path_factory.mktemp("model") / "base")


def module_of(model: Path, *, fails_at: int = -1) -> Any:
    """A LoRA that is trained by Lightning; its own checkpoints leave the base model out."""
    import torch
    from lightning.pytorch import LightningModule
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from registry.integrations.lightning import folder_of

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False
            config = LoraConfig(r=2, target_modules=["q_proj"])
            self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            if self.global_step == fails_at:
                raise KeyError("out of luck")
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            trained_alone = {name for name, value in self.named_parameters() if value.requires_grad}
            checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in trained_alone}
            self.model.save_pretrained(folder_of(self.trainer))

    return Module()


def fit(module: Any, root: Path, home: Path, *, model: Path, steps: int, resumed: Path | None = None) -> Any:
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from registry.integrations.lightning import RegistryCallback

    settings = Settings.from_environment({"CKPT_HOME": str(home), "CKPT_USER": "ada"})
    callback = RegistryCallback("bot", base=str(model), with_state=True, settings=settings, flush_seconds=ENOUGH)
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=root,
        callbacks=[ModelCheckpoint(every_n_train_steps=2, save_top_k=-1), callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(5, 80, (12, 10), generator=generator)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2), ckpt_path=resumed)
    return trainer


def test_a_run_goes_on_with_its_optimizer(model: Path, tmp_path: Path) -> None:
    fit(module_of(model), tmp_path / "first", tmp_path / "home", model=model, steps=4)
    with tiny.open_registry(tmp_path / "home") as ckpt:
        found = ckpt.checkpoints("bot")
        assert [(each.run, each.step) for each in found] == [("first", 2), ("first", 4)]
        assert all(LIGHTNING_STATE in {file.path for file in each.manifest.files} for each in found)
        laid = resume(ckpt, found[0], tmp_path / "second")
        assert [way.tool for way in laid.ways] == ["Lightning"]
        assert str(laid.place / LIGHTNING_STATE) in laid.ways[0].text
        assert (tmp_path / "second/adapters" / LINEAGE_FILE).exists()
    state = laid.place / LIGHTNING_STATE
    trainer = fit(module_of(model), tmp_path / "second", tmp_path / "home", model=model, steps=6, resumed=state)
    assert trainer.global_step == 6
    with tiny.open_registry(tmp_path / "home") as ckpt:
        new = ckpt.checkpoints("bot")[2:]
        assert [(each.run, each.step) for each in new] == [("second", 4), ("second", 6)]
        assert all(each.origin is not None and each.origin.parents == ("bot@v1",) for each in new)


def test_what_was_saved_before_a_run_failed_is_registered(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="out of luck"):
        fit(module_of(model, fails_at=4), tmp_path / "run", tmp_path / "home", model=model, steps=6)
    with tiny.open_registry(tmp_path / "home") as ckpt:
        assert [each.step for each in ckpt.checkpoints("bot")] == [2, 4]


@pytest.mark.parametrize(
    "said", [{"adapter": "not a name"}, {"adapter": "bot", "run": "a/b"}, {"adapter": "bot", "tags": {"a b": "c"}}]
)
def test_names_that_are_none_are_refused_before_the_training(said: dict[str, Any]) -> None:
    from registry.integrations.lightning import RegistryCallback as OfLightning
    from registry.integrations.transformers import RegistryCallback

    for kind in (OfLightning, RegistryCallback):
        with pytest.raises(InvalidReference):
            kind(**said)
