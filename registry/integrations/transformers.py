"""Register checkpoints while transformers' Trainer writes them. TRL, Axolotl and LLaMA-Factory train with it, too.

trainer = Trainer(..., callbacks=[RegistryCallback(adapter="support-bot")])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from registry.errors import MissingPackage
from registry.intake import Registration, check_words
from registry.integrations.sending import Sender
from registry.refs import nearest_name
from registry.settings import Settings

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ModuleNotFoundError as error:
    raise MissingPackage(error.name or "transformers", "hf") from error

FLUSH_SECONDS = 60.0


class RegistryCallback(TrainerCallback):
    """Registers every checkpoint as soon as it is written, in the background. It never stops or slows a run.

    What cannot be registered (the registry does not answer, the base model is not known) waits in `<home>/outbox`, also beyond the run;
    `ckpt outbox` shows and sends it. Its log is that of `ckpt.training`.

    Args:
        adapter: the adapter's name; taken from the run's folder when empty.
        base: the base model's name, digest or place; what the files say when empty.
        run: the run's name; the trainer's `run_name` or folder when empty.
        tags: put on each checkpoint.
        with_state: keep what the trainer needs to go on, too; `ckpt resume` lays it out then.
        settings: of the registry; read from the environment when None.
        flush_seconds: how long the end of the training waits for the last ones.

    Raises:
        InvalidReference: a name is none; said before the training, as nothing could be registered.
    """

    def __init__(
        self,
        adapter: str = "",
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

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The trainer has written a checkpoint."""
        del control
        if state.is_world_process_zero:
            self._sending(args).take(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def _sending(self, args: Any) -> Sender:
        if self._sender is None:
            folder = Path(args.output_dir).resolve().name
            said = self._said
            run = said.run or str(nearest_name((getattr(args, "run_name", None) or folder).replace("/", "-"), "run"))
            adapter = said.adapter or str(nearest_name(folder, "adapter"))
            whole = replace(said, adapter=adapter, run=run)
            self._sender = Sender(whole, self._settings)
        return self._sender

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training is over: the last checkpoints are registered, or wait on the disk."""
        del args, state, control
        if self._sender is not None:
            self._sender.close(self._flush_seconds)
            self._sender = None
