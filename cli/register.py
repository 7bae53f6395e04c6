"""`ckpt register` and `ckpt base`: what comes into the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli import output, parse, views
from cli.errors import explain
from cli.options import ArchVersion, BaseName, Json, Note, flag
from registry import connect

if TYPE_CHECKING:
    from registry.registering import Intake

base_app = typer.Typer(no_args_is_help=True, help="Base models: what adapters are trained on and merged into.")


def register(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint's folder, or that of a whole run: every checkpoint in it is registered. URLs work too.",
        ),
    ],
    adapter: Annotated[str, typer.Option(metavar="NAME", help="Name of the adapter. Default: the folder's.")] = "",
    base: Annotated[
        str, typer.Option(metavar="PATH_OR_NAME", help="Base model. Default: the one that the files name.")
    ] = "",
    run: Annotated[str, typer.Option(metavar="NAME", help="Name of the training run. Default: the folder's.")] = "",
    step: Annotated[int | None, typer.Option(min=0, metavar="N", help="Step. Default: the files know.")] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A metric. May be repeated.")] = None,
    note: Note = "",
    tag: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A tag. May be repeated.")] = None,
    arch_version: ArchVersion = "",
    with_state: Annotated[
        bool, flag("--with-state", "Keep what the trainer needs to go on, too: `ckpt resume` does then.")
    ] = False,
    json: Json = False,
) -> None:
    """Record an adapter checkpoint, or a whole training run, with its base model's fingerprint.

    Formats are told apart by content: PEFT (with the Trainer's state) and litgpt (LoRA, adapter, adapter v2). A whole model, as a full
    fine-tune leaves it, is recorded as a base model, under the run's name.

    Registering the same content again changes nothing.
    """
    from registry.registering import Registration  # noqa: PLC0415 - keeps `ckpt --help` light

    said = Registration(
        adapter=adapter,
        base=base,
        run=run,
        step=step,
        metrics=parse.metrics(metric or (), step=step),
        note=note,
        tags=parse.pairs(tag or (), "tag"),
        arch_version=arch_version,
        with_state=with_state,
    )
    with connect() as registry, output.progress() as progress:
        intake = registry.register(path, said, progress=progress)
    if json:
        output.print_json(
            [{**views.checkpoint_json(each.checkpoint), "created": each.created} for each in intake.registered]
            + [{**views.base_json(each.base, whole=False), "created": each.created} for each in intake.models]
        )
    else:
        _print_intake(intake)
        _print_models(intake)
    _report_unreadable(intake)


def _print_intake(intake: Intake) -> None:
    left_out: dict[str, dict[str, None]] = {}
    for each in intake.registered:
        checkpoint = each.checkpoint
        what = "registered" if each.created else "known already as"
        step = "" if checkpoint.step is None else f", step {checkpoint.step}"
        output.print_line(f"{what} {checkpoint.ref}  {checkpoint.digest.short}{step}, base {checkpoint.base_name}")
        for file, reason in each.left_out.items():
            left_out.setdefault(reason, {})[file] = None
        for finding in each.report.findings:
            if finding.code in ("method_not_mergeable", "option_not_mergeable", "layer_not_mergeable"):
                output.say(f"recorded, but this version cannot merge it: {finding.found}. {finding.advice}")
    for reason, files in left_out.items():
        output.say(f"left out {output.plain(', '.join(files))}: {reason}")


def _print_models(intake: Intake) -> None:
    for each in intake.models:
        what = "recorded" if each.created else "known already:"
        output.print_line(f"{what} base model {each.base.name}  {each.base.digest}")
    if intake.models:
        output.say("not an adapter but a whole model: recorded for adapters to be trained on, see `ckpt base list`")


def _report_unreadable(intake: Intake) -> None:
    for error in intake.unreadable:
        output.say(f"[yellow]not registered:[/yellow] {output.plain(explain(error).message)}")
    if intake.unreadable:
        raise typer.Exit(explain(intake.unreadable[0]).exit_code)


@base_app.command("add")
def base_add(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="The model's folder (safetensors, or litgpt), or any fsspec URL.")
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="What to call it. Default: the folder's name.")] = "",
    arch_version: ArchVersion = "",
    copy: Annotated[bool, flag("--copy", "Put a copy into the store, instead of recording the place.")] = False,
    json: Json = False,
) -> None:
    """Fingerprint a base model and record where it is."""
    with connect() as registry, output.progress() as progress:
        added = registry.add_base(path, name=name, arch_version=arch_version, copy=copy, progress=progress)
    if json:
        output.print_json({**views.base_json(added.base, whole=False), "created": added.created})
        return
    what = "recorded" if added.created else "known already as"
    output.print_line(f"{what} {added.base.name}  {added.base.digest}")


@base_app.command("list")
def base_list(json: Json = False) -> None:
    """Show every base model."""
    with connect() as registry:
        bases = registry.bases()
    if json:
        output.print_json([views.base_json(base, whole=False) for base in bases])
    elif bases:
        views.print_bases(bases)
    else:
        output.say("no base model yet: `ckpt base add PATH`, or register an adapter that names one")


@base_app.command("show")
def base_show(name: BaseName, json: Json = False) -> None:
    """Show one base model."""
    with connect() as registry:
        base = registry.base(name)
    if json:
        output.print_json(views.base_json(base, whole=True))
    else:
        views.print_base(base)


@base_app.command("verify")
def base_verify(name: BaseName, json: Json = False) -> None:
    """Read a base model whole and compare every tensor with its fingerprint."""
    with connect() as registry, output.progress() as progress:
        found = registry.verify_base(registry.base(name), progress)
    if json:
        output.print_json(views.verification_json(found))
    else:
        views.print_verification(found)
    if not found.is_intact:
        raise typer.Exit(7)
