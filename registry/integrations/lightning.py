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
from registry.intake import Registration, check_words
from registry.integrations.sending import Sender, log
from registry.manifest import Metric
from registry.outbox import link
from registry.refs import nearest_name
from registry.settings import Settings
from registry.training_state import LIGHTNING_STATE

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
    return _folder_at(trainer, trainer.global_step)


def _folder_at(trainer: Any, step: int) -> Path:
    return Path(trainer.default_root_dir) / "adapters" / f"step-{step}"


class RegistryCallback(Callback):
    """Registers the adapter of every checkpoint, in the background; see `registry.integrations.transformers.RegistryCallback`.

    Args:
        adapter: the adapter's name.
        run: the run's name; that of the trainer's root folder when empty.
        with_state: keep Lightning's own checkpoint of the step, too; `ckpt resume` lays it out then.
        base, tags, settings, flush_seconds: as there.

    Raises:
        InvalidReference: a name is none.
    """

    def __init__(
        self,
        adapter: str,
        *,
        base: str = "",
        run: str = "",
        tags: Mapping[str, str] | None = None,
        with_state: bool = False,
        settings: Settings | None = None,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self._said = Registration(adapter=adapter, base=base, run=run, tags=dict(tags or {}), with_state=with_state)
        check_words(self._said, 1)
        self._settings, self._flush_seconds = settings, flush_seconds
        self._sender: Sender | None = None
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
        folder = _folder_at(trainer, step)
        if self._said.with_state:
            _add_state(trainer, step, folder)
        root = Path(trainer.default_root_dir).resolve().name
        run = self._said.run or str(nearest_name(root, "run"))
        said = replace(self._said, run=run, step=step, metrics=self._steps.pop(step))
        self._sender = self._sender or Sender(said, self._settings)
        self._sender.take(folder, said)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Training is over: the last adapters are registered, or wait on the disk."""
        del pl_module
        self._finish(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Training was stopped: what was saved until then is registered."""
        del pl_module, exception
        self._finish(trainer)

    def _finish(self, trainer: Any) -> None:
        for step in list(self._steps):
            self._take(trainer, step)
        if self._sender is not None:
            self._sender.close(self._flush_seconds)
            self._sender = None


def _add_state(trainer: Any, step: int, folder: Path) -> None:
    """Put Lightning's own checkpoint of a step beside its adapter. Only Lightning itself knows where it has written that."""
    written = {
        getattr(each, "_last_global_step_saved", None): Path(getattr(each, "_last_checkpoint_saved", ""))
        for each in trainer.checkpoint_callbacks
    }
    place = written.get(step, Path())
    try:
        link(place, folder / LIGHTNING_STATE)
    except OSError as error:
        log.warning("the trainer's state of step %d is not kept: %s", step, error)


def _metrics(trainer: Any) -> tuple[Metric, ...]:
    """What the trainer has logged: the numbers of its callbacks."""
    found = {str(name): float(value) for name, value in trainer.callback_metrics.items()}
    return tuple(Metric(name=name, value=value, step=trainer.global_step) for name, value in found.items())
