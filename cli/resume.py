"""`ckpt resume`: go on with a training run from any of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output
from cli.options import Json, Ref, flag
from registry import connect

if TYPE_CHECKING:
    from registry.resuming import Resumption


def resume(
    ref: Ref,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder, which the run goes on in.")],
    weights_only: Annotated[
        bool, flag("--weights-only", "Begin anew with its weights: no optimizer, steps counted from 0.")
    ] = False,
    json: Json = False,
) -> None:
    """Lay out what a trainer needs to go on from a checkpoint, and say how. What the new run registers has it as its origin.

    The trainer's state has to be there: `ckpt register --with-state` keeps it.
    """
    from registry.resuming import resume as lay_out  # noqa: PLC0415 - the help need not wait for it

    with connect() as registry, output.progress() as progress:
        checkpoint = registry.resolve(ref)
        target = folder.expanduser().absolute()
        found = lay_out(registry, checkpoint, target, weights_only=weights_only, progress=progress)
    if json:
        output.print_json(_json(found))
    else:
        _print(found)


def _json(found: Resumption) -> dict[str, object]:
    return {
        "checkpoint": found.checkpoint.ref,
        "folder": str(found.folder),
        "place": str(found.place),
        "weights_only": found.weights_only,
        "ways": [{"tool": each.tool, "text": each.text} for each in found.ways],
    }


def _print(found: Resumption) -> None:
    output.say(f"{output.plain(found.checkpoint.ref)} is in {output.plain(str(found.place))}; go on with")
    for each in found.ways:
        output.print_line(f"# {each.tool}\n{each.text}\n")
    if found.weights_only:
        output.say("from the weights alone: the optimizer, the learning rate and the order of the data begin anew")
