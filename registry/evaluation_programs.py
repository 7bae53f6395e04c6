"""Evaluations by somebody else's program: run on each checkpoint, it prints a JSON object of numbers."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from registry.errors import InvalidInput, ProgramFailed
from registry.inference.places import folder_of_base, folder_of_checkpoint
from registry.manifest import Checkpoint, Metric
from registry.result_files import numbers

if TYPE_CHECKING:
    from registry.service import Registry

_SHOWN = 2000  # of what a program said last, when it fails


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A command line with `{path}` (a folder with the adapter's files), `{base}` (the base model's) and `{ref}`; no shell sees it.

    `name` begins the names of the metrics, `data` names what it measures on, where that is known. `timeout_seconds` ends it.
    """

    command: str
    name: str = ""
    data: str = ""
    timeout_seconds: float = 3600.0

    def words(self, places: dict[str, str]) -> list[str]:
        """The words of the command, the marks in them replaced.

        Raises:
            InvalidInput: quotes that do not end, or nothing at all.
        """
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise InvalidInput("--command", self.command, str(error)) from error
        if not words:
            raise InvalidInput("--command", self.command, "say which program")
        for mark, place in places.items():
            words = [word.replace(mark, place) for word in words]
        return words


def known_numbers(checkpoint: Checkpoint, program: Program) -> tuple[Metric, ...]:
    """What a program of this name has measured on a checkpoint before; nothing where it has none."""
    latest = {metric.name: metric for metric in checkpoint.metrics}
    return tuple(metric for name, metric in latest.items() if program.name and name.startswith(f"{program.name}/"))


def run_program(registry: Registry, checkpoint: Checkpoint, program: Program) -> tuple[Metric, ...]:
    """Run a program on a checkpoint, and record the numbers that it prints: the last JSON object on stdout.

    Raises:
        ProgramFailed: it could not be run, failed, took too long, or printed no such object.
    """
    places = {"{path}": str(folder_of_checkpoint(registry, checkpoint)), "{ref}": checkpoint.ref}
    if "{base}" in program.command:
        places["{base}"] = str(folder_of_base(registry, registry.base(checkpoint.base.hex)))
    words = program.words(places)
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=program.timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProgramFailed(words[0], checkpoint.ref, f"took longer than {program.timeout_seconds:g} s") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ProgramFailed(words[0], checkpoint.ref, str(error)) from error
    if done.returncode:
        said = done.stderr.strip()[-_SHOWN:]
        raise ProgramFailed(words[0], checkpoint.ref, f"exited with {done.returncode}" + (f":\n{said}" if said else ""))
    found = [_named(metric, program, checkpoint) for metric in numbers(_last_object(words[0], checkpoint, done.stdout))]
    if not found:
        raise ProgramFailed(words[0], checkpoint.ref, "there is no number in the object that it printed")
    registry.add_metrics(checkpoint, found)
    return tuple(found)


def _named(metric: Metric, program: Program, checkpoint: Checkpoint) -> Metric:
    name = f"{program.name}/{metric.name}" if program.name else metric.name
    return replace(metric, name=name, step=checkpoint.step, data=program.data)


def _last_object(name: str, checkpoint: Checkpoint, text: str) -> dict[str, Any]:
    """Of what was printed, all of it or its last line that is a JSON object."""
    for candidate in (text, *reversed(text.splitlines())):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    raise ProgramFailed(name, checkpoint.ref, "it printed no JSON object")
