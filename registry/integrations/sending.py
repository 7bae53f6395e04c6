"""What all callbacks do: take a checkpoint into the outbox, and have a thread of its own register it.

Nothing here ever raises into a training run, or keeps it waiting: taking in makes hard links, and the rest is the thread's.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import closing
from pathlib import Path
from typing import final

from registry import connect
from registry.errors import RegistryError
from registry.intake import Registered, Registration
from registry.outbox import Outbox
from registry.settings import Settings

log = logging.getLogger("ckpt.training")

_RETRY_SECONDS = 30.0


@final
class Sender:
    """Registers checkpoints in the background.

    Args:
        said: what is said of each.
        settings: of the registry; read from the environment when None.
    """

    def __init__(self, said: Registration, settings: Settings | None = None) -> None:
        self._said, self._settings = said, settings or Settings.from_environment(os.environ)
        self.outbox = Outbox(self._settings.home)
        self._news, self._is_over = threading.Condition(), False
        self._wanted, self._tried = 0, 0  # how often sending was asked for, and how many of these were seen to
        self._thread: threading.Thread | None = None

    def take(self, path: Path, said: Registration | None = None) -> None:
        """Take a checkpoint in. What goes wrong is told in the log, and the run goes on.

        Args:
            path: its folder.
            said: what is said of this one, instead of what is said of all.
        """
        try:
            dropped = self.outbox.put(path, said or self._said)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end somebody's training
            log.warning("%s is not taken into the registry: %s", path, error)
            return
        for each in dropped:
            log.warning("the outbox is full: %s of step %s is dropped", each.said.adapter, each.said.step)
        self._ask()

    def _ask(self) -> int:
        """Have what waits sent; gives the number of this request."""
        with self._news:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ckpt sender", daemon=True)
                self._thread.start()
            self._wanted += 1
            self._news.notify_all()
            return self._wanted

    def flush(self, seconds: float) -> bool:
        """Wait until everything is registered, or as long as given; what is left then waits on the disk. Tells whether nothing is left."""
        if self.outbox.waiting():
            number = self._ask()
            with self._news:
                self._news.wait_for(lambda: self._tried >= number, seconds)
        left = self.outbox.waiting()
        if left:
            log.warning("%d checkpoints wait to be registered: `ckpt outbox send` does it later", len(left))
        return not left

    def close(self, seconds: float) -> bool:
        """The run is over: wait as `flush` does, then end the thread."""
        is_done = self.flush(seconds)
        with self._news:
            self._is_over = True
            self._news.notify_all()
        return is_done

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._is_over or self._wanted > self._tried, _RETRY_SECONDS)
                if self._is_over:
                    return
                number = self._wanted
            try:
                self._send()
            except Exception:  # a worker's loop: the next checkpoint is another try
                log.exception("checkpoints could not be registered")
            with self._news:
                self._tried = number
                self._news.notify_all()

    def _send(self) -> None:
        if not self.outbox.waiting():
            return
        try:
            with closing(connect(self._settings)) as registry:
                for each in self.outbox.send(registry):
                    _tell(each)
        except RegistryError as error:  # the registry cannot be opened at all
            log.warning("the registry is out of reach, checkpoints wait: %s", error)


def _tell(done: object) -> None:
    if isinstance(done, Registered):
        log.info("registered %s", done.checkpoint.ref)
    elif isinstance(done, tuple):
        waiting, error = done
        log.warning("%s of step %s waits to be registered: %s", waiting.said.adapter, waiting.said.step, error)
