"""Register adapters while Lightning's Trainer runs: those that a model saves beside the trainer's own checkpoints.

Lightning's `.ckpt` files hold a whole training state and are no adapters. A module that trains one with PEFT saves it where its checkpoint goes:

    class Module(lightning.LightningModule):
        def on_save_checkpoint(self, checkpoint):
            self.model.save_pretrained(folder_of(self.trainer))

    Trainer(callbacks=[ModelCheckpoint(...), RegistryCallback(adapter="support-bot")])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from registry.errors import MissingPackage
from registry.intake import Registration
from registry.integrations.sending import Sender
from registry.manifest import Metric
from registry.settings import Settings

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ModuleNotFoundError as error:
        raise MissingPackage("lightning", "lightning") from error

FLUSH_SECONDS = 60.0


def folder_of(trainer: Any) -> Path:
    """Where an adapter belongs that is saved now: a folder for each step, below the trainer's root."""
    return Path(trainer.default_root_dir) / "adapters" / f"step-{trainer.global_step}"


class RegistryCallback(Callback):
    """Registers the adapter of every checkpoint, in the background; see `registry.integrations.transformers.RegistryCallback`.

    Args:
        adapter: the adapter's name.
        base, run, tags, settings, flush_seconds: as there.
    """

    def __init__(
        self,
        adapter: str,
        *,
        base: str = "",
        run: str = "",
        tags: Mapping[str, str] | None = None,
        settings: Settings | None = None,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self._said = Registration(adapter=adapter, base=base, run=run, tags=dict(tags or {}))
        self._sender = Sender(self._said, settings)
        self._flush_seconds = flush_seconds
        self._steps: dict[int, tuple[Metric, ...]] = {}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """A checkpoint is about to be written: what was measured then is kept for its adapter."""
        del pl_module, checkpoint
        if trainer.is_global_zero:
            self._take_finished(trainer)
            self._steps[trainer.global_step] = _metrics(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """What was saved before is complete by now."""
        self._take_finished(trainer)

    def _take_finished(self, trainer: Any) -> None:
        for step in [step for step in self._steps if step < trainer.global_step]:
            self._take(trainer, step)

    def _take(self, trainer: Any, step: int) -> None:
        folder = Path(trainer.default_root_dir) / "adapters" / f"step-{step}"
        self._sender.take(folder, replace(self._said, step=step, metrics=self._steps.pop(step)))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Training is over: the last adapters are registered, or wait on the disk."""
        del pl_module
        if trainer.is_global_zero:
            for step in list(self._steps):
                self._take(trainer, step)
            self._sender.close(self._flush_seconds)


def _metrics(trainer: Any) -> tuple[Metric, ...]:
    """What the trainer has logged: the numbers of its callbacks."""
    found = {str(name): float(value) for name, value in trainer.callback_metrics.items()}
    return tuple(Metric(name=name, value=value, step=trainer.global_step) for name, value in found.items())
