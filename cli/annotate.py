"""`ckpt note`, `tag`, `metric`, `alias`, `rm`: what people add to checkpoints, and what they remove."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import output, parse
from cli.evaluate import metric_import
from cli.options import Higher, Lower, Ref, flag
from registry import connect
from registry.errors import InvalidInput, InvalidReference
from registry.refs import CheckpointRef

metric_app = typer.Typer(no_args_is_help=True, help="Metrics of checkpoints.")
metric_app.command("import")(metric_import)
alias_app = typer.Typer(no_args_is_help=True, help="Movable names inside an adapter: support-bot@candidate.")


def note(ref: Ref, text: Annotated[str, typer.Argument(metavar="TEXT", help="What to remember.")]) -> None:
    """Add a note to a checkpoint. Notes are never changed or removed."""
    with connect() as registry:
        checkpoint = registry.resolve(ref)
        registry.note(checkpoint, text)
    output.print_line(f"noted on {checkpoint.ref}")


def tag(
    ref: Ref,
    tags: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Tags to set.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="KEY", help="A tag to remove. May be repeated.")
    ] = None,
) -> None:
    """Set or remove tags of a checkpoint."""
    wanted = parse.pairs(tags or (), "tag")
    if not wanted and not remove:
        raise InvalidInput("tag", ref, "say KEY=VALUE, or --remove KEY")
    with connect() as registry:
        checkpoint = registry.resolve(ref)
        registry.tag(checkpoint, wanted, remove or ())
    output.print_line(f"tagged {checkpoint.ref}")


@metric_app.command("add")
def metric_add(
    ref: Ref,
    values: Annotated[list[str], typer.Argument(metavar="NAME=VALUE", help="Metrics to record.")],
    step: Annotated[int | None, typer.Option(min=0, metavar="N", help="The step they were measured at.")] = None,
    lower: Lower = False,
    higher: Higher = False,
) -> None:
    """Record metrics of a checkpoint. Of one name the last recorded counts; earlier ones stay on record."""
    metrics = parse.metrics(values, step=step, direction=parse.direction(lower=lower, higher=higher))
    with connect() as registry:
        checkpoint = registry.resolve(ref)
        registry.add_metrics(checkpoint, metrics)
    output.print_line(f"recorded {', '.join(metric.name for metric in metrics)} of {checkpoint.ref}")


@alias_app.command("set")
def alias_set(
    ref: Ref, alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The alias, such as candidate.")]
) -> None:
    """Point an alias to a checkpoint."""
    with connect() as registry:
        checkpoint = registry.resolve(ref)
        before = registry.set_alias(checkpoint, alias)
    moved = f", before {before.ref}" if before else ""
    output.print_line(f"{checkpoint.adapter}@{alias} is {checkpoint.ref}{moved}")


@alias_app.command("rm")
def alias_rm(
    ref: Annotated[
        str, typer.Argument(metavar="ADAPTER@ALIAS", help="The alias with its adapter: support-bot@candidate.")
    ],
) -> None:
    """Remove an alias."""
    parsed = CheckpointRef.parse(ref)
    if parsed.adapter is None or parsed.selector != "label":
        raise InvalidReference(ref, "expected adapter@alias")
    with connect() as registry:
        before = registry.remove_alias(str(parsed.adapter), parsed.value)
    output.print_line(f"removed {ref}, which was {before.ref}")


def rm(ref: Ref, yes: Annotated[bool, flag("--yes", "Do not ask.", "-y")] = False) -> None:
    """Remove a checkpoint. Refused while it has an alias or a recipe that is kept needs it, or when it was shipped or merged."""
    with connect() as registry:
        checkpoint = registry.resolve(ref)
        if not output.confirm(f"remove {checkpoint.ref} ({checkpoint.digest.short})?", yes=yes):
            raise typer.Exit(1)
        registry.remove(checkpoint)
    output.print_line(f"removed {checkpoint.ref}")
    output.say("its files stay in the store until `ckpt gc`")
