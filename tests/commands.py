"""What tests of the command line share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "support-bot"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ckpt = Callable[..., Result]


def interruptible(*words: str) -> list[str]:
    """A command for a process of its own, which hears interrupts: where tests run in the background, children inherit that they are ignored."""
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    return [sys.executable, "-c", f"{hear}; from cli.app import main; main({list(words)!r})"]
