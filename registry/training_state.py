"""What a trainer writes beside an adapter to go on from there, and the file that says what a resumed run began with.

Pure but for reading that one file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import final

from registry.codec import from_json, plain
from registry.disk import Translating
from registry.errors import CorruptFile, InvalidInput, InvalidReference, PathNotFound
from registry.locations import open_location
from registry.manifest import Origin
from registry.refs import CheckpointRef, Digest

LINEAGE_FILE = "ckpt-resumed.json"
RESUME = "resume"
LEFT_OUT = "state of the trainer, which --with-state keeps"
TRAINER_STATE = "trainer_state.json"
LIGHTNING_STATE = "lightning.ckpt"
# Of transformers' Trainer, alone and with FSDP or DeepSpeed, and of Lightning's. What is small and can be read by people is always kept.
_STATE = re.compile(
    r"(?:lightning\.ckpt|optimizer\.(?:pt|bin)|scheduler\.pt|scaler\.pt|rng_state(?:_[0-9]+)?\.pth|latest|zero_to_fp32\.py"
    r"|(?:optimizer_[0-9]+|pytorch_model_fsdp_[0-9]+|global_step[0-9]+)/.+|optimizer_[0-9]+\.(?:bin|pt))"
)
_OPTIMIZER = re.compile(r"optimizer\.(?:pt|bin)|optimizer_[0-9]+\.(?:bin|pt)|(?:optimizer_[0-9]+|global_step[0-9]+)/.+")
_SCHEDULER = re.compile(r"scheduler\.pt|global_step[0-9]+/.+")
_RANDOM = re.compile(r"rng_state(?:_[0-9]+)?\.pth")


def is_state(path: str) -> bool:
    """Whether a file of a checkpoint is for its trainer alone."""
    return _STATE.fullmatch(path) is not None


def missing_state(paths: Iterable[str]) -> tuple[str, ...]:
    """What transformers' Trainer would need, and a checkpoint has not got, in words; Lightning's needs one file."""
    have = list(paths)
    if LIGHTNING_STATE in have:
        return ()
    wanted = {"optimizer": _OPTIMIZER, "scheduler": _SCHEDULER, "random numbers' state": _RANDOM}
    lacking = [name for name, pattern in wanted.items() if not any(map(pattern.fullmatch, have))]
    return tuple(lacking if TRAINER_STATE in have else [*lacking, TRAINER_STATE])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What a resumed run went on from: a checkpoint as `name@v3`, its digest and step. `weights_only`: without its trainer's state, so that
    steps are counted anew.

    Raises:
        InvalidReference: the checkpoint is not named in this way.
    """

    checkpoint: str
    digest: Digest
    step: int | None = None
    weights_only: bool = False

    def __post_init__(self) -> None:
        if self.parsed.adapter is None or self.parsed.selector != "version":
            raise InvalidReference(self.checkpoint, "expected name@v3")

    @property
    def parsed(self) -> CheckpointRef:
        """The checkpoint as a reference."""
        return CheckpointRef.parse(self.checkpoint)

    def is_at(self, step: int | None) -> bool:
        """Whether what a run has at a step is still what it began with."""
        return not self.weights_only and step is not None and step == self.step

    def origin(self, *, is_here: bool) -> Origin:
        """The same as the origin of what the run has made since; a parent that is not here is only told of."""
        detail = {
            "from": self.checkpoint,
            "digest": self.digest.hex,
            "step": self.step,
            "weights_only": self.weights_only,
        }
        return Origin(action=RESUME, parents=(self.checkpoint,) if is_here else (), detail=detail)


def write_beginning(folder: Path, began: Beginning) -> None:
    """Say in a run's folder what it went on from.

    Raises:
        StorageFailed: the disk does not take it.
    """
    with Translating(str(folder)):
        (folder / LINEAGE_FILE).write_text(json.dumps(plain(began), indent=2) + "\n")


def read_beginning(url: str) -> Beginning | None:
    """What a run's folder, by its path or URL, says that it went on from; None where it says nothing.

    Raises:
        CorruptFile: the file is not as `ckpt resume` writes it.
        StorageFailed: it cannot be read.
    """
    try:
        with closing(open_location(url)) as folder, folder.open(LINEAGE_FILE) as stream:
            data = stream.read()
        return from_json(Beginning, json.loads(data))
    except PathNotFound:
        return None
    except (ValueError, TypeError, RecursionError, InvalidInput) as error:
        raise CorruptFile(f"{url}/{LINEAGE_FILE}", "not what `ckpt resume` wrote") from error
